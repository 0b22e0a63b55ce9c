"""YOLOv5's loaders, for other people's code. v6.0 calls this `utils.datasets`; v7.0's `utils.dataloaders` has them too.

Images, videos, streams and the screen come from `utils.sources`, labelled images from `utils.dataloaders`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PillowImage
from PIL import ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from utils import sources as ours
from utils.augmentations import letterbox
from utils.config import UserError
from utils.dataloaders import ImageDataset, LoaderOptions, num_workers
from utils.distributed import rank_zero_first, world_size
from utils.labels import IMAGE_SUFFIXES, label_path, scan
from utils.runtime import LOGGER
from utils.sources import Frame

IMG_FORMATS = tuple(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
VID_FORMATS = tuple(sorted(suffix[1:] for suffix in ours.VIDEO_SUFFIXES))
Transform = Callable[[np.ndarray], Any]
Shapes = tuple[tuple[int, int], tuple[tuple[float, float], tuple[float, float]]]


def exif_transpose(image: PillowImage.Image) -> PillowImage.Image:
    """The image turned upright by its EXIF orientation."""
    return ImageOps.exif_transpose(image)


def exif_size(img: PillowImage.Image) -> tuple[int, int]:
    """Width and height of an image once it is upright."""
    return img.size[::-1] if img.getexif().get(0x0112, 1) in (5, 6, 7, 8) else img.size


def img2label_paths(img_paths: Sequence[str | Path]) -> list[str]:
    """The label file of each image."""
    return [str(label_path(path)) for path in img_paths]


# ------------------------------------------------------------------------------------------------------------- sources


class _Loader:
    """What the three loaders share: a picture as the network takes it."""

    img_size: int | Sequence[int]
    stride: int
    auto: bool
    transforms: Transform | None

    def _network_input(self, image: np.ndarray) -> Any:
        """BGR (H, W, 3) letterboxed, as RGB (3, h, w); or whatever `transforms` makes of the image."""
        if self.transforms is not None:
            return self.transforms(image)
        fitted = letterbox(image, self.img_size, stride=self.stride, auto=self.auto)[0]
        return np.ascontiguousarray(fitted.transpose(2, 0, 1)[::-1])


class LoadImages(_Loader):
    """Iterate over images and videos: (path, RGB uint8 (3, h, w), BGR original, a video's capture or None, log prefix).

    `path` is what `open_source` takes as files: a file, folder, glob or `.txt` list, or a list of these. While
    iterating, `count` is the number of the file, `mode` image or video, `frame` and `frames` where a video is.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        img_size: int | Sequence[int] = 640,
        stride: int = 32,
        auto: bool = True,
        transforms: Transform | None = None,
        vid_stride: int = 1,
    ) -> None:
        self._source = ours.open_source(path, vid_stride)
        if self._source.mode != "files":
            raise UserError(f"{path}: not a file. LoadStreams reads cameras and streams, LoadScreenshots the screen.")
        self.files = [str(file) for file in self._source.paths]
        self.nf = len(self.files)
        self.video_flag = [Path(file).suffix.lower() in ours.VIDEO_SUFFIXES for file in self.files]
        self.img_size, self.stride, self.auto, self.transforms = img_size, int(stride), auto, transforms
        self.vid_stride = vid_stride
        self.mode, self.count, self.frame, self.frames = "image", 0, 0, 0
        self.cap: Any = None
        self._frames: Iterator[Frame] | None = None

    def __len__(self) -> int:
        return self.nf

    def __iter__(self) -> LoadImages:
        self.count, self._frames = 0, iter(self._source)
        return self

    def __next__(self) -> tuple[str, Any, np.ndarray, Any, str]:
        if self._frames is None:
            self._frames = iter(self._source)
        frame = next(self._frames)
        same_file = frame.frame_index > 1
        self.count = self.files.index(frame.path, self.count - same_file) + 1  # a list may name a file twice
        self.mode, self.cap = frame.mode, frame.capture
        self.frame, self.frames = frame.frame_index, frame.frame_count
        return frame.path, self._network_input(frame.image), frame.image, frame.capture, frame.prefix


class LoadStreams(_Loader):
    """Iterate over streams: (names, RGB uint8 (B, 3, h, w), list of BGR originals, None, "").

    `sources` is an address, a webcam's number, or a file with one of these per line. Every step gives the newest frame
    of each stream; one that has ended keeps its last. With `auto` the frames are padded to whole strides only where all
    of them then have the same shape (`rect`). Streams are opened at once and closed with the iteration.
    """

    mode = "stream"

    def __init__(
        self,
        sources: str | int | Path = "file.streams",
        img_size: int | Sequence[int] = 640,
        stride: int = 32,
        auto: bool = True,
        transforms: Transform | None = None,
        vid_stride: int = 1,
    ) -> None:
        addresses = [str(sources)]
        if Path(addresses[0]).suffix.lower() in (".streams", ".txt") and os.path.isfile(addresses[0]):
            addresses = Path(addresses[0]).read_text(encoding="utf-8").split()
        self.img_size, self.stride, self.transforms, self.vid_stride = img_size, int(stride), transforms, vid_stride
        self._rounds = ours.streams(addresses, vid_stride).rounds()
        self._latest: dict[int, Frame] = {}
        while len(self._latest) < len(addresses):
            self._latest.update((frame.source_index, frame) for frame in next(self._rounds))
        self._fresh = True
        self.sources = [self._latest[index].path for index in range(len(addresses))]
        self.imgs = self._images()
        self.fps = [self._latest[index].fps * vid_stride for index in range(len(addresses))]
        shapes = {letterbox(image, img_size, stride=self.stride, auto=auto)[0].shape for image in self.imgs}
        self.rect = len(shapes) == 1
        self.auto = auto and self.rect
        self.count = -1
        if not self.rect:
            LOGGER.warning("the streams' shapes differ: all are padded to the whole image size.")

    def _images(self) -> list[np.ndarray]:
        return [self._latest[index].image for index in range(len(self._latest))]

    def __len__(self) -> int:
        return len(self.sources)

    def __iter__(self) -> LoadStreams:
        self.count = -1
        return self

    def __next__(self) -> tuple[list[str], Any, list[np.ndarray], None, str]:
        if not self._fresh:
            self._latest.update((frame.source_index, frame) for frame in next(self._rounds))
        self._fresh = False
        self.count += 1
        self.imgs = self._images()
        inputs = [self._network_input(image) for image in self.imgs]
        return self.sources, inputs if self.transforms else np.stack(inputs), list(self.imgs), None, ""


class LoadScreenshots(_Loader):
    """Iterate over pictures of the screen, without end; tuples as `LoadImages`, whose path is the screen's number.

    `source` is `screen [number] [left top width height]`.
    """

    mode = "stream"

    def __init__(
        self,
        source: str,
        img_size: int | Sequence[int] = 640,
        stride: int = 32,
        auto: bool = True,
        transforms: Transform | None = None,
    ) -> None:
        self._frames = iter(ours.screen(source))
        self.img_size, self.stride, self.auto, self.transforms = img_size, int(stride), auto, transforms
        self.frame = 0

    def __iter__(self) -> LoadScreenshots:
        return self

    def __next__(self) -> tuple[str, Any, np.ndarray, None, str]:
        frame = next(self._frames)
        self.frame = frame.frame_index
        return frame.path.removeprefix("screen"), self._network_input(frame.image), frame.image, None, frame.prefix


# ------------------------------------------------------------------------------------------------------ labelled images


class LoadImagesAndLabels(torch.utils.data.Dataset[Any]):
    """Labelled images by number: (RGB uint8 (3, h, w), labels (n, 6), path, shapes).

    Labels are [0, class, cx, cy, w, h] in 0..1; the first column is for `collate_fn` to number the images of a batch.
    `shapes` is ((h0, w0), ((scale, scale), (pad x, pad y))), or None for an augmented image. `labels`, `segments`,
    `shapes` (n, 2) width and height, `im_files` and `label_files` are of all images; `indices[i]` is the image that
    number i stands for. Augmentations are drawn from torch's random numbers. `min_items` is not offered.

    Raises:
        UserError: no usable image, or one that is gone since it was found.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        img_size: int = 640,
        batch_size: int = 16,
        augment: bool = False,
        hyp: Mapping[str, float] | None = None,
        rect: bool = False,
        image_weights: bool = False,
        cache_images: bool | str = False,
        single_cls: bool = False,
        stride: int = 32,
        pad: float = 0.0,
        min_items: int = 0,
        prefix: str = "",
        rank: int = -1,
        seed: int = 0,
    ) -> None:
        if min_items:
            raise UserError("min_items is not offered: leave images with too few labels out of the list instead.")
        self.img_size, self.augment, self.hyp, self.rect = img_size, augment, hyp, rect and not image_weights
        self.image_weights, self.stride, self.path = image_weights, int(stride), path
        self.mosaic = augment and not self.rect
        self.mosaic_border = [-img_size // 2, -img_size // 2]
        self._options = LoaderOptions(
            imgsz=img_size,
            batch_size=batch_size,
            stride=self.stride,
            augment=augment,
            hyp=hyp,
            rect=self.rect,
            pad=pad,
            cache=None if not cache_images else "disk" if cache_images == "disk" else "ram",
            single_cls=single_cls,
            seed=seed,
            prefix=prefix,
        )
        places = [Path(place) for place in ([path] if isinstance(path, (str, Path)) else path)]
        samples = scan(places, None, single_cls=single_cls, prefix=prefix).samples
        if not samples:
            raise UserError(f"{prefix}no usable image in {', '.join(map(str, places))}.")
        self._dataset = ImageDataset(samples, self._options)
        samples = self._dataset.samples
        self.labels = self._dataset.labels_list
        self.segments = [list(sample.segments) for sample in samples]
        self.shapes = self._dataset.shapes_hw[:, ::-1]
        self.im_files = self.img_files = [sample.path for sample in samples]
        self.label_files = img2label_paths(self.im_files)
        self.n = len(samples)
        self.indices: Sequence[int] | np.ndarray = range(self.n)
        self.batch = np.arange(self.n) // self._dataset.batch_size  # which batch each image is in
        if self.rect:
            self.batch_shapes = np.array(self._dataset.batch_shapes)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, str, Shapes | None]:
        epoch = int(torch.randint(2**31, ())) if self.augment else 0
        item = self._dataset[epoch, int(self.indices[index])]
        if isinstance(item, UserError):
            raise item
        for message in item.failed:
            LOGGER.warning(f"{self._options.prefix}{message}")
        image = torch.from_numpy(np.ascontiguousarray(item.image.transpose(2, 0, 1)[::-1]))
        labels = torch.cat((torch.zeros(len(item.labels), 1), torch.from_numpy(item.labels).float()), 1)
        box = item.letterbox
        shapes = None if box is None else (box.original_hw, ((box.scale, box.scale), box.pad_xy))
        return image, labels, item.path, shapes

    @staticmethod
    def collate_fn(
        batch: Sequence[tuple[Tensor, Tensor, str, Shapes | None]],
    ) -> tuple[Tensor, Tensor, tuple[str, ...], tuple[Shapes | None, ...]]:
        """Images (B, 3, h, w), labels (N, 6) with the image's number first, paths, shapes."""
        images, labels, paths, shapes = zip(*batch)
        for number, rows in enumerate(labels):
            rows[:, 0] = number
        return torch.stack(images), torch.cat(labels), paths, shapes


def create_dataloader(
    path: str | Path | Sequence[str | Path],
    imgsz: int,
    batch_size: int,
    stride: int,
    single_cls: bool = False,
    hyp: Mapping[str, float] | None = None,
    augment: bool = False,
    cache: bool | str = False,
    pad: float = 0.0,
    rect: bool = False,
    rank: int = -1,
    workers: int = 8,
    image_weights: bool = False,
    quad: bool = False,
    prefix: str = "",
    shuffle: bool = False,
    seed: int = 0,
) -> tuple[DataLoader[Any], LoadImagesAndLabels]:
    """A torch loader over `LoadImagesAndLabels`, batches as its `collate_fn` makes them, and that dataset.

    With a `rank` each process gets its part of the images. `quad` is not offered.
    """
    if quad:
        raise UserError("quad is not offered: leave it out.")
    if rect and shuffle:
        LOGGER.warning(f"{prefix}rect keeps the images in order of their shape: not shuffled.")
        shuffle = False
    with rank_zero_first():
        dataset = LoadImagesAndLabels(
            path, imgsz, batch_size, augment, hyp, rect, image_weights, cache, single_cls, stride, pad, 0, prefix, rank
        )
    size = min(batch_size, len(dataset))
    options = LoaderOptions(imgsz, size, workers=workers, world_size=world_size())
    sampler: Any = None if rank == -1 else DistributedSampler(dataset, shuffle=shuffle, seed=seed)
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=size,
        shuffle=shuffle and sampler is None,
        num_workers=num_workers(options, -(-len(dataset) // size)),
        sampler=sampler,
        pin_memory=torch.cuda.is_available(),
        collate_fn=LoadImagesAndLabels.collate_fn,
        generator=torch.Generator().manual_seed(seed),
    )
    return loader, dataset
