"""Image files of every kind that is read: damaged bytes, damaged PNG blocks with right sums, sizes that lie."""

from __future__ import annotations

import contextlib
import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.fuzz.damage import NUMBERS, damage_bytes
from tests.fuzz.harness import Target
from utils.augmentations import letterboxed
from utils.config import UserError
from utils.images import image_shape, read_image

SIZE_WH = (71, 53)  # numbers that occur nowhere else in a header
# suffix, mode, what Pillow is told
KINDS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("jpg", "RGB", {}),
    ("jpg", "RGB", {"progressive": True, "exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"}),
    ("jpg", "L", {"restart_marker_blocks": 2}),
    ("jpg", "CMYK", {}),
    ("mpo", "RGB", {"save_all": True}),
    ("png", "RGB", {}),
    ("png", "RGBA", {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x08\0\0\0"}),
    ("png", "P", {"transparency": 3}),
    ("png", "I;16", {}),
    ("png", "1", {}),
    ("png", "RGB", {"save_all": True}),
    ("bmp", "RGB", {}),
    ("bmp", "P", {}),
    ("gif", "P", {}),
    ("gif", "P", {"save_all": True}),
    ("webp", "RGB", {"lossless": True}),
    ("webp", "RGBA", {}),
    ("webp", "RGB", {"save_all": True}),
    ("tif", "RGB", {}),
    ("tif", "RGB", {"compression": "tiff_lzw"}),
    ("tif", "L", {"compression": "tiff_deflate"}),
    ("tif", "RGB", {"compression": "jpeg"}),
    ("tif", "CMYK", {"compression": "packbits"}),
    ("tif", "1", {"compression": "group4"}),
    ("tif", "I;16", {"big_tiff": True}),
    ("tif", "F", {}),
    ("ppm", "RGB", {}),
    ("pfm", "F", {}),
    ("jp2", "RGB", {}),
    ("avif", "RGB", {}),
)


def _whole(rng: np.random.Generator) -> tuple[str, bytes]:
    """Suffix and content of a good file."""
    suffix, mode, options = KINDS[int(rng.integers(0, len(KINDS)))]
    ramp = np.linspace(0, 255, SIZE_WH[0] * SIZE_WH[1] * 3).reshape(SIZE_WH[1], SIZE_WH[0], 3).astype(np.uint8)
    noise = rng.integers(0, 4, ramp.shape, dtype=np.uint8)
    picture = Image.fromarray(ramp + noise)
    picture = picture.convert("L").convert(mode) if mode in ("I;16", "F") else picture.convert(mode)
    if "save_all" in options:
        options = {**options, "append_images": [picture.rotate(180)] * 2}
    stream = io.BytesIO()
    name = {"jp2": "JPEG2000", "jpg": "JPEG", "tif": "TIFF", "pfm": "PPM"}.get(suffix, suffix.upper())
    picture.save(stream, name, **options)
    return suffix, stream.getvalue()


def _lie_about_size(rng: np.random.Generator, data: bytes) -> bytes:
    """Some of the places where a side's length stands get another number."""
    out = bytearray(data)
    for side in SIZE_WH:
        for width in (4, 2):
            for order in ("little", "big"):
                number = NUMBERS[int(rng.integers(0, len(NUMBERS)))] if rng.random() < 0.7 else rng.integers(1, 40_000)
                old, new = side.to_bytes(width, order), (int(number) % 2 ** (8 * width)).to_bytes(width, order)  # type: ignore[arg-type]
                place = out.find(old)
                while place >= 0:
                    if rng.random() < 0.5:
                        out[place : place + width] = new
                    place = out.find(old, place + width)
    return bytes(out)


def _damage_png(rng: np.random.Generator, data: bytes) -> bytes:
    """Blocks damaged, doubled, moved, renamed or given other lengths; most of them with the right sums."""
    blocks, position = [], 8
    while position < len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        blocks.append((data[position + 4 : position + 8], data[position + 8 : position + 8 + length]))
        position += 12 + length
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(0, len(blocks)))
        kind, body = blocks[at]
        what = rng.integers(0, 6)
        if what == 0:
            blocks[at] = kind, damage_bytes(rng, body, most=2)
        elif what == 1:
            blocks.insert(int(rng.integers(0, len(blocks))), blocks[at])
        elif what == 2 and len(blocks) > 1:
            del blocks[at]
        elif what == 3:
            names = (b"PLTE", b"tRNS", b"iCCP", b"zTXt", b"acTL", b"fcTL", b"fdAT", b"eXIf", b"gAMA", b"IDAT", b"IEND")
            blocks[at] = names[int(rng.integers(0, len(names)))], body
        elif what == 4 and kind == b"IDAT":
            with contextlib.suppress(zlib.error):  # damaged in an earlier round
                blocks[at] = kind, zlib.compress(damage_bytes(rng, zlib.decompress(body)))
        else:
            blocks[at] = kind, zlib.compress(bytes(int(rng.integers(0, 2**24))))  # what unpacks to much
    out = bytearray(data[:8])
    for kind, body in blocks:
        length = len(body) if rng.random() < 0.97 else NUMBERS[int(rng.integers(0, len(NUMBERS)))] % 2**32
        out += length.to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    return bytes(out)


def _case(rng: np.random.Generator, folder: Path) -> object:
    suffix, data = _whole(rng)
    how = rng.random()
    if suffix == "png" and how < 0.6:
        data = _damage_png(rng, data)
    elif how < 0.8:
        data = _lie_about_size(rng, data)
    if how > 0.7:
        data = damage_bytes(rng, data)
    path = folder / f"a.{suffix}"
    path.write_bytes(data)
    refused = None
    looks: tuple[Callable[[Path], object], ...] = (image_shape, _detect)
    for look in looks:  # both, whatever the first one says
        try:
            look(path)
        except UserError as error:
            refused = error
    if refused is not None:
        raise refused
    return None


def _detect(path: Path) -> None:
    image = read_image(path)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    letterboxed(image, (64, 64), auto=True)


TARGETS: tuple[Target, ...] = (Target("images", _case, seconds=10, megabytes=1000),)
