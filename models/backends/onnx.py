"""ONNX: `best.onnx`, run by onnxruntime; with `--nms` it gives final detections."""

from __future__ import annotations

import ast
import contextlib
import io
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.backends.base import Exported, ExportOptions, describe, needed, traceable
from models.yolo import DetectionModel
from utils.config import UserError
from utils.runtime import LOGGER

INPUT, OUTPUT, PROTOTYPES, DETECTIONS = "images", "output0", "output1", "detections"
DYNAMIC = {INPUT: {0: "batch", 2: "height", 3: "width"}, OUTPUT: {0: "batch", 1: "anchors"}}
MAX_TEXT = 1 << 20  # of the metadata's names
# Class by class, so a box may appear with several classes, as it does in validation. The best `limit` of an image are
# sorted, the rest of its rows are zero.
SUPPRESSION = """
<ir_version: 8, opset_import: ["": {opset}]>
suppression (float[batch, anchors, row] predictions) => (float[batch, kept, 6] detections)
<int64[1] zero = {{0}}, int64[1] two = {{2}}, int64[1] four = {{4}}, int64[1] five = {{5}}, int64[1] end = {{1000000}},
 int64[2] rows = {{0, -1}}, int64[1] limit = {{{limit}}}, int64[1] per_class = {{{per_class}}},
 float[1] iou = {{{iou}}}, float[1] confidence = {{{confidence}}}, float half = {{0.5}}, float nothing = {{0}}>
{{
    boxes = Slice(predictions, zero, four, two)
    objectness = Slice(predictions, four, five, two)
    classes = Slice(predictions, five, end, two)
    products = Mul(objectness, classes)
    scores = Transpose<perm = [0, 2, 1]>(products)
    chosen = NonMaxSuppression<center_point_box = 1>(boxes, scores, per_class, iou, confidence)
    values = GatherND(scores, chosen)
    shape = Shape(scores)
    blank = ConstantOfShape(shape)
    kept_scores = ScatterND(blank, chosen, values)
    flat = Reshape(kept_scores, rows)
    flat_shape = Shape(flat)
    one = Constant<value = int64[1] {{1}}>()
    most = Gather(flat_shape, one)
    count = Min(limit, most)
    best, places = TopK<axis = 1>(flat, count)
    anchor_count = Gather(shape, two)
    number = Div(places, anchor_count)
    anchor = Mod(places, anchor_count)
    index = Unsqueeze(anchor, two)
    found = GatherND<batch_dims = 1>(boxes, index)
    centres = Slice(found, zero, two, two)
    sizes = Slice(found, two, four, two)
    halves = Mul(sizes, half)
    low = Sub(centres, halves)
    high = Add(centres, halves)
    confidence_column = Unsqueeze(best, two)
    number_float = Cast<to = 1>(number)
    class_column = Unsqueeze(number_float, two)
    all_rows = Concat<axis = 2>(low, high, confidence_column, class_column)
    is_found = Greater(confidence_column, nothing)
    mask = Cast<to = 1>(is_found)
    detections = Mul(all_rows, mask)
}}
"""


class ONNX(Exported):
    """A network that onnxruntime runs.

    One with its own suppression gives `(B, K, 6)` [x1, y1, x2, y2, confidence, class], zero rows after the last. Its
    `predictions` are these detections as rows whose objectness is the confidence and whose class score is 1, so that
    our suppression keeps all of them at equal or lower thresholds.
    """

    include = "onnx"
    suffix = ".onnx"

    def __init__(self, path: Path, device: str | torch.device = "cpu", *, half: bool = False) -> None:
        super().__init__(path, device, half=half)
        runtime = needed("onnxruntime", self.where)
        wanted = ["CPUExecutionProvider"]
        if self.device.type == "cuda" and "CUDAExecutionProvider" in runtime.get_available_providers():
            wanted.insert(0, "CUDAExecutionProvider")
        settings = runtime.SessionOptions()
        settings.log_severity_level = 3
        try:
            self.session = runtime.InferenceSession(str(path), settings, providers=wanted)
        except Exception as error:  # onnxruntime has a class per status, without a common one but this
            line = " ".join(str(error).split())[:200]
            raise UserError(f"{self.where}: onnxruntime cannot load it ({line}). Export it again.") from None
        source, outputs = self.session.get_inputs()[0], self.session.get_outputs()
        metadata = _metadata(self.session.get_modelmeta().custom_metadata_map, self.where)
        self.input = source.name
        self.dtype = torch.float16 if source.type == "tensor(float16)" else torch.float32
        self.take(metadata)
        batch, _, height, width = source.shape if len(source.shape) == 4 else (None,) * 4
        self.batch_size = batch if isinstance(batch, int) else None
        self.size_hw = (height, width) if isinstance(height, int) and isinstance(width, int) else None
        self.is_final = outputs[0].name == DETECTIONS
        if self.is_final:
            LOGGER.info(f"{self.where} gives final detections: {metadata.get('nms', '')}")
        elif isinstance(outputs[0].shape[-1], int):
            self.name_classes(outputs[0].shape[-1])

    @classmethod
    def check(cls, options: ExportOptions) -> None:
        for package in ("onnx", "onnxruntime", *(["onnxslim"] if options.simplify else [])):
            needed(package, "--include onnx")

    @classmethod
    def export(cls, network: DetectionModel, stem: Path, options: ExportOptions) -> Path:
        onnx = needed("onnx", "--include onnx")
        model = onnx.load_from_string(serialized(network, options))
        if options.nms:
            model = with_suppression(onnx, model, options)
        if options.simplify:
            model = needed("onnxslim", "--simplify").slim(model)
        metadata = describe(network, options)
        if options.nms:
            metadata["nms"] = f"confidence {options.conf_thres:g}, IoU {options.iou_thres:g}, most {options.topk_all}"
        onnx.helper.set_model_props(model, {key: str(value) for key, value in metadata.items()})
        onnx.checker.check_model(model, full_check=True)
        path = stem.with_name(stem.name + cls.suffix)
        onnx.save(model, str(path))
        return path

    def run(self, images: Tensor) -> list[Tensor]:
        outputs = self.session.run(None, {self.input: np.ascontiguousarray(images.cpu().numpy())})
        tensors = [torch.from_numpy(output) for output in outputs]
        return [as_predictions(tensors[0], len(self.names))] if self.is_final else tensors


def serialized(network: DetectionModel, options: ExportOptions) -> bytes:
    """The network as a serialized ONNX model."""
    model, images = traceable(network, options)
    outputs = [OUTPUT, PROTOTYPES] if network.num_masks else [OUTPUT]
    with (
        tempfile.TemporaryDirectory() as folder,
        torch.no_grad(),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        file = Path(folder) / "network.onnx"
        warnings.simplefilter("ignore")  # the exporter's age, and sizes it takes as constants: compared afterwards
        try:
            torch.onnx.export(
                model,
                (images,),
                str(file),
                dynamo=False,  # the newer exporter needs onnxscript and traces each gate to other operators
                opset_version=options.opset,
                input_names=[INPUT],
                output_names=outputs,
                dynamic_axes=DYNAMIC if options.dynamic else None,
            )
        except (RuntimeError, ValueError, torch.onnx.errors.OnnxExporterError) as error:
            line = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise UserError(f"--opset {options.opset}: torch cannot export the network to ONNX ({line}).") from None
        return file.read_bytes()


def with_suppression(onnx: Any, model: Any, options: ExportOptions) -> Any:
    """The model followed by non-maximum suppression."""
    text = SUPPRESSION.format(
        opset=options.opset,
        limit=options.topk_all,
        per_class=options.topk_per_class,
        iou=f"{options.iou_thres:.8f}",
        confidence=f"{options.conf_thres:.8f}",
    )
    after = onnx.parser.parse_model(text)
    after.ir_version = model.ir_version
    return onnx.compose.merge_models(model, after, io_map=[(OUTPUT, "predictions")])


def _metadata(stated: Mapping[str, str], where: str) -> dict[str, Any]:
    """The metadata's values; a dict of names is text in Python's notation, read as literals."""
    values: dict[str, Any] = dict(stated)
    names = stated.get("names", "{}")
    try:
        if len(names) > MAX_TEXT:
            raise ValueError("too long")
        values["names"] = ast.literal_eval(names)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise UserError(f"{where}: the class names in its metadata cannot be read. Export it again.") from None
    return values


def as_predictions(detections: Tensor, num_classes: int) -> Tensor:
    """Final detections (B, K, 6) as rows (B, K, 5 + classes) of a network's output."""
    low, high, confidence, number = detections.float().split((2, 2, 1, 1), 2)
    classes = torch.nn.functional.one_hot(number[..., 0].long(), num_classes).float()
    return torch.cat(((low + high) / 2, high - low, confidence, classes), 2)
