"""Datasets: what a dataset YAML describes, and its images put in place, drawn or fetched, where the file says how."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.config import ROOT, WORK, UserError, YamlFile, display_path, find_file, read_yaml, user_path
from utils.downloads import OFFLINE_HINT, fetch_archive
from utils.files import user_cache_dir
from utils.shapes import CLASSES, SPLITS, draw_files, missing_files

COCO91_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)  # category ids COCO announced and never used


@dataclass(frozen=True)
class DatasetSpec:
    """A dataset YAML with its paths resolved; the paths need not exist yet (they may have to be fetched or drawn)."""

    file: YamlFile
    root: Path
    names: dict[int, str]
    train: tuple[Path, ...]
    val: tuple[Path, ...]
    test: tuple[Path, ...] = ()
    download: str | None = None  # an https archive
    draw: str | None = None  # "shapes": made by utils.shapes on first use

    @property
    def path(self) -> Path:
        """The YAML file."""
        return self.file.path

    @property
    def num_classes(self) -> int:
        return len(self.names)

    def split(self, task: str) -> tuple[Path, ...]:
        """Folders, lists or images of `train`, `val` or `test`; UserError where the YAML does not name that split."""
        paths: tuple[Path, ...] = {"train": self.train, "val": self.val, "test": self.test}[task]
        if not paths:
            raise UserError(f"{display_path(self.path)}: names no '{task}' images. Add a line `{task}: <folder>`.")
        return paths

    def moved(self, root: Path) -> DatasetSpec:
        """The same dataset below another root."""

        def move(paths: tuple[Path, ...]) -> tuple[Path, ...]:
            return tuple(root / p.relative_to(self.root) if p.is_relative_to(self.root) else p for p in paths)

        return dataclasses.replace(self, root=root, train=move(self.train), val=move(self.val), test=move(self.test))


def datasets_dir() -> Path | None:
    """`YOLOV5_DATASETS_DIR` (upstream's spelling `YOLOv5_DATASETS_DIR` means the same), or None."""
    value = os.environ.get("YOLOV5_DATASETS_DIR") or os.environ.get("YOLOv5_DATASETS_DIR")  # noqa: SIM112
    return user_path(value) if value else None


def load_dataset(data: str | Path | Mapping[str, Any], *, val_optional: bool = False) -> DatasetSpec:
    """Read a dataset YAML (or an equal mapping) and resolve its paths.

    A relative `path` is looked for below `YOLOV5_DATASETS_DIR` where that is set, the working directory, the
    repository, its folder `datasets`, and beside the YAML; the first that exists wins. Without `path` it is the first
    of these that holds the images of train and val. What is nowhere is fetched or drawn into `YOLOV5_DATASETS_DIR`,
    else into the repository's `datasets` (installed: that of the working directory): a leading `../datasets/` or
    `datasets/` stands for this place, and other steps upwards are left out of it. With `val_optional` there need not
    be a `val`.

    Raises:
        UserError: a missing or unknown kind of entry, with the YAML's line.
    """
    if isinstance(data, Mapping):
        file = YamlFile(Path("data"), dict(data))
    else:
        file = read_yaml(find_file(data, ("data",), (".yaml", ".yml")))
    root = _dataset_root(file)
    names = _names(file)
    splits = {task: _split_paths(file, task, root) for task in ("train", "val", "test")}
    for task in ("train", "val"):
        if not splits[task] and not (task == "val" and val_optional):
            raise UserError(f"{file.where()}: has no '{task}' entry. Add `{task}: <folder of images>`.")
    download, draw = file.data.get("download"), file.data.get("draw")
    if draw is not None and draw != "shapes":
        raise UserError(f"{file.where('draw')}: can draw 'shapes' only, not {draw!r}.")
    if download is not None and not str(download).startswith("https://"):
        raise UserError(
            f"{file.where('download')}: 'download' takes the https address of a zip or tar archive; "
            "scripts in a dataset file are never run. Fetch the data yourself and remove the line."
        )
    return DatasetSpec(file=file, root=root, names=names, **splits, download=download, draw=draw)


def _dataset_root(file: YamlFile) -> Path:
    value = file.data.get("path") or "."
    if not isinstance(value, str):
        raise UserError(f"{file.where('path')}: 'path' must be a folder, found {value!r}.")
    path = user_path(value)
    if path.is_absolute():
        return path
    inside = Path(*(part for part in Path(os.path.normpath(path)).parts if part != ".."))
    if inside.parts[:1] == ("datasets",):
        inside = inside.relative_to("datasets")
    named, own = datasets_dir(), WORK / "datasets"
    candidates = [Path.cwd() / path, ROOT / path, own / inside, file.path.parent / path]
    if named is not None:
        candidates.insert(0, named / inside)
    existing = [candidate for candidate in candidates if os.path.exists(candidate)]
    if not file.data.get("path"):  # the folders themselves always exist
        existing.sort(key=lambda candidate: not _holds_images(file, candidate))
    return Path(os.path.realpath(existing[0] if existing else (named or own) / inside))


def _holds_images(file: YamlFile, root: Path) -> bool:
    """Whether all places of `train` and `val` exist below a root."""
    return all(os.path.exists(path) for task in ("train", "val") for path in _split_paths(file, task, root))


def _names(file: YamlFile) -> dict[int, str]:
    value = file.data.get("names")
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        raise UserError(
            f"{file.where('names')}: expected `names:` with one name per class, as a list or `0: name` lines."
        )
    for expected, key in enumerate(value):
        if key != expected or isinstance(key, bool):
            raise UserError(f"{file.where('names', key)}: class numbers must run 0, 1, 2, ...; found {key!r}.")
    declared = file.data.get("nc")
    if declared is not None and declared != len(value):
        raise UserError(f"{file.where('nc')}: nc is {declared}, but {len(value)} names follow. Make them agree.")
    return {key: str(name) for key, name in value.items()}


def _split_paths(file: YamlFile, task: str, root: Path) -> tuple[Path, ...]:
    value = file.data.get(task)
    if value is None or value == "":
        return ()
    entries = value if isinstance(value, list) else [value]
    paths = []
    for i, entry in enumerate(entries):
        if not isinstance(entry, str):
            raise UserError(f"{file.where(task, i)}: '{task}' takes folders, image lists or images, found {entry!r}.")
        path = root / user_path(entry)
        if not os.path.exists(path) and entry.startswith("../"):
            path = root / entry[3:]
        paths.append(path)
    return tuple(paths)


def coco_categories() -> list[int]:
    """COCO's category id of each of its 80 classes."""
    return [number for number in range(1, 91) if number not in COCO91_GAPS]


# ------------------------------------------------------------------------------------------------------------ in place


def prepare(data: str | Path | Mapping[str, Any], *, task: str = "val", val_optional: bool = False) -> DatasetSpec:
    """The dataset of a YAML file, its images in place: drawn, or fetched, where the file says how.

    Raises:
        UserError: images of `task` (for training those of `val` too) that are not there and cannot be had.
    """
    spec = load_dataset(data, val_optional=val_optional)
    if spec.draw:
        return prepare_shapes(spec)
    tasks = ("train", "val") if task == "train" and (spec.val or not val_optional) else (task,)
    if _missing(spec, tasks) and spec.download:
        brought = fetch_archive(spec.download, spec.root.parent)
        spec = spec if spec.root.exists() else spec.moved(brought)
    for missing_task, path in _missing(spec, tasks):
        source = spec.file.data.get("source")  # where it is to be had, if not in a form that could be fetched
        advice = (
            f"`path:` ({spec.file.data.get('path', '.')}) is looked for below YOLOV5_DATASETS_DIR, the working"
            f" directory, the repository, its folder datasets, and beside the YAML. Correct it. {OFFLINE_HINT}"
        )
        where = spec.file.where(missing_task)
        raise UserError(f"{where}: the '{missing_task}' images are not at {path}. {source or advice}")
    return spec


def _missing(spec: DatasetSpec, tasks: Sequence[str]) -> list[tuple[str, Path]]:
    return [(task, path) for task in tasks for path in spec.split(task) if not path.exists()]


def prepare_shapes(spec: DatasetSpec) -> DatasetSpec:
    """Draw the dataset where it is missing, and return the specification with paths that exist.

    It is drawn below the specification's root, or in the user's cache folder where that cannot be written. Every file
    appears whole under its final name and has only one possible content, so that several processes may draw at once.

    Raises:
        UserError: the YAML's names or folders are not what is drawn, or the disk is full.
    """
    if spec.names != dict(enumerate(CLASSES)):
        raise UserError(f"{spec.file.where('names')}: `draw: shapes` has the classes {', '.join(CLASSES)}. Name these.")
    drawn = {spec.root / "images" / split for split in SPLITS}
    for task in ("train", "val", "test"):
        if any(path not in drawn and not path.exists() for path in getattr(spec, task)):
            raise UserError(f"{spec.file.where(task)}: `draw: shapes` draws images/train and images/val only.")
    roots = (spec.root, user_cache_dir() / "datasets" / "shapes")
    for root in roots:
        if not missing_files(root):
            return spec.moved(root)
    for root in roots:
        try:
            draw_files(root)
            break
        except OSError as error:
            if root == roots[-1] or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise UserError(
                    f"{root}: the shapes dataset (about 80 MB) cannot be written here ({error.strerror}). "
                    "Free some space, or set YOLOV5_DATASETS_DIR to a folder that can be written."
                ) from None
    return spec.moved(root)
