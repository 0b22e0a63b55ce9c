"""mAP50-95 of small, medium and large objects, by the protocol of COCO's evaluation.

The numbers are those of `pycocotools.cocoeval.COCOeval` on the same boxes, which tests compare. They differ from
YOLOv5's mAP in two ways that matter here: a detection whose best label is taken, or is of another size, may get its
second best, and precision counts as 0 above the highest recall. YOLOv5 draws a line from there to recall 1, which gives
a single lucky hit of ten labels about half of the area.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from utils.metrics import IOU_THRESHOLDS

AREAS = {  # least and largest area of a box, both included, in square pixels of the original image
    "all": (0.0, 1e5**2),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e5**2),
}
MAX_DETECTIONS = 100  # per image and class, the most confident ones
RECALLS = np.linspace(0, 1, 101)
TINY = np.spacing(1)


@dataclass(frozen=True, eq=False)
class _Judged:
    """The detections of one class: confidence (n,), and by area and threshold (areas, thresholds, n) which are right
    and which do not count; `labels` (areas,) is how many labels there are."""

    confidence: np.ndarray
    right: np.ndarray
    ignored: np.ndarray
    labels: np.ndarray


def in_areas(xyxy: np.ndarray) -> np.ndarray:
    """Bool (areas, n): which boxes (n, 4) belong to which of AREAS; one of exactly 32 x 32 is small and medium."""
    boxes = np.asarray(xyxy, np.float64)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return np.array([(low <= area) & (area <= high) for low, high in AREAS.values()])


def map_by_size(
    detections: np.ndarray, image: np.ndarray, truth: np.ndarray, truth_image: np.ndarray
) -> dict[str, float]:
    """mAP50-95 by AREAS' names, the mean over the classes that have labels of that size; NaN without any label.

    A label of another size is ignored: a detection matched to it is neither right nor wrong. Nor is a detection
    without a label whose own box is of another size.

    Args:
        detections: (n, 6) of xyxy, confidence, class; of equal confidences the first counts as the higher.
        image: (n,) which image each belongs to.
        truth: (t, 5) of class, xyxy in the same pixels.
        truth_image: (t,)
    """
    scores = []
    for class_index in np.unique(truth[:, 0]):
        found, labels = detections[:, 5] == class_index, truth[:, 0] == class_index
        judged = _judge_class(detections[found, :5], image[found], truth[labels, 1:], truth_image[labels])
        scores.append(_average_precision(judged))
    table = np.array(scores).reshape(-1, len(AREAS))
    return {name: _mean(column) for name, column in zip(AREAS, table.T)}


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def _judge_class(found: np.ndarray, image: np.ndarray, labels: np.ndarray, label_image: np.ndarray) -> _Judged:
    """Detections (n, 5) of xyxy and confidence and labels (t, 4), all of one class."""
    confidence, right, ignored = [], [], []
    for number in np.unique(np.concatenate((image, label_image))):
        rows = np.flatnonzero(image == number)
        rows = rows[np.argsort(-found[rows, 4], kind="stable")][:MAX_DETECTIONS]
        here = labels[label_image == number]
        matched, of_other_size = _match(found[rows, :4], here)
        outside = ~in_areas(found[rows, :4])[:, None]
        confidence.append(found[rows, 4])
        right.append(matched & ~of_other_size)
        ignored.append(of_other_size | ~matched & outside)
    return _Judged(
        np.concatenate(confidence), np.concatenate(right, 2), np.concatenate(ignored, 2), in_areas(labels).sum(1)
    )


def _match(boxes: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of detections (n, 4), most confident first: which get a label, and which get one of another size.

    Both are bool (areas, thresholds, n). A detection takes the free label it overlaps most, of the right size if any
    reaches the threshold, else of another.
    """
    thresholds = np.array(IOU_THRESHOLDS)[:, None]
    wanted = in_areas(labels)[:, None]  # (areas, 1, t)
    free = np.ones((len(AREAS), len(thresholds), len(labels)), bool)
    matched = np.zeros((len(AREAS), len(thresholds), len(boxes)), bool)
    of_other_size = matched.copy()
    iou = _iou(boxes, labels)
    for row in np.flatnonzero((iou >= thresholds.min()).any(1)):
        possible = free & (iou[row] >= thresholds)
        right_size = possible & wanted
        some = right_size.any(2, keepdims=True)
        choice = np.where(np.where(some, right_size, possible), iou[row], -1.0)
        best = choice.shape[2] - 1 - choice[..., ::-1].argmax(2)[..., None]  # of equal overlaps the last label
        taken = np.take_along_axis(possible, best, 2)
        matched[..., row] = taken[..., 0]
        of_other_size[..., row] = (taken & ~some)[..., 0]
        np.put_along_axis(free, best, np.take_along_axis(free, best, 2) & ~taken, 2)
    return matched, of_other_size


def _iou(boxes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(n, t) in double precision, with widths and heights taken first, as pycocotools does it."""
    a, b = (np.asarray(rows, np.float64) for rows in (boxes, labels))
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.maximum(high - low, 0).prod(2)
    area_a, area_b = (np.maximum(rows[:, 2:] - rows[:, :2], 0).prod(1) for rows in (a, b))
    return shared / np.maximum(area_a[:, None] + area_b[None] - shared, TINY)


def _average_precision(judged: _Judged) -> np.ndarray:
    """Mean over the thresholds by area (areas,): precision at 101 recalls, each the best at that recall or above."""
    order = np.argsort(-judged.confidence, kind="stable")
    right, counts = judged.right[..., order], ~judged.ignored[..., order]
    hits = np.cumsum(right, 2, dtype=float)
    alarms = np.cumsum(counts & ~right, 2, dtype=float)
    precision = np.maximum.accumulate((hits / (hits + alarms + TINY))[..., ::-1], 2)[..., ::-1]
    result = np.full(len(AREAS), math.nan)
    for area, labels in enumerate(judged.labels):
        if not labels:
            continue
        at_recalls = np.zeros((len(IOU_THRESHOLDS), len(RECALLS)))
        for row, recall, values in zip(at_recalls, hits[area] / labels, precision[area]):
            places = np.searchsorted(recall, RECALLS)
            reached = places < len(recall)
            row[reached] = values[places[reached]]
        result[area] = at_recalls.mean()
    return result
