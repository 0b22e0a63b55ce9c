"""Networks ready for inference, whatever file they come from: one class per format, and `load`, which takes any.

network = load("best.pt", "cpu")
predictions = network(images).predictions  # (B, N, 5 + classes)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.base import Output
from models.checkpoints.files import load_model
from utils.config import UserError
from utils.downloads import find_weights


class Backend(nn.Module):
    """A network as inference sees it.

    `forward(images, augment=False, visualize=None)` takes images float `(B, 3, h, w)` in 0..1 on `device` and gives an
    output whose `predictions` are `(B, N, 5 + classes)`.

    `names` are its classes by number, `stride` the pixels that a side of its input must be a multiple of, `task` is
    detect or segment, `num_masks` how many mask coefficients end each row. `size_hw` and `batch_size` are the only
    input size and batch it takes; None where any will do.
    """

    names: dict[int, str]
    stride: int = 32
    task: str = "detect"
    num_masks: int = 0
    size_hw: tuple[int, int] | None = None
    batch_size: int | None = None
    device: torch.device
    dtype: torch.dtype


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


def load(
    weights: str | Path | Sequence[str | Path], device: str | torch.device = "cpu", *, half: bool = False
) -> Backend:
    """The network of a file, or of several checkpoints together, in evaluation mode on the device.

    Args:
        weights: a path, or a name such as `yolov5s.pt` that is looked for and fetched.
        device: where it runs.
        half: in fp16; for CUDA.

    Raises:
        UserError: no such file, not a network for boxes, or an ensemble whose parts do not go together.
    """
    names = [weights] if isinstance(weights, str | Path) else list(weights)
    for name in names:
        if Path(name).suffix.lower() not in (".pt", ""):
            raise UserError(f"--weights {name}: only .pt checkpoints can be run. Give the .pt this was exported from.")
    networks = [load_model(find_weights(name), device).to(memory_format=torch.channels_last) for name in names]
    return PyTorch([network.half() if half else network for network in networks])
