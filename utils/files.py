"""Files and folders of ours: written whole or not at all, made by one run only, and found in the cache."""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import yaml

from utils.config import UserError, display_path

MOST_NUMBERED = 9999
PARTIAL = ".*.????????.partial"


# --------------------------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[IO[bytes]]:
    """A file open for writing whose content takes the place of `file` at the end of the block, in one step.

    An exception inside the block leaves the old file as it was. A process that is killed leaves the unfinished one,
    named `.FILE.????????.partial`, which `remove_leftovers` finds; it is locked while its writer lives.

    Raises:
        OSError: the folder is not there or may not be written to, or the disk is full.
    """
    partial, stream = _open_partial(file)
    try:
        with stream:
            yield stream
            stream.flush()
            if sys.platform == "win32":  # where an open file cannot be renamed
                stream.close()
            os.replace(partial, file)
    finally:
        with contextlib.suppress(OSError):  # renamed by now, unless there was an error, which says more
            partial.unlink()


def _open_partial(file: Path) -> tuple[Path, IO[bytes]]:
    while True:
        partial = file.with_name(f".{file.name[:40]}.{os.urandom(4).hex()}.partial")
        try:
            stream = partial.open("xb")
        except FileExistsError:
            continue
        _lock(stream, wait=True)
        if partial.exists():  # else it was taken for a leftover before it was locked
            return partial, stream
        stream.close()


def _lock(stream: IO[bytes], *, wait: bool = False) -> bool:
    """Whether the file is now locked until it is closed; not where another has locked it, or nothing can be locked.

    Windows has no such locks, and needs none here: an open file cannot be removed there.
    """
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def remove_leftovers(*folders: Path) -> None:
    """Remove what killed processes left of `replacing` in these folders, not what others are writing now."""
    for partial in itertools.chain.from_iterable(folder.glob(PARTIAL) for folder in folders):
        with contextlib.suppress(OSError), partial.open("rb") as stream:
            if _lock(stream):
                if sys.platform == "win32":
                    stream.close()
                partial.unlink()


def write_texts(texts: Mapping[Path, str]) -> None:
    """Write files, line ends as given, each in one step: all lie on the disk beside their places before any is moved.

    An interruption leaves an old file whole.

    Raises:
        UserError: a folder that is not there, may not be written to, or a full disk.
    """
    try:
        with contextlib.ExitStack() as stack:
            for file, text in texts.items():
                stream = stack.enter_context(replacing(file))
                stream.write(text.encode("utf-8", "surrogateescape"))  # names of files may be no UTF-8
                stream.flush()
                os.fsync(stream.fileno())
    except OSError as error:
        raise UserError(f"{display_path(file)}: cannot be written ({error.strerror}).") from None


def write_yaml(file: Path, values: Mapping[str, Any]) -> None:
    """Options or hyper-parameters as YAML, in their order; paths as text."""
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
    write_texts({file: yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)})


# ------------------------------------------------------------------------------------------------------------- folders


def make_run_dir(options: argparse.Namespace, inside: str = "") -> Path:
    """The run folder `project/name` of a script's options; see `make_new_dir`."""
    return make_new_dir(Path(options.project) / options.name, inside, exist_ok=options.exist_ok)


def make_new_dir(wanted: Path, inside: str = "", *, exist_ok: bool = False) -> Path:
    """The folder `wanted`, together with a folder inside it; a new one, numbered, unless `exist_ok`.

    Of several runs started at once each gets its own: making a folder is what decides, not looking for it.

    Raises:
        UserError: a file is in the way, the place may not be written to, or the name is none.
    """
    run_dir = wanted
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        if exist_ok:
            wanted.mkdir(exist_ok=True)
        else:
            run_dir = _make_numbered(wanted)
        (run_dir / inside).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name, or no name
        reason, place = getattr(error, "strerror", None) or str(error), getattr(error, "filename", None) or run_dir
        raise UserError(
            f"{display_path(place)}: cannot be made ({reason}). Choose another --project or --name."
        ) from None
    remove_leftovers(run_dir, run_dir / inside)
    return run_dir


def _make_numbered(path: Path) -> Path:
    """Make the first of `exp`, `exp2`, `exp3`, ... that is free."""
    for number in range(1, MOST_NUMBERED + 1):
        numbered = path.with_name(f"{path.name}{number if number > 1 else ''}")
        with contextlib.suppress(FileExistsError):
            numbered.mkdir()
            return numbered
    raise FileExistsError(0, f"{MOST_NUMBERED:,} numbered ones exist already")


def free_path(path: Path, sep: str = "") -> Path:
    """`path` where nothing has that name, else the first free of `exp2`, `exp3`, ...; a file keeps its suffix.

    Nothing is made, so another process may take the name first; see `make_run_dir`.
    """
    stem, suffix = (path.with_suffix(""), path.suffix) if path.is_file() else (path, "")
    numbered = (Path(f"{stem}{sep}{number}{suffix}") for number in range(2, MOST_NUMBERED + 1))
    for candidate in itertools.chain([path], numbered):
        if not os.path.lexists(candidate):
            return candidate
    raise UserError(f"{display_path(path)}: {MOST_NUMBERED:,} numbered ones exist already. Choose another name.")


def refuse_read_only(folder: Path) -> None:
    """Raise PermissionError where a folder, or the nearest above it that exists, is marked read-only.

    The system itself does not stop root from writing there.
    """
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not place.stat().st_mode & stat.S_IWUSR:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))


def user_cache_dir() -> Path:
    """Our folder for what can be made again: `YOLOV5_CACHE_DIR`, else the system's cache folder. Not created here."""
    if os.environ.get("YOLOV5_CACHE_DIR"):
        return Path(os.environ["YOLOV5_CACHE_DIR"]).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "yolov5-attention"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "yolov5-attention"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "yolov5-attention"
