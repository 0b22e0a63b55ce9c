"""Judging detections: matching with labels, average precision, confusion matrix, fitness. No drawing here.

The numbers are YOLOv5's on purpose, so that results compare with published ones. Where its rules are unusual the
docstring says so; the one rule we changed is in `ConfusionMatrix`. `bbox_iou`, `ap_per_class` and `process_batch` have
YOLOv5's arguments and results, for other people's code.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.boxes import IouKind, box_iou, paired_iou

IOU_THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
CURVE_POINTS = 1_000  # confidences (or recalls) in 0..1 at which curves are given
SMOOTHING = 0.1  # width of the box filter over the F1 curve, as a fraction of the curve
TINY = 1e-16


def fitness(x: np.ndarray) -> np.ndarray:
    """The number (n,) by which epochs are ranked: a tenth mAP at IoU 0.5, nine tenths mAP over 0.5..0.95.

    `x` (n, 4+) holds precision, recall, mAP50, mAP50-95 and whatever follows.
    """
    return (x[:, :4] * (0.0, 0.0, 0.1, 0.9)).sum(1)


# ------------------------------------------------------------------------------------------------------------ matching


def match(detections: Tensor, truth: Tensor, thresholds: Sequence[float] | Tensor = IOU_THRESHOLDS) -> Tensor:
    """Which detections of an image are right, bool (k, thresholds).

    At each threshold on its own: a detection claims the one label of its class it overlaps most, if their IoU
    reaches the threshold; a label goes to the first detection that claims it. COCO's rule differs in both: there a
    detection whose best label is taken may get its second best, and labels are handed out detection by detection.

    Args:
        detections: (k, 6+) of x1, y1, x2, y2, confidence, class, most confident first, as NMS returns them.
        truth: (n, 5) of class, x1, y1, x2, y2 in the same pixels.
        thresholds: IoUs. As a tensor on the detections' device it costs no transfer.
    """
    thresholds = torch.as_tensor(thresholds, dtype=torch.float32, device=detections.device)
    count, num_labels = len(detections), len(truth)
    if count == 0 or num_labels == 0:
        return torch.zeros(count, len(thresholds), dtype=torch.bool, device=detections.device)
    iou = box_iou(detections[:, :4], truth[:, 1:])
    best_iou, best_label = torch.where(detections[:, 5:6] == truth[:, 0], iou, -1).max(1)
    claims = best_iou[:, None] >= thresholds  # (k, thresholds)
    return claims & _first_claims(claims, best_label, num_labels)


def _first_claims(claims: Tensor, label: Tensor, num_labels: int) -> Tensor:
    """Bool (k, t): no earlier row claims the same label in that column. `label` (k,) is what each row may claim."""
    count, columns = claims.shape
    row = torch.arange(count, device=claims.device)[:, None]
    label_of = label[:, None].expand(count, columns)
    first = torch.full((num_labels, columns), count, device=claims.device)
    first.scatter_reduce_(0, label_of, torch.where(claims, row, count), "amin")
    return first.gather(0, label_of) == row


# --------------------------------------------------------------------------------------------------- average precision


@dataclass(frozen=True)
class APResult:
    """Precision, recall and average precision of the classes that have labels (c of them).

    `precision`, `recall`, `f1`, `true_positives` and `false_positives` (c,) are at IoU 0.5 and at the single confidence
    `confidence` where the smoothed F1, averaged over classes, is highest. Curves (c, 1000) are at IoU 0.5: precision,
    recall and F1 over the confidences `px`, and `pr_curve`, precision over recalls `px`.
    """

    classes: np.ndarray  # (c,) int, ascending
    instances: np.ndarray  # (c,) int, labels per class
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    true_positives: np.ndarray
    false_positives: np.ndarray
    ap: np.ndarray  # (c, thresholds)
    confidence: float
    px: np.ndarray  # (1000,)
    precision_curve: np.ndarray
    recall_curve: np.ndarray
    f1_curve: np.ndarray
    pr_curve: np.ndarray

    @property
    def ap50(self) -> np.ndarray:
        """Average precision at the first threshold, IoU 0.5, per class (c,)."""
        return self.ap[:, 0]

    @property
    def ap50_95(self) -> np.ndarray:
        """Average precision averaged over the thresholds, per class (c,)."""
        return self.ap.mean(1)

    @property
    def mean_precision(self) -> float:
        return _mean(self.precision)

    @property
    def mean_recall(self) -> float:
        return _mean(self.recall)

    @property
    def map50(self) -> float:
        return _mean(self.ap50)

    @property
    def map(self) -> float:
        """mAP over the thresholds, 0.5 to 0.95."""
        return _mean(self.ap50_95)

    @property
    def fitness(self) -> float:
        return float(fitness(np.array([(self.mean_precision, self.mean_recall, self.map50, self.map)]))[0])

    def maps(self, num_classes: int) -> np.ndarray:
        """`ap50_95` by class index (num_classes,); classes without labels get the mean."""
        result = np.full(num_classes, self.map)
        result[self.classes] = self.ap50_95
        return result


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else 0.0


class AveragePrecision:
    """Collects images with `update`, then `compute` gives precision, recall and average precision of all of them."""

    def __init__(self, num_classes: int, thresholds: int = len(IOU_THRESHOLDS)) -> None:
        self.num_classes = num_classes
        self._correct: list[np.ndarray] = [np.zeros((0, thresholds), bool)]
        self._confidence: list[np.ndarray] = [np.zeros(0, np.float32)]
        self._predicted: list[np.ndarray] = [np.zeros(0, np.int64)]
        self._labels: list[np.ndarray] = [np.zeros(0, np.int64)]

    def update(
        self,
        correct: Tensor | np.ndarray,
        confidence: Tensor | np.ndarray,
        predicted_class: Tensor | np.ndarray,
        target_class: Tensor | np.ndarray,
    ) -> None:
        """Add images: `match`'s result (k, thresholds), confidences (k,), classes (k,), classes of labels (n,).

        Tensors on an accelerator are fetched, which waits for it: hand over what is on the CPU already.
        """
        self._correct.append(_numpy(correct))
        self._confidence.append(_numpy(confidence))
        self._predicted.append(_numpy(predicted_class).astype(np.int64))
        self._labels.append(_numpy(target_class).astype(np.int64))

    def average_precision(self) -> np.ndarray:
        """What `compute` gives as `ap` (classes, thresholds), without the curves that take most of its time."""
        return _area(self._ranked()[1])

    def _ranked(self) -> tuple[np.ndarray, _Ranked]:
        """The classes that have labels (c,), and their detections."""
        correct, confidence = np.concatenate(self._correct), np.concatenate(self._confidence).astype(np.float64)
        predicted = np.concatenate(self._predicted)
        all_instances = np.bincount(np.concatenate(self._labels), minlength=max(self.num_classes, 1))
        classes = np.flatnonzero(all_instances)

        # rank of a class among those with labels; detections of other classes count for nothing
        rank_of = np.full(len(all_instances), -1)
        rank_of[classes] = np.arange(len(classes))
        group = np.where(predicted < len(rank_of), rank_of[np.minimum(predicted, len(rank_of) - 1)], -1)
        order = np.lexsort((-confidence, group))
        order = order[np.searchsorted(group[order], 0) :]  # without the -1
        return classes, _Ranked(correct[order], confidence[order], group[order], all_instances[classes])

    def compute(self) -> APResult:
        """The result over everything so far; all zeros or empty where there is nothing to count."""
        classes, ranked = self._ranked()
        instances = ranked.instances
        px = np.linspace(0, 1, CURVE_POINTS)
        precision_curve, recall_curve = _confidence_curves(ranked, px)
        f1_curve = 2 * precision_curve * recall_curve / (precision_curve + recall_curve + TINY)
        best = _smooth(f1_curve.mean(0), SMOOTHING).argmax() if len(classes) else 0
        precision, recall = precision_curve[:, best], recall_curve[:, best]
        true_positives = (recall * instances).round()
        return APResult(
            classes=classes,
            instances=instances,
            precision=precision,
            recall=recall,
            f1=f1_curve[:, best],
            true_positives=true_positives.astype(np.int64),
            false_positives=(true_positives / (precision + TINY) - true_positives).round().astype(np.int64),
            ap=_area(ranked),
            confidence=float(px[best]),
            px=px,
            precision_curve=precision_curve,
            recall_curve=recall_curve,
            f1_curve=f1_curve,
            pr_curve=_precision_at(ranked, px, thresholds=1)[:, 0],
        )


def _numpy(values: Tensor | np.ndarray) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


@dataclass(frozen=True)
class _Ranked:
    """Detections sorted by class, then by confidence, best first."""

    correct: np.ndarray  # (k, thresholds) bool
    confidence: np.ndarray  # (k,)
    group: np.ndarray  # (k,) which of the c classes that have labels
    instances: np.ndarray  # (c,) labels per class

    @property
    def sizes(self) -> np.ndarray:
        """Detections per class (c,)."""
        return np.bincount(self.group, minlength=len(self.instances))

    @property
    def starts(self) -> np.ndarray:
        """Where each class begins (c,)."""
        return self.sizes.cumsum() - self.sizes


def _confidence_curves(ranked: _Ranked, px: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall (c, points) at the first threshold if only detections of confidence >= px count.

    Linear between the confidences of two neighbouring detections; above the best one precision is 1 and recall 0;
    zero for a class without detections.
    """
    starts, sizes, num_classes = ranked.starts, ranked.sizes, len(ranked.instances)
    if not len(ranked.group):
        return np.zeros((num_classes, len(px))), np.zeros((num_classes, len(px)))
    total = np.concatenate(([0], ranked.correct[:, 0].cumsum()))
    found = total[1:] - total[starts[ranked.group]]  # true positives up to each detection, in its class
    position = np.arange(len(ranked.group)) - starts[ranked.group]
    recall = found / (ranked.instances[ranked.group] + TINY)
    precision = found / (position + 1)

    # how many detections of each class reach each confidence: a histogram over the points, summed from the right
    reached = np.searchsorted(px, ranked.confidence, side="right")
    histogram = np.bincount(ranked.group * (len(px) + 1) + reached, minlength=num_classes * (len(px) + 1))
    count = histogram.reshape(num_classes, -1)[:, :0:-1].cumsum(1)[:, ::-1]  # (c, points)

    left = (starts[:, None] + count - 1).clip(0, len(ranked.group) - 1)  # the last detection that reaches the point
    inside = (count > 0) & (count < sizes[:, None])
    right = np.where(inside, left + 1, left).clip(0, len(ranked.group) - 1)
    step = ranked.confidence[left] - ranked.confidence[right]
    share = np.divide(ranked.confidence[left] - px, step, out=np.zeros_like(step), where=inside & (step > 0))
    curves = []
    for values, above in ((precision, 1.0), (recall, 0.0)):
        curve = np.where(count > 0, values[left] + share * (values[right] - values[left]), above)
        curves.append(np.where(sizes[:, None] > 0, curve, 0.0))
    return curves[0], curves[1]


def _precision_at(ranked: _Ranked, recalls: np.ndarray, thresholds: int | None = None) -> np.ndarray:
    """Interpolated precision (c, thresholds, points) at the given recalls.

    Up to the highest recall that was reached: the best precision at any higher recall. From there a straight line
    down to precision 0 at recall 1, where COCO has 0 at once; and 0 at recall 1 itself, so that perfect detections
    reach 0.995, not 1, with 101 points. Both are YOLOv5's.

    The curve only steps at true positives, of which there are at most as many as labels, so nothing here is as long
    as the list of detections but one search for them.
    """
    correct = ranked.correct[:, :thresholds]
    num_classes, num_thresholds, num_points = len(ranked.instances), correct.shape[1], len(recalls)
    column, index = correct.T.nonzero()  # by threshold, then class, then confidence
    group = ranked.group[index]
    curve_of = column * num_classes + group
    found = np.bincount(curve_of, minlength=num_thresholds * num_classes)  # true positives per curve
    first = found.cumsum() - found
    precision = (np.arange(len(index)) - first[curve_of] + 1) / (index - ranked.starts[group] + 1)
    # Largest precision from here to the end of the curve. Adding 2 per curve lets a single pass from the right
    # start anew at each: later curves, visited first, have the smaller offsets.
    offset = 2.0 * (len(found) - curve_of)
    envelope = np.maximum.accumulate((precision + offset)[::-1])[::-1] - offset
    envelope = np.append(envelope, 0.0)

    found, first = found.reshape(num_thresholds, -1, 1), first.reshape(num_thresholds, -1, 1)  # (t, c, 1)
    passed = _positives_within(recalls, ranked.instances)  # (c, points)
    plateau = envelope[np.where(passed < found, first + passed, len(index))]
    reached = found / ranked.instances[:, None]
    last = found / np.maximum(ranked.sizes, 1)[:, None]  # precision of all detections together
    slope = np.divide(-last, 1 - reached, out=np.zeros_like(last), where=reached < 1)
    tail = np.where(reached < 1, last + slope * (recalls - reached), 0.0)
    result = np.where(passed < found, plateau, tail)
    return result.reshape(num_thresholds, num_classes, num_points).swapaxes(0, 1)


def _area(ranked: _Ranked) -> np.ndarray:
    """Average precision (c, thresholds): the area under the interpolated curve, at COCO's 101 recalls."""
    recalls = np.linspace(0, 1, 101)
    return _trapezoid(_precision_at(ranked, recalls), recalls)


def _positives_within(recalls: np.ndarray, instances: np.ndarray) -> np.ndarray:
    """How many true positives (c, points) have a recall i / instances <= the given one, i counted from 1; exact."""
    count = np.floor(recalls * instances[:, None])
    # the product may round across a whole number, the quotient is what the definition compares
    count += (count + 1) / instances[:, None] <= recalls
    count -= count / instances[:, None] > recalls
    return count.astype(np.int64)


def _trapezoid(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Area under `values` (..., points) by the trapezoid rule; NumPy renamed its own between 1 and 2."""
    return ((values[..., 1:] + values[..., :-1]) * np.diff(x) / 2).sum(-1)


def _smooth(values: np.ndarray, fraction: float) -> np.ndarray:
    """Running mean (n,) over an odd window of about `fraction` of the values, the ends continued by the edge values."""
    window = round(len(values) * fraction * 2) // 2 + 1
    padded = np.pad(values, window // 2, mode="edge")
    return np.convolve(padded, np.ones(window) / window, mode="valid")


# ---------------------------------------------------------------------------------------------------- confusion matrix


class ConfusionMatrix:
    """Counts `matrix` (nc + 1, nc + 1) of [predicted, true] class; the last of each is background.

    Detections above `conf` and labels are paired whatever their class where their IoU is above `iou_thres`: each
    detection with the label it overlaps most, each label with the one among those that overlaps it most. A label
    left over counts as [background, true], a detection left over as [predicted, background].

    Differs from YOLOv5 in the last point: there, false positives count only on images where something matched, and
    images without labels are never looked at, so its background column is too small.
    """

    def __init__(self, nc: int, conf: float = 0.25, iou_thres: float = 0.45) -> None:
        self.nc, self.conf, self.iou_thres = nc, conf, iou_thres
        self.matrix = np.zeros((nc + 1, nc + 1), np.int64)

    def update(self, detections: Tensor, truth: Tensor) -> None:
        """Add an image: detections (k, 6+) of xyxy, confidence, class; labels (n, 5) of class, xyxy; same pixels."""
        detections, truth = detections.detach().cpu(), truth.detach().cpu()
        detections = detections[detections[:, 4] > self.conf]
        predicted, true = detections[:, 5].long(), truth[:, 0].long()
        background = torch.tensor(self.nc)
        detection_of, label_of = self._pairs(detections, truth)
        free_detection, free_label = torch.ones_like(predicted, dtype=torch.bool), torch.ones_like(true).bool()
        free_detection[detection_of], free_label[label_of] = False, False
        missed, invented = true[free_label], predicted[free_detection]
        rows = torch.cat((predicted[detection_of], background.expand(len(missed)), invented))
        columns = torch.cat((true[label_of], missed, background.expand(len(invented))))
        np.add.at(self.matrix, (rows.numpy(), columns.numpy()), 1)

    def _pairs(self, detections: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of detections and of the labels they are paired with."""
        if not len(detections) or not len(truth):
            return torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
        best_iou, best_label = box_iou(detections[:, :4], truth[:, 1:]).max(1)
        order = best_iou.argsort(descending=True, stable=True)
        claims = (best_iou[order] > self.iou_thres)[:, None]
        chosen = order[(claims & _first_claims(claims, best_label[order], len(truth)))[:, 0]]
        return chosen, best_label[chosen]

    def process_batch(self, detections: Tensor | None, labels: Tensor) -> None:
        """`update` under YOLOv5's name; None stands for an image without detections."""
        self.update(labels.new_zeros(0, 6) if detections is None else detections, labels)

    def tp_fp(self) -> tuple[np.ndarray, np.ndarray]:
        """True and false positives per class, two (nc,)."""
        right = self.matrix.diagonal()
        return right[:-1], (self.matrix.sum(1) - right)[:-1]

    def plot(
        self, normalize: bool = True, save_dir: str | Path = "", names: Mapping[int, str] | Sequence[str] = ()
    ) -> None:
        """Write `confusion_matrix.png` into `save_dir`; columns add up to 1 in it whatever `normalize` says."""
        __getattr__("plot_confusion")(self.matrix, _numbered(names, self.nc), Path(save_dir) / "confusion_matrix.png")


# ------------------------------------------------------------------------------------------- for other people's code

FORWARDED = {"plot_confusion": "utils.plots", "plot_curves": "utils.plots"}


def __getattr__(name: str) -> Any:
    """A name from a room to the right, loaded when the name is first used."""
    if name in FORWARDED:
        return getattr(importlib.import_module(FORWARDED[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def bbox_iou(
    box1: Tensor,
    box2: Tensor,
    xywh: bool = True,
    GIoU: bool = False,
    DIoU: bool = False,
    CIoU: bool = False,
    eps: float = 1e-7,
) -> Tensor:
    """IoU (n, 1) of boxes `box1` (1, 4) or (n, 4) with `box2` (n, 4); centre and size, or corners without `xywh`."""
    kind: IouKind = "ciou" if CIoU else "diou" if DIoU else "giou" if GIoU else "iou"
    return paired_iou(box1, box2, kind, "cxcywh" if xywh else "xyxy", eps)[..., None]


def ap_per_class(
    tp: np.ndarray,
    conf: np.ndarray,
    pred_cls: np.ndarray,
    target_cls: np.ndarray,
    plot: bool = False,
    save_dir: str | Path = ".",
    names: Mapping[int, str] | Sequence[str] = (),
    eps: float = TINY,
    prefix: str = "",
) -> tuple[np.ndarray, ...]:
    """Counts and averages of the c classes that have labels.

    Args:
        tp: (k, thresholds) bool, which detections are right.
        conf, pred_cls: (k,) their confidences and classes.
        target_cls: (n,) classes of all labels.
        plot: write the four curves into `save_dir`, their file names beginning with `prefix`.
        eps: has no effect: it keeps the place of YOLOv5's argument, whose default is what divisions use here.

    Returns:
        True positives, false positives, precision, recall, F1 (c,), average precision (c, thresholds), classes (c,).
    """
    num_classes = int(max([-1.0, *np.asarray(target_cls).reshape(-1), *np.asarray(pred_cls).reshape(-1)])) + 1
    average = AveragePrecision(num_classes, tp.shape[1])
    average.update(np.asarray(tp, bool), conf, pred_cls, target_cls)
    result = average.compute()
    if plot:
        __getattr__("plot_curves")(result, _numbered(names, num_classes), Path(save_dir), prefix=prefix)
    counts = result.true_positives, result.false_positives
    return (*counts, result.precision, result.recall, result.f1, result.ap, result.classes)


def _numbered(names: Mapping[int, str] | Sequence[str], count: int) -> dict[int, str]:
    """Class names by number; a class without one is called by its number."""
    known = dict(names) if isinstance(names, Mapping) else dict(enumerate(names))
    return {index: str(known.get(index, index)) for index in range(count)}
