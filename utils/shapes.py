"""The embedded dataset: geometric shapes on textured backgrounds, drawn by this file on first use.

The pictures are the same on every machine, bit for bit: random bits are read raw from PCG64 (whose stream numpy
guarantees, unlike that of its distributions), shapes are polygons with integer vertices, and everything drawn is
integer arithmetic. `tests/test_shapes.py` freezes them by a hash, so that results on them stay comparable.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from utils.files import refuse_read_only, remove_leftovers, replacing
from utils.runtime import LOGGER

CLASSES = ("disc", "ring", "triangle", "square", "star", "cross")
SPLITS = {"train": 512, "val": 128}  # images per split
SIZE = 320  # height and width of every picture in pixels
VERSION = 1  # raised when the pictures change: folders drawn by an older version are then drawn again

UNIT = 64  # polygon vertices are integers in 1/64 pixel, which makes filling and boxes exact
SUB = 4  # a pixel's coverage is counted on SUB x SUB samples
FULL = SUB * SUB

Ints = npt.NDArray[np.int64]
Shorts = npt.NDArray[np.int16]
Box = tuple[int, int, int, int]  # x1, y1, x2, y2 in 1/64 pixel


@dataclass(frozen=True)
class Shape:
    """One object of a picture."""

    label: int
    rings: tuple[Ints, ...]  # polygons (k, 2) in 1/64 pixel of the picture: the outline, and a hole run backwards
    partner: int = -1  # index of the earlier object it partly covers

    @property
    def box(self) -> Box:
        """The tight box of the whole shape, covered parts included."""
        low, high = self.rings[0].min(axis=0), self.rings[0].max(axis=0)
        return int(low[0]), int(low[1]), int(high[0]), int(high[1])


@dataclass(frozen=True)
class Picture:
    """One drawn image and its objects, in drawing order (later ones lie on top)."""

    image: npt.NDArray[np.uint8]  # (320, 320, 3), BGR as OpenCV reads it
    shapes: tuple[Shape, ...]

    def label_text(self) -> str:
        """The content of the label file: `class cx cy w h` per object, in 0..1."""
        full = 2 * SIZE * UNIT
        rows = []
        for shape in self.shapes:
            x1, y1, x2, y2 = shape.box
            values = ((x1 + x2) / full, (y1 + y2) / full, 2 * (x2 - x1) / full, 2 * (y2 - y1) / full)
            rows.append(f"{shape.label} " + " ".join(f"{value:.6f}" for value in values))
        return "\n".join(rows) + "\n"


class RandomBits:
    """Integers from the raw PCG64 stream of one picture."""

    def __init__(self, *seed: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(seed))

    def below(self, limit: int) -> int:
        """An integer in 0..limit-1."""
        return (int(self._bits.random_raw()) * limit) >> 64

    def between(self, low: int, high: int) -> int:
        """An integer in low..high, both included."""
        return low + self.below(high - low + 1)

    def bytes(self, *shape: int) -> npt.NDArray[np.uint8]:
        """Independent bytes of the given shape."""
        count = math.prod(shape)
        words = self._bits.random_raw(-(-count // 8)).astype("<u8")  # the byte order is part of the frozen result
        return words.view(np.uint8)[:count].reshape(shape)

    def shuffled(self, values: tuple[int, ...]) -> list[int]:
        """The values in random order (Fisher-Yates)."""
        order = list(values)
        for last in range(len(order) - 1, 0, -1):
            other = self.below(last + 1)
            order[last], order[other] = order[other], order[last]
        return order


# ------------------------------------------------------------------------------------------------------------- geometry


def _regular(count: int, *radii: float) -> list[tuple[float, float]]:
    """`count` points evenly spaced by angle, their radii taken in turn from `radii`."""
    turns = zip(range(count), itertools.cycle(radii))
    return [(r * math.cos(2 * math.pi * i / count), r * math.sin(2 * math.pi * i / count)) for i, r in turns]


def _outline(label: int, bits: RandomBits) -> list[list[tuple[float, float]]]:
    """The polygons of a class around the origin, unrotated, about one unit in radius."""
    name, variation = CLASSES[label], bits.below(101) / 100
    arm = 0.26 + 0.1 * variation
    if name in ("disc", "ring"):
        hole = _regular(64, 0.5 + 0.15 * variation)[::-1]
        return [_regular(64, 1.0), hole] if name == "ring" else [_regular(64, 1.0)]
    if name in ("triangle", "square"):
        return [_regular(3 if name == "triangle" else 4, 1.0)]
    if name == "star":
        return [_regular(10, 1.0, 0.38 + 0.08 * variation)]
    quarter = [(1, -arm), (1, arm), (arm, arm)]
    return [[(x * c - y * s, x * s + y * c) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1)) for x, y in quarter]]


def _turned(
    polygons: list[list[tuple[float, float]]], longest: int, aspect: float, bits: RandomBits
) -> tuple[Ints, ...]:
    """The polygons squeezed, rotated by a random angle and scaled until the longest side of their box is `longest`.

    Vertices come back as integers with the box's corner at (0, 0). Last-digit differences between maths libraries
    disappear in the rounding: no angle is one where a symmetric shape has vertices exactly between two integers.
    """
    angle = 2 * math.pi * (bits.below(1 << 16) + 0.5) / (1 << 16)
    cos, sin = math.cos(angle), math.sin(angle)
    turned = [[(x * cos - aspect * y * sin, x * sin + aspect * y * cos) for x, y in ring] for ring in polygons]
    xs, ys = [x for x, _ in turned[0]], [y for _, y in turned[0]]
    left, top = min(xs), min(ys)
    scale = longest / max(max(xs) - left, max(ys) - top)
    return tuple(
        np.array([(round((x - left) * scale), round((y - top) * scale)) for x, y in ring], dtype=np.int64)
        for ring in turned
    )


def coverage(rings: tuple[Ints, ...]) -> tuple[slice, slice, Shorts]:
    """Which pixels the polygons cover: rows, columns, and samples covered (h, w) in 0..16.

    Outlines run clockwise on the screen and holes the other way. On each row of samples an edge that goes up switches
    all samples right of it on, one that goes down switches them off; exact places make the sum exact.
    """
    start = np.concatenate(rings)
    end = np.concatenate([np.concatenate((ring[1:], ring[:1])) for ring in rings])
    x0, y0 = (int(v) // UNIT for v in start.min(axis=0))
    x1, y1 = (-(-int(v) // UNIT) for v in start.max(axis=0))
    width, height, step = x1 - x0, y1 - y0, UNIT // SUB
    origin = np.array([x0 * UNIT, y0 * UNIT], dtype=np.int64)
    upward = end[:, 1] < start[:, 1]
    high, low = np.where(upward[:, None], end, start) - origin, np.where(upward[:, None], start, end) - origin
    y = np.arange(height * SUB, dtype=np.int64) * step + step // 2
    edge, row = np.nonzero((high[:, 1, None] <= y) & (y < low[:, 1, None]))
    run, rise = (low - high)[edge].T
    crossing = high[edge, 0] * rise + (y[row] - high[edge, 1]) * run  # times rise, to stay an integer
    first = -((step // 2 * rise - crossing) // (step * rise))  # the first sample right of the edge
    pixel, part = first // SUB, first % SUB
    place = row // SUB * (width + 2) + pixel
    sign = np.where(upward[edge], 1, -1)
    size = height * (width + 2)
    change = np.bincount(place, sign * (SUB - part), size) + np.bincount(place + 1, sign * part, size)
    cover = change.astype(np.int16).reshape(height, width + 2).cumsum(axis=1, dtype=np.int16)[:, :width]
    return slice(y0, y1), slice(x0, x1), cover


def _overlap(a: Box, b: Box) -> int:
    """Area that two boxes share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def visible_share(below: Shape, above: Shape) -> float:
    """The share of a shape that another one, drawn later, leaves visible."""
    canvas = np.zeros((SIZE, SIZE), dtype=np.int64)
    rows, columns, count = coverage(above.rings)
    canvas[rows, columns] = count
    rows, columns, count = coverage(below.rings)
    return 1 - int((count * canvas[rows, columns]).sum()) / (FULL * int(count.sum()))


# ---------------------------------------------------------------------------------------------------------- composition

SMALL, LARGE = (18 * UNIT, 31 * UNIT), (32 * UNIT, 110 * UNIT)  # longest side of the box
SMALL_PERCENT, PAIR_PERCENT = 38, 22  # chance of being small; of lying on top of an earlier, still single object
PAIR_IOU = (0.12, 0.45)
PAIR_VISIBLE = 0.6  # of the lower one; others may hide a little more
TOUCH = 0.08  # the most that objects which are no pair share, of the smaller box's area


def compose(bits: RandomBits) -> list[Shape]:
    """Objects of one picture: 3 to 10 shapes, each class as often as any other as far as the number allows."""
    count = bits.between(3, 10)
    labels = [label for _ in range(2) for label in bits.shuffled(tuple(range(len(CLASSES))))][:count]
    shapes: list[Shape] = []
    for label in labels:
        limits = SMALL if bits.below(100) < SMALL_PERCENT else LARGE
        shape = _place_on(shapes, label, limits, bits) if bits.below(100) < PAIR_PERCENT else None
        shape = shape or _place_alone(shapes, label, limits, bits)
        shapes += [shape] if shape else []
    return shapes


def _place_alone(shapes: list[Shape], label: int, limits: tuple[int, int], bits: RandomBits) -> Shape | None:
    """A shape that leaves the others visible; smaller and smaller where space is short, None where there is none."""
    low, high = limits
    share = bits.below(1 << 16)
    longest = low + (((high - low) * share * share) >> 32)  # smaller ones are more frequent
    for _ in range(4):
        rings = _turned(_outline(label, bits), longest, bits.between(80, 100) / 100, bits)
        extent = rings[0].max(axis=0)
        for _ in range(25):
            shift = np.array([bits.between(0, SIZE * UNIT - int(side)) for side in extent])
            shape = Shape(label, tuple(ring + shift for ring in rings))
            if _is_free(shape, shapes, partner=-1):
                return shape
        longest = (longest + low) // 2
    return None


def _place_on(shapes: list[Shape], label: int, limits: tuple[int, int], bits: RandomBits) -> Shape | None:
    """A shape that partly covers an earlier one of a similar size, or None where none fits."""
    taken = {shape.partner for shape in shapes} | {i for i, shape in enumerate(shapes) if shape.partner >= 0}
    for index in bits.shuffled(tuple(range(len(shapes)))):
        other = shapes[index].box
        side = max(other[2] - other[0], other[3] - other[1])
        if index in taken or not limits[0] <= side <= limits[1]:
            continue
        longest = min(max(side * bits.between(70, 140) // 100, limits[0]), limits[1])
        rings = _turned(_outline(label, bits), longest, bits.between(80, 100) / 100, bits)
        extent = rings[0].max(axis=0)
        for _ in range(25):
            corner = [bits.between(other[i] - int(extent[i]), other[i + 2]) for i in (0, 1)]
            if min(corner) < 0 or any(corner[i] + int(extent[i]) > SIZE * UNIT for i in (0, 1)):
                continue
            shape = Shape(label, tuple(ring + np.array(corner) for ring in rings), partner=index)
            shared = _overlap(shape.box, other)
            iou = shared / (_area(shape.box) + _area(other) - shared)
            if not PAIR_IOU[0] <= iou <= PAIR_IOU[1] or not _is_free(shape, shapes, partner=index):
                continue
            if visible_share(shapes[index], shape) >= PAIR_VISIBLE:
                return shape
    return None


def _is_free(shape: Shape, shapes: list[Shape], partner: int) -> bool:
    """Whether a shape keeps away from all others but its partner."""
    box = shape.box
    others = [other.box for index, other in enumerate(shapes) if index != partner]
    return all(_overlap(box, other) <= TOUCH * min(_area(box), _area(other)) for other in others)


# ------------------------------------------------------------------------------------------------------------- painting


def _value_noise(bits: RandomBits, cell: int) -> Shorts:
    """Smooth noise (320, 320) in 0..255: random values on a grid of `cell` pixels, blended by smoothstep."""
    count = SIZE // cell + 2
    grid: npt.NDArray[Any] = bits.bytes(count, count).astype(np.uint16)
    place = 2 * np.arange(cell, dtype=np.int64) + 1  # of a pixel within its cell, in 1 / (2 * cell)
    weight: npt.NDArray[Any] = (256 * place * place * (6 * cell - 2 * place) // (2 * cell) ** 3).astype(np.uint16)
    top, left = bits.below(cell), bits.below(cell)
    grid = (grid[:-1, None] * (256 - weight)[:, None] + grid[1:, None] * weight[:, None]) >> 8
    grid = grid.reshape(-1, count)[top : top + SIZE]
    grid = (grid[:, :-1, None] * (256 - weight) + grid[:, 1:, None] * weight) >> 8
    return grid.reshape(SIZE, -1)[:, left : left + SIZE].astype(np.int16)


def _pattern(bits: RandomBits) -> npt.NDArray[np.int32] | None:
    """Stripes, checks or a gradient (320, 320) in 0..255; None for a picture without."""
    kind = bits.below(5)
    y, x = np.arange(SIZE, dtype=np.int32)[:, None], np.arange(SIZE, dtype=np.int32)[None]
    a, b = bits.between(-12, 12), bits.between(4, 12)
    along, across = a * x + b * y, b * x - a * y
    period = bits.between(60, 320)
    if kind == 0:  # soft stripes
        return np.abs(along % (2 * period) - period) * 255 // period
    if kind == 1:  # hard stripes
        return (along // period & 1) * 255
    if kind == 2:  # checks
        return (along // period + across // period & 1) * 255
    return (along - along.min()) * 255 // int(along.max() - along.min()) if kind == 3 else None


def _background(bits: RandomBits) -> Shorts:
    """A textured background (3, 320, 320) between two colours that are not too far apart to see shapes on."""
    cell = (80, 64, 40)[bits.below(3)]
    mix = (4 * _value_noise(bits, cell) + 2 * _value_noise(bits, cell // 2) + _value_noise(bits, cell // 4)) // 7
    mix = np.clip(2 * mix - 128, 0, 255)
    pattern = _pattern(bits)
    if pattern is not None:
        strength = bits.between(80, 200)
        mix = ((mix.astype(np.int32) * (256 - strength) + pattern * strength) >> 8).astype(np.int16)
    first = [bits.between(20, 235) for _ in range(3)]
    second = [min(max(c + (1 - 2 * bits.below(2)) * bits.between(10, 70), 0), 255) for c in first]
    start = np.array(first, dtype=np.int16)[:, None, None]
    return start + ((mix * (np.array(second, dtype=np.int16)[:, None, None] - start)) >> 8)


def _blend(patch: Shorts, fill: Shorts, cover: Shorts) -> None:
    """Paint `fill` onto the patch (3, h, w) in place, as far as each pixel is covered (h, w)."""
    patch += ((fill - patch) * cover + FULL // 2) // FULL


def _paint_clutter(canvas: Shorts, bits: RandomBits) -> None:
    """Draw thin lines and small irregular blobs, which are no objects, onto the canvas in place."""
    lines, blobs = bits.between(2, 7), bits.between(3, 9)
    for index in range(lines + blobs):
        if index < lines:
            outline, longest = [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)], bits.between(20, 110) * UNIT
            aspect = bits.between(10, 26) * UNIT / 10 / longest
        else:
            corners = _regular(11, *(bits.between(40, 100) / 100 for _ in range(11)))
            outline, longest, aspect = corners, bits.between(5, 13) * UNIT, bits.between(50, 100) / 100
        rings = _turned([outline], longest, aspect, bits)
        shift = np.array([bits.between(0, SIZE * UNIT - int(side)) for side in rings[0].max(axis=0)])
        rows, columns, cover = coverage((rings[0] + shift,))
        _blend(canvas[:, rows, columns], bits.bytes(3, 1, 1).astype(np.int16), cover)


def _colour(bits: RandomBits, others: list[Ints]) -> Ints:
    """A random colour that differs from each of the others enough to be seen."""
    while True:
        colour = bits.bytes(3).astype(np.int64)
        differences = [np.abs(colour - other) for other in others]
        if all(int(d.max()) >= 70 and int(d.sum()) >= 120 for d in differences):
            return colour


def _paint(canvas: Shorts, shapes: list[Shape], bits: RandomBits) -> None:
    """Draw the objects onto the canvas in place: random colours, faintly shaded and textured."""
    texture, background = _value_noise(bits, 16) - 128, canvas.copy()
    colours: list[Ints] = []
    for shape in shapes:
        rows, columns, cover = coverage(shape.rings)
        behind = background[:, rows, columns].reshape(3, -1)
        others = [behind.sum(axis=1, dtype=np.int64) // behind.shape[1]]
        if shape.partner >= 0:
            others.append(colours[shape.partner])
        colours.append(_colour(bits, others))
        height, width = cover.shape
        slope_y, slope_x, grain = bits.between(-16, 16), bits.between(-16, 16), bits.between(0, 24)
        y, x = np.arange(height)[:, None], np.arange(width)[None]
        shade = slope_y * (2 * y - height) // height + slope_x * (2 * x - width) // width
        shade = shade.astype(np.int16) + ((texture[rows, columns] * grain) >> 7)
        _blend(canvas[:, rows, columns], colours[-1].astype(np.int16)[:, None, None] + shade, cover)


def draw(split: str, index: int, seed: int | None = None) -> Picture:
    """One picture: `split` is a key of SPLITS. With a seed it is of another, endless dataset of the same kind."""
    other = () if seed is None else (seed + 1,)  # a seed sequence that ends with 0 is the one without
    bits = RandomBits(VERSION, list(SPLITS).index(split), index, *other)
    canvas = _background(bits)
    _paint_clutter(canvas, bits)
    shapes = compose(bits)
    _paint(canvas, shapes, bits)
    grain = bits.bytes(3, SIZE, SIZE)
    canvas += (((grain >> 4).astype(np.int16) + (grain & 15) - 15) * bits.between(2, 9)) >> 5
    return Picture(np.ascontiguousarray(np.clip(canvas, 0, 255).astype(np.uint8).transpose(1, 2, 0)), tuple(shapes))


# ---------------------------------------------------------------------------------------------------------------- files


def _files(root: Path, split: str, index: int) -> tuple[Path, Path]:
    """The image and label file of a picture."""
    return root / "images" / split / f"{index:04d}.png", root / "labels" / split / f"{index:04d}.txt"


def _version(seed: int | None) -> str:
    return f"shapes {VERSION}\n" if seed is None else f"shapes {VERSION} seed {seed}\n"


def missing_files(
    root: Path, counts: Mapping[str, int] | None = None, seed: int | None = None
) -> list[tuple[str, int]]:
    """Split and index of every picture that has to be drawn; all where another version or seed drew the folder.

    `counts` are the images per split, those of SPLITS unless given; `seed` as in `draw`.
    """
    everything = [(split, index) for split, count in (counts or SPLITS).items() for index in range(count)]
    try:
        if (root / "version.txt").read_text(encoding="utf-8") != _version(seed):
            return everything
        present = {file for file in root.glob("*/*/*") if file.stat().st_size}
    except (OSError, UnicodeDecodeError):
        return everything
    return [job for job in everything if not present.issuperset(_files(root, *job))]


def draw_files(root: Path, counts: Mapping[str, int] | None = None, seed: int | None = None) -> None:
    """Draw what is missing below `root`; OSError where it cannot be written, or is marked read-only."""
    refuse_read_only(root)
    missing = missing_files(root, counts, seed)
    remove_leftovers(root, *(root / kind / split for kind in ("images", "labels") for split in SPLITS))
    LOGGER.info(
        f"Drawing the shapes dataset: {len(missing)} images of {sum((counts or SPLITS).values())} into {root} ..."
    )

    def work(job: tuple[str, int]) -> None:
        picture = draw(*job) if seed is None else draw(*job, seed)
        image_file, label_file = _files(root, *job)
        # noise leaves nothing for PNG's dictionary to find: Huffman codes alone are smaller and faster here
        options = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY]
        _write(label_file, picture.label_text().encode())
        _write(image_file, cv2.imencode(".png", picture.image, options)[1].tobytes())

    # numpy and the PNG encoder let go of the interpreter lock, so threads overlap; more than a few would wait for it
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(work, missing))
    _write(root / "version.txt", _version(seed).encode())


def _write(file: Path, content: bytes) -> None:
    """Write a file so that it is either absent or whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as stream:
        stream.write(content)
