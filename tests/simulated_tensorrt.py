"""A package `tensorrt` on any machine: it builds nothing and has onnxruntime compute the graph it was given.

An "engine" is the ONNX graph and the sizes it takes. Its context reads its input and writes its outputs at the
addresses it was given, as TensorRT does, so a wrong address, layout, type or size gives wrong numbers here, too. The
names are those of the bindings of TensorRT 8.6.1, 10.13.3 and 11.4.0; `version` chooses whose flags there are.

What this cannot show: that TensorRT reads our graphs, its precision, memory and speed, and streams.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import pickle
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from models.backends import tensorrt


class DataType(enum.Enum):
    FLOAT = np.float32
    HALF = np.float16


class TensorIOMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        least, most = self.engine.limits
        self.shapes[name] = tuple(shape)
        return all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._computed()[name].shape  # its values are of what lies at the input's address now

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        for name, values in self._computed().items():
            ctypes.memmove(self.addresses[name], values.ctypes.data, values.nbytes)
        return True

    def _computed(self) -> dict[str, np.ndarray]:
        names = [output.name for output in self.engine.session.get_outputs()]
        shape, dtype = self.shapes["images"], self.engine.get_tensor_dtype("images").value
        images = np.empty(shape, dtype)
        ctypes.memmove(images.ctypes.data, self.addresses["images"], images.nbytes)
        found = self.engine.session.run(names, {"images": images})
        return {name: np.ascontiguousarray(values) for name, values in zip(names, found, strict=True)}


class Engine:
    def __init__(self, plan: bytes) -> None:
        graph, self.limits = pickle.loads(plan)  # of this file's own Builder
        self.session = onnxruntime.InferenceSession(graph)
        self.tensors = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.num_io_tensors = len(self.tensors)

    def create_execution_context(self) -> Context:
        return Context(self)

    def get_tensor_name(self, index: int) -> str:
        return self.tensors[index].name

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name == "images" else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        kinds = {"tensor(float)": DataType.FLOAT, "tensor(float16)": DataType.HALF}
        return kinds[next(tensor.type for tensor in self.tensors if tensor.name == name)]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        shape = next(tensor.shape for tensor in self.tensors if tensor.name == name)
        return tuple(size if isinstance(size, int) else -1 for size in shape)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        least, most = self.limits
        return [least, most, most]


class Parser:
    def __init__(self, network: SimpleNamespace, logger: object) -> None:
        self.network, self.num_errors = network, 1

    def parse(self, model: bytes) -> bool:
        self.network.graph = model
        return self.network.readable

    def get_error(self, index: int) -> Any:
        return SimpleNamespace(desc=lambda: "an operator it does not have")


class Builder:
    readable = True
    enough_memory = True

    def __init__(self, logger: object) -> None:
        self.config = SimpleNamespace(flags={"TF32"}, profile=None, limit=None)

    def create_network(self, flags: int = 0) -> Any:
        return SimpleNamespace(flags=flags, graph=b"", readable=type(self).readable)

    def create_builder_config(self) -> Any:
        config = self.config
        config.set_flag, config.clear_flag = config.flags.add, config.flags.remove
        config.set_memory_pool_limit = lambda pool, pool_size: setattr(config, "limit", (pool, pool_size))
        config.add_optimization_profile = lambda profile: setattr(config, "profile", profile)
        return config

    def create_optimization_profile(self) -> Any:
        profile = SimpleNamespace()
        profile.set_shape = lambda input, min, opt, max: setattr(profile, "limits", (min, max))
        return profile

    def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
        BUILT.append((network, config))
        session = onnxruntime.InferenceSession(network.graph)
        shape = session.get_inputs()[0].shape
        if any(not isinstance(size, int) for size in shape):
            limits = config.profile.limits
        else:
            assert config.profile is None
            limits = (tuple(shape), tuple(shape))
        return pickle.dumps((network.graph, limits)) if type(self).enough_memory else None


BUILT: list[tuple[Any, Any]] = []  # the networks and configurations that were built with


def module(version: int) -> Any:
    """What `import tensorrt` gives."""
    typed = enum.IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 1 if version == 10 else 0})  # type: ignore[misc]
    explicit = enum.IntEnum("NetworkDefinitionCreationFlag", {"EXPLICIT_BATCH": 0})  # type: ignore[misc]
    return SimpleNamespace(
        __version__=f"{version}.0",
        Logger=type("Logger", (), {"WARNING": 2, "__init__": lambda self, severity: None}),
        Builder=Builder,
        OnnxParser=Parser,
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=Engine),
        NetworkDefinitionCreationFlag=explicit if version == 8 else typed,
        MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
        BuilderFlag=SimpleNamespace(TF32="TF32", **({} if version == 11 else {"FP16": "FP16"})),
        TensorIOMode=TensorIOMode,
        DataType=DataType,
    )


@contextlib.contextmanager
def simulated_tensorrt(version: int = 10) -> Iterator[list[tuple[Any, Any]]]:
    """`models.backends.tensorrt` over this module, on the CPU; gives what was built: networks, configurations."""
    stream = SimpleNamespace(cuda_stream=1, wait_stream=lambda other: None)
    BUILT.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt, "DEVICE", "cpu")
        patch.setattr(tensorrt, "needed", lambda package, use: module(version))
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(torch.cuda, "get_device_name", lambda: "simulated")
        patch.setattr(torch.cuda, "Stream", lambda device: stream)
        patch.setattr(torch.cuda, "current_stream", lambda device: stream)
        yield BUILT
