"""YOLOv5's `utils.activations`, for other people's code; most of them are torch's by now."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import Hardswish, Mish, SiLU

__all__ = ["FReLU", "Hardswish", "MemoryEfficientMish", "Mish", "SiLU"]

MemoryEfficientMish = Mish


class FReLU(nn.Module):
    """The larger of x and a depthwise k x k convolution of it, normalised (https://arxiv.org/abs/2007.11824)."""

    def __init__(self, c1: int, k: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c1, k, 1, 1, groups=c1, bias=False)
        self.bn = nn.BatchNorm2d(c1)

    def forward(self, x: Tensor) -> Tensor:
        return x.maximum(self.bn(self.conv(x)))
