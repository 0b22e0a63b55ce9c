"""What an ablation left in its folder: recipe, arms, and of every finished cell its scores, curve, boxes and labels."""

from __future__ import annotations

import csv
import json
import math
import os
import tokenize
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile

import numpy as np
import torch

from experiments.registration import Look, looks, registered
from experiments.sizes import map_by_size
from experiments.statistics import Comparison, Judged, Rule, Run, against_first, compare
from utils.config import UserError, YamlFile, display_path, read_yaml
from utils.metrics import IOU_THRESHOLDS, AveragePrecision, match
from utils.recorder import MAX_BYTES

PRIMARY, SECOND = "mAP50-95", "mAP50"
METRICS = ("precision", "recall", SECOND, PRIMARY)
CURVE_COLUMN = "metrics/mAP_0.5"
MAX_JSON_BYTES = 2**22  # what an arm or a cell is has a few thousand
MAX_NUMBER = 1e30
MAX_ARRAY_BYTES = 2**27  # of 300 detections an image, 18,000 images
MAX_DIRECTORY_BYTES = 2**16
MAX_PIXEL, MAX_CLASSES = 1e7, 10_000
ZIP64_LOCATOR = b"PK\6\7"
ARRAYS: tuple[tuple[str, str, Any, tuple[int, ...]], ...] = (  # of judged.npz: name, kinds, type, shape after (n,)
    ("detections", "f", np.float32, (6,)),
    ("detection_image", "iu", np.int64, ()),
    ("truth", "f", np.float32, (5,)),
    ("truth_image", "iu", np.int64, ()),
    ("paths", "U", np.str_, ()),
)
# what zipfile and numpy raise for broken files; for text in a header that is no Python, tokenize's and the compiler's
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    BadZipFile,
    zlib.error,
    NotImplementedError,
    SyntaxError,
    TypeError,
    MemoryError,
    RecursionError,
    tokenize.TokenError,
)
AGAIN = "Delete the cell's cell.json and give the ablation's command again: the cell is judged anew."


# ------------------------------------------------------------------------------------------------------ what was found


@dataclass(frozen=True, eq=False)
class Boxes:
    """What one cell found on its images, and the labels there; boxes are xyxy in pixels of the original images."""

    paths: list[str]
    detections: np.ndarray  # (n, 6) of xyxy, confidence, class; by image, most confident first
    image: np.ndarray  # (n,) index into paths
    truth: np.ndarray  # (t, 5) of class, xyxy
    truth_image: np.ndarray  # (t,)

    @property
    def classes(self) -> np.ndarray:
        """Classes that have labels, ascending."""
        return np.unique(self.truth[:, 0]).astype(int)

    @cached_property
    def correct(self) -> np.ndarray:
        """`match`'s result (n, thresholds)."""
        correct = np.zeros((len(self.detections), len(IOU_THRESHOLDS)), bool)
        for index in range(len(self.paths)):
            rows, labels = self.image == index, self.truth_image == index
            correct[rows] = match(torch.from_numpy(self.detections[rows]), torch.from_numpy(self.truth[labels])).numpy()
        return correct

    @cached_property
    def per_size(self) -> dict[str, float]:
        """mAP50-95 of all, small, medium and large objects, see `map_by_size`."""
        return map_by_size(self.detections, self.image, self.truth, self.truth_image)

    def judged(self, number_of: Mapping[str, int]) -> Judged:
        """The same for `experiments.statistics`, images numbered as they are in the whole ablation."""
        numbers = np.array([number_of[path] for path in self.paths], int)
        return Judged(
            image=numbers[self.image],
            correct=self.correct,
            conf=self.detections[:, 4],
            cls=self.detections[:, 5].astype(int),
            target_image=numbers[self.truth_image],
            target_cls=self.truth[:, 0].astype(int),
            images=len(number_of),
        )


def average_precision(correct: np.ndarray, conf: np.ndarray, cls: np.ndarray, target_cls: np.ndarray) -> float:
    """mAP over the columns of `correct` (n, thresholds)."""
    if not len(target_cls):
        return 0.0
    collected = AveragePrecision(int(target_cls.max()) + 1, correct.shape[1])
    collected.update(correct, conf, cls, target_cls)
    return float(collected.average_precision().mean())


@dataclass(frozen=True, eq=False)
class Cell:
    """One arm trained with one seed, on one split where several seeds share one."""

    arm: str
    seed: int
    seconds: float  # NaN where it was trained in several goes, or not at all
    scores: dict[str, float]  # by METRICS
    per_class: dict[str, float]  # mAP50-95 of the classes that have labels
    curve: np.ndarray  # (epochs,) mAP50; empty where nothing was trained
    boxes: Boxes
    split: int | None = None
    diverged: str = ""  # why its training ended early: its scores are then 0
    registered: str = ""  # see `experiments.registration.digest`

    @property
    def run(self) -> Run:
        """By what it is paired with the cells of other arms."""
        return self.seed if self.split is None else (self.split, self.seed)


@dataclass(frozen=True, eq=False)
class Ablation:
    """A folder that `ablate.py` wrote: recipe, arms with the baseline first, and the cells that are done."""

    folder: Path
    arms: dict[str, dict[str, Any]]  # the options in which each differs from the recipe
    folds: int
    recipe: dict[str, Any]
    costs: dict[str, dict[str, Any]]  # by arm, see COSTS; `gates` besides
    cells: dict[str, dict[Run, Cell]]  # by arm and run, both in order
    against: dict[str, str]  # the comparisons: arm -> its baseline
    rule: Rule
    unfinished: tuple[str, ...] = ()  # cells that were begun
    planned: tuple[int, ...] = ()  # the seeds it was begun with
    planned_splits: int = 0  # how many splits these were crossed with
    fresh: bool = False  # whether every split has a dataset of its own
    registered: Mapping[str, Any] = field(default_factory=dict)  # before the first cell; empty in old ablations
    looks: tuple[Look, ...] = ()  # reports before the last cell

    @property
    def planned_cells(self) -> int:
        """How many cells it was begun with; as many as are done where that is not known."""
        runs = len(self.planned) * max(self.planned_splits, 1)
        return max(len(self.arms) * runs, sum(map(len, self.cells.values())))

    @property
    def baseline(self) -> str:
        """The first arm, with which arms are compared unless `against` says otherwise."""
        return next(iter(self.arms))

    @property
    def references(self) -> list[str]:
        """Arms that are shown and not judged: placebos, and the checkpoint itself."""
        return [arm for arm in list(self.arms)[1:] if arm not in self.against]

    def baseline_of(self, arm: str) -> str:
        """What an arm is compared with."""
        return self.against.get(arm, self.baseline)

    def compare(self, metric: str) -> list[Comparison]:
        """Every comparison, corrected for their number."""
        return compare(self.values(metric), self.against, rule=self.rule)

    def compare_references(self, metric: str) -> list[Comparison]:
        """Each reference against the first arm, by itself and so uncorrected."""
        found = [compare(self.values(metric), {arm: self.baseline}, rule=self.rule) for arm in self.references]
        return [comparison for several in found for comparison in several]

    @cached_property
    def images(self) -> dict[str, int]:
        """Every image that some cell was judged on, and its number."""
        paths = sorted({path for cells in self.cells.values() for cell in cells.values() for path in cell.boxes.paths})
        return {path: number for number, path in enumerate(paths)}

    @cached_property
    def labels(self) -> np.ndarray:
        """(t, 5) of class, xyxy: those of every image once, however many cells were judged on it."""
        rows, seen = [np.zeros((0, 5), np.float32)], set[str]()
        for boxes in (cell.boxes for cells in self.cells.values() for cell in cells.values()):
            new = [index for index, path in enumerate(boxes.paths) if path not in seen]
            rows.append(boxes.truth[np.isin(boxes.truth_image, new)])
            seen.update(boxes.paths)
        return np.concatenate(rows)

    def values(self, metric: str) -> dict[str, dict[Run, float]]:
        """`experiments.statistics`' form of a metric."""
        return {arm: {run: cell.scores[metric] for run, cell in cells.items()} for arm, cells in self.cells.items()}

    def pairs(self, arm: str) -> list[tuple[Cell, Cell]]:
        """(its baseline, arm) of every run that both have."""
        ours, theirs = self.cells[arm], self.cells[self.baseline_of(arm)]
        return [(theirs[run], cell) for run, cell in ours.items() if run in theirs]


# ------------------------------------------------------------------------------------------------------------- reading


def load(folder: str | Path) -> Ablation:
    """Read an ablation's folder; cells that are not done are left out, those begun are named in `unfinished`.

    Raises:
        UserError: naming the file that is missing, broken, or of another experiment.
    """
    folder = Path(folder)
    file = read_yaml(folder / "recipe.yaml")
    arms, recipe, folds, planned = (file.data.get(key) for key in ("arms", "recipe", "folds", "seeds"))
    named = isinstance(arms, dict) and all(isinstance(name, str) for name in arms)
    if not named or not arms or not all(isinstance(options, dict | None) for options in arms.values()):
        raise UserError(f"{file.where('arms')}: expected `arms`, and the options of each, as ablate.py writes them.")
    if not isinstance(recipe, dict) or not isinstance(folds, int) or not _is_seeds(planned):
        raise UserError(f"{file.where()}: expected `folds`, `recipe` and `seeds`, as ablate.py writes them.")
    against, rule = _comparisons(file, list(arms))
    cells: dict[str, dict[Run, Cell]] = {arm: {} for arm in arms}
    carried: dict[Path, str] = {}
    done = sorted(folder.glob("cells/*/seed*/cell.json"))
    for cell_file in done:
        cell = _read_cell(cell_file)
        if cell.arm not in cells or cell.run in cells[cell.arm]:
            problem = "is there twice" if cell.arm in cells else "is no arm of recipe.yaml"
            raise UserError(
                f"{display_path(cell_file)}: '{cell.arm}' seed {cell.seed} {problem}. Move the folder away."
            )
        other = next((cells[arm][cell.run] for arm in arms if cell.run in cells[arm]), cell)
        if _labels_by_image(cell) != _labels_by_image(other):
            place = display_path(cell_file.parent / "judged.npz")
            raise UserError(f"{place}: other images or labels than of arm '{other.arm}' with the same seed. {AGAIN}")
        cells[cell.arm][cell.run], carried[cell_file] = cell, cell.registered
    if len({isinstance(run, tuple) for of_arm in cells.values() for run in of_arm}) > 1:
        raise UserError(f"{display_path(folder)}: some cells have a split of their own and some not. {AGAIN}")
    begun = {path for path in folder.glob("cells/*/seed*") if path.is_dir()} - {path.parent for path in done}
    costs = read_arms(folder / "arms.json")
    return Ablation(
        folder=folder,
        arms={arm: dict(options or {}) for arm, options in arms.items()},
        folds=folds,
        recipe=recipe,
        costs={arm: costs[arm] for arm in arms if arm in costs},
        cells={arm: {run: of_arm[run] for run in sorted(of_arm)} for arm, of_arm in cells.items()},
        against=against,
        rule=rule,
        unfinished=tuple(sorted(f"{path.parent.name} {path.name}" for path in begun)),
        planned=tuple(planned or ()),
        planned_splits=len(splits) if isinstance(splits := file.data.get("split_seeds"), list) else 0,
        fresh=bool(file.data.get("fresh_data")),
        registered=registered(folder, file.data, carried),
        looks=tuple(looks(folder)),
    )


def _comparisons(file: YamlFile, arms: list[str]) -> tuple[dict[str, str], Rule]:
    """What is compared with what, and by which rule; ablations begun before these were written have the usual ones."""
    against, rule = file.data.get("against", against_first(arms)), file.data.get("rule", {})
    if not isinstance(against, dict) or not all(name in arms for name in (*against, *against.values())):
        raise UserError(f"{file.where('against')}: expected arms and their baselines, as ablate.py writes them.")
    try:
        return dict(against), Rule(**rule)
    except TypeError:
        raise UserError(f"{file.where('rule')}: expected alpha, least and margin, as ablate.py writes them.") from None


def _labels_by_image(cell: Cell) -> tuple[list[str], Counter[str]]:
    boxes = cell.boxes
    return sorted(boxes.paths), Counter(boxes.paths[index] for index in boxes.truth_image)


def _is_seeds(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(seed, int) for seed in value))


def read_json(file: Path, advice: str = AGAIN) -> dict[str, Any]:
    """An object from a JSON file; a UserError that ends in `advice` where it is none."""
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{display_path(file)}: has more than {MAX_JSON_BYTES:,} bytes. {advice}")
        data = json.loads(file.read_text(encoding="utf-8"))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{display_path(file)}: cannot be read ({error}). {advice}") from None
    if not isinstance(data, dict):
        raise UserError(f"{display_path(file)}: expected an object, found a {type(data).__name__}. {advice}")
    return data


def read_arms(file: Path) -> dict[str, dict[str, Any]]:
    """What `arms.json` says of each arm, see `experiments.report`'s COSTS; nothing where there is no such file.

    Raises:
        UserError: what cannot be read, or not what `ablate.py` writes.
    """
    advice = "Delete it: it is made anew."
    if not file.exists():
        return {}
    arms = read_json(file, advice)
    for arm, costs in arms.items():
        wrong = _wrong_cost(costs) if isinstance(costs, dict) else "the whole entry"
        if wrong:
            raise UserError(f"{display_path(file)}: arm {arm[:60]!r}: not as ablate.py writes it: {wrong}. {advice}")
    return arms


def _wrong_cost(costs: Mapping[str, Any]) -> str:
    """The key of a value that is not of its kind, or nothing."""
    texts = {"fingerprint", "start", "tensors", "gates_picture"}
    for key, value in costs.items():
        if key == "gates":
            rows: list[Any] = value if isinstance(value, list) and value else [None]
            right = all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows)
            right = right and all(isinstance(cell, str) for row in rows for cell in row)
        elif key in texts:
            right = isinstance(value, str) and len(value.encode("utf-8", "replace")) < 256 and "\0" not in value
        else:
            right = value is None or _is_number(value)
        if not right:
            return key[:60]
    return ""


def _is_number(value: Any, low: float = -MAX_NUMBER, high: float = MAX_NUMBER) -> bool:
    """Whether a value of a JSON file is a number within bounds; NaN is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _score(value: Any) -> float:
    if not _is_number(value, 0.0, 1.0):
        raise ValueError(f"expected a score of 0 to 1, found {value!r:.40}")
    return float(value)


def _read_cell(file: Path) -> Cell:
    data = read_json(file)
    trained = data.get("trained", True) and not data.get("diverged")
    curve = _read_curve(file.with_name("results.csv")) if trained else np.zeros(0)
    boxes = _read_boxes(file.with_name("judged.npz"))
    try:
        arm, seed, seconds, split = data["arm"], data["seed"], data["seconds"], data.get("split")
        diverged, under = data.get("diverged", ""), data.get("registered", "")
        if not isinstance(split, int | None) or not isinstance(diverged, str) or not isinstance(under, str):
            raise ValueError(f"its split and why it diverged are {split!r:.40} and {diverged!r:.40}")
        if not isinstance(arm, str) or not isinstance(seed, int) or not (seconds is None or _is_number(seconds, 0.0)):
            raise ValueError(f"its arm, seed and seconds are {arm!r:.40}, {seed!r:.40} and {seconds!r:.40}")
        cell = Cell(
            arm=arm,
            seed=seed,
            seconds=math.nan if seconds is None else float(seconds),
            scores={name: _score(data[name]) for name in METRICS},
            per_class={name: _score(value) for name, value in data["per_class"].items()},
            curve=curve,
            boxes=boxes,
            split=split,
            diverged=diverged,
            registered=under,
        )
    except (KeyError, ValueError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{display_path(file)}: not as ablate.py writes it: {what}. {AGAIN}") from None
    if len(boxes.classes) != len(cell.per_class):
        found = f"{len(cell.per_class)} classes here, labels of {len(boxes.classes)} in judged.npz"
        raise UserError(f"{display_path(file)}: {found}. {AGAIN}")
    return cell


def _read_curve(file: Path) -> np.ndarray:
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes")
        with file.open(encoding="utf-8", newline="") as lines:
            header, *rows = csv.reader(lines)
        column = [name.strip() for name in header].index(CURVE_COLUMN)
        curve = np.array([float(row[column]) for row in rows if row])
        if not len(curve) or not ((curve >= 0) & (curve <= 1) | np.isnan(curve)).all():
            raise ValueError("expected rows with a score of 0 to 1")
    except (OSError, ValueError, IndexError, csv.Error) as error:
        problem = f"cannot be read as a table with a column '{CURVE_COLUMN}' ({error})"
        raise UserError(f"{display_path(file)}: {problem}. Delete the cell's folder to have it trained anew.") from None
    return curve


# ---------------------------------------------------------------------------------------------------------- judged.npz


def _read_boxes(file: Path) -> Boxes:
    try:
        _check_directory(file)
        with ZipFile(file) as archive:
            detections, image, truth, truth_image, names = (_read_array(archive, *array) for array in ARRAYS)
    except UNREADABLE as error:
        raise UserError(f"{display_path(file)}: cannot be read ({error}). {AGAIN}") from None
    paths = names.tolist()
    numbers = np.concatenate((image, truth_image))
    fits = len(detections) == len(image) and len(truth) == len(truth_image)
    known = not len(numbers) or 0 <= numbers.min() <= numbers.max() < len(paths)
    if not fits or not known or len(set(paths)) < len(paths):
        counts = f"{len(detections)} and {len(image)}, {len(truth)} and {len(truth_image)}, {len(paths)}"
        expected = "of each detection and each label the image, and different paths"
        raise UserError(f"{display_path(file)}: expected {expected}; found {counts}. {AGAIN}")
    confidence, classes = detections[:, 4], np.concatenate((detections[:, 5], truth[:, 0]))
    pixels = np.abs(np.concatenate((detections[:, :4], truth[:, 1:])))
    sane = ((confidence >= 0) & (confidence <= 1)).all() and (pixels < MAX_PIXEL).all()
    if not sane or not ((classes >= 0) & (classes < MAX_CLASSES) & (classes == np.floor(classes))).all():
        expected = f"boxes in pixels, confidences of 0 to 1, and classes below {MAX_CLASSES:,}"
        raise UserError(f"{display_path(file)}: expected {expected}. {AGAIN}")
    order = np.lexsort((-confidence, image))
    return Boxes(paths, detections[order], image[order], truth, truth_image)


def _check_directory(file: Path) -> None:
    """Refuse a zip whose list of entries alone would fill the memory; numpy writes one of five, without a comment."""
    with file.open("rb") as stream:
        stream.seek(0, os.SEEK_END)
        stream.seek(max(stream.tell() - len(ZIP64_LOCATOR) - 38, 0))
        end = stream.read()
    signature, size = end[-22:-18], int.from_bytes(end[-10:-6], "little")
    if signature != b"PK\5\6" or end.startswith(ZIP64_LOCATOR) or size > MAX_DIRECTORY_BYTES:
        raise ValueError("no zip as numpy writes it")


def _read_array(archive: ZipFile, name: str, kinds: str, dtype: Any, row: tuple[int, ...]) -> np.ndarray:
    """An array of an archive as `dtype`, if it is of one of `kinds`; its size is looked at before it is read."""
    entry = archive.getinfo(f"{name}.npy")
    if (
        entry.file_size > MAX_ARRAY_BYTES
        or entry.compress_type not in (ZIP_STORED, ZIP_DEFLATED)
        or entry.flag_bits & 1
    ):
        raise ValueError(f"{name} is encrypted, packed by another method, or has more than {MAX_ARRAY_BYTES:,} bytes")
    with archive.open(entry) as stream:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"{name} has version {version} of numpy's format, expected (1, 0)")
        shape, _, stored = np.lib.format.read_array_header_1_0(stream)
        if (
            stored.kind not in kinds
            or shape[:1] + row != shape
            or not shape
            or math.prod(shape) * max(stored.itemsize, 1) > entry.file_size
        ):
            raise ValueError(f"{name} is {stored} of shape {shape}")
    with archive.open(entry) as stream:
        return np.lib.format.read_array(stream).astype(dtype, copy=False)
