"""Files by name: what is on this machine is found, the rest is fetched whole and checked, or refused with a reason."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import socket
import stat
import tarfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from utils import downloads
from utils.config import ROOT, UserError
from utils.downloads import DownloadProblem, fetch_archive, fetch_weights, find_weights, unpack

WEIGHTS_URL = "https://github.com/ultralytics/yolov5/releases/download/v7.0/yolov5s.pt"


class Server:
    """A web server on this machine that stands in for every https address, by the last part of its path."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.short: set[str] = set()  # names whose announced length is longer than the body
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.rsplit("/", 1)[1]
                body = server.files.get(name)
                self.send_response(200 if body is not None else 404)
                self.send_header("Content-Length", str(len(body or b"") + 1000 * (name in server.short)))
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, *_: Any) -> None:
                """Quiet."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def open_url(self, url: str) -> Any:
        self.asked.append(url)
        local = f"http://127.0.0.1:{self.http.server_address[1]}/{url.rsplit('/', 1)[1]}"
        return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(local, timeout=5)

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    instance = Server()
    monkeypatch.setattr(downloads, "open_url", instance.open_url)
    yield instance
    instance.close()


@pytest.fixture
def alone(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, no folder of weights, an empty repository, no network."""
    work, repository = in_tmp / "work", in_tmp / "repository"
    work.mkdir()
    repository.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.delenv("YOLOV5_WEIGHTS_DIR", raising=False)
    monkeypatch.setattr(downloads, "ROOT", repository)
    monkeypatch.setattr(downloads, "open_url", no_network)
    return work


def no_network(url: str) -> Any:
    raise urllib.error.URLError(OSError(-3, "Temporary failure in name resolution"))


def weights_bytes(size: int = 150_000) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("yolov5s/data.pkl", b"\x80\x02}.")
        archive.writestr("yolov5s/data/0", os.urandom(size))
    return buffer.getvalue()


# -------------------------------------------------------------------------------------------------------------- finding


def test_a_path_is_itself(alone: Path) -> None:
    (alone / "runs").mkdir()
    (alone / "runs/best.pt").write_bytes(b"x")
    assert find_weights("runs/best.pt").read_bytes() == b"x"
    assert find_weights(alone / "runs/best.pt") == alone / "runs/best.pt"


def test_a_name_is_looked_for_here_then_in_the_weights_folder_then_in_the_repository(
    alone: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    store.mkdir()
    monkeypatch.setenv("YOLOV5_WEIGHTS_DIR", str(store))
    for folder in (downloads.ROOT, store, alone):
        (folder / "mine.pt").write_bytes(str(folder).encode())
        assert find_weights("mine.pt").read_bytes() == str(folder).encode()
    assert find_weights("mine").read_bytes() == str(alone).encode(), "without the suffix"


def test_the_shared_weights_are_found_by_name(weights_dir: Path, in_tmp: Path) -> None:
    assert find_weights("yolov5n.pt").samefile(weights_dir / "yolov5n.pt")


def test_the_embedded_weights_are_found_from_any_folder(in_tmp: Path) -> None:
    if not (ROOT / "yolov5n-shapes.pt").is_file():
        pytest.skip("yolov5n-shapes.pt is not part of this tree")
    assert find_weights("yolov5n-shapes.pt").samefile(ROOT / "yolov5n-shapes.pt")


def test_a_path_is_never_taken_for_another_file_of_the_same_name(alone: Path) -> None:
    (alone / "best.pt").write_bytes(b"another run's")
    with pytest.raises(UserError, match=r"runs/exp2/best\.pt: no such weights file"):
        find_weights("runs/exp2/best.pt")


def test_an_official_name_in_a_folder_that_is_missing_is_found_here(alone: Path) -> None:
    (alone / "yolov5s.pt").write_bytes(b"x")
    assert find_weights("weights/yolov5s.pt").samefile(alone / "yolov5s.pt")


def test_another_missing_name_gets_the_places_and_the_closest(alone: Path) -> None:
    (alone / "helmets.pt").write_bytes(b"x")
    with pytest.raises(UserError) as caught:
        find_weights("helmet.pt")
    line = str(caught.value)
    assert str(alone) in line and str(downloads.ROOT) in line and "Did you mean 'helmets.pt'?" in line
    assert "YOLOV5_WEIGHTS_DIR is not set" in line and "\n" not in line
    with pytest.raises(UserError, match=r"Did you mean 'yolov5s\.pt'"):
        find_weights("yolov5ss.pt")


def test_no_name_at_all_is_a_mistake(alone: Path) -> None:
    with pytest.raises(UserError, match="no file named"):
        find_weights("")


# ------------------------------------------------------------------------------------------------------------- fetching


@pytest.mark.parametrize("name", ["yolov5s.pt", "yolov5m6.pt", "yolov5n-seg.pt", "yolov5x-cls.pt"])
def test_an_official_name_is_fetched_into_the_working_directory(alone: Path, server: Server, name: str) -> None:
    server.files[name] = weights_bytes()
    found = find_weights(name)
    assert found == alone / name and found.read_bytes() == server.files[name]
    assert server.asked == [WEIGHTS_URL.replace("yolov5s.pt", name)]
    assert [file.name for file in alone.iterdir()] == [name], "nothing else is left"
    find_weights(name)
    assert len(server.asked) == 1, "the second time it is there"


def test_without_a_network_one_line_says_what_runs_instead(alone: Path) -> None:
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        find_weights("yolov5s.pt")
    assert time.monotonic() - start < 1
    line = str(caught.value)
    assert line.startswith("yolov5s.pt: ") and str(alone) in line and "Temporary failure in name resolution" in line
    assert "--data shapes.yaml --weights yolov5n-shapes.pt" in line and "\n" not in line
    assert not list(alone.iterdir())


BAD = {
    "too few bytes": b"x" * 1000,
    "a web page": b"<html>" * 50_000,
    "half a file": weights_bytes()[:120_000],
    "a zip of something else": b"",
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD.keys())
def test_what_arrives_broken_does_not_stay(alone: Path, server: Server, body: bytes) -> None:
    if not body:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("readme.txt", "a" * 200_000)
        body = buffer.getvalue()
    server.files["yolov5s.pt"] = body
    with pytest.raises(UserError, match=r"too few for weights|not a whole checkpoint"):
        find_weights("yolov5s.pt")
    assert not list(alone.iterdir())


def test_a_flipped_bit_is_noticed(alone: Path, server: Server) -> None:
    body = bytearray(weights_bytes())
    body[len(body) // 2] ^= 1
    server.files["yolov5s.pt"] = bytes(body)
    with pytest.raises(UserError, match="not a whole checkpoint"):
        find_weights("yolov5s.pt")


def test_a_connection_that_breaks_is_noticed(alone: Path, server: Server) -> None:
    server.files["yolov5s.pt"] = weights_bytes()
    server.short.add("yolov5s.pt")
    with pytest.raises(UserError, match=r"yolov5s\.pt: not in .* not fetched"):
        find_weights("yolov5s.pt")
    assert not list(alone.iterdir())


def test_a_file_that_is_not_on_the_server_gets_its_status(alone: Path, server: Server) -> None:
    with pytest.raises(UserError, match="Not Found"):
        find_weights("yolov5s.pt")


def test_the_sum_is_checked_where_it_is_known(alone: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    body = weights_bytes()
    server.files["yolov5s.pt"] = body
    monkeypatch.setattr(downloads, "SHA256", {("yolov5s.pt", "v7.0"): "0" * 64})
    with pytest.raises(UserError, match=f"its sha256 {hashlib.sha256(body).hexdigest()} is not that of"):
        find_weights("yolov5s.pt")
    assert not list(alone.iterdir())
    monkeypatch.setattr(downloads, "SHA256", {("yolov5s.pt", "v7.0"): hashlib.sha256(body).hexdigest()})
    assert find_weights("yolov5s.pt").is_file()


def test_the_known_sum_is_that_of_the_official_file(weights_dir: Path, alone: Path, server: Server) -> None:
    server.files["yolov5n.pt"] = (weights_dir / "yolov5n.pt").read_bytes()
    assert fetch_weights("yolov5n.pt", alone, tag="v6.0").is_file()
    assert "/v6.0/yolov5n.pt" in server.asked[0]


def test_an_https_address_of_weights_is_fetched_and_others_are_not(alone: Path, server: Server) -> None:
    server.files["helmets.pt"] = weights_bytes()
    assert (
        find_weights("https://example.org/a/helmets.pt?download=1".replace("?download=1", "")) == alone / "helmets.pt"
    )
    with pytest.raises(UserError, match=r"not the address of a \.pt file"):
        find_weights("https://example.org/a/helmets.exe")


@pytest.mark.parametrize("url", ["http://example.org/yolov5s.pt", "file:///etc/passwd", "ftp://example.org/a.zip"])
def test_only_https_is_opened(url: str) -> None:
    with pytest.raises(urllib.error.URLError, match="only https"):
        downloads.open_url(url)


def test_a_name_that_is_never_looked_up_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, done = [], threading.Event()

    def hang(*address: Any, **_: Any) -> Any:
        asked.append(address[0])
        done.wait(30)
        raise OSError("never")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    monkeypatch.setattr(downloads, "ANSWER_SECONDS", 0.2)
    for variable in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    start = time.monotonic()
    with pytest.raises(urllib.error.URLError, match=r"no answer within 0\.2 seconds"):
        downloads.open_url("https://example.org/a.zip")
    assert time.monotonic() - start < 5 and asked == ["example.org"], "one attempt"
    done.set()


@pytest.mark.parametrize("url", ["https://[::1", "https://example.org:port/a.zip"])
def test_an_address_that_cannot_be_read_is_an_answer(url: str) -> None:
    with pytest.raises((urllib.error.URLError, HTTPException)):
        downloads.open_url(url)


def test_a_redirect_away_from_https_is_not_followed() -> None:
    handler, request = downloads._HttpsOnly(), urllib.request.Request("https://example.org/a")
    with pytest.raises(urllib.error.URLError, match="not https"):
        handler.redirect_request(request, None, 302, "Found", {}, "http://example.org/a")
    assert handler.redirect_request(request, None, 302, "Found", {}, "https://example.org/b") is not None


# ------------------------------------------------------------------------------------------------------------- archives


def zip_of(path: Path, members: dict[str, bytes | None]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data or b"")
    return path


def tar_of(path: Path, members: dict[str, bytes], mode: str) -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


FILES = {"coco128/images/a.jpg": b"jpeg", "coco128/labels/a.txt": b"0 .5 .5 1 1\n", "__MACOSX/x": b"x"}


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz"])
def test_an_archive_is_fetched_and_unpacked(tmp_path: Path, server: Server, suffix: str) -> None:
    source = tmp_path / f"source{suffix}"
    modes = {"gz": "w:gz", "tgz": "w:gz", "bz2": "w:bz2", "tbz2": "w:bz2", "xz": "w:xz", "txz": "w:xz", "tar": "w"}
    if suffix == ".zip":
        zip_of(source, dict(FILES))
    else:
        tar_of(source, FILES, modes[suffix.rsplit(".", 1)[1]])
    server.files[f"coco128{suffix}"] = source.read_bytes()
    folder = tmp_path / "datasets"
    assert fetch_archive(f"https://example.org/coco128{suffix}", folder) == folder / "coco128"
    assert (folder / "coco128/labels/a.txt").read_bytes() == FILES["coco128/labels/a.txt"]
    assert sorted(file.name for file in folder.rglob("*")) == ["a.jpg", "a.txt", "coco128", "images", "labels"]


def test_files_that_are_there_already_are_kept(tmp_path: Path, server: Server) -> None:
    mine = tmp_path / "coco128/labels/a.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    server.files["c.zip"] = zip_of(tmp_path / "c.zip", dict(FILES)).read_bytes()
    fetch_archive("https://example.org/c.zip", tmp_path)
    assert mine.read_text() == "mine" and (tmp_path / "coco128/images/a.jpg").is_file()


@pytest.mark.parametrize("url", ["http://example.org/a.zip", "https://example.org/a.sh", "bash get.sh", "import os"])
def test_anything_but_an_https_archive_is_refused(tmp_path: Path, server: Server, url: str) -> None:
    with pytest.raises(UserError, match="only an https address"):
        fetch_archive(url, tmp_path)
    assert server.asked == []


def test_an_archive_without_a_network_leaves_nothing(alone: Path) -> None:
    with pytest.raises(UserError, match=r"name resolution.*--data shapes\.yaml --weights yolov5n-shapes\.pt"):
        fetch_archive("https://example.org/coco128.zip", alone / "data" / "sets")
    assert list(alone.iterdir()) == []
    (alone / "mine").mkdir()
    with pytest.raises(UserError, match="name resolution"):
        fetch_archive("https://example.org/coco128.zip", alone / "mine" / "sets")
    assert list(alone.iterdir()) == [alone / "mine"], "only what was made for it goes"


def test_an_archive_is_not_put_into_a_folder_marked_read_only(alone: Path, server: Server) -> None:
    server.files["c.zip"] = zip_of(alone / "c.zip", dict(FILES)).read_bytes()
    alone.chmod(0o555)
    try:
        with pytest.raises(UserError, match=r"not fetched into datasets \(Permission denied\)"):
            fetch_archive("https://example.org/c.zip", alone / "datasets")
    finally:
        alone.chmod(0o755)
    assert server.asked == [] and not (alone / "datasets").exists()


def test_the_log_says_where_what_is_fetched_goes(alone: Path, server: Server, said: list[str]) -> None:
    server.files["c.zip"] = zip_of(alone / "c.zip", dict(FILES)).read_bytes()
    fetch_archive("https://example.org/c.zip", alone / "datasets")
    assert said == ["c.zip will be unpacked into datasets", "Fetching https://example.org/c.zip"]


@pytest.mark.parametrize(
    "name", ["../evil", "a/../../evil", "/evil", "\\evil", "..\\evil", "C:\\evil", "C:evil", "a/../evil"]
)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_entry_that_leaves_its_folder_is_refused(tmp_path: Path, server: Server, name: str, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    zip_of(path, {name: b"x"}) if kind == "zip" else tar_of(path, {name: b"x"}, "w")
    server.files[path.name] = path.read_bytes()
    with pytest.raises(UserError, match="outside its folder"):
        fetch_archive(f"https://example.org/a.{kind}", tmp_path / "in" / "side")
    assert sorted(file.name for file in tmp_path.rglob("*")) == [path.name]


def special(kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo("coco/special")
    info.type, info.linkname = kind, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE], ids=str
)
def test_links_and_devices_in_a_tar_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(special(kind))
    with pytest.raises(DownloadProblem, match="link or a device"):
        unpack(tmp_path / "a.tar", tmp_path / "out")


def test_links_and_encrypted_entries_in_a_zip_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        info = zipfile.ZipInfo("link")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(DownloadProblem, match="link"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


def test_an_entry_twice_is_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a", "1")
        archive.writestr("a", "2")
    with pytest.raises(DownloadProblem, match="same name"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


def test_a_zip_bomb_is_refused_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "SMALL_ARCHIVE_BYTES", 1_000_000)
    zip_of(tmp_path / "a.zip", {f"{i}": bytes(400_000) for i in range(5)})
    with pytest.raises(DownloadProblem, match="unpacks to more than"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    assert sum(file.stat().st_size for file in (tmp_path / "out").iterdir()) <= 1_000_000


def test_too_many_entries_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "SMALL_ARCHIVE_ENTRIES", 3)
    monkeypatch.setattr(downloads, "MIN_ENTRY_BYTES", 1000)
    zip_of(tmp_path / "a.zip", {f"{i}": b"" for i in range(5)})
    with pytest.raises(DownloadProblem, match="or 3 files"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


def test_a_tar_whose_name_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1 << 32
    with gzip.open(tmp_path / "a.tar.gz", "wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.write(bytes(1 << 20))
    with pytest.raises(DownloadProblem, match="unreasonable size"):
        unpack(tmp_path / "a.tar.gz", tmp_path / "out")


def test_a_tar_bomb_is_refused_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "SMALL_ARCHIVE_BYTES", 1_000_000)
    info = tarfile.TarInfo("zeros")
    info.size = 1 << 40
    (tmp_path / "a.tar").write_bytes(info.tobuf() + bytes(2048))
    with pytest.raises(DownloadProblem, match="unpacks to more than"):
        unpack(tmp_path / "a.tar", tmp_path / "out")


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tar.xz", ".tar.bz2"])
def test_a_broken_archive_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"not an archive" * 100)
    with pytest.raises((DownloadProblem, OSError)):
        unpack(path, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    whole = (
        zip_of(path, {"a": os.urandom(50_000)})
        if suffix == ".zip"
        else tar_of(path, {"a": os.urandom(50_000)}, "w:" + suffix[5:])
    )
    path.write_bytes(whole.read_bytes()[:30_000])
    with pytest.raises((DownloadProblem, OSError)):
        unpack(path, tmp_path / "out")
