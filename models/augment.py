"""Test-time augmentation: one image seen at three scales, the predictions joined."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

VIEWS = ((1.0, False), (0.83, True), (0.67, False))  # scale, mirrored


def augmented(predict: Callable[[Tensor], Tensor], images: Tensor, stride: int, levels: int) -> Tensor:
    """Predictions (B, N, no), cxcywh in pixels of `images` (B, C, H, W), of all views together.

    `predict` maps images to predictions whose rows are ordered from the finest level to the coarsest; `stride` is the
    coarsest one's. The full-size view leaves out its coarsest level and the smallest view its finest.
    """
    parts = []
    for scale, mirrored in VIEWS:
        y = predict(rescale(images.flip(3) if mirrored else images, scale, stride))
        cx, rest, scores = y[..., :1] / scale, y[..., 1:4] / scale, y[..., 4:]
        parts.append(torch.cat((images.shape[3] - cx if mirrored else cx, rest, scores), 2))
    cells = sum(4**k for k in range(levels))  # all levels' cells, in units of the coarsest level's
    parts[0] = parts[0][:, : -(parts[0].shape[1] // cells)]
    parts[-1] = parts[-1][:, parts[-1].shape[1] // cells * 4 ** (levels - 1) :]
    return torch.cat(parts, 1)


def rescale(images: Tensor, scale: float, multiple: int) -> Tensor:
    """Images resized by `scale`, then filled with grey at the right and bottom up to a multiple of the stride."""
    if scale == 1:
        return images
    h, w = images.shape[2:]
    resized = F.interpolate(images, size=(int(h * scale), int(w * scale)), mode="bilinear", align_corners=False)
    right, bottom = (math.ceil(side * scale / multiple) * multiple - int(side * scale) for side in (w, h))
    return F.pad(resized, (0, right, 0, bottom), value=0.447)  # ImageNet's mean
