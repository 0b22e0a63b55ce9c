"""The two loops: `evaluate` judges a network on a loader, `train_one_epoch` takes it through one epoch.

Both take any module that answers like a detection network, and never wait for an accelerator more often than needed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.augmentations import multi_scale_size
from utils.boxes import cxcywhn_to_xyxy, undo_letterbox
from utils.config import UserError
from utils.data import DatasetSpec
from utils.dataloaders import Batch, build_validation_loader
from utils.inference import DetectOptions, Detector, restore, to_float
from utils.metrics import IOU_THRESHOLDS, APResult, AveragePrecision, ConfusionMatrix
from utils.optim import ModelEMA, Schedule
from utils.progress import Bar, EpochRow
from utils.runtime import native_bf16
from utils.tasks import DETECT, ComputesLoss

TABLE_COLUMNS = ("Class", "Images", "Instances", *DETECT.table)
TABLE_HEADER = ("%22s" + "%11s" * 6) % TABLE_COLUMNS


# ---------------------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class EvalOptions:
    """How detections are made and judged; the defaults are YOLOv5's protocol for mAP."""

    num_classes: int
    conf_thres: float = 0.001
    iou_thres: float = 0.6
    max_det: int = 300
    augment: bool = False
    single_cls: bool = False
    hybrid: bool = False  # labels join the detections before NMS, for labelling with help
    confusion: bool = False
    progress: bool = True


@dataclass(frozen=True)
class EvalResult:
    """What `evaluate` found: precision and recall, losses (box, obj, cls; zeros without a loss) and ms per image."""

    ap: APResult
    losses: tuple[float, float, float]
    times_ms: tuple[float, float, float]  # pre-process, inference, NMS
    seen: int
    confusion: ConfusionMatrix | None
    maps: np.ndarray  # (num_classes,) mAP50-95 per class; a class without labels gets the mean

    @property
    def summary(self) -> tuple[float, float, float, float, float, float, float]:
        """Precision, recall, mAP50, mAP50-95, then the three losses: the order of results.csv."""
        ap = self.ap
        return (float(ap.mean_precision), float(ap.mean_recall), float(ap.map50), float(ap.map), *self.losses)

    @property
    def fitness(self) -> float:
        """The number by which checkpoints are compared."""
        return self.ap.fitness


@dataclass(frozen=True)
class ImageResult:
    """One image's detections `(k, 6)` [xyxy, conf, class] and labels `(n, 5)` [class, xyxy], in pixels of the file."""

    path: str
    shape_hw: tuple[int, int]
    detections: Tensor
    truth: Tensor


OnBatch = Callable[[int, Batch, list[Tensor]], None]  # batch number, batch, detections in its letterboxed pixels
OnImage = Callable[[ImageResult], None]


def _labels(batch: Batch, device: torch.device) -> list[Tensor]:
    """Every image's labels `(n, 5)` [class, cx, cy, w, h] in pixels of the batch, as NMS takes them."""
    height, width = batch.images.shape[-2:]
    targets = batch.targets.to(device)
    rows = torch.cat((targets[:, 1:2], targets[:, 2:6] * targets.new_tensor((width, height, width, height))), 1)
    return _by_image(rows, targets[:, 0], len(batch.images))


def _by_image(rows: Tensor, image_index: Tensor, num_images: int) -> list[Tensor]:
    """Rows handed out to the images they belong to; one pass over all of them instead of one per image."""
    order = torch.argsort(image_index, stable=True)
    counts = torch.bincount(image_index.long(), minlength=num_images)
    return list(rows[order].split(counts.tolist()))


def _native(batch: Batch, detections: list[Tensor]) -> Iterator[ImageResult]:
    """Every image's detections and labels on the CPU, in pixels of the file. One transfer for the whole batch."""
    height, width = batch.images.shape[-2:]
    letterboxes = [box for box in batch.letterboxes if box is not None]
    assert len(letterboxes) == len(batch), "evaluation needs to know how each image was letterboxed"
    targets = batch.targets.cpu()
    boxes = cxcywhn_to_xyxy(targets[:, 2:6], width, height)
    truths = _by_image(torch.cat((targets[:, 1:2], boxes), 1), targets[:, 0], len(batch.images))
    found = restore(detections, letterboxes)
    for path, letterbox, rows, truth in zip(batch.paths, letterboxes, found, truths):
        truth = torch.cat((truth[:, :1], undo_letterbox(truth[:, 1:], letterbox)), 1)
        yield ImageResult(path, letterbox.original_hw, rows, truth)


def labels_to_draw(batch: Batch) -> list[Tensor]:
    """Every image's labels `(n, 5)` [class, xyxy] in pixels of the batch, as pictures want them."""
    height, width = batch.images.shape[-2:]
    targets = batch.targets.cpu()
    boxes = torch.cat((targets[:, 1:2], cxcywhn_to_xyxy(targets[:, 2:6], width, height)), 1)
    return _by_image(boxes, targets[:, 0], len(batch.images))


def detections_to_draw(detections: list[Tensor], confidence: float = 0.25) -> list[Tensor]:
    """Every image's confident detections `(k, 6)` [class, xyxy, conf] on the CPU, as pictures want them."""
    sure = [rows[rows[:, 4] > confidence].float().cpu() for rows in detections]
    return [torch.cat((rows[:, 5:6], rows[:, :5]), 1) for rows in sure]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    options: EvalOptions,
    *,
    compute_loss: ComputesLoss | None = None,
    on_batch: OnBatch | None = None,
    on_image: OnImage | None = None,
) -> EvalResult:
    """Detections of `model` on every batch, judged against the labels in pixels of the original images.

    The model is left in evaluation mode. The loss is that of the raw outputs, averaged over batches as in training;
    it needs `augment=False`. Numbers do not depend on the time anything takes: NMS has no time limit.
    """
    model.eval()
    how = DetectOptions(
        conf_thres=options.conf_thres,
        iou_thres=options.iou_thres,
        max_det=options.max_det,
        agnostic=options.single_cls,
        multi_label=True,
        augment=options.augment,
    )
    detector = Detector(model, how, keep_raw=compute_loss is not None)
    average, thresholds = AveragePrecision(options.num_classes), torch.tensor(IOU_THRESHOLDS)
    confusion = ConfusionMatrix(options.num_classes) if options.confusion else None
    losses = torch.zeros(len(DETECT.losses), device=detector.device)
    seen = batches = 0
    bar = Bar(loader, "Validating", show=options.progress)
    for batches, batch in enumerate(bar, 1):
        known = _labels(batch, detector.device) if options.hybrid else []
        detections, raw = detector(batch.images, labels=known)
        if options.single_cls:
            for rows in detections:
                rows[:, 5] = 0  # judged, drawn and written as the one class
        if compute_loss is not None:
            losses += compute_loss(raw, batch.targets.to(detector.device))[1]
        if on_batch is not None:
            on_batch(batches - 1, batch, detections)
        for image in _native(batch, detections):
            correct = DETECT.match(image.detections, image.truth, thresholds)
            average.update(correct, image.detections[:, 4], image.detections[:, 5], image.truth[:, 0])
            if confusion is not None:
                confusion.update(image.detections, image.truth)
            if on_image is not None:
                on_image(image)
            seen += 1
    ap = average.compute()
    box, objectness, classes = (losses / max(batches, 1)).tolist()
    maps = ap.maps(options.num_classes)
    return EvalResult(ap, (box, objectness, classes), detector.times_ms, seen, confusion, maps)


def judge(
    network: nn.Module,
    spec: DatasetSpec,
    task: str,
    options: EvalOptions,
    *,
    imgsz: int,
    batch_size: int,
    on_batch: OnBatch | None = None,
    on_image: OnImage | None = None,
    **loading: Any,
) -> EvalResult:
    """Judge a network (see `models.backends`) on a split: `evaluate` on the protocol's batches of `imgsz` pixels.

    `loading` are further `LoaderOptions`. A network made for one input size or batch gets square images and that batch.
    """
    batch_size = getattr(network, "batch_size", None) or batch_size
    stride = max(int(torch.as_tensor(network.stride).max()), 32)  # type: ignore[arg-type]
    if getattr(network, "size_hw", None) is not None:
        loading = {"rect": False, **loading}
    loader = build_validation_loader(
        spec, task, imgsz=imgsz, batch_size=batch_size, stride=stride, single_cls=options.single_cls, **loading
    )
    try:
        return evaluate(network, loader, options, on_batch=on_batch, on_image=on_image)
    finally:
        loader.close()


def table_rows(result: EvalResult, names: Mapping[int, str], *, per_class: bool) -> list[str]:
    """The lines below `TABLE_HEADER`: all classes together, then one per class that has labels."""
    row = "%22s" + "%11i" * 2 + "%11.3g" * 4
    ap = result.ap
    total = int(np.sum(ap.instances))
    lines = [row % ("all", result.seen, total, ap.mean_precision, ap.mean_recall, ap.map50, ap.map)]
    if per_class:
        for i, c in enumerate(np.asarray(ap.classes, dtype=int).tolist()):
            values = (ap.precision[i], ap.recall[i], ap.ap[i, 0], ap.ap[i].mean())
            lines.append(row % (names[c], result.seen, ap.instances[i], *values))
    return lines


# ------------------------------------------------------------------------------------------------------------ training

ACCELERATOR_LOG_INTERVAL = 20  # batches between two reads of the losses: each read waits for the device
MAX_GRADIENT_NORM = 10.0
OnTrainBatch = Callable[[int, Batch], None]


class NonFiniteLoss(UserError):
    """The loss became nan or infinite; the message names the batch's images."""


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The lower precision to train in: fp16 on CUDA, bf16 on a CPU that has it, else none."""
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if device.type == "cpu" and native_bf16() else None


@dataclass(frozen=True)
class TrainOptions:
    """How an epoch is run; sizes in pixels."""

    epochs: int
    imgsz: int
    stride: int = 32
    seed: int = 0
    multi_scale: bool = False
    world_size: int = 1
    progress: bool = True


@dataclass
class Trainer:
    """The parts of a training that an epoch moves. `model` may be wrapped for distributed training."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    compute_loss: ComputesLoss
    device: torch.device
    options: TrainOptions
    ema: ModelEMA | None = None
    frozen: Sequence[nn.Module] = ()  # their parameters do not train; their batch norms keep their statistics too
    dtype: torch.dtype | None = None  # of autocast
    scaler: torch.amp.GradScaler = field(init=False)
    row: EpochRow | None = field(default=None, init=False)  # what the log says of the epoch so far

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def precision(self) -> torch.dtype:
        """Of the network's input."""
        return self.dtype or torch.float32

    def start_epoch_(self) -> None:
        """Training mode, except for the statistics of frozen batch norms; no gradients."""
        self.model.train()
        for part in self.frozen:
            for module in part.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        self.optimizer.zero_grad(set_to_none=True)

    def loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of one batch and its three items; the network in lower precision where there is one."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            predictions = self.model(images)
        total, items = self.compute_loss(predictions, targets)
        return total * self.options.world_size, items  # distributed gradients are averaged: undo that

    def step_(self) -> None:
        """One optimizer step on clipped gradients, then the average."""
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRADIENT_NORM, foreach=self.device.type != "mps")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update()


class LossMonitor:
    """Running means of the losses; on an accelerator they are read, and checked, once per interval."""

    def __init__(self, device: torch.device) -> None:
        self.interval = 1 if device.type == "cpu" else ACCELERATOR_LOG_INTERVAL
        self.total, self.count = np.zeros(len(DETECT.losses)), 0
        self._waiting: list[tuple[Tensor, list[str]]] = []

    @property
    def mean(self) -> np.ndarray:
        """Mean box, objectness and class loss of the batches read so far."""
        return self.total / max(self.count, 1)

    def add(self, items: Tensor, paths: list[str], *, last: bool) -> bool:
        """Note one batch; whether the waiting ones were read now.

        Raises:
            NonFiniteLoss: naming the images of the first batch whose loss is not a finite number.
        """
        self._waiting.append((items, paths))
        if len(self._waiting) < self.interval and not last:
            return False
        values = torch.stack([items for items, _ in self._waiting]).cpu().double().numpy()  # the device sync
        bad = np.flatnonzero(~np.isfinite(values).all(1))
        if len(bad):
            box, objectness, classes = values[bad[0]]
            raise NonFiniteLoss(
                f"the loss is not finite (box {box:g}, obj {objectness:g}, cls {classes:g}) on a batch of these "
                f"images: {', '.join(self._waiting[bad[0]][1])}. Look at their labels, or lower lr0 (--hyp)."
            )
        self.total += values.sum(0)
        self.count += len(values)
        self._waiting.clear()
        return True


def train_one_epoch(
    trainer: Trainer, loader: Iterable[Batch], epoch: int, *, on_batch: OnTrainBatch | None = None
) -> np.ndarray:
    """Take the network through one epoch; the mean box, objectness and class losses `(3,)`.

    Raises:
        NonFiniteLoss: on a CPU before the weights are touched, on an accelerator within the logging interval.
    """
    schedule, options = trainer.schedule, trainer.options
    steps = schedule.steps_in(epoch)
    monitor = LossMonitor(trainer.device)
    trainer.start_epoch_()
    trainer.row = EpochRow(epoch, options.epochs)
    bar = Bar(loader, trainer.row, total=len(steps), show=options.progress)
    for index, batch in enumerate(bar):
        schedule.apply_(trainer.optimizer, epoch * len(steps) + index)
        # Bytes become the network's precision at once where nothing stands between: the same numbers, fewer passes.
        images = to_float(batch.images, trainer.device, torch.float32 if options.multi_scale else trainer.precision)
        if options.multi_scale:
            images = rescale(images, options, np.random.default_rng((options.seed, epoch, index)))
        targets = batch.targets.to(trainer.device, non_blocking=True)
        # Gradients of a started accumulation stay on their process; only the batch that steps exchanges them.
        no_sync = getattr(trainer.model, "no_sync", None) if not steps[index] else None
        with no_sync() if no_sync is not None else contextlib.nullcontext():
            loss, items = trainer.loss(images, targets)
            read = monitor.add(items, batch.paths, last=index == len(steps) - 1)
            trainer.scaler.scale(loss).backward()
        if steps[index]:
            trainer.step_()
        if on_batch is not None:
            on_batch(index, batch)
        if read:
            memory = torch.cuda.memory_reserved(images.device) / 1e9 if images.is_cuda else 0.0
            losses = tuple(monitor.mean.tolist())
            trainer.row = bar.title = EpochRow(epoch, options.epochs, memory, losses, len(targets), images.shape[-1])
    return monitor.mean


def rescale(images: Tensor, options: TrainOptions, rng: np.random.Generator) -> Tensor:
    """The batch resized to a random multiple of the stride between half and one and a half times `imgsz`."""
    factor = multi_scale_size(options.imgsz, options.stride, rng) / max(images.shape[-2:])
    height, width = (math.ceil(side * factor / options.stride) * options.stride for side in images.shape[-2:])
    if (height, width) == tuple(images.shape[-2:]):
        return images
    return nn.functional.interpolate(images, size=(height, width), mode="bilinear", align_corners=False)
