"""The YAML as data: sources, channels, strides, literals, other sizes, and what a mistake is answered with."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml

from models.grammar import activation, literal
from models.graph import SIZES, Graph, layer_classes, read, scaled_channels
from utils.config import ROOT, UserError

NETWORKS = sorted(path for path in (ROOT / "models").rglob("yolo*.yaml"))
TINY = """\
nc: 2
depth_multiple: 1.0
width_multiple: 0.5
anchors:
  - [10, 13, 16, 30]
  - [30, 61, 62, 45]
backbone:
  - [-1, 1, Conv, [16, 3, 2]] # line 8, layer 0
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, C3, [32]]
  - [-1, 1, Conv, [64, 3, 2]]
head:
  - [-1, 1, nn.Upsample, [None, 2, nearest]] # line 13, layer 4
  - [[-1, 2], 1, Concat, [1]]
  - [-1, 2, C3, [32, False]]
  - [[6, 3], 1, Detect, [nc, anchors]]
"""


def write(folder: Path, old: str = "", new: str = "") -> Path:
    """The tiny network with one piece of text replaced."""
    assert old in TINY
    file = folder / "tiny.yaml"
    file.write_text(TINY.replace(old, new), encoding="utf-8")
    return file


def error(folder: Path, old: str, new: str) -> str:
    with pytest.raises(UserError) as caught:
        read(write(folder, old, new))
    return str(caught.value).removeprefix(f"{folder}/")


# --- what is read -----------------------------------------------------------------------------------------------------


def test_rows_know_their_line_sources_consumers_channels_and_stride(tmp_path: Path) -> None:
    graph = read(write(tmp_path))
    assert [row.line for row in graph.rows] == [8, 9, 10, 11, 13, 14, 15, 16]
    assert [row.sources for row in graph.rows] == [(-1,), (0,), (1,), (2,), (3,), (4, 2), (5,), (6, 3)]
    assert [row.consumers for row in graph.rows] == [(1,), (2,), (3, 5), (4, 7), (5,), (6,), (7,), ()]
    assert [row.channels for row in graph.rows] == [8, 16, 16, 32, 32, 48, 16, 14]
    assert [row.stride for row in graph.rows] == [2, 4, 4, 8, 4, 4, 4, None]
    assert graph.save == [2, 3, 6]
    assert graph.rows[4].args == [None, 2, "nearest"]
    assert graph.head.args == [2, [[10, 13, 16, 30], [30, 61, 62, 45]]]
    assert graph.rows[6].where == f"{tmp_path}/tiny.yaml:15: layer 6 C3"
    assert graph.warnings == ()


def test_depth_scales_repeats_and_rounds_half_to_even(tmp_path: Path) -> None:
    repeats = {}
    for depth in (0.33, 0.67, 1.0, 1.33):
        for number in (3, 6, 9):
            file = write(tmp_path, "[-1, 2, C3", f"[-1, {number}, C3")
            text = file.read_text(encoding="utf-8").replace("depth_multiple: 1.0", f"depth_multiple: {depth}")
            file.write_text(text, encoding="utf-8")
            repeats[depth, number] = read(file).rows[6].repeats
    assert list(repeats.values()) == [1, 2, 3, 2, 4, 6, 3, 6, 9, 4, 8, 12]
    assert read(write(tmp_path, "depth_multiple: 1.0", "depth_multiple: 0.1")).rows[6].repeats == 1


def test_width_rounds_channels_up_to_a_multiple_of_eight() -> None:
    assert [scaled_channels(c, 0.25) for c in (64, 80, 100)] == [16, 24, 32]
    assert scaled_channels(100, 0.25, multiple=1) == 25


def test_overrides_replace_the_yaml_and_leave_a_dict_alone(tmp_path: Path) -> None:
    data = yaml.safe_load(TINY)
    before = copy.deepcopy(data)
    graph = read(data, ch=4, nc=7, anchors=3.2)
    assert data == before
    assert (graph.yaml["ch"], graph.yaml["nc"], graph.yaml["anchors"]) == (4, 7, 3)
    assert graph.rows[0].inputs == (4,) and graph.head.args == [7, [[0, 1, 2, 3, 4, 5]] * 2]
    assert graph.file == "checkpoint yaml" and graph.name is None and graph.rows[0].line == 0
    assert read({**data, "ch": 1}, ch=3).ch == 1


@pytest.mark.parametrize("path", NETWORKS, ids=lambda path: path.stem)
def test_a_shipped_network_is_plain_data_without_warnings(path: Path) -> None:
    graph = read(path)
    assert graph.warnings == ()
    again = read(yaml.safe_load(yaml.safe_dump(graph.yaml)))
    strip = [(r.raw_from, r.sources, r.repeats, r.module, r.args, r.channels, r.stride) for r in again.rows]
    assert strip == [(r.raw_from, r.sources, r.repeats, r.module, r.args, r.channels, r.stride) for r in graph.rows]


@pytest.mark.parametrize("path", NETWORKS, ids=lambda path: path.stem)
def test_every_row_of_a_shipped_network_is_numbered_in_its_comment(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    for row in read(path).rows:
        comment = lines[row.line - 1].split("#")[1].strip()
        assert comment.split("-")[0].split(":")[0] == str(row.index)
        if "/" in comment.split(",")[0] and row.module not in ("Detect", "Segment"):
            assert comment.split(",")[0].split("/")[1].split(":")[0] == f"{row.stride:.0f}"


# --- other sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_a_size_without_a_file_is_the_small_one_with_other_multiples(size: str) -> None:
    graph = read(f"yolov5{size}-se-last.yaml")
    assert (graph.yaml["depth_multiple"], graph.yaml["width_multiple"]) == SIZES[size]
    assert graph.name == f"yolov5{size}-se-last.yaml"
    assert [row.module for row in graph.rows] == [row.module for row in read("yolov5s-se-last.yaml").rows]
    assert graph.rows[10].where.endswith("models/yolov5s-se-last.yaml:24: layer 10 SE")


def test_a_size_is_found_with_its_folder_and_in_hub_too() -> None:
    assert read("models/yolov5x-se-presppf.yaml").yaml["width_multiple"] == 1.25
    assert read("yolov5n-ghost.yaml").yaml["width_multiple"] == 0.25
    assert read("yolov5l-seg.yaml").name == "yolov5l-seg.yaml"
    for size, (depth, width) in SIZES.items():
        data = read(f"yolov5{size}.yaml").yaml
        assert (data["depth_multiple"], data["width_multiple"]) == (depth, width)


def test_a_name_nobody_has_is_answered_with_the_closest() -> None:
    with pytest.raises(UserError, match=r"Did you mean 'yolov5s-se-last\.yaml'"):
        read("yolov5s-se-lats.yaml")
    with pytest.raises(UserError, match="yolov5n-nothing"):
        read("yolov5n-nothing.yaml")


# --- the two SE networks ----------------------------------------------------------------------------------------------


def shifted(graph: Graph, at: int) -> list[tuple[object, ...]]:
    """The rows of a graph without row `at`, later numbers one lower; readers of `at` read its source."""

    def old(source: int) -> int:
        return source - (source >= at)

    rows = [row for row in graph.rows if row.index != at]
    return [(tuple(old(s) for s in row.sources), row.repeats, row.module, row.args, row.channels) for row in rows]


@pytest.mark.parametrize(("name", "index", "before"), [("last", 10, "SPPF"), ("presppf", 9, "C3")])
def test_the_se_networks_are_yolov5s_with_one_row_more(name: str, index: int, before: str) -> None:
    graph, plain = read(f"yolov5s-se-{name}.yaml"), read("yolov5s.yaml")
    row = graph.rows[index]
    assert (row.module, row.args, row.channels, graph.rows[index - 1].module) == ("SE", [1024, 16], 512, before)
    rows = [(row.sources, row.repeats, row.module, row.args, row.channels) for row in plain.rows]
    assert shifted(graph, index) == rows
    assert graph.head.raw_from == [18, 21, 24]
    assert [row.raw_from for row in graph.rows if row.module == "Concat"] == [[-1, 6], [-1, 4], [-1, 15], [-1, 11]]


def test_a_head_that_was_not_renumbered_is_named_line_by_line(tmp_path: Path) -> None:
    text = (ROOT / "models/yolov5s.yaml").read_text(encoding="utf-8")
    sppf = "  - [-1, 1, SPPF, [1024, 5]] # 9\n"
    assert sppf in text
    file = tmp_path / "yolov5s-se.yaml"
    file.write_text(text.replace(sppf, f"{sppf}  - [-1, 1, SE, [1024, 16]]\n"), encoding="utf-8")
    line = 1 + file.read_text(encoding="utf-8").splitlines().index(
        "  - [[17, 20, 23], 1, Detect, [nc, anchors]] # 24: P3, P4, P5"
    )
    assert read(file).warnings == tuple(
        f"{file}:{line}: layer 25 Detect reads layer {i}, a Concat. A row inserted above shifts later numbers by one: "
        f"did you mean {i + 1}?"
        for i in (17, 20, 23)
    )


def test_se_with_the_wrong_channels_names_line_numbers_and_fix(tmp_path: Path) -> None:
    text = (ROOT / "models/yolov5s-se-last.yaml").read_text(encoding="utf-8")
    file = tmp_path / "se.yaml"
    file.write_text(
        text.replace("  - [-1, 1, SE, [1024, 16]] # 10", "  - [-1, 1, SE, [256, 8]] # 10"), encoding="utf-8"
    )
    with pytest.raises(UserError) as caught:
        read(file)
    assert str(caught.value) == (
        f"{file}:24: layer 10 SE declares 128 channels (256 x width 0.50) but receives 512. "
        "Write [1024, 8], or move the row."
    )


def test_se_needs_a_reduction_that_leaves_a_channel(tmp_path: Path) -> None:
    row = "  - [-1, 1, C3, [32]]"
    assert read(write(tmp_path, row, "  - [-1, 1, SE, [32]]")).rows[2].channels == 16
    message = error(tmp_path, row, "  - [-1, 1, SE, [32, 17]]")
    assert message.startswith("tiny.yaml:10: layer 2 SE: a reduction of 17 leaves none of its 16 channels.")
    for wrong in ("0", "-4", "1.5", "much"):
        assert "leaves none" in error(tmp_path, row, f"  - [-1, 1, SE, [32, {wrong}]]")


# --- mistakes ---------------------------------------------------------------------------------------------------------

ROW = "  - [-1, 1, C3, [32]]"
MISTAKES = [
    (ROW, "  - [-1, 1, Cov, [32]]", "tiny.yaml:10: layer 2 names an unknown module 'Cov'. Did you mean 'Conv'?"),
    (ROW, "  - [-1, 1, nn.Upsampel, [None, 2]]", "tiny.yaml:10: layer 2 names an unknown module 'nn.Upsampel'. Did"),
    (ROW, "  - [5, 1, C3, [32]]", "tiny.yaml:10: layer 2 C3: reads layer 5, which is not above it. Only layers 0 to 1"),
    (ROW, "  - [2, 1, C3, [32]]", "tiny.yaml:10: layer 2 C3: reads layer 2, which is not above it."),
    (ROW, "  - [-3, 1, C3, [32]]", "tiny.yaml:10: layer 2 C3: reads layer -3, which is not above it."),
    (ROW, "  - [x, 1, C3, [32]]", "tiny.yaml:10: layer 2 C3: 'from' must be a layer number"),
    (ROW, "  - [[], 1, C3, [32]]", "tiny.yaml:10: layer 2 C3: 'from' is empty."),
    (ROW, "  - [[0, 1], 1, C3, [32]]", "tiny.yaml:10: layer 2 C3: reads 2 layers, but takes one."),
    (ROW, "  - [-1, 0, C3, [32]]", "tiny.yaml:10: layer 2 C3: its number must be a whole number from 1, found 0."),
    (ROW, "  - [-1, 1, C3]", "tiny.yaml:10: layer 2 must be [from, number, module, [args]]"),
    (ROW, "  - [-1, 1, C3, []]", "tiny.yaml:10: layer 2 C3: its first argument must be its channels"),
    (ROW, "  - [-1, 1, C3, [wide]]", "tiny.yaml:10: layer 2 C3: its first argument must be its channels"),
    (ROW, "  - [-1, 1, C3, [99999999]]", "tiny.yaml:10: layer 2 C3: 50000000 channels are more than"),
    (ROW, "  - [-1, 1, C3, [32, True, 1, 0.5, 9]]", "tiny.yaml:10: layer 2 C3: too many arguments"),
    (ROW, "  - [-1, 1, nn.Conv2d, [8, 8, 1]]", "tiny.yaml:10: layer 2 nn.Conv2d: takes 8 channels but receives 16."),
    (ROW, "  - [-1, 1, Expand, [3]]", "tiny.yaml:10: layer 2 Expand: 16 channels cannot be divided by 9."),
    (ROW, "  - [-1, 1, nn.Upsample, [None, 99999]]", "tiny.yaml:10: layer 2 nn.Upsample: would have stride"),
    (ROW, "  - [-1, 1, C3, [nc * width]]", "tiny.yaml:10: layer 2 C3: 'nc * width' uses 'width', which is none of nc"),
    (ROW, "  - [-1, 1, C3, [nc // 0]]", "tiny.yaml:10: layer 2 C3: 'nc // 0' has no value"),
    ("[-1, 1, Conv, [16", "[0, 1, Conv, [16", "tiny.yaml:8: layer 0 Conv: the first layer reads the image: write -1"),
    ("[[-1, 2], 1, Concat", "[[-1, 1, 0], 1, Concat", "tiny.yaml:14: layer 5 Concat: joins maps of different sizes: "),
    (ROW, "  - [-1, 1, nn.LazyConv2d, [16, 1]]", "tiny.yaml:10: layer 2 names an unknown module 'nn.LazyConv2d'."),
    ("[[6, 3], 1", "[[6, 3], 9", "tiny.yaml:16: layer 7 Detect: a head stands once: write 1 for its number, found 9."),
    ("Detect, [nc, anchors]", "Detect, [nc]", "tiny.yaml:16: layer 7 Detect: its arguments must be [nc, anchors]"),
    ("[[6, 3], 1", "[[6, 3, 1], 1", "tiny.yaml:16: layer 7 Detect: reads 3 layers, but 'anchors' has 2 levels."),
    ("nc: 2", "nc: two", "tiny.yaml:1: 'nc' must be the number of classes, found 'two'."),
    ("width_multiple: 0.5", "width_multiple: -1", "tiny.yaml:3: 'width_multiple' must be a positive number, found -1."),
    ("[10, 13, 16, 30]", "[10, 13, 16]", "tiny.yaml:4: 'anchors' must hold one list of width, height pairs per level"),
    ("backbone:", "backbone: many\nrest:", "tiny.yaml:7: 'backbone' must be a list of rows."),
]


@pytest.mark.parametrize(("old", "new", "message"), MISTAKES, ids=[new.strip()[:40] for _, new, _ in MISTAKES])
def test_a_mistake_is_named_with_its_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert error(tmp_path, old, new).startswith(message)


def test_a_concat_of_different_strides_names_both(tmp_path: Path) -> None:
    message = error(tmp_path, "[[-1, 2], 1, Concat", "[[-1, 3], 1, Concat")
    assert message == (
        "tiny.yaml:14: layer 5 Concat: joins maps of different sizes: layer 4 has stride 4, layer 3 has stride 8. "
        "Read layers of one stride."
    )


def test_a_mistake_in_a_checkpoints_network_says_so() -> None:
    data = yaml.safe_load(TINY)
    data["backbone"][2][2] = "CBAMx"
    with pytest.raises(UserError, match=r"^checkpoint yaml: layer 2 names an unknown module 'CBAMx'"):
        read(data)


def test_a_file_without_rows_is_no_network() -> None:
    with pytest.raises(UserError, match=r"anchors\.yaml: no network"):
        read("hub/anchors.yaml")


def test_channels_that_happen_to_equal_the_predictions_are_not_scaled_and_said(tmp_path: Path) -> None:
    graph = read(write(tmp_path, ROW, "  - [-1, 1, Conv, [14]]"))  # na * (nc + 5) = 2 * 7
    assert graph.rows[2].channels == 14
    assert graph.warnings == (
        f"{tmp_path}/tiny.yaml:10: layer 2 Conv: its 14 channels equal na * (nc + 5) and are not scaled.",
    )
    assert read(write(tmp_path, ROW, "  - [-1, 1, Conv, [na * (nc + 5)]]")).rows[2].channels == 14


# --- grammar ----------------------------------------------------------------------------------------------------------

NAMES = {"nc": 80, "na": 3, "no": 255, "anchors": [[1, 2]]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("na * (nc + 5)", 255),
        ("nc", 80),
        ("anchors", [[1, 2]]),
        ("None", None),
        ("True", True),
        ("-1", -1),
        ("1e-3", 0.001),
        ("[nc, 2 * na]", [80, 6]),
        ("no // 2 % 10 - +1", 6),
        ("nearest", "nearest"),
        ("nearest-exact", "nearest-exact"),
        ("'nearest'", "nearest"),
        ("a b", "a b"),
        ("", ""),
        ("nc.real", "nc.real"),
        ("__import__('os').system('true')", "__import__('os').system('true')"),
        ("nc ** 99", "nc ** 99"),
        ("(" * 300, "(" * 300),
        (["nc", ["na"]], [80, [3]]),
        (1.5, 1.5),
    ],
)
def test_arguments_are_literals_names_and_arithmetic(text: object, value: object) -> None:
    assert literal(text, NAMES) == value


def test_names_are_copied_out_so_rows_share_nothing() -> None:
    value = literal("anchors", NAMES)
    value[0].append(3)
    assert NAMES["anchors"] == [[1, 2]]


@pytest.mark.parametrize("text", ["nc * bad", "nc / 0", "nc + 'a'", "anchors * 2"])
def test_arithmetic_that_has_no_value_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        literal(text, NAMES)


def test_activations_are_calls_of_torchs_activations_with_literals() -> None:
    assert activation("nn.LeakyReLU(0.1)").negative_slope == 0.1
    assert activation("torch.nn.Hardswish(inplace=True)").inplace is True
    refused = ("nn.LeakyRelu(0.1)", "nn.Conv2d(1, 1, 1)", "nn.SiLU", "print(1)", "nn.SiLU(open('x'))", "nn.SiLU(1, 2)")
    for text in (*refused, "(", "nn.SiLU(**{})"):
        with pytest.raises(UserError, match=r"^here: activation"):
            activation(text, "here")


def test_the_table_of_layers_comes_from_the_classes() -> None:
    table = layer_classes()
    assert {"Conv", "C3", "SPPF", "Concat", "SE", "Focus", "MixConv2d", "nn.Upsample", "nn.MaxPool2d"} <= set(table)
    assert "Detect" not in table and "ScaledLayer" not in table
