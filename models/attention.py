"""Attention gates beside SE (models/common.py): each keeps a map's shape and says how it is made neutral.

Means and maxima are reductions rather than pooling layers: deterministic on CUDA, one operator each when exported.
`neutralise_` zeroes the last layers only, so that one optimizer step wakes them and the next reaches all the others.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Conv, Gate


def zero_(*modules: nn.Module) -> None:
    """Set every parameter of the modules to zero, in place."""
    for module in modules:
        for parameter in module.parameters():
            nn.init.zeros_(parameter)


def odd(name: str, k: int) -> int:
    """The kernel size k; ValueError for one that would not keep a map's size."""
    if k < 1 or k % 2 == 0:
        raise ValueError(f"{name} with kernel size {k} would change the map's size: use an odd number")
    return k


class ECA(Gate):
    """Efficient channel attention: each channel's gate from its own and its neighbours' means, by one kernel of size k.

    Paper: ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks, 2020,
    https://arxiv.org/abs/1910.03151, section 3.2. `k=None` is the paper's: the odd number nearest to
    (log2(c) + 1) / 2, and the larger one of two.
    """

    def __init__(self, c1: int, c2: int, k: int | None = None, gain: float = 1.0) -> None:
        super().__init__(c1, c2, gain)
        k = int((math.log2(c1) + 1) / 2) | 1 if k is None else odd("ECA", k)
        self.conv = nn.Conv1d(1, 1, k, padding=k // 2, bias=False)

    def scale(self, x: Tensor) -> Tensor:
        """(B, c, 1, 1) in 0..1."""
        return torch.sigmoid(self.conv(x.mean((2, 3))[:, None]))[:, 0, :, None, None]

    def neutralise_(self) -> None:
        zero_(self.conv)


class CBAM(Gate):
    """Convolutional block attention module: a gate per channel, then one per position of the map so gated.

    Paper: CBAM: Convolutional Block Attention Module, 2018, https://arxiv.org/abs/1807.06521, equations 1 to 3, with
    the paper's r and k and no biases. `l2` is linear, so the two branches of equation 2 are added before it, once.
    """

    neutral = 0.25

    def __init__(self, c1: int, c2: int, r: int = 16, k: int = 7, gain: float = 1.0) -> None:
        super().__init__(c1, c2, gain, r)
        self.l1 = nn.Linear(c1, c1 // r, bias=False)
        self.l2 = nn.Linear(c1 // r, c1, bias=False)
        self.conv = nn.Conv2d(2, 1, odd("CBAM", k), padding=k // 2, bias=False)

    def scale(self, x: Tensor) -> Tensor:
        """(B, c, H, W) in 0..1: the product of both gates."""
        hidden = F.relu(self.l1(x.mean((2, 3)))) + F.relu(self.l1(x.amax((2, 3))))
        channel = torch.sigmoid(self.l2(hidden))[:, :, None, None]
        y = x * channel
        spatial = torch.sigmoid(self.conv(torch.cat((y.mean(1, keepdim=True), y.amax(1, keepdim=True)), 1)))
        return channel * spatial

    def neutralise_(self) -> None:
        zero_(self.l2, self.conv)


class CoordAtt(Gate):
    """Coordinate attention: a gate per channel and row times a gate per channel and column.

    Paper: Coordinate Attention for Efficient Mobile Network Design, 2021, https://arxiv.org/abs/2103.02907, equations
    4 to 9, with batch norm and h-swish after the shared convolution, which has no bias that the batch norm would
    subtract. At least 8 hidden channels.
    """

    neutral = 0.25

    def __init__(self, c1: int, c2: int, reduction: int = 32, gain: float = 1.0) -> None:
        super().__init__(c1, c2, gain)
        if reduction < 1:
            raise ValueError(f"CoordAtt with reduction {reduction}: use a whole number from 1")
        hidden = max(8, c1 // reduction)
        self.conv = Conv(c1, hidden, act=nn.Hardswish())
        self.rows = nn.Conv2d(hidden, c1, 1)
        self.columns = nn.Conv2d(hidden, c1, 1)

    def scale(self, x: Tensor) -> Tensor:
        """(B, c, H, W) in 0..1."""
        h, w = x.shape[2:]
        strip = self.conv(torch.cat((x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)), 2))
        rows, columns = strip.split([h, w], 2)
        return torch.sigmoid(self.rows(rows)) * torch.sigmoid(self.columns(columns.transpose(2, 3)))

    def neutralise_(self) -> None:
        zero_(self.rows, self.columns)


class SCSE(Gate):
    """Concurrent spatial and channel squeeze and excitation: a gate per channel plus a gate per position.

    Paper: Concurrent Spatial and Channel Squeeze & Excitation in Fully Convolutional Networks, 2018,
    https://arxiv.org/abs/1803.02579, sections 2.1 to 2.3, with the paper's r and no biases.
    """

    neutral = 1.0
    top = 2.0

    def __init__(self, c1: int, c2: int, r: int = 2, gain: float = 1.0) -> None:
        super().__init__(c1, c2, gain, r)
        self.l1 = nn.Linear(c1, c1 // r, bias=False)
        self.l2 = nn.Linear(c1 // r, c1, bias=False)
        self.conv = nn.Conv2d(c1, 1, 1, bias=False)

    def scale(self, x: Tensor) -> Tensor:
        """(B, c, H, W) in 0..2: the sum of both gates."""
        channel = torch.sigmoid(self.l2(F.relu(self.l1(x.mean((2, 3))))))[:, :, None, None]
        return channel + torch.sigmoid(self.conv(x))

    def neutralise_(self) -> None:
        zero_(self.l2, self.conv)


class SimAM(Gate):
    """A gate per value without any weights: the further a value is from its channel's mean, the nearer to 1.

    Paper: SimAM: A Simple, Parameter-Free Attention Module for Convolutional Neural Networks, 2021,
    https://proceedings.mlr.press/v139/yang21o.html, equations 5 and 6. The variance divides by one
    pixel less than the map has, as in the authors' program, and is 0 for a single pixel.

    There is nothing to set, and the gate depends on the map (0.62 at the mean, more elsewhere): it cannot be neutral.
    """

    neutral = None

    def __init__(self, c1: int, c2: int, e_lambda: float = 1e-4, gain: float = 1.0) -> None:
        super().__init__(c1, c2, gain)
        if not e_lambda > 0:
            raise ValueError(f"SimAM with e_lambda {e_lambda} would divide by zero on a uniform map: use e.g. 1e-4")
        self.e_lambda = float(e_lambda)

    def scale(self, x: Tensor) -> Tensor:
        """(B, c, H, W) in 0.62..1."""
        pixels = x.shape[2] * x.shape[3]
        squares = (x - x.mean((2, 3), keepdim=True)).float().square()  # half precision cannot hold the square of 256
        variance = squares.sum((2, 3), keepdim=True) / max(pixels - 1, 1)
        return torch.sigmoid(squares / (4 * (variance + self.e_lambda)) + 0.5).to(x.dtype)


class GlobalContext(Gate):
    """A map plus one vector for all its positions: their mean weighted by attention, through a bottleneck.

    Paper: GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond, 2019,
    https://arxiv.org/abs/1904.11492, section 4.3, without biases (the softmax would cancel that of `key`). At least 4
    hidden channels: layer norm makes a constant of one and leaves two little more than their order.

    The vector is added, so `gain` multiplies the sum and `scale` only describes it.
    """

    neutral = 1.0
    top = None

    def __init__(self, c1: int, c2: int, r: int = 16, gain: float = 1.0) -> None:
        super().__init__(c1, c2, gain, r)
        hidden = max(4, c1 // r)
        self.key = nn.Conv2d(c1, 1, 1, bias=False)
        self.l1 = nn.Linear(c1, hidden, bias=False)
        self.norm = nn.LayerNorm(hidden)
        self.l2 = nn.Linear(hidden, c1, bias=False)

    def context(self, x: Tensor) -> Tensor:
        """What is added to the map, (B, c, 1, 1)."""
        attention = torch.softmax(self.key(x).flatten(1), 1)
        pooled = torch.einsum("bcn,bn->bc", x.flatten(2), attention)
        return self.l2(F.relu(self.norm(self.l1(pooled))))[:, :, None, None]

    def scale(self, x: Tensor) -> Tensor:
        """(B, c, 1, 1): 1 plus what is added, in units of the image's root mean square; for inspection only."""
        rms = x.float().square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-12)
        return (1 + self.context(x) / rms).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.context(x)
        return y if self.gain == 1.0 else y * self.gain

    def neutralise_(self) -> None:
        zero_(self.l2)


class EMA(Gate):
    """Efficient multi-scale attention: within groups of channels, a gate per position from two branches.

    One branch gates rows and columns as CoordAtt does, the other is a 3x3 convolution; each is then summed over its
    channels, weighted by the softmax of the other's means.

    Paper: Efficient Multi-Scale Attention Module with Cross-Spatial Learning, 2023, https://arxiv.org/abs/2305.13563.
    There are as many groups as the largest divisor of c up to `factor`, so that any width works. Group norm has a
    group per channel, and a 1x1 map becomes its bias.
    """

    def __init__(self, c1: int, c2: int, factor: int = 8, gain: float = 1.0) -> None:
        super().__init__(c1, c2, gain)
        if factor < 1:
            raise ValueError(f"EMA with factor {factor} has no groups: use at least 1")
        self.groups = max(g for g in range(1, min(factor, c1) + 1) if c1 % g == 0)
        c = c1 // self.groups
        self.conv1 = nn.Conv2d(c, c, 1)
        self.conv3 = nn.Conv2d(c, c, 3, padding=1)
        self.norm = nn.GroupNorm(c, c)

    def scale(self, x: Tensor) -> Tensor:
        """(B, c, H, W) in 0..1, equal within each group of channels."""
        b, c, h, w = x.shape
        group = x.reshape(b * self.groups, c // self.groups, h, w)
        strip = self.conv1(torch.cat((group.mean(3, keepdim=True), group.mean(2, keepdim=True).transpose(2, 3)), 2))
        rows, columns = torch.sigmoid(strip).split([h, w], 2)
        y = group * rows * columns.transpose(2, 3)
        # not the module's forward, which refuses one value per channel even where that is harmless
        coarse = torch.group_norm(y, self.norm.num_groups, self.norm.weight, self.norm.bias, self.norm.eps)
        fine = self.conv3(group)
        gate = torch.sigmoid(self.weighted(coarse, fine) + self.weighted(fine, coarse))
        return gate.view(b, self.groups, 1, h, w).expand(b, self.groups, c // self.groups, h, w).reshape(b, c, h, w)

    def weighted(self, pooled: Tensor, y: Tensor) -> Tensor:
        """The sum (N, H, W) of y's channels with the softmax of `pooled`'s means as weights; both are (N, c, H, W)."""
        return torch.einsum("nc,nchw->nhw", torch.softmax(pooled.mean((2, 3)), 1), y)

    def neutralise_(self) -> None:
        zero_(self.conv3, self.norm)


class GAM(Gate):
    """Global attention mechanism: a gate per value from its position's channels, then one from a wide neighbourhood.

    Paper: Global Attention Mechanism: Retain Information to Enhance Channel-Spatial Interactions, 2021,
    https://arxiv.org/abs/2112.05561, equations 1 and 2, figures 2 and 3, with a batch norm after each convolution.
    Nothing is pooled, and the two 7x7 convolutions have 98 c^2 / r weights: 6.4 million at 512 channels.

    Batch norm has no statistics of a single value: training needs more than one 1x1 map at a time.
    """

    neutral = 0.25

    def __init__(self, c1: int, c2: int, r: int = 4, gain: float = 1.0) -> None:
        super().__init__(c1, c2, gain, r)
        hidden = c1 // r
        self.l1 = nn.Linear(c1, hidden)
        self.l2 = nn.Linear(hidden, c1)
        self.cv1 = Conv(c1, hidden, 7, act=nn.ReLU())
        self.cv2 = Conv(hidden, c1, 7, act=False)

    def scale(self, x: Tensor) -> Tensor:
        """(B, c, H, W) in 0..1: the product of both gates."""
        logits = self.l2(F.relu(self.l1(x.permute(0, 2, 3, 1))))
        channel = torch.sigmoid(logits).permute(0, 3, 1, 2)
        return channel * torch.sigmoid(self.cv2(self.cv1(x * channel)))

    def neutralise_(self) -> None:
        zero_(self.l2, self.cv2.bn or self.cv2.conv)  # once folded, the convolution has the bias
