"""OpenVINO: the folder `best_openvino_model/`, in fp32, with weights in fp16, or in int8."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from models.backends.base import Bounds, Exported, ExportOptions, describe, needed, trace
from models.gates.start import gates_in
from models.yolo import DetectionModel
from utils.config import UserError
from utils.files import write_yaml
from utils.runtime import LOGGER


class OpenVINO(Exported):
    """A network that OpenVINO runs on a CPU, in fp32 whatever its weights are stored in."""

    include = "openvino"
    suffix = "_openvino_model"

    def __init__(self, path: Path, device: str | torch.device = "cpu", *, half: bool = False) -> None:
        super().__init__(path, "cpu", half=half)
        openvino = needed("openvino", self.where)
        files = sorted(path.glob("*.xml"))
        if len(files) != 1:
            raise UserError(f"{self.where}: holds {len(files)} .xml files; expected the one of an OpenVINO export.")
        try:
            core = openvino.Core()
            model = core.read_model(files[0])
            # without the hint CPUs with bfloat16 use it, and boxes move by pixels
            self.compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        except RuntimeError as error:
            line = " ".join(str(error).split())[:200]
            raise UserError(f"{self.where}: OpenVINO cannot load it ({line}). Export it again.") from None
        stated = files[0].with_suffix(".yaml")
        try:
            metadata = yaml.safe_load(stated.read_text("utf-8")) if stated.is_file() else {}
        except (yaml.YAMLError, UnicodeDecodeError):
            metadata = None
        if not isinstance(metadata, dict):
            raise UserError(f"{self.where}: {stated.name} is no YAML mapping. Export it again.")
        self.take(metadata)
        shape, rows = self.compiled.input(0).partial_shape, self.compiled.output(0).partial_shape
        if shape.is_static:
            self.batch_size, self.size_hw = int(shape[0].get_length()), (shape[2].get_length(), shape[3].get_length())
        if rows[2].is_static:
            self.name_classes(rows[2].get_length())

    @classmethod
    def check(cls, options: ExportOptions) -> None:
        needed("openvino", "--include openvino")
        if options.int8:
            needed("nncf", "--int8")

    @classmethod
    def export(cls, network: DetectionModel, stem: Path, options: ExportOptions) -> Path:
        openvino = needed("openvino", "--include openvino")
        full = ExportOptions(**{**vars(options), "half": False})  # weights become fp16 when they are stored
        script, images = trace(network, full, "cpu")
        model = openvino.convert_model(script, example_input=images)
        model.reshape([-1, images.shape[1], -1, -1] if options.dynamic else list(images.shape))
        if options.int8:
            gates = [index for index, layer in enumerate(network.model) if gates_in(layer)]
            model = _quantized(needed("nncf", "--int8"), model, options, gates)
        folder = stem.with_name(f"{stem.name}{'_int8' if options.int8 else ''}{cls.suffix}")
        folder.mkdir(exist_ok=True)
        for old in folder.glob("*.xml"):
            old.unlink()
        openvino.save_model(model, folder / f"{stem.name}.xml", compress_to_fp16=options.half)
        write_yaml(folder / f"{stem.name}.yaml", describe(network, options))
        return folder

    @classmethod
    def bounds(cls, options: ExportOptions) -> Bounds:
        """In int8 single boxes may be anywhere; what counts is mAP, which `--data` has compared."""
        return Bounds(math.inf, 0.6, 0.02) if options.int8 else super().bounds(options)

    def run(self, images: Tensor) -> list[Tensor]:
        outputs = self.compiled(np.ascontiguousarray(images.cpu().numpy()))
        return [torch.from_numpy(outputs[number].copy()) for number in range(len(self.compiled.outputs))]


def _quantized(nncf: Any, model: Any, options: ExportOptions, gates: Sequence[int]) -> Any:
    """The model in int8, its ranges measured on the calibration images.

    The decoding of boxes stays as it is, and so do gates: what they give is a factor of a whole channel or map.
    """
    if not options.calibration:
        raise UserError("--int8: needs images to measure ranges on. Name the dataset with --data.")
    logging.getLogger("nncf").setLevel(logging.WARNING)  # it names every operation it leaves alone
    LOGGER.info(f"calibrating int8 on {len(options.calibration)} images")
    repeated = [image.expand(options.batch_size, -1, -1, -1).numpy() for image in options.calibration]
    return nncf.quantize(
        model,
        nncf.Dataset(repeated),
        subset_size=len(repeated),
        preset=nncf.QuantizationPreset.MIXED,
        ignored_scope=nncf.IgnoredScope(names=[*_decoding(model), *_inside(model, gates)]),
    )


def _inside(model: Any, rows: Sequence[int]) -> list[str]:
    """The operations with numbers of a network's rows, known by the module in their names."""
    starts = tuple(f"__module.network.model.{row}{end}" for row in rows for end in "./")
    kinds = ("Constant", "Parameter", "Result", "Convert")
    names = [op.get_friendly_name() for op in model.get_ordered_ops() if op.get_type_name() not in kinds]
    return [name for name in names if name.startswith(starts)]


def _decoding(model: Any) -> list[str]:
    """The operations after the last convolutions: boxes of up to 640 pixels do not fit 256 steps."""
    following: dict[str, set[str]] = {}
    order = model.get_ordered_ops()
    convolutions = [op for op in order if op.get_type_name() in ("Convolution", "GroupConvolution")]
    names = {op.get_friendly_name() for op in convolutions}
    leads: set[str] = set()  # operations from which a convolution is still to come
    for op in reversed(order):
        name = op.get_friendly_name()
        readers = {target.get_node() for output in op.outputs() for target in output.get_target_inputs()}
        following[name] = {reader.get_friendly_name() for reader in readers}
        if following[name] & (leads | names):
            leads.add(name)
    kinds = ("Sigmoid", "Multiply", "Add", "Subtract", "Power", "Concat", "Split", "VariadicSplit", "Reshape")
    return [
        op.get_friendly_name()
        for op in order
        if op.get_friendly_name() not in leads | names and op.get_type_name() in (*kinds, "Transpose")
    ]
