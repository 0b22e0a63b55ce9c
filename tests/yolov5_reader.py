"""A reader of YOLOv5's `.pt` files that imitates its `torch.load`, with classes of its own in place of YOLOv5's.

Each stand-in refuses an object that does not have exactly the attributes that version is known to give it, and computes
what that layer computes, so that a file which this reader opens and runs is one that YOLOv5's code can use.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VERSIONS = ("v6.0", "v6.2", "v7.0")
TORCH = set(vars(nn.Module()))
ROW = {"i", "f", "type", "np"}
DTYPES = {"HalfStorage": torch.float16, "FloatStorage": torch.float32, "LongStorage": torch.int64}


class StandIn(nn.Module):
    """A module of YOLOv5: `plain` are its attributes, `parts` its child modules, `buffers_` its own buffers."""

    plain: frozenset[str] = frozenset()
    parts: frozenset[str] = frozenset()
    buffers_: frozenset[str] = frozenset()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        name = type(self).__name__
        plain = set(state) - TORCH
        row = ROW if plain & ROW else set()
        assert plain == self.plain | row, f"{name}: attributes {plain ^ (self.plain | row)}"
        assert set(self._modules) == self.parts, f"{name}: children {set(self._modules) ^ self.parts}"
        assert set(self._buffers) == self.buffers_ and not self._parameters, f"{name}: tensors"


def stand_in(name: str, forward: Any, parts: str = "", plain: str = "") -> type[StandIn]:
    values = {"forward": forward, "parts": frozenset(parts.split()), "plain": frozenset(plain.split())}
    return type(name, (StandIn,), values)


def csp(self: Any, x: Tensor) -> Tensor:
    return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


def bottleneck(self: Any, x: Tensor) -> Tensor:
    y = self.cv2(self.cv1(x))
    return x + y if self.add else y


def pyramid(self: Any, x: Tensor) -> Tensor:
    maps = [self.cv1(x)]
    for _ in range(3):
        maps.append(self.m(maps[-1]))
    return self.cv2(torch.cat(maps, 1))


def tutorial_se(self: Any, x: Tensor) -> Tensor:
    """The class of the tutorials: average pool, two linear layers, as many weights as there are channels."""
    b, c, _, _ = x.shape
    y = self.sig(self.l2(self.relu(self.l1(self.avgpool(x).view(b, c))))).view(b, c, 1, 1)
    return x * y.expand_as(x)


COMMON = {
    "Conv": stand_in("Conv", lambda self, x: self.act(self.bn(self.conv(x))), "conv bn act"),
    "Bottleneck": stand_in("Bottleneck", bottleneck, "cv1 cv2", "add"),
    "C3": stand_in("C3", csp, "cv1 cv2 cv3 m"),
    "SPPF": stand_in("SPPF", pyramid, "cv1 cv2 m"),
    "Concat": stand_in("Concat", lambda self, maps: torch.cat(maps, self.d), "", "d"),
    "SE": stand_in("SE", tutorial_se, "avgpool l1 relu l2 sig"),
}


class Detect(StandIn):
    plain = frozenset(["nc", "no", "nl", "na", "grid", "anchor_grid", "inplace", "stride"])
    parts = frozenset({"m"})
    buffers_ = frozenset({"anchors"})
    offset = 0.5  # in the cached grid

    def forward(self, maps: list[Tensor]) -> Tensor:
        assert isinstance(self.grid, list) and isinstance(self.anchor_grid, list)
        levels = []
        for i, x in enumerate(maps):
            b, _, h, w = x.shape
            y = self.m[i](x).view(b, self.na, self.no, h, w).permute(0, 1, 3, 4, 2).contiguous()
            if self.grid[i].shape[2:4] != (h, w):
                self.grid[i], self.anchor_grid[i] = self.make_grid(i, h, w)
            y = y.sigmoid()
            xy = (y[..., :2] * 2 - (0.5 - self.offset) + self.grid[i]) * self.stride[i]
            wh = (y[..., 2:4] * 2) ** 2 * self.anchor_grid[i]
            levels.append(torch.cat((xy, wh, y[..., 4:]), 4).view(b, -1, self.no))
        return torch.cat(levels, 1)

    def make_grid(self, i: int, h: int, w: int) -> tuple[Tensor, Tensor]:
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        grid = torch.stack((x, y), 2).float().expand(1, self.na, h, w, 2) - self.offset
        return grid, (self.anchors[i] * self.stride[i]).view(1, self.na, 1, 1, 2).expand(1, self.na, h, w, 2)

    def _apply(self, fn: Any, recurse: bool = True) -> Detect:
        super()._apply(fn, recurse)
        self.stride = fn(self.stride)
        self.grid, self.anchor_grid = list(map(fn, self.grid)), list(map(fn, self.anchor_grid))
        return self


class OldDetect(Detect):
    offset = 0.0  # v6.0 subtracts it when it decodes


class Model(StandIn):
    plain = frozenset(["yaml", "yaml_file", "save", "names", "inplace", "stride", "nc", "hyp"])
    parts = frozenset({"model"})

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Any] = []
        for m in self.model:
            if m.f != -1:
                x = kept[m.f] if isinstance(m.f, int) else [x if j == -1 else kept[j] for j in m.f]
            x = m(x)
            kept.append(x if m.i in self.save else None)
        return x


def classes(version: str) -> dict[str, Any]:
    """What the repository of one version defines, with the tutorial's SE, by dotted name."""
    found: dict[str, Any] = {f"models.common.{name}": kind for name, kind in COMMON.items()}
    found["models.yolo.Detect"] = OldDetect if version == "v6.0" else Detect
    found["models.yolo.Model"] = Model
    if version == "v7.0":
        found["models.yolo.DetectionModel"] = Model
    return found


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, version: str, more: dict[str, Any]) -> None:
        super().__init__(archive.open("archive/data.pkl"), encoding="utf-8")
        self.archive = archive
        self.known = {
            **classes(version),
            **more,
            "collections.OrderedDict": OrderedDict,
            "__builtin__.set": set,
            "torch._utils._rebuild_tensor_v2": lambda flat, offset, size, stride, *_: flat.as_strided(
                size, stride, offset
            ),
            "torch._utils._rebuild_parameter": lambda tensor, grad, _: nn.Parameter(tensor, grad),
        }

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if module.startswith("torch.nn.modules."):
            return getattr(nn, name)
        return self.known[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, place, numel = pid
        assert kind == "storage" and place == "cpu"
        raw = self.archive.read(f"archive/data/{key}")
        assert len(raw) == numel * dtype.itemsize
        return torch.frombuffer(bytearray(raw), dtype=dtype)


def load(path: str | Path, version: str, more: dict[str, Any] | None = None) -> dict[str, Any]:
    """The content of a file as that version's `torch.load` gives it; `more` are classes pasted into it."""
    with zipfile.ZipFile(path) as archive:
        assert archive.read("archive/version").strip() == b"3"
        return _Unpickler(archive, version, more or {}).load()


class BuiltConv(COMMON["Conv"]):  # type: ignore[misc]
    """The block as code pasted into YOLOv5 builds it, and as a file names it."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, p: int | None = None, g: int = 1, act: Any = True):
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2 if p is None else p, groups=g, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = act if isinstance(act, nn.Module) else nn.SiLU() if act else nn.Identity()
