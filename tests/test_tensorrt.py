"""TensorRT engines: the file, what is refused, and how the engine is built and fed (over simulated_tensorrt.py)."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_export import X, needs, predictions, tiny

import detect
import export
import hubconf
import val
from models.backends import FORMATS, DetectMultiBackend, ExportOptions, load
from models.backends.tensorrt import MAX_HEADER, read_engine, write_engine
from tests.conftest import TinyDataset
from utils.config import UserError

SIZE = (96, 64)
METADATA = {"names": {0: "a", 1: "b"}, "stride": 32, "task": "detect", "num_masks": 0}


@pytest.fixture
def best(tmp_path: Path) -> Path:
    return tiny(tmp_path / "best.pt")


# ---------------------------------------------------------------------------------------------------------------- file


def test_metadata_stand_before_the_engine(tmp_path: Path) -> None:
    path = tmp_path / "a.engine"
    write_engine(path, METADATA, b"plan")
    data = path.read_bytes()
    length = int.from_bytes(data[:4], "little")
    assert json.loads(data[4 : 4 + length])["names"] == {"0": "a", "1": "b"} and data[4 + length :] == b"plan"
    metadata, plan = read_engine(path, "a.engine")
    assert (metadata["stride"], metadata["bytes"], metadata["sha256"]) == (32, 4, hashlib.sha256(b"plan").hexdigest())
    assert plan == b"plan"


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda data: data[:-1],
    "longer": lambda data: data + b"x",
    "changed": lambda data: data[:-1] + b"x",
    "empty": lambda data: b"",
    "cut in the header": lambda data: data[:40],
    "cut in the length": lambda data: data[:3],
    "without a header": lambda data: b"ftrt" + bytes(1000),
    "header of 4 GB": lambda data: b"\xff\xff\xff\xff" + data[4:],
    "header just too long": lambda data: (MAX_HEADER + 1).to_bytes(4, "little") + b'{"a": 1}'.ljust(MAX_HEADER + 1),
    "header is a list": lambda data: (2).to_bytes(4, "little") + b"[]" + data[-4:],
    "header is nested": lambda data: (100_000).to_bytes(4, "little") + b"[" * 100_000,
    "header is no text": lambda data: (2).to_bytes(4, "little") + b"\xff\xfe" + data[-4:],
    "header without a sum": lambda data: (2).to_bytes(4, "little") + b"{}" + data[-4:],
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_engine_is_one_line_before_tensorrt_sees_it(
    damage: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.engine"
    write_engine(path, METADATA, b"plan")
    path.write_bytes(damage(path.read_bytes()))
    monkeypatch.setattr("models.backends.tensorrt.needed", lambda *names: pytest.fail("TensorRT was imported"))
    monkeypatch.setattr("models.backends.tensorrt.DEVICE", "cpu")
    with pytest.raises(UserError, match=r"metadata of our export|is not the one that was written"):
        load(path)


def test_class_names_that_no_header_holds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="class names take"):
        write_engine(tmp_path / "a.engine", {"names": "x" * MAX_HEADER}, b"plan")
    assert not (tmp_path / "a.engine").exists()


# ------------------------------------------------------------------------------------------------------------- refused


def test_an_engine_needs_a_gpu_and_its_package(
    best: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"--include engine: TensorRT builds on the GPU that runs it. Add --device 0"):
        export.run(weights=str(best), include="engine", device="cpu")
    write_engine(tmp_path / "a.engine", METADATA, b"plan")
    with pytest.raises(UserError, match=r"a.engine: TensorRT needs a CUDA device. Add --device 0"):
        load(tmp_path / "a.engine")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorrt" else real(name))
    with pytest.raises(UserError, match=r"needs the package tensorrt, which is not installed: pip install tensorrt$"):
        FORMATS["engine"].check(ExportOptions())
    monkeypatch.setattr("models.backends.tensorrt.DEVICE", "cpu")
    with pytest.raises(UserError, match=r"a.engine: needs the package tensorrt, .*: pip install tensorrt$"):
        load(tmp_path / "a.engine")
    with pytest.raises(UserError, match="--workspace 0: expected 1 or more"):
        export.run(weights=str(best), include="engine", workspace=0)


def test_a_package_that_cannot_be_imported_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "tensorrt", raising=False)
    with pytest.raises(UserError, match=r"tensorrt is installed but cannot be imported \(libnvinfer.so.10"):
        FORMATS["engine"].check(ExportOptions())


# ---------------------------------------------------------------------------------------------------- built, compared


def exported(source: Path, **changes: Any) -> Path:
    network = load(source).model
    return FORMATS["engine"].export(network, source.with_suffix(""), ExportOptions(**{"size_hw": SIZE, **changes}))


@pytest.mark.parametrize("version", [8, 10, 11])
def test_an_engine_is_fed_and_read_at_its_addresses(version: int, best: Path) -> None:
    needs("onnx", "onnxruntime")
    from simulated_tensorrt import simulated_tensorrt

    with simulated_tensorrt(version) as built:
        network = load(exported(best, batch_size=2, workspace=3))
        images = torch.cat((X, X.flip(3))).to(memory_format=torch.channels_last)
        torch.testing.assert_close(predictions(network, images), predictions(load(best), images), rtol=1e-4, atol=1e-3)
        assert (network.names, network.stride, network.task) == ({i: f"class {i}" for i in range(3)}, 32, "detect")
        assert (network.size_hw, network.batch_size, network.dtype) == (SIZE, 2, torch.float32)
        ((definition, config),) = built
        assert config.limit == ("workspace", 3 << 30) and config.flags == set()
        assert definition.flags == {8: 1 << 0, 10: 1 << 1, 11: 1 << 0}[version]
        with pytest.raises(UserError, match="does not take images of shape"):
            predictions(network, X)
        assert DetectMultiBackend(best.with_suffix(".engine")).engine


@pytest.mark.parametrize("version", [8, 10, 11])
def test_an_engine_in_fp16_comes_from_a_graph_in_fp16(version: int, best: Path) -> None:
    needs("onnx", "onnxruntime")
    from simulated_tensorrt import simulated_tensorrt

    with simulated_tensorrt(version) as built:
        network = load(exported(best, half=True))
        assert network.dtype == torch.float16
        assert built[0][1].flags == ({"FP16"} if version == 8 else set())
        how = ExportOptions(size_hw=SIZE, half=True)
        box, score = export.difference(network, load(best), [X], how)
        bounds = FORMATS["engine"].bounds(how)
        assert 0 < box < bounds.box and score < bounds.score


def test_a_dynamic_engine_takes_larger_batches_in_parts_and_no_larger_images(best: Path) -> None:
    needs("onnx", "onnxruntime")
    from simulated_tensorrt import simulated_tensorrt

    with simulated_tensorrt():
        network = load(exported(best, batch_size=2, dynamic=True))
        assert (network.size_hw, network.batch_size) == (None, None)
        for shape in ((5, 3, 96, 64), (1, 3, 32, 32), (2, 3, 128, 96)):
            images = torch.rand(shape, generator=torch.Generator().manual_seed(1))
            torch.testing.assert_close(
                predictions(network, images), predictions(load(best), images), rtol=1e-4, atol=1e-3
            )
        with pytest.raises(UserError, match="takes images of up to 128x96, not 160x96"):
            predictions(network, torch.rand(1, 3, 160, 96))


@pytest.mark.slow
def test_a_segmentation_engine_keeps_its_masks(tmp_path: Path) -> None:
    needs("onnx", "onnxruntime")
    from simulated_tensorrt import simulated_tensorrt

    source = tiny(tmp_path / "seg.pt", "segment/yolov5n-seg.yaml", width_multiple=0.25)
    with simulated_tensorrt(), torch.no_grad():
        found, wanted = load(exported(source))(X), load(source)(X)
        torch.testing.assert_close(found.predictions, wanted.predictions, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(found.prototypes, wanted.prototypes, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_val_detect_and_the_hub_take_an_engine(dynamic: bool, own_tiny_dataset: TinyDataset, in_tmp: Path) -> None:
    needs("onnx", "onnxruntime")
    from simulated_tensorrt import simulated_tensorrt

    source = tiny(in_tmp / "best.pt", nc=len(own_tiny_dataset.names))
    same = {"data": str(own_tiny_dataset.yaml), "imgsz": 64, "workers": 0, "noplots": True, "project": str(in_tmp)}
    same |= {"device": "cpu", "batch_size": 3}
    image = str(own_tiny_dataset.val[0])
    with simulated_tensorrt():
        file = str(exported(source, size_hw=(64, 64), dynamic=dynamic, batch_size=2))
        assert val.run(weights=file, **same)[0][3] == pytest.approx(
            val.run(weights=str(source), **same)[0][3], abs=0.02
        )
        detect.run(weights=file, source=image, imgsz=64, project=str(in_tmp), name="found", device="cpu")
        assert list((in_tmp / "found").iterdir())
        found, wanted = (hubconf.custom(name, device="cpu", _verbose=False) for name in (file, str(source)))
        found.conf = wanted.conf = 1e-4
        scores = [model(image, size=64).xyxy[0][:5, 4] for model in (found, wanted)]  # boxes of equal scores swap
        assert len(scores[0]) == 5
        torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-6)


def test_what_tensorrt_cannot_read_or_build_or_load_is_one_line(best: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("onnx", "onnxruntime")
    import simulated_tensorrt

    with simulated_tensorrt.simulated_tensorrt():
        file = exported(best)
        monkeypatch.setattr(simulated_tensorrt.Engine, "create_execution_context", lambda self: None)
        with pytest.raises(UserError, match=r"cannot load it on this GPU; it was built by TensorRT 10.0 on simulated"):
            load(file)
        monkeypatch.setattr(simulated_tensorrt.Builder, "enough_memory", False)
        with pytest.raises(UserError, match=r"could not build the engine.*--workspace 4 allows that many GiB"):
            exported(best)
        monkeypatch.setattr(simulated_tensorrt.Builder, "readable", False)
        with pytest.raises(UserError, match=r"cannot read our ONNX graph \(an operator it does not have\)"):
            exported(best)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"half": True}, {"dynamic": True}], ids=["fp32", "fp16", "dynamic"])
def test_tensorrt_itself_computes_what_the_checkpoint_computes(
    options: dict[str, bool], best: Path, said: list[str]
) -> None:
    pytest.importorskip("tensorrt", reason="tensorrt is not installed: pip install -e '.[tensorrt]'")
    if not torch.cuda.is_available():
        pytest.skip("TensorRT needs a CUDA device")
    (file,) = export.run(weights=str(best), include="engine", imgsz=SIZE, device="0", **options)  # or raises Mismatch
    assert load(file, "cuda:0").names[2] == "class 2" and any("largest difference" in line for line in said)
