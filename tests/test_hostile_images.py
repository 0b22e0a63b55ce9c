"""Image files that claim more than they hold, or unpack to more than fits: refused in one line, within bounds."""

from __future__ import annotations

import contextlib
import io
import subprocess
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.fuzz.harness import _reset_peak, _status
from utils import images
from utils.images import MAX_PIXELS, ImageError, image_shape, read_image

LOOKS = (image_shape, read_image)


@contextlib.contextmanager
def at_most(seconds: float, megabytes: float) -> Iterator[None]:
    """The block takes at most so much CPU, and so much memory beyond what was there (0 where the system is silent)."""
    _reset_peak()
    cpu, memory = time.process_time(), _status("VmRSS")
    yield
    grown, spent = _status("VmHWM") - memory, time.process_time() - cpu
    assert spent < seconds and grown < megabytes, f"{spent:.1f} s of CPU, {grown:.0f} MB"


def block(kind: bytes, body: bytes, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return size.to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def header(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + block(b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\2\0\0\0")


def unpacks_to(megabytes: int) -> bytes:
    """A zlib stream of so many zeros, put together from equal parts."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    part = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    checksum = (megabytes << 20) % 65521 << 16 | 1
    return b"\x78\xda" + part * megabytes + b"\3\0" + checksum.to_bytes(4, "big")


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x7FFFFFFF, 10_000])
def test_a_png_whose_block_claims_more_than_the_file_takes_no_memory(look: object, length: int, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(header(40, 30) + block(b"IDAT", zlib.compress(bytes(30 * 121)), length) + block(b"IEND", b""))
    with at_most(1, 50), pytest.raises(ImageError, match=r"a\.png: .*cut short: the PNG ends inside a block"):
        look(path)  # type: ignore[operator]


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize(
    "kinds", [(b"IDAT", b"tRNS"), (b"IDAT", b"PLTE"), (b"IDAT", b"acTL"), (b"IDAT", b"tEXt", b"IDAT")]
)
def test_a_png_with_blocks_out_of_place_is_refused(look: object, kinds: tuple[bytes, ...], tmp_path: Path) -> None:
    """OpenCV 5.0.0 crashes where tRNS stands between the frames of an animation."""
    pixels = zlib.compress(bytes(30 * 121))
    body = b"".join(block(kind, pixels if kind == b"IDAT" else bytes(6)) for kind in kinds)
    path = tmp_path / "a.png"
    path.write_bytes(header(40, 30) + body + block(b"IEND", b""))
    with pytest.raises(ImageError, match=rf"a\.png: .*the PNG's block {kinds[-1]!r} is out of place"):
        look(path)  # type: ignore[operator]


def test_a_png_that_ends_before_its_pixels_is_not_searched_for_them(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(header(40, 30) + block(b"IEND", b"") + block(b"PLTE", b"", 0x7FFFFFFF))
    with at_most(1, 50), pytest.raises(ImageError, match="the PNG has no pixels"):
        read_image(path)


@pytest.mark.parametrize("look", LOOKS)
def test_a_valid_png_of_448_megapixels_is_refused_by_its_header(look: object, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(header(28_000, 16_000) + block(b"IDAT", unpacks_to(1282)) + block(b"IEND", b""))
    with (
        at_most(1, 50),
        pytest.raises(ImageError, match=r"28000 x 16000 pixels are 448\.0 megapixels; .*megapixels 100"),
    ):
        look(path)  # type: ignore[operator]


@pytest.mark.slow
def test_an_image_of_the_most_pixels_is_read_in_less_than_a_gigabyte(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(header(12_500, 8_000) + block(b"IDAT", unpacks_to(287)) + block(b"IEND", b""))
    with at_most(20, 1000):
        assert read_image(path).shape == (8_000, 12_500, 3)


@pytest.mark.parametrize("suffix", ["jpg", "mpo", "png", "bmp", "tif", "webp", "gif", "ppm", "pgm", "jp2", "avif"])
@pytest.mark.parametrize("look", LOOKS)
def test_pixels_are_counted_before_any_is_decoded_in_every_format(
    look: object, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.new("L" if suffix == "pgm" else "RGB", (60, 40)).save(path)
    assert image_shape(path, 2400) == (40, 60) and read_image(path, 2400).shape == (40, 60, 3)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=rf"a\.{suffix}: 60 x 40 pixels are 0\.0 megapixels; at most --max-megapixels"):
        look(path, 2399)  # type: ignore[operator]


@pytest.mark.parametrize("look", LOOKS)
def test_a_file_with_more_bytes_than_its_pixels_can_need_is_not_read(look: object, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.new("RGB", (60, 40)).save(path)
    with path.open("ab") as file:
        file.truncate(3 << 30)
    with at_most(1, 50), pytest.raises(ImageError, match=r"a file of 3,221 MB; .* raise --max-megapixels 100"):
        look(path)  # type: ignore[operator]


def test_a_progressive_jpeg_of_thousands_of_scans_is_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("L", (6000, 5000)).save(stream, "JPEG", progressive=True)
    data, path = stream.getvalue(), tmp_path / "a.jpg"
    last = data[data.rfind(b"\xff\xda") : -2]
    path.write_bytes(data[:-2] + last * 3000 + data[-2:])
    with at_most(1, 300), pytest.raises(ImageError, match="the JPEG has 3006 scans"):
        read_image(path)


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 40\n", b"SIMPLE  =", b"8BPS\0\1"])
def test_kinds_that_no_dataset_has_are_not_opened_whatever_their_suffix(
    look: object, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("Ghostscript was started"))
    (tmp_path / "a.jpg").write_bytes(content * 20)
    with pytest.raises(ImageError, match=r"a\.jpg: not a readable image \(of no kind"):
        look(tmp_path / "a.jpg")  # type: ignore[operator]


@pytest.mark.parametrize("look", LOOKS)
def test_pixels_of_32_bits_are_refused_in_grey_maps_too(look: object, tmp_path: Path) -> None:
    (tmp_path / "a.pfm").write_bytes(b"Pf\n60 40\n-1.0\n" + np.zeros((40, 60), "<f4").tobytes())
    with pytest.raises(ImageError, match="32-bit pixels"):
        look(tmp_path / "a.pfm")  # type: ignore[operator]


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("name", ["a\0b.jpg", "a" * 300 + ".jpg"])
def test_names_that_no_file_can_have_are_one_line(look: object, name: str) -> None:
    with pytest.raises(ImageError) as caught:
        look(name)  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def test_the_flag_s_default_is_the_bound_of_the_readers() -> None:
    import detect
    import train
    import val

    for script in (detect, train, val):
        assert script.build_parser().parse_args([]).max_megapixels * 1_000_000 == MAX_PIXELS == images.MAX_PIXELS
