"""From image files and labels to batches: reading, caching, the training pipeline, sharding, collating.

What happens to a sample depends only on (seed, epoch, index): not on the order or number of workers, on how often the
run was resumed, or on how many processes train together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import itertools
import math
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from utils import augmentations as aug
from utils.augmentations import Example, Image, letterboxed
from utils.boxes import Letterbox, cxcywhn_to_xyxy, xyxy_to_cxcywhn
from utils.config import UserError, display_path, owned
from utils.data import DatasetSpec
from utils.distributed import rank_zero_first
from utils.forks import CAN_FORK
from utils.images import MAX_PIXELS, Cache, ImageError, ImageGone, ImageStore, num_cpus
from utils.labels import refuse_unusable, scan
from utils.runtime import LOGGER
from utils.samples import Samples

Floats = npt.NDArray[np.floating[Any]]

FAILURES_SHOWN = 3
WORKERS = 8  # most loader processes where --workers is not given and the network runs on an accelerator
EDGE = 1e-3  # pixels; training boxes end this far inside the right and bottom edge


# ------------------------------------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class LoaderOptions:
    """How batches are made. `batch_size` is per process; `hyp` holds the transforms' hyper-parameters.

    `rect` sorts the images by aspect ratio and gives each batch the smallest shape that holds them plus `pad` strides,
    in whole strides. Mosaics need square images, so there are none with `rect`, and no shuffling.
    """

    imgsz: int
    batch_size: int
    stride: int = 32
    augment: bool = False
    hyp: Mapping[str, float] | None = None
    rect: bool = False
    pad: float = 0.0
    cache: Cache | None = None
    single_cls: bool = False
    workers: int = 8
    seed: int = 0
    shuffle: bool = False
    rank: int = 0
    world_size: int = 1
    max_pixels: int = MAX_PIXELS
    skip_bad: bool = False  # go on where more than a tenth of the images cannot be used
    prefix: str = ""


@dataclass(frozen=True)
class Batch:
    """Images uint8 `(B, 3, h, w)` RGB and everything known about them.

    `targets` are float32 `(N, 6)` [image, class, cx, cy, w, h], boxes in 0..1 of the batch's images. A letterbox is
    None where the image was augmented, for then no single step leads back to the file. `failed` says what is wrong with
    images that could not be decoded, and that something else stands for.
    """

    images: Tensor
    targets: Tensor
    letterboxes: list[Letterbox | None]
    paths: list[str]
    indices: list[int]
    failed: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; torch's loader calls this."""
        return dataclasses.replace(self, images=self.images.pin_memory(), targets=self.targets.pin_memory())


@dataclass(frozen=True)
class _Item:
    image: Image
    labels: Floats  # (n, 5) [class, cx, cy, w, h] in 0..1 of the image
    letterbox: Letterbox | None
    path: str
    index: int
    failed: list[str]


# ------------------------------------------------------------------------------------------------------------- dataset


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The source of every random choice about one sample in one epoch."""
    return np.random.default_rng([seed % 2**63, epoch, index])


class ImageDataset(torch.utils.data.Dataset[Any]):
    """Samples by `(epoch, index)`. With `rect`, index counts in order of aspect ratio.

    A scan does not decode every image. In the place of one that turns out to be damaged training takes the next one
    that is not, wherever it is wanted; validation takes a grey picture with the same labels, all of which count as
    missed, so that no damage can raise the mAP. The loader names them.

    A UserError (an image that is gone since the scan) is returned in place of the item, because torch would wrap one
    that is raised in a worker; the loader raises it.
    """

    def __init__(self, samples: Samples, options: LoaderOptions) -> None:
        self.options = options
        self.batch_size = min(options.batch_size, len(samples))
        if options.rect:
            ratio = samples.shapes_hw[:, 0] / samples.shapes_hw[:, 1]
            order = rect_order(samples.shapes_hw)
            samples = samples.take(order)
            self.batch_shapes = rect_shapes(ratio[order], self.batch_size, options)
        self.samples = samples
        if options.cache == "auto" and options.workers and not CAN_FORK:
            options = self.options = dataclasses.replace(options, cache=None)  # workers could not share it
        self.store = ImageStore(
            samples.paths,
            samples.shapes_hw,
            options.imgsz,
            smooth=not options.augment,
            cache=options.cache,
            processes=options.world_size,
            max_pixels=options.max_pixels,
            prefix=options.prefix,
        )
        hyp = options.hyp or {}
        self.perspective = owned(aug.RandomPerspective, hyp)
        self.mosaic, self.mixup = owned(aug.Mosaic, hyp), owned(aug.MixUp, hyp)
        self.copy_paste = owned(aug.CopyPaste, hyp)
        self.image_transforms: list[aug.ImageTransform] = [owned(transform, hyp) for transform in aug.IMAGE_TRANSFORMS]
        if options.augment and self.copy_paste.copy_paste and not len(samples.segments):
            LOGGER.warning(f"{options.prefix}copy_paste is set, but no label is a polygon: there is nothing to paste.")

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def labels_list(self) -> list[Floats]:
        """Per image `(n, 5)` [class, cx, cy, w, h] in 0..1."""
        return [self.samples.labels[i] for i in range(len(self.samples))]

    @property
    def shapes_hw(self) -> npt.NDArray[np.int64]:
        """`(n, 2)` height and width of the image files."""
        return self.store.shapes_hw

    def __getitem__(self, key: tuple[int, int]) -> _Item | UserError:
        epoch, index = key
        failed: list[str] = []
        try:
            if not self.options.augment:
                return self._plain(index, failed)
            return self._augmented(index, sample_rng(self.options.seed, epoch, index), failed)
        except UserError as error:
            return error

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[_Item | UserError]:
        """A batch's samples; torch's loader calls this. Outside of workers as many threads make them as torch uses.

        OpenCV decodes and warps without holding the interpreter's lock.
        """
        threads = 1 if torch.utils.data.get_worker_info() is not None else min(torch.get_num_threads(), len(keys))
        if threads < 2:
            return [self[key] for key in keys]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self.__getitem__, keys))

    def _plain(self, index: int, failed: list[str]) -> _Item:
        example, fitted = self._fitted(index, failed, scaleup=False)
        return self._item(index, example, fitted, failed)

    def _augmented(self, index: int, rng: np.random.Generator, failed: list[str]) -> _Item:
        if not self.options.rect and rng.random() < self.mosaic.mosaic:
            example = self._mosaic(index, rng, failed)
            share = self.mixup.sample(rng)
            if share is not None:
                other = self._mosaic(int(rng.integers(len(self))), rng, failed)
                example = self.mixup.apply(example, other, share)
        else:
            example = self.perspective(self._fitted(index, failed, scaleup=True)[0], rng)
        for transform in self.image_transforms:
            example = transform(example, rng)
        return self._item(index, example, None, failed)

    def _mosaic(self, index: int, rng: np.random.Generator, failed: list[str]) -> Example:
        size = self.options.imgsz
        layout = self.mosaic.sample(rng, size, index, len(self))
        example = self.mosaic.apply([self._resized(i, failed) for i in layout.indices], layout.centre_xy, size)
        return self.perspective(self.copy_paste(example, rng), rng, (size, size))

    def _resized(self, index: int, failed: list[str]) -> Example:
        index, image = self._image(index, failed)
        return self.labelled(index, image, image.shape[1], image.shape[0], (0.0, 0.0))

    def _image(self, index: int, failed: list[str]) -> tuple[int, Image]:
        """The image that stands at `index`, resized, and which one it is; what was wrong with others joins `failed`."""
        for other in itertools.chain(range(index, len(self)), range(index)):
            try:
                return other, self.store.load(other)
            except ImageGone:
                raise
            except ImageError as error:
                failed.append(str(error))
            if not self.options.augment:
                return index, np.full((*self.store.resized_hw(index), 3), aug.FILL, np.uint8)
        raise UserError(f"{self.options.prefix}none of the {len(self)} images can be decoded. {failed[0]}")

    def _fitted(self, index: int, failed: list[str], *, scaleup: bool) -> tuple[Example, Letterbox]:
        options = self.options
        size_hw = self.batch_shapes[index // self.batch_size] if options.rect else (options.imgsz, options.imgsz)
        index, image = self._image(index, failed)
        padded, fitted = letterboxed(image, size_hw, scaleup=scaleup)
        height, width = image.shape[:2]
        example = self.labelled(index, padded, width * fitted.scale, height * fitted.scale, fitted.pad_xy)
        original_h, original_w = self.shapes_hw[index].tolist()
        # one scale for both axes, the height's, as in YOLOv5: rounding up the shorter side makes them differ a little
        scale = fitted.scale * height / original_h
        return example, dataclasses.replace(fitted, scale=scale, original_hw=(original_h, original_w))

    def labelled(self, index: int, image: Image, width: float, height: float, pad_xy: tuple[float, float]) -> Example:
        """The image with its labels, whose 0..1 spans `width` and `height` pixels from `pad_xy` on."""
        labels = self.samples.labels[index]
        boxes = np.concatenate((labels[:, :1], cxcywhn_to_xyxy(labels[:, 1:], width, height, *pad_xy)), 1)
        segments = self.samples.polygons(index)
        scale, shift = np.array((width, height), np.float32), np.array(pad_xy, np.float32)
        return Example(image, boxes, tuple(polygon * scale + shift for polygon in segments))

    def _item(self, index: int, example: Example, fitted: Letterbox | None, failed: list[str]) -> _Item:
        labels = normalized(example.boxes, example.shape_hw)
        return _Item(example.image, labels, fitted, self.store.path(index), index, failed)


def normalized(boxes: Floats, shape_hw: tuple[int, int]) -> Floats:
    """Boxes `(n, 5)` [class, x1, y1, x2, y2] in pixels of an image as [class, cx, cy, w, h] in 0..1."""
    height, width = shape_hw
    return np.concatenate((boxes[:, :1], xyxy_to_cxcywhn(boxes[:, 1:], width, height, clip=True, eps=EDGE)), 1)


def rect_order(shapes_hw: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Indices of images `(n, 2)` in order of height / width; of equal ratios the larger image first, then as they came.

    Which of many equal ratios end in which batch decides how much grey surrounds them. YOLOv5 leaves that to NumPy's
    unstable sort, which differs between processors; on coco128 with yolov5n, 300 random orders of the ties spread mAP50
    by 0.002 and precision by 0.007 (standard deviations). Any fixed order is as right; of some twenty, this one was
    taken because its figures are within 0.002 of those measured with YOLOv5 (by name, precision is 0.006 off).
    """
    return np.lexsort((-shapes_hw.prod(1), shapes_hw[:, 0] / shapes_hw[:, 1]))


def rect_shapes(ratios: Floats, batch_size: int, options: LoaderOptions) -> list[tuple[int, int]]:
    """Height and width of each batch of images whose sorted ratios height / width are given."""
    shapes = []
    for start in range(0, len(ratios), batch_size):
        low, high = ratios[start], ratios[min(start + batch_size, len(ratios)) - 1]
        relative_hw = (high, 1.0) if high < 1 else (1.0, 1 / low) if low > 1 else (1.0, 1.0)
        strides = (math.ceil(side * options.imgsz / options.stride + options.pad) for side in relative_hw)
        height, width = (number * options.stride for number in strides)
        shapes.append((height, width))
    return shapes


def collate(items: Sequence[_Item | UserError]) -> Batch | UserError:
    """The items as one batch, each image written once to its place; the first error instead, where there is one."""
    good = [item for item in items if isinstance(item, _Item)]
    for item in items:
        if isinstance(item, UserError):
            return item
    height, width = good[0].image.shape[:2]
    images = np.empty((len(good), 3, height, width), np.uint8)
    for place, item in zip(images, good):
        cv2.split(item.image, [place[2], place[1], place[0]])  # BGR to RGB, into the batch: a tenth of NumPy's time
    targets = targets_of([item.labels for item in good])
    letterboxes, paths = [item.letterbox for item in good], [item.path for item in good]
    indices, failed = [item.index for item in good], [message for item in good for message in item.failed]
    return Batch(torch.from_numpy(images), targets, letterboxes, paths, indices, failed)


def targets_of(labels: Sequence[Floats]) -> Tensor:
    """Every image's labels `(n, 5)` as the targets of a batch, float32 `(N, 6)` with the image's number before."""
    numbers = np.repeat(np.arange(len(labels), dtype=np.float32), [len(rows) for rows in labels])
    return torch.from_numpy(np.concatenate((numbers[:, None], np.concatenate(labels)), 1).astype(np.float32))


# -------------------------------------------------------------------------------------------------------------- loader


class BatchOrder:
    """Which `(epoch, index)` pairs make up each batch of this process.

    Processes see parts of the same permutation, which is filled up with its own beginning until all have equally many.
    With `rect` whole batches are dealt out, for each has a shape of its own.
    """

    def __init__(self, num_samples: int, options: LoaderOptions) -> None:
        self.num_samples, self.options, self.epoch = num_samples, options, 0
        self.batch_size = min(options.batch_size, num_samples)

    def _batches(self) -> list[npt.NDArray[np.int64]]:
        options, count = self.options, self.num_samples
        order = np.arange(count)
        if options.shuffle and not options.rect:
            order = sample_rng(options.seed, self.epoch, count).permutation(count)  # no sample has the index `count`
        if options.rect:
            batches = _chunks(order, self.batch_size)
            total = math.ceil(len(batches) / options.world_size) * options.world_size
            return [batches[i % len(batches)] for i in range(options.rank, total, options.world_size)]
        total = math.ceil(count / options.world_size) * options.world_size
        return _chunks(np.resize(order, total)[options.rank :: options.world_size], self.batch_size)

    def __len__(self) -> int:
        options = self.options
        if options.rect:
            return math.ceil(math.ceil(self.num_samples / self.batch_size) / options.world_size)
        return math.ceil(math.ceil(self.num_samples / options.world_size) / self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        for batch in self._batches():
            yield [(epoch, index) for index in batch.tolist()]


def _chunks(order: npt.NDArray[np.int64], size: int) -> list[npt.NDArray[np.int64]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


class Loader:
    """Iterates over the `Batch`es of the epoch last set; workers live on between epochs, until `close`."""

    def __init__(self, dataset: ImageDataset, options: LoaderOptions) -> None:
        self.dataset, self._options = dataset, options
        self._order = BatchOrder(len(dataset), options)
        self.num_workers = num_workers(options, len(self._order))
        if dataset.store.in_memory and not CAN_FORK and self.num_workers:
            LOGGER.info(f"{options.prefix}cached images cannot be shared with workers on this system: using none.")
            self.num_workers = 0
        self._named: set[str] = set()
        self._loader = self._make_loader()

    def _make_loader(self) -> DataLoader[Any]:
        workers = self.num_workers
        # a validation batch is used once and is large: one in advance per worker is enough, and keeps memory low
        ahead = (2 if self._options.augment or workers == 1 else 1) if workers else None
        return DataLoader(
            self.dataset,
            batch_sampler=self._order,  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_start_worker,
            multiprocessing_context="fork" if workers and CAN_FORK else None,
            prefetch_factor=ahead,
            persistent_workers=workers > 0,
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        self._order.epoch = epoch

    def close(self) -> None:
        """End the workers now; iterating again starts new ones.

        Left to the garbage collector it may take torch five seconds a worker.
        """
        self._loader = self._make_loader()

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Batch]:
        failed: dict[str, None] = {}
        try:
            for batch in self._start():
                if isinstance(batch, UserError):
                    raise batch
                failed.update(dict.fromkeys(batch.failed))
                yield batch
        except (UserError, RuntimeError, ConnectionError, EOFError) as error:
            self.close()
            if not self.num_workers or not _tells_of_lost_worker(error):
                raise
            raise UserError(
                f"{self._options.prefix}a loader process was ended from outside, most likely for want of memory."
                f" Give fewer --workers than {self.num_workers}, or leave out --cache ram; with --workers 0 there are"
                " no loader processes."
            ) from None
        self._name([message for message in failed if message not in self._named])

    def _start(self) -> Iterator[Batch | UserError]:
        """Torch's iterator, made without its handler of SIGCHLD.

        That would raise the end of a worker wherever the main thread happens to be. The loader itself finds it, too,
        where it waits for a batch, at most five seconds later.
        """
        main_thread = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGCHLD) if main_thread and sys.platform != "win32" else None
        with warnings.catch_warnings():
            # Python 3.12+ warns of any fork beside threads; workers use neither torch's nor OpenCV's
            warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
            batches = iter(self._loader)
        if before is not None:
            signal.signal(signal.SIGCHLD, before)
        return batches

    def _name(self, failed: Sequence[str]) -> None:
        """Say once which images could not be decoded, and what became of them."""
        if not failed:
            return
        self._named.update(failed)
        fate = "others took their places" if self._options.augment else "judged as grey, their objects as missed"
        more = f" ... and {len(failed) - FAILURES_SHOWN} more." if len(failed) > FAILURES_SHOWN else ""
        LOGGER.warning(
            f"{self._options.prefix}{len(failed)} of the images passed the scan but cannot be decoded; {fate}: "
            f"{' '.join(failed[:FAILURES_SHOWN])}{more}"
        )


def _tells_of_lost_worker(error: Exception) -> bool:
    """Whether torch says that a worker is gone, or a connection to one broke; no for what a worker raised."""
    if isinstance(error, ConnectionError | EOFError):
        return not str(error).startswith("Caught")
    return str(error).startswith("DataLoader worker (pid")


def _start_worker(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's, which then ends its workers
    cv2.setNumThreads(0)  # as many workers as cores: threads would only get in each other's way
    gc.freeze()  # the collector would otherwise write to, and so copy, every page shared with the parent


def wanted_workers(given: int | None, device_type: str) -> int:
    """How many worker processes at most: what was `given`, else WORKERS for an accelerator and none for a CPU.

    Workers beside a network on the same cores make both wait: on 2 cores, three epochs of yolov5n over coco128 at 320
    pixels and batch 16, start included, took 18.7 s with two workers, 19.3 s with one and 15.7 s with none.
    """
    return given if given is not None else 0 if device_type == "cpu" else WORKERS


def num_workers(options: LoaderOptions, num_batches: int) -> int:
    """How many worker processes: the wanted number, at most one per core of each GPU's share and one per batch.

    A worker makes whole batches, so where there is only one batch, or one image in each, workers cannot help.
    """
    if num_batches < 2 or options.batch_size < 2:
        return 0
    per_process = num_cpus() // max(torch.cuda.device_count(), options.world_size, 1)
    return max(min(per_process, options.batch_size, options.workers, num_batches), 0)


def build_loader(spec: DatasetSpec, sources: Sequence[Path], options: LoaderOptions) -> tuple[Loader, ImageDataset]:
    """Batches of the images in `sources` (folders, lists, files) labelled for `spec`, and the dataset behind them.

    Raises:
        UserError: no image at all, more than a tenth of them unusable (without `skip_bad`), or training images without
            a single label.
    """
    with rank_zero_first() if options.world_size > 1 else contextlib.nullcontext():
        found = scan(sources, spec, single_cls=options.single_cls, max_pixels=options.max_pixels, prefix=options.prefix)
    places = ", ".join(display_path(source) for source in sources)
    if not options.skip_bad:
        refuse_unusable(found, spec, places)
    if not found.samples:
        detail = f" {found.messages[0]}" if found.messages else ""
        raise UserError(f"{display_path(spec.path)}: no usable image in {places}.{detail}")
    if options.augment and not len(found.samples.labels.flat):
        raise UserError(
            f"{display_path(spec.path)}: none of the {len(found.samples)} images in {places} has a label. They are "
            "looked for in a folder `labels` beside `images`, in .txt files named after the images."
        )
    if options.rect and options.shuffle:
        LOGGER.warning(f"{options.prefix}--rect keeps the images in order of their shape: not shuffled.")
    dataset = ImageDataset(found.samples, options)
    return Loader(dataset, options), dataset


def build_validation_loader(spec: DatasetSpec, task: str, **options: Any) -> Loader:
    """Batches of a split as YOLOv5's protocol for mAP has them: rectangular, with half a stride of grey around.

    `options` are those of `LoaderOptions`; they may replace the two.
    """
    how = LoaderOptions(**{"rect": True, "pad": 0.5, "prefix": f"{task}: ", **options})
    return build_loader(spec, spec.split(task), how)[0]


# -------------------------------------------------------------------------------------------- for other people's code

FORWARDED = dict.fromkeys(
    (
        "IMG_FORMATS",
        "VID_FORMATS",
        "LoadImages",
        "LoadImagesAndLabels",
        "LoadScreenshots",
        "LoadStreams",
        "create_dataloader",
        "exif_size",
        "exif_transpose",
        "img2label_paths",
        "letterbox",
    ),
    "utils.datasets",
)


def __getattr__(name: str) -> Any:
    """A name from a room to the right, loaded when the name is first used."""
    if name in FORWARDED:
        return getattr(importlib.import_module(FORWARDED[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
