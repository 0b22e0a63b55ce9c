"""What a network is trained for and judged by: today boxes; another task is another `Task`, and a line in `task_of`.

task = task_of(network)
loss = task.make_loss(network)  # its items are called task.losses
correct = task.match(detections, labels, thresholds)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from utils.config import UserError
from utils.loss import ComputeLoss
from utils.metrics import match

ComputesLoss = Callable[[list[Tensor], Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Task:
    """A kind of network: its loss, how what it finds is matched with the labels, and the names of its numbers."""

    name: str
    losses: tuple[str, ...]  # the items of the loss, as in results.csv
    metrics: tuple[str, ...]  # as in results.csv
    table: tuple[str, ...]  # the same in the table of a validation
    make_loss: Callable[[Any], ComputesLoss]
    match: Callable[[Tensor, Tensor, Tensor], Tensor]  # detections (k, 6), labels (n, 5), thresholds (t,) -> (k, t)

    @property
    def columns(self) -> Sequence[str]:
        """The columns of results.csv between the epoch and the learning rates."""
        train, val = ([f"{split}/{item}" for item in self.losses] for split in ("train", "val"))
        return (*train, *(f"metrics/{metric}" for metric in self.metrics), *val)


DETECT = Task(
    name="detect",
    losses=("box_loss", "obj_loss", "cls_loss"),
    metrics=("precision", "recall", "mAP_0.5", "mAP_0.5:0.95"),
    table=("P", "R", "mAP50", "mAP50-95"),
    make_loss=ComputeLoss,
    match=match,
)


def task_of(network: nn.Module) -> Task:
    """The task that a network of ours can be trained for.

    Raises:
        UserError: masks, which are not trained here.
    """
    if getattr(network, "num_masks", 0):
        raise UserError("this network predicts masks, and train.py trains boxes only. Give --cfg a detection YAML.")
    return DETECT
