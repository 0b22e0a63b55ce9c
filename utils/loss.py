"""YOLOv5's loss: which grid cells answer for which label, and what their answers cost.

On an accelerator nothing here waits for the device: no value is read back, no shape depends on the labels'
contents, and what depends only on the network or the image size is kept on the device between calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.boxes import paired_iou
from utils.config import owned

NEIGHBOUR = 0.5  # of a cell: a label also goes to the neighbours whose side its centre is nearer to
FOCAL_ALPHA = 0.25
# How much objectness weighs per level, finest first: fine levels have most of the cells and nearly all of them empty.
BALANCE = {3: (4.0, 1.0, 0.4)}
BALANCE_OTHERWISE = (4.0, 1.0, 0.25, 0.06, 0.02)
BALANCE_DECAY = 0.9999


@dataclass(frozen=True)
class LossHyp:
    """The loss's hyper-parameters, with the defaults of hyp.scratch-low.yaml and the ranges we accept."""

    box: float = field(default=0.05, metadata={"min": 0.0, "max": 10.0})  # gain of 1 - CIoU
    cls: float = field(default=0.5, metadata={"min": 0.0, "max": 10.0})  # gain of the class loss
    cls_pw: float = field(default=1.0, metadata={"min": 0.0, "max": 100.0})  # weight of positives in it
    obj: float = field(default=1.0, metadata={"min": 0.0, "max": 100.0})  # gain of the objectness loss
    obj_pw: float = field(default=1.0, metadata={"min": 0.0, "max": 100.0})  # weight of positives in it
    anchor_t: float = field(default=4.0, metadata={"min": 1.0, "max": 100.0})  # largest ratio of label to anchor size
    fl_gamma: float = field(default=0.0, metadata={"min": 0.0, "max": 10.0})  # focal loss: 0 is none
    iou_t: float = field(default=0.2, metadata={"min": 0.0, "max": 1.0})  # read by nobody; YOLOv5's files have it
    label_smoothing: float = field(default=0.0, metadata={"min": 0.0, "max": 0.999})


def smooth_BCE(eps: float = 0.1) -> tuple[float, float]:
    """What a class's target is where it is present and where it is absent, smoothed by `eps`; YOLOv5's name."""
    return 1 - eps / 2, eps / 2


def scale_gains(hyp: Mapping[str, float], num_layers: int, num_classes: int, imgsz: int) -> dict[str, float]:
    """A copy of `hyp` whose gains fit the network: files state them for 3 levels, 80 classes and 640 pixels.

    box * 3 / levels, cls * classes / 80 * 3 / levels, obj * (imgsz / 640)^2 * 3 / levels. Missing gains get defaults.
    """
    levels = 3 / num_layers
    gains = owned(LossHyp, hyp)
    return {
        **hyp,
        "box": gains.box * levels,
        "cls": gains.cls * num_classes / 80 * levels,
        "obj": gains.obj * (imgsz / 640) ** 2 * levels,
    }


# ---------------------------------------------------------------------------------------------------------- assignment


@dataclass(frozen=True)
class Assignment:
    """Which predictions of one level answer for which label; n of them, a prediction may answer for several labels.

    Where `valid` is false the row is padding: in range like every other, to be given no weight.
    """

    image: Tensor  # (n,) int64
    anchor: Tensor
    row: Tensor
    column: Tensor
    cxcywh: Tensor  # (n, 4) label in cells, its centre relative to the corner of the grid cell
    anchor_wh: Tensor  # (n, 2) in cells
    class_index: Tensor  # (n,) int64
    valid: Tensor  # (n,) bool


def assign_targets(
    targets: Tensor,
    shapes_hw: Sequence[tuple[int, int]],
    anchors: Tensor,
    anchor_t: float,
    *,
    compact: bool = True,
) -> list[Assignment]:
    """For every level, the predictions that must find the labels.

    A label goes to every anchor whose width and height differ from its own by less than the factor `anchor_t`, in
    the cell that holds its centre and in the nearer neighbours, horizontal and vertical, if the grid has them: 0 to
    3 cells for each anchor. Rows are ordered by cell (own, left, up, right, down), anchor, label.

    Args:
        targets: (N, 6) of image, class, cx, cy, w, h in 0..1, on the device where the result shall be.
        shapes_hw: rows and columns of each level's grid.
        anchors: (levels, anchors per level, 2), width and height in cells.
        compact: leave invalid rows out. On an accelerator that waits for the device; without it every level has
            5 * anchors * N rows, about five times as many as are valid, and nothing waits.
    """
    return [
        _assign_level(targets, shape_hw, level_anchors, anchor_t, compact)
        for shape_hw, level_anchors in zip(shapes_hw, anchors, strict=True)
    ]


def _assign_level(
    targets: Tensor, shape_hw: tuple[int, int], anchors: Tensor, anchor_t: float, compact: bool
) -> Assignment:
    height, width = shape_hw
    num_anchors, num_targets = len(anchors), len(targets)
    x, y = targets[:, 2] * width, targets[:, 3] * height
    wh = torch.stack((targets[:, 4] * width, targets[:, 5] * height), 1)
    ratio = wh / anchors[:, None]  # (na, N, 2)
    fits = torch.maximum(ratio, 1 / ratio).amax(2) < anchor_t  # (na, N)

    # (5, N): own cell, then the neighbours left, up, right, down that exist and whose side is the nearer one
    right, down = width - x, height - y
    near = [(side % 1 < NEIGHBOUR) & (side > 1) for side in (x, y, right, down)]
    reaches = torch.stack((torch.ones_like(near[0]), *near))
    column = torch.stack((x, x - NEIGHBOUR, x, x + NEIGHBOUR, x)).floor().long().clamp(0, width - 1)
    row = torch.stack((y, y, y - NEIGHBOUR, y, y + NEIGHBOUR)).floor().long().clamp(0, height - 1)
    cxcywh = torch.cat((torch.stack((x - column, y - row), 2), wh.expand(5, num_targets, 2)), 2)  # (5, N, 4)

    shape = (5, num_anchors, num_targets)
    fields = {
        "image": targets[:, 0].long().expand(shape).reshape(-1),
        "anchor": torch.arange(num_anchors, device=targets.device)[:, None].expand(shape).reshape(-1),
        "row": row[:, None].expand(shape).reshape(-1),
        "column": column[:, None].expand(shape).reshape(-1),
        "cxcywh": cxcywh[:, None].expand(*shape, 4).reshape(-1, 4),
        "anchor_wh": anchors[:, None].expand(*shape, 2).reshape(-1, 2),
        "class_index": targets[:, 1].long().expand(shape).reshape(-1),
        "valid": (reaches[:, None] & fits).reshape(-1),
    }
    if compact:
        (kept,) = fields["valid"].nonzero(as_tuple=True)  # sync on an accelerator
        fields = {name: values[kept] for name, values in fields.items()}
    return Assignment(**fields)


# ---------------------------------------------------------------------------------------------------------------- loss


class ComputeLoss:
    """Callable: predictions per level (B, anchors, H, W, 5 + classes) and targets (N, 6) -> total (1,), items (3,).

    `targets` are image, class, cx, cy, w, h in 0..1 on the predictions' device. The total is multiplied by the
    batch size and is what to differentiate; the items are box, objectness and class loss, detached, for one image.
    Gains come from `model.hyp`, already scaled (see `scale_gains`), the grid's anchors from the last layer of
    `model.model` that has any; both are read once, when it is made, and kept on the device where the head then is: make
    it after the network was moved. Half-precision predictions are welcome, inside autocast
    too: the loss is taken in float32. Labels without a class loss (one class only) and batches without labels give
    what remains. A prediction that is not a number gives a loss that is not one.

    Where several labels want one cell, its objectness target is the IoU of the last one in `assign_targets`' order, on
    every device. `autobalance` lets the levels' objectness weights follow their losses.
    """

    def __init__(self, model: nn.Module, autobalance: bool = False) -> None:
        model = getattr(model, "module", model)  # DistributedDataParallel
        head: Any = next(layer for layer in reversed(list(model.model)) if hasattr(layer, "anchors"))  # type: ignore[arg-type]
        self.hyp = owned(LossHyp, model.hyp)  # type: ignore[arg-type]
        self.autobalance = autobalance
        self.num_classes: int = head.nc
        device = head.anchors.device
        self.anchors: Tensor = head.anchors.detach().float().clone()  # (nl, na, 2) in cells
        self.balance: Tensor = torch.tensor(BALANCE.get(head.nl, BALANCE_OTHERWISE[: head.nl]), device=device)
        # the level the others' weights are relative to
        self._reference_level = head.stride.tolist().index(16.0) if autobalance else 0
        self._positive_weights = torch.tensor((self.hyp.obj_pw, self.hyp.cls_pw), device=device)

    def __call__(self, predictions: Sequence[Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(predictions[0].device.type, enabled=False):
            return self._loss(predictions, targets.float())

    def _loss(self, predictions: Sequence[Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        shapes_hw = [(level.shape[2], level.shape[3]) for level in predictions]
        compact = _may_compact(targets.device)
        assigned = assign_targets(targets, shapes_hw, self.anchors, self.hyp.anchor_t, compact=compact)

        cells = [_flat_index(level, part) for level, part in zip(predictions, assigned, strict=True)]
        picked = [_Pick.apply(level, cell) for level, cell in zip(predictions, cells, strict=True)]
        rows = torch.cat([part for part, _ in picked]).float()
        valid = torch.cat([part.valid for part in assigned])
        # the mean over each level's valid rows, as a weight per row; a level without any contributes nothing
        weight = torch.cat([part.valid / part.valid.sum().clamp(min=1) for part in assigned])

        ciou = paired_iou(self._boxes(rows, assigned), torch.cat([part.cxcywh for part in assigned]), "ciou")
        box_loss = (torch.where(valid, 1 - ciou, 0) * weight).sum()
        class_loss = self._class_loss(rows, torch.cat([part.class_index for part in assigned]), weight)
        object_ious = ciou.detach().clamp(min=0).split([len(cell) for cell in cells])
        object_losses = torch.stack(
            [
                self._object_loss(objectness.float(), cell, part.valid, iou)
                for (_, objectness), cell, part, iou in zip(picked, cells, assigned, object_ious, strict=True)
            ]
        )
        object_loss = (object_losses * self.balance).sum()
        if self.autobalance:
            self._rebalance(object_losses.detach())

        items = torch.stack((box_loss * self.hyp.box, object_loss * self.hyp.obj, class_loss * self.hyp.cls))
        return items.sum(0, keepdim=True) * len(predictions[0]), items.detach()

    def _boxes(self, rows: Tensor, assigned: Sequence[Assignment]) -> Tensor:
        """Predicted boxes (n, 4) as `Assignment.cxcywh`, from raw rows (n, 4+)."""
        anchor_wh = torch.cat([part.anchor_wh for part in assigned])
        xy, wh = rows[:, :4].sigmoid().split(2, 1)
        return torch.cat((xy * 2 - 0.5, (wh * 2).square() * anchor_wh), 1)

    def _class_loss(self, rows: Tensor, class_index: Tensor, weight: Tensor) -> Tensor:
        if self.num_classes == 1:
            return rows.new_zeros(())
        logits = rows[:, 5 : 5 + self.num_classes]
        present, absent = smooth_BCE(self.hyp.label_smoothing)
        wanted = torch.full_like(logits, absent).scatter_(1, class_index[:, None], present)
        return (self._bce(logits, wanted, self._positive_weights[1]).mean(1) * weight).sum()

    def _object_loss(self, logits: Tensor, cell: Tensor, valid: Tensor, iou: Tensor) -> Tensor:
        """Mean over all cells; `logits` (cells,), and per row the cell it stands in, whether it counts, its IoU."""
        # Assigning by index would leave the winner among rows of the same cell to chance on an accelerator. Sorted by
        # cell, the winner is the last row of a cell's run.
        spare = len(logits)  # a cell that does not exist, for rows that do not count
        cells, order = torch.where(valid, cell, spare).sort(stable=True)
        wins = torch.cat((cells[1:] != cells[:-1], cells.new_ones(min(1, len(cells)), dtype=torch.bool)))
        wanted = iou.new_zeros(spare + 1)
        wanted[torch.where(wins, cells, spare)] = iou[order]
        return self._bce(logits, wanted[:spare], self._positive_weights[0]).mean()

    def _bce(self, logits: Tensor, wanted: Tensor, positive_weight: Tensor) -> Tensor:
        """Binary cross-entropy per element; with `fl_gamma` the focal loss (Lin et al. 2017, eq. 5)."""
        loss = F.binary_cross_entropy_with_logits(logits, wanted, pos_weight=positive_weight, reduction="none")
        if self.hyp.fl_gamma == 0:
            return loss
        probability = logits.sigmoid()
        right = wanted * probability + (1 - wanted) * (1 - probability)
        alpha = wanted * FOCAL_ALPHA + (1 - wanted) * (1 - FOCAL_ALPHA)
        return loss * alpha * (1 - right) ** self.hyp.fl_gamma

    def _rebalance(self, object_losses: Tensor) -> None:
        """Weights drift towards the inverse of each level's loss, relative to the level of stride 16."""
        balance = self.balance * BALANCE_DECAY + (1 - BALANCE_DECAY) / object_losses
        self.balance = balance / balance[self._reference_level]


def _may_compact(device: torch.device) -> bool:
    """On a CPU leaving rows out is free and saves four fifths of the work; elsewhere it would wait for the device."""
    return device.type == "cpu"


def _flat_index(level: Tensor, assignment: Assignment) -> Tensor:
    """Where each assigned row stands (n,) in the level's predictions, flattened as `_by_cell` does."""
    _, num_anchors, height, width, _ = level.shape
    place = (assignment.image * height + assignment.row) * width + assignment.column
    return place * num_anchors + assignment.anchor


def _by_cell(level: Tensor) -> Tensor:
    """Predictions (B, na, H, W, no) as (B*H*W*na, no): the order in memory of what a channels-last head gives."""
    return level.permute(0, 2, 3, 1, 4).reshape(-1, level.shape[-1])


class _Pick(torch.autograd.Function):
    """Level (B, na, H, W, no), cells (n,) -> their rows (n, no), and every cell's objectness (B*H*W*na,).

    Plain indexing would do. Its backward fills two tensors as large as the predictions and adds them, and on
    several CPU threads adds rows of the same cell in an order that changes from run to run; this fills one, in a
    fixed order.
    """

    @staticmethod
    def forward(ctx: Any, level: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        flat = _by_cell(level)
        ctx.save_for_backward(cell)
        ctx.shape = level.shape
        return flat[cell], flat[:, 4].clone()

    @staticmethod
    def backward(ctx: Any, rows_grad: Tensor, objectness_grad: Tensor) -> tuple[Tensor, None]:
        (cell,) = ctx.saved_tensors
        grad = rows_grad.new_zeros(len(objectness_grad), rows_grad.shape[1])
        grad[:, 4] = objectness_grad
        if grad.device.type == "cpu":
            grad.index_add_(0, cell, rows_grad)
        else:
            grad.index_put_((cell,), rows_grad, accumulate=True)  # sorts: a fixed order, where index_add_ has none
        batch, num_anchors, height, width, size = ctx.shape
        return grad.view(batch, height, width, num_anchors, size).permute(0, 3, 1, 2, 4), None
