"""Gates inserted into a model YAML: who reads whom afterwards, what the text looks like, what a mistake is answered."""

from __future__ import annotations

import re
from argparse import Namespace
from functools import cache
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from models.gates.insert import Insertion, gates, insert, parse, places, table
from models.graph import Graph, Row, read
from utils.config import ROOT, UserError

NETWORKS = sorted(path for path in (ROOT / "models").rglob("yolo*.yaml"))
MARK = 1.25  # the gain of a gate that the test inserted
GATE = f"SE:4:{MARK}"
BLOCK = """\
# A small network

nc: 2
depth_multiple: 1.0
width_multiple: 0.5
anchors: # two levels
  - [10, 13, 16, 30]
  - [30, 61, 62, 45]
backbone:
  - [-1, 1, Conv, [16, 3, 2]]   # 0-P1/2
  - [-1, 1, Conv, [32, 3, 2]]   # 1 (P2/4)
  - [-1, 1, C3, [32]]           # the 2nd
  - [-1, 1, Conv, [64, 3, 2]]   # 3: the last, 3 of them
head:
  - [-1, 1, nn.Upsample, [None, 2, nearest]] # 44 is not its number
  - [[-1, 2], 1, Concat, [1]]   # 5.5 neither
  - [-1, 2, C3, [32, False]]    # 6
  - [[6, 3], 1, Detect, [nc, anchors]]
"""
FLOW = """\
# YOLOv5 🚀 as upstream writes it

# Parameters
nc: 2  # number of classes
depth_multiple: 1.0
width_multiple: 0.5
anchors:
  - [10,13, 16,30]  # P3/8
  - [30,61, 62,45]

# backbone
backbone:
  # [from, number, module, args]
  [[-1, 1, Conv, [16, 3, 2]],  # 0-P1/2
   [-1, 1, Conv, [32, 3, 2]],
   [-1, 1, C3, [32]],
   [-1, 1, Conv, [64, 3, 2]],  # 3
  ]

head:
  [[-1, 1, nn.Upsample, [None, 2, 'nearest']],
   [[-1, 2], 1, Concat, [1]],  # cat backbone P2

   # the neck
   [-1, 2, C3, [32, False]],  # 6 (P2/4)
   [[6, 3], 1, Detect, [nc, anchors]]  # Detect(P2, P3)
  ]
"""


def small(folder: Path, text: str = BLOCK, old: str = "", new: str = "") -> Path:
    """A small network with one piece of text replaced, as a file."""
    assert old in text
    file = folder / "small.yaml"
    file.write_bytes(text.replace(old, new).encode())
    return file


@cache
def graph_of(cfg: str) -> Graph:
    return read(cfg)


def after(cfg: str | Path, *specs: str) -> Graph:
    """The network with the gates."""
    return read(yaml.safe_load(insert(cfg, [parse(spec) for spec in specs])))


def sources(graph: Graph) -> list[tuple[int, ...]]:
    return [row.sources for row in graph.rows]


def lines(text: str, word: str) -> list[str]:
    return [line for line in text.splitlines() if word in line and not line.startswith("#")]


def without_header(text: str) -> str:
    return re.sub(r"# with .*\n(#   .*\n)*", "", text)


def error(cfg: str | Path, *specs: str) -> str:
    with pytest.raises(UserError) as caught:
        insert(cfg, [parse(spec) for spec in specs])
    return str(caught.value)


def options(**given: object) -> Namespace:
    """The command's options."""
    given = {"cfg": "yolov5s.yaml", "module": None, "args": [], "places": None, "insert": None, **given}
    return Namespace(**{"list_places": False, "out": None, "exist_ok": False, **given})


# --- the shipped networks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("last", "after"), ("presppf", "before")])
def test_the_shipped_se_networks_are_what_the_command_prints(name: str, kind: str) -> None:
    shipped = (ROOT / f"models/yolov5s-se-{name}.yaml").read_text(encoding="utf-8")
    assert insert("yolov5s.yaml", [Insertion("SE", (16,), kind, "SPPF")]) == shipped


@pytest.mark.parametrize(("name", "gate"), [("last", 10), ("presppf", 9)])
def test_the_shipped_se_networks_have_their_rows(name: str, gate: int) -> None:
    plain, se = read("yolov5s.yaml"), read(f"yolov5s-se-{name}.yaml")
    data = read("yolov5s.yaml").yaml
    data["backbone"].insert(gate, [-1, 1, "SE", [1024, 16]])
    for row in data["head"]:
        row[0] = [f + (f >= gate) for f in row[0]] if isinstance(row[0], list) else row[0]
    assert {**data, "backbone": se.yaml["backbone"], "head": se.yaml["head"]} == se.yaml
    assert (data["backbone"], data["head"]) == (se.yaml["backbone"], se.yaml["head"])
    assert len(se.rows) == len(plain.rows) + 1 == 26


def test_at_and_before_the_head_make_the_same_network_as_after_the_backbone() -> None:
    rows = [(row.raw_from, row.module, row.args) for row in after("yolov5s.yaml", "SE:16@after:SPPF").rows]
    for spec in ("SE:16@at:10", "SE:16@before:Conv:6", "SE:16@before:10", "SE:16@after:9", "SE:16@after:SPPF:1"):
        assert [(row.raw_from, row.module, row.args) for row in after("yolov5s.yaml", spec).rows] == rows
    backbones = [len(after("yolov5s.yaml", f"SE@{place}").yaml["backbone"]) for place in ("at:10", "before:10")]
    assert backbones == [11, 10]


# --- who reads whom ---------------------------------------------------------------------------------------------------


def reads_above(row: Row) -> bool:
    return -1 in (row.raw_from if isinstance(row.raw_from, list) else [row.raw_from])


def shifted(index: int, gate: int) -> int:
    return index + (index >= gate)


def check_kept(old: Graph, new: Graph) -> None:
    """Every marked gate is read; the other rows are as they were, and read what they read, perhaps through gates."""
    marked = {row.index for row in new.rows if row.module == "SE" and row.args[2:] == [MARK]}
    kept = [row for row in new.rows if row.index not in marked]
    position = {row.index: moved.index for row, moved in zip(old.rows, kept, strict=True)}
    assert all(new.rows[gate].consumers for gate in marked)
    for row, moved in zip(old.rows, kept):
        for name in ("module", "args", "repeats", "inputs", "channels", "stride"):
            assert getattr(moved, name) == getattr(row, name)
        for source, now in zip(row.sources, moved.sources, strict=True):
            while now in marked:
                (now,) = new.rows[now].sources
            assert now == position.get(source, -1)


@pytest.mark.parametrize("cfg", ["yolov5s.yaml", "yolov3-tiny.yaml", "yolov5s6.yaml", "yolov5-bifpn.yaml"])
def test_a_gate_after_a_row_is_read_by_all_its_readers(cfg: str) -> None:
    old = graph_of(cfg)
    for row in old.rows[:-1]:
        new, gate = after(cfg, f"SE@after:{row.index}"), row.index + 1
        assert new.rows[gate].module == "SE" and new.rows[gate].sources == (row.index,)
        assert new.rows[gate].raw_from == -1
        for reader in old.rows:
            expected = tuple(gate if s == row.index else shifted(s, gate) for s in reader.sources)
            assert new.rows[shifted(reader.index, gate)].sources == expected


@pytest.mark.parametrize("cfg", ["yolov3-tiny.yaml", "yolov5s-seg.yaml", "yolov5-bifpn.yaml"])
def test_a_gate_before_a_row_is_read_by_it_alone(cfg: str) -> None:
    old = graph_of(cfg)
    for row in old.rows[1:]:
        new, count = after(cfg, f"SE@before:{row.index}"), len(row.sources)
        for reader in old.rows:
            expected = tuple(s + count * (s >= row.index) for s in reader.sources)
            if reader is row:
                expected = tuple(range(row.index, row.index + count))
                assert tuple(new.rows[gate].sources[0] for gate in expected) == row.sources
            assert new.rows[reader.index + count * (reader.index >= row.index)].sources == expected


@pytest.mark.parametrize("cfg", ["yolov5s.yaml", "yolov3-spp.yaml", "yolov5-fpn.yaml"])
def test_a_gate_at_a_row_takes_its_number_and_is_its_row_above(cfg: str) -> None:
    old = graph_of(cfg)
    for row in old.rows[1:]:
        if not reads_above(row):
            assert "does not read the row above by -1" in error(cfg, f"SE@at:{row.index}")
            continue
        new = after(cfg, f"SE@at:{row.index}")
        assert new.rows[row.index].sources == (row.index - 1,)
        for reader in old.rows:
            expected = [shifted(source, row.index) for source in reader.sources]
            if reader is row:
                expected = [row.index if s == row.index - 1 else s for s in expected]
            assert new.rows[shifted(reader.index, row.index)].sources == tuple(expected)


@pytest.mark.slow
@pytest.mark.parametrize("path", NETWORKS, ids=lambda path: path.stem)
def test_gates_at_every_place_leave_all_else_as_it_was(path: Path) -> None:
    old = graph_of(str(path))
    everywhere = [f"after:{row.index}" for row in old.rows[:-1]]
    everywhere += [f"before:{row.index}" for row in old.rows[1:]]
    everywhere += [
        f"at:{row.index}" for row in old.rows[1:] if row.module not in ("Detect", "Segment") and reads_above(row)
    ]
    specs = [f"{GATE}@{place}" for place in everywhere]
    new = after(path, *specs)
    check_kept(old, new)
    heads = len(old.head.sources) - 1 + sum(len(row.sources) - 1 for row in old.rows if row.module == "Concat")
    assert len(new.rows) == len(old.rows) + len(specs) + heads
    for spec in specs[::20]:  # alone, too; the three tests above have every place of a few networks
        check_kept(old, after(path, spec))


@pytest.mark.slow
@given(st.data())
@settings(max_examples=40, deadline=None)
def test_gates_in_any_order_leave_all_else_as_it_was(data: st.DataObject) -> None:
    cfg = data.draw(st.sampled_from(["yolov5s.yaml", "yolov3-tiny.yaml", "yolov5-bifpn.yaml"]))
    old = graph_of(cfg)
    legal = [f"after:{row.index}" for row in old.rows[:-1]] + [f"before:{row.index}" for row in old.rows[1:]]
    legal += [f"before:{row.index}/{len(row.sources)}" for row in old.rows if len(row.sources) > 1]
    legal += [f"at:{row.index}" for row in old.rows[1:] if reads_above(row)]
    chosen = data.draw(st.lists(st.sampled_from(legal), min_size=2, max_size=6))
    check_kept(old, after(cfg, *(f"{GATE}@{place}" for place in chosen)))


def test_relative_sources_keep_their_meaning_and_their_style() -> None:
    new = after("yolov3-tiny.yaml", "SE@after:15")  # row 16 reads -2, which is row 14
    assert (new.rows[17].raw_from, new.rows[17].sources) == (-3, (14,))
    new = after("yolov3-tiny.yaml", "SE@after:14")
    assert (new.rows[15].module, new.rows[17].raw_from, new.rows[17].sources) == ("SE", -2, (15,))
    new = after("yolov3-tiny.yaml", "SE@before:16")
    assert [new.rows[i].raw_from for i in (16, 17, 21)] == [14, -1, [20, 15]]
    assert after("yolov5s6.yaml", "SE@after:8").rows[15].raw_from == [-1, 9]


def test_a_row_with_several_inputs_gets_a_gate_on_each_or_on_the_one_named() -> None:
    new = after("yolov5s.yaml", "SE:16@before:Detect")
    assert [(row.module, row.raw_from, row.args) for row in new.rows[24:27]] == [
        ("SE", 17, [256, 16]),
        ("SE", 20, [512, 16]),
        ("SE", 23, [1024, 16]),
    ]
    assert new.head.raw_from == [24, 25, 26]
    new = after("yolov5s.yaml", "SE@before:Detect/3")
    assert (new.rows[24].raw_from, new.head.raw_from) == (-1, [17, 20, 24])
    new = after("yolov5s.yaml", "SE@before:Concat:1/2")  # its -1 is no longer the row above
    assert (new.rows[12].raw_from, new.rows[13].raw_from) == (6, [11, 12])
    new = after("yolov5s.yaml", "SE@before:Concat:1/1")
    assert (new.rows[12].raw_from, new.rows[13].raw_from) == (-1, [-1, 6])
    new = after("yolov5-bifpn.yaml", "SE@before:Concat:3/3")  # 6 is read by 7, 12 and 19
    assert (new.rows[19].raw_from, new.rows[20].raw_from) == (6, [18, 14, 19])
    assert new.rows[6].consumers == (7, 12, 19)
    assert after("yolov5s-seg.yaml", "SE@before:Segment/1").rows[24].args == [256]


def test_several_places_are_meant_in_the_file_as_it_was() -> None:
    places = ("after:SPPF", "after:4", "before:Detect/1", "at:7")
    new = after("yolov5s.yaml", *(f"{GATE}@{place}" for place in places))
    assert [row.index for row in new.rows if row.module == "SE"] == [5, 8, 12, 27]
    check_kept(graph_of("yolov5s.yaml"), new)


@pytest.mark.parametrize(
    "places", [("after:9", "after:9"), ("before:10", "before:10"), ("at:10", "at:10"), ("after:9", "at:10")]
)
def test_two_gates_at_one_place_are_chained_in_the_order_given(places: tuple[str, str]) -> None:
    new = after("yolov5s.yaml", f"SE@{places[0]}", f"ECA@{places[1]}")
    assert [(row.module, row.sources) for row in new.rows[9:13]] == [
        ("SPPF", (8,)),
        ("SE", (9,)),
        ("ECA", (10,)),
        ("Conv", (11,)),
    ]
    assert new.rows[24].sources == (23, 12)


def test_channels_are_declared_before_the_width() -> None:
    declared = {cfg: after(cfg, "SE@after:C3:2").rows[5].args for cfg in ("yolov5n.yaml", "yolov5m.yaml")}
    assert declared == {"yolov5n.yaml": [256], "yolov5m.yaml": [256]}
    assert after("yolov5s.yaml", "SE@after:Concat:1").rows[13].args == [1024]


# --- places and mistakes ----------------------------------------------------------------------------------------------


def test_a_spec_names_gate_arguments_kind_and_place() -> None:
    assert parse("SE@after:SPPF") == Insertion("SE", (), "after", "SPPF")
    assert parse("SE:16@before:C3:2") == Insertion("SE", (16,), "before", "C3:2")
    assert parse("CBAM:16:7@before:Detect/1") == Insertion("CBAM", (16, 7), "before", "Detect/1")
    assert parse("ECA:None:0.5:True@at:10").args == (None, 0.5, True)
    for spec in ("SE:16@before:C3:2", "ECA:None:0.5@after:nn.Upsample:1", "SE@at:10"):
        assert str(parse(spec)) == spec


@pytest.mark.parametrize("spec", ["SE", "SE@", "SE@after", "SE@after:", "@after:SPPF", "SE@behind:SPPF", ""])
def test_half_a_spec_is_answered_with_a_whole_one(spec: str) -> None:
    with pytest.raises(UserError, match=re.escape("such as SE:16@after:SPPF")):
        parse(spec)


@pytest.mark.parametrize("arg", ["sixteen", "__import__('os')", "[1]", "1e999", ""])
def test_arguments_are_numbers(arg: str) -> None:
    with pytest.raises(UserError, match="expected a number, None, True or False"):
        parse(f"SE:{arg}@after:SPPF")


def test_places_are_names_with_a_count_where_it_is_needed() -> None:
    graph = graph_of("yolov5s.yaml")
    assert [places(graph)[i] for i in (0, 9, 11, 16, 23, 24)] == [
        "Conv:1", "SPPF", "nn.Upsample:1", "Concat:2", "C3:8", "Detect",
    ]  # fmt: skip
    shown = table(graph)
    assert len(shown) == 30 and shown[0].split()[:3] == ["row", "place", "module"]
    assert shown[5].split() == ["4", "C3:2", "C3", "128", "8", "5,", "16", "/Bottleneck,", "/C3"]
    assert shown[25].split(maxsplit=6)[-1] == "/1 is 17, /2 is 20, /3 is 23"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("SEE@after:SPPF", "'SEE' is not a layer. Did you mean 'SE'? Gates are: "),
        ("Conv@after:SPPF", "Conv may change the channels, so it cannot be inserted; gates are: "),
        ("Detect@after:SPPF", "Detect may change the channels"),
        ("SE@after:SPP", "'SPP' is at most a part of other rows, whose inside is not a place. Did you mean 'SPPF'?"),
        ("SE@after:SPFF", "'SPFF' is not a row. Did you mean 'SPPF'? Places: Conv:1..9, C3:1..8, SPPF, nn.Upsample:1"),
        ("SE@after:Upsample:1", "Did you mean 'nn.Upsample'?"),
        ("SE@after:Bottleneck", "is a part of other rows. For a gate in each write inside:Bottleneck, in those "),
        ("SE@after:9.cv1", "'9.cv1' is at most a part of other rows"),
        ("SE@after:C3.m", "'C3.m' is at most a part of other rows"),
        ("SE@after:C3", "'C3' is not one row. Choose from C3:1 (row 2), C3:2 (row 4), "),
        ("SE@after:C3:9", "'C3:9' is not one row. Choose from C3:1 (row 2), "),
        ("SE@after:SPPF:2", "'SPPF:2' is not one row. Choose from SPPF (row 9)."),
        ("SE@after:25", "'25' is not a row. Places: Conv:1..9, C3:1..8, SPPF, nn.Upsample:1..2, Concat:1..4, "),
        ("SE@after:-1", "or a row from 0 to 24."),
        ("SE@after:Detect", "models/yolov5s.yaml:43: layer 24 Detect: nobody reads it, so nobody would"),
        ("SE@before:0", "models/yolov5s.yaml:13: layer 0 Conv: reads the image, which a gate cannot weigh."),
        ("SE@at:0", "'at' takes a row from 1 to 24, found '0'."),
        ("SE@at:25", "'at' takes a row from 1 to 24, found '25'."),
        ("SE@at:SPPF", "'at' takes a row from 1 to 24, found 'SPPF'."),
        ("SE@at:24", "layer 24 Detect: does not read the row above by -1. Nobody would read the gate: write after 23"),
        ("SE@before:Detect/4", "layer 24 Detect: its inputs are /1 to /3, found '/4'."),
        ("SE@before:Detect/0", "its inputs are /1 to /3"),
        ("SE@before:SPPF/1", "layer 9 SPPF: leave out '/1'"),
        ("SE@after:Concat:1/1", "layer 12 Concat: leave out '/1': it is for 'before' a row that reads a list."),
        ("SE:0@after:SPPF", "models/yolov5s.yaml with its gates: layer 10 SE: a reduction of 0 leaves none of its 512"),
        ("SE:16:1:2@after:SPPF", "layer 10 SE: too many arguments [1024, 16, 1, 2]; it takes r, gain."),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_fix(spec: str, message: str) -> None:
    assert message in error("models/yolov5s.yaml", spec)


def test_channels_that_no_number_declares_are_refused(tmp_path: Path) -> None:
    file = small(tmp_path, BLOCK, "[64, 3, 2]]   # 3", "[14, 3, 2]]   # 3")  # na * (nc + 5) is not scaled
    fix = "No number times the width 0.50 is that, rounded up to a multiple of 8. Choose another place."
    message = error(file, "SE@after:3").removeprefix(f"{tmp_path}/")
    assert message == f"small.yaml:13: layer 3 Conv: has 14 channels. {fix}"


def test_text_that_cannot_be_edited_is_refused(tmp_path: Path) -> None:
    aliased = BLOCK.replace("- [-1, 2, C3, [32, False]]", "- *row").replace("- [-1, 1, C3", "- &row [-1, 1, C3")
    assert "uses YAML aliases (*name)" in error(small(tmp_path, aliased), "SE@after:0")
    nested = BLOCK.replace("- [-1, 1, C3, [32]] ", "- - -1\n    - 1\n    - C3\n    - [32]\n ")
    assert ":12: layer 2 C3: cannot be edited. Write it on a line" in error(small(tmp_path, nested), "SE@after:0")
    with pytest.raises(UserError, match="give its path or name, not a mapping"):
        insert(yaml.safe_load(BLOCK), [parse("SE@after:0")])
    with pytest.raises(UserError, match="nothing to insert"):
        insert("yolov5s.yaml", [])
    with pytest.raises(UserError, match=r"Did you mean 'yolov5s-seg\.yaml'"):
        insert("yolov5s-seq.yaml", [parse("SE@after:0")])


def test_a_size_needs_multiples_in_the_file(tmp_path: Path) -> None:
    file = small(tmp_path, BLOCK, "depth_multiple: 1.0\n", "").rename(tmp_path / "yolov5s-mine.yaml")
    assert "has no 'depth_multiple' to change for yolov5n-mine.yaml" in error(
        file.with_name("yolov5n-mine.yaml"), "SE@after:0"
    )


def test_every_gate_is_offered() -> None:
    assert {"SE", "ECA"} <= set(gates())
    assert not {"Conv", "C3", "Gate", "Concat", "Detect", "nn.ReLU"} & set(gates())
