"""What all formats share: how a network looks to inference, and what an exported file says about itself."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from models.base import Output, SegmentOutput
from models.yolo import DetectionModel
from utils.config import UserError, display_path, one_line

MAX_CLASSES = 10_000


class Backend(nn.Module):
    """A network as inference sees it.

    `forward(images, augment=False, visualize=None)` takes images float `(B, 3, h, w)` in 0..1 on `device` and gives an
    output whose `predictions` are `(B, N, 5 + classes)`.

    `names` are its classes by number, `stride` the pixels that a side of its input must be a multiple of, `task` is
    detect or segment, `num_masks` how many mask coefficients end each row. `size_hw` and `batch_size` are the only
    input size and batch it takes; None where any will do.
    """

    names: dict[int, str]
    stride: int = 32
    task: str = "detect"
    num_masks: int = 0
    size_hw: tuple[int, int] | None = None
    batch_size: int | None = None
    device: torch.device
    dtype: torch.dtype


class Bounds(NamedTuple):
    """By how much an exported network may differ from its checkpoint: pixels, score 0..1, mAP50-95 0..1."""

    box: float
    score: float
    map: float


@dataclass(frozen=True)
class ExportOptions:
    """How a network is exported; see the flags of export.py."""

    size_hw: tuple[int, int] = (640, 640)
    batch_size: int = 1
    half: bool = False
    int8: bool = False
    dynamic: bool = False
    simplify: bool = False
    opset: int = 17
    nms: bool = False
    conf_thres: float = 0.25
    iou_thres: float = 0.45
    topk_all: int = 100
    topk_per_class: int = 100
    with_code: bool = False
    workspace: int = 4  # GiB of GPU memory that TensorRT may use while it builds
    source: Path | None = None  # the checkpoint the network is from
    calibration: Sequence[Tensor] = ()  # for int8: images (1, 3, h, w) in 0..1


class Exported(Backend):
    """A network in the file of another program.

    A format is a subclass: its name on the command line, the end of its files' names, a way to
    write (`export`) and a way to read (`__init__`) and run (`run`).
    """

    include: ClassVar[str]
    suffix: ClassVar[str]

    def __init__(self, path: Path, device: str | torch.device = "cpu", *, half: bool = False) -> None:
        super().__init__()
        self.path, self.where = path, display_path(path)
        self.device, self.dtype = torch.device(device), torch.float32

    @classmethod
    def check(cls, options: ExportOptions) -> None:
        """Raise UserError where a package that exporting and running it needs is not installed."""

    @classmethod
    def cannot_run(cls) -> str:
        """Why this machine cannot run, and so not compare, files of the format; empty where it can."""
        return ""

    @classmethod
    def export(cls, network: DetectionModel, stem: Path, options: ExportOptions) -> Path:
        """Write the network beside `stem`, a path without a suffix; the file or folder written."""
        raise TypeError(f"{cls.__name__} must define `export`")

    @classmethod
    def bounds(cls, options: ExportOptions) -> Bounds:
        """What the format keeps of a network, here of one whose numbers stay as precise as they are."""
        return Bounds(8.0, 0.03, 0.003) if options.half else Bounds(0.05, 1e-3, 0.003)

    def run(self, images: Tensor) -> list[Tensor]:
        """The file's outputs for images as `forward` takes them."""
        raise TypeError(f"{type(self).__name__} must define `run`")

    def forward(self, images: Tensor, augment: bool = False, visualize: Any = None) -> Any:
        """See `Backend`; an exported network has no layers to look at and takes no other sizes."""
        if augment:
            raise UserError(f"{self.where}: --augment needs the .pt checkpoint, which takes images of any size.")
        if visualize is not None:
            raise UserError(f"{self.where}: --visualize needs the .pt checkpoint, whose layers can be looked at.")
        outputs = [output.to(images.device).float() for output in self.run(images.to(self.dtype))]
        if self.num_masks:
            return SegmentOutput(outputs[0], outputs[1])
        return Output(outputs[0])

    def take(self, metadata: Mapping[str, Any]) -> None:
        """Set the attributes that a file states; YOLOv5's own state `names` and `stride` only.

        Raises:
            UserError: what is stated is none of that.
        """
        try:
            names = metadata.get("names") or {}
            named = names.items() if isinstance(names, Mapping) else enumerate(names)
            self.names = {int(index): str(name) for index, name in named}
            self.stride = max(int(metadata.get("stride", 32)), 1)
            self.task, self.num_masks = str(metadata.get("task", "detect")), int(metadata.get("num_masks", 0))
        except (TypeError, ValueError):
            raise UserError(f"{self.where}: its metadata are not those of a YOLOv5 export. Export it again.") from None

    def name_classes(self, width: int) -> None:
        """Number the classes of a file that does not name them, from the width of its rows."""
        count = min(width - 5 - self.num_masks, MAX_CLASSES)
        if not self.names:
            self.names = {index: f"class{index}" for index in range(count)}


def describe(network: DetectionModel, options: ExportOptions) -> dict[str, Any]:
    """What an exported file says about itself, as plain data."""
    return {
        "names": dict(network.names),
        "stride": max(32, int(network.stride.max())),
        "task": "segment" if network.num_masks else "detect",
        "num_masks": network.num_masks,
        "imgsz": list(options.size_hw),
        "batch": options.batch_size,
        "dynamic": options.dynamic,
    }


def needed(package: str, use: str) -> Any:
    """The module of an optional package; UserError with the pip command where it is not installed, or not wholly."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{use}: needs the package {package}, which is not installed: pip install {package}")
    try:
        return importlib.import_module(package)
    except (ImportError, OSError) as error:
        raise UserError(
            f"{use}: the package {package} is installed but cannot be imported ({one_line(str(error))}): "
            f"pip install --force-reinstall {package}"
        ) from None


class Traceable(nn.Module):
    """A copy of a network that gives its tensors alone, with grids for one size or, `dynamic`, made anew every time."""

    def __init__(self, network: DetectionModel, options: ExportOptions) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        if options.half:
            self.network.half()
        self.network.head.export, self.network.head.dynamic = True, options.dynamic

    def forward(self, images: Tensor) -> Any:
        """Predictions, and mask prototypes where there are any."""
        outputs = self.network(images)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


@torch.no_grad()
def traceable(
    network: DetectionModel, options: ExportOptions, device: str | torch.device | None = None
) -> tuple[Traceable, Tensor]:
    """The network to trace and blank images of the size to trace it with, on the device or where the network is."""
    model = Traceable(network, options).to(device)
    parameter = next(model.parameters())
    shape = (options.batch_size, network.graph.ch, *options.size_hw)
    images = torch.zeros(shape, device=parameter.device, dtype=parameter.dtype)
    model(images)  # makes the grids, which are constants of the trace
    return model, images


def trace(
    network: DetectionModel, options: ExportOptions, device: str | torch.device | None = None
) -> tuple[Any, Tensor]:
    """The network as TorchScript, and the blank images it was traced with; arguments as of `traceable`."""
    model, images = traceable(network, options, device)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit's age, and sizes that become constants: compared afterwards
        return torch.jit.trace(model, images, strict=False, check_trace=False), images
