"""Every kind of `--source`, with files, videos and servers made here."""

from __future__ import annotations

import contextlib
import http.server
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.fuzz.damage import damage_bytes
from utils import capture
from utils.capture import stream_name
from utils.config import UserError
from utils.sources import Source, open_source, prefetch


def picture(value: int, shape_hw: tuple[int, int] = (48, 64)) -> np.ndarray:
    image = np.full((*shape_hw, 3), value, np.uint8)
    image[:8, :8] = (0, 0, 255)
    return image


def write(path: Path, value: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = cv2.imencode(".png" if path.suffix.lower() == ".png" else ".jpg", picture(value))[1]
    path.write_bytes(data.tobytes())
    return path


def video(path: Path, frames: int = 10, fps: float = 25.0) -> Path:
    """Frame k (from 0) is grey of brightness 20 * (k mod 10)."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, (64, 48))
    for k in range(frames):
        writer.write(np.full((48, 64, 3), 20 * (k % 10), np.uint8))
    writer.release()
    return path


def names(source: Source) -> list[str]:
    return [Path(frame.path).name for frame in source]


# ---------------------------------------------------------------------------------------------------------------- files


def test_one_image_is_one_frame_in_bgr(tmp_path: Path) -> None:
    (frame,) = open_source(str(write(tmp_path / "a.png")))
    assert frame.mode == "image" and frame.image.shape == (48, 64, 3)
    assert frame.image[2, 2].tolist() == [0, 0, 255]
    assert frame.prefix == f"image 1/1 {tmp_path / 'a.png'}: "


def test_suffixes_count_in_any_case(tmp_path: Path) -> None:
    write(tmp_path / "a.JPG")
    video(tmp_path / "b.mp4", 2).rename(tmp_path / "b.MP4")
    assert names(open_source(tmp_path)) == ["a.JPG", "b.MP4", "b.MP4"]


def test_a_folder_gives_images_in_order_then_videos_and_leaves_its_folders_alone(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4", 1)
    for name in ("c.png", "b.jpg", "deep/d.jpg"):
        write(tmp_path / name)
    (tmp_path / "notes.md").write_text("no picture")
    source = open_source(tmp_path)
    assert source.count == 3 and source.mode == "files" and not source.live
    assert [frame.prefix.split(tmp_path.as_posix())[0] for frame in source] == [
        "image 1/3 ",
        "image 2/3 ",
        "video 3/3 (1/1) ",
    ]


def test_globs_go_deep_only_with_two_stars(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.png", "deep/c.jpg"):
        write(tmp_path / name)
    assert names(open_source(f"{tmp_path}/*.jpg")) == ["a.jpg"]
    assert names(open_source(f"{tmp_path}/**/*.jpg")) == ["a.jpg", "c.jpg"]


def test_a_name_with_glob_characters_that_exists_is_taken_as_it_is(tmp_path: Path) -> None:
    write(tmp_path / "a[1].jpg")
    assert names(open_source(tmp_path / "a[1].jpg")) == ["a[1].jpg"]


def test_a_list_file_names_images_videos_and_folders(in_tmp: Path) -> None:
    write(in_tmp / "lists/beside.jpg")
    write(in_tmp / "here.jpg")
    write(in_tmp / "folder/inside.jpg")
    video(in_tmp / "v.mp4", 2)
    listed = in_tmp / "lists/all.txt"
    listed.write_text("# a comment\n./beside.jpg\n\nhere.jpg\nfolder\nv.mp4\n")
    assert names(open_source(listed)) == ["beside.jpg", "here.jpg", "inside.jpg", "v.mp4", "v.mp4"]


def test_a_missing_line_of_a_list_is_named_with_its_number(tmp_path: Path) -> None:
    listed = tmp_path / "all.txt"
    listed.write_text("\nnowhere.jpg\n")
    with pytest.raises(UserError, match=r"all\.txt:2: .*nowhere\.jpg: no such file"):
        open_source(listed)


def test_a_list_of_streams_must_end_in_streams(tmp_path: Path) -> None:
    listed = tmp_path / "cameras.txt"
    listed.write_text("rtsp://host/1\n")
    with pytest.raises(UserError, match=r"cameras\.txt:1: .*\.streams"):
        open_source(listed)


def test_python_lists_keep_their_order(tmp_path: Path) -> None:
    files = [write(tmp_path / name) for name in ("b.jpg", "a.jpg")]
    assert names(open_source(files)) == ["b.jpg", "a.jpg"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (" ", "--source is empty"),
        ("nowhere.jpg", "no such file or folder"),
        ("empty", "no image or video in this folder"),
        ("nested", r"not searched: --source 'nested/\*\*/\*'"),
        ("*.bmp", "matches no image or video"),
        ("notes.md", "neither an image nor a video"),
        ("empty.txt", "lists nothing"),
        ("https://www.youtube.com/watch?v=1", "YouTube"),
        ("screen 1 2", "left top width height"),
        ("screen " + "9" * 5000, "left top width height"),
        ("a" * 300 + ".jpg", "no such file or folder"),
        ("a" * 300 + ".txt", "no such file or folder"),
        ("a" * 300 + "*.jpg", "matches no image or video"),
        ("a\0b.jpg", "no such file or folder"),
        ("a\0b*.jpg", "matches no image or video"),
        ("a\0b.streams", "cannot be read"),
        ("a" * 300 + ".streams", r"cannot be read \(File name too long"),
        ("~nosuchuser/a.jpg", "no such file or folder"),
        ("~nosuchuser/a.streams", "cannot be read"),
        ("loop.txt", "loop.txt:1: loop.txt is a list too"),
        ("odd.txt", r"odd\.txt:1: .*no such file or folder"),
        ("latin.txt", r"latin\.txt: cannot be read \('utf-8' codec"),
        ("odd.streams", "webcams have smaller numbers"),
        ("9" * 5000, "webcams have smaller numbers"),
        ("http://[::1", "not an address"),
        ("http://[::1/a.jpg", "not an address"),
        ("rtsp://[", "not an address"),
        ("https://example.invalid/%00.jpg", "no file can have this name"),
        ("https://example.invalid/" + "a" * 300 + ".jpg", "no file can have this name"),
        ("http://127.0.0.1:9/\u00e4\u0142.jpg", "not fetched"),
        ("http://127.0.0.1:99999/a.jpg", "not fetched"),
        ("http://127.0.0.1:port/a.jpg", "not fetched"),
        ("http://127.0.0.1:9/a b\r\nHost: x.jpg", "not fetched"),
    ],
)
def test_sources_that_cannot_be_read_say_why(in_tmp: Path, source: str, message: str) -> None:
    (in_tmp / "empty").mkdir()
    write(in_tmp / "nested/deep/a.jpg")
    (in_tmp / "notes.md").write_text("text")
    (in_tmp / "empty.txt").write_text("\n# nothing\n")
    (in_tmp / "loop.txt").write_text("loop.txt\n")
    (in_tmp / "odd.txt").write_text("a" * 300 + ".jpg\n")
    (in_tmp / "latin.txt").write_bytes(b"\xe4.jpg\n")
    (in_tmp / "odd.streams").write_text("9" * 30)
    with pytest.raises(UserError, match=message):
        list(open_source(source))


def test_a_bad_file_in_a_folder_is_skipped_and_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes(b"")
    (tmp_path / "c.jpg").write_text("not an image")
    (tmp_path / "d.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "e.mp4").write_bytes(b"not a video")
    write(tmp_path / "f.jpg")
    source = open_source(tmp_path)
    assert names(source) == ["a.jpg", "f.jpg"]
    assert [Path(line.split(":")[0]).stem for line in source.skipped] == ["b", "c", "d", "e"]


def test_an_image_above_the_bound_is_skipped_and_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg")
    write(tmp_path / "b.png")
    source = open_source(tmp_path, max_pixels=48 * 64 - 1)
    with pytest.raises(UserError, match=r"none of the 2 files could be read; the first: .*a\.jpg: 64 x 48 pixels"):
        list(source)
    assert len(list(open_source(tmp_path, max_pixels=48 * 64))) == 2


@pytest.mark.parametrize("name", ["a.jpg", "a.mp4"])
def test_a_bad_file_alone_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"rubbish")
    with pytest.raises(UserError, match=rf"{name}"):
        list(open_source(tmp_path / name))


def test_a_folder_of_bad_files_only_is_an_error(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"rubbish")
    with pytest.raises(UserError, match="none of the 2 files"):
        list(open_source(tmp_path))


# --------------------------------------------------------------------------------------------------------------- videos


def test_a_video_gives_its_frames_numbered_from_one(tmp_path: Path) -> None:
    frames = list(open_source(video(tmp_path / "v.mp4", 10)))
    assert [frame.frame_index for frame in frames] == list(range(1, 11))
    assert {(frame.mode, frame.frame_count, frame.fps) for frame in frames} == {("video", 10, 25.0)}
    assert frames[3].prefix == f"video 1/1 (4/10) {tmp_path / 'v.mp4'}: "
    assert [round(frame.image.mean() / 20) for frame in frames] == list(range(10))


def test_vid_stride_takes_every_third_frame_and_keeps_the_speed(tmp_path: Path) -> None:
    frames = list(open_source(video(tmp_path / "v.mp4", 10, fps=30), vid_stride=3))
    assert [round(frame.image.mean() / 20) for frame in frames] == [2, 5, 8]
    assert [(frame.frame_index, frame.frame_count, frame.fps) for frame in frames] == [(k, 3, 10.0) for k in (1, 2, 3)]


def test_a_stride_longer_than_the_video_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only 4 frames"):
        list(open_source(video(tmp_path / "v.mp4", 4), vid_stride=5))
    with pytest.raises(UserError, match="--vid-stride 0"):
        open_source(tmp_path / "v.mp4", vid_stride=0)


def test_a_video_cut_off_gives_what_is_there_and_is_named(tmp_path: Path) -> None:
    path = tmp_path / "v.avi"  # AVI: its header comes first, so that a cut file still opens
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25, (64, 48))
    for k in range(40):
        writer.write(picture(k))
    writer.release()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    source = open_source(path)
    frames = list(source)
    assert 5 < len(frames) < 40
    assert len(source.skipped) == 1 and "of 40 frames" in source.skipped[0]


@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv"])
def test_damaged_videos_are_read_as_far_as_they_go_or_named(suffix: str, tmp_path: Path) -> None:
    path, codec = tmp_path / f"v.{suffix}", "MJPG" if suffix == "avi" else "mp4v"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 25, (64, 48))
    for k in range(12):
        writer.write(picture(20 * k))
    writer.release()
    whole, outcomes = path.read_bytes(), set()
    begun = time.process_time()
    for number in range(40):
        path.write_bytes(damage_bytes(np.random.default_rng(number), whole))
        try:
            frames = list(itertools.islice(open_source(path), 500))
            assert all(frame.image.dtype == np.uint8 and frame.image.ndim == 3 and frame.fps > 0 for frame in frames)
            outcomes.add("read")
        except UserError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"} and time.process_time() - begun < 40


@pytest.mark.parametrize("says", [float("nan"), float("inf"), -1.0, 1e300, -9.2e18])
def test_a_video_that_says_nonsense_about_its_length_is_read(
    says: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Capture:
        def __init__(self, path: str) -> None:
            self.real = real(path)

        def __getattr__(self, name: str) -> object:
            return (lambda _: says) if name == "get" else getattr(self.real, name)

    real = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", Capture)
    source = open_source(video(tmp_path / "v.mp4", 3))
    frames = list(source)
    assert [(frame.frame_index, frame.frame_count, frame.fps) for frame in frames] == [(k, 0, 30.0) for k in (1, 2, 3)]
    assert not source.skipped


# -------------------------------------------------------------------------------------------------------------- streams


def running_threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith(("stream", "prefetch"))}


def test_a_streams_file_gives_rounds_of_the_newest_frames_and_ends_with_them(tmp_path: Path) -> None:
    listed = tmp_path / "cameras.streams"
    listed.write_text(f"{video(tmp_path / 'a.mp4', 8, fps=50)}\n# off\n{video(tmp_path / 'b.mp4', 5, fps=50)}\n")
    source = open_source(listed)
    assert source.live and source.mode == "stream" and source.count == 2
    rounds = list(source.rounds())
    assert [frame.source_index for frame in rounds[0]] == [0, 1]
    assert {frame.mode for frames in rounds for frame in frames} == {"stream"}
    for index in (0, 1):
        numbers = [frame.frame_index for frames in rounds for frame in frames if frame.source_index == index]
        assert numbers[0] == 1 and numbers == sorted(set(numbers)), "a frame came twice or out of order"
    assert not running_threads()


def test_leaving_a_stream_early_stops_its_thread(tmp_path: Path) -> None:
    listed = tmp_path / "cameras.streams"
    listed.write_text(str(video(tmp_path / "a.mp4", 100, fps=25)))
    started = time.monotonic()
    rounds = open_source(listed).rounds()
    next(rounds)
    assert running_threads()
    rounds.close()
    assert not running_threads() and time.monotonic() - started < 3


def test_a_slow_reader_gets_the_newest_frame_not_the_next(tmp_path: Path) -> None:
    listed = tmp_path / "cameras.streams"
    listed.write_text(str(video(tmp_path / "a.mp4", 60, fps=50)))
    with contextlib.closing(open_source(listed).rounds()) as rounds:
        next(rounds)
        time.sleep(0.6)
        assert next(rounds)[0].frame_index > 5


@pytest.mark.parametrize("source", ["97", "rtsp://127.0.0.1:9/nothing"])
def test_a_camera_that_is_not_there_is_an_error(source: str) -> None:
    with pytest.raises(UserError, match="cannot be opened"):
        list(open_source(source))


def test_stream_names_hold_no_password_and_no_odd_letters() -> None:
    assert stream_name("rtsp://me:secret@10.0.0.5:554/live/1?token=x") == "rtsp_10.0.0.5_554_live_1"
    assert stream_name("0") == "0"


@contextlib.contextmanager
def server(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.daemon_threads = True
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


class MotionJpeg(http.server.BaseHTTPRequestHandler):
    """Sixty pictures a second apart by 10 ms, then the connection is closed."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        data = cv2.imencode(".jpg", picture(90))[1].tobytes()
        with contextlib.suppress(OSError):
            for _ in range(60):
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
                self.wfile.write(head.encode() + data + b"\r\n")
                time.sleep(0.01)

    def log_message(self, *_: object) -> None:
        pass


def test_a_network_stream_is_read_and_given_up_when_it_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "REOPEN_AFTER", (0.01, 0.01))
    with server(MotionJpeg) as address:
        rounds = open_source(f"{address}/live").rounds()
        first = list(itertools.islice(rounds, 5))
    assert all(frames[0].image.shape == (48, 64, 3) for frames in first)
    assert [frames[0].frame_index for frames in first] == sorted({frames[0].frame_index for frames in first})
    for _ in rounds:  # what was on its way; then the server is gone, and so the iteration must end
        pass
    assert not running_threads()


# ------------------------------------------------------------------------------------------------------------------ web


def test_an_image_by_its_address_is_saved_under_its_name(in_tmp: Path) -> None:
    data = cv2.imencode(".jpg", picture(90))[1].tobytes()

    class Files(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path.startswith("/a%20b.jpg")
            self.send_response(200 if found else 404)
            self.end_headers()
            if found:
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with server(Files) as address:
        assert names(open_source(f"{address}/a%20b.jpg?size=large")) == ["a b.jpg"]
        with pytest.raises(UserError, match=r"c\.jpg: not fetched"):
            open_source(f"{address}/c.jpg")
    assert [path.name for path in in_tmp.iterdir()] == ["a b.jpg"]
    assert names(open_source(f"{address}/a%20b.jpg")) == ["a b.jpg"], "a file already here needs no network"


@pytest.mark.parametrize("chunked", [True, False])
def test_a_download_that_breaks_off_is_not_kept(chunked: bool, in_tmp: Path) -> None:
    data = cv2.imencode(".jpg", picture(90))[1].tobytes()
    whole = [False]

    class Files(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Connection", "close")
            self.send_header(*("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(len(data))))
            self.end_headers()
            part = data if whole[0] else data[: len(data) // 2]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part) if chunked else part)
            self.wfile.write(b"0\r\n\r\n" if chunked and whole[0] else b"")

        def log_message(self, *_: object) -> None:
            pass

    with server(Files) as address:
        with pytest.raises(UserError, match=r"a\.jpg: not fetched \(.* Save the file yourself"):
            open_source(f"{address}/a.jpg")
        assert not list(in_tmp.iterdir())
        whole[0] = True
        assert names(open_source(f"{address}/a.jpg")) == ["a.jpg"]
    assert (in_tmp / "a.jpg").read_bytes() == data


def test_an_address_without_a_network_is_one_clear_error(in_tmp: Path) -> None:
    with pytest.raises(UserError, match=r"not fetched .* give its path"):
        open_source("http://127.0.0.1:9/a.jpg")


def test_the_screen_needs_its_package_or_a_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    with pytest.raises(UserError, match=r"pip install mss|no screen"):
        next(open_source("screen 0 10 20 300 200").rounds())


# ------------------------------------------------------------------------------------------------------------- prefetch


def test_prefetch_keeps_the_order_and_the_error() -> None:
    def numbers() -> Iterator[int]:
        yield from range(20)
        raise UserError("the 21st is broken")

    got = []
    with pytest.raises(UserError, match="21st"):
        for number in prefetch(numbers(), depth=3):
            got.append(number)
    assert got == list(range(20))
    assert not running_threads()


def test_prefetch_works_ahead_but_no_further_than_asked_and_closes_its_source() -> None:
    made: list[int] = []
    closed = threading.Event()

    def numbers() -> Iterator[int]:
        try:
            for number in itertools.count():
                made.append(number)
                yield number
        finally:
            closed.set()

    items = prefetch(numbers(), depth=3)
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(made) == 5  # the one taken, three waiting, one in hand
    items.close()
    assert closed.wait(5) and not running_threads()
