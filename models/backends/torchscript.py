"""TorchScript: `best.torchscript`, which libtorch runs without Python."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from torch import Tensor

from models.backends.base import Exported, ExportOptions, describe, trace
from models.yolo import DetectionModel
from utils.config import UserError

CONFIG = "config.txt"  # YOLOv5's name for it: JSON with shape, stride and names


class TorchScript(Exported):
    """A traced network; what its extra file `config.txt` says is its metadata."""

    include = "torchscript"
    suffix = ".torchscript"

    def __init__(self, path: Path, device: str | torch.device = "cpu", *, half: bool = False) -> None:
        super().__init__(path, device, half=half)
        extra = {CONFIG: ""}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch.jit's age
                self.script = torch.jit.load(str(path), map_location=self.device, _extra_files=extra)
            metadata = json.loads(extra[CONFIG] or "{}")
        except (RuntimeError, ValueError):  # JSONDecodeError is a ValueError
            raise UserError(f"{self.where}: not a TorchScript file of a YOLOv5 export. Export it again.") from None
        if half:
            self.script.half()
        first = next(iter(self.script.parameters()), None)
        self.dtype = torch.float32 if first is None else first.dtype
        self.take(metadata)
        shape = metadata.get("shape", [])
        if len(shape) == 4 and not metadata.get("dynamic", False):
            self.batch_size, self.size_hw = int(shape[0]), (int(shape[2]), int(shape[3]))
        if not self.names:
            blank = torch.zeros(1, 3, *(self.size_hw or (64, 64)), device=self.device, dtype=self.dtype)
            self.name_classes(self.run(blank)[0].shape[-1])

    @classmethod
    def export(cls, network: DetectionModel, stem: Path, options: ExportOptions) -> Path:
        script, images = trace(network, options)
        config = {"shape": list(images.shape), **describe(network, options)}
        path = stem.with_name(stem.name + cls.suffix)
        script.save(str(path), _extra_files={CONFIG: json.dumps(config)})
        return path

    def run(self, images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            outputs = self.script(images)
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)
