"""What detect.py looks at: images, videos, folders, globs, lists, streams, webcams and the screen, as `Frame`s.

A new kind of source is one function that returns a `Source`, and one line in `open_source`.
"""

from __future__ import annotations

import glob
import os
import re
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any, TypeVar
from urllib.parse import unquote
from urllib.request import urlopen

import cv2
import numpy as np

from utils.capture import StreamReader, frame_count, frames_per_second, next_frame, split_address
from utils.config import UserError, display_path
from utils.downloads import download
from utils.files import remove_leftovers, replacing
from utils.images import MAX_PIXELS, ImageError, read_image
from utils.labels import IMAGE_SUFFIXES
from utils.runtime import LOGGER

VIDEO_SUFFIXES = (".asf", ".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".wmv")
STREAM_SCHEMES = ("rtsp://", "rtmp://", "http://", "https://")
MAX_NAME_BYTES = 200  # of a fetched file; most systems hold 255, and its temporary name is longer
GRACE = 0.5  # seconds the other streams are waited for once one has a new frame
ItemT = TypeVar("ItemT")
Rounds = Generator[list["Frame"], None, None]


@dataclass(frozen=True)
class Frame:
    """One picture to look at.

    `image` is uint8 BGR (H, W, 3). `mode` is image, video, stream or screen. `frame_index` counts from 1 within a video
    or stream, `frame_count` is 0 where unknown, `fps` is what a written video is to play at, `prefix` starts the log
    line, `source_index` tells the streams of one round apart, and `capture` is the video that is being read.
    """

    path: str
    image: np.ndarray
    mode: str
    frame_index: int = 0
    frame_count: int = 0
    fps: float = 30.0
    prefix: str = ""
    source_index: int = 0
    capture: cv2.VideoCapture | None = None


@dataclass
class Source:
    """Frames, one by one (iterate it) or in rounds (`rounds()`: one list per step, one frame of each stream).

    `mode` is files, stream or screen; `count` the number of files or streams, None where there is no end; `paths` the
    files; `skipped` fills with a line for every file that could not be read, or not to its end.
    """

    mode: str
    count: int | None
    start: Callable[[Source], Rounds]
    skipped: list[str] = field(default_factory=list)
    paths: tuple[Path, ...] = ()

    @property
    def live(self) -> bool:
        """Whether frames go stale: a live source is read when a frame is wanted, never ahead."""
        return self.mode != "files"

    def rounds(self) -> Rounds:
        """A list of frames per step; close it to let files and cameras go."""
        return self.start(self)

    def __iter__(self) -> Iterator[Frame]:
        with closing(self.rounds()) as rounds:
            for frames in rounds:
                yield from frames

    def skip(self, message: str) -> None:
        """Count and name a file that is left out."""
        LOGGER.warning(f"skipped {message}")
        self.skipped.append(message)


def open_source(
    source: str | int | Path | Sequence[str | Path], vid_stride: int = 1, max_pixels: int = MAX_PIXELS
) -> Source:
    """The frames a `--source` stands for.

    A file, a folder (not what is in its folders; images first, then videos), a glob (`**` goes deep), a `.txt` with one
    image, video or folder per line, a list of these, an http(s) address of an image or video, a webcam's number, an
    rtsp, rtmp or http stream, a `.streams` file with one of these per line, or `screen [n] [left top width height]`.
    Of videos and streams every `vid_stride`-th frame is taken. Image files of more than `max_pixels` are not read.

    Raises:
        UserError: it is not there, cannot be opened, or holds no image or video.
    """
    if vid_stride < 1:
        raise UserError(f"--vid-stride {vid_stride}: expected 1 or more.")
    if not isinstance(source, (str, int, Path)):
        return files([path for entry in source for path in _expand(str(entry))], vid_stride, max_pixels)
    text = str(source).strip()
    if not text:
        raise UserError("--source is empty: give a file, a folder, an address or a webcam's number.")
    if re.search(r"//(www\.|m\.)?(youtube\.com|youtu\.be)/", text.lower()):
        raise UserError(f"{text}: YouTube pages are not read. Save the video (with yt-dlp, say) and give its path.")
    if text.lower() == "screen" or text.lower().startswith("screen "):
        return screen(text)
    if text.isdecimal():
        return streams([text], vid_stride)
    if text.lower().startswith(STREAM_SCHEMES):
        if _suffix(split_address(text).path) not in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES):
            return streams([text], vid_stride)
        return files([fetch_media(text)], vid_stride, max_pixels)
    if _suffix(text) == ".streams":
        return streams([line for _, line in _lines(Path(os.path.expanduser(text)))], vid_stride)
    return files(_expand(text), vid_stride, max_pixels)


def _suffix(path: str | Path) -> str:
    return Path(path).suffix.lower()


def fetch_media(url: str) -> Path:
    """An image or video from the web, saved in the working directory under its own name; one already there is used."""
    name = Path(unquote(split_address(url).path).replace("\\", "/")).name
    if "\0" in name or len(os.fsencode(name)) > MAX_NAME_BYTES:
        raise UserError(f"{url}: no file can have this name. Save it yourself and give its path.")
    target = Path.cwd() / name
    if target.is_file():
        LOGGER.info(f"using {name} in the working directory instead of fetching it again")
        return target
    remove_leftovers(target.parent)
    try:
        with replacing(target) as file:
            download(url, file, label=name, opener=lambda address: urlopen(address, timeout=30))
    except (OSError, HTTPException, ValueError) as error:  # ValueError: another length, or letters no address has
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{url}: not fetched ({reason}). Save the file yourself and give its path.") from None
    return target


# ---------------------------------------------------------------------------------------------------------------- files


def _expand(text: str) -> list[Path]:
    """The images and videos a path, glob or list file stands for, images first."""
    path = Path(os.path.expanduser(text))
    if os.path.isdir(path):  # unlike Path.is_dir, false for a name no file can have
        return _media(path.iterdir(), f"{text}: no image or video in this folder.", deeper=path)
    if os.path.isfile(path):
        if _suffix(path) == ".txt":
            return _listed(path)
        if _suffix(path) not in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES):
            raise UserError(f"{text}: neither an image nor a video by its suffix. {_known_suffixes()}")
        return [path]
    if glob.has_magic(text):
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]
        return _media(found, f"{text}: matches no image or video.")
    raise UserError(f"{text}: no such file or folder (looked in {Path.cwd()}). Check --source.")


def _media(paths: Iterable[Path], nothing: str, deeper: Path | None = None) -> list[Path]:
    found = sorted(path for path in paths if path.is_file() and not path.name.startswith("."))
    images = [path for path in found if _suffix(path) in IMAGE_SUFFIXES]
    videos = [path for path in found if _suffix(path) in VIDEO_SUFFIXES]
    if not images and not videos:
        if deeper is not None and any(path.is_dir() for path in deeper.iterdir()):
            nothing += f" Folders in it are not searched: --source '{deeper}/**/*' does that."
        raise UserError(f"{nothing} {_known_suffixes()}")
    return images + videos


def _known_suffixes() -> str:
    names = [" ".join(sorted(s.lstrip(".") for s in suffixes)) for suffixes in (IMAGE_SUFFIXES, VIDEO_SUFFIXES)]
    return f"Images end in {names[0]}; videos in {names[1]}."


def _lines(path: Path) -> list[tuple[int, str]]:
    """Numbered lines of a list file, without empty ones and `#` comments."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: a name with NUL, or not UTF-8
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{path}: cannot be read ({reason}).") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not lines:
        raise UserError(f"{path}: lists nothing. Write one source per line.")
    return lines


def _listed(file: Path) -> list[Path]:
    """The files named by a `.txt`; a relative line is looked for in the working directory, then beside the list."""
    paths = []
    for number, line in _lines(file):
        if line.isdecimal() or line.lower().startswith(STREAM_SCHEMES):
            raise UserError(f"{display_path(file)}:{number}: {line} is a stream. Rename the list to end in .streams.")
        if _suffix(line) == ".txt":
            raise UserError(f"{display_path(file)}:{number}: {line} is a list too. Write its lines here.")
        beside = file.parent / line
        here = os.path.expanduser(line)
        at_list = line.startswith("./") or (not os.path.exists(here) and os.path.exists(beside))
        chosen = beside if at_list else here
        try:
            paths += _expand(str(chosen))
        except UserError as error:
            raise UserError(f"{display_path(file)}:{number}: {error}") from None
    return paths


def files(paths: Sequence[Path], vid_stride: int = 1, max_pixels: int = MAX_PIXELS) -> Source:
    """Images and videos. One that cannot be read is skipped and counted; with nothing else to read it is an error."""
    files = tuple(paths)
    return Source("files", len(files), lambda src: _file_rounds(src, files, vid_stride, max_pixels), paths=files)


def _file_rounds(source: Source, paths: Sequence[Path], vid_stride: int, max_pixels: int) -> Rounds:
    any_frame = False
    for number, path in enumerate(paths, 1):
        place = f"{number}/{len(paths)}"
        try:
            if _suffix(path) in VIDEO_SUFFIXES:
                for frame in _video_frames(source, path, place, vid_stride):
                    any_frame = True
                    yield [frame]
            else:
                image = read_image(path, max_pixels)
                any_frame = True
                yield [Frame(str(path), image, "image", prefix=f"image {place} {path}: ")]
        except ImageError as error:
            if len(paths) == 1:
                raise UserError(str(error)) from None
            source.skip(str(error))
    if not any_frame:
        raise UserError(f"none of the {len(paths)} files could be read; the first: {source.skipped[0]}")


def _video_frames(source: Source, path: Path, place: str, stride: int) -> Iterator[Frame]:
    """Every `stride`-th frame of a video; ImageError where it cannot be opened or holds no frame."""
    capture = cv2.VideoCapture(str(path))
    try:
        if not capture.isOpened():
            raise ImageError(f"{path}: cannot be opened as a video. It may be damaged, or in a format OpenCV lacks.")
        total = frame_count(capture)
        fps = frames_per_second(capture)
        read = 0
        while True:
            image, grabbed = next_frame(capture, stride)
            read += grabbed
            if image is None:
                break
            index, count = read // stride, max(total // stride, read // stride) if total else 0
            prefix = f"video {place} ({index}/{count or '?'}) {path}: "
            # played at the source's speed whatever the stride
            yield Frame(str(path), image, "video", index, count, fps / stride, prefix, capture=capture)
    finally:
        capture.release()
    if read < stride:
        raise ImageError(f"{path}: this video has {f'only {read} frames' if read else 'no frame that can be read'}.")
    # containers round their frame count, so a frame or two missing is no damage
    if read < total - max(2, total // 100):
        message = f"{path}: ended after {read} of {total} frames; the file may be cut off."
        LOGGER.warning(message)
        source.skipped.append(message)


# -------------------------------------------------------------------------------------------------------------- streams


def streams(addresses: Sequence[str], vid_stride: int = 1) -> Source:
    """Webcams and network streams, each in its own thread; a round holds the newest frame of every one that has any."""
    return Source("stream", len(addresses), lambda source: _stream_rounds(addresses, vid_stride))


def _stream_rounds(addresses: Sequence[str], vid_stride: int) -> Rounds:
    ready = threading.Condition()
    readers: list[StreamReader] = []
    try:
        for index, address in enumerate(addresses):
            reader = StreamReader(index, address, ready, vid_stride)
            if reader.name in (other.name for other in readers):  # results are kept apart by name
                reader.name += f"_{index}"
            readers.append(reader)
        for reader in readers:
            reader.start()
        while True:
            with ready:
                while not any(r.newest is not None for r in readers) and not all(r.ended for r in readers):
                    ready.wait(timeout=1)  # the limit lets Ctrl-C through on Windows
                ready.wait_for(lambda: all(r.newest is not None or r.ended for r in readers), timeout=GRACE)
                taken = [(reader, *reader.take()) for reader in readers if reader.newest is not None]
            if not taken:
                return
            yield [_stream_frame(reader, image, number, vid_stride) for reader, image, number in taken]
    finally:
        for reader in readers:
            reader.close()


def _stream_frame(reader: StreamReader, image: np.ndarray, number: int, vid_stride: int) -> Frame:
    prefix = f"{reader.index}: "
    return Frame(reader.name, image, "stream", number, 0, reader.fps / vid_stride, prefix, reader.index)


# --------------------------------------------------------------------------------------------------------------- screen


def screen(text: str) -> Source:
    """Pictures of the screen: `screen`, then optionally its number, then optionally left, top, width and height."""
    words = text.split()[1:]
    if len(words) not in (0, 1, 4, 5) or not all(re.fullmatch(r"-?\d{1,6}", word) for word in words):
        raise UserError(f"--source '{text}': expected screen [number] [left top width height], all whole numbers.")
    numbers = [int(word) for word in words]
    number = numbers[0] if len(numbers) in (1, 5) else 0
    return Source("screen", None, lambda source: _screen_rounds(number, numbers[-4:] if len(numbers) > 1 else None))


def _screen_rounds(number: int, area: list[int] | None) -> Rounds:
    try:
        import mss
    except ImportError:
        raise UserError("--source screen needs the package mss: pip install mss") from None
    try:
        grabber: Any = mss.mss()
    except mss.exception.ScreenShotError as error:
        raise UserError(f"--source screen: there is no screen to look at here ({error}).") from None
    with grabber:
        if not 0 <= number < len(grabber.monitors):
            raise UserError(f"--source screen {number}: there are screens 0 to {len(grabber.monitors) - 1} (0 is all).")
        monitor = grabber.monitors[number]
        left, top, width, height = area or (0, 0, monitor["width"], monitor["height"])
        box = {"left": monitor["left"] + left, "top": monitor["top"] + top, "width": width, "height": height}
        prefix = f"screen {number} (LTWH): {box['left']},{box['top']},{width},{height}: "
        index = 0
        while True:
            index += 1
            image = np.ascontiguousarray(np.asarray(grabber.grab(box))[:, :, :3])  # BGRA to BGR
            yield [Frame(f"screen{number}", image, "screen", index, 0, 30.0, prefix)]


# ------------------------------------------------------------------------------------------------------------- prefetch


def prefetch(items: Iterator[ItemT], depth: int = 3) -> Generator[ItemT, None, None]:
    """The same items in the same order, made up to `depth` ahead in a background thread.

    What the items' iterator raises is raised here at its place. Closing this generator stops the thread and closes the
    iterator.
    """
    queue: Queue[tuple[str, Any]] = Queue(maxsize=depth)
    stop = threading.Event()

    def put(kind: str, value: Any = None) -> None:
        while not stop.is_set():
            with suppress(Full):
                return queue.put((kind, value), timeout=0.2)

    def work() -> None:
        try:
            for item in items:
                put("item", item)
                if stop.is_set():
                    break
            put("end")
        except BaseException as error:  # handed to the consumer, whatever it is
            put("error", error)
        finally:
            getattr(items, "close", lambda: None)()

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            try:
                kind, value = queue.get(timeout=1)  # the limit lets Ctrl-C through on Windows
            except Empty:
                continue
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stop.set()
        thread.join(timeout=5)
