"""The parts of one training run: what is frozen, the loaders, the trainer, and the state a run goes on from."""

from __future__ import annotations

import argparse
import os
import random
import shutil
from collections.abc import Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch import nn

from utils.augmentations import TRANSFORMS
from utils.autoanchor import AnchorHyp, judge_anchors, write_anchors
from utils.config import UserError, owned
from utils.data import DatasetSpec
from utils.dataloaders import (
    ImageDataset,
    Loader,
    LoaderOptions,
    build_loader,
    build_validation_loader,
    wanted_workers,
)
from utils.device_cache import DeviceLoader
from utils.distributed import is_main, rank, world_size
from utils.engine import Trainer, TrainOptions, autocast_dtype
from utils.images import Cache
from utils.loss import LossHyp, scale_gains
from utils.optim import EarlyStopping, ModelEMA, OptimHyp, Schedule, build_optimizer
from utils.runtime import LOGGER
from utils.tasks import task_of

HYP_OWNERS: tuple[type, ...] = (OptimHyp, LossHyp, AnchorHyp, *TRANSFORMS)  # every hyper-parameter is a field of one
MAX_PATH = 4096  # bytes, Linux's own limit


def freeze_(layers: Sequence[nn.Module], wanted: Sequence[int]) -> list[nn.Module]:
    """Stop the training of layers: of the first N for `[N]`, else of exactly those listed; returns them.

    Raises:
        UserError: a number no layer has, or nothing left to train.
    """
    numbers = list(range(wanted[0])) if len(wanted) == 1 else sorted(set(wanted))
    wrong = [i for i in numbers if not 0 <= i < len(layers)]
    if wrong:
        raise UserError(f"--freeze: there is no layer {wrong[0]}; the network has layers 0 to {len(layers) - 1}.")
    for i in numbers:
        layers[i].requires_grad_(False)
    if not any(p.requires_grad for layer in layers for p in layer.parameters()):
        raise UserError("--freeze: nothing is left to train. Freeze fewer layers.")
    if numbers:
        LOGGER.info(f"Frozen layers: {', '.join(map(str, numbers))}")
    return [layers[i] for i in numbers]


def build_loaders(
    spec: DatasetSpec, options: argparse.Namespace, hyp: Mapping[str, float], stride: int, device: torch.device
) -> tuple[Loader | DeviceLoader, ImageDataset, Loader | None]:
    """The training loader, the dataset behind it, and on the main process the validation loader.

    Validation has twice the batch: without gradients it needs less memory. With `--cache device` the training images
    are kept and made into batches on `device`.
    """
    common: dict[str, Any] = dict(
        imgsz=options.imgsz,
        stride=stride,
        single_cls=options.single_cls,
        workers=wanted_workers(options.workers, device.type),
        max_pixels=options.max_megapixels * 1_000_000,
        skip_bad=options.skip_bad,
    )
    cache: Cache | None = options.cache if options.cache in ("ram", "disk") else None
    per_process = options.batch_size // world_size()
    train_options = LoaderOptions(
        **common,
        batch_size=per_process,
        rect=options.rect,
        augment=True,
        hyp=hyp,
        # a mosaic reads every image four times an epoch, validation once: the memory is better left free
        cache="auto" if options.cache is None else cache,
        seed=options.seed,
        shuffle=not options.rect,
        rank=max(rank(), 0),
        world_size=world_size(),
        prefix="train: ",
    )
    loader: Loader | DeviceLoader
    loader, dataset = build_loader(spec, spec.split("train"), train_options)
    if options.cache == "device":
        loader = DeviceLoader(dataset, train_options, device)
    if not is_main():
        return loader, dataset, None
    val_cache: Cache | None = "ram" if options.cache == "val" else cache
    return loader, dataset, build_validation_loader(spec, "val", **common, batch_size=2 * per_process, cache=val_cache)


def fit_anchors_(
    head: Any, dataset: ImageDataset, options: argparse.Namespace, hyp: Mapping[str, float], *, keep: bool
) -> None:
    """Replace the head's anchors where others fit the labels clearly better, unless they are to be kept; logs which."""
    rng = np.random.default_rng(options.seed)
    labels, shapes_hw = dataset.labels_list, dataset.shapes_hw
    check = judge_anchors(head, labels, shapes_hw, options.imgsz, thr=hyp["anchor_t"], keep=keep, rng=rng)
    for warning in check.warnings:
        LOGGER.warning(warning)
    LOGGER.info("\n".join(check.messages))
    if check.changed:
        write_anchors(head, check.anchors)


def build_trainer(
    model: Any,
    loader: Sized,
    options: argparse.Namespace,
    hyp: Mapping[str, float],
    frozen: Sequence[nn.Module] = (),
    faster: Sequence[nn.Module] = (),
    factor: float = 1.0,
) -> Trainer:
    """Optimizer, schedule, loss, precision and average around a model that is on its device, anchors final.

    The modules in `faster` learn at `factor` times the rate: see build_optimizer. Sets `model.hyp` to the gains
    scaled for its levels, classes and image size, which the loss reads.
    """
    device = next(model.parameters()).device
    optim_hyp = owned(OptimHyp, hyp)
    model.hyp = scale_gains(hyp, model.head.nl, model.head.nc, options.imgsz)
    wrapped: nn.Module = model
    if world_size() > 1:
        ids = [device.index] if device.type == "cuda" else None
        wrapped = nn.parallel.DistributedDataParallel(model, device_ids=ids)
    if options.compile:
        wrapped = _compiled(wrapped, device)
    epoch_options = TrainOptions(
        epochs=options.epochs,
        imgsz=options.imgsz,
        stride=max(int(model.stride.max()), 32),
        seed=options.seed,
        multi_scale=options.multi_scale,
        world_size=world_size(),
        progress=is_main(),
    )
    return Trainer(
        model=wrapped,
        optimizer=build_optimizer(
            model, options.optimizer, optim_hyp, options.batch_size, faster=faster, factor=factor
        ),
        schedule=Schedule(optim_hyp, options.epochs, len(loader), options.batch_size, cosine=options.cos_lr),
        compute_loss=task_of(model).make_loss(model),
        device=device,
        options=epoch_options,
        ema=ModelEMA(model) if is_main() else None,
        frozen=frozen,
        dtype=autocast_dtype(device),
    )


def _compiled(network: nn.Module, device: torch.device) -> nn.Module:
    """The same parameters behind `torch.compile`, which works at the first batch of each size.

    Measured on a CPU (yolov5n at 320 pixels, bf16, one thread): 400 s, while the machine was busy with other things,
    for 22.8 ms of CPU an image instead of 22.4. On CUDA it was never measured.

    Raises:
        UserError: a CPU, for which C++ is generated, without a compiler.
    """
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++", "cl"))):
        raise UserError("--compile needs a C++ compiler on a CPU, and none was found. Install g++, or leave it out.")
    LOGGER.info("--compile: the first batch of each size takes minutes.")
    return torch.compile(network)  # type: ignore[return-value]


def fit_batch_size(model: nn.Module, imgsz: int, device: torch.device, *, fraction: float = 0.8) -> int:
    """The batch size that fills `fraction` of the free CUDA memory in training, from a line through small batches."""
    sizes: list[int] = []
    used: list[int] = []
    free = torch.cuda.mem_get_info(device)[0]
    model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for size in (1, 2, 4, 8, 16):
        torch.cuda.reset_peak_memory_stats(device)
        try:
            images = torch.zeros(size, 3, imgsz, imgsz, device=device).to(memory_format=torch.channels_last)
            with torch.autocast("cuda", torch.float16):
                outputs = model(images)
            torch.stack([level.float().mean() for level in outputs]).sum().backward()
        except torch.cuda.OutOfMemoryError:
            break
        finally:
            model.zero_grad(set_to_none=True)
        sizes.append(size)
        used.append(torch.cuda.max_memory_allocated(device))
    model.load_state_dict(state)  # the passes moved batch-norm statistics
    torch.cuda.empty_cache()
    if len(sizes) < 2:
        raise UserError(f"--batch-size -1: not even two images of {imgsz} pixels fit the GPU. Lower --imgsz.")
    slope, offset = np.polyfit(sizes, used, 1)
    batch = int(np.clip((free * fraction - offset) / slope, 1, 1024)) if slope > 0 else 16
    return batch if len(sizes) == 5 else min(batch, sizes[-1])


# --------------------------------------------------------------------------------------------------------------- state


def training_state(trainer: Trainer, model: nn.Module, stopping: EarlyStopping) -> dict[str, Any]:
    """Everything `restore_` needs to go on bit for bit, as tensors and plain data; for the process that averages."""
    assert trainer.ema is not None
    return {
        "model": model.state_dict(),
        "ema": trainer.ema.ema.state_dict(),
        "updates": trainer.ema.updates,
        "optimizer": trainer.optimizer.state_dict(),
        "schedule": {"scaler": trainer.scaler.state_dict(), "stopping": stopping.state_dict()},
        "rng": random_state(),
    }


def restore_(trainer: Trainer, stopping: EarlyStopping, state: Mapping[str, Any]) -> None:
    """Set optimizer, averages, loss scale, early stopping and random states; the model has its weights already."""
    stored, groups = state["optimizer"], trainer.optimizer.param_groups
    # The run may go on where other kernels are right: those of the CPU refuse the loss scale of CUDA.
    kernels = [{key: group[key] for key in ("foreach", "fused")} for group in groups]
    merged = [{**old, **new} for old, new in zip(stored["param_groups"], kernels, strict=True)]
    trainer.optimizer.load_state_dict({**stored, "param_groups": merged})
    if state["schedule"]["scaler"]:  # empty where the run did not train in fp16
        trainer.scaler.load_state_dict(state["schedule"]["scaler"])
    stopping.load_state_dict(state["schedule"]["stopping"])
    if trainer.ema is not None:
        trainer.ema.ema.load_state_dict(state["ema"])
        trainer.ema.updates = int(state["updates"])
    restore_random_state_(state["rng"])


def random_state() -> dict[str, Any]:
    """Every global random state as tensors and plain data, for a checkpoint."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, torch.tensor(numbers), gauss],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state_(state: Mapping[str, Any]) -> None:
    """Set every global random state to a checkpoint's."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
