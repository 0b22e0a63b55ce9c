"""YOLOv5's `utils.torch_utils`, for other people's code: its names and arguments over what we have.

Nothing of ours imports this file.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as pruning

from models.augment import rescale
from models.common import Conv
from models.measure import Size
from utils import distributed, optim, runtime
from utils.general import intersect_dicts

__all__ = ["intersect_dicts"]  # up to v6.1 it is found here


def select_device(device: str | torch.device = "", batch_size: int | None = 0, newline: bool = True) -> torch.device:
    """See `utils.runtime`: the device that `''`, `cpu`, `0`, `cuda:1` or `mps` stands for; the choice is logged."""
    runtime.setup_logging()
    return runtime.select_device(device, batch_size or 0)


def time_sync() -> float:
    """The clock in seconds, once CUDA is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.time()


time_synchronized = time_sync  # its name up to v5


def smart_inference_mode() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: the function runs in inference mode."""
    return torch.inference_mode()


@contextlib.contextmanager
def torch_distributed_zero_first(local_rank: int) -> Iterator[None]:
    """Let rank 0 run the block before the others; nothing happens in a single process, whose `local_rank` is -1."""
    with distributed.rank_zero_first() if local_rank != -1 else contextlib.nullcontext():
        yield


# ------------------------------------------------------------------------------------------------------------- networks


def is_parallel(model: nn.Module) -> bool:
    """Whether the network is wrapped for several devices."""
    return isinstance(model, (nn.parallel.DataParallel, nn.parallel.DistributedDataParallel))


def de_parallel(model: Any) -> Any:
    """The network inside the wrapper, or the network."""
    return model.module if is_parallel(model) else model


def initialize_weights(model: nn.Module) -> None:
    """Set every batch norm's `eps` and `momentum` as YOLOv5 trains them, and its activations to work in place."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps, layer.momentum = 1e-3, 0.03
        elif isinstance(layer, (nn.Hardswish, nn.LeakyReLU, nn.ReLU, nn.ReLU6, nn.SiLU)):
            layer.inplace = True


def find_modules(model: nn.Module, mclass: type[nn.Module] = nn.Conv2d) -> list[int]:
    """Numbers of the layers in `model.module_list` that are of a class."""
    return [index for index, layer in enumerate(model.module_list) if isinstance(layer, mclass)]  # type: ignore[arg-type]


def fuse_conv_and_bn(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> nn.Conv2d:
    """A new convolution that computes what `bn(conv(x))` does in inference; see `Conv.fuse_`."""
    pair = Conv(1, 1)
    pair.conv, pair.bn = copy.deepcopy(conv), bn
    pair.fuse_()
    return pair.conv


def model_info(model: nn.Module, verbose: bool = False, imgsz: int | Sequence[int] = 640) -> None:
    """Log the summary line; with `verbose` also a line for each parameter: name, shape, mean, standard deviation."""
    runtime.setup_logging()
    if verbose:
        runtime.LOGGER.info(
            f"{'layer':>5} {'name':>40} {'gradient':>9} {'parameters':>12} {'shape':>20} {'mu':>10} {'sigma':>10}"
        )
        for number, (name, p) in enumerate(model.named_parameters()):
            shape, (spread, mean) = str(list(p.shape)), torch.std_mean(p.detach().float(), correction=0)
            line = (
                f"{number:5} {name:>40} {p.requires_grad!s:>9} {p.numel():12} {shape:>20} {mean:10.3g} {spread:10.3g}"
            )
            runtime.LOGGER.info(line)
    network = de_parallel(model)
    if hasattr(network, "info"):
        network.info(imgsz if isinstance(imgsz, int) else (imgsz[0], imgsz[-1]))
        return
    size = Size.of(network)
    counts = f"{size.layers:,} layers, {size.parameters:,} parameters, {size.gradients:,} gradients"
    runtime.LOGGER.info(f"Model summary: {counts}")


def scale_img(img: Tensor, ratio: float = 1.0, same_shape: bool = False, gs: int = 32) -> Tensor:
    """Images (B, C, H, W) resized by `ratio`, padded with grey to a multiple of `gs`, or with `same_shape` not."""
    if not same_shape or ratio == 1:
        return rescale(img, ratio, gs)
    size = int(img.shape[2] * ratio), int(img.shape[3] * ratio)
    return nn.functional.interpolate(img, size=size, mode="bilinear", align_corners=False)


def copy_attr(a: Any, b: Any, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
    """Set `b`'s attributes on `a`: those in `include` (all, where it is empty), not private ones, none in `exclude`."""
    for name, value in vars(b).items():
        if not (include and name not in include) and not name.startswith("_") and name not in exclude:
            setattr(a, name, value)


def sparsity(model: nn.Module) -> float:
    """The share of weights that are zero."""
    parameters = list(model.parameters())
    return float(sum((p == 0).sum() for p in parameters) / sum(p.numel() for p in parameters))


def prune(model: nn.Module, amount: float = 0.3) -> None:
    """Set the smallest `amount` of every convolution's weights to zero, in place."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            pruning.l1_unstructured(layer, name="weight", amount=amount)
            pruning.remove(layer, "weight")
    runtime.LOGGER.info(f"Model pruned to {sparsity(model):.3g} global sparsity")


# ------------------------------------------------------------------------------------------------------------- training


def smart_optimizer(
    model: nn.Module, name: str = "Adam", lr: float = 0.001, momentum: float = 0.9, decay: float = 1e-5
) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, Adam or AdamW; groups are biases, weights (the only ones that decay), norms' weights.

    `decay` is taken as it is: scale it to the batch before.
    """
    biases, weights, scales = optim.parameter_groups(model)
    groups: list[dict[str, Any]] = [{"params": biases}, {"params": weights, "weight_decay": decay}, {"params": scales}]
    if name == "SGD":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=True, weight_decay=0.0)
    kind = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[name]
    return kind(groups, lr=lr, betas=(momentum, 0.999), weight_decay=0.0)


class ModelEMA(optim.ModelEMA):
    """`utils.optim`'s average, whose `update` is told the network each time."""

    def __init__(self, model: nn.Module, decay: float = 0.9999, tau: float = 2000, updates: int = 0) -> None:
        self._followed = de_parallel(model)
        super().__init__(self._followed, decay=decay, tau=tau, updates=updates)

    def decay_at(self, updates: int) -> float:
        """As ours; `decay` may also be a function of the number of updates."""
        return self.decay(updates) if callable(self.decay) else super().decay_at(updates)

    def update(self, model: nn.Module | None = None) -> None:
        """Take the network's present weights into the average."""
        network = self._followed if model is None else de_parallel(model)
        if network is not self._followed:
            theirs = network.state_dict()
            floats = [name for name, value in self.ema.state_dict().items() if value.dtype.is_floating_point]
            self._followed, self._sources = network, [theirs[name] for name in floats]
        super().update()

    def update_attr(
        self, model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ("process_group", "reducer")
    ) -> None:
        """Set the network's attributes on the average; see `copy_attr`."""
        copy_attr(self.ema, model, include, exclude)


class EarlyStopping(optim.EarlyStopping):
    """`utils.optim`'s, as a function: whether to stop after this epoch. `patience` 0 never stops."""

    def __init__(self, patience: int = 30) -> None:
        super().__init__(patience)
        self.possible_stop = False

    def __call__(self, epoch: int, fitness: float) -> bool:
        self.update(epoch, fitness)
        limit = self.patience or math.inf
        self.possible_stop = epoch - self.best_epoch >= limit - 1
        if self.stop:
            runtime.LOGGER.info(f"Stopping early: no better result in the last {self.patience} epochs.")
        return self.stop
