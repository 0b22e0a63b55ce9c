"""Checkpoints run by PyTorch: one, or several as an ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.backends.base import Backend
from models.base import Output
from models.yolo import DetectionModel
from utils.config import UserError


def to_bf16_(network: DetectionModel) -> None:
    """Let a network for a CPU compute in bf16, in place, except for its head.

    bf16 has 8 significant bits, so above 512 pixels its numbers are 4 apart: the head and its decoding stay in fp32.
    """
    for layer in network.model[:-1]:
        layer.bfloat16()
    network.head.register_forward_pre_hook(_in_fp32)


def _in_fp32(head: nn.Module, maps: tuple[list[Tensor]]) -> tuple[list[Tensor]]:
    return ([level.float() for level in maps[0]],)


class PyTorch(Backend):
    """One network of ours, or several as an ensemble, whose candidate boxes are put together before NMS.

    Raises:
        UserError: networks that predict different classes or numbers of mask coefficients.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        first: Any = networks[0]
        self.names, self.num_masks = dict(first.names), int(first.num_masks)
        self.task = "segment" if self.num_masks else "detect"
        self.stride = max(32, *(int(network.stride.max()) for network in networks))  # type: ignore[operator, union-attr]
        for number, network in enumerate(networks[1:], 2):
            other: Any = network
            if (len(other.names), other.num_masks) != (len(self.names), self.num_masks):
                raise UserError(
                    f"--weights: file {number} predicts {len(other.names)} classes and {other.num_masks} mask "
                    f"coefficients per box, file 1 {len(self.names)} and {self.num_masks}. An ensemble needs equal "
                    "ones: leave one of the files out."
                )
            if dict(other.names) != self.names:
                raise UserError(
                    f"--weights: the classes of file {number} differ from those of file 1. An ensemble needs the same "
                    "classes: leave one of the files out."
                )

    @property
    def model(self) -> nn.Module:
        """The first network."""
        return self.networks[0]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the parameters are now: unlike an exported network this one can be moved."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """That of the parameters now."""
        return next(self.parameters()).dtype

    def forward(self, images: Tensor, augment: bool = False, visualize: Any = None) -> Any:
        """See `Backend`; `visualize` as in `BaseModel.run_layers`."""
        options = {"augment": augment, "visualize": visualize}
        outputs = [network(images, **options) for network in self.networks]
        return outputs[0] if len(outputs) == 1 else Output(torch.cat([output.predictions for output in outputs], 1))
