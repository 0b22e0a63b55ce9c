"""The one way from images to detections: fitted to the network's input, run, suppressed, moved back to the originals.

fitted, letterboxes = fit([image], (640, 640), stride=32, auto=True)
detections = Detector(network, DetectOptions())(fitted).detections  # in pixels of the fitted images
boxes = restore(detections, letterboxes)[0]  # (k, 6) x1, y1, x2, y2, confidence, class in pixels of the image
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from utils.augmentations import letterboxed
from utils.boxes import Letterbox, undo_letterbox
from utils.config import UserError
from utils.nms import non_max_suppression
from utils.runtime import LOGGER, Stopwatch

# Images per forward pass on a CPU, whatever the batch: activations stay near the caches and memory stays low.
CPU_CHUNK = 2
MAX_IMGSZ = 16_384  # a square of it takes 3 GB as floats, before the network has seen it


@dataclass(frozen=True)
class DetectOptions:
    """Which predictions become detections; the defaults are those of detect.py."""

    conf_thres: float = 0.25
    iou_thres: float = 0.45
    max_det: int = 1000
    classes: Sequence[int] | None = None
    agnostic: bool = False
    multi_label: bool = False
    augment: bool = False


class Found(NamedTuple):
    """Per image `(k, 6)` [x1, y1, x2, y2, confidence, class], best first; raw tensors per level, where kept."""

    detections: list[Tensor]
    raw: list[Tensor]


class Detector:
    """Turns fitted images into detections, and adds up the time of the three steps.

    `network` is a `models.backends.Backend`, or a network of ours. A pass takes all images, on a CPU
    `cpu_chunk` of them, or as many as the network was exported for. With one at a time a result does not depend on
    what else is in the batch, down to the last bit.
    """

    def __init__(
        self, network: nn.Module, options: DetectOptions, *, keep_raw: bool = False, cpu_chunk: int = CPU_CHUNK
    ) -> None:
        self.network, self.options, self.keep_raw = network, options, keep_raw
        self.device, self.dtype = place_of(network)
        self.num_masks = int(getattr(network, "num_masks", 0))  # of segmentation networks: left out
        self.only_batch: int | None = getattr(network, "batch_size", None)
        self.chunk = self.only_batch or (cpu_chunk if self.device.type == "cpu" else None)
        self.pre, self.inference, self.nms = (Stopwatch(self.device) for _ in range(3))
        self.seen = 0

    def warm_up(self, size_hw: tuple[int, int]) -> None:
        """Let an accelerator load its kernels before the clock runs."""
        if self.device.type != "cpu":
            blank = torch.zeros(self.only_batch or 1, 3, *size_hw, device=self.device, dtype=self.dtype)
            self.network(blank.to(memory_format=torch.channels_last))

    def __call__(self, images: Tensor, *, labels: Sequence[Tensor] = (), visualize: Any = None) -> Found:
        """Detections in pixels of `images`, uint8 `(B, 3, h, w)` RGB, on the network's device.

        Args:
            images: anywhere.
            labels: per image `(n, 5)` [class, cx, cy, w, h] in pixels, which join the candidates of NMS.
            visualize: sees every layer's map; for one network of ours.
        """
        options, total = self.options, len(images)
        extra = {"augment": True} if options.augment else {"visualize": visualize} if visualize is not None else {}
        chunk = self.chunk or total
        detections: list[Tensor] = []
        raws: list[Sequence[Tensor]] = []
        for start in range(0, total, chunk):
            part = images[start : start + chunk]
            with self.pre:
                batch = to_float(self._filled(part), self.device, self.dtype)
            with self.inference:
                output = self.network(batch, **extra)
            with self.nms:
                detections += non_max_suppression(
                    output.predictions[: len(part)],
                    options.conf_thres,
                    options.iou_thres,
                    classes=options.classes,
                    labels=labels[start : start + chunk],
                    multi_label=options.multi_label,
                    agnostic=options.agnostic,
                    max_det=options.max_det,
                    num_masks=self.num_masks,
                )
            if self.keep_raw:
                raws.append(output.raw)
        self.seen += total
        return Found(detections, [torch.cat(level) for level in zip(*raws)])

    def _filled(self, images: Tensor) -> Tensor:
        """The images, followed by blank ones where the network takes no smaller batch."""
        missing = (self.only_batch or 0) - len(images)
        return torch.cat((images, images.new_zeros(missing, *images.shape[1:]))) if missing > 0 else images

    @property
    def times_ms(self) -> tuple[float, float, float]:
        """Milliseconds per image of pre-processing, inference and NMS so far."""
        per_image = 1000 / max(self.seen, 1)
        return self.pre.seconds * per_image, self.inference.seconds * per_image, self.nms.seconds * per_image


def place_of(network: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device and floating-point type of a network's input; an exported one has no parameters and says itself."""
    if hasattr(network, "device"):
        return network.device, network.dtype  # type: ignore[return-value]
    parameter = next(network.parameters())
    return parameter.device, parameter.dtype


def speed_line(times_ms: tuple[float, float, float], shape: Sequence[int]) -> str:
    """The line of milliseconds that ends a run; `shape` is the input's (B, 3, h, w)."""
    pre, inference, nms = times_ms
    parts = f"{pre:.1f}ms pre-process, {inference:.1f}ms inference, {nms:.1f}ms NMS per image"
    return f"Speed: {parts} at shape {tuple(shape)}"


def to_float(images: Tensor, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 images `(B, 3, h, w)` as numbers in 0..1 on `device`, channels last; they travel as bytes."""
    moved = images.to(device, non_blocking=True)
    return moved.to(dtype, memory_format=torch.channels_last).div_(255)


def fit(
    images: Sequence[np.ndarray], size_hw: tuple[int, int], stride: int, *, auto: bool
) -> tuple[Tensor, list[Letterbox]]:
    """Images uint8 BGR `(H, W, 3)` as one batch uint8 RGB `(B, 3, h, w)`, and how to get back.

    With `auto` (for images of one shape) only as much is padded as the stride needs; else the batch is `size_hw`.
    """
    fitted = [letterboxed(image, size_hw, auto=auto, stride=stride) for image in images]
    rows = np.stack([image[..., ::-1] for image, _ in fitted])  # (B, h, w, 3): channels last is what convolutions read
    return torch.from_numpy(rows).permute(0, 3, 1, 2), [box for _, box in fitted]


def restore(detections: Sequence[Tensor], letterboxes: Sequence[Letterbox]) -> list[Tensor]:
    """Detections `(k, 6)` on the CPU, boxes in pixels of the original images; one transfer for all of them."""
    rows = torch.cat([found[:, :6] for found in detections]).float().cpu().split([len(found) for found in detections])
    return [
        torch.cat((undo_letterbox(found[:, :4], box), found[:, 4:]), 1)
        for found, box in zip(rows, letterboxes, strict=True)
    ]


def input_hw(sizes: Sequence[int], network: Any) -> tuple[int, int]:
    """Height and width of a network's input for `--imgsz`: one side or both, as multiples of the stride.

    A network that was exported for one size gets that size; a change is logged.
    """
    if len(sizes) not in (1, 2) or min(sizes) < 1:
        raise UserError(f"--imgsz {' '.join(map(str, sizes))}: expected one size or height and width, in pixels.")
    only = network.size_hw
    if only is not None:
        if only != (sizes[0], sizes[-1]):
            LOGGER.warning(
                f"--imgsz {' '.join(map(str, sizes))}: the network was exported for {only[0]}x{only[1]} only."
            )
        return only
    return round_up(sizes[0], network.stride), round_up(sizes[-1], network.stride)


def round_up(imgsz: int, stride: int, *, floor: int = 0) -> int:
    """The image size as the next multiple of the network's stride, at least `floor`; a change is logged.

    Raises:
        UserError: a size whose images alone would fill the memory.
    """
    if imgsz > MAX_IMGSZ:
        raise UserError(f"--imgsz {imgsz}: expected at most {MAX_IMGSZ} pixels.")
    size = max(-(-int(imgsz) // stride) * stride, floor)
    if size != imgsz:
        LOGGER.warning(f"--imgsz {imgsz} is not a multiple of the network's stride {stride}: using {size}.")
    return size
