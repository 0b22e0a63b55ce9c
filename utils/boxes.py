"""Boxes: formats, clipping, the IoU family, and the way into letterbox space and back.

Formats are named as everywhere here: `xyxy` corners, `cxcywh` centre and size, a trailing `n` for fractions of the
image. Every function returns a new array and leaves its argument alone. Conversions take NumPy arrays and torch
tensors alike and hand further columns (class, confidence, mask coefficients) through untouched; whole numbers come
back as floats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

Boxes = TypeVar("Boxes", np.ndarray, Tensor)

IouKind = Literal["iou", "giou", "diou", "ciou"]


@dataclass(frozen=True)
class Letterbox:
    """How an image was fitted into a padded canvas: `canvas = image * scale + pad`.

    `scale` is one number for both axes; `pad_xy` is the padding left and top in pixels, half of the total, so it
    may end in .5; `original_hw` and `size_hw` are the image's and the canvas's height and width.
    """

    scale: float
    pad_xy: tuple[float, float]
    original_hw: tuple[int, int]
    size_hw: tuple[int, int]


def _join(parts: Sequence[Boxes], rest: Boxes) -> Boxes:
    """Four columns of shape (...,), then the columns of `rest` (..., k), as one array (..., 4 + k)."""
    if isinstance(rest, Tensor):
        return torch.cat((torch.stack(tuple(parts), -1), rest), -1)
    return np.concatenate((np.stack(parts, -1), rest), -1)


def _columns(boxes: Boxes) -> tuple[Boxes, Boxes, Boxes, Boxes, Boxes]:
    """The four coordinate columns (...,) and whatever follows them (..., k)."""
    return boxes[..., 0], boxes[..., 1], boxes[..., 2], boxes[..., 3], boxes[..., 4:]


def cxcywh_to_xyxy(boxes: Boxes) -> Boxes:
    """Corners of boxes (..., 4+) given by centre and size, in the same unit."""
    cx, cy, width, height, rest = _columns(boxes)
    half_width, half_height = width / 2, height / 2
    return _join((cx - half_width, cy - half_height, cx + half_width, cy + half_height), rest)


def xyxy_to_cxcywh(boxes: Boxes) -> Boxes:
    """Centre and size of boxes (..., 4+) given by corners, in the same unit."""
    x1, y1, x2, y2, rest = _columns(boxes)
    return _join(((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1), rest)


def cxcywhn_to_xyxy(boxes: Boxes, width: float, height: float, pad_x: float = 0.0, pad_y: float = 0.0) -> Boxes:
    """Corners in pixels of boxes (..., 4+) given as fractions of a `width` x `height` image at (pad_x, pad_y)."""
    # float(): a NumPy float64 scalar would turn float32 boxes into float64
    width, height, pad_x, pad_y = float(width), float(height), float(pad_x), float(pad_y)
    x1, y1, x2, y2, rest = _columns(cxcywh_to_xyxy(boxes))
    return _join((x1 * width + pad_x, y1 * height + pad_y, x2 * width + pad_x, y2 * height + pad_y), rest)


def xyxy_to_cxcywhn(boxes: Boxes, width: float, height: float, *, clip: bool = False, eps: float = 0.0) -> Boxes:
    """Centre and size as fractions of a `width` x `height` image, of boxes (..., 4+) given by corners in its pixels.

    With `clip`, corners are first moved into the image, `eps` pixels away from its right and bottom edge.
    """
    width, height = float(width), float(height)
    if clip:
        boxes = clip_xyxy(boxes, (height - eps, width - eps))
    cx, cy, box_width, box_height, rest = _columns(xyxy_to_cxcywh(boxes))
    return _join((cx / width, cy / height, box_width / width, box_height / height), rest)


def clip_xyxy(boxes: Boxes, shape_hw: tuple[float, float]) -> Boxes:
    """Boxes (..., 4+) in pixels with every corner moved into an image of height and width `shape_hw`."""
    height, width = float(shape_hw[0]), float(shape_hw[1])
    x1, y1, x2, y2, rest = _columns(boxes)
    limits = (width, height, width, height)
    return _join([column.clip(0, limit) for column, limit in zip((x1, y1, x2, y2), limits, strict=True)], rest)


def undo_letterbox(boxes: Boxes, letterbox: Letterbox) -> Boxes:
    """Boxes (..., 4+) as corners in pixels of the letterboxed canvas, moved to the original image and clipped to it."""
    (pad_x, pad_y), scale = letterbox.pad_xy, letterbox.scale
    x1, y1, x2, y2, rest = _columns(boxes)
    moved = _join(((x1 - pad_x) / scale, (y1 - pad_y) / scale, (x2 - pad_x) / scale, (y2 - pad_y) / scale), rest)
    return clip_xyxy(moved, letterbox.original_hw)


def box_iou(a: Tensor, b: Tensor, eps: float = 1e-7) -> Tensor:
    """IoU (N, M) of every box of `a` (N, 4) with every box of `b` (M, 4), corners in the same unit; 0/0 counts as 0."""
    top_left = torch.maximum(a[:, None, :2], b[None, :, :2])
    bottom_right = torch.minimum(a[:, None, 2:4], b[None, :, 2:4])
    intersection = (bottom_right - top_left).clamp(min=0).prod(2)
    area_a = (a[:, 2:4] - a[:, :2]).prod(1)
    area_b = (b[:, 2:4] - b[:, :2]).prod(1)
    return intersection / (area_a[:, None] + area_b[None] - intersection + eps)


def paired_iou(
    a: Tensor,
    b: Tensor,
    kind: IouKind = "ciou",
    fmt: Literal["cxcywh", "xyxy"] = "cxcywh",
    eps: float = 1e-7,
) -> Tensor:
    """IoU (...,) of each box of `a` (..., 4) with the box of `b` (..., 4) at the same place; differentiable.

    `giou` subtracts the part of the enclosing box that is in neither (Rezatofighi et al. 2019), `diou` the squared
    distance of the centres over the squared diagonal of the enclosing box, `ciou` further `alpha * v` for different
    aspect ratios, v = 4/pi^2 (atan w/h - atan w'/h')^2, alpha = v / (1 - IoU + v) held constant in backward (Zheng
    et al. 2020, eq. 7, 10, 11). `eps` keeps every quotient finite for empty boxes.
    """
    if fmt == "cxcywh":
        (wh_a, wh_b), (a, b) = (a[..., 2:4], b[..., 2:4]), (cxcywh_to_xyxy(a[..., :4]), cxcywh_to_xyxy(b[..., :4]))
    else:
        wh_a, wh_b = a[..., 2:4] - a[..., :2], b[..., 2:4] - b[..., :2]
    (top_left_a, bottom_right_a), (top_left_b, bottom_right_b) = a[..., :4].split(2, -1), b[..., :4].split(2, -1)

    overlap = torch.minimum(bottom_right_a, bottom_right_b) - torch.maximum(top_left_a, top_left_b)
    intersection = overlap.clamp(min=0).prod(-1)
    union = wh_a.prod(-1) + wh_b.prod(-1) - intersection + eps
    iou = intersection / union
    if kind == "iou":
        return iou

    enclosing = torch.maximum(bottom_right_a, bottom_right_b) - torch.minimum(top_left_a, top_left_b)
    if kind == "giou":
        enclosing_area = enclosing.prod(-1) + eps
        return iou - (enclosing_area - union) / enclosing_area
    # the four-corner sum is twice the vector between the centres
    centre_distance = (top_left_b + bottom_right_b - top_left_a - bottom_right_a).square().sum(-1) / 4
    diou = iou - centre_distance / (enclosing.square().sum(-1) + eps)
    if kind == "diou":
        return diou
    v = (4 / math.pi**2) * (_aspect_angle(wh_b, eps) - _aspect_angle(wh_a, eps)).square()
    with torch.no_grad():
        alpha = v / (1 - iou + v + eps)
    return diou - alpha * v


def _aspect_angle(wh: Tensor, eps: float) -> Tensor:
    """atan(w / h); by atan2 and with h at least `eps`, so that the gradient stays finite for a collapsed box."""
    return torch.atan2(wh[..., 0], wh[..., 1].clamp(min=eps))
