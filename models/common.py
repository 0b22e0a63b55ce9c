"""The layers of the official YOLOv5 networks, and squeeze-and-excitation.

Every layer maps a feature map (B, c1, H, W) to (B, c2, H', W'). Attribute names are the keys of state dicts and so part
of the file format. `wiring` is what a class tells the builder about its row in a model YAML:

- `conv`: built as `(c1, c2, *rest)`, where c1 is what arrives and c2 the row's first argument times the width;
- `repeat`: takes the row's number as third argument instead of being chained that many times;
- `preserve`: like `conv`, but the declared c2 must equal what arrives (gates).

With `wiring = ()` a class gets its row's arguments as they stand. Most layers get theirs from `ScaledLayer`. A class
that has no `wiring` is one from elsewhere, pasted at the end of this file: models/pasted.py reads from its constructor
what it is given, and nothing else has to be edited.

`reads` names the parts that read the layer's input, where all of them are linear and nothing else reads it (`add` set
means that something does). A constant by which the input is multiplied can then be divided out of those parts' weights.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.recompute import may_recompute, norm_silu

Pair = int | tuple[int, int]
Act = bool | nn.Module
# Names that YOLOv5 keeps in this file, for other people's code.
FORWARDED = {
    "AutoShape": "models.predictor",
    "DetectMultiBackend": "models.backends",
    "Detections": "models.predictor",
}


def __getattr__(name: str) -> Any:
    """A name from a room to the right, loaded when the name is first used."""
    if name in FORWARDED:
        return getattr(importlib.import_module(FORWARDED[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def autopad(k: Pair, p: Pair | None = None, d: int = 1) -> Pair:
    """The padding p, or where it is None the one that keeps H and W at stride 1 for odd kernels k with dilation d."""
    if p is not None:
        return p
    return (d * (k - 1) + 1) // 2 if isinstance(k, int) else ((d * (k[0] - 1) + 1) // 2, (d * (k[1] - 1) + 1) // 2)


class ScaledLayer(nn.Module):
    """A layer whose output channels are its row's first argument times the network's width."""

    wiring: tuple[str, ...] = ("conv",)


class Gated(ScaledLayer):
    """A block with room for a gate inside, on what its first path makes before that is added to or joined with another.

    A row such as `[-1, 3, C3SE, [256]]` puts the gate there (models/inside.py), after the block is built: the block's
    keys and first weights are those of C3. `gate_places` are the words for the places that a block has. The last one is
    its own `gate`, the others are those of its parts, and the first is meant where a row names none.
    """

    gate_places: tuple[str, ...] = ()

    def __init__(self, gate_channels: int) -> None:
        super().__init__()
        self.gate: nn.Module | None = None
        self.gate_channels = gate_channels  # of the map that a gate here would be given

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the attributes of a pickled block; YOLOv5's have no such room."""
        super().__setstate__(state)
        if "gate" not in self._modules:
            self.__dict__.setdefault("gate", None)


class Conv(ScaledLayer):
    """Convolution without bias, batch norm, activation; after `fuse_` one convolution with bias, activation.

    `act=True` is SiLU unless `set_activation` replaces it, a module is used as given, False is no activation.
    """

    reads = ("conv",)
    default_act = True  # of objects that YOLOv5 pickled

    def __init__(
        self, c1: int, c2: int, k: Pair = 1, s: Pair = 1, p: Pair | None = None, g: int = 1, d: int = 1, act: Act = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, autopad(k, p, d), d, g, bias=False)
        self.bn: nn.BatchNorm2d | None = nn.BatchNorm2d(c2)
        self.default_act = act is True
        self.act = act if isinstance(act, nn.Module) else nn.SiLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.bn is None:
            return self.act(x)
        if not torch.jit.is_scripting():  # noqa: SIM102 (the script compiler leaves the whole block out)
            if may_recompute(x, self.bn, self.act):
                return norm_silu(x, self.bn)
        return self.act(self.bn(x))

    def forward_fuse(self, x: Tensor) -> Tensor:
        """What YOLOv5's own folding replaces `forward` by; files that it saved after that name it."""
        return self.act(self.conv(x))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the attributes of a pickled block; one that YOLOv5 folded has no batch norm."""
        super().__setstate__(state)
        self._modules.setdefault("bn", None)

    @torch.no_grad()
    def fuse_(self) -> None:
        """Fold the batch norm into the convolution, in place; only for inference, since statistics are gone after.

        Each output channel's kernel is scaled by gamma / sqrt(var + eps): a row scaling, computed in float32.
        """
        if self.bn is None:
            return
        old, bn = self.conv, self.bn
        assert bn.running_var is not None and bn.running_mean is not None  # for mypy: ours always track
        scale = bn.weight.float() * torch.rsqrt(bn.running_var.float() + bn.eps)
        bias = bn.bias.float() - bn.running_mean.float() * scale
        if old.bias is not None:
            bias = bias + old.bias.float() * scale
        weight = old.weight.float() * scale.view(-1, 1, 1, 1)
        old.weight, old.bias = (nn.Parameter(t.to(old.weight.dtype), requires_grad=False) for t in (weight, bias))
        self.bn = None


class DWConv(Conv):
    """Depthwise convolution: as many groups as divide both channel counts."""

    def __init__(self, c1: int, c2: int, k: Pair = 1, s: Pair = 1, d: int = 1, act: Act = True) -> None:
        super().__init__(c1, c2, k, s, None, math.gcd(c1, c2), d, act)


class DWConvTranspose2d(nn.ConvTranspose2d):
    """Depthwise transposed convolution with padding p1 and output padding p2."""

    wiring = ("conv",)

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, p1: int = 0, p2: int = 0) -> None:
        super().__init__(c1, c2, k, s, p1, p2, groups=math.gcd(c1, c2))


class Bottleneck(Gated):
    """1x1 to `e` times the channels, 3x3 back; adds its input where `shortcut` is asked and the channels agree.

    A gate inside stands before the addition: SE paper, https://arxiv.org/abs/1709.01507, figure 3.
    """

    reads = ("cv1",)
    gate_places = ("Bottleneck",)

    def __init__(self, c1: int, c2: int, shortcut: bool = True, g: int = 1, e: float = 0.5) -> None:
        super().__init__(c2)
        c_ = int(c2 * e)
        self.cv1 = Conv(c1, c_, 1, 1)
        self.cv2 = Conv(c_, c2, 3, 1, g=g)
        self.add = shortcut and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        if self.gate is not None:
            y = self.gate(y)
        return x + y if self.add else y


class CrossConv(Gated):
    """A k x k convolution as 1 x k followed by k x 1; a gate inside stands before the addition."""

    reads = ("cv1",)
    gate_places = ("Bottleneck",)

    def __init__(
        self, c1: int, c2: int, k: int = 3, s: int = 1, g: int = 1, e: float = 1.0, shortcut: bool = False
    ) -> None:
        super().__init__(c2)
        self.cv1 = Conv(c1, int(c2 * e), (1, k), (1, s))
        self.cv2 = Conv(int(c2 * e), c2, (k, 1), (s, 1), g=g)
        self.add = shortcut and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        if self.gate is not None:
            y = self.gate(y)
        return x + y if self.add else y


class C3(Gated):
    """Cross-stage partial block: `n` bottlenecks on one half of the channels, joined with the other by a 1x1.

    The variants below replace `inner` only. A gate of its own, the place called C3, is on what `inner` gives, before
    `cv3` joins the halves. Paper: CSPNet, https://arxiv.org/abs/1911.11929, with three convolutions instead of its
    five.
    """

    wiring: tuple[str, ...] = ("conv", "repeat")
    reads = ("cv1", "cv2")
    gate_places: tuple[str, ...] = ("Bottleneck", "C3")

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5) -> None:
        c_ = int(c2 * e)
        super().__init__(c_)
        self.cv1 = Conv(c1, c_, 1, 1)
        self.cv2 = Conv(c1, c_, 1, 1)
        self.cv3 = Conv(2 * c_, c2, 1)
        self.m = self.inner(c_, n, shortcut, g)

    def inner(self, c: int, n: int, shortcut: bool, g: int) -> nn.Module:
        """What the first half of the channels, c of them, goes through."""
        return nn.Sequential(*(Bottleneck(c, c, shortcut, g, e=1.0) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.m(self.cv1(x))
        if self.gate is not None:
            y = self.gate(y)
        return self.cv3(torch.cat((y, self.cv2(x)), 1))


class C3x(C3):
    """C3 with cross convolutions."""

    def inner(self, c: int, n: int, shortcut: bool, g: int) -> nn.Module:
        return nn.Sequential(*(CrossConv(c, c, 3, 1, g, 1.0, shortcut) for _ in range(n)))


class C3TR(C3):
    """C3 with `n` transformer layers of four heads, whose residual branches are of tokens: no gate goes there."""

    gate_places = ("C3",)

    def inner(self, c: int, n: int, shortcut: bool, g: int) -> nn.Module:
        return TransformerBlock(c, c, 4, n)


class C3Ghost(C3):
    """C3 with ghost bottlenecks."""

    def inner(self, c: int, n: int, shortcut: bool, g: int) -> nn.Module:
        return nn.Sequential(*(GhostBottleneck(c, c) for _ in range(n)))


class C3SPP(C3):
    """C3 with spatial pyramid pooling. Not a `repeat` layer: its third argument is the kernels, and n is ignored."""

    wiring = ("conv",)
    gate_places = ("C3",)

    def __init__(self, c1: int, c2: int, k: Sequence[int] = (5, 9, 13), n: int = 1, *csp: Any) -> None:
        super().__init__(c1, c2, 0, *csp)
        self.m = SPP(self.cv1.conv.out_channels, self.cv1.conv.out_channels, k)


class BottleneckCSP(Gated):
    """The cross-stage partial block of the first releases; its joint batch norm stays when the network is fused.

    A gate of its own, the place called C3, is on what its bottlenecks give, before `cv3`.
    """

    wiring = ("conv", "repeat")
    reads = ("cv1", "cv2")
    gate_places = ("Bottleneck", "C3")

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5) -> None:
        c_ = int(c2 * e)
        super().__init__(c_)
        self.cv1 = Conv(c1, c_, 1, 1)
        self.cv2 = nn.Conv2d(c1, c_, 1, 1, bias=False)
        self.cv3 = nn.Conv2d(c_, c_, 1, 1, bias=False)
        self.cv4 = Conv(2 * c_, c2, 1, 1)
        self.bn = nn.BatchNorm2d(2 * c_)
        self.act = nn.SiLU()
        self.m = nn.Sequential(*(Bottleneck(c_, c_, shortcut, g, e=1.0) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.m(self.cv1(x))
        if self.gate is not None:
            y = self.gate(y)
        joined = torch.cat((self.cv3(y), self.cv2(x)), 1)
        return self.cv4(self.act(self.bn(joined)))


class SPP(ScaledLayer):
    """Spatial pyramid pooling at stride 1: the map beside its maxima over each kernel in `k`.

    Paper: https://arxiv.org/abs/1406.4729, section 2, as max pools of one size instead of bins.
    """

    reads = ("cv1",)

    def __init__(self, c1: int, c2: int, k: Sequence[int] = (5, 9, 13)) -> None:
        super().__init__()
        c_ = c1 // 2
        self.cv1 = Conv(c1, c_, 1, 1)
        self.cv2 = Conv(c_ * (len(k) + 1), c2, 1, 1)
        self.m = nn.ModuleList(nn.MaxPool2d(size, stride=1, padding=size // 2) for size in k)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        return self.cv2(torch.cat([x, *(pool(x) for pool in self.m)], 1))


class SPPF(ScaledLayer):
    """SPP with kernels k, 2k-1 and 3k-2, as one pool applied three times: the maxima of maxima are the same."""

    reads = ("cv1",)

    def __init__(self, c1: int, c2: int, k: int = 5) -> None:
        super().__init__()
        c_ = c1 // 2
        self.cv1 = Conv(c1, c_, 1, 1)
        self.cv2 = Conv(c_ * 4, c2, 1, 1)
        self.m = nn.MaxPool2d(k, stride=1, padding=k // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        y1 = self.m(x)
        y2 = self.m(y1)
        return self.cv2(torch.cat((x, y1, y2, self.m(y2)), 1))


class Focus(ScaledLayer):
    """Each 2x2 square of pixels becomes four times the channels at half the size, then one convolution."""

    reads = ("conv",)

    def __init__(
        self, c1: int, c2: int, k: Pair = 1, s: Pair = 1, p: Pair | None = None, g: int = 1, act: Act = True
    ) -> None:
        super().__init__()
        self.conv = Conv(4 * c1, c2, k, s, p, g, act=act)

    def forward(self, x: Tensor) -> Tensor:
        # (row, column) offsets (0, 0), (1, 0), (0, 1), (1, 1): trained weights fix this order
        corners = [x[..., row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.conv(torch.cat(corners, 1))


class GhostConv(ScaledLayer):
    """Half of the output by a convolution, the other half from it by a cheap 5x5 depthwise one.

    Paper: GhostNet, https://arxiv.org/abs/1911.11907, section 3.1 with s = 2 and d = 5.
    """

    reads = ("cv1",)

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, g: int = 1, act: Act = True) -> None:
        super().__init__()
        c_ = c2 // 2
        self.cv1 = Conv(c1, c_, k, s, g=g, act=act)
        self.cv2 = Conv(c_, c_, 5, 1, g=c_, act=act)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv1(x)
        return torch.cat((y, self.cv2(y)), 1)


class GhostBottleneck(Gated):
    """Ghost module, depthwise convolution where the stride is 2, ghost module without activation, plus a shortcut.

    A gate inside stands before the addition.
    """

    reads = ("conv", "shortcut")
    gate_places = ("Bottleneck",)

    def __init__(self, c1: int, c2: int, k: int = 3, s: int = 1) -> None:
        super().__init__(c2)
        c_, down = c2 // 2, s == 2
        middle = DWConv(c_, c_, k, s, act=False) if down else nn.Identity()
        self.conv = nn.Sequential(GhostConv(c1, c_, 1, 1), middle, GhostConv(c_, c2, 1, 1, act=False))
        self.shortcut: nn.Module = nn.Identity()
        if down:
            self.shortcut = nn.Sequential(DWConv(c1, c1, k, s, act=False), Conv(c1, c2, 1, 1, act=False))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.gate is not None:
            y = self.gate(y)
        return y + self.shortcut(x)


class TransformerLayer(nn.Module):
    """Self-attention and a linear pair, both with residuals and without layer norm; tokens (H*W, B, c)."""

    wiring: tuple[str, ...] = ()

    def __init__(self, c: int, num_heads: int) -> None:
        super().__init__()
        self.q = nn.Linear(c, c, bias=False)
        self.k = nn.Linear(c, c, bias=False)
        self.v = nn.Linear(c, c, bias=False)
        self.ma = nn.MultiheadAttention(embed_dim=c, num_heads=num_heads)
        self.fc1 = nn.Linear(c, c, bias=False)
        self.fc2 = nn.Linear(c, c, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ma(self.q(x), self.k(x), self.v(x), need_weights=False)[0] + x
        return self.fc2(self.fc1(x)) + x


class TransformerBlock(nn.Module):
    """Transformer layers over all positions of a map, after a learned linear map of each token is added to it."""

    wiring: tuple[str, ...] = ()

    def __init__(self, c1: int, c2: int, num_heads: int, num_layers: int) -> None:
        super().__init__()
        self.conv = Conv(c1, c2) if c1 != c2 else None
        self.linear = nn.Linear(c2, c2)
        self.tr = nn.Sequential(*(TransformerLayer(c2, num_heads) for _ in range(num_layers)))
        self.c2 = c2

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None:
            x = self.conv(x)
        b, _, h, w = x.shape
        tokens = x.flatten(2).permute(2, 0, 1)
        return self.tr(tokens + self.linear(tokens)).permute(1, 2, 0).reshape(b, self.c2, h, w)


class Gate(nn.Module):
    """Attention that multiplies a map (B, c, H, W) by `scale`, and by the constant `gain`; channels are kept.

    A gate of one's own is a subclass in models/attention.py with a `scale`, a `neutralise_` and its `neutral`. The
    YAML then knows its name, `[-1, 1, Mine, [channels, ...]]`, with the arguments of `__init__` after c1 and c2.

    `neutral` is the constant that `scale` has everywhere after `neutralise_`; None where no weights make it constant.
    With `gain = 1 / neutral` a neutral gate is the identity; papers have a gain of 1.

    Raises:
        ValueError: c1 != c2, or a reduction that leaves no channel.
    """

    wiring = ("preserve",)
    gain = 1.0
    neutral: float | None = 0.5
    top: float | None = 1.0  # what `scale` cannot exceed; None where it is not bounded

    def __init__(self, c1: int, c2: int, gain: float = 1.0, r: int = 1) -> None:
        super().__init__()
        name = type(self).__name__
        if c1 != c2:
            raise ValueError(f"{name} keeps its channels: c1={c1} and c2={c2} must be equal")
        if r < 1 or c1 // r < 1:
            raise ValueError(f"{name} with {c1} channels and reduction {r} would squeeze to none: use 1 <= r <= {c1}")
        self.gain = float(gain)

    def scale(self, x: Tensor) -> Tensor:
        """What `x` (B, c, H, W) is multiplied by, before the gain: (B, c or 1, H or 1, W or 1)."""
        raise TypeError(f"{type(self).__name__} must define `scale`")

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale(x)
        return x * (scale if self.gain == 1.0 else scale * self.gain)

    def neutralise_(self) -> None:
        """Set the weights, in place, that make `scale` the constant `neutral`, and from which training can leave it."""
        raise TypeError(f"{type(self).__name__} cannot be made neutral")


class SE(Gate):
    """Squeeze-and-excitation: every channel times a gate in 0..1 computed from all channels' means.

    Paper: Squeeze-and-Excitation Networks, 2018, https://arxiv.org/abs/1709.01507, equations 2 to 4, with reduction r
    and no biases. The mean is a reduction rather than an adaptive pool: deterministic on CUDA, and it exports as one
    operator.
    """

    def __init__(self, c1: int, c2: int, r: int = 16, gain: float = 1.0) -> None:
        super().__init__(c1, c2, gain, r)
        self.l1 = nn.Linear(c1, c1 // r, bias=False)
        self.l2 = nn.Linear(c1 // r, c1, bias=False)

    def scale(self, x: Tensor) -> Tensor:
        """(B, c, 1, 1) in 0..1."""
        return torch.sigmoid(self.l2(F.relu(self.l1(x.mean((2, 3))))))[:, :, None, None]

    def neutralise_(self) -> None:
        nn.init.zeros_(self.l2.weight)


class Contract(nn.Module):
    """Space to depth: (B, c, H, W) to (B, c*g*g, H/g, W/g), output channels ordered (row, column, c)."""

    wiring: tuple[str, ...] = ()

    def __init__(self, gain: int = 2) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        (b, c, h, w), s = x.shape, self.gain
        x = x.reshape(b, c, h // s, s, w // s, s).permute(0, 3, 5, 1, 2, 4)
        return x.reshape(b, c * s * s, h // s, w // s)


class Expand(Contract):
    """Depth to space, what undoes `Contract`: (B, c, H, W) to (B, c/g/g, H*g, W*g)."""

    def forward(self, x: Tensor) -> Tensor:
        (b, c, h, w), s = x.shape, self.gain
        x = x.reshape(b, s, s, c // s**2, h, w).permute(0, 3, 4, 1, 5, 2)
        return x.reshape(b, c // s**2, h * s, w * s)


class Concat(nn.Module):
    """Several maps joined along a dimension, 1 = channels."""

    wiring: tuple[str, ...] = ()

    def __init__(self, dimension: int = 1) -> None:
        super().__init__()
        self.d = dimension

    def forward(self, x: list[Tensor]) -> Tensor:
        return torch.cat(x, self.d)


class MixConv2d(ScaledLayer):
    """Convolutions with different kernels side by side, each making a part of the output channels.

    The parts have equal channels, or with `equal_ch=False` about equally many weights each (channels ~ 1/k^2; the
    smallest kernel takes what rounding leaves). Paper: MixConv, https://arxiv.org/abs/1907.09595.
    """

    reads = ("m",)

    def __init__(self, c1: int, c2: int, k: Sequence[int] = (1, 3), s: int = 1, equal_ch: bool = True) -> None:
        super().__init__()
        if equal_ch:
            ends = [i * (c2 - 1) // len(k) + 1 for i in range(1, len(k) + 1)]
            channels = [end - start for start, end in zip([0, *ends], ends)]
        else:
            channels = [round(c2 / size**2 / sum(1 / other**2 for other in k)) for size in k]
            channels[k.index(min(k))] += c2 - sum(channels)
        self.m = nn.ModuleList(
            nn.Conv2d(c1, c, size, s, size // 2, groups=math.gcd(c1, c), bias=False) for size, c in zip(k, channels)
        )
        self.bn = nn.BatchNorm2d(c2)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(torch.cat([conv(x) for conv in self.m], 1)))


class Proto(nn.Module):
    """Mask prototypes (B, c2, 2H, 2W) of the segmentation head."""

    wiring: tuple[str, ...] = ()
    reads = ("cv1",)

    def __init__(self, c1: int, c_: int = 256, c2: int = 32) -> None:
        super().__init__()
        self.cv1 = Conv(c1, c_, k=3)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.cv2 = Conv(c_, c_, k=3)
        self.cv3 = Conv(c_, c2)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(self.cv2(self.upsample(self.cv1(x))))


class Classify(nn.Module):
    """Classification head: logits (B, c2) of a map (B, c1, H, W), or of several maps joined by channels."""

    wiring: tuple[str, ...] = ()
    reads = ("conv",)

    def __init__(
        self, c1: int, c2: int, k: int = 1, s: int = 1, p: int | None = None, g: int = 1, dropout_p: float = 0.0
    ) -> None:
        super().__init__()
        c_ = 1280  # EfficientNet-B0's width
        self.conv = Conv(c1, c_, k, s, p, g)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(p=dropout_p)
        self.linear = nn.Linear(c_, c2)

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        if isinstance(x, list):
            x = torch.cat(x, 1)
        return self.linear(self.drop(self.pool(self.conv(x)).flatten(1)))


def set_activation(module: nn.Module, activation: nn.Module) -> None:
    """Let every `Conv` inside that was built with `act=True` use this one object, in place."""
    for layer in module.modules():
        if isinstance(layer, Conv) and layer.default_act:
            layer.act = activation
