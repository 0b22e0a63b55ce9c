"""Drawing on images: boxes with labels, batch mosaics, crops and feature maps. OpenCV only, no matplotlib."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from utils.runtime import LOGGER

if TYPE_CHECKING:
    import torch
    from PIL.ImageFont import FreeTypeFont

__all__ = [
    "PALETTE",
    "Annotator",
    "color",
    "drawable_names",
    "feature_maps",
    "plot_batch",
    "save_crop",
    "system_font",
    "write_image",
]

BGR = tuple[int, int, int]
# Farthest-point selection in OKLab (hue and chroma weighted 2.2 against lightness): the first few differ most.
PALETTE = (
    "EE092F", "0028EC", "4DF458", "CA06DB", "28B7D4", "FEC171", "3B6209", "F5B3FA", "60438D", "883C04",
    "C25191", "8DFFD5", "98B224", "6F00C2", "4E7BDF", "E68580", "CE79FD", "A2790D", "089772", "861192",
)  # fmt: skip
FONT = cv2.FONT_HERSHEY_SIMPLEX
# Fonts that hold Chinese, Japanese and Korean, best first; the last one covers Latin, Greek and Cyrillic.
FONT_FILES = (
    "NotoSansCJK-Regular",
    "NotoSansCJKsc-Regular",
    "NotoSansSC",
    "SourceHanSansSC-Regular",
    "SourceHanSansCN-Regular",
    "wqy-microhei",
    "wqy-zenhei",
    "DroidSansFallback",
    "PingFang",
    "Hiragino Sans GB",
    "STHeiti Medium",
    "msyh",
    "simhei",
    "simsun",
    "uming",
    "Arial Unicode",
    "DejaVuSans",
)


def color(class_index: int) -> BGR:
    """The BGR colour of a class; the twenty colours repeat."""
    text = PALETTE[int(class_index) % len(PALETTE)]
    return int(text[4:6], 16), int(text[2:4], 16), int(text[0:2], 16)


# ---------------------------------------------------------------------------------------------------------------- fonts


@functools.lru_cache(maxsize=1)
def _installed_fonts() -> tuple[Path, ...]:
    """The files of FONT_FILES this machine has, in that order."""
    if sys.platform == "win32":
        folders = [Path(os.environ.get("WINDIR", r"C:\Windows")) / "Fonts"]
    elif sys.platform == "darwin":
        folders = [Path("/System/Library/Fonts"), Path("/Library/Fonts"), Path.home() / "Library/Fonts"]
    else:
        home = Path.home()
        folders = [
            Path("/usr/share/fonts"),
            Path("/usr/local/share/fonts"),
            home / ".local/share/fonts",
            home / ".fonts",
        ]
    found: dict[str, Path] = {}
    for folder in folders:
        for file in sorted(folder.rglob("*")) if folder.is_dir() else ():
            if file.suffix.lower() in (".ttf", ".ttc", ".otf"):
                found.setdefault(file.stem.lower(), file)
    order = []
    for wanted in FONT_FILES:
        order += [file for stem, file in found.items() if stem.startswith(wanted.lower()) and file not in order]
    return tuple(order)


@functools.lru_cache(maxsize=64)
def system_font(text: str) -> Path | None:
    """An installed font file that holds every character of `text`, or None (also without Pillow)."""
    for file in _installed_fonts():
        font = _pillow_font(file, 24)
        if font is None:
            return None
        # U+FFFF is no character: what a font draws for it is its sign for "missing"
        missing = bytes(font.getmask("\uffff"))
        if all(ch.isspace() or bytes(font.getmask(ch)) != missing for ch in set(text)):
            return file
    return None


@functools.lru_cache(maxsize=16)
def _pillow_font(file: Path, size: int) -> FreeTypeFont | None:
    try:
        from PIL import ImageFont
    except ImportError:
        return None
    try:
        return ImageFont.truetype(str(file), size)
    except OSError:  # not a font FreeType reads
        return None


@functools.lru_cache(maxsize=4096)
def _opencv_draws(character: str) -> bool:
    """Whether putText knows the character: OpenCV 5 carries a Unicode font, OpenCV 4 ASCII only; else a `?` appears."""
    if character.isascii():
        return True

    def picture(text: str) -> bytes:
        canvas = np.zeros((48, 160), np.uint8)
        cv2.putText(canvas, text, (4, 36), FONT, 1, 255, 1)
        return canvas.tobytes()

    # OpenCV 4 prints one question mark per byte of UTF-8
    return picture(character) not in (picture("?"), picture("?" * len(character.encode())))


def _drawable(text: str) -> bool:
    return all(map(_opencv_draws, text)) or system_font(text) is not None


def drawable_names(names: Mapping[int, str]) -> dict[int, str]:
    """Class names as they can be drawn here: a name that no font at hand holds becomes its class number, said once."""
    return dict(_cached_names(tuple(names.items())))


@functools.lru_cache(maxsize=8)
def _cached_names(items: tuple[tuple[int, str], ...]) -> Mapping[int, str]:
    names = dict(items)
    shown = {index: name if _drawable(name) else str(index) for index, name in names.items()}
    changed = [name for index, name in names.items() if shown[index] != name]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        LOGGER.warning(
            f"no font here can draw the class name '{changed[0]}'{more}: pictures show class numbers instead. "
            "Install a font such as Noto Sans CJK (Debian, Ubuntu: apt install fonts-noto-cjk) or OpenCV 5."
        )
    return shown


# ------------------------------------------------------------------------------------------------------------ Annotator


class Annotator:
    """Draws boxes and labels on its own copy of a BGR image: `.box(...)`, `.text(...)`, then read `.image`.

    With `in_place` it draws into the image itself, which must be writeable and C-contiguous.
    `line_width` in pixels; None chooses 0.3 % of the mean side, at least 2.
    """

    def __init__(self, image: np.ndarray, line_width: int | None = None, *, in_place: bool = False) -> None:
        self.image = image if in_place else np.ascontiguousarray(image).copy()
        height, width = image.shape[:2]
        self.line_width = line_width or max(round((height + width) / 2 * 0.003), 2)
        # a third of the line width, but on small images no more than leaves room for the picture
        self.font_scale = min(self.line_width / 3, max((height + width) / 2 / 900, 0.4))
        self.font_thickness = max(min(self.line_width - 1, round(self.font_scale * 2)), 1)

    def box(self, xyxy: Sequence[float] | np.ndarray, text: str = "", color: BGR = (128, 128, 128)) -> None:
        """Draw a box (pixels) and its label: above the box where there is room, else inside, never off the side."""
        left, top, right, bottom = (int(value) for value in xyxy[:4])
        cv2.rectangle(self.image, (left, top), (right, bottom), color, self.line_width, cv2.LINE_AA)
        if not text:
            return
        width, ascent, descent = self._text_size(text)
        pad = max(self.line_width // 2, 2)
        height = ascent + descent + pad
        border = (self.line_width + 1) // 2  # the box's line lies half outside its corner
        x = min(left - border, self.image.shape[1] - width - 2 * pad)
        y = top - height if top - height >= 0 else max(top, 0)
        self.text((max(x, 0), y), text, background=color)

    def text(self, left_top: tuple[int, int], text: str, *, background: BGR) -> None:
        """Write one line on a filled rectangle whose upper left corner is given, black or white as reads better."""
        width, ascent, descent = self._text_size(text)
        pad = max(self.line_width // 2, 2)
        x, y = left_top
        cv2.rectangle(self.image, (x, y), (x + width + 2 * pad, y + ascent + descent + pad), background, -1)
        luma = 0.114 * background[0] + 0.587 * background[1] + 0.299 * background[2]  # ITU-R BT.601
        ink = (0, 0, 0) if luma > 140 else (255, 255, 255)
        self._write(text, (x + pad, y + pad // 2 + ascent), ink)

    def _text_size(self, text: str) -> tuple[int, int, int]:
        """Width, ascent and descent in pixels."""
        font = self._pillow(text)
        if font is not None:
            ascent, descent = font.getmetrics()
            return int(font.getlength(text)) + 1, ascent, descent
        (width, height), baseline = cv2.getTextSize(text, FONT, self.font_scale, self.font_thickness)
        return width, height, baseline

    def _write(self, text: str, origin: tuple[int, int], ink: BGR) -> None:
        font = self._pillow(text)
        if font is None:
            args = (FONT, self.font_scale, ink, self.font_thickness, cv2.LINE_AA)
            cv2.putText(self.image, text, origin, *args)
            return
        from PIL import Image, ImageDraw

        # only the label's own pixels travel through Pillow, as a mask
        width, ascent, descent = self._text_size(text)
        x, y = origin[0], origin[1] - ascent
        mask = Image.new("L", (width, ascent + descent))
        ImageDraw.Draw(mask).text((0, 0), text, fill=255, font=font)
        patch = self.image[max(y, 0) : y + ascent + descent, max(x, 0) : x + width]
        alpha = np.asarray(mask, np.float32)[max(-y, 0) :, max(-x, 0) :][: patch.shape[0], : patch.shape[1], None] / 255
        patch[:] = (patch * (1 - alpha) + np.array(ink, np.float32) * alpha + 0.5).astype(np.uint8)

    def _pillow(self, text: str) -> FreeTypeFont | None:
        """A Pillow font for text OpenCV cannot draw, sized like OpenCV's letters; None where OpenCV is to draw."""
        if all(map(_opencv_draws, text)):
            return None
        file = system_font(text)
        return _pillow_font(file, max(round(self.font_scale * 30), 10)) if file else None


# --------------------------------------------------------------------------------------------------------------- files


def write_image(file: str | Path, image: np.ndarray, parameters: Sequence[int] = ()) -> None:
    """Write a BGR image in the format of the suffix, whatever letters the path holds.

    Raises:
        OSError: the folder is missing, the disk is full.
        ValueError: OpenCV cannot write that format.
    """
    file = Path(file)
    try:
        done, data = cv2.imencode(file.suffix, image, list(parameters))
    except cv2.error:
        done = False
    if not done:
        raise ValueError(f"{file}: OpenCV cannot write this image as '{file.suffix}'.")
    file.write_bytes(data.tobytes())


def save_crop(
    xyxy: Sequence[float] | np.ndarray,
    image: np.ndarray,
    file: str | Path | None,
    *,
    gain: float = 1.02,
    pad: float = 10,
    square: bool = False,
) -> np.ndarray:
    """Write the part of a BGR image around a box as JPEG (quality 95, colour not subsampled) and return it.

    Nothing is written where `file` is None.

    The box grows to `gain` times its width and height plus `pad` pixels around the same centre, inside the image. With
    `square` its longer side counts for both.
    """
    x1, y1, x2, y2 = (float(value) for value in xyxy[:4])
    height, width = image.shape[:2]
    box_w, box_h = x2 - x1, y2 - y1
    if square:
        box_w = box_h = max(box_w, box_h)
    half_w, half_h = (box_w * gain + pad) / 2, (box_h * gain + pad) / 2
    cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
    left, top = max(int(cx - half_w), 0), max(int(cy - half_h), 0)
    crop = image[top : min(int(cy + half_h), height), left : min(int(cx + half_w), width)]
    if file is None:
        return crop
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    sampling = (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)
    write_image(file, crop, (cv2.IMWRITE_JPEG_QUALITY, 95, *sampling))
    return crop


# -------------------------------------------------------------------------------------------------------------- mosaics


def plot_batch(
    images: torch.Tensor | np.ndarray,
    boxes: Sequence[Any],
    paths: Sequence[str],
    names: Mapping[int, str],
    file: str | Path,
    *,
    max_images: int = 16,
    max_side: int = 1920,
    conf: float = 0.25,
) -> None:
    """Write up to 16 images of a batch with their boxes as one picture, at most 1920 pixels a side.

    Args:
        images: uint8 RGB (B, 3, h, w).
        boxes: per image (k, 5) rows [class, x1, y1, x2, y2] in pixels of `images`, or (k, 6) with a confidence last;
            those of confidence `conf` or less are left out.
        paths: per image the file it came from; its name is written above.
        file: where to write; the suffix decides the format.
    """
    shown = drawable_names(names)
    pixels = _array(images)[:max_images]
    count, _, height, width = pixels.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = int(np.ceil(count / columns))
    strip = 22  # the caption above each image, in final pixels
    scale = min(1.0, max_side / (columns * width), (max_side - rows * strip) / (rows * height))
    tile_w, tile_h = max(int(width * scale), 1), max(int(height * scale), 1)
    canvas = np.full((rows * (tile_h + strip), columns * tile_w, 3), 255, np.uint8)
    for index in range(count):
        tile = np.ascontiguousarray(pixels[index].transpose(1, 2, 0)[..., ::-1])
        if scale < 1:
            tile = cv2.resize(tile, (tile_w, tile_h), interpolation=cv2.INTER_AREA)
        tile = _draw_rows(tile, _array(boxes[index]), shown, scale, conf)
        top, left = index // columns * (tile_h + strip), index % columns * tile_w
        canvas[top + strip : top + strip + tile_h, left : left + tile_w] = tile
        _caption(canvas[top : top + strip, left : left + tile_w], Path(str(paths[index])).name)
    for column in range(1, columns):
        cv2.line(canvas, (column * tile_w, 0), (column * tile_w, canvas.shape[0]), (255, 255, 255), 2)
    write_image(file, canvas)


def _draw_rows(tile: np.ndarray, rows: np.ndarray, names: Mapping[int, str], scale: float, conf: float) -> np.ndarray:
    annotator = Annotator(tile, line_width=max(round(min(tile.shape[:2]) * 0.0045), 1))
    annotator.font_scale = min(max(min(tile.shape[:2]) / 1000, 0.38), 0.6)
    annotator.font_thickness = 1
    for row in rows.reshape(-1, rows.shape[-1] if rows.size else 5):
        predicted = len(row) > 5
        if predicted and row[5] <= conf:
            continue
        name = names.get(int(row[0]), str(int(row[0])))
        annotator.box(row[1:5] * scale, f"{name} {row[5]:.1f}" if predicted else name, color(int(row[0])))
    return annotator.image


def _caption(strip: np.ndarray, text: str) -> None:
    """Write a file name on a white strip, cut in the middle where it is too long."""
    text = text if all(map(_opencv_draws, text)) else text.encode("ascii", "replace").decode()
    whole = text
    while len(text) > 8 and cv2.getTextSize(text, FONT, 0.45, 1)[0][0] > strip.shape[1] - 10:
        keep = (len(text) - 4) // 2
        text = f"{whole[:keep]}...{whole[-keep:]}"
    cv2.putText(strip, text, (5, strip.shape[0] - 7), FONT, 0.45, (70, 70, 70), 1, cv2.LINE_AA)


def _array(values: Any) -> np.ndarray:
    """A numpy array of a tensor on any device, or of anything array-like."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


def feature_maps(index: int, type_name: str, tensor: Any, save_dir: str | Path, *, max_maps: int = 32) -> Path | None:
    """Write what a layer gives: `stage{i}_{type}_features.png` (up to 32 maps, 8 a row) and all maps as `.npy`.

    Args:
        index, type_name: the layer's row and class name.
        tensor: its output (B, C, H, W); the first image is drawn, each map stretched over the whole colour scale.

    Returns:
        The PNG, or None for what is no map: a detection head's output, or one pixel a channel.
    """
    if "Detect" in type_name or "Segment" in type_name or not hasattr(tensor, "ndim") or tensor.ndim != 4:
        return None
    maps = _array(tensor[0].float())
    if min(maps.shape[1:]) <= 1:
        return None
    shown = maps[:max_maps]
    low, high = shown.min(axis=(1, 2), keepdims=True), shown.max(axis=(1, 2), keepdims=True)
    grey = ((shown - low) / np.maximum(high - low, 1e-12) * 255).astype(np.uint8)
    side = 192  # pixels of the longer side of one drawn map
    zoom = side / max(maps.shape[1:])
    size_wh = max(round(maps.shape[2] * zoom), 1), max(round(maps.shape[1] * zoom), 1)
    gap, columns = 4, min(8, len(shown))
    rows = -(-len(shown) // columns)
    canvas = np.full((rows * (size_wh[1] + gap) + gap, columns * (size_wh[0] + gap) + gap, 3), 255, np.uint8)
    for k, channel in enumerate(grey):
        method = cv2.INTER_NEAREST if zoom > 1 else cv2.INTER_AREA
        tile = cv2.applyColorMap(cv2.resize(channel, size_wh, interpolation=method), cv2.COLORMAP_VIRIDIS)
        top, left = gap + k // columns * (size_wh[1] + gap), gap + k % columns * (size_wh[0] + gap)
        canvas[top : top + size_wh[1], left : left + size_wh[0]] = tile
    file = Path(save_dir) / f"stage{index}_{type_name.split('.')[-1]}_features.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_image(file, canvas)
    np.save(file.with_suffix(".npy"), maps)
    return file
