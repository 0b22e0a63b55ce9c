"""Training images as uint8 on the device, and whole batches made there: `train.py --cache device`.

The host draws what happens to a sample from the same generators, in the same order as `ImageDataset` does, and moves
the labels: they are the same bit for bit. It uploads a kilobyte per image; from these the device makes the pixels with
gathers and arithmetic over the whole batch, and the host waits for nothing.

Pixels are those of the host's path but for the rounding of the warp. The device interpolates in float32 at exact
coordinates, as OpenCV 5 does: fewer than one value in 1,000 differs, by 1 (of coco128 at 640 pixels 1 to 3 in 10,000).
OpenCV 4 rounds coordinates to 1/32 pixel: values differ by at most 8, one in twelve differs at all. Mixup, colours and
flips are OpenCV's exactly; but where a colour is nearly grey, a difference of 1 before it is changed is more after it.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from utils.augmentations import FILL, HSV, Example, Flip, Warp
from utils.config import UserError
from utils.dataloaders import (
    FAILURES_SHOWN,
    Batch,
    BatchOrder,
    ImageDataset,
    LoaderOptions,
    normalized,
    sample_rng,
    targets_of,
)
from utils.distributed import rank
from utils.images import CACHE_MARGIN, ImageError, ImageGone, available_memory, num_cpus
from utils.progress import Bar
from utils.runtime import LOGGER

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]

AHEAD = 2  # batches whose parameters are drawn in advance, by a thread
CHUNK_PIXELS = 2**21  # made at a time: the warp's intermediate tensors take some 250 bytes a pixel
HUES = 180  # of OpenCV's 8-bit HSV
COLOUR_BYTES = 2**24 * 4 + HUES * 2**16 * 3


# ------------------------------------------------------------------------------------------------ what is to be made


@dataclass(frozen=True, eq=False)
class View:
    """A square picture of a canvas on which up to four resized images meet at a centre.

    `tiles` `(4, 4)` has a row per image, in reading order: the number that pixel (0, 0) of the canvas would have in the
    cache if the image reached there, the image's width, and how far it reaches from the centre on the canvas, in x and
    y. `matrix` `(3, 3)` leads from pixels of the picture to those of the canvas.
    """

    tiles: Ints
    centre_xy: tuple[int, int]
    matrix: Floats


@dataclass(frozen=True, eq=False)
class Plan:
    """All that happens to one sample: a view, or two to be mixed, colours `(256, 3)` and flips; and its labels."""

    views: tuple[View, ...]
    share: float
    colours: npt.NDArray[np.uint8] | None
    up_left: tuple[bool, bool]
    labels: Floats  # (n, 5) [class, cx, cy, w, h] in 0..1


class Planner:
    """Draws the plans of samples, as `ImageDataset` draws what it does to them at once.

    `starts[i]` is the number of the first pixel of image i in the cache, `shown[i]` the image that stands at i.
    """

    def __init__(self, dataset: ImageDataset, starts: Ints, shown: Sequence[int]) -> None:
        self.dataset, self.starts, self.shown = dataset, starts, shown
        self.size = dataset.options.imgsz

    def __call__(self, epoch: int, index: int) -> Plan:
        """The plan of a sample, which depends on (seed, epoch, index) alone."""
        data, share = self.dataset, 1.0
        second: tuple[View, ...] = ()
        rng = sample_rng(data.options.seed, epoch, index)
        if rng.random() < data.mosaic.mosaic:
            first, boxes = self._mosaic(index, rng)
            drawn = data.mixup.sample(rng)
            if drawn is not None:
                share = drawn
                other, more = self._mosaic(int(rng.integers(len(data))), rng)
                boxes, second = np.concatenate((boxes, more)), (other,)
            example = Example(_blank(self.size, self.size), boxes)
        else:
            first, example = self._fitted(index, rng)
        colours, up_left = None, (False, False)
        for transform in data.image_transforms:
            if isinstance(transform, HSV):
                factors = transform.sample(rng)
                colours = None if factors is None else transform.table(factors)
            elif isinstance(transform, Flip):
                up_left = transform.sample(rng)
        boxes = Flip.labels(example, up_left)[0]
        return Plan((first, *second), share, colours, up_left, normalized(boxes, example.shape_hw))

    def _resized(self, index: int) -> tuple[int, Example]:
        index = self.shown[index]
        height, width = self.dataset.store.resized_hw(index)
        return index, self.dataset.labelled(index, _blank(height, width), width, height, (0.0, 0.0))

    def _mosaic(self, index: int, rng: np.random.Generator) -> tuple[View, Floats]:
        data, size = self.dataset, self.size
        layout = data.mosaic.sample(rng, size, index, len(data))
        indices, examples = zip(*map(self._resized, layout.indices))
        corners = data.mosaic.corners(examples, layout.centre_xy)
        tiles = [
            self._tile(index, corner_xy, layout.centre_xy, place, 2 * size)
            for place, (index, corner_xy) in enumerate(zip(indices, corners, strict=True))
        ]
        canvas = Example(_blank(2 * size, 2 * size), *data.mosaic.labels(examples, layout.centre_xy, size))
        warp = data.perspective.sample(rng, canvas.shape_hw, (size, size))
        assert warp is not None, "a canvas of twice the size is always warped"
        return View(np.array(tiles), layout.centre_xy, _inverse(warp)), data.perspective.boxes(canvas, warp)

    def _fitted(self, index: int, rng: np.random.Generator) -> tuple[View, Example]:
        """A single image, whose longer side is the size already, on grey; see `augmentations.letterboxed`."""
        data, size = self.dataset, self.size
        index = self.shown[index]
        height, width = data.store.resized_hw(index)
        pad_xy = (size - width) / 2, (size - height) / 2
        example = data.labelled(index, _blank(size, size), width, height, pad_xy)
        left, top = round(pad_xy[0] - 0.1), round(pad_xy[1] - 0.1)
        centre_xy = left + width, top + height  # the one image reaches left and up from there
        tile = self._tile(index, (left, top), centre_xy, 0, size)
        warp = data.perspective.sample(rng, example.shape_hw, example.shape_hw)
        matrix = np.eye(3) if warp is None else _inverse(warp)
        if warp is not None:
            example = Example(example.image, data.perspective.boxes(example, warp))
        return View(np.array((tile, *[(0, 0, 0, 0)] * 3)), centre_xy, matrix), example

    def _tile(
        self, index: int, corner_xy: tuple[int, int], centre_xy: tuple[int, int], place: int, side: int
    ) -> tuple[int, int, int, int]:
        """A row of `View.tiles`: an image with its top left pixel at a corner, on a canvas of `side`."""
        (height, width), (x, y), (centre_x, centre_y) = self.dataset.store.resized_hw(index), corner_xy, centre_xy
        reach_x = min(x + width, side) - centre_x if place % 2 else centre_x - max(x, 0)
        reach_y = min(y + height, side) - centre_y if place >= 2 else centre_y - max(y, 0)
        return int(self.starts[index]) - y * width - x, width, reach_x, reach_y


def _blank(height: int, width: int) -> npt.NDArray[np.uint8]:
    """A picture of one byte, for what looks at its shape only."""
    return np.broadcast_to(np.uint8(0), (height, width, 3))


def _inverse(warp: Warp) -> Floats:
    return np.linalg.inv(warp.matrix)


# ------------------------------------------------------------------------------------------------------- on the device


def pack(plans: Sequence[Plan], size: int) -> list[npt.NDArray[Any]]:
    """What the device needs to make the images of B plans with n views, m of them second ones; items never grow.

    - tiles `(n, 4, 4)` and centres `(n, 2)` of the first views of all plans, then the second ones
    - the plans to which these belong `(m,)`, and the batch's places among first views and then mixtures `(B,)`
    - matrices `(n, 3, 3)`; of both axes of a view where its first pixel lies, and the step to the next `(n, 2, 2)`
    - shares of both views in a mixture `(m, 2)`; colours `(B, 3, 256)`, or none at all
    """
    mixed = [number for number, plan in enumerate(plans) if len(plan.views) > 1]
    order = np.arange(len(plans), dtype=np.int64)
    order[mixed] = len(plans) + np.arange(len(mixed))
    owners = [*range(len(plans)), *mixed]
    views = [*(plan.views[0] for plan in plans), *(plans[number].views[1] for number in mixed)]
    mirrors = [[(size - 1, -1) if flip else (0, 1) for flip in plans[i].up_left[::-1]] for i in owners]
    colours = [plan.colours.T for plan in plans if plan.colours is not None]
    shares = [(plans[number].share, 1 - plans[number].share) for number in mixed]
    return [
        np.array([view.tiles for view in views], np.int64),
        np.array([view.centre_xy for view in views], np.int64),
        np.array(mixed, np.int64),
        order,
        np.array([view.matrix for view in views], np.float32),
        np.array(mirrors, np.float32),
        np.array(shares, np.float32).reshape(-1, 2),
        np.array(colours, np.uint8).reshape(-1, 3, 256),
    ]


def joined(arrays: Sequence[npt.NDArray[Any]], *, pinned: bool) -> Tensor:
    """The bytes of all arrays, end to end."""
    buffer = torch.empty(sum(array.nbytes for array in arrays), dtype=torch.uint8, pin_memory=pinned)
    np.concatenate([array.reshape(-1).view(np.uint8) for array in arrays], out=buffer.numpy())
    return buffer


def parted(buffer: Tensor, arrays: Sequence[npt.NDArray[Any]]) -> list[Tensor]:
    """The arrays as tensors, out of a buffer with their bytes."""
    parts = buffer.split([array.nbytes for array in arrays])
    return [
        part.view(getattr(torch, array.dtype.name)).view(array.shape) for part, array in zip(parts, arrays, strict=True)
    ]


class DeviceImages:
    """The images of a dataset on a device, RGB uint8 `(pixels, 3)` end to end after one grey pixel.

    With `colours` there are also OpenCV's conversions to HSV and back as tables of all colours, 98 MiB.

    Raises:
        UserError: the device has not enough free memory, an image is gone, or none can be decoded.
    """

    def __init__(self, dataset: ImageDataset, device: torch.device, *, colours: bool) -> None:
        self.dataset, self.device, self.size = dataset, device, dataset.options.imgsz
        count, self.prefix = len(dataset), dataset.options.prefix
        areas = [int(np.prod(dataset.store.resized_hw(index))) for index in range(count)]
        self.starts: Ints = np.cumsum([1, *areas])
        self._check_memory(3 * int(self.starts[-1]) + colours * COLOUR_BYTES)
        self.pixels = torch.empty((int(self.starts[-1]), 3), dtype=torch.uint8, device=device)
        self.pixels[0] = FILL
        broken = self._fill()
        whole = [index for index in range(count) if index not in broken]
        if not whole:
            raise UserError(f"{self.prefix}none of the {count} images can be decoded. {broken[0]}")
        after = np.searchsorted(whole, np.arange(count)) % len(whole)  # in the place of a broken one comes the next
        self.shown: list[int] = np.array(whole)[after].tolist()
        if broken and rank() <= 0:
            more = f" ... and {len(broken) - FAILURES_SHOWN} more." if len(broken) > FAILURES_SHOWN else ""
            LOGGER.warning(
                f"{self.prefix}{len(broken)} of the images passed the scan but cannot be decoded; others took their "
                f"places: {' '.join(list(broken.values())[:FAILURES_SHOWN])}{more}"
            )
        self.tables = tuple(table.to(device) for table in colour_tables()) if colours else None

    def _check_memory(self, needed: int) -> None:
        device = self.device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
        if device.type == "cpu":
            needed, free = needed * self.dataset.options.world_size, available_memory()
        if free is not None and needed * CACHE_MARGIN > free:
            raise UserError(
                f"{self.prefix}--cache device: the images need {needed / 2**30:.1f} GiB of memory on {device}, "
                f"{free / 2**30:.1f} GiB are free, and training needs some too. Use --cache ram, or a smaller --imgsz."
            )

    def _fill(self) -> dict[int, str]:
        """Decode all images into their places; what is wrong with those that cannot be decoded."""
        broken: dict[int, str] = {}

        def fill(index: int) -> None:
            try:
                image = self.dataset.store.load(index)
            except ImageGone:
                raise
            except ImageError as error:
                broken[index] = str(error)
                return
            rows = torch.from_numpy(np.ascontiguousarray(image[..., ::-1]).reshape(-1, 3))
            self.pixels[self.starts[index] : self.starts[index + 1]].copy_(rows)

        text = f"{self.prefix}caching images, {self.pixels.nbytes / 2**30:.2f} GiB on {self.device}"
        with _threads(num_cpus(), self.device) as pool:
            try:
                for _ in Bar(pool.map(fill, range(len(self.dataset))), text, total=len(self.dataset), show=rank() <= 0):
                    pass
            finally:
                pool.shutdown(cancel_futures=True)
        return dict(sorted(broken.items()))

    def batch(self, parts: Sequence[Tensor]) -> Tensor:
        """The images uint8 `(B, 3, size, size)` RGB, channels last, of what `pack` gave, on the device."""
        tiles, centres, mixed, order, matrices, mirrors, shares, colours = parts
        step = max(CHUNK_PIXELS // self.size**2, 1)
        views = zip(*(each.split(step) for each in (tiles, centres, matrices, mirrors)))
        images = torch.cat([self._warped(*each) for each in views])
        count = len(tiles) - len(mixed)
        images, seconds = images[:count], images[count:]
        if len(mixed):  # known to the host; no scatter: its deterministic kernel sorts
            pairs = zip(*(each.split(step) for each in (mixed, seconds, shares)))
            mixtures = [_blended(images.index_select(0, first), second, share) for first, second, share in pairs]
            images = torch.cat((images, *mixtures)).index_select(0, order)
        if self.tables is not None:
            images = torch.cat([self._coloured(*each) for each in zip(images.split(step), colours.split(step))])
        return images.permute(0, 3, 1, 2)

    def _warped(self, tiles: Tensor, centres: Tensor, matrices: Tensor, mirrors: Tensor) -> Tensor:
        """The pictures uint8 `(n, size, size, 3)` of n views."""
        count, size = len(tiles), self.size
        along = mirrors[..., :1] + mirrors[..., 1:] * torch.arange(size, device=self.device)  # (n, 2, size)
        x, y = along[:, 0, None, :], along[:, 1, :, None]
        rows = matrices[..., None, None].unbind(1)
        across, down, depth = (row[:, 0] * x + row[:, 1] * y + row[:, 2] for row in rows)
        canvas_x, canvas_y = ((each / depth).clamp(-2, 2 * size + 1) for each in (across, down))  # grey beyond
        left, top = canvas_x.floor(), canvas_y.floor()
        part_x, part_y = (canvas_x - left)[..., None], (canvas_y - top)[..., None]
        column, line = left.long(), top.long()
        view = 4 * torch.arange(count, device=self.device)[:, None, None]
        columns, lines = [
            [_from_centre(first + step, centre[:, None, None]) for step in (0, 1)]
            for first, centre in zip((column, line), centres.unbind(1))
        ]
        tiles = tiles.flatten(0, 1)

        def pixel(dx: int, dy: int) -> Tensor:
            (x, right, from_x), (y, below, from_y) = columns[dx], lines[dy]
            place = right + 2 * below + view
            origin, width, reach_x, reach_y = tiles.index_select(0, place.flatten()).view(*place.shape, 4).unbind(-1)
            inside = (from_x < reach_x) & (from_y < reach_y)
            index = (origin + y * width + x) * inside  # 0 is the grey pixel
            return self.pixels.index_select(0, index.flatten()).view(*index.shape, 3).float()

        upper = _between(pixel(0, 0), pixel(1, 0), part_x)
        lower = _between(pixel(0, 1), pixel(1, 1), part_x)
        return _between(upper, lower, part_y).round_().to(torch.uint8)

    def _coloured(self, images: Tensor, colours: Tensor) -> Tensor:
        """Images `(n, h, w, 3)` with their hues, saturations and values replaced by `colours` `(n, 3, 256)`."""
        assert self.tables is not None
        to_hsv, from_hsv = self.tables
        shifts = torch.arange(16, -1, -8, device=self.device, dtype=torch.int32)
        replaced = (colours.int() << shifts[:, None]).flatten()
        own = 768 * torch.arange(len(images), device=self.device, dtype=torch.int32)[:, None, None]
        red, green, blue = images.int().unbind(-1)
        hsv = to_hsv.index_select(0, (red << 16 | green << 8 | blue).flatten()).view(images.shape[:-1])
        places = own + (hsv >> 16), own + 256 + (hsv >> 8 & 255), own + 512 + (hsv & 255)
        hue, saturation, value = (replaced.index_select(0, each.flatten()) for each in places)
        return from_hsv.index_select(0, hue + saturation + value).view(images.shape)


def _threads(count: int, device: torch.device) -> ThreadPoolExecutor:
    """Threads whose CUDA device is this one; a new thread's is the first, on which it would take memory."""
    chosen = device.index is not None and device.type == "cuda" and torch.cuda.is_available()
    return ThreadPoolExecutor(count, initializer=partial(torch.cuda.set_device, device) if chosen else None)


def _from_centre(position: Tensor, centre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions along an axis; 1 where they lie beyond the centre, else 0; how many pixels lie between it and them."""
    beyond = (position >= centre).long()
    return position, beyond, torch.where(beyond > 0, position - centre, centre - 1 - position)


def _between(a: Tensor, b: Tensor, part: Tensor) -> Tensor:
    return a + part * (b - a)


def _blended(first: Tensor, second: Tensor, shares: Tensor) -> Tensor:
    """Images `(m, h, w, 3)` mixed by `shares` `(m, 2)`, rounded as OpenCV's `addWeighted` does."""
    one, other = shares[..., None, None, None].unbind(1)
    return (first.float() * one + second.float() * other).round_().to(torch.uint8)


def colour_tables() -> tuple[Tensor, Tensor]:
    """OpenCV's 8-bit conversions as tables.

    From RGB as a number of 24 bits to HSV as such a number, int32 `(2**24,)`; and back, to uint8 `(180 * 2**16, 3)`.
    """
    every = np.arange(2**24, dtype=np.uint32)
    triples = np.stack([(every >> shift).astype(np.uint8) for shift in (16, 8, 0)], -1).reshape(4096, 4096, 3)
    hue, saturation, value = cv2.cvtColor(triples, cv2.COLOR_RGB2HSV).reshape(-1, 3).astype(np.int32).T
    back = cv2.cvtColor(triples[: HUES * 16], cv2.COLOR_HSV2RGB).reshape(-1, 3)
    return torch.from_numpy(hue << 16 | saturation << 8 | value), torch.from_numpy(back)


# -------------------------------------------------------------------------------------------------------------- loader


class DeviceLoader:
    """Iterates over the batches of the epoch last set, as `dataloaders.Loader` does; their images are on the device.

    Every process holds the whole set, for a mosaic may take any of the images. There are no loader processes: a thread
    draws the parameters of the next batches while the network trains.

    Raises:
        UserError: what cannot be done on the device, and everything that `DeviceImages` raises.
    """

    num_workers = 0

    def __init__(self, dataset: ImageDataset, options: LoaderOptions, device: torch.device) -> None:
        assert options.augment and not options.rect, "validation and rectangular batches are made on the host"
        if device.type == "mps":
            raise UserError("--cache device: offered for CUDA and for cpu. Use --cache ram.")
        if dataset.copy_paste.copy_paste:
            raise UserError(
                f"--cache device: copy_paste {dataset.copy_paste.copy_paste:g} (--hyp) is not done on the device. "
                "Set it to 0, or use --cache ram."
            )
        others = [type(each).__name__ for each in dataset.image_transforms if not isinstance(each, HSV | Flip)]
        if others:
            raise UserError(f"--cache device: {others[0]} is not done on the device. Use --cache ram.")
        if device.type == "cpu" and rank() <= 0:
            LOGGER.warning(f"{options.prefix}--cache device is made for GPUs; on a CPU --cache ram is faster.")
        self._device, self._dataset, self._order = device, dataset, BatchOrder(len(dataset), options)
        probe = np.random.default_rng(0)
        colours = any(isinstance(each, HSV) and each.sample(probe) is not None for each in dataset.image_transforms)
        self.images = DeviceImages(dataset, device, colours=colours)
        self.plan = Planner(dataset, self.images.starts, self.images.shown)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        self._order.epoch = epoch

    def close(self) -> None:
        """Nothing is left running between epochs; the images stay."""

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Batch]:
        waiting: deque[Any] = deque()
        with _threads(1, self._device) as pool:
            try:
                for keys in self._order:
                    waiting.append(pool.submit(self._prepare, keys))
                    if len(waiting) > AHEAD:
                        yield self._made(*waiting.popleft().result())
                while waiting:
                    yield self._made(*waiting.popleft().result())
            finally:
                pool.shutdown(cancel_futures=True)

    def _prepare(self, keys: Sequence[tuple[int, int]]) -> tuple[Batch, list[npt.NDArray[Any]], Tensor]:
        """A batch without its images, the arrays that describe these, and their bytes in page-locked memory."""
        options, pinned = self._dataset.options, self._device.type == "cuda" and torch.cuda.is_available()
        plans = [self.plan(epoch, index) for epoch, index in keys]
        indices = [index for _, index in keys]
        paths = [self._dataset.store.path(index) for index in indices]
        targets = targets_of([plan.labels for plan in plans])
        arrays = pack(plans, options.imgsz)
        batch = Batch(torch.empty(0, dtype=torch.uint8), targets, [None] * len(plans), paths, indices)
        return batch.pin_memory() if pinned else batch, arrays, joined(arrays, pinned=pinned)

    def _made(self, batch: Batch, arrays: Sequence[npt.NDArray[Any]], buffer: Tensor) -> Batch:
        parts = parted(buffer.to(self._device, non_blocking=True), arrays)
        return dataclasses.replace(batch, images=self.images.batch(parts))
