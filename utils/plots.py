"""Charts: curves, confusion matrix, labels, training results, speed study. The only importer of matplotlib.

Figures are made and saved through their own Agg canvas, so nothing here changes a user's pyplot or its backend.
Pictures with boxes are drawn by utils.drawing, whose names are offered here too. What is below "for other people's
code" has YOLOv5's arguments.
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from utils import drawing
from utils.config import UserError, display_path
from utils.drawing import PALETTE, color, feature_maps, plot_batch, save_crop, system_font
from utils.files import free_path
from utils.runtime import LOGGER

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from utils.dataloaders import Batch
    from utils.engine import EvalResult
    from utils.metrics import APResult

__all__ = [
    "Annotator",
    "color",
    "colors",
    "feature_maps",
    "feature_visualization",
    "plot_batch",
    "plot_confusion",
    "plot_curves",
    "plot_evaluation",
    "plot_evaluation_batch",
    "plot_gates",
    "plot_labels",
    "plot_one_box",
    "plot_results",
    "plot_study",
    "save_crop",
    "save_one_box",
]

INK, BLUE, RED, GREY = "#1f2933", "#1764ab", "#d1495b", "#b8c1cc"
BLUES = LinearSegmentedColormap.from_list("blues", ["#ffffff", "#c6dcf0", "#5b9bd0", "#1764ab", "#08306b"])
MAX_NAMED_CURVES = 20  # a legend of more classes cannot be read
MAX_NAMED_CELLS = 99  # class names on an axis
MAX_NUMBERED_CELLS = 30  # numbers in the cells
LARGEST_DRAWN = 1e30  # beyond it, axes overflow
MAX_CORRELOGRAM = 20_000  # boxes; more make no visible difference


# --------------------------------------------------------------------------------------------------------- shared parts


def _figure(
    size: tuple[float, float], rows: int = 1, columns: int = 1, margins: dict[str, float] | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure of `size` inches and its panels, row by row; fixed `margins` save laying out many panels."""
    figure = Figure(figsize=size, layout=None if margins else "constrained")
    FigureCanvasAgg(figure)
    if margins:
        figure.subplots_adjust(**margins)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.tick_params(color=GREY, labelcolor=INK, labelsize=9)
    return figure, panels


def _rgb(index: int) -> str:
    return f"#{PALETTE[index % len(PALETTE)]}"


def _plain(text: str) -> str:
    """Text without a meaning of its own for matplotlib, to which `$` starts a formula."""
    return text.replace("$", r"\$")


def _labels(names: Mapping[int, str]) -> tuple[dict[int, str], FontProperties]:
    return _cached_labels(tuple(names.items()))


@functools.lru_cache(maxsize=8)  # so that a missing font is looked for, and reported, once
def _cached_labels(items: tuple[tuple[int, str], ...]) -> tuple[dict[int, str], FontProperties]:
    """Class names to print and a font that holds them; class numbers where no installed font does."""
    names, default = dict(items), FontProperties()
    held = font_manager.get_font(font_manager.findfont(default)).get_charmap()
    foreign = [name for name in names.values() if any(ord(ch) not in held for ch in name if not ch.isspace())]
    if not foreign:
        return {index: _plain(name) for index, name in names.items()}, default
    file = system_font("".join(sorted(set("".join(names.values())))))
    if file is not None:
        return {index: _plain(name) for index, name in names.items()}, FontProperties(fname=str(file))
    LOGGER.warning(f"no installed font holds the class name '{foreign[0]}': charts show class numbers instead.")
    return {index: str(index) if name in foreign else _plain(name) for index, name in names.items()}, default


# ---------------------------------------------------------------------------------------------------------- evaluation


def plot_evaluation_batch(
    index: int, batch: Batch, detections: list[Tensor], names: Mapping[int, str], save_dir: Path
) -> None:
    """Write `val_batch{index}_labels.jpg` and `val_batch{index}_pred.jpg`."""
    from utils.engine import detections_to_draw, labels_to_draw  # only now: charts of files do without torch

    for kind, boxes in (("labels", labels_to_draw(batch)), ("pred", detections_to_draw(detections))):
        plot_batch(batch.images, boxes, batch.paths, dict(names), save_dir / f"val_batch{index}_{kind}.jpg")


def plot_evaluation(result: EvalResult, names: Mapping[int, str], save_dir: Path) -> None:
    """Write the precision-recall, F1, P and R curves and the confusion matrix."""
    plot_curves(result.ap, names, save_dir)
    if result.confusion is not None:
        plot_confusion(result.confusion.matrix, names, save_dir / "confusion_matrix.png")


# --------------------------------------------------------------------------------------------------------------- curves


def plot_curves(result: APResult, names: Mapping[int, str], save_dir: str | Path, prefix: str = "") -> None:
    """Write `PR_curve.png`, `F1_curve.png`, `P_curve.png`, `R_curve.png` (at IoU 0.5), `prefix` before each name."""
    save_dir = Path(save_dir)
    shown, font = _labels({int(c): names.get(int(c), str(int(c))) for c in result.classes})
    labels = list(shown.values())
    px = result.px
    pr_labels = [f"{label}  {value:.3f}" for label, value in zip(labels, result.ap50)]
    mean = f"all classes  {result.map50:.3f} mAP@0.5"
    _curves(save_dir / f"{prefix}PR_curve.png", px, result.pr_curve, pr_labels, mean, ("Recall", "Precision"), font)
    for curve, name, axis in (
        (result.f1_curve, "F1", "F1"),
        (result.precision_curve, "P", "Precision"),
        (result.recall_curve, "R", "Recall"),
    ):
        mean = "all classes"
        if len(curve):
            best = int(curve.mean(0).argmax())
            mean = f"all classes  {curve.mean(0)[best]:.2f} at {px[best]:.3f}"
        _curves(save_dir / f"{prefix}{name}_curve.png", px, curve, labels, mean, ("Confidence", axis), font)


def _curves(
    file: Path,
    px: np.ndarray,
    curves: np.ndarray,
    labels: Sequence[str],
    mean_label: str,
    axis_names: tuple[str, str],
    font: FontProperties,
) -> None:
    """One line per class (c, 1000) and the mean of them; many classes stay grey and without a legend."""
    figure, (axes,) = _figure((9, 6))
    if len(curves) > MAX_NAMED_CURVES:
        axes.add_collection(LineCollection([np.column_stack((px, y)) for y in curves], colors=GREY, linewidths=0.8))
    else:
        for index, (y, label) in enumerate(zip(curves, labels)):
            axes.plot(px, y, color=_rgb(index), linewidth=1.2, label=label)
    if len(curves):
        axes.plot(px, curves.mean(0), color=INK, linewidth=3, label=mean_label)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, prop=font, labelcolor=INK)
    else:
        axes.text(0.5, 0.5, "no labels", ha="center", va="center", color=INK)
    axes.set(xlim=(0, 1), ylim=(0, 1.005), xlabel=axis_names[0], ylabel=axis_names[1])
    axes.set_title(f"{axis_names[1]} over {axis_names[0].lower()}", color=INK, fontsize=12, loc="left")
    axes.grid(color="#e6eaee", linewidth=0.8)
    figure.savefig(file, dpi=150)


# ----------------------------------------------------------------------------------------------------- confusion matrix


def plot_confusion(matrix: np.ndarray, names: Mapping[int, str], file: str | Path) -> None:
    """Draw a confusion matrix of counts (nc+1, nc+1), rows predicted, columns true, background last.

    Each column is divided by its sum: of the true objects of a class, the share predicted as each class or missed. The
    background column holds the false positives by class. Shares below 0.005 stay blank.
    """
    counts = np.asarray(matrix, float)
    share = counts / np.maximum(counts.sum(0, keepdims=True), 1e-9)
    num_classes = len(counts) - 1
    figure, (axes,) = _figure((12, 9))
    cells, extent = np.where(share < 0.005, 0, share), (0, num_classes + 1, num_classes + 1, 0)
    picture = axes.imshow(cells, cmap=BLUES, vmin=0, vmax=1, extent=extent, aspect="auto", interpolation="nearest")
    if num_classes < MAX_NUMBERED_CELLS:
        size = 13 if num_classes < 10 else 10 if num_classes < 20 else 7
        for (row, column), value in np.ndenumerate(share):
            if value >= 0.005:
                ink = "white" if value > 0.55 else INK
                axes.text(column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=size)
    if num_classes < MAX_NAMED_CELLS:
        shown, font = _labels({index: names.get(index, str(index)) for index in range(num_classes)})
        font = font.copy()
        font.set_size(11 if num_classes < MAX_NUMBERED_CELLS else 6.5)
        ticks, texts = np.arange(num_classes + 1) + 0.5, [*shown.values(), "background"]
        axes.set_xticks(ticks, texts, rotation=90 if num_classes > 6 else 0, fontproperties=font)
        axes.set_yticks(ticks, texts, fontproperties=font)
    axes.set_xlabel("True", color=INK, fontsize=12)
    axes.set_ylabel("Predicted", color=INK, fontsize=12)
    axes.set_title("Confusion matrix (each column adds up to 1)", color=INK, fontsize=13, loc="left")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.colorbar(picture, ax=axes, shrink=0.7, pad=0.02).outline.set_visible(False)  # type: ignore[operator]
    figure.savefig(file, dpi=150)


# --------------------------------------------------------------------------------------------------------------- labels


def plot_labels(labels: np.ndarray, names: Mapping[int, str], save_dir: str | Path) -> None:
    """Write `labels.jpg` and `labels_correlogram.jpg` of labels (n, 5) [class, cx, cy, w, h] in 0..1."""
    labels, save_dir = np.asarray(labels, float).reshape(-1, 5), Path(save_dir)
    _label_overview(labels, names, save_dir / "labels.jpg")
    _correlogram(labels[:, 1:], save_dir / "labels_correlogram.jpg")


def _label_overview(labels: np.ndarray, names: Mapping[int, str], file: Path) -> None:
    figure, (classes, outlines, centres, sizes) = _figure((10, 10), 2, 2)
    counts = np.bincount(labels[:, 0].astype(int), minlength=len(names))
    few = len(counts) <= MAX_NUMBERED_CELLS
    classes.bar(range(len(counts)), counts, color=[_rgb(i) for i in range(len(counts))] if few else BLUE, width=0.85)
    classes.set_title("Instances per class", loc="left", color=INK)
    classes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if few:
        shown, font = _labels({index: names.get(index, str(index)) for index in range(len(counts))})
        classes.set_xticks(range(len(counts)), list(shown.values()), rotation=90, fontproperties=font)
    else:
        classes.set_xlabel("class")
    some = labels[:1000]
    cornered = [Rectangle((0.5 - w / 2, 0.5 - h / 2), w, h) for _, _, _, w, h in some]
    colors = [_rgb(int(c)) for c in some[:, 0]]
    outlines.add_collection(PatchCollection(cornered, facecolor="none", edgecolor=colors, linewidths=0.6, alpha=0.6))
    outlines.set(xlim=(0, 1), ylim=(1, 0), xticks=(), yticks=(), aspect="equal")
    outlines.set_title(f"Shapes of {len(some)} boxes, centred", loc="left", color=INK)
    for axes, (x, y), title in ((centres, (1, 2), "Centres (x, y)"), (sizes, (3, 4), "Sizes (width, height)")):
        _density(axes, labels[:, x], labels[:, y], 50)
        axes.set(xlabel="xywh"[x - 1], ylabel="xywh"[y - 1], aspect="equal")
        axes.set_title(title, loc="left", color=INK)
    centres.invert_yaxis()  # images count rows downwards
    figure.savefig(file, dpi=150)


def _density(axes: Axes, x: np.ndarray, y: np.ndarray, bins: int) -> None:
    """How often each (x, y) in 0..1 occurs, on a logarithmic colour scale."""
    counts, _, _ = np.histogram2d(x, y, bins=bins, range=((0, 1), (0, 1)))
    norm = LogNorm(vmin=0.5, vmax=max(counts.max(), 1))
    edges = np.linspace(0, 1, bins + 1)
    axes.pcolormesh(edges, edges, np.ma.masked_equal(counts.T, 0), cmap=BLUES, norm=norm, rasterized=True)
    axes.set(xlim=(0, 1), ylim=(0, 1))


def _correlogram(boxes: np.ndarray, file: Path) -> None:
    """x, y, width and height, each alone on the diagonal and each pair below it; y points down, as in images."""
    boxes = boxes[:: max(len(boxes) // MAX_CORRELOGRAM, 1)]
    parts = ("x", "y", "width", "height")
    margins = dict(left=0.07, right=0.98, bottom=0.06, top=0.98, wspace=0.25, hspace=0.2)
    figure, panels = _figure((10, 10), 4, 4, margins)
    for row in range(4):
        for column in range(4):
            axes = panels[row * 4 + column]
            if column > row:
                axes.set_axis_off()
                continue
            if row == column:
                axes.hist(boxes[:, row], bins=50, range=(0, 1), color=BLUE)
                axes.set(xlim=(0, 1), yticks=())
            else:
                _density(axes, boxes[:, column], boxes[:, row], 50)
                if parts[row] == "y":
                    axes.invert_yaxis()  # images count rows downwards, as in labels.jpg
            if row == 3:
                axes.set_xlabel(parts[column], color=INK, fontsize=11)
            if column == 0:
                axes.set_ylabel(parts[row], color=INK, fontsize=11)
    figure.savefig(file, dpi=150)


# -------------------------------------------------------------------------------------------------------------- results


def plot_results(csv_file: str | Path) -> Path:
    """Draw a run's `results.csv` as `results.png` beside it: losses, precision, recall and mAP over the epochs."""
    csv_file = Path(csv_file)
    header, values = _read_results(csv_file)
    order = [column for column in (1, 2, 3, 4, 5, 8, 9, 10, 6, 7) if column < len(header)]
    margins = dict(left=0.045, right=0.99, bottom=0.085, top=0.94, wspace=0.27, hspace=0.25)
    figure, panels = _figure((15, 6), 2, 5, margins)
    for axes, column in zip(panels, order):
        y = values[:, column]
        axes.plot(values[:, 0], y, color=BLUE, marker="." if len(y) < 50 else "", linewidth=1.6, markersize=7)
        if len(y) > 4:
            axes.plot(values[:, 0], _smooth(y), color=RED, linestyle=":", linewidth=1.8)
        axes.set_title(_plain(header[column]), color=INK, fontsize=11)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(color="#e6eaee", linewidth=0.8)
    for axes in panels[5:]:
        axes.set_xlabel("epoch", color=INK)
    for axes in panels[len(order) :]:
        axes.set_axis_off()
    file = csv_file.with_name("results.png")
    figure.savefig(file, dpi=200)
    return file


def _read_results(csv_file: Path) -> tuple[list[str], np.ndarray]:
    try:
        with csv_file.open(newline="", encoding="utf-8") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{display_path(csv_file)}: cannot be read ({reason}).") from None
    if len(rows) < 2:
        raise UserError(f"{display_path(csv_file)}: holds no epoch yet.")
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(rows[0]):
            where = f"{display_path(csv_file)}:{number}"
            raise UserError(f"{where}: {len(row)} values, but the header names {len(rows[0])}.")
    try:
        values = np.array(rows[1:], dtype=float)
    except ValueError as error:
        raise UserError(f"{display_path(csv_file)}: {error}.") from None
    return rows[0], np.where(np.abs(values) < LARGEST_DRAWN, values, np.nan)


def _smooth(y: np.ndarray, sigma: float = 3.0) -> np.ndarray:
    """Gaussian mean over neighbouring epochs; gaps and the ends weigh what is there."""
    radius = min(math.ceil(4 * sigma), len(y) - 1)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    there = np.isfinite(y).astype(float)
    middle = slice(radius, radius + len(y))
    weight = np.convolve(there, kernel)[middle]
    return np.convolve(np.where(there > 0, y, 0), kernel)[middle] / np.where(weight > 0, weight, np.nan)


# ---------------------------------------------------------------------------------------------------------------- gates


def plot_gates(panels: Sequence[tuple[str, np.ndarray, float | None]], file: str | Path) -> None:
    """Draw what gates multiply by: per gate its title, values (images, channels) and neutral constant, if it has one.

    Channels stand in the order of their means; the band is from the lowest to the highest image.
    """
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    figure, axes_list = _figure((7 * columns, 3.6 * rows + 0.4), rows, columns)
    for axes, (title, values, neutral) in zip(axes_list, panels):
        order = values.mean(0).argsort()
        x, ranked = np.arange(len(order)), values[:, order]
        axes.fill_between(x, ranked.min(0), ranked.max(0), color=BLUE, alpha=0.25, linewidth=0, label="all images")
        axes.plot(x, ranked.mean(0), color=BLUE, linewidth=1.8, label="mean")
        if neutral is not None:
            axes.axhline(neutral, color=RED, linestyle="--", linewidth=1.2, label=f"neutral ({neutral:g})")
        axes.set_title(_plain(title), color=INK, fontsize=11, loc="left")
        axes.set(xlabel="channels, by their mean", ylabel="gate", xlim=(0, max(len(order) - 1, 1)))
        axes.grid(color="#e6eaee", linewidth=0.8)
        axes.legend(loc="upper left", frameon=False, labelcolor=INK, fontsize=9)
    for axes in axes_list[len(panels) :]:
        axes.set_axis_off()
    figure.savefig(file, dpi=150)


# ---------------------------------------------------------------------------------------------------------------- study


def plot_study(files: Sequence[str | Path], sizes: Sequence[int], file: str | Path) -> None:
    """Draw accuracy against time of the `study_*.txt` files that `val.py --task study` writes, one line per file.

    A row holds P, R, mAP50, mAP50-95, three losses, then milliseconds of pre-processing, inference and NMS; the rows
    belong to `sizes` in order.
    """
    figure, (axes,) = _figure((9, 6))
    for index, study in enumerate(files):
        rows = np.loadtxt(study, ndmin=2)
        milliseconds, accuracy = rows[:, 7:10].sum(1), rows[:, 3]
        label = _plain(Path(study).stem.removeprefix("study_"))
        axes.plot(milliseconds, accuracy, marker="o", color=_rgb(index), linewidth=1.8, markersize=5, label=label)
        for x, y, size in zip(milliseconds, accuracy, sizes):
            axes.annotate(str(size), (x, y), (4, -9), textcoords="offset points", fontsize=7, color=INK)
    axes.set(xlabel="ms per image (pre-process, inference, NMS)", ylabel="mAP 0.5:0.95", xlim=(0, None))
    axes.set_title("Accuracy and speed by image size", color=INK, fontsize=12, loc="left")
    axes.grid(color="#e6eaee", linewidth=0.8)
    axes.legend(loc="best", frameon=False, labelcolor=INK)
    figure.savefig(file, dpi=200)


# -------------------------------------------------------------------------------------------- for other people's code


class Colors:
    """Callable: class number -> its colour as RGB, or as BGR where asked; the twenty colours repeat."""

    n = len(PALETTE)

    def __call__(self, i: Any, bgr: bool = False) -> tuple[int, int, int]:
        return color(i) if bgr else color(i)[::-1]


colors = Colors()


class Annotator:
    """`drawing.Annotator` with YOLOv5's methods: `box_label`, `rectangle`, `text`, then `result`.

    It draws into the array it is given where that can be written to and has its rows one after the other, and into a
    copy otherwise. `im` is BGR, or a PIL image, whose channels then keep their order. Which font draws depends on the
    text alone: `font_size`, `font`, `pil` and `example` have no effect. A label is black or white on its box's colour,
    whichever reads better; `txt_color` is that of `text` only.
    """

    def __init__(
        self,
        im: np.ndarray | Image,
        line_width: int | None = None,
        font_size: float | None = None,
        font: str = "Arial.ttf",
        pil: bool = False,
        example: str = "abc",
    ) -> None:
        array = np.asarray(im)
        in_place = array.flags.writeable and array.flags.c_contiguous
        width = int(line_width or max(round(sum(array.shape) / 2 * 0.003), 2))
        self._ours = drawing.Annotator(array, width, in_place=in_place)
        self.lw = self._ours.line_width

    @property
    def im(self) -> np.ndarray:
        """The image so far."""
        return self._ours.image

    def box_label(
        self,
        box: Any,
        label: str = "",
        color: tuple[int, int, int] = (128, 128, 128),
        txt_color: tuple[int, int, int] = (255, 255, 255),
    ) -> None:
        """Draw a box (x1, y1, x2, y2 in pixels) with its label."""
        self._ours.box([float(value) for value in box[:4]], label or "", color)
        _ = self.im  # draws the label now: callers may use the array they gave instead of `result()`

    def rectangle(self, xy: Any, fill: Any = None, outline: Any = None, width: int = 1) -> None:
        """Draw a rectangle (x1, y1, x2, y2), filled with one colour, framed with another."""
        x1, y1, x2, y2 = (int(value) for value in np.asarray(xy).reshape(-1))
        if fill is not None:
            cv2.rectangle(self.im, (x1, y1), (x2, y2), fill, -1)
        if outline is not None:
            cv2.rectangle(self.im, (x1, y1), (x2, y2), outline, width)

    def text(self, xy: Any, text: str, txt_color: tuple[int, int, int] = (255, 255, 255), anchor: str = "top") -> None:
        """Write one line whose upper left corner, or lower left with the anchor `bottom`, is at (x, y)."""
        _, ascent, descent = self._ours._text_size(text)
        baseline = int(xy[1]) - descent if anchor == "bottom" else int(xy[1]) + ascent
        self._ours._write(text, (int(xy[0]), baseline), txt_color)

    def result(self) -> np.ndarray:
        """The annotated image."""
        return self.im


def plot_one_box(
    x: Any,
    im: np.ndarray,
    color: tuple[int, int, int] | None = (128, 128, 128),
    label: str | None = None,
    line_thickness: int = 3,
) -> None:
    """Draw a box (x1, y1, x2, y2 in pixels) with its label into a BGR image, in place.

    Raises:
        ValueError: an array that cannot be drawn into, such as a view with its channels turned around.
    """
    if not (im.flags.writeable and im.flags.c_contiguous):
        raise ValueError("plot_one_box draws into the image: pass np.ascontiguousarray(im) and keep that array.")
    Annotator(im, line_width=line_thickness).box_label(x, label or "", color or (128, 128, 128))


def save_one_box(
    xyxy: Any,
    im: np.ndarray,
    file: str | Path = Path("im.jpg"),
    gain: float = 1.02,
    pad: float = 10,
    square: bool = False,
    BGR: bool = False,
    save: bool = True,
) -> np.ndarray:
    """The part of an image (RGB, or BGR where said) around a box, as BGR; with `save` also as a JPEG.

    The file ends in `.jpg` whatever suffix is given, and is numbered (`im2.jpg`, ...) where one is there.
    """
    box = [float(value) for value in np.asarray(xyxy).reshape(-1)[:4]]
    target = free_path(Path(file).with_suffix(".jpg")) if save else None
    return save_crop(box, im if BGR else im[..., ::-1], target, gain=gain, pad=pad, square=square)


def feature_visualization(
    x: Tensor, module_type: str, stage: int, n: int = 32, save_dir: str | Path = "runs/detect/exp"
) -> None:
    """`feature_maps` with YOLOv5's arguments."""
    feature_maps(stage, module_type, x, save_dir, max_maps=n)
