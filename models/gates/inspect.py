"""What the attention gates of a trained network do: do they look at the image, or did they never leave their start?"""

from __future__ import annotations

import csv
import itertools
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from models.checkpoints.files import load_model
from models.common import Gate
from models.gates.start import built_elsewhere, gates_in, neutral_of
from models.graph import gates as gate_names
from models.pasted import ERRORS, advice, explain
from models.yolo import DetectionModel
from utils.augmentations import letterboxed
from utils.config import UserError, check_minimum, display_path
from utils.downloads import find_weights
from utils.files import make_run_dir
from utils.inference import round_up, to_float
from utils.plots import plot_gates
from utils.runtime import LOGGER, select_device
from utils.sources import open_source

UNMOVED = 0.001  # a mean distance from neutral below this is training noise: a thousandth of the neutral constant
SPREAD = 0.01  # a standard deviation below this is no choice between channels, images or positions
EDGE = 0.01  # within this share of the bounds a sigmoid's gradient is below a twentieth of its largest
HEADER = ("layer", "gate", "mean", "channels", "images", "positions", "saturated", "from neutral", "verdict")


@dataclass(frozen=True)
class GateStatistics:
    """One gate over many images, before its gain. Spreads are standard deviations; NaN where one value has none."""

    index: int
    name: str
    neutral: float | None
    by_image: np.ndarray  # (images, channels), the mean over positions
    over_positions: float
    saturated: float  # share of values within EDGE of a bound
    distance: float  # mean of |value / neutral - 1|; NaN without a neutral

    @property
    def mean(self) -> float:
        return float(self.by_image.mean())

    @property
    def over_channels(self) -> float:
        """How different the channels are on average."""
        return float(self.by_image.mean(0).std()) if self.by_image.shape[1] > 1 else float("nan")

    @property
    def over_images(self) -> float:
        """How much a channel's gate depends on the image."""
        return float(self.by_image.std(0).mean()) if len(self.by_image) > 1 else float("nan")

    @property
    def verdict(self) -> str:
        """What the numbers say, in a few words."""
        moves = [self.over_images > SPREAD, self.over_positions > SPREAD]
        if self.distance < UNMOVED:
            return "never left neutral"
        if any(moves):
            return "depends on the image" if moves[0] else "depends on the position"
        return "weighs the channels, the same for every image" if self.over_channels > SPREAD else "a constant"

    def cells(self) -> list[str]:
        """The row of HEADER's columns."""
        numbers = (self.mean, self.over_channels, self.over_images, self.over_positions)
        shares = (self.saturated, self.distance)
        shown = [f"{v:.3f}" if v == v else "-" for v in numbers] + [f"{v:.1%}" if v == v else "-" for v in shares]
        return [str(self.index), self.name, *shown, self.verdict]


class _Recorder:
    """Collects what one gate multiplies by, image by image."""

    def __init__(self, index: int, where: str, gate: nn.Module, place: str) -> None:
        self.index, self.where, self.gate, self.name = index, where, gate, f"{type(gate).__name__}{place}"
        self.top, self.neutral = getattr(gate, "top", None), gate.neutral if isinstance(gate, Gate) else None
        self.by_image: list[np.ndarray] = []
        self.sums: list[tuple[float, float, float]] = []

    def __call__(self, gate: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """A forward hook; one image at a time."""
        try:
            if not self.sums and not isinstance(gate, Gate):
                self.neutral = neutral_of(gate, inputs[0].shape[1])
            flat = gate.scale(inputs[0]).float().flatten(2)[0]  # type: ignore[operator]
        except ERRORS as error:
            raise UserError(f"{self.where}: its scale or neutralise_ fails: {explain(error)}.") from None
        self.by_image.append(flat.mean(1).cpu().numpy())
        top, neutral = self.top, self.neutral
        nan = float("nan")
        edge = nan if top is None else float(((flat < EDGE * top) | (flat > (1 - EDGE) * top)).float().mean())
        distance = nan if neutral is None else float((flat / neutral - 1).abs().mean())
        self.sums.append((float(flat.std(1, correction=0).mean()), edge, distance))

    def statistics(self) -> GateStatistics:
        positions, saturated, distance = np.mean(self.sums, axis=0).tolist()
        images = np.stack(self.by_image)
        return GateStatistics(self.index, self.name, self.neutral, images, positions, saturated, distance)


@torch.inference_mode()
def inspect_gates(model: DetectionModel, images: Iterable[np.ndarray], imgsz: int = 640) -> list[GateStatistics]:
    """What every gate of a network multiplies by, over images (H, W, 3) in uint8 BGR; in the order of the layers.

    Raises:
        UserError: the network has no gate, or none that can be read, or there is no image.
    """
    recorders = [
        _Recorder(row.index, row.where, gate, _place(model.model[row.index], gate))
        for row in model.graph.rows
        for gate in gates_in(model.model[row.index])
    ]
    closed = [row for row in model.graph.rows if built_elsewhere(model, row.index)]
    unread = ", ".join(f"layer {row.index} {row.name}" for row in closed)
    if not recorders and not closed:
        raise UserError(
            f"its network has no attention gate ({', '.join(gate_names())}). Give the checkpoint of one that has."
        )
    if closed:
        lines = "; ".join(line.partition("  #")[0] for line in advice(model.gates()[closed[0].index][0])[1:])
        said = f"cannot be read: what it multiplies by is inside its forward. Add two lines to its class: {lines}"
        if not recorders:
            raise UserError(f"its {unread} {said}")
        LOGGER.warning(f"{unread} {said}")
    handles = [recorder.gate.register_forward_hook(recorder) for recorder in recorders]
    device, stride = next(model.parameters()).device, max(int(model.stride.max()), 32)
    model.eval()
    try:
        for image in images:
            boxed, _ = letterboxed(image, imgsz, auto=True, stride=stride)
            rgb = torch.from_numpy(np.ascontiguousarray(boxed[..., ::-1])).permute(2, 0, 1)[None]
            model(to_float(rgb, device))
    finally:
        for handle in handles:
            handle.remove()
    if not recorders[0].sums:
        raise UserError("--source: no image to look at.")
    return [recorder.statistics() for recorder in recorders]


def _place(layer: nn.Module, gate: nn.Module) -> str:
    """` in m.0` for a gate inside a layer, by the key of the part that it is in; empty for the layer itself."""
    path = next(name for name, part in layer.named_modules() if part is gate)
    part = path.removesuffix("gate").removesuffix(".")
    return "" if part == path else f" in {part}" if part else " inside"


def table(statistics: Iterable[GateStatistics]) -> str:
    """The numbers as text."""
    rows = [list(HEADER), *(entry.cells() for entry in statistics)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    last = len(HEADER) - 1
    return "\n".join(
        "  ".join(cell.ljust(w) if i in (1, last) else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    )


def draw(statistics: Iterable[GateStatistics], file: Path) -> None:
    """A panel per gate: what it multiplies each channel by, over the images."""
    plot_gates(
        [(f"{entry.index} {entry.name}: {entry.verdict}", entry.by_image, entry.neutral) for entry in statistics], file
    )


def run(arguments: Namespace) -> list[GateStatistics]:
    """What the command line asks for: the table, `gates.csv` and `gates.png` in a run folder."""
    check_minimum(arguments, imgsz=1, max_images=1)
    weights = find_weights(arguments.weights)
    model = load_model(weights, select_device(arguments.device))
    model = model.to(memory_format=torch.channels_last)
    imgsz = round_up(arguments.imgsz, max(int(model.stride.max()), 32))
    try:
        statistics = inspect_gates(model, _images(arguments), imgsz)
    except UserError as error:
        raise UserError(f"{display_path(weights)}: {error}" if str(error).startswith("its") else str(error)) from None
    save_dir = make_run_dir(arguments)
    LOGGER.info(f"{len(statistics[0].by_image)} images at {imgsz} pixels\n{table(statistics)}")
    with (save_dir / "gates.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([HEADER, *(entry.cells() for entry in statistics)])
    if not arguments.noplots:
        draw(statistics, save_dir / "gates.png")
    LOGGER.info(f"Results saved to {display_path(save_dir)}")
    return statistics


def _images(arguments: Namespace) -> Iterator[np.ndarray]:
    source = open_source(arguments.source)
    if source.live:
        raise UserError(f"--source {arguments.source}: a stream has no end. Give image files.")
    return (frame.image for frame in itertools.islice(source, arguments.max_images))
