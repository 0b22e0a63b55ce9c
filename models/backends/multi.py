"""`DetectMultiBackend`, the name by which programs written for YOLOv5 load a network of any format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.backends.base import Backend
from models.backends.files import load
from models.backends.onnx import ONNX
from models.backends.openvino import OpenVINO
from models.backends.pytorch import PyTorch
from models.backends.tensorrt import TensorRT
from models.backends.torchscript import TorchScript


class DetectMultiBackend(nn.Module):
    """YOLOv5's wrapper over `load`: its arguments, attributes and outputs.

    `dnn` and `data` are accepted; names come from the file. Attributes: `stride names pt jit onnx xml engine triton
    fp16 device batch_size model`.

    >>> DetectMultiBackend("yolov5n.pt")(torch.zeros(1, 3, 64, 64))[0].shape
    torch.Size([1, 252, 85])
    """

    def __init__(
        self,
        weights: str | Path | Sequence[str | Path] = "yolov5s.pt",
        device: str | torch.device = "cpu",
        dnn: bool = False,
        data: Any = None,
        fp16: bool = False,
        fuse: bool = True,
    ) -> None:
        super().__init__()
        device = torch.device(device)
        self.backend: Backend = load(weights, device, half=fp16 and device.type != "cpu", fuse=fuse)
        self.stride, self.names = self.backend.stride, self.backend.names
        self.pt, self.jit = isinstance(self.backend, PyTorch), isinstance(self.backend, TorchScript)
        self.onnx, self.xml = isinstance(self.backend, ONNX), isinstance(self.backend, OpenVINO)
        self.engine, self.triton = isinstance(self.backend, TensorRT), False
        self.fp16, self.batch_size = self.backend.dtype == torch.float16, self.backend.batch_size or 1

    @property
    def model(self) -> Any:
        """The network of a checkpoint; the file's own object otherwise."""
        return getattr(self.backend, "model", self.backend)

    @property
    def device(self) -> torch.device:
        """Where inputs belong."""
        return self.backend.device

    def forward(self, im: Tensor, augment: bool = False, visualize: Any = False) -> Any:
        """Predictions first, as YOLOv5 gives them: with the raw levels for a checkpoint, else a tensor or a list."""
        im = im.to(self.backend.device, self.backend.dtype)
        output = self.backend(im, augment=augment)
        if self.pt:
            return [output.predictions, output.raw]
        return output.predictions if len(output) == 2 and not self.backend.num_masks else list(output)

    def warmup(self, imgsz: Sequence[int] = (1, 3, 640, 640)) -> None:
        """One pass over blank images of this shape, on an accelerator."""
        if self.device.type != "cpu":
            with torch.no_grad():
                self(torch.zeros(*imgsz))
