"""What moves the weights: parameter groups, the schedule as a pure function of the iteration, EMA, early stopping."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

OPTIMIZERS = ("SGD", "Adam", "AdamW")
MIN_WARMUP_ITERATIONS = 100  # upstream's; see Schedule for what a short run gets


@dataclass(frozen=True)
class OptimHyp:
    """The optimizer's keys in `data/hyps/*.yaml`."""

    lr0: float = field(default=0.01, metadata={"min": 0.0, "max": 10.0})
    lrf: float = field(default=0.01, metadata={"min": 0.0, "max": 1.0})  # last learning rate / lr0
    momentum: float = field(default=0.937, metadata={"min": 0.0, "max": 0.9999})  # beta1 for Adam
    weight_decay: float = field(default=0.0005, metadata={"min": 0.0, "max": 1.0})
    warmup_epochs: float = field(default=3.0, metadata={"min": 0.0})
    warmup_momentum: float = field(default=0.8, metadata={"min": 0.0, "max": 0.9999})
    warmup_bias_lr: float = field(default=0.1, metadata={"min": 0.0, "max": 10.0})
    nominal_batch: float = field(default=64, metadata={"min": 1, "max": 65536})  # images per optimizer step
    short_warmup: float = field(default=1, metadata={"values": (0, 1)})  # at most a third of the run; 0: as YOLOv5
    last_step: float = field(default=1, metadata={"values": (0, 1)})  # at an epoch's end; 0: as YOLOv5, see steps_in


def accumulation(hyp: OptimHyp, batch_size: int) -> int:
    """Batches per optimizer step, so that a step sees about `nominal_batch` images."""
    return max(round(hyp.nominal_batch / batch_size), 1)


def parameter_groups(
    model: nn.Module, without: Iterable[nn.Parameter] = ()
) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters as (biases, weights, normalisation weights), but for some; only the weights decay.

    The order is a file format: optimizer states and `x/lr0` (the biases) to `x/lr2` in results.csv follow it.
    """
    left_out = {id(parameter) for parameter in without}
    norms = tuple(v for k, v in vars(nn).items() if "Norm" in k and isinstance(v, type))
    biases: list[nn.Parameter] = []
    weights: list[nn.Parameter] = []
    scales: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in left_out:
                continue  # frozen: no decay, no momentum, no memory
            group = biases if name == "bias" else scales if isinstance(module, norms) else weights
            group.append(parameter)
    return biases, weights, scales


def build_optimizer(
    model: nn.Module,
    name: str,
    hyp: OptimHyp,
    batch_size: int,
    *,
    faster: Iterable[nn.Module] = (),
    factor: float = 1.0,
) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, Adam or AdamW over three groups, the decay scaled to what a step really sees.

    With a `factor` other than 1 the modules in `faster` learn at so many times the rate of the weights, warm-up
    included, in two groups more: weights that decay, then biases and normalisation weights. Their biases do not begin
    at `warmup_bias_lr`, which is for a head that starts far from its labels.
    """
    apart = nn.ModuleList(faster if factor != 1 else ())
    biases, weights, scales = parameter_groups(model, without=apart.parameters())
    decay = hyp.weight_decay * batch_size * accumulation(hyp, batch_size) / hyp.nominal_batch
    groups = [
        {"params": biases, "weight_decay": 0.0},
        {"params": weights, "weight_decay": decay},
        {"params": scales, "weight_decay": 0.0},
    ]
    if factor != 1:
        own_biases, own_weights, own_scales = parameter_groups(apart)
        groups += [
            {"params": own_weights, "weight_decay": decay, "lr_factor": factor},
            {"params": own_biases + own_scales, "weight_decay": 0.0, "lr_factor": factor},
        ]
    # One kernel for many tensors. Fused ones also take the loss scale without telling the host, so AMP needs no sync.
    cuda = any(p.is_cuda for p in model.parameters())
    kernels: dict[str, Any] = {"fused": True} if cuda else {"foreach": True}
    if name == "SGD":
        return torch.optim.SGD(groups, lr=hyp.lr0, momentum=hyp.momentum, nesterov=hyp.momentum > 0, **kernels)
    kind = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[name]
    return kind(groups, lr=hyp.lr0, betas=(hyp.momentum, 0.999), **kernels)


def describe(optimizer: torch.optim.Optimizer) -> str:
    """The log's line on an optimizer of `build_optimizer`: its kind, first learning rate, and what decays how much.

    >>> describe(build_optimizer(model, "SGD", OptimHyp(), 64))
    'optimizer: SGD(lr=0.01) with parameter groups 57 weight(decay=0.0), 60 weight(decay=0.0005), 60 bias'
    """
    biases, weights, scales, *faster = optimizer.param_groups
    apart = (
        f"; at {faster[0]['lr_factor']:g} times the rate {len(faster[1]['params'])} weight(decay=0.0), "
        f"{len(faster[0]['params'])} weight(decay={faster[0]['weight_decay']:g})"
        if faster
        else ""
    )
    return (
        f"optimizer: {type(optimizer).__name__}(lr={weights['lr']:g}) with parameter groups "
        f"{len(scales['params'])} weight(decay={scales['weight_decay']}), "
        f"{len(weights['params'])} weight(decay={weights['weight_decay']:g}), {len(biases['params'])} bias{apart}"
    )


# ------------------------------------------------------------------------------------------------------------ schedule


@dataclass(frozen=True)
class Setting:
    """What the schedule asks of one iteration."""

    lr: tuple[float, float, float]  # biases, weights, normalisation weights
    momentum: float
    accumulate: int


@dataclass(frozen=True)
class Schedule:
    """Learning rates, momentum and accumulation of every iteration; holds no state, so resuming needs none.

    Upstream's rule: after a linear warm-up the learning rate changes per epoch, linearly or as a cosine, from lr0 to
    lr0 * lrf. Deviation: rates and momentum never warm up for more than a third of the run, where upstream's minimum of
    100 iterations keeps short runs inside the warm-up to their end. The accumulation keeps upstream's length: a short
    run has few steps already. Fine-tuning yolov5n with SE on coco128 for 3 epochs of 8 batches ended at mAP50 0.29 with
    both shortened (9 steps), 0.37 like this (21 steps), 0.36 with upstream's rule, which `short_warmup: 0` gives.
    """

    hyp: OptimHyp
    epochs: int
    batches_per_epoch: int
    batch_size: int
    cosine: bool = False

    @property
    def accumulation_iterations(self) -> int:
        """Over how many iterations the batches per step rise to their final number; 0 where `warmup_epochs` is 0."""
        if self.hyp.warmup_epochs <= 0:
            return 0
        return max(round(self.hyp.warmup_epochs * self.batches_per_epoch), MIN_WARMUP_ITERATIONS)

    @property
    def warmup_iterations(self) -> int:
        """Over how many iterations learning rates and momentum warm up: at most a third of the run."""
        if not self.hyp.short_warmup:
            return self.accumulation_iterations
        return min(self.accumulation_iterations, self.epochs * self.batches_per_epoch // 3)

    def factor(self, epoch: int) -> float:
        """Learning rate / lr0 of an epoch after the warm-up."""
        done = epoch / self.epochs
        if self.cosine:
            return (1 - math.cos(math.pi * done)) / 2 * (self.hyp.lrf - 1) + 1
        return (1 - done) * (1 - self.hyp.lrf) + self.hyp.lrf

    def at(self, iteration: int) -> Setting:
        """The settings of an iteration, counted from 0 over the whole run."""
        hyp = self.hyp
        lr = hyp.lr0 * self.factor(iteration // self.batches_per_epoch)
        length = self.accumulation_iterations
        ramp = min(iteration / length, 1.0) if length else 1.0
        accumulate = max(round(1 + ramp * (hyp.nominal_batch / self.batch_size - 1)), 1)
        warmup = self.warmup_iterations
        if iteration >= warmup:
            return Setting((lr, lr, lr), hyp.momentum, accumulate)
        done = iteration / warmup
        rising = lr * done
        momentum = hyp.warmup_momentum + done * (hyp.momentum - hyp.warmup_momentum)
        return Setting((hyp.warmup_bias_lr * (1 - done) + rising, rising, rising), momentum, accumulate)

    def steps_in(self, epoch: int) -> list[bool]:
        """Which batches of an epoch end with an optimizer step.

        The last one always does: a started accumulation is used, not dropped, and no gradient outlives its epoch, so
        an epoch can be repeated from a checkpoint bit for bit. With `last_step: 0` it is upstream's rule: gradients of
        an accumulation that an epoch's end cuts off are dropped, and its batches still count towards the next step.
        """
        first = epoch * self.batches_per_epoch
        if not self.hyp.last_step:
            return self._steps_across_epochs[first : first + self.batches_per_epoch]
        flags, waiting = [], 0
        for index in range(self.batches_per_epoch):
            waiting += 1
            step = waiting >= self.at(first + index).accumulate or index == self.batches_per_epoch - 1
            flags.append(step)
            waiting = 0 if step else waiting
        return flags

    @cached_property
    def _steps_across_epochs(self) -> list[bool]:
        """Which batches of the whole run end with a step, where epochs do not."""
        flags, waiting = [], 0
        for iteration in range(self.epochs * self.batches_per_epoch):
            waiting += 1
            flags.append(waiting >= self.at(iteration).accumulate)
            waiting = 0 if flags[-1] else waiting
        return flags

    def apply_(self, optimizer: torch.optim.Optimizer, iteration: int) -> None:
        """Set the optimizer's learning rates, and its momentum where it has one (Adam's betas stay)."""
        setting = self.at(iteration)
        for index, group in enumerate(optimizer.param_groups):
            group["lr"] = setting.lr[index] if index < len(setting.lr) else setting.lr[1] * group["lr_factor"]
            if "momentum" in group:
                group["momentum"] = setting.momentum


# ----------------------------------------------------------------------------------------------------------- averaging


class ModelEMA:
    """An exponential moving average of a model's weights and buffers, which is what gets validated and saved.

    The decay rises as 0.9999 * (1 - exp(-updates / 2000)), so early averages follow the model closely. Make it once
    the model is on its device and in its memory format: the tensors are looked up here, not at every update.
    """

    def __init__(self, model: nn.Module, *, decay: float = 0.9999, tau: float = 2000.0, updates: int = 0) -> None:
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.tau, self.updates = decay, tau, updates
        ours, theirs = self.ema.state_dict(), model.state_dict()
        names = [name for name, value in ours.items() if value.dtype.is_floating_point]
        self._averages: list[Tensor] = [ours[name] for name in names]
        self._sources: list[Tensor] = [theirs[name] for name in names]

    def decay_at(self, updates: int) -> float:
        """The weight of the old average at an update, counted from 1."""
        return self.decay * (1 - math.exp(-updates / self.tau))

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's present weights into the average: one kernel per few hundred tensors."""
        self.updates += 1
        torch._foreach_lerp_(self._averages, self._sources, 1 - self.decay_at(self.updates))


class EarlyStopping:
    """Remembers the best fitness; `stop` once `patience` epochs went by without a strictly better one (0: never)."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best_fitness = -1.0  # below any real one: the first validated epoch counts as best even at 0
        self.best_epoch = 0
        self.stop = False

    def update(self, epoch: int, fitness: float) -> bool:
        """Whether this epoch beats every earlier one; a tie does not."""
        improved = fitness > self.best_fitness
        if improved:
            self.best_fitness, self.best_epoch = fitness, epoch
        self.stop = bool(self.patience) and epoch - self.best_epoch >= self.patience
        return improved

    def state_dict(self) -> dict[str, float]:
        """Plain numbers for the checkpoint."""
        return {"best_fitness": self.best_fitness, "best_epoch": self.best_epoch, "stop": self.stop}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint's numbers."""
        self.best_fitness, self.best_epoch = float(state["best_fitness"]), int(state["best_epoch"])
        self.stop = bool(state["stop"])
