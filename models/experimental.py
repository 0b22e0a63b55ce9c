"""YOLOv5's `models.experimental`, for other people's code: `attempt_load`, the ensemble it makes, and MixConv2d."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.backends import PyTorch
from models.checkpoints.files import load_model
from models.common import CrossConv, MixConv2d
from utils.downloads import find_weights

__all__ = ["CrossConv", "Ensemble", "MixConv2d", "attempt_load"]


class Ensemble(nn.ModuleList):
    """Several networks whose candidate boxes are put together: images -> (predictions (B, N1 + N2 + ..., no), None).

    `names`, `nc` and `yaml` are those of the first, `stride` that of the network with the largest.

    Raises:
        UserError: networks that predict different classes or numbers of mask coefficients.
    """

    def __init__(self, networks: Sequence[Any] = ()) -> None:
        super().__init__(networks)
        if networks:
            PyTorch(networks)  # raises
            self.names, self.nc, self.yaml = networks[0].names, networks[0].head.nc, networks[0].yaml
            self.stride = max((network.stride for network in networks), key=lambda stride: float(stride.max()))

    def forward(
        self, x: Tensor, augment: bool = False, profile: bool = False, visualize: Any = None
    ) -> tuple[Tensor, None]:
        outputs = [network(x, augment=augment, profile=profile, visualize=visualize) for network in self]
        return torch.cat([output[0] for output in outputs], 1), None


def attempt_load(
    weights: str | Path | Sequence[str | Path],
    device: str | torch.device | None = None,
    inplace: bool = True,
    fuse: bool = True,
    map_location: str | torch.device | None = None,
) -> Any:
    """The network of a checkpoint, or the ensemble of several: float32, in evaluation mode.

    Args:
        weights: paths, or names such as `yolov5s.pt` that are looked for and fetched.
        device: where it goes; `map_location` is v6's name of it. Default: the CPU.
        inplace: whether the head may decode in place.
        fuse: fold the batch norms into the convolutions.

    Raises:
        UserError: as `load_model` and `find_weights`.
    """
    place = device if device is not None else map_location if map_location is not None else "cpu"
    names = [weights] if isinstance(weights, (str, Path)) else list(weights)
    networks = [load_model(find_weights(name), place, fuse=fuse) for name in names]
    for network in networks:
        network.inplace = network.head.inplace = inplace
    return networks[0] if len(networks) == 1 else Ensemble(networks)
