"""Image files and their labels: finding, reading, checking and caching them. Nothing of the user's is ever changed.

What is wrong with a file is said with its line, and its image is left out and counted: training on half of an image's
labels would teach that the unlabelled objects are background.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
import struct
import zipfile
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from utils.config import UserError, display_path
from utils.data import DatasetSpec
from utils.distributed import rank
from utils.files import remove_leftovers, replacing, user_cache_dir
from utils.forks import in_processes, may_fork
from utils.images import MAX_PIXELS, MIN_SIDE, UNREADABLE_ARRAY, image_shape, num_cpus
from utils.progress import Bar
from utils.runtime import LOGGER
from utils.samples import Floats, Paths, Ragged, Samples

IMAGE_SUFFIXES = frozenset({".bmp", ".dng", ".jpeg", ".jpg", ".mpo", ".pfm", ".png", ".tif", ".tiff", ".webp"})
TOLERANCE = 1e-3  # coordinates this far outside 0..1 are rounding of the labelling tool, and are clipped
MAX_LABEL_BYTES, MAX_LABELS = 8 << 20, 100_000  # of one image; reading takes up to 60 bytes of memory per byte
MAX_CLASS = 1 << 24  # labels are float32, which holds no larger number exactly
ERRORS_KEPT = 50  # of one label file
CACHE_VERSION = 2  # raised when a scan's result changes for the same files
CACHE_SUFFIX = ".labels.npz"  # not upstream's `.cache`, which holds pickles
CACHE_BYTES_PER_IMAGE = 200_000  # as if every image had 5,000 boxes, or 20,000 points of polygons
MESSAGES_SHOWN = 20
CHUNK = 1000  # images that are scanned at a time
MANY = 10_000  # images from which on a scan is worth processes; threads share one interpreter
MAX_UNUSABLE = 0.1  # of the images of a split, unless --skip-bad
MAX_LOOKED_AT = 10_000  # label files that are read again to find out what is wrong with so many

FOUND, EMPTY, MISSING, CORRUPT = range(4)


@dataclass(frozen=True)
class Scan:
    """All usable images, and how many label files were found (empty ones included), missing, empty; images corrupt."""

    samples: Samples
    found: int
    missing: int
    empty: int
    corrupt: int
    messages: list[str]
    unusable: list[str] = field(default_factory=list)  # paths of the corrupt images


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
    return [Path(file) for file in _image_names(sources)]


def _image_names(sources: Sequence[Path]) -> list[str]:
    """What `image_files` gives, as text: a million Path objects would take half a gigabyte."""
    files: list[str] = []
    for source in map(Path, sources):
        if os.path.isdir(source):  # unlike Path.is_dir, false for a name no file can have
            files += _images_below(source)
        elif not os.path.isfile(source):
            raise UserError(f"{display_path(source)}: no such folder, image list or image.")
        elif source.suffix.lower() in IMAGE_SUFFIXES:
            files.append(os.path.abspath(source))
        elif source.suffix.lower() == ".txt":
            files += _images_listed(source)
        else:
            raise UserError(f"{display_path(source)}: expected a folder, a .txt list of images or an image.")
    files.sort()
    return files


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
        raise UserError(f"{display_path(source)}: cannot be read as a list of images ({error}).") from None
    files, others = [], []
    for number, line in enumerate(lines, 1):
        if line and not _is_image(os.path.basename(line)):
            others.append(number)
        elif line:
            base = source.parent if line.startswith("./") or not os.path.exists(line) else ""
            files.append(os.path.abspath(os.path.join(base, line)))
    if others:
        kinds = " ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
        LOGGER.warning(f"{display_path(source)}:{others[0]}: {len(others)} lines name no image ({kinds}); left out.")
    return files


def label_path(image: str | Path) -> Path:
    """Where an image's labels are: the last folder `images`, if any, becomes `labels`, the suffix `.txt`."""
    parts = list(Path(image).with_suffix(".txt").parts)
    if "images" in parts[:-1]:
        parts[len(parts) - 2 - parts[-2::-1].index("images")] = "labels"
    return Path(*parts)


def _label_name(image: str) -> str:
    """`label_path` of an image that was found: of an absolute path without `..`, in a tenth of the time."""
    images, name = f"{os.sep}images{os.sep}", f"{os.path.splitext(image)[0]}.txt"
    cut = image.rfind(images)
    return name if cut < 0 else f"{name[:cut]}{os.sep}labels{os.sep}{name[cut + len(images) :]}"


# --------------------------------------------------------------------------------------------------------------- labels


def parse_label_file(path: str | Path, num_classes: int | None, *, names_file: str = "the dataset") -> ParsedLabels:
    """The labels of one file; an empty or missing file has none.

    A row is `class cx cy w h` or `class x1 y1 x2 y2 x3 y3 ...`, all but the class in 0..1; both may be mixed. A
    polygon's box is the extent of its points. Repeated boxes and those without an area are left out with a note.
    `num_classes` None allows any class. Coordinates at most 0.001 outside are clipped. Numbers are those of ASCII:
    Python would also take `1_0` and the digits of other scripts. A file larger than 8 MB or with more than 100,000 rows
    is an error; of more than 50 errors, and of as many notes, the rest is only said to exist.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_LABEL_BYTES + 1)
        if len(content) > MAX_LABEL_BYTES:
            raise ValueError(f"more than {MAX_LABEL_BYTES >> 20} MB of them for one image")
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        return ParsedLabels()
    except (OSError, ValueError) as error:
        return ParsedLabels(errors=(f"{display_path(path)}: cannot be read as labels ({error}).",))
    labels = _flawless_boxes(text, num_classes)
    if labels is not None:
        return ParsedLabels(labels)
    numbers: list[int] = []
    boxes, polygons, errors, is_outlined = [], [], [], False
    for number, tokens in enumerate(map(str.split, _lines(text)), 1):
        if not tokens:
            continue
        values, problem = _parse_row(tokens, num_classes, names_file)
        if len(numbers) == MAX_LABELS:
            problem = f"more than {MAX_LABELS:,} labels for one image."
        if problem:
            errors.append(f"{display_path(path)}:{number}: {problem}")
            if len(errors) == ERRORS_KEPT or len(numbers) == MAX_LABELS:
                errors.append(f"{display_path(path)}: the lines after {number} were not looked at.")
                break
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


def _flawless_boxes(text: str, num_classes: int | None) -> Floats | None:
    """The labels of a file in which every row is a box and nothing is to be said, clipped or left out; else None."""
    if "_" in text or not text.isascii():
        return None
    rows: list[list[str]] = []
    for row in filter(None, map(str.split, _lines(text))):  # a hostile file ends here before it is all in memory
        if len(row) != 5 or len(rows) == MAX_LABELS:
            return None
        rows.append(row)
    if not rows:
        return None
    try:
        values = np.array([float(token) for row in rows for token in row]).reshape(-1, 5)
    except ValueError:
        return None
    classes, limit = values[:, 0], MAX_CLASS if num_classes is None else min(num_classes, MAX_CLASS)
    if np.signbit(values).any() or not (values[:, 1:] <= 1).all() or not (classes < limit).all():  # nan is not <= 1
        return None
    labels = values.astype(np.float32)
    whole, has_area = (classes == np.floor(classes)).all(), (labels[:, 3:] > 0).all()
    repeated = len({row.tobytes() for row in labels}) < len(labels)
    return labels if whole and has_area and not repeated else None


def _lines(text: str) -> Iterator[str]:
    """The lines as editors count them, one by one; `splitlines` also breaks at a dozen control characters."""
    yield from io.StringIO(text, newline=None)


def _parse_row(tokens: list[str], num_classes: int | None, names_file: str) -> tuple[list[float], str]:
    """The row's numbers, or what is wrong with it."""
    values = []
    for token in tokens:
        try:
            values.append(float(token))
        except ValueError:
            return [], f"{_short(token)!r} is not a number. Write `class cx cy w h`."
    whole = "".join(tokens)
    if "_" in whole or not whole.isascii():
        wrong = next(token for token in tokens if "_" in token or not token.isascii())
        return [], f"{_short(wrong)!r} is not a number. Write it with the digits 0 to 9 and a point."
    if len(values) != 5 and (len(values) < 7 or len(values) % 2 == 0):
        hint = " (the last a confidence, from --save-conf?)" if len(values) == 6 else ""
        return [], f"{len(values)} numbers{hint}. Write `class cx cy w h`, or a class and 3 or more points x y."
    label = values[0]
    if not label.is_integer() or not 0 <= label < MAX_CLASS:
        return [], f"class {_short(tokens[0])} is not a whole number from 0 to {MAX_CLASS - 1}."
    if num_classes is not None and label >= num_classes:
        known = f"{names_file} names {num_classes} class{'es' * (num_classes != 1)}"
        return [], f"class {int(label)} is outside 0..{num_classes - 1} ({known}). Fix the label or add a name."
    for token, value in zip(tokens[1:], values[1:]):
        if not -TOLERANCE <= value <= 1 + TOLERANCE:  # true for nan as well
            advice = "Divide x and widths by the image's width, y by its height."
            return [], f"coordinate {_short(token)} is outside 0..1. {advice}"
    return values, ""


def _short(token: str) -> str:
    return token if len(token) <= 40 else f"{token[:40]}..."


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
            notes.append(f"{display_path(path)}:{numbers[index]}: the box has no area; label left out.")
        elif first is not None:
            notes.append(f"{display_path(path)}:{numbers[index]}: repeats line {numbers[first]}; label left out.")
        else:
            keep[row.tobytes()] = index
    if len(notes) > ERRORS_KEPT:
        rest = len(notes) - ERRORS_KEPT
        notes[ERRORS_KEPT:] = [f"{display_path(path)}: {rest} more labels left out for these reasons."]
    return list(keep.values()), tuple(notes)


# ----------------------------------------------------------------------------------------------------------------- scan


def scan(
    sources: Sequence[Path],
    spec: DatasetSpec | None,
    *,
    single_cls: bool = False,
    workers: int = 8,
    max_pixels: int = MAX_PIXELS,
    prefix: str = "",
) -> Scan:
    """Read and check all images of `sources` and their labels, from the cache where nothing has changed since.

    With `single_cls` every class becomes 0. With it, or without a `spec`, any class is allowed in the files. A summary
    and the first problems are logged; all of them are in `messages`, in order of the images whatever the number of
    workers.

    Raises:
        UserError: a source that does not exist.
    """
    files = _image_names(sources)
    num_classes = None if single_cls or spec is None else spec.num_classes
    names_file = "the dataset" if spec is None else display_path(spec.path)
    title = f"{prefix}Scanning {', '.join(map(display_path, sources))}"
    places, key = _cache_places(sources), _cache_key(files, num_classes, names_file, max_pixels)
    table = _Table.read(places, key, len(files), num_classes or MAX_CLASS)
    if table is None:
        examine = partial(_examine, num_classes=num_classes, names_file=names_file, max_pixels=max_pixels)
        parts = []
        bar = Bar((), title, total=len(files), show=rank() <= 0)
        with bar, contextlib.closing(_tables(files, examine, min(workers, num_cpus()))) as tables:
            for part in tables:
                parts.append(part)
                bar.update(len(part.status))
        table = _Table.joined(parts)
        del parts
        table.write(places, key)
    found, empty, missing, corrupt = np.bincount(table.status, minlength=4).tolist()
    messages = table.messages.tolist()
    LOGGER.info(f"{title}... {found + empty} images, {missing + empty} backgrounds, {corrupt} corrupt")
    more = [f"... and {len(messages) - MESSAGES_SHOWN} more like these"] if len(messages) > MESSAGES_SHOWN else []
    for message in messages[:MESSAGES_SHOWN] + more:
        LOGGER.warning(f"{prefix}{message}")
    unusable = [files[index] for index in np.flatnonzero(table.status == CORRUPT)]
    return Scan(table.samples(files, single_cls), found + empty, missing, empty, corrupt, messages, unusable)


def refuse_unusable(found: Scan, spec: DatasetSpec, places: str) -> None:
    """Stop where more than a tenth of the images cannot be used: what the rest says would not be worth much.

    Raises:
        UserError: with the counts, the likely cause and the first messages.
    """
    total = len(found.samples) + found.corrupt
    if found.corrupt <= MAX_UNUSABLE * total:
        return
    first = " ".join(f"({number}) {_gist(text)}" for number, text in enumerate(found.messages[:3], 1))
    raise UserError(
        f"{display_path(spec.path)}: {found.corrupt} of the {total} images in {places} cannot be used. "
        f"{_likely_cause(found, spec.num_classes)}The first messages: {first} Correct them, or go on without these "
        "images: --skip-bad."
    )


def _gist(message: str) -> str:
    """A message's file name and problem, without folders and advice."""
    place, _, problem = message.partition(": ")
    return f"{Path(place).name}: {problem.split('. ')[0].split(' (')[0][:60].rstrip('.')}."


def _likely_cause(found: Scan, num_classes: int) -> str:
    """What explains the class numbers of the unusable images, as a sentence; empty where they are all right."""
    used = set(np.unique(found.samples.labels.flat[:, 0]).astype(int).tolist())
    for file in found.unusable[:MAX_LOOKED_AT]:
        used |= {int(label) for label in parse_label_file(_label_name(file), None).labels[:, 0]}
    largest = max(used, default=0)
    if largest < num_classes:
        return ""
    if largest == num_classes and 0 not in used:
        return f"Do your classes start at 1? They must start at 0, and here they are {min(used)} to {largest}. "
    entries = f"{num_classes} entr{'y' if num_classes == 1 else 'ies'}"
    return f"`names:` has {entries}, but classes up to {largest} occur: add the missing names. "


class _Examined(NamedTuple):
    status: int
    labels: ParsedLabels
    shape_hw: tuple[int, int] = (0, 0)
    messages: tuple[str, ...] = ()


def _examine(file: str, num_classes: int | None, names_file: str, max_pixels: int) -> _Examined:
    """What is known of one image and its label file after reading both."""
    place = _label_name(file)
    labels = parse_label_file(place, num_classes, names_file=names_file)
    errors = list(labels.errors)
    try:
        shape_hw = image_shape(file, max_pixels)
    except UserError as error:
        errors, shape_hw = [str(error)], (0, 0)
    if errors:
        return _Examined(CORRUPT, ParsedLabels(), messages=tuple(f"{error} Image left out." for error in errors))
    status = FOUND if len(labels.labels) else EMPTY if os.path.exists(place) else MISSING
    return _Examined(status, labels, shape_hw, labels.notes)


def _tables(files: Sequence[str], examine: Callable[[str], _Examined], workers: int) -> Generator[_Table, None, None]:
    """What is known of all images, in their order, a chunk at a time."""
    chunks = [files[start : start + CHUNK] for start in range(0, len(files), CHUNK)]

    def read(chunk: Sequence[str]) -> _Table:
        return _Table.build([examine(file) for file in chunk])

    if workers > 1 and len(files) >= MANY and may_fork():
        yield from in_processes(read, chunks, workers)
        return
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        for chunk in chunks:
            yield _Table.build(list(pool.map(examine, chunk)))


# ---------------------------------------------------------------------------------------------------------------- cache


UNREADABLE_CACHE = (*UNREADABLE_ARRAY, RuntimeError, struct.error, zipfile.BadZipFile)  # what zipfile raises, too


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
    def build(cls, examined: Sequence[_Examined]) -> _Table:
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

    @classmethod
    def joined(cls, tables: Sequence[_Table]) -> _Table:
        """The tables one behind the other."""
        parts = [cls.build(()), *tables]
        return cls(**{item.name: np.concatenate([getattr(part, item.name) for part in parts]) for item in fields(cls)})

    def samples(self, files: Sequence[str], single_cls: bool) -> Samples:
        """The usable images; one that is not has neither labels nor segments. They share the table's memory."""
        usable = self.status != CORRUPT
        labels = self.labels
        if single_cls:
            labels = labels.copy()
            labels[:, 0] = 0
        return Samples(
            Paths(file for file, use in zip(files, usable.tolist()) if use),
            Ragged(labels, self.label_counts[usable]),
            Ragged(self.points, self.point_counts),
            np.concatenate(([0], np.cumsum(self.segment_counts[usable], dtype=np.int64))),
            self.shapes_hw[usable].astype(np.int64),
        )

    @classmethod
    def read(cls, places: Sequence[Path], key: str, num_images: int, num_classes: int) -> _Table | None:
        """The table cached under this key, or None where there is none, or it is not one that `build` could make."""
        names = [item.name for item in fields(cls)]
        for place in places:
            with contextlib.suppress(*UNREADABLE_CACHE), zipfile.ZipFile(place) as archive:
                # stored as they are, and so no larger than the file, which is no larger than the images are many
                if place.stat().st_size > CACHE_BYTES_PER_IMAGE * (num_images + 1):
                    continue
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    continue
                if str(_stored_array(archive, "key")) == key:
                    table = cls(**{name: _stored_array(archive, name) for name in names})
                    if table.is_sound(num_images, num_classes):
                        return table
        return None

    def is_sound(self, num_images: int, num_classes: int) -> bool:
        """Whether the arrays have the kinds and lengths, and the numbers the ranges, that a scan gives."""
        kinds = (
            (self.status, np.int8, (num_images,)),
            (self.shapes_hw, np.int32, (num_images, 2)),
            (self.label_counts, np.int32, (num_images,)),
            (self.labels, np.float32, (len(self.labels), 5)),
            (self.segment_counts, np.int32, (num_images,)),
            (self.point_counts, np.int32, (len(self.point_counts),)),
            (self.points, np.float32, (len(self.points), 2)),
        )
        if any(array.dtype != dtype or array.shape != shape for array, dtype, shape in kinds):
            return False
        if self.messages.ndim != 1 or self.messages.dtype.kind != "U":
            return False
        usable = self.status != CORRUPT
        classes, places = self.labels[:, 0], (self.labels[:, 1:], self.points)
        return bool(
            np.isin(self.status, (FOUND, EMPTY, MISSING, CORRUPT)).all()
            and (self.shapes_hw[usable] >= MIN_SIDE).all()
            and not self.label_counts[~usable].any()  # else the labels of those after it would not be theirs
            and not self.segment_counts[~usable].any()
            and _adds_up(self.label_counts, len(self.labels))
            and _adds_up(self.segment_counts, len(self.point_counts))
            and _adds_up(self.point_counts, len(self.points))
            and ((self.segment_counts == 0) | (self.segment_counts == self.label_counts)).all()
            and (self.point_counts >= 3).all()
            and ((classes >= 0) & (classes < num_classes) & (classes == np.floor(classes))).all()  # false for nan
            and all(((values >= 0) & (values <= 1)).all() for values in places)
        )

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


def _stored_array(archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file)  # refuses pickles by itself


def _adds_up(counts: npt.NDArray[np.int32], total: int) -> bool:
    return bool((counts >= 0).all()) and int(counts.sum(dtype=np.int64)) == total


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


def _cache_key(files: Sequence[str], num_classes: int | None, names_file: str, max_pixels: int) -> str:
    """A digest of everything a scan depends on: images and labels by path, size and time."""
    digest = hashlib.sha256(
        f"{CACHE_VERSION} {num_classes} {max_pixels} {names_file}\0".encode("utf-8", "surrogateescape")
    )
    for file in files:
        for path in (file, _label_name(file)):
            digest.update(path.encode("utf-8", "surrogateescape") + b"\0")
            with contextlib.suppress(OSError, ValueError):  # ValueError: a NUL in a line of a list
                state = os.stat(path)
                digest.update(f"{state.st_size}:{state.st_mtime_ns}".encode())
            digest.update(b"\0")
    return digest.hexdigest()
