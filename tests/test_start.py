"""A neutral gate changes nothing: its constant is taken out of whatever reads it, or the report says why not."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from models.checkpoints.files import read, save
from models.gates.start import absorbing, gates_in, start_gate_
from models.gates.transfer import Report, output_difference, run, start_network, transfer
from models.yolo import DetectionModel, build_model
from utils.config import ROOT, UserError

ANCHORS = [[10, 13, 16, 30]]
# what reads the gate, as rows after it; the head reads the last one
EXACT: dict[str, list[list[Any]]] = {
    "Conv": [[-1, 1, "Conv", [32, 3, 1]]],
    "grouped Conv": [[-1, 1, "Conv", [32, 3, 1, None, 4]]],
    "chained Conv": [[-1, 2, "Conv", [16, 3, 1]]],
    "DWConv": [[-1, 1, "DWConv", [32, 3, 1]]],
    "C3 with shortcut": [[-1, 3, "C3", [16]]],
    "C3TR": [[-1, 1, "C3TR", [64]]],
    "C3Ghost": [[-1, 1, "C3Ghost", [32]]],
    "C3SPP": [[-1, 1, "C3SPP", [32]]],
    "C3x": [[-1, 1, "C3x", [32]]],
    "BottleneckCSP": [[-1, 1, "BottleneckCSP", [32]]],
    "Bottleneck of other channels": [[-1, 1, "Bottleneck", [32]]],
    "Bottleneck without shortcut": [[-1, 1, "Bottleneck", [16, False]]],
    "SPP": [[-1, 1, "SPP", [32]]],
    "SPPF": [[-1, 1, "SPPF", [32]]],
    "Focus": [[-1, 1, "Focus", [32, 3]]],
    "GhostConv": [[-1, 1, "GhostConv", [32]]],
    "CrossConv": [[-1, 1, "CrossConv", [32]]],
    "MixConv2d": [[-1, 1, "MixConv2d", [32, [1, 3]]]],
    "strided GhostBottleneck": [[-1, 1, "GhostBottleneck", [32, 3, 2]]],
    "nn.ConvTranspose2d": [[-1, 1, "nn.ConvTranspose2d", [32, 2, 2]]],
    "DWConvTranspose2d": [[-1, 1, "DWConvTranspose2d", [32, 2, 2]]],
    "Concat of the gate and what it reads": [[[-1, 1], 1, "Concat", [1]], [-1, 1, "Conv", [32, 1]]],
    "Concat that reads the gate twice": [[[-1, 1, -1], 1, "Concat", [1]], [-1, 1, "Conv", [32, 1]]],
    "Upsample": [[-1, 1, "nn.Upsample", [None, 2, "nearest"]], [-1, 1, "Conv", [32, 1]]],
    "pools": [[-1, 2, "nn.MaxPool2d", [3, 1, 1]], [-1, 1, "Conv", [32, 1]]],
    "Contract": [[-1, 1, "Contract", [2]], [-1, 1, "Conv", [32, 1]]],
    "Expand": [[-1, 1, "Expand", [2]], [-1, 1, "Conv", [32, 1]]],
    "two readers": [[-1, 1, "Conv", [32, 1]], [2, 1, "C3", [32]], [[-1, 3], 1, "Concat", [1]]],
    "Detect": [],
}
INEXACT: dict[str, tuple[list[list[Any]], str]] = {
    "Bottleneck with shortcut": ([[-1, 1, "Bottleneck", [16]]], "adds its input"),
    "CrossConv with shortcut": ([[-1, 1, "CrossConv", [16, 3, 1, 1, 1.0, True]]], "adds its input"),
    "unstrided GhostBottleneck": ([[-1, 1, "GhostBottleneck", [16]]], "adds its input"),
    "another gate": ([[-1, 1, "ECA", [16]]], "what a gate does depends on the size of its input"),
    "BatchNorm": ([[-1, 1, "nn.BatchNorm2d", [16]]], "first operation on the input is not a convolution"),
    "an activation": ([[-1, 1, "nn.SiLU", []]], "first operation on the input is not a convolution"),
    "a Concat and past it": ([[[-1, 1], 1, "Concat", [1]], [-1, 1, "nn.SiLU", []]], "4 nn.SiLU"),
}


def network(rows: list[list[Any]], gate: list[Any] | None) -> dict[str, Any]:
    """Two convolutions, the gate (or nothing) as row 2, `rows` written for the network with the gate, and Detect."""
    backbone = [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [16, 3, 2]], [-1, 1, "SE", [16, 4]], *copy.deepcopy(rows)]
    head = [[[len(backbone) - 1], 1, "Detect", ["nc", "anchors"]]]
    if gate is not None:
        backbone[2] = gate
    else:
        del backbone[2]
        for row in (*backbone[2:], *head):
            old = row[0] if isinstance(row[0], list) else [row[0]]
            new = [f - 1 if f >= 2 else f for f in old]
            row[0] = new if isinstance(row[0], list) else new[0]
    return {
        "nc": 3,
        "depth_multiple": 1.0,
        "width_multiple": 1.0,
        "anchors": ANCHORS,
        "backbone": backbone,
        "head": head,
    }


def plain_network(rows: list[list[Any]], path: Path) -> tuple[DetectionModel, Any]:
    torch.manual_seed(0)
    model = DetectionModel(network(rows, None))
    for part in model.modules():  # statistics of a trained network
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    content = {"model": model.state_dict(), "yaml": model.yaml, "names": model.names, "stride": model.stride}
    return model, read(save(path, content))


def raw(model: DetectionModel, x: torch.Tensor, *, training: bool) -> torch.Tensor:
    """The head's raw outputs in either mode, flat."""
    again = copy.deepcopy(model).to(x.dtype).train(training)
    with torch.no_grad():
        out = again(x)
    return torch.cat([level.flatten().float() for level in (out if training else out[1])])


@pytest.mark.parametrize("reader", EXACT)
def test_the_constant_of_a_neutral_gate_is_absorbed_without_a_trace(reader: str, tmp_path: Path) -> None:
    plain, checkpoint = plain_network(EXACT[reader], tmp_path / "plain.pt")
    gated = DetectionModel(network(EXACT[reader], [-1, 1, "SE", [16, 4]]))
    report = transfer(gated, checkpoint, gate="absorbed")
    row = next(row for row in report.rows if row.new == 2)
    assert row.why.startswith("neutral: its constant 0.5 is absorbed by") and report.placed == report.stored
    x = torch.rand(2, 3, 64, 64)
    for dtype in (torch.float32, torch.bfloat16):
        for training in (False, True):
            assert torch.equal(raw(plain, x.to(dtype), training=training), raw(gated, x.to(dtype), training=training))
    assert output_difference(gated, checkpoint, gated.names) == 0


@pytest.mark.parametrize("reader", INEXACT)
def test_a_reader_that_cannot_absorb_is_named_and_nothing_is_changed(reader: str, tmp_path: Path) -> None:
    rows, why = INEXACT[reader]
    _, checkpoint = plain_network([row for row in rows if row[2] != "ECA"], tmp_path / "plain.pt")
    gated = DetectionModel(network(rows, [-1, 1, "SE", [16, 4]]))
    before = gated.model[2].l2.weight.clone()
    edits, obstacle = absorbing(gated, 2, 0.5)
    assert not edits and why in obstacle
    said = start_gate_(gated, 2, "absorbed")
    assert said.startswith("not neutral") and why in said and "--gate gain" in said
    assert torch.equal(gated.model[2].l2.weight, before)
    if reader != "another gate":
        transfer(gated, checkpoint, gate="gain")
        assert output_difference(gated, checkpoint, gated.names) == 0


@pytest.mark.parametrize("gate", [["SE", [16, 4]], ["ECA", [16]], ["CBAM", [16, 4]], ["SCSE", [16]]])
def test_a_neutral_gate_by_gain_is_written_into_the_yaml(gate: list[Any], tmp_path: Path) -> None:
    plain, checkpoint = plain_network(EXACT["Conv"], tmp_path / "plain.pt")
    gated = DetectionModel(network(EXACT["Conv"], [-1, 1, *gate]))
    transfer(gated, checkpoint, gate="gain")
    (part,) = gates_in(gated.model[2])
    assert part.neutral is not None and part.gain == 1 / part.neutral
    again = DetectionModel(gated.yaml)
    again.load_state_dict(gated.state_dict())
    x = torch.rand(1, 3, 64, 64)
    for training in (False, True):
        assert torch.equal(raw(plain, x, training=training), raw(again, x, training=training))
    assert gated.graph.yaml == gated.yaml == again.yaml and gated.graph.rows[2].args == again.graph.rows[2].args


def test_a_gain_already_in_the_yaml_leaves_nothing_to_absorb(tmp_path: Path) -> None:
    _, checkpoint = plain_network(EXACT["BottleneckCSP"], tmp_path / "plain.pt")
    gated = DetectionModel(network(EXACT["BottleneckCSP"], [-1, 1, "SE", [16, 4, 2.0]]))
    report = transfer(gated, checkpoint, gate="absorbed")
    assert next(row for row in report.rows if row.new == 2).why == "neutral by itself"
    assert output_difference(gated, checkpoint, gated.names) == 0


def test_a_gate_without_weights_says_that_it_cannot_be_neutral(tmp_path: Path, said: list[str]) -> None:
    _, checkpoint = plain_network(EXACT["Conv"], tmp_path / "plain.pt")
    gated = DetectionModel(network(EXACT["Conv"], [-1, 1, "SimAM", [16]]))
    report = transfer(gated, checkpoint)
    assert "no weights make SimAM a constant" in next(row for row in report.rows if row.new == 2).why


def test_a_random_gate_is_left_as_built(tmp_path: Path) -> None:
    _, checkpoint = plain_network(EXACT["Conv"], tmp_path / "plain.pt")
    gated = DetectionModel(network(EXACT["Conv"], [-1, 1, "SE", [16, 4]]))
    before = gated.model[2].l2.weight.clone()
    transfer(gated, checkpoint, gate="random")
    assert torch.equal(gated.model[2].l2.weight, before)
    difference = output_difference(gated, checkpoint, gated.names)
    assert difference is not None and difference > 0


def test_gates_one_behind_the_other_are_each_absorbed(tmp_path: Path) -> None:
    """SE before and after a pool that lies between convolutions: both constants end in the same weights."""
    rows = [[-1, 1, "SPPF", [16, 5]], [-1, 1, "Conv", [32, 1]]]
    plain, checkpoint = plain_network(rows, tmp_path / "plain.pt")
    gated_rows = [rows[0], [-1, 1, "CBAM", [16, 4]], rows[1]]
    gated = DetectionModel(network(gated_rows, [-1, 1, "SE", [16, 4]]))
    report = transfer(gated, checkpoint, gate="absorbed")
    assert report.gates == (2, 4)
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(raw(plain, x, training=False), raw(gated, x, training=False))


def test_a_gate_that_came_with_the_checkpoint_is_copied_and_not_neutralised(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = DetectionModel("yolov5n-se-last.yaml", nc=3)
    content = {"model": first.state_dict(), "yaml": first.yaml, "names": first.names, "stride": first.stride}
    checkpoint = read(save(tmp_path / "gated.pt", content))
    second = DetectionModel("yolov5n-se-last.yaml", nc=3)
    report = transfer(second, checkpoint, gate="absorbed")
    assert report.gates == () and report.copied == report.total
    assert torch.equal(second.model[10].l2.weight, first.model[10].l2.weight)


# --------------------------------------------------------------------------------------------------- what users ask for


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    return ROOT / "yolov5n-shapes.pt"


def start(cfg: str, weights: Path, **settings: Any) -> tuple[DetectionModel, Report]:
    model, report = start_network(cfg, weights, None, **settings)
    assert report is not None
    return model, report


def test_too_little_transferred_is_an_error(shapes: Path) -> None:
    with pytest.raises(UserError, match=r"--min-transfer 95: only \d+\.\d% of the parameters come from .*shapes.pt"):
        start("yolov5n-se-last.yaml", shapes, mode="index", min_transfer=95)
    assert start("yolov5n-se-last.yaml", shapes, min_transfer=95)[1].percent_parameters > 99


def test_a_share_that_no_file_can_reach_is_refused(shapes: Path) -> None:
    for share in (-1, 101):
        with pytest.raises(UserError, match="expected a percentage, 0 to 100"):
            start("yolov5n.yaml", shapes, min_transfer=share)


def test_nameless_tensors_of_another_network_are_told_of(shapes: Path, tmp_path: Path, said: list[str]) -> None:
    torch.save(read(shapes).tensors, tmp_path / "bare.pt")
    checkpoint = read(tmp_path / "bare.pt")
    own = transfer(DetectionModel("yolov5n.yaml", nc=6), checkpoint)
    assert own.copied == own.total == 349 and not own.warnings
    (warning,) = transfer(DetectionModel("yolov5n-se-last.yaml", nc=6), checkpoint).warnings
    assert "does not say which network it is of, and 151 of its 349 tensors do not fit" in warning


def test_a_neutral_start_needs_aligned_rows(shapes: Path) -> None:
    with pytest.raises(UserError, match="--gate absorbed needs --transfer aligned"):
        start("yolov5n-se-last.yaml", shapes, mode="index", gate="absorbed")


def test_index_matching_leaves_the_gate_as_usual_code_does(shapes: Path) -> None:
    model, report = start("yolov5n-se-last.yaml", shapes, mode="index")
    assert bool(model.model[10].l2.weight.any()) and report.difference is None


def test_no_cfg_is_the_files_own_network(shapes: Path) -> None:
    model, report = start("", shapes)
    assert report.copied == report.total == 349 and len(model.graph.rows) == 25 and model.names[0] == "disc"


def test_the_command_writes_a_checkpoint_that_is_read_like_any_other(shapes: Path, in_tmp: Path) -> None:
    options = {
        "weights": str(shapes),
        "cfg": "yolov5n-se-presppf.yaml",
        "out": "a.pt",
        "data": "",
        "transfer": "aligned",
    }
    arguments = argparse.Namespace(**options, gate="absorbed", min_transfer=99, exist_ok=False)
    run(arguments)
    checkpoint = read("a.pt")
    assert checkpoint.names == read(shapes).names and checkpoint.tensors["model.9.l2.weight"].abs().max() == 0
    model = build_model(checkpoint.yaml or "")
    model.load_state_dict(checkpoint.tensors)
    assert output_difference(model, read(shapes), checkpoint.names) == 0
    with pytest.raises(UserError, match="exists already"):
        run(arguments)


def test_the_table_says_by_how_much_outputs_differ_whatever_was_matched(
    shapes: Path, in_tmp: Path, said: list[str]
) -> None:
    options = {"weights": str(shapes), "data": "", "gate": None, "min_transfer": 0, "exist_ok": True, "out": "a.pt"}
    for cfg, mode, wanted in (
        ("yolov5n.yaml", "aligned", "difference 0"),
        ("yolov5n-se-last.yaml", "index", "difference"),
    ):
        said.clear()
        run(argparse.Namespace(**options, cfg=cfg, transfer=mode))
        assert any(f"outputs on a probe image: largest {wanted}" in line for line in said), said


@pytest.mark.parametrize("cfg", ["yolov5n-se-last.yaml", "yolov5n-se-presppf.yaml"])
@pytest.mark.parametrize("gate", ["absorbed", "gain"])
def test_trained_weights_give_the_same_bits_fused_and_in_mixed_precision(shapes: Path, cfg: str, gate: str) -> None:
    plain, gated = start("", shapes)[0].eval(), start(cfg, shapes, gate=gate)[0].eval()
    x = torch.rand(2, 3, 128, 128).contiguous(memory_format=torch.channels_last)
    for part in (plain, gated):
        part.to(memory_format=torch.channels_last)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(plain(x)[0], gated(x)[0])
        assert torch.equal(plain.fuse()(x)[0], gated.fuse()(x)[0])
        assert torch.equal(plain.half()(x.half())[0], gated.half()(x.half())[0])
