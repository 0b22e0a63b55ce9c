"""Gates inside blocks: rows such as C3SE, where --insert puts them, and that a neutral one changes not one bit."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from test_insert import error, options
from test_pasted import CHANNEL, DOWN, OWN, TWO_LINES, Paste, paste  # noqa: F401  (a fixture)
from torch import nn

from models import graph as graphs
from models import inside
from models.checkpoints.files import Checkpoint, load_model, read, save, strip
from models.checkpoints.upstream import write_yolov5
from models.common import C3, Bottleneck, Gate, Gated
from models.gates.insert import Insertion, insert, parse, run, table, write, write_arguments
from models.gates.inspect import inspect_gates
from models.gates.start import absorbing_inside, gates_in
from models.gates.transfer import output_difference, start_network, transfer
from models.graph import layer_classes
from models.inside import Inner
from models.yolo import DetectionModel, build_model
from utils.config import ROOT, UserError
from utils.images import read_image

SHAPES = ROOT / "yolov5n-shapes.pt"
GATES = sorted(name for name, layer in layer_classes().items() if issubclass(layer, Gate))
NEUTRAL = [name for name in GATES if layer_classes()[name].neutral is not None]  # type: ignore[attr-defined]
# every block with room, as the row that a network is made of, and where gates go in it
BLOCKS: dict[str, tuple[list[Any], tuple[str, ...]]] = {
    "C3": ([-1, 2, "C3", [32]], ("Bottleneck", "C3")),
    "C3 without shortcut": ([-1, 2, "C3", [32, False]], ("Bottleneck", "C3")),
    "C3x": ([-1, 2, "C3x", [32]], ("Bottleneck", "C3")),
    "C3x without shortcut": ([-1, 2, "C3x", [32, False]], ("Bottleneck", "C3")),
    "C3TR": ([-1, 1, "C3TR", [64]], ("C3",)),
    "C3SPP": ([-1, 1, "C3SPP", [32]], ("C3",)),
    "C3SPP in a chain": ([-1, 2, "C3SPP", [32]], ("C3",)),
    "C3Ghost": ([-1, 2, "C3Ghost", [32]], ("Bottleneck", "C3")),
    "BottleneckCSP": ([-1, 2, "BottleneckCSP", [32]], ("Bottleneck", "C3")),
    "BottleneckCSP without shortcut": ([-1, 2, "BottleneckCSP", [32, False]], ("Bottleneck", "C3")),
    "Bottleneck": ([-1, 2, "Bottleneck", [32]], ("Bottleneck",)),
    "Bottleneck without shortcut": ([-1, 2, "Bottleneck", [32, False]], ("Bottleneck",)),
    "CrossConv": ([-1, 1, "CrossConv", [32, 3, 1, 1, 1.0, True]], ("Bottleneck",)),
    "GhostBottleneck": ([-1, 1, "GhostBottleneck", [32, 3, 2]], ("Bottleneck",)),
}
# CI takes two of the sweep over all places of the small sizes; `make exact` takes all of it
SWEEP = [(cfg, gate) for cfg in ("yolov5n.yaml", "yolov5s.yaml") for gate in NEUTRAL]
SWEPT = SWEEP if os.environ.get("EXACT") == "all" else [("yolov5n.yaml", "SE"), ("yolov5s.yaml", "ECA")]
CASES = [(block, place) for block, (_, places) in BLOCKS.items() for place in places]
ADDS = ("C3", "C3x", "C3Ghost", "BottleneckCSP", "Bottleneck", "CrossConv", "GhostBottleneck")  # with a shortcut


def network(row: list[Any], gate: str = "", **mapping: Any) -> dict[str, Any]:
    """Two convolutions, the row, with this gate inside, a convolution and Detect."""
    row = copy.deepcopy(row)
    if gate:
        row[2] += gate
        row[3] += [mapping] if mapping else []
    backbone = [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [32, 3, 2]], row, [-1, 1, "Conv", [32, 3, 2]]]
    return {
        "nc": 3,
        "anchors": [[10, 13, 16, 30]],
        "backbone": backbone,
        "head": [[[3], 1, "Detect", ["nc", "anchors"]]],
    }


def trained(cfg: Any, path: Path, **changes: Any) -> tuple[DetectionModel, Checkpoint]:
    """A network with the statistics of a trained one, and its checkpoint."""
    torch.manual_seed(0)
    model = DetectionModel(cfg, **changes)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d) and part.running_mean is not None and part.running_var is not None:
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 2)
    return model, read(saved(model, path))


def saved(model: DetectionModel, path: Path) -> Path:
    content = {"model": model.state_dict(), "yaml": model.yaml, "names": model.names, "stride": model.stride}
    return save(path, content)


def outputs(model: DetectionModel, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Raw outputs in eval and in train mode, in fp32 and in bf16."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for training in (False, True):
            again = copy.deepcopy(model).to(dtype).train(training)
            with torch.no_grad():
                out = again(x.to(dtype))
            found[f"{dtype} {'train' if training else 'eval'}"] = torch.cat(
                [level.flatten() for level in (out if training else out[1])]
            )
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(values, other[mode]) for mode, values in one.items())


# ---------------------------------------------------------------------------------------------------------------- rows


def test_every_block_and_gate_is_a_rows_module() -> None:
    classes = layer_classes()
    blocks = [name for name, layer in classes.items() if inside.places(layer)]
    assert len(GATES) == 9 and {"C3", "C3x", "C3TR", "C3SPP", "C3Ghost", "BottleneckCSP", "Bottleneck"} <= set(blocks)
    for block in blocks:
        for gate in GATES:
            assert inside.split(block + gate, classes) == (block, gate)
    for name in ("C3", "SE", "C3SPP", "ConvSE", "C3Conv", "SEC3", "C3SESE", "C3TR", None, 3):
        assert inside.split(name, classes) is None


@pytest.mark.parametrize("gate", GATES)
def test_a_row_has_the_gate_in_each_bottleneck_or_before_cv3(gate: str) -> None:
    row = graphs.read(network([-1, 3, "C3", [32]], gate)).rows[2]
    assert (row.module, row.name, row.args, row.repeats) == ("C3", f"C3{gate}", [32], 3)
    assert row.inner == Inner(gate, "Bottleneck", {}, 16)
    layer = build_model(network([-1, 3, "C3", [32]], gate)).model[2]
    assert isinstance(layer, C3) and layer.gate is None
    assert [type(part.gate).__name__ for part in layer.m] == [gate] * 3
    layer = build_model(network([-1, 3, "C3", [32]], gate, inside="C3")).model[2]
    assert type(layer.gate).__name__ == gate and len(gates_in(layer)) == 1


def test_the_gates_arguments_are_named_in_the_rows_mapping() -> None:
    row = [-1, 2, "C3", [32, False]]
    model = build_model(network(row, "SE", r=4, gain=2.0, inside="C3"))
    assert model.model[2].gate.l1.out_features == 4 and model.model[2].gate.gain == 2.0
    assert model.graph.rows[2].args == [32, False] and not model.model[2].m[0].add
    assert build_model(network(row, "CBAM", k=3)).model[2].m[1].gate.conv.kernel_size == (3, 3)
    again = graphs.read(model.yaml)
    assert again.rows == model.graph.rows


def test_the_sum_and_the_join_are_what_the_paper_and_the_docstring_say() -> None:
    torch.manual_seed(0)
    block = Bottleneck(16, 16).eval()
    block.gate = layer_classes()["SE"](16, 16, 4)
    x = torch.rand(2, 16, 8, 8)
    assert torch.equal(block(x), x + block.gate(block.cv2(block.cv1(x))))
    csp = C3(16, 32, 2).eval()
    csp.gate = layer_classes()["SE"](16, 16, 4)
    assert torch.equal(csp(x), csp.cv3(torch.cat((csp.gate(csp.m(csp.cv1(x))), csp.cv2(x)), 1)))


@pytest.mark.parametrize(
    ("module", "mapping", "message"),
    [
        ("C3SEE", None, "names an unknown module 'C3SEE'. Did you mean 'C3SE'?"),
        ("C3SE", "{rr: 4}", "layer 2 C3SE: its gate takes r, gain, inside, found 'rr'. Did you mean 'r'?"),
        ("C3SE", "{inside: m}", "layer 2 C3SE: 'm' is no place inside C3. Write Bottleneck or C3."),
        ("C3SE", "{inside: [1]}", "layer 2 C3SE: '[1]' is no place inside C3. Write Bottleneck or C3."),
        ("C3SE", "{r: 64}", "layer 2 C3SE: a reduction of 64 leaves none of its 16 channels."),
        ("C3SE", "{r: x}", "layer 2 C3SE: a reduction of 'x' leaves none"),
        ("C3SE", "{gain: -1}", "layer 2 C3SE: its gain must be a positive number, found -1."),
        ("C3SE", "{3: 4}", "layer 2 C3SE: its gate takes r, gain, inside, found 3."),
        ("C3ECA", "{k: 4}", "layer 2 C3ECA: inside are 16 channels: ECA with kernel size 4 would change"),
        ("C3", "{r: 4}", "layer 2 C3: {'r': 4} is for a gate inside. Name it with the block, such as C3SE."),
        ("C3TRSE", "{inside: Bottleneck}", "no place inside C3TR: C3TR has no residual branch of maps. Write C3."),
        ("BottleneckSE", "{inside: C3}", "layer 2 BottleneckSE: 'C3' is no place inside Bottleneck. Write Bottleneck."),
        ("C3SE", "{r: 4}, False", "layer 2 C3SE: {'r': 4} stands before the end of its arguments. Write it last."),
        ("C3SE", "True, 1, 1.0e+300", "layer 2 C3SE: cannot be built from its arguments"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_row_is_one_line_with_the_yamls(
    module: str, mapping: str | None, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    args = "[32]" if mapping is None else f"[32, {mapping}]"
    rows = "\n".join(
        ["backbone:", " - [-1, 1, Conv, [16, 3, 2]]", " - [-1, 1, Conv, [32, 3, 2]]", f" - [-1, 2, {module}, {args}]"]
    )
    head = "\nhead:\n - [[2], 1, Detect, [nc, anchors]]\n"
    file.write_text(f"nc: 3\nanchors: [[10, 13, 16, 30]]\n{rows}{head}", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        build_model(file)
    said = str(caught.value)
    assert "mine.yaml:6: layer 2" in said and message in said and "\n" not in said


def test_a_gate_inside_changes_no_other_weight_that_a_seed_draws() -> None:
    plain = build_model("yolov5n.yaml", seed=3).state_dict()
    for spec in ("SE@inside:Bottleneck", "GAM@inside:C3", "ECA@inside:C3:2"):
        gated = build_model(yaml.safe_load(insert("yolov5n.yaml", [parse(spec)])), seed=3)
        ours = gated.state_dict()
        assert all(torch.equal(value, ours[key]) for key, value in plain.items()), spec
        assert all(".gate." in key for key in ours.keys() - plain.keys()), spec
    first, second = (build_model("yolov5n-c3se.yaml", seed=seed).model[2].m[0].gate for seed in (3, 4))
    again = build_model("yolov5n-c3se.yaml", seed=3).model
    assert torch.equal(first.l1.weight, again[2].m[0].gate.l1.weight) and not torch.equal(
        first.l1.weight, second.l1.weight
    )
    assert not torch.equal(again[4].m[0].gate.l1.weight, again[4].m[1].gate.l1.weight)


def test_the_shipped_network_is_what_the_command_prints() -> None:
    shipped = (ROOT / "models/yolov5s-c3se.yaml").read_text(encoding="utf-8")
    assert insert("yolov5s.yaml", [Insertion("SE", (), "inside", "Bottleneck")]) == shipped
    assert [row.name for row in graphs.read("yolov5n-c3se.yaml").rows].count("C3SE") == 8


def test_a_block_that_was_pickled_without_room_for_a_gate_runs() -> None:
    block = Bottleneck(8, 8).eval()
    state = {key: value for key, value in block.__dict__.items() if key not in ("gate", "gate_channels")}
    again = Bottleneck.__new__(Bottleneck)
    again.__setstate__(state)
    x = torch.rand(1, 8, 4, 4)
    assert torch.equal(again(x), block(x))
    block.gate = layer_classes()["SE"](8, 8, 4)
    assert torch.equal(copy.deepcopy(block)(x), block(x)) and "gate" not in copy.deepcopy(block).__dict__


# ----------------------------------------------------------------------------------------------------------- inserting


def inserted(cfg: str | Path, *specs: str) -> dict[int, tuple[str, str]]:
    """Row -> gate and place inside, of the network with these gates."""
    rows = graphs.read(yaml.safe_load(insert(cfg, [parse(spec) for spec in specs]))).rows
    return {row.index: (row.inner.gate, row.inner.place) for row in rows if row.inner}


def rows_with(gate: str, place: str, *rows: int) -> dict[int, tuple[str, str]]:
    return dict.fromkeys(rows, (gate, place))


ALL, BACKBONE, NECK = (2, 4, 6, 8, 13, 17, 20, 23), (2, 4, 6, 8), (13, 17, 20, 23)


@pytest.mark.parametrize(
    ("place", "word", "rows"),
    [
        ("C3", "C3", ALL),
        ("every:C3", "C3", ALL),
        ("Bottleneck", "Bottleneck", ALL),
        ("C3:2", "C3", (4,)),
        ("C3:2/Bottleneck", "Bottleneck", (4,)),
        ("6", "Bottleneck", (6,)),
        ("6/C3", "C3", (6,)),
        ("backbone", "Bottleneck", BACKBONE),
        ("backbone:C3", "C3", BACKBONE),
        ("neck", "Bottleneck", NECK),
        ("every:neck:Bottleneck", "Bottleneck", NECK),
        ("neck/C3", "C3", NECK),
    ],
)
def test_a_place_inside_names_rows_and_where_in_them(place: str, word: str, rows: tuple[int, ...]) -> None:
    assert inserted("yolov5s.yaml", f"SE@inside:{place}") == rows_with("SE", word, *rows)


def test_places_inside_pass_over_rows_without_them() -> None:
    assert inserted("yolov5s-transformer.yaml", "SE@inside:Bottleneck").keys() == {*ALL} - {8}
    assert inserted("yolov5s-transformer.yaml", "SE@inside:backbone")[8] == ("SE", "C3")
    assert inserted("yolov5s-transformer.yaml", "SE@inside:C3TR") == rows_with("SE", "C3", 8)
    assert inserted("yolov5s-ghost.yaml", "SE@inside:C3") == inserted("yolov5s-ghost.yaml", "SE@inside:C3Ghost")
    bare = [row.index for row in graphs.read("yolov3.yaml").rows if row.module == "Bottleneck"]
    assert inserted("yolov3.yaml", "SE@inside:Bottleneck") == rows_with("SE", "Bottleneck", *bare)
    assert inserted("yolov3.yaml", "SE@inside:Bottleneck:2") == rows_with("SE", "Bottleneck", bare[1])


def test_every_means_all_rows_of_a_name_or_of_a_part() -> None:
    for place, rows in (("every:C3", ALL), ("every:backbone:C3", BACKBONE), ("every:neck:C3", NECK)):
        each = [parse(f"SE@after:{row}") for row in rows]
        text = insert("yolov5s.yaml", [parse(f"SE@after:{place}")])
        assert yaml.safe_load(text) == yaml.safe_load(insert("yolov5s.yaml", each))
    assert insert("yolov5s.yaml", [parse("SE@before:every:Concat/2")]).count(" SE, ") == 4
    graph = graphs.read(yaml.safe_load(insert("yolov5s.yaml", [parse("SE@after:every:backbone")])))
    assert [row.module for row in graph.rows[:20:2]] == [row.module for row in graphs.read("yolov5s.yaml").rows[:10]]
    assert [row.module for row in graph.rows].count("SE") == 10


def test_the_text_keeps_all_but_the_rows_module_and_its_mapping(tmp_path: Path) -> None:
    plain = (ROOT / "models/yolov5s.yaml").read_text(encoding="utf-8")
    text = insert("yolov5s.yaml", [parse("SE:8@inside:C3:2")])
    assert re.sub(r"# with .*\n", "", text) == plain.replace("C3, [256]]", "C3SE, [256, {r: 8, inside: C3}]]")
    rows = '[[-1, 1, Conv, [16, 3, 2]], [-1, 2, "C3", [16, ], ], [-1, 1, C3, [16, False , ]]]'
    file = tmp_path / "odd.yaml"
    file.write_text(
        f"nc: 2\nanchors: 3\nbackbone: {rows}\nhead: [[[1, 2], 1, Detect, [nc, anchors]]]\n", encoding="utf-8"
    )
    new = insert(file, [parse("CBAM:2:3@inside:1/C3"), parse("SE:4@inside:2")])
    assert "[-1, 2, C3CBAM, [16, {r: 2, k: 3, inside: C3}, ], ]" in new and "C3SE, [16, False, {r: 4} , ]" in new
    twice = insert("yolov5s-c3se.yaml", [parse("ECA@after:every:C3")])
    assert twice.count("C3SE") == plain.count(" C3,") and twice.count("ECA, [") == 8


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("SE@inside:SPPF", "'SPPF' is no place inside a row. Rows that have room: 2 C3, 4 C3, "),
        ("SE@inside:0", "models/yolov5s.yaml:13: layer 0 Conv: there is no room for a gate inside. Rows that have"),
        ("SE@inside:C3/m", "SE@inside:C3/m: inside a block are /Bottleneck and /C3, found '/m'."),
        ("SE@inside:C3x", "'C3x' is no place inside a row."),
        ("SE@inside:C3:9", "'C3:9' is not one row. Choose from C3:1 (row 2)"),
        ("SE@inside:neck:C3:2", "after 'neck:' comes a module's name alone, such as neck:C3."),
        ("SE@inside:Bottleneck:2", "is a part of other rows. For a gate in each write inside:Bottleneck"),
        ("SE:64@inside:C3", "models/yolov5s.yaml with its gates: layer 2 C3SE: a reduction of 64 leaves none of its"),
        ("SE:1:2.0:3@inside:C3", "SE:1:2.0:3@inside:C3: too many arguments; SE takes r, gain."),
        ("Conv@inside:C3", "Conv may change the channels, so it cannot be inserted"),
        ("SE@after:every:C4", "'every:C4' is no row. Rows there are: Conv, C3, SPPF, nn.Upsample, Concat."),
        ("SE@after:every:neck:SPPF", "'every:neck:SPPF' is no row. Rows there are: Conv, nn.Upsample, Concat, C3."),
        ("SE@after:every:Detect", "'every:Detect' is no row."),
        ("SE@after:C3", "'C3' is not one row. Choose from C3:1 (row 2), "),
        ("SE@after:C3", "or every:C3 for all of them."),
        ("SE@after:neck", "'neck' is many rows. Write every:neck, or every:neck:C3, say."),
        ("SE@at:every:C3", "'at' takes a row from 1 to 24, found 'every:C3'."),
    ],
)  # fmt: skip
def test_a_mistake_about_a_place_is_named_with_its_fix(spec: str, message: str) -> None:
    assert message in error("models/yolov5s.yaml", spec)


def test_a_second_gate_in_a_block_is_refused() -> None:
    assert "layer 6 C3: has SE inside already, and one gate fits" in error(
        "yolov5s.yaml", "SE@inside:C3", "ECA@inside:6"
    )
    assert "layer 2 C3SE: has SE inside already" in error("yolov5s-c3se.yaml", "ECA@inside:C3")


def test_places_inside_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    run(options(list_places=True))
    shown = capsys.readouterr().out.splitlines()
    assert shown == table(graphs.read("yolov5s.yaml"))
    assert shown[3].endswith("/Bottleneck, /C3") and not shown[1].endswith("/C3")
    rows = ", ".join(map(str, ALL))
    assert shown[-2:] == [
        f"inside:C3 (the first path, before cv3): rows {rows}",
        f"inside:Bottleneck (each residual branch, before the addition): rows {rows}",
    ]
    assert shown[-3] == "several rows: after:every:C3, before:every:C3; of a part: after:every:neck:C3"
    assert " C3SE " in table(graphs.read("yolov5s-c3se.yaml"))[3]
    assert not any("inside:" in line for line in table(graphs.read("yolov3-tiny.yaml")))


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_gates_inside_any_rows_leave_all_else_as_it_was(data: st.DataObject) -> None:
    cfg = data.draw(st.sampled_from(["yolov5s.yaml", "yolov5s-ghost.yaml", "yolov5s-transformer.yaml", "yolov3.yaml"]))
    old = graphs.read(cfg)
    room = [(row.index, word) for row in old.rows for word in inside.places(layer_classes().get(row.module))]
    chosen = data.draw(st.lists(st.sampled_from(room), min_size=1, max_size=4, unique_by=lambda pair: pair[0]))
    gates = data.draw(st.lists(st.sampled_from(GATES), min_size=len(chosen), max_size=len(chosen)))
    specs = [f"{gate}@inside:{row}/{word}" for gate, (row, word) in zip(gates, chosen)]
    new = graphs.read(yaml.safe_load(insert(cfg, [parse(spec) for spec in specs])))
    wanted = {row: (gate, word) for gate, (row, word) in zip(gates, chosen)}
    for before, after in zip(old.rows, new.rows, strict=True):
        for name in ("module", "args", "repeats", "inputs", "channels", "stride", "sources", "consumers"):
            assert getattr(before, name) == getattr(after, name)
        assert (after.inner and (after.inner.gate, after.inner.place)) == wanted.get(after.index)


# ----------------------------------------------------------------------------------------------------------- exactness


def check_exact(block: str, place: str, gates: list[str], folder: Path) -> None:
    """A network with a gate in this block, started from one without, computes the same, bit for bit."""
    row = BLOCKS[block][0]
    plain, checkpoint = trained(network(row), folder / "plain.pt")
    x = torch.rand(2, 3, 64, 64)
    before = outputs(plain, x)
    for gate in gates:
        for start in ("gain", "absorbed"):
            model = DetectionModel(network(row, gate, inside=place))
            report = transfer(model, checkpoint, gate=start)
            what, why = f"{block} {place} {gate} {start}", report.rows[2].why
            assert report.placed == report.stored and report.gates == (2,) and not report.warnings, what
            if place == "Bottleneck" and block in ADDS and start == "absorbed" and layer_classes()[gate].neutral != 1:  # type: ignore[attr-defined]
                assert re.match(r"not neutral: 2 \w+ \(its bottlenecks add another map to what the gate gives\)", why)
                assert "use --gate gain" in why
                continue
            assert why.startswith("neutral"), what
            assert same(before, outputs(model, x)), what
            assert output_difference(model, checkpoint, model.names) == 0, what
            assert same(outputs(copy.deepcopy(plain).fuse().float(), x), outputs(model.fuse(), x)), what


@pytest.mark.parametrize(("block", "place"), CASES)
def test_a_neutral_gate_inside_changes_not_one_bit(block: str, place: str, tmp_path: Path) -> None:
    check_exact(block, place, ["SE", "CoordAtt"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("block", "place"), CASES)
def test_any_neutral_gate_inside_changes_not_one_bit(block: str, place: str, tmp_path: Path) -> None:
    check_exact(block, place, NEUTRAL, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("cfg", "gate"), SWEPT)
def test_every_block_of_n_and_s_takes_every_gate_exactly(cfg: str, gate: str, tmp_path: Path) -> None:
    plain, checkpoint = trained(cfg, tmp_path / "plain.pt", nc=4)
    x = torch.rand(2, 3, 64, 64)
    before, neutral = outputs(plain, x), layer_classes()[gate].neutral  # type: ignore[attr-defined]
    for place in (*(f"{row}/{word}" for row in ALL for word in inside.PLACES), *inside.PLACES):
        for start in ("gain", "absorbed"):
            data = yaml.safe_load(insert(cfg, [parse(f"{gate}@inside:{place}")]))
            model = DetectionModel(data, nc=4)
            report = transfer(model, checkpoint, gate=start)
            assert report.placed == report.stored and not report.warnings
            for row in (row for row in report.rows if row.new in report.gates):
                added = start == "absorbed" and row.new in BACKBONE and place.endswith("Bottleneck") and neutral != 1
                assert row.why.startswith("not neutral" if added else "neutral"), (place, start, row.why)
            if all(row.why.startswith("neutral") for row in report.rows if row.new in report.gates):
                assert same(before, outputs(model, x)), (place, start)


def test_a_constant_that_cannot_be_absorbed_is_warned_about_with_the_line(said: list[str]) -> None:
    model, report = start_network("yolov5n-c3se.yaml", SHAPES, None, gate="absorbed")
    assert report is not None and report.difference
    refused = [line for line in said if "not neutral" in line and "its bottlenecks add another map" in line]
    assert len(refused) == 4 and "layer 2 C3SE" in refused[0] and "--gate gain" in refused[0]
    assert bool(model.model[2].m[0].gate.l2.weight.any()), "left as it was built"
    assert not bool(model.model[13].m[0].gate.l2.weight.any())
    edits, obstacle = absorbing_inside(model, 2, 0.5)
    assert not edits and obstacle


def test_a_gate_without_a_neutral_state_says_so_though_it_has_no_weights(said: list[str]) -> None:
    data = yaml.safe_load(insert("yolov5n.yaml", [parse("SimAM@inside:C3:1")]))
    _, report = start_network(data, SHAPES, None)
    assert report is not None and report.gates == (2,)
    assert any("layer 2 C3SimAM: not neutral: no weights make SimAM a constant" in line for line in said)


def test_all_weights_of_a_trained_network_are_kept() -> None:
    model, report = start_network("yolov5n-c3se.yaml", SHAPES, None)
    assert report is not None and report.difference == 0 and report.gates == ALL
    assert (report.copied, report.total, report.placed, report.stored) == (349, 371, 349, 349)
    (row,) = [row for row in report.rows if row.new == 2]
    assert (row.module, row.status, row.why) == ("C3SE", "partly", "neutral by its gain of 2")
    assert {index: len(gates) for index, gates in model.gates().items()} == dict(zip(ALL, (1, 2, 3, 1, 1, 1, 1, 1)))


# ---------------------------------------------------------------------------------------------------- files and tools


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> tuple[DetectionModel, Path]:
    """A network with gates in both places, moved from neutral as if it had been trained, and its checkpoint."""
    specs = [parse("SE:8@inside:backbone"), parse("CBAM@inside:neck:C3")]
    model, _ = start_network(yaml.safe_load(insert("yolov5n.yaml", specs)), SHAPES, None)
    torch.manual_seed(1)
    with torch.no_grad():
        for gate in gates_in(model):
            for parameter in gate.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval(), saved(model, tmp_path_factory.mktemp("gated") / "gated.pt")


def predictions(model: nn.Module) -> torch.Tensor:
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(x)[0]


def test_a_checkpoint_is_read_stripped_and_fine_tuned_again(gated: tuple[DetectionModel, Path], tmp_path: Path) -> None:
    model, file = gated
    wanted = predictions(model)
    loaded = load_model(file, fuse=False)
    assert torch.equal(predictions(loaded), wanted) and loaded.graph.rows[2].inner == model.graph.rows[2].inner
    torch.testing.assert_close(predictions(load_model(file)), wanted, rtol=1e-4, atol=1e-3)
    stripped = strip(file, tmp_path / "stripped.pt")
    torch.testing.assert_close(predictions(load_model(stripped)), wanted, rtol=0.02, atol=1)
    again, report = start_network("", file, None)
    assert report is not None and report.copied == report.total and report.gates == () and not report.warnings
    assert torch.equal(predictions(again.eval()), wanted)
    specs = [parse("SE:8@inside:backbone"), parse("CBAM@inside:neck:C3")]  # without gains: those of the file
    again, report = start_network(yaml.safe_load(insert("yolov5n.yaml", specs)), file, None)
    assert report is not None and report.gates == () and not report.warnings
    assert torch.equal(predictions(again.eval()), wanted)
    assert again.graph.rows[2].inner == Inner("SE", "Bottleneck", {"r": 8, "gain": 2.0}, 16)
    assert again.yaml["backbone"][2] == [-1, 3, "C3SE", [128, {"r": 8, "gain": 2.0}]]


def test_another_gate_at_the_place_starts_anew_and_the_lost_one_is_warned_about(
    gated: tuple[DetectionModel, Path],
) -> None:
    specs = [parse("CBAM:8@inside:backbone"), parse("CBAM@inside:neck:C3")]  # l1 and l2 as SE's, by name and shape
    model, report = start_network(yaml.safe_load(insert("yolov5n.yaml", specs)), gated[1], None)
    assert report is not None and report.gates == BACKBONE
    assert not bool(model.model[2].m[0].gate.l2.weight.any()) and bool(model.model[13].gate.l2.weight.any())
    warned = [line for line in report.warnings if "layer 2 C3CBAM has gate inside CBAM" in line]
    assert len(warned) == 1 and "were trained with gate inside SE" in warned[0]
    _, report = start_network("yolov5n.yaml", gated[1], None)
    assert report is not None and report.gates == ()
    assert sum("has gate inside none" in line for line in report.warnings) == 8
    other = [parse("SE:4@inside:backbone"), parse("CBAM@inside:neck:C3")]
    _, report = start_network(yaml.safe_load(insert("yolov5n.yaml", other)), gated[1], None)
    assert report is not None and any("has r of its gate 4" in line for line in report.warnings)


def test_gains_are_written_into_the_file_that_was_inserted_into(tmp_path: Path) -> None:
    file = write("yolov5n.yaml", [parse("SE:8@inside:backbone"), parse("CBAM@inside:23/C3")], tmp_path / "mine.yaml")
    text = file.read_text(encoding="utf-8")
    model, _ = start_network(str(file), SHAPES, None)
    write_arguments(file, model.graph)
    new = text.replace("{r: 8}", "{r: 8, gain: 2.0}").replace("{inside: C3}", "{gain: 4.0, inside: C3}")
    assert file.read_text(encoding="utf-8") == new != text
    assert graphs.read(file).rows[2].inner == model.graph.rows[2].inner


def test_gates_inside_are_inspected_each_by_its_part(gated: tuple[DetectionModel, Path]) -> None:
    image = read_image(ROOT / "data/images/shapes1.jpg")
    found = inspect_gates(copy.deepcopy(gated[0]), [image, image[:, ::-1]], 64)
    names = [(entry.index, entry.name) for entry in found]
    assert names[:3] == [(2, "SE in m.0"), (4, "SE in m.0"), (4, "SE in m.1")]
    assert names[-1] == (23, "CBAM inside") and len(found) == 7 + 4
    assert all(entry.neutral for entry in found) and found[0].by_image.shape == (2, 16)
    assert max(entry.distance for entry in found) > 0


def test_yolov5s_own_format_refuses_them(gated: tuple[DetectionModel, Path], tmp_path: Path) -> None:
    for with_code in (False, True):
        with pytest.raises(UserError, match=r"row 2 is C3SE, and YOLOv5's C3 has no room for a gate inside"):
            write_yolov5(tmp_path / "theirs.pt", gated[1], with_code=with_code)


def test_a_trace_computes_the_same(gated: tuple[DetectionModel, Path]) -> None:
    model = load_model(gated[1])
    model.head.export = True
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        traced = torch.jit.trace(model, x, check_trace=False)
        torch.testing.assert_close(traced(x)[0], model(x)[0], rtol=1e-5, atol=1e-4)


# ----------------------------------------------------------------------------------------------- classes from elsewhere


def test_a_pasted_class_goes_inside_and_says_how_it_starts(paste: Paste, said: list[str]) -> None:  # noqa: F811
    paste(OWN + CHANNEL)
    text = insert("yolov5n.yaml", [parse("MyAttention:4@inside:C3")])
    assert "C3MyAttention, [128, {r: 4, inside: C3}]" in text
    model, report = start_network(yaml.safe_load(text), SHAPES, None)
    assert report is not None and report.copied == 349 and report.gates == ALL
    assert type(model.model[2].gate).__name__ == "MyAttention" and model.model[2].gate.l1.out_features == 4
    assert any("layer 2 C3MyAttention: not neutral: starts as built" in line for line in said)
    assert sum(line.startswith("With two lines of its own class MyAttention") for line in said) == 1
    image = read_image(ROOT / "data/images/shapes1.jpg")
    with pytest.raises(UserError, match=r"layer 2 C3MyAttention, .* cannot be read"):
        inspect_gates(model, [image], 64)
    model = build_model(yaml.safe_load(insert("yolov5n.yaml", [parse("ChannelAttention@inside:Bottleneck")])))
    assert {type(gate).__name__ for row in model.gates().values() for gate in row} == {"ChannelAttention"}
    x = torch.rand(1, 3, 64, 64).to(memory_format=torch.channels_last)
    model.to(memory_format=torch.channels_last).eval()(x)


def test_a_pasted_class_with_the_two_lines_starts_neutral_inside(paste: Paste) -> None:  # noqa: F811
    paste(OWN + TWO_LINES)
    model, report = start_network(
        yaml.safe_load(insert("yolov5n.yaml", [parse("MyAttention@inside:C3")])), SHAPES, None
    )
    assert report is not None and report.difference == 0 and "absorbed by 2 C3MyAttention" in report.rows[2].why
    found = inspect_gates(model, [read_image(ROOT / "data/images/shapes1.jpg")], 64)
    assert len(found) == 8 and found[0].neutral == 0.5


def test_a_pasted_class_that_does_not_fit_inside_is_one_line(paste: Paste) -> None:  # noqa: F811
    paste(OWN.replace("r=16", "r"))
    with pytest.raises(UserError, match=r"layer 2 C3MyAttention: its gate needs 'r'. End .* with \{r: ...\}"):
        graphs.read(network([-1, 1, "C3", [32]], "MyAttention"))
    paste(DOWN)
    with pytest.raises(
        UserError, match=r"layer 2 C3Down: Down makes 16 channels, 8 x 8, of 16, 16 x 16: inside a block"
    ):
        graphs.read(network([-1, 1, "C3", [32]], "Down"))


def test_a_pasted_class_of_that_name_comes_first(paste: Paste) -> None:  # noqa: F811
    paste("\n\nclass C3SE(C3):\n    def forward(self, x):\n        return super().forward(x) * 0.5\n")
    model = build_model(network([-1, 1, "C3", [32]], "SE"))
    assert model.graph.rows[2].inner is None and type(model.model[2]).__name__ == "C3SE"
    assert isinstance(model.model[2], Gated)
