"""Weights and data by name: looked for on this machine first, then fetched over https, checked, and put in place whole.

Only three functions reach for the network, and only when called: nothing is fetched on import, nothing is asked for
newer versions, and what arrives is data. A download is written beside its target under a temporary name, so a broken
connection leaves nothing that looks like a file of weights.
"""

from __future__ import annotations

import bz2
import contextlib
import errno
import functools
import gzip
import hashlib
import lzma
import os
import re
import shutil
import stat
import struct
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from queue import Empty, Queue
from typing import IO, Any

from tqdm import tqdm

from utils.config import ROOT, UserError, closest, display_path, user_path
from utils.files import refuse_read_only, remove_leftovers, replacing
from utils.runtime import LOGGER

RELEASE_TAG = "v7.0"
RELEASE_URL = "https://github.com/ultralytics/yolov5/releases/download/{tag}/{name}"
OFFICIAL = re.compile(r"yolov5[nsmlx](?:6|-seg|-cls)?\.pt")
# The releases publish no sums. Known by having the file; the others are checked by size, zip structure and CRC.
SHA256 = {("yolov5n.pt", "v6.0"): "edd2e5cc4e3caa4b508168b51d9dc529da58b37813e0d2c8b49aba06aa3472dc"}
OFFLINE_HINT = "What runs now: --data shapes.yaml --weights yolov5n-shapes.pt"
ANSWER_SECONDS = 10.0  # for everything before the first byte; a machine without a network mostly says so at once
TIMEOUT_SECONDS = 10.0  # of a connection that has answered
MIN_WEIGHTS_BYTES = 100_000
CHUNK_BYTES = 1 << 20
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
BROKEN_ERRORS = (
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    lzma.LZMAError,
    zlib.error,
    struct.error,
    EOFError,
    OverflowError,
    RuntimeError,
    ValueError,
)
DECOMPRESSORS: dict[str, Callable[..., Any]] = {
    "gz": gzip.open,
    "tgz": gzip.open,
    "bz2": bz2.open,
    "tbz2": bz2.open,
    "xz": lzma.open,
    "txz": lzma.open,
}
SMALL_ARCHIVE_ENTRIES = 50_000
MIN_ENTRY_BYTES = 16  # of an archive per file in it; a label in a .tar.xz takes more
MAX_ENTRY_NAME, MAX_ENTRY_PART = 1000, 255  # bytes; systems refuse longer parts
TAR_BLOCK = 512
TAR_KINDS = (b"0", b"\0", b"7", b"5")  # files and folders
TAR_EXTENSIONS = (b"x", b"g", b"L", b"K")  # about the next entry, about all, its long name, its long link
MAX_TAR_EXTENSION, MAX_TAR_EXTENSIONS, MAX_PAX_RECORDS = 64 << 10, 4, 100  # bytes, headers before an entry, lines
MAX_EXPANSION = 100  # unpacked bytes per archive byte; label files reach 10, images 1
SMALL_ARCHIVE_BYTES = 1 << 30  # below this the ratio does not matter


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https only."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.lower().startswith("https://"):
            raise urllib.error.URLError(f"redirected to {newurl[:80]}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def open_url(url: str) -> Any:
    """The response to a GET of an https URL; raises `OSError` (`URLError` is one) or `HTTPException`.

    One attempt, given up after ANSWER_SECONDS: it runs in a thread, since looking up a name has no timeout of its own.
    """
    if not url.lower().startswith("https://"):
        raise urllib.error.URLError("only https is fetched")
    answers: Queue[Any] = Queue()

    def ask() -> None:
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "yolov5-se"})
            answers.put(urllib.request.build_opener(_HttpsOnly).open(request, timeout=TIMEOUT_SECONDS))
        except (OSError, HTTPException) as problem:
            answers.put(problem)
        except (ValueError, OverflowError) as problem:  # letters a host cannot have, a port above 65535
            answers.put(urllib.error.URLError(f"not a possible address: {problem}"))

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=ANSWER_SECONDS)
    except Empty:
        raise urllib.error.URLError(f"no answer within {ANSWER_SECONDS:g} seconds") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _name_in(url: str) -> str:
    """The file name at the end of an address; UserError where it is none."""
    try:
        return PurePosixPath(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name
    except ValueError as error:
        raise UserError(f"{url}: not a possible address ({error}).") from None


def find_weights(name: str | Path) -> Path:
    """The file that `--weights NAME` stands for.

    Looked for as a path, then by its name in the working directory, in `YOLOV5_WEIGHTS_DIR` and in the repository. An
    official name (`yolov5s.pt`, `yolov5m6.pt`, `yolov5n-seg.pt`, ...) that is nowhere is fetched from the release into
    the working directory; so is an https URL.

    Raises:
        UserError: found nowhere (with the places and the most similar file), or not fetched (no network, wrong size,
            not a zip archive, another checksum).
    """
    text = str(name).strip()
    if not text:
        raise UserError("--weights: no file named. Give a .pt file such as yolov5s.pt.")
    if "://" in text:
        return _weights_from_url(text)
    path = user_path(text)
    if os.path.exists(path):  # Path.exists raises where a folder may not be read
        return path
    if not path.suffix:
        path = path.with_suffix(".pt")
    official = OFFICIAL.fullmatch(path.name) is not None
    folders = _weights_folders()
    for candidate in [path, *_candidates(path, folders, official=official)]:
        if os.path.isfile(candidate):
            return candidate
    if official:
        return fetch_weights(path.name, Path.cwd())
    known = {file.name for folder in folders for file in folder.glob("*.pt")}
    similar = closest(path.name, known | {f"yolov5{size}.pt" for size in "nsmlx"})
    raise UserError(f"{text}: no such weights file; looked in {_places(folders)}.{similar}")


def _weights_folders() -> list[Path]:
    """Where weights are looked for by name; each folder once."""
    variable = os.environ.get("YOLOV5_WEIGHTS_DIR")
    folders = [Path.cwd(), *([user_path(variable)] if variable else []), ROOT]
    return list(dict.fromkeys(folder.absolute() for folder in folders))


def _candidates(path: Path, folders: list[Path], *, official: bool) -> list[Path]:
    """A path with folders is only tried below the repository too: `exp2/best.pt` must not become another `best.pt`."""
    if len(path.parts) == 1 or official:
        return [folder / path.name for folder in folders]
    return [] if path.is_absolute() else [ROOT / path]


def _places(folders: list[Path]) -> str:
    unset = "" if os.environ.get("YOLOV5_WEIGHTS_DIR") else " (YOLOV5_WEIGHTS_DIR is not set)"
    return ", ".join(str(folder) for folder in folders) + unset


def fetch_weights(name: str, folder: Path, *, tag: str = RELEASE_TAG) -> Path:
    """Fetch an official file into `folder`, checked before it gets its name.

    Raises:
        UserError: one line with the places looked in, the reason, and what runs without a network.
    """
    url = RELEASE_URL.format(tag=tag, name=name)
    target = folder / name
    try:
        _fetch(url, target, SHA256.get((name, tag)))
    except (OSError, HTTPException, DownloadProblem) as problem:
        raise UserError(
            f"{name}: not in {_places(_weights_folders())}, and not fetched from {url} ({_reason(problem)})."
            f" {OFFLINE_HINT}"
        ) from None
    return target


def _weights_from_url(url: str) -> Path:
    name = _name_in(url)
    if not name.endswith(".pt") or "\\" in name:
        raise UserError(f"{url}: not the address of a .pt file.")
    target = Path.cwd() / user_path(name)
    if target.is_file():
        return target
    try:
        _fetch(url, target, None)
    except (OSError, HTTPException, DownloadProblem) as problem:
        raise UserError(f"{url}: not fetched ({_reason(problem)}).") from None
    return target


def attempt_download(file: str | Path, repo: str = "ultralytics/yolov5", release: str = RELEASE_TAG) -> str:
    """`find_weights` with YOLOv5's arguments, as text; an official file that is nowhere comes from `release`.

    Raises:
        UserError: as `find_weights`, and for a file of another repository that is not here.
    """
    name = str(file).strip().replace("'", "")
    if not os.path.exists(user_path(name)):
        if repo != "ultralytics/yolov5":
            raise UserError(f"{name}: not here, and {repo} is not asked for it. Give its https address.")
        if release != RELEASE_TAG and OFFICIAL.fullmatch(Path(name).name):
            return str(fetch_weights(Path(name).name, Path.cwd(), tag=release))
    return str(find_weights(name))


# ------------------------------------------------------------------------------------------------------------ fetching


class DownloadProblem(ValueError):
    """What arrived is not what was asked for; becomes part of a `UserError`."""


def _reason(problem: BaseException) -> str:
    """One short line for an error of urllib, the disk or our checks."""
    reason = getattr(problem, "reason", None) or problem
    text = getattr(reason, "strerror", None) or str(reason) or type(problem).__name__
    return " ".join(str(text).split())[:160]


def _fetch(url: str, target: Path, sha256: str | None) -> None:
    """Download weights and check them under a temporary name beside `target`, then give them the name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent)
    with replacing(target) as file:
        download(url, file, label=target.name)
        _check_weights(Path(file.name), target.name, sha256)


def download(url: str, file: IO[bytes], *, label: str, opener: Callable[[str], Any] | None = None) -> None:
    """Write the body of `url` to an open file with a progress bar, checking the length that the server announced.

    `opener` gives the response; by default only https is opened.

    Raises:
        OSError, HTTPException: not reached, or not written.
        DownloadProblem: another length arrived, or it does not fit on the disk.
    """
    LOGGER.info("Fetching %s", url)
    with (opener or open_url)(url) as response:
        announced = response.headers.get("Content-Length")
        total = int(announced) if announced and announced.isdecimal() and len(announced) < 20 else None
        if total is not None and total > shutil.disk_usage(Path(file.name).parent).free:
            raise DownloadProblem(f"{total / 1e6:.0f} MB do not fit on the disk")
        received = 0
        with tqdm(total=total, unit="B", unit_scale=True, desc=label, delay=1.0, disable=None) as progress:
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                received += len(chunk)
                progress.update(len(chunk))
                if total is not None and received > total:
                    break
        file.flush()
        os.fsync(file.fileno())
    if total is not None and received != total:
        raise DownloadProblem(f"{received} bytes arrived of {total}")


def _check_weights(path: Path, name: str, sha256: str | None) -> None:
    """Raise `DownloadProblem` unless `path` is a whole checkpoint, and the known one where the sum is known."""
    size = path.stat().st_size
    if size < MIN_WEIGHTS_BYTES:
        raise DownloadProblem(f"{size} bytes are too few for weights")
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
            whole = broken is None and any(member.endswith("/data.pkl") for member in archive.namelist())
    except BROKEN_ERRORS:
        whole = False
    if not whole:
        raise DownloadProblem("what arrived is not a whole checkpoint")
    if sha256:
        with path.open("rb") as file:
            found = hashlib.sha256()
            while chunk := file.read(CHUNK_BYTES):
                found.update(chunk)
        if found.hexdigest() != sha256:
            raise DownloadProblem(f"its sha256 {found.hexdigest()} is not that of {name}")


# ------------------------------------------------------------------------------------------------------------ archives


@dataclass(frozen=True)
class _Entry:
    """One file or folder of an archive."""

    name: str
    size: int  # unpacked, in bytes
    is_folder: bool
    overhead: int = 0  # bytes of the headers before it


def fetch_archive(url: str, folder: str | Path) -> Path:
    """Fetch an https zip or tar and unpack it into `folder`; files already there are kept.

    The archive is unpacked into a temporary folder and moved into place when it is whole; a failure leaves no folder
    that was not there. Returns the one top folder it brought, or `folder` if it brought several things.

    Raises:
        UserError: not https, not a zip or tar, not reachable, broken, or an archive that writes outside its folder,
            holds links or devices, or unpacks to an unreasonable size; or a `folder` marked read-only.
    """
    folder = Path(folder)
    name = _name_in(url).lower()
    if not url.lower().startswith("https://") or not name.endswith(ARCHIVE_SUFFIXES):
        raise UserError(f"{url}: only an https address of a {', '.join(ARCHIVE_SUFFIXES)} archive is fetched.")
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        refuse_read_only(folder)
        folder.mkdir(parents=True, exist_ok=True)
        LOGGER.info(f"{name} will be unpacked into {display_path(folder)}")
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as temporary:
            archive = Path(temporary) / f"archive{next(s for s in ARCHIVE_SUFFIXES if name.endswith(s))}"
            with archive.open("wb") as file:
                download(url, file, label=name)
            unpack(archive, Path(temporary) / "content")
            return _move_into(Path(temporary) / "content", folder)
    except DownloadProblem as problem:
        raise UserError(f"{url}: refused: {problem}.") from None
    except (OSError, HTTPException) as problem:
        why = f"{url}: not fetched into {display_path(folder)} ({_reason(problem)})."
        raise UserError(f"{why} {OFFLINE_HINT}") from None
    finally:
        for place in new:
            with contextlib.suppress(OSError):  # something came into it
                place.rmdir()


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip or tar into the new `folder`; regular files and folders only.

    Raises:
        DownloadProblem: broken, or refused as `fetch_archive` says.
    """
    packed = archive.stat().st_size
    limit, most = max(SMALL_ARCHIVE_BYTES, MAX_EXPANSION * packed), SMALL_ARCHIVE_ENTRIES + packed // MIN_ENTRY_BYTES
    root = folder.resolve()
    root.mkdir(parents=True)
    total = count = 0
    try:
        for entry, read in _entries(archive):
            parts = _safe_parts(entry.name)
            count, total = count + 1, total + entry.size + entry.overhead
            if count > most or total > limit:
                raise DownloadProblem(f"it unpacks to more than {limit / 1e9:.1f} GB or {most:,} files")
            if entry.size > shutil.disk_usage(root).free:
                raise DownloadProblem("its content does not fit on the disk")
            target = root.joinpath(*parts)
            if not parts or parts[0] == "__MACOSX":
                continue
            if entry.is_folder:
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with read() as source, target.open("xb") as file:  # x: no entry replaces another
                shutil.copyfileobj(source, file, CHUNK_BYTES)
    except DownloadProblem:
        raise
    except FileExistsError:
        raise DownloadProblem("two of its entries have the same name") from None
    except NotADirectoryError:
        raise DownloadProblem("one of its entries is both a file and a folder") from None
    except (*BROKEN_ERRORS, OSError) as problem:
        if getattr(problem, "errno", None) not in (None, errno.EINVAL):  # of the disk; bz2 gives no number
            raise
        raise DownloadProblem(f"the archive is broken ({_reason(problem)})") from None


def _entries(archive: Path) -> Iterator[tuple[_Entry, Callable[[], Any]]]:
    """Every entry with a function that opens it; raises `DownloadProblem` at links, devices and encryption."""
    if archive.name.endswith(".zip"):
        yield from _zip_entries(archive)
        return
    opener = next((open_ for suffix, open_ in DECOMPRESSORS.items() if archive.name.endswith(suffix)), open)
    with opener(archive, "rb") as file:
        yield from _tar_entries(file)


def _zip_entries(archive: Path) -> Iterator[tuple[_Entry, Callable[[], Any]]]:
    with zipfile.ZipFile(archive) as zipped:
        for info in zipped.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR) or info.flag_bits & 0x1:
                raise DownloadProblem(f"its entry {info.filename[:80]!r} is a link, a device or encrypted")
            is_folder = info.filename.endswith("/")
            yield _Entry(info.filename, info.file_size, is_folder), functools.partial(zipped.open, info)


def _tar_entries(file: IO[bytes]) -> Iterator[tuple[_Entry, Callable[[], Any]]]:
    """The entries of a tar, read once and forwards.

    tarfile is not used: it computes maps of sparse files, sums and numbers of any length, and seeks back in compressed
    files, for minutes, before it shows an entry.
    """
    extended: dict[str, str] = {}
    headers = overhead = 0
    while (block := file.read(TAR_BLOCK)) and block != bytes(TAR_BLOCK):
        if len(block) < TAR_BLOCK or sum(block[:148]) + sum(block[156:]) + 8 * 32 != _tar_number(block[148:156]):
            raise DownloadProblem("the archive is broken (a header is damaged)")
        kind, size, name = block[156:157], _tar_number(block[124:136]), _tar_name(block)
        if kind in TAR_EXTENSIONS:
            headers, overhead = headers + 1, overhead + size
            if size > MAX_TAR_EXTENSION or headers > MAX_TAR_EXTENSIONS:
                raise DownloadProblem("an entry has a name or header of unreasonable size (a bomb?)")
            part = _Part(file, size)
            content = part.read(size)
            part.skip()
            extended |= _pax_records(content) if kind == b"x" else {"path": _tar_text(content)} if kind == b"L" else {}
            continue
        name = extended.get("path", name)
        if kind not in TAR_KINDS or any(key.startswith("GNU.sparse") for key in extended):
            raise DownloadProblem(f"its entry {name[:80]!r} is a link or a device, or sparse")
        is_folder = kind == b"5" or name.endswith("/")
        size = 0 if is_folder else _decimal(extended["size"]) if "size" in extended else size
        part = _Part(file, size)
        yield _Entry(name, size, is_folder, overhead), functools.partial(contextlib.nullcontext, part)
        part.skip()
        extended, headers, overhead = {}, 0, 0


def _tar_number(digits: bytes) -> int:
    """A number of a tar header, in octal digits or, above 8 GB, in bytes after a 0x80."""
    if digits[:1] == b"\x80":
        return int.from_bytes(digits[1:], "big")
    text = digits.split(b"\0")[0].strip()
    if text.strip(b"01234567"):
        raise DownloadProblem("the archive is broken (a number in a header is damaged)")
    return int(text or b"0", 8)


def _tar_text(data: bytes) -> str:
    return data.split(b"\0")[0].decode("utf-8", "surrogateescape")


def _tar_name(block: bytes) -> str:
    """The name in a header; POSIX puts the first folders of a long one behind the rest, GNU has other things there."""
    name, folders = _tar_text(block[:100]), _tar_text(block[345:500])
    return f"{folders}/{name}" if folders and block[257:263] == b"ustar\0" else name


def _pax_records(data: bytes) -> dict[str, str]:
    """The records `length key=value` of an extended header, the length being that of the whole record's line."""
    records: dict[str, str] = {}
    start = lines = 0
    while data[start : start + 1] not in (b"", b"\0"):
        length = _decimal(data[start : start + 6].split(b" ")[0].decode("ascii", "replace"))
        key, equals, value = data[start : start + length].partition(b" ")[2].partition(b"=")
        lines += 1
        if not equals or not value.endswith(b"\n") or start + length > len(data) or lines > MAX_PAX_RECORDS:
            raise DownloadProblem("the archive is broken (an extended header is damaged)")
        records[_tar_text(key)] = value[:-1].decode("utf-8", "surrogateescape")
        start += length
    return records


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 20):
        raise DownloadProblem("the archive is broken (a number in an extended header is damaged)")
    return int(text)


class _Part:
    """The next `size` bytes of a file that is read forwards, and then the padding to a whole block."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file = file
        self.left = size
        self.padding = -size % TAR_BLOCK

    def read(self, size: int) -> bytes:
        data = self.file.read(min(size, self.left))
        if not data and self.left:
            raise DownloadProblem("the archive is broken (it ends inside an entry)")
        self.left -= len(data)
        return data

    def skip(self) -> None:
        """Read what nobody wanted, and the padding."""
        while self.left:
            self.read(CHUNK_BYTES)
        self.file.read(self.padding)


def _safe_parts(name: str) -> list[str]:
    """The folders and the file of an entry; raises `DownloadProblem` where they lead outside, or are no names."""
    if not name or len(os.fsencode(name)) > MAX_ENTRY_NAME:
        raise DownloadProblem(f"the name of an entry has {len(name)} characters, expected 1 to {MAX_ENTRY_NAME}")
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    if name.startswith(("/", "\\")) or ".." in parts or any(":" in part or "\0" in part for part in parts):
        raise DownloadProblem(f"its entry {name[:80]!r} would be written outside its folder")
    if any(len(os.fsencode(part)) > MAX_ENTRY_PART for part in parts):
        raise DownloadProblem(f"its entry {name[:80]!r} has a name of more than {MAX_ENTRY_PART} bytes")
    return parts


def _move_into(content: Path, folder: Path) -> Path:
    """Move everything below `content` to `folder`; folders are merged, files already there win."""
    tops = sorted(content.iterdir())
    for source in tops:
        _merge(source, folder / source.name)
    return folder / tops[0].name if len(tops) == 1 and tops[0].name else folder


def _merge(source: Path, target: Path) -> None:
    if not os.path.lexists(target):
        os.replace(source, target)
    elif source.is_dir() and target.is_dir():
        for child in sorted(source.iterdir()):
            _merge(child, target / child.name)
