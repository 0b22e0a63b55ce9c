"""TensorRT: `best.engine`, built over our ONNX graph, for the GPU and the TensorRT that built it.

Written for TensorRT 8.6 to 11, and not run by us on a GPU: the tests run this file over a simulated TensorRT, and
`export.py` compares every engine with its checkpoint, right after it was built.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.backends.base import Exported, ExportOptions, describe, needed
from models.backends.onnx import INPUT, serialized
from models.yolo import DetectionModel
from utils.config import UserError
from utils.files import replacing

LENGTH_BYTES = 4  # little-endian: the length of the JSON text that follows it, as in the engines of YOLOv5's successors
MAX_HEADER = 1 << 20  # 10,000 class names take a third of it
DEVICE = "cuda"  # tests run this file over a simulated TensorRT, without a GPU


class TensorRT(Exported):
    """An engine that TensorRT runs on a CUDA device.

    A file is the length of its metadata, the metadata as JSON, and the engine. Files without metadata are refused: an
    engine holds machine code, so only one that is known to be whole is given to TensorRT.

    `dynamic` engines take images of up to the batch and a stride more than the size they were exported with; a larger
    batch is run in parts.
    """

    include = "engine"
    suffix = ".engine"

    def __init__(self, path: Path, device: str | torch.device = "cpu", *, half: bool = False) -> None:
        super().__init__(path, device, half=half)
        metadata, plan = read_engine(path, self.where)
        self.take(metadata)
        if self.device.type != DEVICE:
            raise UserError(f"{self.where}: TensorRT needs a CUDA device. Add --device 0, or export the .pt to onnx.")
        trt = needed("tensorrt", self.where)
        self.logger = trt.Logger(trt.Logger.WARNING)  # must live as long as what was made with it
        with torch.cuda.device(self.device):
            self.runtime = trt.Runtime(self.logger)
            self.engine: Any = self.runtime.deserialize_cuda_engine(plan)
            self.context: Any = self.engine.create_execution_context() if self.engine is not None else None
            if self.context is None:
                raise UserError(
                    f"{self.where}: TensorRT {trt.__version__} cannot load it on this GPU; it was built by TensorRT "
                    f"{metadata.get('tensorrt')} on {metadata.get('gpu')}. Export the .pt again, here."
                )
            self.stream = torch.cuda.Stream(self.device)
        dtypes = {trt.DataType.FLOAT: torch.float32, trt.DataType.HALF: torch.float16}
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        modes = {name: self.engine.get_tensor_mode(name) for name in names}
        self.outputs = {
            name: dtypes[self.engine.get_tensor_dtype(name)] for name in names if modes[name] == trt.TensorIOMode.OUTPUT
        }
        self.dtype = dtypes[self.engine.get_tensor_dtype(INPUT)]
        batch, _, height, width = self.engine.get_tensor_shape(INPUT)
        if min(batch, height, width) > 0:
            self.batch_size, self.size_hw = batch, (height, width)
            self.largest = (batch, height, width)
        else:
            batch, _, height, width = self.engine.get_tensor_profile_shape(INPUT, 0)[2]  # of least, usual, most
            self.largest = (batch, height, width)

    @classmethod
    def check(cls, options: ExportOptions) -> None:
        for package in ("tensorrt", "onnx"):  # torch's exporter needs the second
            needed(package, "--include engine")

    @classmethod
    def export(cls, network: DetectionModel, stem: Path, options: ExportOptions) -> Path:
        trt = needed("tensorrt", "--include engine")
        with torch.cuda.device(next(network.parameters()).device):
            plan = _built(trt, serialized(network, options), network, options)
            gpu = torch.cuda.get_device_name()
        metadata = {**describe(network, options), "tensorrt": trt.__version__, "gpu": gpu}
        path = stem.with_name(stem.name + cls.suffix)
        write_engine(path, metadata, plan)
        return path

    def run(self, images: Tensor) -> list[Tensor]:
        most, height, width = self.largest
        if images.shape[2] > height or images.shape[3] > width:
            raise UserError(
                f"{self.where}: takes images of up to {height}x{width}, not {images.shape[2]}x{images.shape[3]}. Lower "
                "--imgsz, or export it with a larger one."
            )
        parts = [self._run(part) for part in images.to(self.device).split(most)]
        return [torch.cat(outputs) for outputs in zip(*parts)] if len(parts) > 1 else parts[0]

    def _run(self, images: Tensor) -> list[Tensor]:
        """The outputs for a batch that fits, in order with the device's current stream and without a wait for it."""
        images = images.contiguous()  # channels last would be read as another image
        if not self.context.set_input_shape(INPUT, tuple(images.shape)):
            raise UserError(f"{self.where}: does not take images of shape {tuple(images.shape)}. See --imgsz.")
        self.context.set_tensor_address(INPUT, images.data_ptr())
        found = {
            name: torch.empty(tuple(self.context.get_tensor_shape(name)), dtype=dtype, device=self.device)
            for name, dtype in self.outputs.items()
        }
        for name, tensor in found.items():
            self.context.set_tensor_address(name, tensor.data_ptr())
        current = torch.cuda.current_stream(self.device)
        # on the default stream TensorRT adds waits of its own; both ways, the memory above is not reused too early
        self.stream.wait_stream(current)
        with torch.cuda.device(self.device):
            done = self.context.execute_async_v3(self.stream.cuda_stream)
        current.wait_stream(self.stream)
        if not done:
            raise RuntimeError(f"{self.where}: TensorRT did not run images of shape {tuple(images.shape)}")
        return list(found.values())


def _built(trt: Any, graph: bytes, network: DetectionModel, options: ExportOptions) -> bytes:
    """The engine of an ONNX graph, in the graph's own precision."""
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    kinds = trt.NetworkDefinitionCreationFlag
    typed = hasattr(kinds, "STRONGLY_TYPED")  # from TensorRT 10; 11 has neither of the flags that 8.6 needs instead
    definition = builder.create_network(1 << int(kinds.STRONGLY_TYPED if typed else kinds.EXPLICIT_BATCH))
    parser = trt.OnnxParser(definition, logger)
    if not parser.parse(graph):
        problem = parser.get_error(0).desc() if parser.num_errors else "without a reason"
        raise UserError(f"--include engine: TensorRT {trt.__version__} cannot read our ONNX graph ({problem}).")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace << 30)
    config.clear_flag(trt.BuilderFlag.TF32)  # it is on by default, and moves boxes by tenths of a pixel
    if options.half and not typed:
        config.set_flag(trt.BuilderFlag.FP16)
    if options.dynamic:
        batch, channels, (height, width) = options.batch_size, network.graph.ch, options.size_hw
        step = describe(network, options)["stride"]
        least, most = (1, channels, step, step), (batch, channels, height + step, width + step)  # val.py pads by a step
        profile = builder.create_optimization_profile()
        profile.set_shape(INPUT, least, (batch, channels, height, width), most)
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(definition, config)
    if plan is None:
        raise UserError(
            f"--include engine: TensorRT {trt.__version__} could not build the engine; its own lines above say why. "
            f"With too little memory: --workspace {options.workspace} allows that many GiB."
        )
    return bytes(plan)


# ---------------------------------------------------------------------------------------------------------------- file


def write_engine(path: Path, metadata: Mapping[str, Any], plan: bytes) -> None:
    """Write metadata and engine; the metadata also say how the engine's bytes are checked."""
    stated = {**metadata, "bytes": len(plan), "sha256": hashlib.sha256(plan).hexdigest()}
    header = json.dumps(stated).encode()
    if len(header) > MAX_HEADER:
        raise UserError(f"--include engine: the class names take {len(header)} bytes, more than {MAX_HEADER}.")
    with replacing(path) as stream:
        stream.write(len(header).to_bytes(LENGTH_BYTES, "little") + header + plan)


def read_engine(path: Path, where: str) -> tuple[dict[str, Any], bytes]:
    """The metadata of a file and its engine, which is as it was written.

    Raises:
        UserError: no such header, or an engine that is cut short or changed.
    """
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            header = stream.read(length) if length <= MAX_HEADER else b""
            plan = stream.read()
        metadata = json.loads(header)
        whole = (metadata["bytes"], metadata["sha256"]) == (len(plan), hashlib.sha256(plan).hexdigest())
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror}).") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(
            f"{where}: does not begin with the metadata of our export. Engines of other programs, which hold machine "
            "code, are not loaded: export the .pt with --include engine."
        ) from None
    if not whole:
        raise UserError(f"{where}: its engine of {len(plan)} bytes is not the one that was written. Export it again.")
    return metadata, plan
