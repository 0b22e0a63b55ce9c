"""Exported files compute what their checkpoint computes, say what they are, and are refused with one line where not."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import detect
import export
import val
from models import graph as graphs
from models.backends import FORMATS, ExportOptions, load
from models.backends.base import Bounds
from models.backends.onnx import as_predictions, with_suppression
from models.checkpoints.files import save
from models.gates.insert import Insertion, insert
from models.yolo import build_model
from tests.conftest import TinyDataset
from utils.config import UserError
from utils.nms import non_max_suppression

TINY = {"width_multiple": 0.125, "depth_multiple": 0.33}
PACKAGES = {"torchscript": "torch", "onnx": "onnxruntime", "openvino": "openvino", "yolov5": "torch"}
X = torch.rand(1, 3, 96, 64, generator=torch.Generator().manual_seed(0))


def needs(*names: str) -> None:
    for name in names:
        pytest.importorskip(name, reason=f"{name} is not installed: pip install -e '.[dev]'")


def tiny(path: Path, cfg: Any = "yolov5n.yaml", nc: int = 3, **changes: Any) -> Path:
    """A checkpoint of a small network, every tensor moved away from where it starts."""
    model = build_model({**graphs.read(cfg).yaml, **TINY, **changes}, nc=nc, seed=1)
    generator = torch.Generator().manual_seed(2)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.mul_(1 + 0.2 * torch.rand(tensor.shape, generator=generator))
    names = {i: f"class {i}" for i in range(nc)}
    return save(path, {"model": model.state_dict(), "yaml": model.yaml, "names": names, "stride": model.stride})


@pytest.fixture
def best(tmp_path: Path) -> Path:
    return tiny(tmp_path / "best.pt")


@torch.no_grad()
def predictions(network: Any, x: Tensor = X) -> Tensor:
    return network(x).predictions


# ------------------------------------------------------------------------------------------------------ each format


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("include", ["torchscript", "onnx", "openvino"])
def test_a_file_computes_what_its_checkpoint_computes(include: str, dynamic: bool, best: Path) -> None:
    needs(PACKAGES[include])
    (file,) = export.run(weights=str(best), include=[include], imgsz=[96, 64], dynamic=dynamic)
    network, reference = load(file), load(best)
    torch.testing.assert_close(predictions(network), predictions(reference), rtol=1e-4, atol=1e-3)
    assert network.names == {0: "class 0", 1: "class 1", 2: "class 2"} and network.stride == 32
    assert (network.task, network.num_masks) == ("detect", 0)
    assert (network.size_hw, network.batch_size) == ((None, None) if dynamic else ((96, 64), 1))
    if dynamic:
        other = torch.rand(3, 3, 32, 128)
        torch.testing.assert_close(predictions(network, other), predictions(reference, other), rtol=1e-4, atol=1e-3)


def test_weights_found_by_name_are_exported_into_the_working_directory(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = in_tmp / "shared"
    shared.mkdir()
    tiny(shared / "known.pt")
    monkeypatch.setenv("YOLOV5_WEIGHTS_DIR", str(shared))
    assert export.run(weights="known.pt", imgsz=64) == ["known.torchscript"]
    assert [file.name for file in shared.iterdir()] == ["known.pt"] and (in_tmp / "known.torchscript").is_file()


def test_the_yolov5_file_is_a_checkpoint_like_any_other(best: Path) -> None:
    (file,) = export.run(weights=str(best), include=["yolov5"], imgsz=64)
    assert Path(file).name == "best-yolov5.pt"
    assert (predictions(load(file)) - predictions(load(best))).abs().max() < 1
    assert torch.load(file, weights_only=False)["ema"] is None


def test_an_onnx_file_says_what_yolov5_reads_from_it(best: Path) -> None:
    needs("onnx", "onnxruntime", "onnxslim")
    import onnx

    (file,) = export.run(weights=str(best), include=["onnx"], imgsz=64, simplify=True, batch_size=2)
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["names"] == "{0: 'class 0', 1: 'class 1', 2: 'class 2'}" and metadata["stride"] == "32"
    assert [graph_input.name for graph_input in model.graph.input] == ["images"]
    assert [output.name for output in model.graph.output] == ["output0"]
    assert load(file).batch_size == 2


def test_a_torchscript_file_says_what_yolov5_reads_from_it(best: Path) -> None:
    (file,) = export.run(weights=str(best), include=["torchscript"], imgsz=[96, 64])
    extra = {"config.txt": ""}
    torch.jit.load(file, _extra_files=extra)
    stated = json.loads(extra["config.txt"])
    assert stated["shape"] == [1, 3, 96, 64] and stated["stride"] == 32 and stated["names"]["2"] == "class 2"


IDENTITY = """<ir_version: 8, opset_import: ["": 17]>
rows (float[batch, anchors, row] images) => (float[batch, anchors, row] output0) { output0 = Identity(images) }"""


@pytest.mark.parametrize("most", [300, 20])
@pytest.mark.parametrize("seed", range(3))
def test_final_detections_are_those_of_our_own_suppression(seed: int, most: int) -> None:
    needs("onnx", "onnxruntime")
    import onnx
    import onnxruntime

    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(2, 200, 5 + 3, generator=generator)
    rows[..., :2] *= 100
    rows[..., 2:4] = 20 + 40 * rows[..., 2:4]
    rows[1, :, 4] *= 0.5 * seed  # an image without any where it is 0
    options = ExportOptions(nms=True, conf_thres=0.3, iou_thres=0.5, topk_all=most)
    model = with_suppression(onnx, onnx.parser.parse_model(IDENTITY), options)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    detections = torch.from_numpy(session.run(None, {"images": rows.numpy()})[0])
    limits: dict[str, Any] = {"conf_thres": 0.3, "iou_thres": 0.5, "multi_label": True, "max_det": most}
    wanted = non_max_suppression(rows, **limits)
    again = non_max_suppression(as_predictions(detections, 3), **limits)
    assert detections.shape == (2, most, 6) and len(wanted[0]) >= min(most, 30)
    for image, final, same in zip(detections, wanted, again, strict=True):
        assert not image[len(final) :].any()
        torch.testing.assert_close(image[: len(final)], final)
        torch.testing.assert_close(same, final)


def test_a_file_with_suppression_gives_final_detections(best: Path, said: list[str]) -> None:
    needs("onnx", "onnxruntime")
    (file,) = export.run(weights=str(best), include="onnx", imgsz=[96, 64], nms=True, topk_all=50, conf_thres=1e-5)
    network = load(file)
    assert network.run(X)[0].shape == (1, 50, 3 + 5) and (network.run(X)[0][..., 4] > 0).all()
    assert any("gives final detections: confidence 1e-05, IoU 0.45, most 50" in line for line in said)


@pytest.mark.slow
def test_a_segmentation_network_keeps_its_masks(tmp_path: Path) -> None:
    source = tiny(tmp_path / "seg.pt", "segment/yolov5n-seg.yaml", width_multiple=0.25)
    (file,) = export.run(weights=str(source), include="torchscript", imgsz=[96, 64])
    network, reference = load(file), load(source)
    assert (network.task, network.num_masks) == ("segment", 32)
    with torch.no_grad():
        found, wanted = network(X), reference(X)
    torch.testing.assert_close(found.predictions, wanted.predictions, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.prototypes, wanted.prototypes, rtol=1e-4, atol=1e-3)
    with pytest.raises(UserError, match="--nms: not for segmentation"):
        export.run(weights=str(source), include="onnx", nms=True)


@pytest.mark.slow
@pytest.mark.parametrize("gate", graphs.gates())
def test_every_gate_is_exported_for_one_size_and_for_any(gate: str, tmp_path: Path) -> None:
    needs("onnx", "onnxruntime", "openvino")
    cfg = yaml.safe_load(insert("yolov5n.yaml", [Insertion(gate, (), "after", "9")]))
    source = tiny(tmp_path / "gate.pt", cfg, width_multiple=0.25)
    reference = load(source)
    for dynamic in (False, True):
        options = ExportOptions(size_hw=(96, 64), dynamic=dynamic, source=source)
        for include in ("torchscript", "onnx", "openvino"):
            network = load(FORMATS[include].export(reference.model, tmp_path / "gate", options))
            for x in (X, torch.rand(2, 3, 64, 128)) if dynamic else (X,):
                torch.testing.assert_close(
                    predictions(network, x), predictions(reference, x), rtol=1e-3, atol=5e-3, msg=f"{include} {dynamic}"
                )


@pytest.mark.slow
def test_int8_and_fp16_stay_within_their_bounds(own_tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    needs("openvino", "nncf")
    best = tiny(tmp_path / "best.pt", nc=2)
    same = {"weights": str(best), "include": "openvino", "imgsz": 64}
    (half,) = export.run(**same, half=True)
    (int8,) = export.run(**same, int8=True, data=str(own_tiny_dataset.yaml))
    assert int8.endswith("best_int8_openvino_model")
    assert export.size_mb(Path(int8)) < export.size_mb(Path(half)) * 0.9
    assert load(int8).size_hw == (64, 64)


# ------------------------------------------------------------------------------------------------------ used, compared


@pytest.mark.slow
@pytest.mark.parametrize("include", ["torchscript", "onnx", "openvino"])
def test_val_and_detect_take_exported_files(include: str, own_tiny_dataset: TinyDataset, in_tmp: Path) -> None:
    needs(PACKAGES[include])
    source = tiny(in_tmp / "best.pt", nc=len(own_tiny_dataset.names))
    (file,) = export.run(weights=str(source), include=include, imgsz=64, data=str(own_tiny_dataset.yaml))
    same = {"data": str(own_tiny_dataset.yaml), "imgsz": 64, "workers": 0, "noplots": True, "project": str(in_tmp)}
    assert val.run(weights=file, **same)[0][3] == pytest.approx(val.run(weights=str(source), **same)[0][3], abs=0.02)
    images = str(own_tiny_dataset.root / "images")
    detect.run(weights=file, source=str(own_tiny_dataset.val[0]), imgsz=64, project=str(in_tmp), name="found")
    assert list((in_tmp / "found").iterdir()), images


@pytest.mark.slow
def test_a_file_that_differs_too_much_ends_with_status_1(
    best: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setattr(FORMATS["torchscript"], "bounds", classmethod(lambda cls, options: Bounds(-1, 1, 1)))
    with pytest.raises(
        export.Mismatch, match=r"best.torchscript differs from its checkpoint by .* pixels, more than -1"
    ):
        export.run(weights=str(best), imgsz=64)
    with pytest.raises(SystemExit) as status:
        export.main(["--weights", str(best), "--imgsz", "64"])
    assert status.value.code == 1 and any("do not use it" in line for line in said)


def test_another_networks_file_is_noticed(best: Path, tmp_path: Path) -> None:
    other = tiny(tmp_path / "other.pt", width_multiple=0.25)
    how = ExportOptions(size_hw=(96, 64))
    box, score = export.difference(load(other), load(best), [X], how)
    bounds = FORMATS["openvino"].bounds(ExportOptions(half=True))
    assert box > bounds.box or score > bounds.score
    assert export.difference(load(best), load(best), [X], how) == (0, 0)


@pytest.mark.slow
def test_differences_and_usage_are_said(tmp_path: Path, said: list[str], own_tiny_dataset: TinyDataset) -> None:
    with pytest.raises(UserError, match="names 2 classes, but the network knows 3"):
        export.run(weights=str(tiny(tmp_path / "three.pt")), imgsz=64, data=str(own_tiny_dataset.yaml))
    assert not (tmp_path / "three.torchscript").exists()
    export.run(weights=str(tiny(tmp_path / "two.pt", nc=2)), imgsz=64, data=str(own_tiny_dataset.yaml))
    text = "\n".join(said)
    for part in (
        "largest difference on",
        "pixels (at most 0.05)",
        "mAP50-95",
        "python detect.py --weights",
        "torch.hub",
    ):
        assert part in text


# ----------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("include", sorted(export.INSTEAD))
def test_formats_that_are_not_offered_say_what_to_use(include: str) -> None:
    with pytest.raises(UserError, match=f"--include {include}: not offered. Instead export"):
        export.run(include=include)


@pytest.mark.parametrize(
    "options, line",
    [
        ({"include": "onyx"}, "unknown format; expected torchscript, onnx, openvino, engine, coreml, yolov5"),
        ({"include": "torchscript", "nms": True}, "--nms belongs to onnx"),
        ({"include": "onnx", "int8": True}, "--int8 belongs to openvino"),
        ({"include": "openvino", "int8": True}, "Name the dataset with --data"),
        ({"include": "onnx", "half": True}, "--half: .*CUDA"),
        ({"keras": True}, "--keras: not offered"),
        ({"batch_size": 0}, "--batch-size 0: expected 1 or more"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        export.run(**options)


@pytest.mark.parametrize("package, options", [("onnxruntime", {}), ("onnxslim", {"simplify": True}), ("onnx", {})])
def test_a_missing_package_is_one_line_with_the_command(
    package: str, options: dict[str, Any], best: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_in_order = ("onnx", "onnxruntime", "onnxslim")
    needs(*asked_in_order[: asked_in_order.index(package)])
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else real(name))
    with pytest.raises(UserError, match=f"needs the package {package}, .*: pip install {package}$"):
        export.run(weights=str(best), include="onnx", **options)
    assert not best.with_suffix(".onnx").exists()


@pytest.mark.parametrize("name", ["a.mlmodel", "a.tflite", "a.jpg"])
def test_files_that_cannot_be_run_are_told_from_those_that_can(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(
        UserError, match=r"expected \.pt, \.torchscript, \.onnx, _openvino_model, \.engine, \.mlpackage"
    ):
        load(tmp_path / name)


@pytest.mark.parametrize("name", ["a.torchscript", "a.onnx", "a_openvino_model"])
def test_files_that_are_missing_or_damaged_are_one_line(name: str, tmp_path: Path) -> None:
    needs("onnxruntime", "openvino")
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / name)
    if name.endswith("model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.xml").write_text("<net")
    else:
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(UserError, match="Export it again"):
        load(tmp_path / name)


def test_an_ensemble_is_made_of_checkpoints(best: Path) -> None:
    (file,) = export.run(weights=str(best), imgsz=64)
    with pytest.raises(UserError, match="an ensemble is made of"):
        load([best, file])
    with pytest.raises(UserError, match="--augment needs"):
        load(file)(X, augment=True)


def test_yolov5s_wrapper_takes_every_format(best: Path) -> None:
    needs("onnx", "onnxruntime")
    from models.common import DetectMultiBackend

    (file,) = export.run(weights=str(best), include="onnx", imgsz=[96, 64])
    with torch.no_grad():
        ours, theirs = DetectMultiBackend(best), DetectMultiBackend(file, torch.device("cpu"), False, None, True)
        assert (ours.pt, ours.onnx, theirs.pt, theirs.onnx) == (True, False, False, True)
        assert ours.names == theirs.names and ours.stride == theirs.stride == 32 and not theirs.fp16
        assert len(ours(X)[1]) == 3
        torch.testing.assert_close(theirs(X), ours(X)[0], rtol=1e-4, atol=1e-3)
    theirs.warmup((1, 3, 96, 64))


def test_an_onnx_file_without_metadata_numbers_its_classes(best: Path) -> None:
    needs("onnx", "onnxruntime")
    import onnx

    (file,) = export.run(weights=str(best), include="onnx", imgsz=[96, 64])
    model = onnx.load(file)
    del model.metadata_props[:]
    onnx.save(model, file)
    assert load(file).names == {0: "class0", 1: "class1", 2: "class2"}
    onnx.helper.set_model_props(model, {"names": "__import__('os').abort()", "stride": "32"})
    onnx.save(model, file)
    with pytest.raises(UserError, match="class names in its metadata cannot be read"):
        load(file)
