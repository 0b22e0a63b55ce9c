"""Image files and their labels: finding, reading, checking and caching them. Nothing of the user's is ever changed.

What is wrong with a file is said with its line, and its image is left out and counted: training on half of an image's
labels would teach that the unlabelled objects are background.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import stat
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from utils.config import DatasetSpec, UserError
from utils.files import remove_leftovers, replacing, user_cache_dir
from utils.runtime import LOGGER, rank, relative

IMAGE_SUFFIXES = frozenset({".bmp", ".dng", ".jpeg", ".jpg", ".mpo", ".pfm", ".png", ".tif", ".tiff", ".webp"})
MIN_SIDE = 10  # pixels; smaller images are taken for damaged ones
TOLERANCE = 1e-3  # coordinates this far outside 0..1 are rounding of the labelling tool, and are clipped
CACHE_VERSION = 1  # raised when a scan's result changes for the same files
CACHE_SUFFIX = ".labels.npz"  # not upstream's `.cache`, which holds pickles
MESSAGES_SHOWN = 20

Floats = npt.NDArray[np.float32]
FOUND, EMPTY, MISSING, CORRUPT = range(4)


@dataclass(frozen=True, slots=True)
class Sample:
    """One usable image."""

    path: str  # absolute
    labels: Floats  # (n, 5) [class, cx, cy, w, h] in 0..1
    segments: tuple[Floats, ...]  # empty, or a polygon (k, 2) in 0..1 per label; a box row's is its four corners
    shape_hw: tuple[int, int]  # pixels, upright by EXIF


@dataclass(frozen=True)
class Scan:
    """All usable images, and how many label files were found (empty ones included), missing, empty; images corrupt."""

    samples: list[Sample]
    found: int
    missing: int
    empty: int
    corrupt: int
    messages: list[str]


@dataclass(frozen=True)
class ParsedLabels:
    """The content of one label file. With `errors` the image must not be used; `notes` say what was left out."""

    labels: Floats = field(default_factory=lambda: np.zeros((0, 5), np.float32))
    segments: tuple[Floats, ...] = ()
    errors: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


# -------------------------------------------------------------------------------------------------------------- finding


def image_files(sources: Sequence[Path]) -> list[Path]:
    """Absolute paths of all images in folders (searched deeply), `.txt` lists and single images, sorted.

    In a list, `./` stands for its own folder; other relative lines are looked for in the working directory, then there.
    Hidden files are left out.

    Raises:
        UserError: a source that does not exist, or is none of the three.
    """
    files: list[str] = []
    for source in map(Path, sources):
        if source.is_dir():
            files += _images_below(source)
        elif not source.is_file():
            raise UserError(f"{relative(source)}: no such folder, image list or image.")
        elif source.suffix.lower() in IMAGE_SUFFIXES:
            files.append(os.path.abspath(source))
        elif source.suffix.lower() == ".txt":
            files += _images_listed(source)
        else:
            raise UserError(f"{relative(source)}: expected a folder, a .txt list of images or an image.")
    return [Path(file) for file in sorted(files)]


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _images_below(folder: Path) -> list[str]:
    files, seen = [], set()
    for place, folders, names in os.walk(os.path.abspath(folder), followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [os.path.join(place, name) for name in names if _is_image(name)]
    return files


def _images_listed(source: Path) -> list[str]:
    try:
        lines = [line.strip() for line in source.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{relative(source)}: cannot be read as a list of images ({error}).") from None
    files, others = [], []
    for number, line in enumerate(lines, 1):
        if line and not _is_image(os.path.basename(line)):
            others.append(number)
        elif line:
            base = source.parent if line.startswith("./") or not os.path.exists(line) else ""
            files.append(os.path.abspath(os.path.join(base, line)))
    if others:
        kinds = " ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
        LOGGER.warning(f"{relative(source)}:{others[0]}: {len(others)} lines name no image ({kinds}); left out.")
    return files


def label_path(image: str | Path) -> Path:
    """Where an image's labels are: the last folder `images`, if any, becomes `labels`, the suffix `.txt`."""
    parts = list(Path(image).with_suffix(".txt").parts)
    if "images" in parts[:-1]:
        parts[len(parts) - 2 - parts[-2::-1].index("images")] = "labels"
    return Path(*parts)


# --------------------------------------------------------------------------------------------------------------- labels


def parse_label_file(path: str | Path, num_classes: int | None, *, names_file: str = "the dataset") -> ParsedLabels:
    """The labels of one file; an empty or missing file has none.

    A row is `class cx cy w h` or `class x1 y1 x2 y2 x3 y3 ...`, all but the class in 0..1; both may be mixed. A
    polygon's box is the extent of its points. Repeated boxes and those without an area are left out with a note.
    `num_classes` None allows any class. Coordinates at most 0.001 outside are clipped.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return ParsedLabels()
    except (OSError, UnicodeDecodeError) as error:
        return ParsedLabels(errors=(f"{relative(path)}: cannot be read as labels ({error}).",))
    boxes, polygons, numbers, errors, is_outlined = [], [], [], [], False
    for number, tokens in enumerate(map(str.split, text.splitlines()), 1):
        if not tokens:
            continue
        values, problem = _parse_row(tokens, num_classes, names_file)
        if problem:
            errors.append(f"{relative(path)}:{number}: {problem}")
            continue
        is_outlined |= len(values) > 5
        box, polygon = _box_and_polygon([min(max(value, 0.0), 1.0) for value in values[1:]])
        boxes.append((values[0], *box))
        polygons.append(polygon)
        numbers.append(number)
    if errors or not boxes:
        return ParsedLabels(errors=tuple(errors))
    labels = np.array(boxes, dtype=np.float32)
    keep, notes = _worth_keeping(labels, numbers, path)
    segments = tuple(np.array(polygons[i], dtype=np.float32) for i in keep) if is_outlined else ()
    return ParsedLabels(labels[keep], segments, notes=notes)


def _parse_row(tokens: list[str], num_classes: int | None, names_file: str) -> tuple[list[float], str]:
    """The row's numbers, or what is wrong with it."""
    values = []
    for token in tokens:
        try:
            values.append(float(token))
        except ValueError:
            return [], f"{token!r} is not a number. Write `class cx cy w h`."
    if len(values) != 5 and (len(values) < 7 or len(values) % 2 == 0):
        hint = " (the last a confidence, from --save-conf?)" if len(values) == 6 else ""
        return [], f"{len(values)} numbers{hint}. Write `class cx cy w h`, or a class and 3 or more points x y."
    label = values[0]
    if not label.is_integer() or label < 0:
        return [], f"class {tokens[0]} is not a whole number from 0."
    if num_classes is not None and label >= num_classes:
        known = f"{names_file} names {num_classes} class{'es' * (num_classes != 1)}"
        return [], f"class {int(label)} is outside 0..{num_classes - 1} ({known}). Fix the label or add a name."
    for token, value in zip(tokens[1:], values[1:]):
        if not -TOLERANCE <= value <= 1 + TOLERANCE:  # true for nan as well
            return [], f"coordinate {token} is outside 0..1. Divide x and widths by the image's width, y by its height."
    return values, ""


def _box_and_polygon(values: list[float]) -> tuple[tuple[float, ...], list[tuple[float, float]]]:
    """The box (cx, cy, w, h) and the polygon of a row's coordinates; each is made from the other."""
    if len(values) == 4:
        cx, cy, w, h = values
        x1, y1, x2, y2 = (min(max(v, 0.0), 1.0) for v in (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))
        return (cx, cy, w, h), [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    x1, x2, y1, y2 = min(values[::2]), max(values[::2]), min(values[1::2]), max(values[1::2])
    return ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1), list(zip(values[::2], values[1::2]))


def _worth_keeping(labels: Floats, numbers: list[int], path: str | Path) -> tuple[list[int], tuple[str, ...]]:
    """Indices of the labels to keep, in order, and notes on the others."""
    keep: dict[bytes, int] = {}
    notes = []
    for index, row in enumerate(labels):
        first = keep.get(row.tobytes())
        if row[3] <= 0 or row[4] <= 0:
            notes.append(f"{relative(path)}:{numbers[index]}: the box has no area; label left out.")
        elif first is not None:
            notes.append(f"{relative(path)}:{numbers[index]}: repeats line {numbers[first]}; label left out.")
        else:
            keep[row.tobytes()] = index
    return list(keep.values()), tuple(notes)


# --------------------------------------------------------------------------------------------------------------- images


def image_shape(path: str | Path) -> tuple[int, int]:
    """Height and width in pixels, upright by EXIF, of a whole image; JPEG and PNG are not decoded for it.

    Raises:
        UserError: missing, empty, cut short, not an image, or a side under 10 pixels.
    """
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise UserError(f"{relative(path)}: the image file is empty (0 bytes).")
    try:
        with open(path, "rb") as file, Image.open(file) as image:
            width, height = image.size
            has_exif = True
            if image.format in ("JPEG", "MPO"):
                _check_jpeg(file)
            elif image.format == "PNG":
                has_exif = b"eXIf" in _check_png(file)
            else:
                image.load()
            # Pillow decodes a whole PNG to look for EXIF, so it is asked only where there is some
            if has_exif and image.getexif().get(0x0112, 1) in (5, 6, 7, 8):  # orientation: a quarter turn
                width, height = height, width
    except (OSError, ValueError, SyntaxError, EOFError, zlib.error, Image.DecompressionBombError) as error:
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{relative(path)}: not a readable image ({reason.replace(str(path), 'the file')}).") from None
    if min(width, height) < MIN_SIDE:
        raise UserError(f"{relative(path)}: {width} x {height} pixels; images need at least {MIN_SIDE} each way.")
    return height, width


def _check_jpeg(file: BinaryIO) -> None:
    """ValueError where no end marker follows the header, in which a thumbnail may have one of its own."""
    start = file.tell()  # Pillow has read up to the pixels
    for position in (max(start, os.fstat(file.fileno()).st_size - 4096), start):
        file.seek(position)
        if b"\xff\xd9" in file.read():
            return
    raise ValueError("cut short: the JPEG has no end marker")


def _check_png(file: BinaryIO) -> set[bytes]:
    """The kinds of a PNG's blocks; ValueError where they are incomplete or damaged."""
    file.seek(0)
    content, position, kind, kinds = file.read(), 8, b"", set()
    while kind != b"IEND":
        length = int.from_bytes(content[position : position + 4], "big")
        kind = content[position + 4 : position + 8]
        end = position + 12 + length
        if end > len(content):
            raise ValueError("cut short: the PNG ends inside a block")
        block = memoryview(content)[position + 4 : end - 4]
        if zlib.crc32(block) != int.from_bytes(content[end - 4 : end], "big"):
            raise ValueError(f"damaged: the PNG's block {kind!r} has a wrong checksum")
        kinds.add(kind)
        position = end
    return kinds


# ----------------------------------------------------------------------------------------------------------------- scan


def scan(
    sources: Sequence[Path], spec: DatasetSpec, *, single_cls: bool = False, workers: int = 8, prefix: str = ""
) -> Scan:
    """Read and check all images of `sources` and their labels, from the cache where nothing has changed since.

    With `single_cls` every class becomes 0, and any class is allowed in the files. A summary and the first problems
    are logged; all of them are in `messages`, in order of the images whatever the number of workers.

    Raises:
        UserError: a source that does not exist.
    """
    files = [str(file) for file in image_files(sources)]
    num_classes, names_file = None if single_cls else spec.num_classes, relative(spec.path)
    title = f"{prefix}Scanning {', '.join(map(relative, sources))}"
    places, key = _cache_places(sources), _cache_key(files, num_classes, names_file)
    table = _Table.read(places, key)
    if table is None:
        with ThreadPoolExecutor(max(1, min(workers, os.cpu_count() or 1))) as pool:
            work = pool.map(lambda file: _examine(file, num_classes, names_file), files)
            table = _Table.build(tqdm(work, title, len(files), leave=False, disable=rank() > 0 or None))
        table.write(places, key)
    found, empty, missing, corrupt = np.bincount(table.status, minlength=4).tolist()
    messages = table.messages.tolist()
    LOGGER.info(f"{title}... {found + empty} images, {missing + empty} backgrounds, {corrupt} corrupt")
    more = [f"... and {len(messages) - MESSAGES_SHOWN} more like these"] if len(messages) > MESSAGES_SHOWN else []
    for message in messages[:MESSAGES_SHOWN] + more:
        LOGGER.warning(f"{prefix}{message}")
    return Scan(table.samples(files, single_cls), found + empty, missing, empty, corrupt, messages)


class _Examined(NamedTuple):
    status: int
    labels: ParsedLabels
    shape_hw: tuple[int, int] = (0, 0)
    messages: tuple[str, ...] = ()


def _examine(file: str, num_classes: int | None, names_file: str) -> _Examined:
    """What is known of one image and its label file after reading both."""
    place = label_path(file)
    labels = parse_label_file(place, num_classes, names_file=names_file)
    errors = list(labels.errors)
    try:
        shape_hw = image_shape(file)
    except UserError as error:
        errors, shape_hw = [str(error)], (0, 0)
    if errors:
        return _Examined(CORRUPT, ParsedLabels(), messages=tuple(f"{error} Image left out." for error in errors))
    status = FOUND if len(labels.labels) else EMPTY if place.exists() else MISSING
    return _Examined(status, labels, shape_hw, labels.notes)


# ---------------------------------------------------------------------------------------------------------------- cache


@dataclass(frozen=True)
class _Table:
    """A scan as a few arrays: what the cache file holds, and what the samples' arrays are slices of."""

    status: npt.NDArray[np.int8]  # per image
    shapes_hw: npt.NDArray[np.int32]  # (images, 2)
    label_counts: npt.NDArray[np.int32]  # per image
    labels: Floats  # (all labels, 5)
    segment_counts: npt.NDArray[np.int32]  # per image
    point_counts: npt.NDArray[np.int32]  # per segment
    points: Floats  # (all points, 2)
    messages: npt.NDArray[np.str_]

    @classmethod
    def build(cls, results: Iterable[_Examined]) -> _Table:
        examined = list(results)
        parsed = [result.labels for result in examined]
        segments = [segment for labels in parsed for segment in labels.segments]
        return cls(
            status=np.array([result.status for result in examined], dtype=np.int8),
            shapes_hw=np.array([result.shape_hw for result in examined], dtype=np.int32).reshape(-1, 2),
            label_counts=np.array([len(labels.labels) for labels in parsed], dtype=np.int32),
            labels=np.concatenate([np.zeros((0, 5), np.float32), *(labels.labels for labels in parsed)]),
            segment_counts=np.array([len(labels.segments) for labels in parsed], dtype=np.int32),
            point_counts=np.array([len(segment) for segment in segments], dtype=np.int32),
            points=np.concatenate([np.zeros((0, 2), np.float32), *segments]),
            messages=np.array([message for result in examined for message in result.messages], dtype=np.str_),
        )

    def samples(self, files: Sequence[str], single_cls: bool) -> list[Sample]:
        """The usable images. Their arrays share the table's memory."""
        labels = self.labels.copy()
        labels[:, 0] = 0 if single_cls else labels[:, 0]
        per_image = np.split(labels, np.cumsum(self.label_counts))
        segments = iter(np.split(self.points, np.cumsum(self.point_counts)))
        own = [tuple(itertools.islice(segments, count)) for count in self.segment_counts.tolist()]
        return [
            Sample(file, per_image[index], own[index], (height, width))
            for index, (file, (height, width)) in enumerate(zip(files, self.shapes_hw.tolist()))
            if self.status[index] != CORRUPT
        ]

    @classmethod
    def read(cls, places: Sequence[Path], key: str) -> _Table | None:
        """The table cached under this key, or None."""
        unreadable = (
            OSError,
            ValueError,
            KeyError,
            EOFError,
            AttributeError,
            TypeError,
            zipfile.BadZipFile,
            zlib.error,
        )
        for place in places:
            with contextlib.suppress(*unreadable), np.load(place) as stored:  # numpy refuses pickles by itself
                if str(stored["key"]) == key:
                    return cls(**{field.name: stored[field.name] for field in fields(cls)})
        return None

    def write(self, places: Sequence[Path], key: str) -> None:
        """Keep the table in the first of the places that can be written."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        problem = ""
        for place in places:
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                remove_leftovers(place.parent)
                with replacing(place) as file:
                    np.savez(file, key=np.array(key), **arrays)
                return
            except OSError as error:
                problem = str(error)
        LOGGER.warning(f"The labels could not be cached, they will be read again next time: {problem}")


def _cache_places(sources: Sequence[Path]) -> list[Path]:
    """Where a cache may be: beside the labels or the list, else in the user's cache folder."""
    name = "\0".join(os.path.abspath(source) for source in sources)
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    places = [user_cache_dir() / "labels" / f"{digest}{CACHE_SUFFIX}"]
    if len(sources) == 1 and sources[0].suffix.lower() not in IMAGE_SUFFIXES:
        source = Path(os.path.abspath(sources[0]))
        beside = source.with_suffix("") if source.is_file() else label_path(source / "image.png").parent
        # the folder's own mark counts too: nothing stops root from writing
        if beside.parent.is_dir() and beside.parent.stat().st_mode & stat.S_IWUSR:
            places.insert(0, beside.with_name(beside.name + CACHE_SUFFIX))
    return places


def _cache_key(files: Sequence[str], num_classes: int | None, names_file: str) -> str:
    """A digest of everything a scan depends on: images and labels by path, size and time."""
    digest = hashlib.sha256(f"{CACHE_VERSION} {num_classes} {names_file}\0".encode("utf-8", "surrogateescape"))
    for file in files:
        for path in (file, str(label_path(file))):
            digest.update(path.encode("utf-8", "surrogateescape") + b"\0")
            with contextlib.suppress(OSError):
                state = os.stat(path)
                digest.update(f"{state.st_size}:{state.st_mtime_ns}".encode())
            digest.update(b"\0")
    return digest.hexdigest()
