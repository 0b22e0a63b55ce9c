"""How large and how fast a network is: operations, the summary's counts, milliseconds per layer and per step."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.runtime import LOGGER, Stopwatch


@dataclass(frozen=True)
class Size:
    """Counts of a network."""

    layers: int  # modules without children
    parameters: int
    gradients: int  # parameters that train

    @classmethod
    def of(cls, module: nn.Module) -> Size:
        parameters = list(module.parameters())
        return cls(
            layers=sum(1 for m in module.modules() if not list(m.children())),
            parameters=sum(p.numel() for p in parameters),
            gradients=sum(p.numel() for p in parameters if p.requires_grad),
        )


def gflops(module: nn.Module, channels: int, size_hw: tuple[int, int], stride: int) -> float:
    """Billions of operations for one image (channels, h, w): two per multiply-accumulate, as thop counts those.

    Convolutions cost in proportion to the area and gates a constant, so two small images give both terms exactly, in a
    hundredth of the time of a pass at 640 pixels.
    """
    like = next(module.parameters())
    sides = (stride, 2 * stride)
    small, large = (_count(module, torch.zeros(1, channels, side, side).to(like)) for side in sides)
    per_area = (large - small) / (3 * stride**2)
    return small + per_area * (size_hw[0] * size_hw[1] - stride**2)


def _count(module: nn.Module, x: Any) -> float:
    """Billions of operations of one call on a copy: thop leaves counters behind in what it measures."""
    from thop import profile  # only summaries need it

    macs, _ = profile(copy.deepcopy(module), inputs=(x,), verbose=False)
    return macs * 2 / 1e9


def profile_layer(layer: Any, x: Any, *, header: bool) -> float:
    """Log a layer's milliseconds (mean of 10 calls), GFLOPs and parameters; the milliseconds are returned."""
    maps = x if isinstance(x, list) else [x]
    watch = Stopwatch(maps[0].device)
    layer(x)
    with watch:
        for _ in range(10):
            layer(x)
    first = [m[:1] for m in maps]
    operations = _count(layer, first if isinstance(x, list) else first[0])
    if header:
        LOGGER.info(f"{'time (ms)':>10} {'GFLOPs':>10} {'params':>10}  module")
    LOGGER.info(f"{watch.seconds * 100:>10.2f} {operations:>10.2f} {layer.np:>10}  {layer.type}")
    return watch.seconds * 100


@torch.inference_mode()
def latencies(models: Sequence[nn.Module], images: Sequence[Tensor], rounds: int = 50) -> list[list[float]]:
    """Milliseconds of a forward pass of each network with its images, one per round.

    The networks take turns within every round, in another order each time, so that what slows the machine down for a
    while slows all of them.
    """
    times: list[list[float]] = [[] for _ in models]
    for number in range(rounds + 3):  # the first three warm up
        for index in np.random.default_rng(number).permutation(len(models)):
            watch = Stopwatch(images[index].device)
            with watch:
                models[index](images[index])
            if number >= 3:
                times[index].append(watch.seconds * 1e3)
    return times


@torch.inference_mode()
def image_memory(model: nn.Module, images: Tensor) -> float | None:
    """MB that a forward pass needs at its peak beside what was there before it; None where that cannot be read.

    On CUDA it is what the allocator handed out. On a CPU it is how far the process grew, which Linux alone tells, and
    only a process that has not freed much before grows by as much as it needs: measure each network in one of its own.
    """
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats(images.device)
        before = torch.cuda.memory_allocated(images.device)
        model(images)
        return (torch.cuda.max_memory_allocated(images.device) - before) / 2**20
    reset = Path("/proc/self/clear_refs")
    if images.device.type != "cpu" or not os.access(reset, os.W_OK):
        return None
    reset.write_text("5", encoding="ascii")  # "the peak is what is resident now", says proc(5)
    resident = _peak_resident()
    model(images)
    return _peak_resident() - resident


def _peak_resident() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**10


def profile_training(model: nn.Module, images: Tensor) -> None:
    """Log the milliseconds of forward and of backward, means of 10 steps after one to warm up."""
    forward, backward = Stopwatch(images.device), Stopwatch(images.device)
    model.train()
    for step in range(11):
        if step == 1:
            forward.seconds = backward.seconds = 0.0
        with forward:
            raw = model(images)
        with backward:
            levels = raw[0] if isinstance(raw, tuple) else raw
            sum(level.float().mean() for level in levels).backward()
        model.zero_grad()
    LOGGER.info(f"forward {forward.seconds * 100:.2f} ms, backward {backward.seconds * 100:.2f} ms")
