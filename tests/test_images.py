"""Reading odd and broken image files, and the caches in memory and on disk."""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PillowImage

from utils import images
from utils.config import UserError
from utils.images import ImageError, ImageGone, ImageStore, read_image, resized_hw

RAMP = np.linspace(0, 255, 60 * 80).reshape(60, 80).astype(np.uint8)
RGB = np.dstack((RAMP, np.flipud(RAMP), 255 - RAMP))


def save(path: Path, image: PillowImage.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def mean_difference(image: np.ndarray, rgb: np.ndarray) -> float:
    assert image.shape == rgb.shape and image.dtype == np.uint8 and image.flags.c_contiguous
    return float(np.abs(image[..., ::-1].astype(int) - rgb).mean())


# --- reading ----------------------------------------------------------------------------------------------------------

GREY = np.dstack((RAMP,) * 3)
ODD: dict[str, tuple[str, Callable[[Path], object], np.ndarray]] = {
    "plain": ("a.png", lambda p: save(p, PillowImage.fromarray(RGB)), RGB),
    "non-ASCII name": ("图像 ü.png", lambda p: save(p, PillowImage.fromarray(RGB)), RGB),
    "grey": ("a.png", lambda p: save(p, PillowImage.fromarray(RAMP)), GREY),
    "16-bit": ("a.png", lambda p: save(p, PillowImage.fromarray(RAMP.astype(np.uint16) * 257)), GREY),
    "16-bit tiff": ("a.tif", lambda p: save(p, PillowImage.fromarray(RAMP.astype(np.uint16) * 257)), GREY),
    "alpha": ("a.png", lambda p: save(p, PillowImage.fromarray(np.dstack((RGB, RAMP)))), RGB),
    "palette": ("a.png", lambda p: save(p, PillowImage.fromarray(RGB).quantize(256)), RGB),
    "CMYK": ("a.jpg", lambda p: save(p, PillowImage.fromarray(RGB).convert("CMYK"), quality=95), RGB),
    "bmp": ("a.bmp", lambda p: save(p, PillowImage.fromarray(RGB)), RGB),
    "webp": ("a.webp", lambda p: save(p, PillowImage.fromarray(RGB), quality=95), RGB),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_images_become_three_channels_of_eight_bits(kind: str, tmp_path: Path) -> None:
    name, write, expected = ODD[kind]
    write(tmp_path / name)
    assert mean_difference(read_image(tmp_path / name), expected) < 8


@pytest.mark.parametrize("suffix", (".gif", ".webp", ".png"))
def test_an_animation_gives_its_first_frame(suffix: str, tmp_path: Path) -> None:
    frames = [PillowImage.new("RGB", (40, 30), color) for color in ("red", "lime")]
    path = save(tmp_path / f"a{suffix}", frames[0], save_all=True, append_images=frames[1:])
    assert mean_difference(read_image(path), np.broadcast_to((255, 0, 0), (30, 40, 3))) < 5


@pytest.mark.parametrize(("orientation", "turns"), ((1, 0), (3, 2), (6, -1), (8, 1)))
def test_exif_orientation_turns_the_image_upright(orientation: int, turns: int, tmp_path: Path) -> None:
    exif = PillowImage.Exif()
    exif[274] = orientation
    path = save(tmp_path / "a.jpg", PillowImage.fromarray(RGB), exif=exif, quality=95)
    assert mean_difference(read_image(path), np.rot90(RGB, turns)) < 8


def test_an_image_that_opencv_cannot_open_is_read_with_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images.cv2, "imdecode", lambda *_: None)
    for kind in ("plain", "grey", "16-bit", "alpha", "palette", "CMYK"):
        name, write, expected = ODD[kind]
        path = tmp_path / f"{kind}-{name}"
        write(path)
        assert mean_difference(read_image(path), expected) < 8, kind


def jpeg_bytes(**options: object) -> bytes:
    stream = io.BytesIO()
    PillowImage.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)).save(
        stream, "JPEG", **options
    )
    return stream.getvalue()


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty (0 bytes)"),
    "text": (b"this is no image at all", "not a readable image"),
    "half a jpeg": (jpeg_bytes()[:20_000], "has no end marker in its 20,000 bytes"),
    "jpeg without its last bytes": (jpeg_bytes()[:-2], "has no end marker"),
    "start of a jpeg": (b"\xff\xd8\xff", "not a readable image"),
    "start of a jpeg with fill bytes": (b"\xff\xd8" + b"\xff" * 40, "not a readable image"),
    # a thumbnail in the header ends with the marker that the image itself lacks
    "half a jpeg with a thumbnail": (
        jpeg_bytes(exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + jpeg_bytes(quality=5))[:-500],
        "has no end marker",
    ),
    "jpeg header": (jpeg_bytes()[:100], "not a readable image"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_images_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    data, message = BROKEN[kind]
    path = tmp_path / "broken.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=re.escape(message)) as caught:
        read_image(path)
    assert "broken.jpg" in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize("suffix", ("png", "bmp", "webp", "gif", "tif"))
def test_half_an_image_of_another_format_is_refused(suffix: str, tmp_path: Path) -> None:
    whole = save(tmp_path / f"a.{suffix}", PillowImage.fromarray(RGB)).read_bytes()
    half = tmp_path / f"half.{suffix}"
    half.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match="not a readable image"):
        read_image(half)


def test_a_missing_image_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"nowhere\.jpg: cannot be read \(No such file"):
        read_image(tmp_path / "nowhere.jpg")
    with pytest.raises(ImageError, match="cannot be read"):
        read_image(tmp_path)


def test_thirty_two_bit_pixels_are_refused_with_the_remedy(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", PillowImage.fromarray(RAMP.astype(np.float32)))
    with pytest.raises(ImageError, match="8 or 16 bits"):
        read_image(path)


def test_bytes_after_the_end_of_a_jpeg_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg_bytes() + b"trailer" * 1000)
    assert read_image(tmp_path / "a.jpg").shape == (200, 300, 3)


# --- resizing ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 8000), st.integers(1, 8000), st.sampled_from((64, 320, 640, 1280)))
def test_the_longer_side_becomes_the_size_and_the_other_is_rounded_up(height: int, width: int, imgsz: int) -> None:
    new_h, new_w = resized_hw((height, width), imgsz)
    assert max(new_h, new_w) == imgsz
    exact = min(height, width) * imgsz / max(height, width)
    assert exact - 1e-6 <= min(new_h, new_w) < exact + 1


# --- caches -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("YOLOV5_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = []
    for i, (height, width) in enumerate(((50, 64), (64, 40), (30, 30), (128, 100))):
        paths.append(folder / f"{i}.png")
        cv2.imwrite(str(paths[-1]), rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return paths


def make_store(
    files: list[Path], cache: images.Cache | None = None, *, imgsz: int = 64, smooth: bool = True
) -> ImageStore:
    shapes = [read_image(file).shape for file in files]
    return ImageStore([str(f) for f in files], [s[:2] for s in shapes], imgsz, smooth=smooth, cache=cache)


@pytest.mark.parametrize("smooth", (True, False))
@pytest.mark.parametrize("cache", ("ram", "disk"))
def test_caches_give_the_same_pixels(cache: images.Cache, smooth: bool, files: list[Path], own_cache: Path) -> None:
    plain = make_store(files, smooth=smooth)
    expected = [plain.load(i) for i in range(len(files))]
    assert [image.shape for image in expected] == [(50, 64, 3), (64, 40, 3), (64, 64, 3), (64, 50, 3)]
    cached = make_store(files, cache, smooth=smooth)
    for i, image in enumerate(expected):
        assert np.array_equal(cached.load(i), image)
    assert cached.in_memory == (cache == "ram")
    assert len(list(own_cache.rglob("*.npy"))) == (len(files) if cache == "disk" else 0)


def test_images_in_memory_need_no_file_and_cannot_be_written_to(files: list[Path]) -> None:
    store = make_store(files, "ram")
    for file in files:
        file.unlink()
    assert store.load(0).shape == (50, 64, 3)
    assert not store.load(0).flags.writeable, "all workers share these pixels"


def test_the_disk_cache_is_read_and_never_lies_beside_the_images(
    files: list[Path], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(files[0].parent.iterdir())
    expected = [make_store(files, "disk").load(i) for i in range(len(files))]
    assert sorted(files[0].parent.iterdir()) == before
    again = make_store(files, "disk")
    monkeypatch.setattr(images, "read_image", lambda path: pytest.fail(f"{path} was decoded again"))
    for i, image in enumerate(expected):
        assert np.array_equal(again.load(i), image)


def test_a_changed_image_is_not_taken_from_the_disk_cache(files: list[Path], own_cache: Path) -> None:
    make_store(files, "disk")
    cv2.imwrite(str(files[0]), np.zeros((50, 64, 3), np.uint8))
    os.utime(files[0], ns=(1, 1))
    store = make_store(files, "disk")
    assert (store.load(0) == 0).all()
    assert len(list(own_cache.rglob("*.npy"))) == len(files), "the stale file stayed"


def test_a_broken_file_in_the_disk_cache_is_decoded_instead(files: list[Path], own_cache: Path) -> None:
    expected = make_store(files).load(1)
    store = make_store(files, "disk")
    for size in (200, 127, 0):
        for file in own_cache.rglob("*.npy"):
            file.write_bytes(file.read_bytes()[:size])
        assert np.array_equal(store.load(1), expected)
    for file in own_cache.rglob("*.npy"):
        np.save(file, np.zeros((64, 40, 3), np.float32))
    assert np.array_equal(store.load(1), expected)
    shutil.rmtree(own_cache)
    assert np.array_equal(store.load(1), expected)


def test_images_that_do_not_fit_into_memory_are_read_from_their_files(
    files: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(images, "available_memory", lambda: 1000)
    monkeypatch.setattr(logging.getLogger("yolov5"), "propagate", True)
    store = make_store(files, "ram")
    assert not store.in_memory and "not cached" in caplog.text
    assert store.load(0).shape == (50, 64, 3)


@pytest.mark.parametrize(("share", "kept"), ((0.999, True), (1.001, False)))
def test_images_are_kept_unasked_where_they_take_a_small_share_of_the_memory(
    share: float, kept: bool, files: list[Path], monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    size = 3 * 64 * (50 + 40 + 64 + 50)
    monkeypatch.setattr(images, "available_memory", lambda: int(size / images.SMALL_SHARE / share) + 1)
    plain, store = make_store(files), make_store(files, "auto")
    assert store.in_memory == kept
    assert [line for line in said if "keeping the 4 decoded images in memory" in line and "--cache none" in line] == (
        said if kept else []
    )
    assert all(np.array_equal(store.load(i), plain.load(i)) for i in range(len(files)))


def test_nothing_is_kept_unasked_where_the_free_memory_is_unknown(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "available_memory", lambda: None)
    assert not make_store(files, "auto").in_memory


def _write_group(folder: Path, limit: str, used: int, cached: int, *, version: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"{'total_' * (version == 1)}inactive_file {cached}\nother 1\n")


@pytest.mark.parametrize("version", (1, 2))
def test_the_limits_of_all_containers_around_a_process_count(version: int, tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    top = root / "memory" if version == 1 else root
    own.write_text("5:cpu:/a/b\n4:memory:/a/b\n" if version == 1 else "0::/a/b\n")
    _write_group(top / "a/b", str(2**63 - 4096) if version == 1 else "max", 100, 0, version=version)
    _write_group(top / "a", "1000", 700, 50, version=version)
    _write_group(top, "9000", 800, 0, version=version)
    left = images._free_in_groups(own, root)
    assert min(left) == 350 and 8200 in left
    own.write_text(own.read_text().replace("/a/b", "/outside/of/the/container"))
    assert images._free_in_groups(own, root) == [8200]
    assert images._free_in_groups(tmp_path / "absent", root) == []


def test_available_memory_is_known_on_linux() -> None:
    if not Path("/proc/meminfo").exists():
        pytest.skip("no /proc/meminfo on this system")
    available = images.available_memory()
    assert available is not None and 2**20 < available < 2**50


@pytest.mark.parametrize("cache", ("ram", "disk"))
def test_a_broken_image_is_not_cached_and_says_so_when_it_is_wanted(
    cache: images.Cache, files: list[Path], own_cache: Path
) -> None:
    shapes = [read_image(file).shape[:2] for file in files]
    files[2].write_bytes(b"")
    store = ImageStore([str(f) for f in files], shapes, 64, smooth=True, cache=cache)
    for index in (0, 1, 3):
        assert store.load(index).any()
    for _ in range(2):
        with pytest.raises(ImageError, match=re.escape(f"{files[2].name}: the image file is empty")):
            store.load(2)


@pytest.mark.parametrize("cache", ("ram", "disk"))
def test_an_image_that_is_gone_ends_caching_with_its_name(
    cache: images.Cache, files: list[Path], own_cache: Path
) -> None:
    shapes = [read_image(file).shape[:2] for file in files]
    files[2].unlink()
    with pytest.raises(ImageGone, match=re.escape(f"{files[2].name}: cannot be read (No such file")):
        ImageStore([str(f) for f in files], shapes, 64, smooth=True, cache=cache)


def test_an_image_whose_size_changed_since_the_scan_is_refused(files: list[Path]) -> None:
    store = make_store(files)
    cv2.imwrite(str(files[0]), np.zeros((20, 64, 3), np.uint8))
    with pytest.raises(ImageError, match=r"0\.png: decodes to 64x20 pixels, but 64x50"):
        store.load(0)


def test_shrinking_averages_for_validation_and_interpolates_for_training(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::4] = 255
    cv2.imwrite(str(tmp_path / "a.png"), stripes)
    validation, training = (
        make_store([tmp_path / "a.png"], imgsz=16, smooth=smooth).load(0) for smooth in (True, False)
    )
    assert (validation == 64).all() and (training == 0).all()
