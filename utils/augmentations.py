"""Geometry and colour: letterboxing, the training transforms, mosaic, mixup and copy-paste.

A transform is a frozen dataclass whose fields are its keys in `data/hyps/*.yaml`. `sample` draws the parameters of one
application from a numpy Generator and returns None where nothing is to be done; `apply` is a pure function of an
example and those parameters. Nothing here writes into an array it was given: cached images are shared by all workers.

A new transform that works on a single image needs its class, and its name in `IMAGE_TRANSFORMS`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt

from utils.boxes import Letterbox, clip_xyxy

Image = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating[Any]]
FILL = 114  # the grey around letterboxed and warped images
POLYGON_POINTS = 1000  # an outline is resampled to this many points before it is warped
MIN_SIDE = 2.0  # pixels; a warped box must be larger on both sides
MAX_ASPECT = 100.0
MIN_AREA_KEPT = 0.10  # of the box before the warp ...
MIN_AREA_KEPT_OUTLINE = 0.01  # ... and with outlines, whose boxes are exact
MAX_COVERED = 0.30  # of an existing box, by a pasted one


@dataclass(frozen=True)
class Example:
    """An image `(h, w, 3)` BGR, its boxes `(n, 5)` float32 [class, x1, y1, x2, y2] in its pixels, and their outlines.

    `segments` holds one polygon `(k, 2)` per box in pixels, or nothing at all.
    """

    image: Image
    boxes: Floats
    segments: tuple[Floats, ...] = ()

    @property
    def shape_hw(self) -> tuple[int, int]:
        return self.image.shape[0], self.image.shape[1]


def letterboxed(
    image: Image,
    size_hw: int | tuple[int, int],
    *,
    auto: bool = False,
    stride: int = 32,
    scaleup: bool = True,
    fill: tuple[int, int, int] = (FILL, FILL, FILL),
) -> tuple[Image, Letterbox]:
    """The image scaled to fit `size_hw` and padded with grey to exactly that size, and how to get back.

    With `auto` only as much is padded as makes both sides multiples of `stride` larger than the scaled image's; without
    `scaleup` a small image is padded, never enlarged. Odd padding puts the extra pixel right and below, while
    `Letterbox.pad_xy` keeps the exact halves: the reported accuracy of YOLOv5 depends on both.
    """
    height, width = image.shape[:2]
    goal_h, goal_w = (size_hw, size_hw) if isinstance(size_hw, int) else size_hw
    scale = min(goal_h / height, goal_w / width)
    scale = scale if scaleup else min(scale, 1.0)
    new_h, new_w = max(round(height * scale), 1), max(round(width * scale), 1)
    pad_h, pad_w = goal_h - new_h, goal_w - new_w
    if auto:
        pad_h, pad_w = pad_h % stride, pad_w % stride
    half_w, half_h = pad_w / 2, pad_h / 2
    if (new_h, new_w) != (height, width):
        image = _as_image(cv2.resize(image, (new_w, new_h), interpolation=cv2.INTER_LINEAR))
    if pad_w or pad_h:
        top, bottom = round(half_h - 0.1), round(half_h + 0.1)
        left, right = round(half_w - 0.1), round(half_w + 0.1)
        border = cv2.BORDER_CONSTANT
        image = _as_image(cv2.copyMakeBorder(image, top, bottom, left, right, border, value=fill))
    return image, Letterbox(scale, (half_w, half_h), (height, width), (image.shape[0], image.shape[1]))


def letterbox(
    im: Image,
    new_shape: int | Sequence[int] = (640, 640),
    color: tuple[int, int, int] = (FILL, FILL, FILL),
    auto: bool = True,
    scaleFill: bool = False,
    scaleup: bool = True,
    stride: int = 32,
) -> tuple[Image, tuple[float, float], tuple[float, float]]:
    """`letterboxed` with YOLOv5's arguments, for other people's code: image, (scale x, scale y), (pad x, pad y).

    `new_shape` is (height, width) or a number for both. Paddings are those of one side and may end in .5. `scaleFill`
    (without `auto`) stretches the image to `new_shape` instead of padding it.
    """
    goal_h, goal_w = np.broadcast_to(np.asarray(new_shape, int), 2).tolist()
    goal_hw = (goal_h, goal_w)
    if scaleFill and not auto:
        height, width = im.shape[:2]
        stretched = _as_image(cv2.resize(im, goal_hw[::-1], interpolation=cv2.INTER_LINEAR))
        return stretched, (goal_hw[1] / width, goal_hw[0] / height), (0.0, 0.0)
    image, fitted = letterboxed(im, goal_hw, auto=auto, stride=int(stride), scaleup=scaleup, fill=color)
    return image, (fitted.scale, fitted.scale), fitted.pad_xy


def multi_scale_size(imgsz: int, stride: int, rng: np.random.Generator) -> int:
    """A training size between half and one and a half times `imgsz`, a multiple of `stride`."""
    drawn = int(rng.integers(int(imgsz * 0.5), int(imgsz * 1.5) + stride))
    return max(drawn // stride * stride, stride)


def _as_image(array: Any) -> Image:
    return np.asarray(array, np.uint8)


def _key(default: float, low: float, high: float) -> Any:
    """A hyper-parameter with the range that `config.check_hyp` accepts."""
    return field(default=default, metadata={"min": low, "max": high})


# --------------------------------------------------------------------------------------------------------- perspective


@dataclass(frozen=True, eq=False)
class Warp:
    """A homography `(3, 3)` from input to output pixels, its scale factor, and the size of the output."""

    matrix: Floats
    gain: float
    size_hw: tuple[int, int]


@dataclass(frozen=True)
class RandomPerspective:
    """Rotation, scale, shear, shift and perspective at once. Angles in degrees, `translate` in parts of the output."""

    degrees: float = _key(0.0, 0, 180)
    translate: float = _key(0.1, 0, 1)
    scale: float = _key(0.5, 0, 0.99)
    shear: float = _key(0.0, 0, 80)
    perspective: float = _key(0.0, 0, 0.01)

    def sample(self, rng: np.random.Generator, shape_hw: tuple[int, int], size_hw: tuple[int, int]) -> Warp | None:
        """A warp from an image of `shape_hw` to one of `size_hw`; None where it would change nothing."""
        height, width = size_hw
        centre, tilt, turn, shear, shift = (np.eye(3) for _ in range(5))
        centre[:2, 2] = -shape_hw[1] / 2, -shape_hw[0] / 2
        tilt[2, :2] = rng.uniform(-self.perspective, self.perspective, 2)
        angle = math.radians(rng.uniform(-self.degrees, self.degrees))
        gain = float(rng.uniform(1 - self.scale, 1 + self.scale))
        turn[:2, :2] = gain * np.array(((math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))))
        shear[0, 1], shear[1, 0] = np.tan(np.radians(rng.uniform(-self.shear, self.shear, 2)))
        shift[:2, 2] = rng.uniform(0.5 - self.translate, 0.5 + self.translate, 2) * (width, height)
        matrix = shift @ shear @ turn @ tilt @ centre
        if shape_hw == size_hw and np.array_equal(matrix, np.eye(3)):
            return None
        return Warp(matrix, gain, size_hw)

    @classmethod
    def apply(cls, example: Example, warp: Warp) -> Example:
        """The warped image with the boxes that are still worth learning; outlines are used up."""
        height, width = warp.size_hw
        move = cv2.warpAffine if _is_affine(warp.matrix) else cv2.warpPerspective
        matrix = warp.matrix[:2] if _is_affine(warp.matrix) else warp.matrix
        image = _as_image(move(example.image, matrix, (width, height), borderValue=(FILL, FILL, FILL)))
        return Example(image, cls.boxes(example, warp))

    @staticmethod
    def boxes(example: Example, warp: Warp) -> Floats:
        """The warped boxes; the example's pixels are not looked at.

        A box with an outline becomes the box around the outline's points inside the image, any other the box around its
        four moved corners. Dropped are boxes of which too little is left, or that became a line.
        """
        height, width = warp.size_hw
        if not len(example.boxes):
            return example.boxes
        before = example.boxes[:, 1:5].astype(np.float64)
        outlined = len(example.segments) == len(before)
        if outlined:
            points = _move(resample(example.segments, POLYGON_POINTS), warp.matrix)
            inside = np.all((points >= 0) & (points <= (width, height)), -1, keepdims=True)
            low = np.where(inside, points, np.inf).min(1)
            high = np.where(inside, points, -np.inf).max(1)
            after = np.where(inside.any(1), np.concatenate((low, high), 1), 0.0)
        else:
            corners = before[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
            points = _move(corners, warp.matrix)
            after = clip_xyxy(np.concatenate((points.min(1), points.max(1)), 1), warp.size_hw)
        keep = _worth_keeping(before, after, warp.gain, MIN_AREA_KEPT_OUTLINE if outlined else MIN_AREA_KEPT)
        return np.concatenate((example.boxes[keep, :1], after[keep]), 1).astype(np.float32)

    def __call__(self, example: Example, rng: np.random.Generator, size_hw: tuple[int, int] | None = None) -> Example:
        """A random warp of the example into an image of `size_hw`, by default its own."""
        warp = self.sample(rng, example.shape_hw, size_hw or example.shape_hw)
        return example if warp is None else self.apply(example, warp)


def _is_affine(matrix: Floats) -> bool:
    return bool(np.array_equal(matrix[2], (0.0, 0.0, 1.0)))


def _move(points: Floats, matrix: Floats) -> Floats:
    """Points `(..., 2)` through a homography."""
    moved = points @ matrix[:2, :2].T + matrix[:2, 2]
    if not _is_affine(matrix):
        moved = moved / (points @ matrix[2, :2] + matrix[2, 2])[..., None]
    return moved


def _worth_keeping(before: Floats, after: Floats, gain: float, min_area_kept: float) -> npt.NDArray[np.bool_]:
    """Which of the boxes `(n, 4)` xyxy to keep, `before` having been scaled by `gain` on the way."""
    width, height = (after[:, 2:] - after[:, :2]).T
    old_width, old_height = (before[:, 2:] - before[:, :2]).T
    kept = width * height / (old_width * old_height * gain**2 + 1e-16)
    aspect = np.maximum(width / (height + 1e-16), height / (width + 1e-16))
    large = (width > MIN_SIDE) & (height > MIN_SIDE)
    return np.asarray(large & (kept > min_area_kept) & (aspect < MAX_ASPECT))


def resample(polygons: Sequence[Floats], count: int) -> Floats:
    """The closed polygons `(k, 2)` as `(n, count, 2)`: `count` points evenly spread over the corners, ends included.

    All polygons in one pass: positions along all the corners laid end to end, each polygon's first one repeated.
    """
    corners = np.array([len(p) for p in polygons])
    closed = np.concatenate([part for p in polygons for part in (p, p[:1])]).astype(np.float64)
    starts = np.cumsum(corners + 1) - corners - 1
    along = np.linspace(0.0, 1.0, count) * corners[:, None]
    whole = np.minimum(along.astype(np.int64), corners[:, None] - 1)
    part = (along - whole)[..., None]
    first = starts[:, None] + whole
    return np.asarray(closed[first] * (1 - part) + closed[first + 1] * part)


# --------------------------------------------------------------------------------------------------- colour and flips


@dataclass(frozen=True)
class HSV:
    """Hue, saturation and value each multiplied by 1 plus at most their part up or down."""

    hsv_h: float = _key(0.015, 0, 1)
    hsv_s: float = _key(0.7, 0, 1)
    hsv_v: float = _key(0.4, 0, 1)

    def sample(self, rng: np.random.Generator) -> Floats | None:
        """The three factors."""
        parts = np.array((self.hsv_h, self.hsv_s, self.hsv_v))
        return 1 + rng.uniform(-1, 1, 3) * parts if np.any(parts) else None

    @staticmethod
    def table(factors: Floats) -> Image:
        """What each value `(256, 3)` of hue, saturation and value becomes.

        Hue (0..179 in OpenCV) goes round, the others stop at their ends.
        """
        levels = np.arange(256)[:, None] * factors
        levels[:, 0] %= 180
        return np.clip(levels, 0, 255).astype(np.uint8)

    @classmethod
    def apply(cls, example: Example, factors: Floats) -> Example:
        """The example in other colours."""
        tables = np.ascontiguousarray(cls.table(factors).T)
        planes = cv2.split(cv2.cvtColor(example.image, cv2.COLOR_BGR2HSV))
        # plane by plane, OpenCV's table takes four fifths of the time that it takes for all three at once
        hsv = cv2.merge([cv2.LUT(plane, table) for plane, table in zip(planes, tables)])
        return dataclasses.replace(example, image=_as_image(cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)))

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        factors = self.sample(rng)
        return example if factors is None else self.apply(example, factors)


@dataclass(frozen=True)
class Flip:
    """Upside down and left to right, each with its own probability."""

    flipud: float = _key(0.0, 0, 1)
    fliplr: float = _key(0.5, 0, 1)

    def sample(self, rng: np.random.Generator) -> tuple[bool, bool]:
        """Whether upside down, whether left to right."""
        up, left = rng.random(2) < (self.flipud, self.fliplr)
        return bool(up), bool(left)

    @classmethod
    def apply(cls, example: Example, up_left: tuple[bool, bool]) -> Example:
        """The example mirrored along the chosen axes."""
        up, left = up_left
        if not (up or left):
            return example
        return Example(
            _as_image(cv2.flip(example.image, -1 if up and left else int(left))), *cls.labels(example, up_left)
        )

    @staticmethod
    def labels(example: Example, up_left: tuple[bool, bool]) -> tuple[Floats, tuple[Floats, ...]]:
        """The mirrored boxes and outlines; the example's pixels are not looked at."""
        up, left = up_left
        height, width = example.shape_hw
        boxes = example.boxes.copy()
        sign, offset = np.ones(2, np.float32), np.zeros(2, np.float32)
        if left:
            boxes[:, [1, 3]] = width - boxes[:, [3, 1]]
            sign[0], offset[0] = -1, width
        if up:
            boxes[:, [2, 4]] = height - boxes[:, [4, 2]]
            sign[1], offset[1] = -1, height
        return boxes, tuple(polygon * sign + offset for polygon in example.segments)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        return self.apply(example, self.sample(rng))


# ------------------------------------------------------------------------------------------------------ several images


@dataclass(frozen=True)
class Layout:
    """Where four images meet on a canvas of twice the image size, and which images they are, in reading order."""

    centre_xy: tuple[int, int]
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Mosaic:
    """Four images around a random point (Bochkovskiy et al., YOLOv4, arXiv 2004.10934, section 3.3)."""

    mosaic: float = _key(1.0, 0, 1)

    def sample(self, rng: np.random.Generator, size: int, index: int, num_images: int) -> Layout:
        """A layout with image `index` and three others, drawn with replacement, in random places."""
        x, y = rng.uniform(size / 2, 3 * size / 2, 2)
        indices = np.append(rng.integers(0, num_images, 3), index)
        return Layout((int(x), int(y)), tuple(rng.permutation(indices).tolist()))

    @classmethod
    def apply(cls, examples: Sequence[Example], centre_xy: tuple[int, int], size: int) -> Example:
        """The four examples on a grey canvas `(2 * size, 2 * size)`, inner corners at the centre, cut at its edges."""
        side = 2 * size
        canvas = np.full((side, side, 3), FILL, np.uint8)
        for example, (x, y) in zip(examples, cls.corners(examples, centre_xy), strict=True):
            height, width = example.shape_hw
            left, top, right, bottom = max(x, 0), max(y, 0), min(x + width, side), min(y + height, side)
            canvas[top:bottom, left:right] = example.image[top - y : bottom - y, left - x : right - x]
        return Example(canvas, *cls.labels(examples, centre_xy, size))

    @staticmethod
    def corners(examples: Sequence[Example], centre_xy: tuple[int, int]) -> list[tuple[int, int]]:
        """Where the top left pixel of each of the four comes to lie on the canvas, maybe outside of it."""
        x, y = centre_xy
        return [
            (x - (0 if place % 2 else example.shape_hw[1]), y - (0 if place >= 2 else example.shape_hw[0]))
            for place, example in enumerate(examples)
        ]

    @classmethod
    def labels(
        cls, examples: Sequence[Example], centre_xy: tuple[int, int], size: int
    ) -> tuple[Floats, tuple[Floats, ...]]:
        """The boxes and outlines of the four on the canvas; their pixels are not looked at."""
        side = 2 * size
        boxes, segments = [], []
        for example, corner_xy in zip(examples, cls.corners(examples, centre_xy), strict=True):
            boxes.append(example.boxes + np.array((0, *corner_xy, *corner_xy), np.float32))
            segments += [np.clip(polygon + np.array(corner_xy, np.float32), 0, side) for polygon in example.segments]
        rows = np.concatenate(boxes)
        rows[:, 1:] = np.clip(rows[:, 1:], 0, side)
        # outlines help only if every box has one
        return rows, tuple(segments) if len(segments) == len(rows) else ()


@dataclass(frozen=True)
class CopyPaste:
    """A part of the outlined objects pasted again, mirrored (Ghiasi et al., arXiv 2012.07177, in YOLOv5's form)."""

    copy_paste: float = _key(0.0, 0, 1)

    def sample(self, rng: np.random.Generator, example: Example) -> tuple[int, ...] | None:
        """Which objects to paste; None without outlines."""
        count = len(example.boxes)
        chosen = round(self.copy_paste * count)
        if not chosen or len(example.segments) != count:
            return None
        return tuple(rng.choice(count, chosen, replace=False).tolist())

    @staticmethod
    def apply(example: Example, chosen: Sequence[int]) -> Example:
        """The example with the chosen objects' mirror images, each left out if it would hide much of a box."""
        mirrored = Flip.apply(example, (False, True))
        boxes, segments = example.boxes, list(example.segments)
        mask = np.zeros(example.shape_hw, np.uint8)
        for j in chosen:  # one after the other: a pasted object counts for the next one
            x1, y1, x2, y2 = mirrored.boxes[j, 1:5]
            width = np.minimum(boxes[:, 3], x2) - np.maximum(boxes[:, 1], x1)
            height = np.minimum(boxes[:, 4], y2) - np.maximum(boxes[:, 2], y1)
            areas = (boxes[:, 3] - boxes[:, 1]) * (boxes[:, 4] - boxes[:, 2]) + 1e-16
            if np.all(width.clip(0) * height.clip(0) / areas < MAX_COVERED):
                boxes = np.concatenate((boxes, mirrored.boxes[j : j + 1]))
                segments.append(mirrored.segments[j])
                cv2.drawContours(mask, [mirrored.segments[j].astype(np.int32)], -1, 1, cv2.FILLED)
        image = np.where(mask[..., None] > 0, mirrored.image, example.image)
        return Example(image, boxes, tuple(segments))

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        chosen = self.sample(rng, example)
        return example if chosen is None else self.apply(example, chosen)


@dataclass(frozen=True)
class MixUp:
    """A mosaic blended with a second one (Zhang et al., arXiv 1710.09412), about half and half."""

    mixup: float = _key(0.0, 0, 1)

    def sample(self, rng: np.random.Generator) -> float | None:
        """The first image's share, from Beta(32, 32)."""
        return float(rng.beta(32, 32)) if rng.random() < self.mixup else None

    @staticmethod
    def apply(first: Example, second: Example, share: float) -> Example:
        """Both images in one, with the boxes of both."""
        image = _as_image(cv2.addWeighted(first.image, share, second.image, 1 - share, 0.0))
        return Example(image, np.concatenate((first.boxes, second.boxes)))


class ImageTransform(Protocol):
    """A transform of one image that keeps its size."""

    def __call__(self, example: Example, rng: np.random.Generator) -> Example: ...


IMAGE_TRANSFORMS: tuple[type[ImageTransform], ...] = (
    HSV,
    Flip,
)  # applied in this order to every training image, after mosaic and perspective
TRANSFORMS: tuple[type, ...] = (RandomPerspective, HSV, Flip, Mosaic, MixUp, CopyPaste)
