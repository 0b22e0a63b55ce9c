"""Image files: decoding any of them to BGR pixels, and keeping the resized ones in memory or on disk.

Nothing is ever written beside the user's images.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image as PillowImage
from PIL import ImageOps
from tqdm import tqdm

from utils.config import UserError
from utils.files import remove_leftovers, replacing, user_cache_dir
from utils.runtime import LOGGER, rank, relative

Image = npt.NDArray[np.uint8]
Cache = Literal["ram", "disk"]
CACHE_MARGIN = 1.1  # times the cached images' size must be free, so that the rest of the run still fits
NPY_HEADER = 128  # bytes


class ImageError(UserError):
    """An image file that cannot be turned into pixels."""


# ------------------------------------------------------------------------------------------------------------- reading


def read_image(path: str | Path) -> Image:
    """The image `(h, w, 3)` in BGR, upright by its EXIF orientation.

    Grey, palette and CMYK images are converted, 16 bits scaled to 8, alpha is dropped, and of an animation the first
    frame is taken. File names may hold any character.

    Raises:
        ImageError: missing, empty, cut short, or not an image. A truncated JPEG is refused, where OpenCV may fill the
            rest with grey.
    """
    try:
        data = Path(path).read_bytes()  # cv2.imread cannot open every name on Windows
    except OSError as error:
        raise ImageError(f"{relative(path)}: cannot be read ({error.strerror}).") from None
    if not data:
        raise ImageError(f"{relative(path)}: the image file is empty (0 bytes). Replace or remove it.")
    if _is_cut_short(data):
        raise ImageError(f"{relative(path)}: the image is truncated after {len(data):,} bytes. Replace or remove it.")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:  # larger than OpenCV accepts, or a decoder that gave up
        image = None
    return np.asarray(image, np.uint8) if image is not None else _read_with_pillow(path)


def _is_cut_short(content: bytes) -> bool:
    """Whether a JPEG has no end marker after its header (thumbnails in the header have their own)."""
    if not content.startswith(b"\xff\xd8\xff"):
        return False
    position = 2
    while content[position : position + 1] == b"\xff" and content[position + 1 : position + 2] != b"\xda":
        if content[position + 1] == 0xFF:  # a fill byte
            position += 1
            continue
        position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
    return content.rfind(b"\xff\xd9", position) < 0


def _read_with_pillow(path: str | Path) -> Image:
    """For formats that this OpenCV was built without, such as GIF before 4.11."""
    try:
        with PillowImage.open(path) as opened:
            upright = ImageOps.exif_transpose(opened)
            if upright.mode.startswith("I;16"):
                grey = (np.asarray(upright, np.uint32) // 257).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=2)
            if upright.mode in ("I", "F"):
                raise ImageError(
                    f"{relative(path)}: 32-bit pixels have no agreed white. Save the image with 8 or 16 bits."
                )
            return np.ascontiguousarray(np.asarray(upright.convert("RGB"))[..., ::-1])
    except ImageError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, PillowImage.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = reason.replace(str(path), "the file")
        raise ImageError(f"{relative(path)}: not a readable image ({reason}). Replace or remove it.") from None


# --------------------------------------------------------------------------------------------------------------- store


def resized_hw(shape_hw: tuple[int, int], imgsz: int) -> tuple[int, int]:
    """Height and width with the longer side `imgsz`, the other rounded up."""
    scale = imgsz / max(shape_hw)
    # the tiny offset keeps e.g. 333 * (640 / 333) from being rounded up to 641
    height, width = (max(math.ceil(side * scale - 1e-9), 1) for side in shape_hw)
    return height, width


class ImageStore:
    """A dataset's images with the longer side `imgsz`, from their files or from a cache filled before workers start.

    `shapes_hw` are the files' heights and widths; `smooth` averages where an image shrinks (OpenCV's area mode) instead
    of interpolating. With `cache="ram"` the pixels of all images lie in one block that forked workers share;
    `processes` is how many hold such a block on this machine. With `"disk"` they are files in the user's cache folder.
    """

    def __init__(
        self,
        paths: Sequence[str],
        shapes_hw: Sequence[tuple[int, int]],
        imgsz: int,
        *,
        smooth: bool,
        cache: Cache | None = None,
        processes: int = 1,
        prefix: str = "",
    ) -> None:
        self.imgsz, self.smooth, self.processes, self.prefix = imgsz, smooth, processes, prefix
        # arrays, not lists: workers that merely look at an object of a list copy its page
        self._paths = np.array([os.fsencode(path) for path in paths])
        self.shapes_hw = np.array(shapes_hw, np.int64).reshape(-1, 2)
        sizes = [math.prod(resized_hw((h, w), imgsz)) * 3 for h, w in self.shapes_hw.tolist()]
        self._starts = np.cumsum([0, *sizes])
        self._arena: Image | None = None
        self._folder: Path | None = None
        if cache == "ram":
            self._fill_memory()
        elif cache == "disk":
            self._fill_disk()

    @property
    def in_memory(self) -> bool:
        return self._arena is not None

    def path(self, index: int) -> str:
        return os.fsdecode(self._paths[index])

    def load(self, index: int) -> Image:
        """Image `index` resized; read-only where it comes from memory."""
        if self._arena is not None:
            return self._slot(self._arena, index)
        if self._folder is not None:
            with contextlib.suppress(OSError, ValueError):  # gone or broken since: decode instead
                image = np.load(self._cache_file(index))
                if image.dtype == np.uint8 and image.shape == (*self._resized_hw(index), 3):
                    return np.asarray(image, np.uint8)
        return self._decode(index)

    def _resized_hw(self, index: int) -> tuple[int, int]:
        height, width = self.shapes_hw[index].tolist()
        return resized_hw((height, width), self.imgsz)

    def _slot(self, arena: Image, index: int) -> Image:
        return arena[self._starts[index] : self._starts[index + 1]].reshape(*self._resized_hw(index), 3)

    def _decode(self, index: int) -> Image:
        image = read_image(self.path(index))
        height, width = self.shapes_hw[index].tolist()
        if image.shape[:2] != (height, width):
            raise ImageError(
                f"{relative(self.path(index))}: decodes to {image.shape[1]}x{image.shape[0]} pixels, but "
                f"{width}x{height} were found when the labels were scanned. Leave images alone during a run; if nobody "
                "changed this one, save it anew."
            )
        new_h, new_w = self._resized_hw(index)
        if (new_h, new_w) == (height, width):
            return image
        shrinks = max(new_h, new_w) < max(height, width)
        how = cv2.INTER_AREA if shrinks and self.smooth else cv2.INTER_LINEAR
        return np.asarray(cv2.resize(image, (new_w, new_h), interpolation=how), np.uint8)

    def _fill_memory(self) -> None:
        needed, free = int(self._starts[-1]) * self.processes, _available_memory()
        if free is not None and needed * CACHE_MARGIN > free:
            LOGGER.warning(
                f"{self.prefix}images need {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are available: "
                "not cached. Try --cache disk."
            )
            return
        arena = np.empty(int(self._starts[-1]), np.uint8)

        def fill(index: int) -> None:
            self._slot(arena, index)[...] = self._decode(index)

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
        stat = os.stat(path)
        place = hashlib.sha256(os.fsencode(path)).hexdigest()[:24]
        how = "area" if self.smooth else "linear"
        return self._folder / f"{place}-{self.imgsz}-{how}" / f"{stat.st_size:x}-{stat.st_mtime_ns:x}.npy"

    def _write(self, index: int) -> None:
        file, image = self._cache_file(index), self._decode(index)
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
                for _ in tqdm(pool.map(work, todo), desc=text, total=len(todo), disable=rank() > 0):
                    pass
            finally:
                pool.shutdown(cancel_futures=True)  # a broken image ends it now, not after all others


def _available_memory() -> int | None:
    """Bytes that can be taken without swapping, by the system and the container's limit; None where nobody tells."""
    limits = []
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        limits.append(int(dict(line.split(":") for line in lines)["MemAvailable"].split()[0]) * 1024)
    with contextlib.suppress(OSError, ValueError, KeyError):  # no limit reads "max", which is no number
        group = Path("/sys/fs/cgroup")
        free = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        usage = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        limits.append(free + int(usage["inactive_file"]))  # cached file contents are given up when memory is wanted
    return min(limits, default=None)


def num_cpus() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
