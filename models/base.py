"""What all networks share: running a chain of layers, folding batch norms, the summary line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from models.common import Conv
from models.graph import listed
from models.measure import Size, gflops, profile_layer
from utils.runtime import LOGGER

Visualize = Callable[[int, str, Tensor], None] | Literal[False]


class Output(NamedTuple):
    """What a detection network gives in evaluation mode.

    `predictions` are `(B, N, 5 + classes)`: centre and size in pixels of the input, objectness, class scores. `raw` are
    the head's tensors per level, `(B, anchors, h, w, 5 + classes)`; None where several passes were put together.
    """

    predictions: Tensor
    raw: list[Tensor] | None = None


class SegmentOutput(NamedTuple):
    """What a segmentation network gives in evaluation mode; mask coefficients stand at the end of each row."""

    predictions: Tensor
    prototypes: Tensor  # (B, masks, h, w)
    raw: list[Tensor] | None = None


class BaseModel(nn.Module):
    """A chain of layers in which a layer may also read earlier ones."""

    model: nn.Sequential
    save: list[int]
    yaml: dict[str, Any]
    yaml_file: str | None = None
    names: dict[int, str]
    stride: Tensor

    def run_layers(self, x: Any, profile: bool = False, visualize: Visualize | None = None) -> Any:
        """The last layer's output for images (B, ch, H, W) in 0..1.

        `profile` logs a line of time and GFLOPs per layer; `visualize(index, type, map)` sees every layer's output;
        False, which programs of v6's time pass, is as None.
        """
        layers: list[Any] = list(self.model)
        sources = [[f % layer.i if layer.i else f for f in listed(layer.f)] for layer in layers]
        last_reader = {source: i for i, read in enumerate(sources) for source in read}
        kept: dict[int, Any] = {}
        spent: list[float] = []
        for i, (layer, read) in enumerate(zip(layers, sources)):
            if layer.f != -1:
                x = [x if source == i - 1 else kept[source] for source in read]
                x = x if isinstance(layer.f, list) else x[0]
            if profile:
                spent.append(profile_layer(layer, x, header=i == 0))
            for source in read:
                if last_reader[source] == i:
                    kept.pop(source, None)  # nobody needs it any more: memory of the next layers
            x = layer(x)
            if i in self.save:
                kept[i] = x
            if visualize and isinstance(x, Tensor):
                visualize(i, layer.type, x)
        if profile:
            LOGGER.info(f"{sum(spent):>10.2f} {'-':>10} {'-':>10}  total")
        return x

    def fuse(self) -> BaseModel:
        """Fold every `Conv`'s batch norm into its convolution, in place; for inference only."""
        for layer in self.modules():
            if isinstance(layer, Conv):
                layer.fuse_()
                if isinstance(layer.act, (nn.SiLU, nn.LeakyReLU, nn.ReLU)):
                    layer.act.inplace = True  # nobody else sees a convolution's output
        return self.requires_grad_(False)

    def info(self, imgsz: int | tuple[int, int] = 640) -> str:
        """Log and return the summary line: layers without children, parameters, gradients, GFLOPs at `imgsz` (h, w)."""
        size_hw = (imgsz, imgsz) if isinstance(imgsz, int) else imgsz
        operations = gflops(self, self.yaml["ch"], size_hw, max(64, int(self.stride.max())))
        size = Size.of(self)
        name = Path(self.yaml_file).stem.replace("yolov5", "YOLOv5") if self.yaml_file else "Model"
        line = f"{name} summary: {size.layers:,} layers, {size.parameters:,} parameters, "
        line += f"{size.gradients:,} gradients, {operations:.1f} GFLOPs"
        LOGGER.info(line)
        return line
