"""Core ML packages, of which macOS alone runs one: here the program in a package is computed operation by operation.

`evaluate` follows the definitions of coremltools' operations, with torch for the numbers. It shows that the package on
the disk describes the checkpoint's network, weights included; how Core ML's own kernels round, it cannot show.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from test_export import X, needs, tiny
from torch import Tensor

import export
from models import graph as graphs
from models.backends import FORMATS, ExportOptions, load
from models.gates.insert import Insertion, insert
from utils.config import UserError

SIZE = tuple(X.shape[2:])


def evaluate(package: Path, images: Tensor) -> list[Tensor]:
    """The outputs of the program in a Core ML package, rounded to the type that each operation states."""
    import coremltools
    from coremltools.converters.mil.frontend.milproto.load import load as read_program
    from coremltools.converters.mil.mil.types import nptype_from_builtin

    spec = coremltools.utils.load_spec(str(package))
    weights = str(package / "Data/com.apple.CoreML/weights")
    main = read_program(spec, specification_version=spec.specificationVersion, file_weights_dir=weights)
    function = main.functions["main"]
    values: dict[str, Any] = {"images": images}

    def value(var: Any) -> Any:
        if isinstance(var, (list, tuple)):
            return [value(one) for one in var]
        if var.name in values or var.val is None:
            return values[var.name]
        return torch.from_numpy(var.val) if isinstance(var.val, np.ndarray) else var.val

    for op in function.operations:
        if op.op_type == "const":
            continue
        inputs = {name: value(var) for name, var in op.inputs.items() if var is not None}
        found = OPERATIONS[op.op_type](**inputs)
        for var, tensor in zip(op.outputs, found if isinstance(found, (list, tuple)) else [found], strict=True):
            assert tuple(var.shape) == tuple(tensor.shape), op
            dtype = torch.from_numpy(np.zeros(1, nptype_from_builtin(var.dtype))).dtype
            values[var.name] = tensor.to(dtype).float() if dtype.is_floating_point else tensor.to(dtype)
    return [values[var.name] for var in function.outputs]


def _padding(pad_type: str, pad: Tensor | None) -> list[int]:
    """Of [top, bottom, left, right] in F.pad's order."""
    assert pad_type in ("custom", "valid"), pad_type
    top, bottom, left, right = [0] * 4 if pad_type == "valid" or pad is None else pad.tolist()
    return [left, right, top, bottom]


def conv(x: Tensor, weight: Tensor, strides: Tensor, pad_type: str, dilations: Tensor, groups: int, **more: Any) -> Any:
    if x.ndim == 3:
        left, right = more["pad"].tolist() if pad_type == "custom" else (0, 0)
        x, function = F.pad(x, (left, right)), F.conv1d
    else:
        x, function = F.pad(x, _padding(pad_type, more.get("pad"))), F.conv2d
    bias = more["bias"].float() if "bias" in more else None
    return function(x, weight.float(), bias, strides.tolist(), 0, dilations.tolist(), int(groups))


def max_pool(x: Tensor, kernel_sizes: Tensor, strides: Tensor, pad_type: str, ceil_mode: bool, pad: Any = None) -> Any:
    padded = F.pad(x, _padding(pad_type, pad), value=-torch.inf)
    return F.max_pool2d(padded, kernel_sizes.tolist(), strides.tolist(), ceil_mode=bool(ceil_mode))


def slice_by_index(x: Tensor, begin: Tensor, end: Tensor, **more: Any) -> Tensor:
    nothing = torch.zeros(x.ndim, dtype=torch.bool)
    begin_mask, end_mask, squeeze_mask = (more.get(f"{name}_mask", nothing) for name in ("begin", "end", "squeeze"))
    stride = more.get("stride", torch.ones(x.ndim, dtype=torch.int32))
    assert bool((stride == 1).all())
    index: list[Any] = []
    for axis in range(x.ndim):
        if squeeze_mask[axis]:
            index.append(int(begin[axis]))
        else:
            low, high = (None if begin_mask[axis] else int(begin[axis])), (None if end_mask[axis] else int(end[axis]))
            index.append(slice(low, high))
    return x[tuple(index)]


def split(x: Tensor, axis: int, num_splits: int | None = None, split_sizes: Tensor | None = None) -> Any:
    return x.split(split_sizes.tolist() if split_sizes is not None else x.shape[axis] // num_splits, int(axis))


def layer_norm(x: Tensor, axes: Tensor, epsilon: float, gamma: Any = None, beta: Any = None) -> Tensor:
    mean, variance = x.mean(axes.tolist(), True), x.var(axes.tolist(), unbiased=False, keepdim=True)
    normal = (x - mean) / (variance + float(epsilon)).sqrt()
    return normal * (1 if gamma is None else gamma.float()) + (0 if beta is None else beta.float())


def batch_norm(
    x: Tensor, mean: Tensor, variance: Tensor, epsilon: float, gamma: Any = None, beta: Any = None
) -> Tensor:
    numbers = [None if one is None else one.float() for one in (mean, variance, gamma, beta)]
    return F.batch_norm(x, *numbers, eps=float(epsilon))


def matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    return (x.mT if transpose_x else x).float() @ (y.mT if transpose_y else y).float()


def expand_dims(x: Tensor, axes: Tensor) -> Tensor:
    for axis in sorted(axis % (x.ndim + len(axes)) for axis in axes.tolist()):
        x = x.unsqueeze(axis)
    return x


def upsample(x: Tensor, scale_factor_height: float, scale_factor_width: float) -> Tensor:
    return F.interpolate(x, scale_factor=(float(scale_factor_height), float(scale_factor_width)), mode="nearest")


OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y,
    "batch_norm": batch_norm,
    "cast": lambda x, dtype: x,  # the output's type says to what
    "concat": lambda values, axis, interleave: torch.cat(values, int(axis)),
    "conv": conv,
    "expand_dims": expand_dims,
    "layer_norm": layer_norm,
    "linear": lambda x, weight, bias=None: F.linear(x, weight.float(), None if bias is None else bias.float()),
    "matmul": matmul,
    "max_pool": max_pool,
    "mul": lambda x, y: x * y,
    "pow": lambda x, y: x**y,
    "real_div": lambda x, y: x / y,
    "reduce_max": lambda x, axes, keep_dims: x.amax(axes.tolist(), bool(keep_dims)),
    "reduce_mean": lambda x, axes, keep_dims: x.mean(axes.tolist(), bool(keep_dims)),
    "reduce_sum": lambda x, axes, keep_dims: x.sum(axes.tolist(), bool(keep_dims)),
    "relu": lambda x: torch.relu(x),
    "reshape": lambda x, shape: x.reshape(shape.tolist()),
    "sigmoid": lambda x: x.sigmoid(),
    "sigmoid_hard": lambda x, alpha, beta: (x * float(alpha) + float(beta)).clamp(0, 1),
    "silu": lambda x: F.silu(x),
    "slice_by_index": slice_by_index,
    "softmax": lambda x, axis: x.softmax(int(axis)),
    "split": split,
    "sqrt": lambda x: x.sqrt(),
    "square": lambda x: x * x,
    "sub": lambda x, y: x - y,
    "thresholded_relu": lambda x, alpha: torch.where(x >= float(alpha), x, 0.0),
    "tile": lambda x, reps: x.repeat(reps.tolist()),
    "transpose": lambda x, perm: x.permute(perm.tolist()),
    "upsample_nearest_neighbor": upsample,
}


@torch.no_grad()
def compared(source: Path, folder: Path, **changes: Any) -> tuple[Any, list[Tensor]]:
    """The checkpoint's output and those of its package, for the same images."""
    reference = load(source)
    options = ExportOptions(**{"size_hw": SIZE, **changes})
    package = FORMATS["coreml"].export(reference.model, folder / "network", options)
    images = X.expand(options.batch_size, -1, -1, -1)
    return reference(images), evaluate(package, images)


@pytest.mark.slow
def test_a_package_computes_what_its_checkpoint_computes(tmp_path: Path) -> None:
    needs("coremltools")
    wanted, (rows,) = compared(tiny(tmp_path / "best.pt"), tmp_path, batch_size=2)
    torch.testing.assert_close(rows, wanted.predictions, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_a_package_in_fp16_stays_within_its_bounds(tmp_path: Path) -> None:
    needs("coremltools")
    wanted, (rows,) = compared(tiny(tmp_path / "best.pt"), tmp_path, half=True)
    bounds = FORMATS["coreml"].bounds(ExportOptions(half=True))
    gap = (rows - wanted.predictions).abs()
    assert 0 < float(gap[..., :4].max()) < bounds.box and float(gap[..., 4:].max()) < bounds.score


@pytest.mark.slow
def test_a_segmentation_package_keeps_its_masks(tmp_path: Path) -> None:
    needs("coremltools")
    source = tiny(tmp_path / "seg.pt", "segment/yolov5n-seg.yaml", width_multiple=0.25)
    wanted, (rows, prototypes) = compared(source, tmp_path)
    torch.testing.assert_close(rows, wanted.predictions, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(prototypes, wanted.prototypes, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("gate", graphs.gates())
def test_every_gate_is_in_the_package(gate: str, tmp_path: Path) -> None:
    needs("coremltools")
    cfg = yaml.safe_load(insert("yolov5n.yaml", [Insertion(gate, (), "after", "9")]))
    wanted, (rows,) = compared(tiny(tmp_path / "gate.pt", cfg, width_multiple=0.25), tmp_path)
    torch.testing.assert_close(rows, wanted.predictions, rtol=1e-3, atol=5e-3)


@pytest.mark.slow
def test_a_package_says_what_it_is_and_that_it_was_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    needs("coremltools")
    import coremltools

    monkeypatch.setattr("sys.platform", "linux")
    best = tiny(tmp_path / "best.pt")
    assert export.run(weights=str(best), include="coreml", imgsz=SIZE) == [str(tmp_path / "best.mlpackage")]
    assert any(line.endswith("written, not compared: Core ML models run on macOS only.") for line in said)
    assert not any("largest difference" in line or "detect.py" in line for line in said)
    spec = coremltools.utils.load_spec(str(tmp_path / "best.mlpackage"))
    stated = spec.description.metadata.userDefined
    assert json.loads(stated["names"]) == {"0": "class 0", "1": "class 1", "2": "class 2"}
    assert (stated["stride"], json.loads(stated["task"]), json.loads(stated["imgsz"])) == ("32", "detect", list(SIZE))
    assert [(one.name, list(one.type.multiArrayType.shape)) for one in spec.description.input] == [
        ("images", [*X.shape])
    ]
    assert [(one.name, list(one.type.multiArrayType.shape)) for one in spec.description.output] == [
        ("output0", [1, 378, 8])
    ]
    with pytest.raises(UserError, match="Core ML models run on macOS only"):
        load(tmp_path / "best.mlpackage")


@pytest.mark.skipif("sys.platform != 'darwin'", reason="Core ML models run on macOS only")
@pytest.mark.slow
def test_core_ml_itself_computes_what_the_checkpoint_computes(tmp_path: Path, said: list[str]) -> None:
    needs("coremltools")
    (file,) = export.run(weights=str(tiny(tmp_path / "best.pt")), include="coreml", imgsz=SIZE)  # or raises Mismatch
    assert load(file).size_hw == SIZE and any("largest difference" in line for line in said)


def test_a_damaged_package_is_one_line(tmp_path: Path) -> None:
    needs("coremltools")
    folder = tmp_path / "a.mlpackage"
    with pytest.raises(UserError, match="no such file"):
        load(folder)
    folder.mkdir()
    with pytest.raises(UserError, match="not a Core ML package of our export"):
        load(folder)
    (folder / "Manifest.json").write_text("{}")
    with pytest.raises(UserError, match="not a Core ML package of our export"):
        load(folder)


def test_a_package_has_one_size() -> None:
    with pytest.raises(UserError, match="--dynamic: a Core ML package is made for one size"):
        export.run(include=["coreml"], dynamic=True)
