"""The report of an ablation: `report.md`, `results.csv` and `report.html`, made of one list of blocks, so they agree.

`load` reads what `ablate.py` left, `write` judges and writes it. Only cells that are done count.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote
from zipfile import BadZipFile

import numpy as np
import torch

from utils.boxes import box_iou
from utils.config import UserError, display_path, load_dataset, read_yaml
from utils.labels import image_files
from utils.metrics import IOU_THRESHOLDS, AveragePrecision, match
from utils.report_html import (
    Block,
    Charts,
    Code,
    DifferenceRow,
    Heading,
    Items,
    Picture,
    Table,
    Text,
    curve_panel,
    difference_plot,
    page,
)
from utils.statistics import Comparison, Judged, compare, image_bootstrap_seeds, paired_differences, seeds_needed

PRIMARY, SECOND = "mAP50-95", "mAP50"
METRICS = ("precision", "recall", SECOND, PRIMARY)
COSTS = {
    "parameters": "parameters",
    "gflops": "GFLOPs",
    "latency_ms": "latency (ms)",
    "memory_mb": "memory (MB)",
    "tensors": "tensors transferred",
    "percent": "% of parameters transferred",
}
GATE_COLUMNS = ("layer", "gate", "mean", "channels", "images", "positions", "saturated", "from neutral", "verdict")
SIZES = ("small", "medium", "large")
SIZE_EDGES = (32**2, 96**2)  # COCO's, here as areas of boxes in pixels of the original image
CLASSES_SHOWN = 10
RESAMPLES = 300  # of the images: each end of the interval is then known to a twelfth of the interval's half
CURVE_COLUMN = "metrics/mAP_0.5"
AGAIN = "Delete the cell's cell.json and give the ablation's command again: it is judged anew."


# -------------------------------------------------------------------------------------------------------- what was found


@dataclass(frozen=True, eq=False)
class Boxes:
    """What one cell found on its images, and the labels there; boxes are xyxy in pixels of the original images."""

    paths: list[str]
    detections: np.ndarray  # (n, 6) of xyxy, confidence, class; by image, most confident first
    image: np.ndarray  # (n,) index into paths
    truth: np.ndarray  # (t, 5) of class, xyxy
    truth_image: np.ndarray  # (t,)

    @cached_property
    def matched(self) -> tuple[np.ndarray, np.ndarray]:
        """`match`'s result (n, thresholds), and which label each detection overlaps most in its class, -1 for none."""
        correct = np.zeros((len(self.detections), len(IOU_THRESHOLDS)), bool)
        label = np.full(len(self.detections), -1)
        for index in range(len(self.paths)):
            rows, labels = np.flatnonzero(self.image == index), np.flatnonzero(self.truth_image == index)
            if not len(rows) or not len(labels):
                continue
            found, truth = torch.from_numpy(self.detections[rows]), torch.from_numpy(self.truth[labels])
            correct[rows] = match(found, truth).numpy()
            iou, best = torch.where(found[:, 5:] == truth[:, 0], box_iou(found[:, :4], truth[:, 1:]), -1).max(1)
            label[rows] = np.where(iou.numpy() > 0, labels[best.numpy()], -1)
        return correct, label

    def per_size(self) -> list[float]:
        """mAP50-95 of small, medium and large objects; NaN for a size that no label has.

        Recall counts the labels of that size. A correct detection belongs to the size of the label it was matched
        with, any other to its own: so a large object that is found is neither a hit nor a false alarm among small
        ones. COCO's rule, but that a detection cannot choose a second-best label of the right size.
        """
        correct, label = self.matched
        truth_size, own_size = _size(self.truth[:, 1:]), _size(self.detections[:, :4])
        label_size = np.append(truth_size, -1)[label]
        scores = []
        for size in range(len(SIZES)):
            wanted = self.truth[truth_size == size, 0]
            by_threshold = []
            for hit in correct.T:
                counts = np.where(hit, label_size, own_size) == size
                found = self.detections[counts]
                by_threshold.append(_average_precision(hit[counts, None], found[:, 4], found[:, 5], wanted))
            scores.append(float(np.mean(by_threshold)) if len(wanted) else float("nan"))
        return scores

    def judged(self, number_of: Mapping[str, int]) -> Judged:
        """The same for `utils.statistics`, images numbered as they are in the whole ablation."""
        numbers = np.array([number_of[path] for path in self.paths], int)
        return Judged(
            image=numbers[self.image],
            correct=self.matched[0],
            conf=self.detections[:, 4],
            cls=self.detections[:, 5].astype(int),
            target_image=numbers[self.truth_image],
            target_cls=self.truth[:, 0].astype(int),
            images=len(number_of),
        )


def _size(xyxy: np.ndarray) -> np.ndarray:
    return np.digitize((xyxy[:, 2] - xyxy[:, 0]) * (xyxy[:, 3] - xyxy[:, 1]), SIZE_EDGES)


def _average_precision(correct: np.ndarray, conf: np.ndarray, cls: np.ndarray, target_cls: np.ndarray) -> float:
    """mAP over the columns of `correct` (n, thresholds)."""
    if not len(target_cls):
        return 0.0
    collected = AveragePrecision(int(target_cls.max()) + 1, correct.shape[1])
    collected.update(correct, conf, cls, target_cls)
    return collected.compute().map


@dataclass(frozen=True, eq=False)
class Cell:
    """One arm trained with one seed."""

    arm: str
    seed: int
    seconds: float
    scores: dict[str, float]  # by METRICS
    per_class: dict[str, float]  # mAP50-95 of the classes that have labels
    curve: np.ndarray  # (epochs,) mAP50
    boxes: Boxes


@dataclass(frozen=True, eq=False)
class Ablation:
    """A folder that `ablate.py` wrote: recipe, arms with the baseline first, and the cells that are done."""

    folder: Path
    arms: dict[str, dict[str, Any]]  # the options in which each differs from the recipe
    folds: int
    recipe: dict[str, Any]
    costs: dict[str, dict[str, Any]]  # by arm, see COSTS; `gates` besides
    cells: dict[str, dict[int, Cell]]  # by arm and seed, both in order
    unfinished: tuple[str, ...] = ()  # cells that were begun
    images: dict[str, int] = field(default_factory=dict)  # every image judged on, and its number

    @property
    def baseline(self) -> str:
        return next(iter(self.arms))

    def values(self, metric: str) -> dict[str, dict[int, float]]:
        """`utils.statistics`' form of a metric."""
        return {arm: {seed: cell.scores[metric] for seed, cell in cells.items()} for arm, cells in self.cells.items()}

    def pairs(self, arm: str) -> list[tuple[Cell, Cell]]:
        """(baseline, arm) of every seed that both have."""
        ours, theirs = self.cells[arm], self.cells[self.baseline]
        return [(theirs[seed], cell) for seed, cell in ours.items() if seed in theirs]


# --------------------------------------------------------------------------------------------------------------- reading


def load(folder: str | Path) -> Ablation:
    """Read an ablation's folder; cells that are not done are left out, those begun are named in `unfinished`.

    Raises:
        UserError: naming the file that is missing, broken, or of another experiment.
    """
    folder = Path(folder)
    file = read_yaml(folder / "recipe.yaml")
    arms, recipe, folds = (file.data.get(key) for key in ("arms", "recipe", "folds"))
    if not isinstance(arms, dict) or not arms or not isinstance(recipe, dict) or not isinstance(folds, int):
        raise UserError(f"{file.where()}: expected `arms`, `folds` and `recipe`, as ablate.py writes them.")
    cells: dict[str, dict[int, Cell]] = {arm: {} for arm in arms}
    done = sorted(folder.glob("cells/*/seed*/cell.json"))
    for cell_file in done:
        cell = _read_cell(cell_file)
        if cell.arm not in cells or cell.seed in cells[cell.arm]:
            problem = "is there twice" if cell.arm in cells else "is no arm of recipe.yaml"
            raise UserError(f"{display_path(cell_file)}: '{cell.arm}' seed {cell.seed} {problem}. Move the folder away.")
        other = next((cells[arm][cell.seed] for arm in arms if cell.seed in cells[arm]), cell)
        if _labels_by_image(cell) != _labels_by_image(other):
            place = display_path(cell_file.parent / "judged.npz")
            raise UserError(f"{place}: other images or labels than of arm '{other.arm}' with the same seed. {AGAIN}")
        cells[cell.arm][cell.seed] = cell
    begun = {path for path in folder.glob("cells/*/seed*") if path.is_dir()} - {path.parent for path in done}
    costs = _read_json(folder / "arms.json") if (folder / "arms.json").exists() else {}
    paths = sorted({path for of_arm in cells.values() for cell in of_arm.values() for path in cell.boxes.paths})
    return Ablation(
        folder=folder,
        arms={arm: dict(options or {}) for arm, options in arms.items()},
        folds=folds,
        recipe=recipe,
        costs={arm: costs[arm] for arm in arms if isinstance(costs.get(arm), dict)},
        cells={arm: dict(sorted(of_arm.items())) for arm, of_arm in cells.items()},
        unfinished=tuple(sorted(f"{path.parent.name} {path.name}" for path in begun)),
        images={path: number for number, path in enumerate(paths)},
    )


def _labels_by_image(cell: Cell) -> tuple[list[str], Counter[str]]:
    boxes = cell.boxes
    return sorted(boxes.paths), Counter(boxes.paths[index] for index in boxes.truth_image)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{display_path(file)}: cannot be read ({error}). {AGAIN}") from None
    if not isinstance(data, dict):
        raise UserError(f"{display_path(file)}: expected an object, found a {type(data).__name__}. {AGAIN}")
    return data


def _read_cell(file: Path) -> Cell:
    data = _read_json(file)
    try:
        cell = Cell(
            arm=str(data["arm"]),
            seed=int(data["seed"]),
            seconds=float(data["seconds"]),
            scores={name: float(data[name]) for name in METRICS},
            per_class={str(name): float(value) for name, value in data["per_class"].items()},
            curve=_read_curve(file.with_name("results.csv")),
            boxes=_read_boxes(file.with_name("judged.npz")),
        )
    except (KeyError, TypeError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{display_path(file)}: not as ablate.py writes it: {what}. {AGAIN}") from None
    return cell
