"""Core ML: the package `best.mlpackage`, written on Linux and macOS, run on macOS alone."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.backends.base import Exported, ExportOptions, describe, needed, traceable
from models.backends.onnx import INPUT, OUTPUT, PROTOTYPES
from models.yolo import DetectionModel
from utils.config import UserError


class CoreML(Exported):
    """A network that Core ML runs: an ML program for macOS 12 and iOS 15 or newer.

    Its input is a tensor, as that of the other formats, and not a picture: one that Core ML scales and pads itself
    would not be padded as `utils.inference` does it. Its `user_defined_metadata` hold `describe`'s values as JSON.
    """

    include = "coreml"
    suffix = ".mlpackage"

    def __init__(self, path: Path, device: str | torch.device = "cpu", *, half: bool = False) -> None:
        super().__init__(path, "cpu", half=half)
        tools = _coremltools(self.where)
        try:
            spec = tools.utils.load_spec(str(path))
            metadata = {
                key: json.loads(value)
                for key, value in spec.description.metadata.userDefined.items()
                if not key.startswith("com.github.apple")  # what coremltools says of itself, which is not JSON
            }
            batch, _, height, width = spec.description.input[0].type.multiArrayType.shape
        except Exception:  # protobuf's DecodeError and coremltools' own errors share no other class
            raise UserError(f"{self.where}: not a Core ML package of our export. Export it again.") from None
        self.take(metadata)
        self.batch_size, self.size_hw = int(batch), (int(height), int(width))
        self.outputs = [output.name for output in spec.description.output]
        if reason := self.cannot_run():
            raise UserError(f"{self.where}: {reason}. Elsewhere, export the .pt to onnx.")
        # float32 stays what it is on the processor alone: the GPU and the Neural Engine compute in float16
        units = tools.ComputeUnit.CPU_ONLY if torch.device(device).type == "cpu" else tools.ComputeUnit.ALL
        self.model = tools.models.MLModel(str(path), compute_units=units)

    @classmethod
    def check(cls, options: ExportOptions) -> None:
        _coremltools("--include coreml")

    @classmethod
    def cannot_run(cls) -> str:
        return "" if sys.platform == "darwin" else "Core ML models run on macOS only"

    @classmethod
    def export(cls, network: DetectionModel, stem: Path, options: ExportOptions) -> Path:
        tools = _coremltools("--include coreml")
        full = ExportOptions(**{**vars(options), "half": False})  # numbers become fp16 when they are converted
        model, images = traceable(network, full, "cpu")
        outputs = [OUTPUT, PROTOTYPES] if network.num_masks else [OUTPUT]
        try:
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # two progress bars
                warnings.simplefilter("ignore")
                # not torch.jit.trace: of its sizes coremltools makes integers in a way that numpy 2.4 no longer allows
                program = torch.export.export(model, (images,)).run_decompositions({})
                package = tools.convert(
                    program,
                    inputs=[tools.TensorType(name=INPUT, shape=tuple(images.shape), dtype=np.float32)],
                    outputs=[tools.TensorType(name=name, dtype=np.float32) for name in outputs],
                    convert_to="mlprogram",
                    minimum_deployment_target=tools.target.iOS15,
                    compute_precision=tools.precision.FLOAT16 if options.half else tools.precision.FLOAT32,
                    skip_model_load=True,
                )
        except (RuntimeError, ValueError, TypeError, KeyError) as error:  # torch.export's are RuntimeErrors
            line = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise UserError(
                f"--include coreml: coremltools {tools.__version__} with torch {torch.__version__} cannot convert this "
                f"network ({line}). Export onnx instead."
            ) from None
        package.user_defined_metadata.update({key: json.dumps(value) for key, value in describe(network, full).items()})
        path = stem.with_name(stem.name + cls.suffix)
        package.save(str(path))
        return path

    def run(self, images: Tensor) -> list[Tensor]:
        found = self.model.predict({INPUT: np.ascontiguousarray(images.cpu().numpy())})
        return [torch.from_numpy(found[name]) for name in self.outputs]


def _coremltools(use: str) -> Any:
    """The package, which would otherwise name every version it was not tested with."""
    logger = logging.getLogger("coremltools")
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return needed("coremltools", use)
