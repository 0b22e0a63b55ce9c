"""Non-maximum suppression: from a network's predictions to at most a few hundred detections per image."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils.boxes import cxcywh_to_xyxy
from utils.config import UserError

MAX_CANDIDATES = 30_000  # per image and before suppression, the best first
# Boxes of different classes are moved apart by this many pixels, so that one pass suppresses within classes only.
# Part of the numbers we reproduce: at class 79 the shift rounds float32 coordinates to 1/16 pixel before their IoU
# is taken.
CLASS_OFFSET = 7_680
# The first candidates often hold `max_det` survivors already, and no later one can change those: `FIRST_ROUND`
# candidates are tried before four times as many, and so on. On a CPU torchvision compares every pair, so above
# `GROUPING_FROM` candidates are cut between classes into groups of about `GROUP_SIZE`.
FIRST_ROUND = 1_024
GROUPING_FROM = 1_024
GROUP_SIZE = 512


@functools.cache
def _operator() -> Callable[[Tensor, Tensor, float], Tensor]:
    """torchvision's compiled `nms`: boxes (N, 4) xyxy, scores (N,), threshold -> indices kept, best first.

    Importing the package as well would load torch's compiler for operators we never compile, which takes longer than
    detecting on dozens of images; where the library is not found under its usual name the package is imported.
    """
    spec = importlib.util.find_spec("torchvision")
    folder = Path(spec.origin).parent if spec is not None and spec.origin else Path()
    for library in folder.glob("_C*.so"):
        torch.ops.load_library(str(library))
    if not hasattr(torch.ops.torchvision, "nms"):
        importlib.import_module("torchvision")
    return torch.ops.torchvision.nms


def non_max_suppression(
    prediction: Tensor | Sequence[Tensor],
    conf_thres: float = 0.25,
    iou_thres: float = 0.45,
    *,
    classes: Sequence[int] | None = None,
    agnostic: bool = False,
    multi_label: bool = False,
    labels: Sequence[Tensor] = (),
    max_det: int = 300,
    num_masks: int = 0,
) -> list[Tensor]:
    """Detections per image, float32 (k, 6 + num_masks): x1, y1, x2, y2, confidence, class, mask coefficients.

    Sorted by confidence, best first, in pixels of the network's input. There is no time limit: the same predictions
    give the same detections on the busiest machine.

    Args:
        prediction: (B, N, 5 + classes + num_masks) of cx, cy, w, h in pixels, objectness, class probabilities, mask
            coefficients; or the network's whole eval output, of which the first element is taken. Not modified.
        conf_thres: kept are objectness, and objectness times class probability, strictly above it.
        iou_thres: of two boxes of a class with a larger IoU, only the more confident one stays.
        classes: keep these classes only.
        agnostic: suppress across classes.
        multi_label: a box counts once for every class above the threshold, not only for its best one.
        labels: per image (n, 5) of class, cx, cy, w, h in pixels, which join the candidates with confidence 1.
        max_det: at most this many detections per image.
        num_masks: number of mask coefficients at the end of each row.

    Raises:
        UserError: a threshold outside 0..1.
    """
    for name, value in (("confidence", conf_thres), ("IoU", iou_thres)):
        if not 0 <= value <= 1:
            raise UserError(f"the {name} threshold must be within 0..1, found {value}.")
    if not isinstance(prediction, Tensor):
        prediction = prediction[0]
    batch_size, _, width = prediction.shape
    num_classes = width - 5 - num_masks

    image_index, row_index = (prediction[..., 4] > conf_thres).nonzero(as_tuple=True)  # sync 1
    rows = prediction[image_index, row_index].float()
    if len(labels):
        image_index, rows = _append_labels(image_index, rows, labels, num_classes)
    image_index, detections = _score(image_index, rows, conf_thres, num_classes, classes, multi_label)
    counts = torch.bincount(image_index, minlength=batch_size).tolist()  # sync 3
    offset = 0 if agnostic else CLASS_OFFSET
    return [_suppress(candidates, iou_thres, offset, max_det) for candidates in detections.split(counts)]


def _append_labels(
    image_index: Tensor, rows: Tensor, labels: Sequence[Tensor], num_classes: int
) -> tuple[Tensor, Tensor]:
    """The candidates with every image's labels behind its own, as rows of objectness 1 and class probability 1."""
    label_images = torch.cat([torch.full((len(label),), index) for index, label in enumerate(labels)])
    label = torch.cat([label.reshape(-1, 5) for label in labels]).to(rows)
    added = torch.zeros(len(label), rows.shape[1], device=rows.device)
    added[:, :4], added[:, 4] = label[:, 1:5], 1
    added[:, 5 : 5 + num_classes].scatter_(1, label[:, :1].long(), 1)
    image_index, order = torch.cat((image_index, label_images.to(rows.device))).sort(stable=True)
    return image_index, torch.cat((rows, added))[order]


def _score(
    image_index: Tensor,
    rows: Tensor,
    conf_thres: float,
    num_classes: int,
    classes: Sequence[int] | None,
    multi_label: bool,
) -> tuple[Tensor, Tensor]:
    """Image index (n,) and candidate detections (n, 6 + masks) whose score passes, still grouped by image."""
    scores = rows[:, 5 : 5 + num_classes] * rows[:, 4:5]
    wanted = None
    if classes is not None:
        wanted = torch.zeros(num_classes, dtype=torch.bool)
        wanted[[index for index in classes if 0 <= index < num_classes]] = True
        wanted = wanted.to(rows.device)
    if multi_label and num_classes > 1:
        passing = scores > conf_thres
        candidate, class_index = (passing if wanted is None else passing & wanted).nonzero(as_tuple=True)  # sync 2
        confidence = scores[candidate, class_index]
    else:
        confidence, class_index = scores.max(1)
        passing = confidence > conf_thres
        (candidate,) = (passing if wanted is None else passing & wanted[class_index]).nonzero(as_tuple=True)  # sync 2
        confidence, class_index = confidence[candidate], class_index[candidate]
    xyxy = cxcywh_to_xyxy(rows[:, :4])[candidate]
    columns = (xyxy, confidence[:, None], class_index[:, None].float(), rows[candidate, 5 + num_classes :])
    return image_index[candidate], torch.cat(columns, 1)


def _suppress(candidates: Tensor, iou_thres: float, offset: int, max_det: int) -> Tensor:
    """The survivors (at most `max_det`) among one image's candidates (n, 6 + masks), best first."""
    # stable: equal scores keep the order of the predictions, on every device
    order = candidates[:, 4].sort(descending=True, stable=True).indices[:MAX_CANDIDATES]
    candidates = candidates[order]
    boxes = candidates[:, :4] + candidates[:, 5:6] * offset
    size = FIRST_ROUND
    while True:
        boxes_now, (scores, class_index) = boxes[:size], candidates[:size, 4:6].unbind(1)
        if offset and boxes.device.type == "cpu" and len(boxes_now) > GROUPING_FROM:
            kept = _nms_in_groups(boxes_now, scores, class_index.long(), iou_thres)
        else:
            kept = _operator()(boxes_now, scores, iou_thres)
        if len(kept) >= max_det or size >= len(boxes):
            return candidates[kept[:max_det]]
        size *= 4


def _nms_in_groups(boxes: Tensor, scores: Tensor, class_index: Tensor, iou_thres: float) -> Tensor:
    """Indices that `nms` keeps of boxes sorted by score and moved apart by class, without comparing between groups."""
    order = class_index.sort(stable=True).indices
    counts = torch.bincount(class_index)
    # classes stay whole: a group takes those that begin within it
    group_of_class = (counts.cumsum(0) - counts) // GROUP_SIZE
    sizes = torch.bincount(group_of_class[class_index]).tolist()
    groups = zip(boxes[order].split(sizes), scores[order].split(sizes), order.split(sizes), strict=True)
    nms = _operator()
    kept = [index[nms(group, score, iou_thres)] for group, score, index in groups]
    return torch.cat(kept).sort().values
