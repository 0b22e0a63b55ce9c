"""Image files: decoding any of them to BGR pixels, and keeping the resized ones in memory or on disk.

Nothing is ever written beside the user's images.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import shutil
import struct
import tokenize
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Literal

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image as PillowImage
from PIL import ImageOps

from utils.config import UserError, display_path
from utils.distributed import rank
from utils.files import remove_leftovers, replacing, user_cache_dir
from utils.progress import Bar
from utils.runtime import LOGGER
from utils.samples import Paths

Image = npt.NDArray[np.uint8]
Cache = Literal["auto", "ram", "disk"]
CACHE_MARGIN = 1.1  # times the cached images' size must be free, so that the rest of the run still fits
SMALL_SHARE = 0.1  # of the available memory, which images may take unasked
NPY_HEADER = 128  # bytes
MIN_SIDE = 10  # pixels; smaller images are taken for damaged ones
MAX_PIXELS = 100_000_000  # decoding takes up to 9 bytes of memory a pixel, the file among them
BYTES_PER_PIXEL, SMALL_FILE = 4, 1 << 20  # a file holds at most so many bytes per allowed pixel, or that many at all
BEFORE_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"acTL")  # blocks of a PNG that may not follow its pixels
MAX_PNG_BLOCKS = 1_000_000
MAX_SCANS, MAX_SCANNED_PIXELS = 30, 1_000_000_000  # of a JPEG; a core goes over some 600 million pixels a second
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000", "AVIF")  # Pillow's names
DAMAGED = (OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, OverflowError, MemoryError)
# what Pillow and its plugins raise at files that are not what their first bytes say
UNREADABLE = (*DAMAGED, RuntimeError, struct.error, zlib.error, PillowImage.DecompressionBombError)
UNREADABLE_ARRAY = (*DAMAGED, tokenize.TokenError)  # what NumPy raises at files that hold no array, or a damaged one


class ImageError(UserError):
    """An image file that cannot be turned into pixels."""


class ImageGone(ImageError):
    """An image file that cannot be opened or read: the disk, the folder or the permissions are at fault."""


# ------------------------------------------------------------------------------------------------------------- reading


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Image:
    """The image `(h, w, 3)` in BGR, upright by its EXIF orientation.

    Grey, palette and CMYK images are converted, 16 bits scaled to 8, alpha is dropped, and of an animation the first
    frame is taken. File names may hold any character.

    Raises:
        ImageError: missing, empty, cut short, not an image, or of more than `max_pixels`, which the header says before
            anything is decoded. A truncated JPEG is refused, where OpenCV may fill the rest with grey.
    """
    with _one_line(path):
        with open(path, "rb") as file:  # cv2.imread cannot open every name on Windows
            _check_bytes(path, file, max_pixels)
            data = file.read()
        opened = _opened(path, io.BytesIO(data), max_pixels)
        _check_scans(path, data, opened.size)
        try:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        except cv2.error:  # a decoder that gave up
            image = None
        if image is not None and image.ndim == 3:  # 32-bit grey comes with two
            return np.asarray(image, np.uint8)
        return _decoded_by_pillow(path, opened, max_pixels)


def image_shape(path: str | Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width in pixels, upright by EXIF, of a whole image; JPEG and PNG are not decoded for it.

    Raises:
        ImageError: as for `read_image`, or a side under 10 pixels.
    """
    with _one_line(path), open(path, "rb") as file:
        _check_bytes(path, file, max_pixels)
        opened = _opened(path, file, max_pixels)
        width, height = opened.size
        if opened.format in ("JPEG", "MPO") or (opened.format == "PNG" and b"eXIf" in _check_sums(file)):
            # Pillow decodes a whole PNG to look for EXIF, so it is asked only where there is some
            if opened.getexif().get(0x0112, 1) in (5, 6, 7, 8):  # orientation: a quarter turn
                width, height = height, width
        elif opened.format != "PNG":
            height, width = read_image(path, max_pixels).shape[:2]
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{display_path(path)}: {width} x {height} pixels; images need at least {MIN_SIDE} each way.")
    return height, width


@contextlib.contextmanager
def _one_line(path: str | Path) -> Iterator[None]:
    """Whatever Pillow raises at a damaged file, and the system at one it cannot open, as an ImageError."""
    try:
        yield
    except ImageError:
        raise
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.strerror:  # the system's: Pillow's own have no number
            raise ImageGone(f"{display_path(path)}: cannot be read ({error.strerror}).") from None
        reason = (str(error) or type(error).__name__).splitlines()[0].replace(str(path), "the file")
        raise ImageError(f"{display_path(path)}: not a readable image ({reason}). Replace or remove it.") from None


def _check_bytes(path: str | Path, file: BinaryIO, max_pixels: int) -> None:
    """Refuse an empty file, and one too large to be read into memory whole."""
    size = os.fstat(file.fileno()).st_size
    if not size:
        raise ImageError(f"{display_path(path)}: the image file is empty (0 bytes). Replace or remove it.")
    if size > max(BYTES_PER_PIXEL * max_pixels, SMALL_FILE):
        raise ImageError(
            f"{display_path(path)}: a file of {size / 1e6:,.0f} MB; read are at most {BYTES_PER_PIXEL} bytes per "
            f"allowed pixel. Save it compressed, or raise --max-megapixels {max_pixels / 1e6:g}."
        )


def _opened(path: str | Path, file: BinaryIO, max_pixels: int) -> PillowImage.Image:
    """The whole image's header, read by Pillow; nothing is decoded.

    Its `Image.open` would start Ghostscript for an EPS file of any name, and has one bound for the whole process.
    """
    PillowImage.init()
    start = file.read(16)
    for name in FORMATS:
        make, accepts = PillowImage.OPEN.get(name, (None, None))
        if make is None or accepts is None or accepts(start) is not True:
            continue
        file.seek(0)
        opened = make(file, "")
        pixels = math.prod(opened.size)
        if pixels > max_pixels:
            raise ImageError(
                f"{display_path(path)}: {opened.size[0]} x {opened.size[1]} pixels are {pixels / 1e6:,.1f} megapixels; "
                f"at most --max-megapixels {max_pixels / 1e6:g} are read. Make the image smaller, or raise that."
            )
        if opened.format in ("JPEG", "MPO"):
            _check_end(file)
        elif opened.format == "PNG":
            _check_blocks(file)
        return opened
    raise ImageError(f"{display_path(path)}: not a readable image (of no kind that is read). Replace or remove it.")


def _check_end(file: BinaryIO) -> None:
    """ValueError where no end marker follows a JPEG's header, in which a thumbnail may have one of its own."""
    start = file.tell()  # Pillow has read up to the pixels
    size = file.seek(0, os.SEEK_END)
    for position in (max(start, size - 4096), start):
        file.seek(position)
        if b"\xff\xd9" in file.read():
            return
    raise ValueError(f"cut short: the JPEG has no end marker in its {size:,} bytes")


def _check_blocks(file: BinaryIO) -> None:
    """ValueError where a PNG's blocks do not fit the file, or stand in an order that PNG forbids.

    OpenCV takes memory for whatever length a block claims, and crashes on a palette's transparency between the frames
    of an animation.
    """
    size, position, has_pixels, before = file.seek(0, os.SEEK_END), 8, False, b""
    for _ in range(MAX_PNG_BLOCKS):
        file.seek(position)
        head = file.read(8)
        if has_pixels and (head[4:] in BEFORE_PIXELS or (head[4:] == b"IDAT" != before)):
            raise ValueError(f"the PNG's block {head[4:]!r} is out of place")
        before = head[4:]
        has_pixels |= before == b"IDAT"
        position += 12 + int.from_bytes(head[:4], "big")
        if position > size:
            raise ValueError("cut short: the PNG ends inside a block")
        if head[4:] == b"IEND":
            if not has_pixels:  # OpenCV would go on looking for them behind the end
                raise ValueError("the PNG has no pixels")
            return
    raise ValueError(f"the PNG has more than {MAX_PNG_BLOCKS:,} blocks")


def _check_sums(file: BinaryIO) -> set[bytes]:
    """The kinds of a PNG's blocks, whose lengths are right; ValueError where one is damaged."""
    file.seek(0)
    content, position, kind, kinds = memoryview(file.read()), 8, b"", set()
    while kind != b"IEND":
        end = position + 12 + int.from_bytes(content[position : position + 4], "big")
        kind = bytes(content[position + 4 : position + 8])
        if zlib.crc32(content[position + 4 : end - 4]) != int.from_bytes(content[end - 4 : end], "big"):
            raise ValueError(f"damaged: the PNG's block {kind!r} has a wrong checksum")
        kinds.add(kind)
        position = end
    return kinds


def _check_scans(path: str | Path, data: bytes, size_wh: tuple[int, int]) -> None:
    """Refuse a progressive JPEG that goes over its pixels for hours; cameras and programs write some ten scans."""
    if data.startswith(b"\xff\xd8\xff"):
        scans = data.count(b"\xff\xda")
        if scans > MAX_SCANS and scans * math.prod(size_wh) > MAX_SCANNED_PIXELS:
            raise ImageError(
                f"{display_path(path)}: the JPEG has {scans} scans, expected at most {MAX_SCANS}. Save it anew."
            )


def _decoded_by_pillow(path: str | Path, opened: PillowImage.Image, max_pixels: int) -> Image:
    """For formats that this OpenCV was built without, such as GIF before 4.11; it takes twice OpenCV's memory."""
    if math.prod(opened.size) > max_pixels // 2:
        raise ImageError(f"{display_path(path)}: OpenCV cannot decode this {opened.format}. Save it as JPEG or PNG.")
    upright = ImageOps.exif_transpose(opened)
    if upright.mode.startswith("I;16"):
        grey = (np.asarray(upright, np.uint32) // 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if upright.mode in ("I", "F"):
        raise ImageError(f"{display_path(path)}: 32-bit pixels have no agreed white. Save the image with 8 or 16 bits.")
    return np.ascontiguousarray(np.asarray(upright.convert("RGB"))[..., ::-1])


# --------------------------------------------------------------------------------------------------------------- store


def resized_hw(shape_hw: tuple[int, int], imgsz: int) -> tuple[int, int]:
    """Height and width with the longer side `imgsz`, the other rounded up."""
    height, width = _resized_shapes(np.array((shape_hw,)), imgsz)[0].tolist()
    return height, width


def _resized_shapes(shapes_hw: npt.NDArray[np.int64], imgsz: int) -> npt.NDArray[np.int64]:
    """`resized_hw` of `(n, 2)` at once."""
    scale = imgsz / shapes_hw.max(1, keepdims=True)
    # the tiny offset keeps e.g. 333 * (640 / 333) from being rounded up to 641
    return np.maximum(np.ceil(shapes_hw * scale - 1e-9), 1).astype(np.int64)


class ImageStore:
    """A dataset's images with the longer side `imgsz`, from their files or from a cache filled before workers start.

    `shapes_hw` are the files' heights and widths; `smooth` averages where an image shrinks (OpenCV's area mode) instead
    of interpolating. With `cache="ram"` the pixels of all images lie in one block that forked workers share;
    `processes` is how many hold such a block on this machine. `"auto"` is the same where the blocks fit SMALL_SHARE of
    the available memory, and no cache elsewhere. With `"disk"` they are files in the user's cache folder.
    An image that cannot be decoded is cached by neither, and `load` raises what is wrong with it.
    """

    def __init__(
        self,
        paths: Paths | Sequence[str],
        shapes_hw: npt.ArrayLike,
        imgsz: int,
        *,
        smooth: bool,
        cache: Cache | None = None,
        processes: int = 1,
        max_pixels: int = MAX_PIXELS,
        prefix: str = "",
    ) -> None:
        self.imgsz, self.smooth, self.processes, self.prefix = imgsz, smooth, processes, prefix
        self.max_pixels = max_pixels
        self._paths = paths if isinstance(paths, Paths) else Paths(paths)
        self.shapes_hw = np.array(shapes_hw, np.int64).reshape(-1, 2)
        sizes = _resized_shapes(self.shapes_hw, imgsz).prod(1) * 3
        self._starts = np.concatenate(([0], np.cumsum(sizes)))
        self._arena: Image | None = None
        self._broken: dict[int, str] = {}  # of the images in memory
        self._folder: Path | None = None
        if cache == "ram" or (cache == "auto" and self._is_small()):
            self._fill_memory()
        elif cache == "disk":
            self._fill_disk()

    @property
    def in_memory(self) -> bool:
        return self._arena is not None

    def path(self, index: int) -> str:
        return self._paths[index]

    def load(self, index: int) -> Image:
        """Image `index` resized; read-only where it comes from memory.

        Raises:
            ImageError: it cannot be decoded, or has another size than when it was scanned.
        """
        if index in self._broken:
            raise ImageError(self._broken[index])
        if self._arena is not None:
            return self._slot(self._arena, index)
        if self._folder is not None:
            # gone or broken since: decode instead
            with contextlib.suppress(*UNREADABLE_ARRAY), open(self._cache_file(index), "rb") as file:
                image = np.lib.format.read_array(file)  # refuses pickles by itself
                if image.dtype == np.uint8 and image.shape == (*self.resized_hw(index), 3):
                    return np.asarray(image, np.uint8)
        return self._decode(index)

    def resized_hw(self, index: int) -> tuple[int, int]:
        """Height and width that `load` gives."""
        height, width = self.shapes_hw[index].tolist()
        return resized_hw((height, width), self.imgsz)

    def _slot(self, arena: Image, index: int) -> Image:
        return arena[self._starts[index] : self._starts[index + 1]].reshape(*self.resized_hw(index), 3)

    def _decode(self, index: int) -> Image:
        image = read_image(self.path(index), self.max_pixels)
        height, width = self.shapes_hw[index].tolist()
        if image.shape[:2] != (height, width):
            raise ImageError(
                f"{display_path(self.path(index))}: decodes to {image.shape[1]}x{image.shape[0]} pixels, but "
                f"{width}x{height} were found when the labels were scanned. Leave images alone during a run; if nobody "
                "changed this one, save it anew."
            )
        new_h, new_w = self.resized_hw(index)
        if (new_h, new_w) == (height, width):
            return image
        shrinks = max(new_h, new_w) < max(height, width)
        how = cv2.INTER_AREA if shrinks and self.smooth else cv2.INTER_LINEAR
        return np.asarray(cv2.resize(image, (new_w, new_h), interpolation=how), np.uint8)

    def _is_small(self) -> bool:
        """Whether the images may be kept in memory unasked; logged where they are, with the way to switch it off."""
        needed, free = int(self._starts[-1]) * self.processes, available_memory()
        small = free is not None and needed <= SMALL_SHARE * free
        if small:
            LOGGER.info(
                f"{self.prefix}keeping the {len(self._paths)} decoded images in memory ({needed / 1e6:,.0f} MB, at "
                f"most {SMALL_SHARE:.0%} of what is free); --cache none decodes them every time."
            )
        return small

    def _fill_memory(self) -> None:
        needed, free = int(self._starts[-1]) * self.processes, available_memory()
        if free is not None and needed * CACHE_MARGIN > free:
            LOGGER.warning(
                f"{self.prefix}images need {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are available: "
                "not cached. Try --cache disk."
            )
            return
        arena = np.empty(int(self._starts[-1]), np.uint8)

        def fill(index: int) -> None:
            try:
                self._slot(arena, index)[...] = self._decode(index)
            except ImageGone:
                raise
            except ImageError as error:
                self._broken[index] = str(error)

        self._for_all(fill, f"{needed / 2**30:.2f} GiB in memory")
        arena.flags.writeable = False
        self._arena = arena

    def _fill_disk(self) -> None:
        self._folder = folder = user_cache_dir() / "images"
        folder.mkdir(parents=True, exist_ok=True)
        absent = [i for i in range(len(self._paths)) if not self._cache_file(i).exists()]
        needed = sum(int(self._starts[i + 1] - self._starts[i]) + NPY_HEADER for i in absent)
        free = shutil.disk_usage(folder).free
        if needed * CACHE_MARGIN > free:
            LOGGER.warning(
                f"{self.prefix}images need {needed / 2**30:.1f} GiB in {folder}, {free / 2**30:.1f} GiB are free: not "
                "cached. Free some space, or set YOLOV5_CACHE_DIR to a folder on a larger disk."
            )
            self._folder = None
            return
        if absent:
            self._for_all(self._write, f"{needed / 2**30:.2f} GiB in {folder}", absent)

    def _cache_file(self, index: int) -> Path:
        """Named after the image's place, how it is resized, and its size and time of change: a changed image misses."""
        assert self._folder is not None
        path = os.path.realpath(self.path(index))
        try:
            stat = os.stat(path)
        except OSError as error:
            raise ImageGone(f"{display_path(path)}: cannot be read ({error.strerror}).") from None
        place = hashlib.sha256(os.fsencode(path)).hexdigest()[:24]
        how = "area" if self.smooth else "linear"
        return self._folder / f"{place}-{self.imgsz}-{how}" / f"{stat.st_size:x}-{stat.st_mtime_ns:x}.npy"

    def _write(self, index: int) -> None:
        file = self._cache_file(index)
        try:
            image = self._decode(index)
        except ImageGone:
            raise
        except ImageError:  # `load` says it again
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        for stale in file.parent.glob("*.npy"):
            stale.unlink(missing_ok=True)
        remove_leftovers(file.parent)
        with replacing(file) as stream:
            np.save(stream, image)

    def _for_all(self, work: Callable[[int], None], what: str, indices: Sequence[int] | None = None) -> None:
        todo = range(len(self._paths)) if indices is None else indices
        with ThreadPoolExecutor(num_cpus()) as pool:  # OpenCV decodes without holding the interpreter's lock
            text = f"{self.prefix}caching images, {what}"
            try:
                for _ in Bar(pool.map(work, todo), text, total=len(todo), show=rank() <= 0):
                    pass
            finally:
                pool.shutdown(cancel_futures=True)  # a broken image ends it now, not after all others


def available_memory() -> int | None:
    """Bytes that can be taken without swapping, by the system and the containers' limits; None where nobody tells."""
    limits = _free_in_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        limits.append(int(dict(line.split(":") for line in lines)["MemAvailable"].split()[0]) * 1024)
    return min(limits, default=None)


def _free_in_groups(own: Path, root: Path) -> list[int]:
    """What each control group (version 1 or 2) that limits this process's memory has left: its own and those above.

    `own` names the groups by their paths below `root`; inside a container the paths may be those outside of it, and
    `root` itself is then the process's group.
    """
    try:
        groups = [line.split(":", 2)[1:] for line in own.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []
    left = []
    for controllers, path in groups:
        if not controllers:
            top, limit, used, cached = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top = root / "memory"
            limit, used, cached = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError, KeyError):  # no limit reads "max", which is no number
                free = int((folder / limit).read_text()) - int((folder / used).read_text())
                usage = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                left.append(free + int(usage[cached]))  # cached file contents are given up when memory is wanted
            if folder == top:
                break
    return left


def num_cpus() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
