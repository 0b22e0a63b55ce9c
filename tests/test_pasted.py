"""Attention classes from tutorials, pasted into models/common.py as they stand: no `Gate`, no branch in parse_model."""

from __future__ import annotations

import copy
import inspect
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import REPOSITORY, TinyDataset
from test_train import quick

from models import common, pasted
from models import graph as graphs
from models.checkpoints.files import load_model, read
from models.gates.insert import insert, parse
from models.gates.inspect import inspect_gates
from models.gates.transfer import start_network, transfer
from models.yolo import DetectionModel, build_model
from utils.config import UserError
from utils.images import read_image

SHAPES = REPOSITORY / "yolov5n-shapes.pt"
# what a squeeze-and-excitation in code of others looks like, with the two usual constructors
SE = """

class {name}(nn.Module):
    def __init__(self, c1, c2, r=16):
        super({name}, self).__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.l1 = nn.Linear(c1, c1 // r, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.l2 = nn.Linear(c1 // r, c1, bias=False)
        self.sig = nn.Sigmoid()

    def forward(self, x):
        b, c, _, _ = x.size()
        y = self.avgpool(x).view(b, c)
        y = self.sig(self.l2(self.relu(self.l1(y))))
        return x * y.view(b, c, 1, 1).expand_as(x)
"""
CHANNEL = """

class ChannelAttention(nn.Module):
    def __init__(self, channel, reduction=16):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channel, channel // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channel // reduction, channel, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x):
        b, c, _, _ = x.size()
        return x * self.fc(x.view(b, c, -1).mean(2)).view(b, c, 1, 1)
"""
VALUES = CHANNEL.replace("super()", "torch.linspace(0, 1, 3).tolist(); super()", 1)  # cannot be built on meta
POSITION = """

class Position(nn.Module):
    def __init__(self, kernel_size=7):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, kernel_size, padding=kernel_size // 2)

    def forward(self, x):
        return x * torch.sigmoid(self.conv(torch.mean(x, 1, keepdim=True)))
"""
DOWN = """

class Down(nn.Module):
    def __init__(self, c1, c2, k=3, s=2):
        super().__init__()
        self.cv = nn.Conv2d(c1, c2, k, s, autopad(k))

    def forward(self, x):
        return F.relu(self.cv(x)) * math.sqrt(2)
"""
OWN = SE.format(name="MyAttention")
TWO_LINES = """
    def neutralise_(self): nn.init.zeros_(self.l2.weight)
    def scale(self, x): return self.sig(self.l2(self.relu(self.l1(self.avgpool(x).flatten(1)))))[:, :, None, None]
"""
Paste = Callable[..., None]


@pytest.fixture
def paste(monkeypatch: pytest.MonkeyPatch) -> Iterator[Paste]:
    """Let code count as if it stood at the end of models/common.py."""

    def paste(code: str) -> None:
        written = dict(vars(common))
        exec(code, written)
        for name, item in written.items():
            if vars(common).get(name) is not item:
                monkeypatch.setattr(common, name, item, raising=False)
        graphs.layer_classes.cache_clear()

    yield paste
    monkeypatch.undo()
    graphs.layer_classes.cache_clear()


def with_row(
    row: list[Any], width: float = 0.25, name: str = "yolov5s-se-last.yaml", index: int = 10
) -> dict[str, Any]:
    """The network with the gate after SPPF, as a tutorial has it, with this row as its gate."""
    data = yaml.safe_load((REPOSITORY / "models" / name).read_text(encoding="utf-8"))
    data["width_multiple"] = width
    data["backbone"][index] = row
    return data


def network(row: list[Any], **changes: Any) -> DetectionModel:
    return build_model(with_row(row, **changes), nc=2)


# --------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(("width", "channels"), [(0.25, 256), (0.33, 344), (0.5, 512), (1.25, 1280)])
def test_both_usual_constructors_get_the_channels_that_arrive(paste: Paste, width: float, channels: int) -> None:
    paste(OWN + CHANNEL)
    for args, reduction in (([1024], 16), ([1024, 8], 8)):
        with torch.device("meta"):
            own = network([-1, 1, "MyAttention", args], width=width).model[10]
            single = network([-1, 1, "ChannelAttention", args], width=width).model[10]
        assert own.l1.weight.shape == single.fc[0].weight.shape == (channels // reduction, channels)
        assert own.type == "models.common.MyAttention"


@pytest.mark.parametrize(
    ("parameters", "given"),
    [
        ("c1, c2, r=16", ("c1", "c2")),
        ("c1, c2", ("c1", "c2")),
        ("c1, c2, r", ("c1", "c2")),
        ("in_channels, out_channels, rate=4", ("c1", "c2")),
        ("inp, oup, reduction=32", ("c1", "c2")),
        ("channels, c2=None, factor=32", ("c1", "c2")),
        ("c1, c2, n=1, shortcut=True, g=1, e=0.5", ("c1", "c2", "n")),
        ("c1, c2, *args", ("c1", "c2")),
        ("channel, reduction=16", ("c1",)),
        ("channel=512, reduction=16, G=8", ("c1",)),
        ("in_planes, ratio=16, kernel_size=7", ("c1",)),
        ("dim, num_heads=8", ("c1",)),
        ("c1, k=3", ("c1",)),
        ("kernel_size=7", ()),
        ("", ()),
        ("w, reduction=16", None),
        ("reduction, channel", None),
        ("dim, k=3, dim_out=512", None),
        ("*args, **kwargs", None),
        ("channel, *args", None),
        ("c1, c2, *, r", None),
    ],
)
def test_parameter_names_tell_what_the_builder_gives(parameters: str, given: tuple[str, ...] | None) -> None:
    written: dict[str, Any] = {"nn": torch.nn}
    exec(f"class Mine(nn.Module):\n    def __init__(self, {parameters}): super().__init__()", written)
    assert pasted.leading(written["Mine"]) == given


def test_a_class_without_channels_gets_what_follows_the_channels(paste: Paste) -> None:
    paste(POSITION + "\n\nclass Plain(nn.Module):\n    def forward(self, x): return x * 1\n")
    assert network([-1, 1, "Position", [1024, 5]]).model[10].conv.kernel_size == (5, 5)
    assert network([-1, 1, "Position", []]).model[10].conv.kernel_size == (7, 7)
    assert network([-1, 1, "Plain", [1024]]).graph.rows[10].channels == 256


def test_a_number_above_one_chains_the_class_and_one_that_takes_n_gets_it(paste: Paste) -> None:
    paste(CHANNEL + "\n\nclass Block(C3):\n    pass\n" + OWN.replace("c2, r=16", "c2, n=1, r=16"))
    assert [type(part).__name__ for part in network([-1, 6, "ChannelAttention", [1024]]).model[10]] == [
        "ChannelAttention"
    ] * 2
    assert len(network([-1, 6, "Block", [1024]]).model[10].m) == 2
    assert network([-1, 6, "MyAttention", [1024, 8]]).model[10].l1.out_features == 32


def test_the_stride_of_a_class_that_makes_maps_smaller_is_measured(paste: Paste) -> None:
    paste(DOWN)
    data = with_row([-1, 1, "Conv", [1024, 1, 1]])
    data["backbone"][7] = [-1, 1, "Down", [1024]]
    model = build_model(data, nc=2)
    assert model.graph.rows[7].stride == 32 and model.graph.rows[7].channels == 256
    assert model.stride.tolist() == [8, 16, 32] and model.model[7].cv.in_channels == 128


def test_memory_formats_do_not_matter_to_code_that_calls_view(paste: Paste) -> None:
    paste(CHANNEL)
    torch.manual_seed(0)
    model = network([-1, 1, "ChannelAttention", [1024]]).eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        plain = model(image)[0]
        last = model.to(memory_format=torch.channels_last)(image.to(memory_format=torch.channels_last))[0]
    assert torch.allclose(plain, last, rtol=1e-4, atol=1e-3)


def test_reading_a_network_leaves_random_numbers_as_they_were(paste: Paste) -> None:
    paste(VALUES)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    graphs.read(with_row([-1, 1, "ChannelAttention", [1024]]))
    assert torch.equal(before, torch.get_rng_state())
    seeds = [
        build_model(with_row([-1, 1, "ChannelAttention", [1024]]), seed=1).model[10].fc[0].weight for _ in range(2)
    ]
    assert torch.equal(*seeds)


def test_a_pasted_class_takes_the_place_of_ours_of_the_same_name(paste: Paste) -> None:
    paste(SE.format(name="SE") + SE.format(name="CBAM"))
    model = network([-1, 1, "SE", [1024, 16]])
    assert type(model.model[10]) is common.SE and not isinstance(model.model[10], common.Gate)
    model = network([-1, 1, "CBAM", [1024, 16]])
    assert type(model.model[10]) is vars(common)["CBAM"]
    assert any("is models.common.CBAM; ours of this name is not used" in line for line in model.graph.warnings)


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("code", "args", "message"),
    [
        (OWN, [512], r"declares 128 channels \(512 x width 0.25\) but gives 256. Write \[1024\]: the first number"),
        (CHANNEL, [512, 8], r"declares 128 .* but gives 256. Write \[1024, 8\].*ChannelAttention\(channel, reduction"),
        (POSITION, [7], r"declares 8 channels .* gives 256. Write \[1024\]: .* of Position\(kernel_size=7\) follow"),
        (OWN, [], "its first argument must be its channels"),
        (OWN, [1024, 16, 2.0], r"too many arguments \[1024, 16, 2.0\]; it takes r"),
        (OWN.replace("r=16", "r"), [1024], r"cannot be built: .*missing 1 required positional argument: 'r'"),
        (OWN, [1024, 512], r"MyAttention\(256, 256, 512\) leaves no weights in its 'l1.weight'. Is a reduction"),
        (OWN.replace("c1, c2", "w, h"), [1024], r"MyAttention\(w, h, r=16\) does not tell .*\(c1, c2, .*\(channels, "),
        (OWN.replace("nn.Sigmoid()", "np.ones(3)"), [1024], "it uses 'np', which .* Write 'import numpy as np' above"),
        (OWN.replace("nn.Sigmoid()", "Swishes()"), [1024], "it uses 'Swishes', which .* Import it above the class"),
        (OWN.replace("view(b, c)", "view(b, 7)"), [1024], r"fails on a map of 256 channels, 8 x 8: shape"),
        (OWN.replace("return x *", "return x,"), [1024], "gives a tuple; expected one map"),
        (DOWN, [1024, 9, 32, 0], "too many arguments"),
        (DOWN.replace("return F", "return x[..., :0]\n        F"), [1024], "leaves no pixels of a map of 8 x 8"),
        (
            CHANNEL.replace("return x", "return x.repeat(1, 2, 1, 1)\n        x"),
            [],
            "256 channels .as many as it receives",
        ),
        (
            OWN.replace("return x *", "return x.mean(1)\n        return x *"),
            [1024],
            "a tensor of shape .1, 8, 8.; expected",
        ),
    ],
)
def test_what_cannot_work_is_one_line_with_the_yamls(
    paste: Paste, tmp_path: Path, code: str, args: list[Any], message: str
) -> None:
    paste(code)
    name = code.partition("class ")[2].partition("(")[0]
    text = (REPOSITORY / "models/yolov5s-se-last.yaml").read_text(encoding="utf-8")
    file = tmp_path / "mine.yaml"
    text = text.replace("SE, [1024, 16]", f"{name}, {args}").replace("width_multiple: 0.50", "width_multiple: 0.25")
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        build_model(file)
    assert f"mine.yaml:24: layer 10 {name}" in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_name_says_where_a_class_of_ones_own_goes() -> None:
    with pytest.raises(
        UserError, match=r"unknown module 'Zzyzx'. A class of your own goes to the end of models/common"
    ):
        graphs.read(with_row([-1, 1, "Zzyzx", [1024]]))


# -------------------------------------------------------------------------------------------------- weights and gates


def test_weights_are_kept_and_the_log_shows_the_two_lines_that_make_it_neutral(paste: Paste, said: list[str]) -> None:
    paste(OWN)
    names = read(SHAPES).names
    _, report = start_network(with_row([-1, 1, "MyAttention", [1024]]), SHAPES, names)
    assert report is not None and report.copied == report.total - 2 and report.gates == (10,)
    assert report.difference is not None and report.difference > 0.01
    assert any("layer 10 MyAttention: not neutral: starts as built" in line for line in said)
    (fix,) = [line for line in said if line.startswith("With two lines")]
    assert "def neutralise_(self): nn.init.zeros_(self.l2.weight)" in fix and "def scale(self, x): return" in fix
    assert [line.split("(")[0] for line in inspect.cleandoc(TWO_LINES).splitlines()] == [
        line.split("(")[0].strip() for line in fix.splitlines()[1:]
    ]


@pytest.mark.parametrize("place", [10, 9])
def test_with_the_two_lines_it_starts_neutral_and_is_read_as_a_gate(paste: Paste, place: int) -> None:
    paste(OWN + TWO_LINES)
    name = "yolov5s-se-last.yaml" if place == 10 else "yolov5s-se-presppf.yaml"
    cfg = with_row([-1, 1, "MyAttention", [1024]], name=name, index=place)
    model, report = start_network(cfg, SHAPES, read(SHAPES).names)
    assert report is not None and report.difference == 0, report
    assert "its constant 0.5 is absorbed" in next(row.why for row in report.rows if row.new == place)
    (found,) = inspect_gates(model, [read_image(REPOSITORY / "data/images/shapes1.jpg")], 64)
    assert found.name == "MyAttention" and found.neutral == 0.5 and found.verdict == "never left neutral"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("def neutralise_(self): nn.init.ones_(self.l2.weight)", "not one constant times its input"),
        ("def neutralise_(self): nn.init.zeros_(self.l9.weight)", "its neutralise_ fails: .*l9"),
    ],
)
def test_a_wrong_neutralise_leaves_the_gate_as_built(paste: Paste, line: str, why: str) -> None:
    paste(OWN + TWO_LINES.replace(TWO_LINES.splitlines()[1].strip(), line))
    model = network([-1, 1, "MyAttention", [1024]])
    before = copy.deepcopy(model.model[10].state_dict())
    report = transfer(model, read(SHAPES))
    assert re.search(why, next(row.why for row in report.rows if row.new == 10))
    assert all(torch.equal(value, before[key]) for key, value in model.model[10].state_dict().items())


def test_a_class_that_cannot_be_read_is_one_clear_line(paste: Paste, said: list[str]) -> None:
    paste(CHANNEL)
    image = read_image(REPOSITORY / "data/images/shapes1.jpg")
    with pytest.raises(
        UserError, match=r"layer 10 ChannelAttention cannot be read.*zeros_\(self.fc\[2\].weight\); def"
    ):
        inspect_gates(network([-1, 1, "ChannelAttention", [1024]]), [image], 64)
    data = with_row([-1, 1, "ChannelAttention", [1024]])
    data["backbone"][9] = [-1, 1, "SE", [1024]]
    assert [entry.name for entry in inspect_gates(build_model(data), [image], 64)] == ["SE"]
    assert any("layer 10 ChannelAttention cannot be read" in line for line in said)


def test_a_pasted_class_is_inserted_like_a_gate_unless_it_changes_the_map(paste: Paste) -> None:
    paste(OWN + CHANNEL + DOWN)
    assert {"MyAttention", "ChannelAttention"} <= set(graphs.gates()) and "Down" not in graphs.gates()
    text = insert("yolov5n.yaml", [parse("MyAttention@after:SPPF"), parse("ChannelAttention:8@before:Detect/1")])
    graph = graphs.read(yaml.safe_load(text))
    assert [(row.index, row.module, row.args) for row in graph.rows if graphs.is_pasted(row.module)] == [
        (10, "MyAttention", [1024]),
        (25, "ChannelAttention", [256, 8]),
    ]
    assert "# 25: channels, reduction" in text
    with pytest.raises(UserError, match="Down may change the channels, so it cannot be inserted"):
        insert("yolov5n.yaml", [parse("Down@after:SPPF")])
    paste(DOWN.replace("s=2", "s=1"))
    with pytest.raises(UserError, match=r"Down:3:2@before:Detect/3: it makes 256 channels at stride 64"):
        insert("yolov5n.yaml", [parse("Down:3:2@before:Detect/3")])


@pytest.mark.slow
@pytest.mark.parametrize(("code", "row"), [(OWN, "MyAttention, [1024, 8]"), (VALUES, "ChannelAttention, [1024]")])
def test_own_classes_train_and_a_second_fine_tuning_goes_on_exactly(
    paste: Paste, tiny_dataset: TinyDataset, tmp_path: Path, said: list[str], code: str, row: str
) -> None:
    paste(code)
    text = (REPOSITORY / "models/yolov5s-se-last.yaml").read_text(encoding="utf-8")
    cfg = tmp_path / "mine.yaml"
    cfg.write_text(text.replace("SE, [1024, 16]", row).replace("multiple: 0.50", "multiple: 0.25"), encoding="utf-8")
    first = quick(tmp_path, tiny_dataset, weights=str(SHAPES), cfg=str(cfg), epochs=1)
    assert any("Transferred 349/351 tensors" in line for line in said)
    assert type(load_model(first.best).model[10]).__name__ == row.partition(",")[0]
    model, report = start_network(cfg, first.best, read(first.best).names)
    assert report is not None and report.copied == report.total and report.gates == ()
    stored = read(first.best).tensors
    assert all(torch.equal(value, stored[key].to(value.dtype)) for key, value in model.state_dict().items())


# ---------------------------------------------------------------------------------------- in a copy of the repository


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of what training needs, to be edited as a tutorial says."""
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "runs")
    for name in ("models", "utils", "data"):
        shutil.copytree(REPOSITORY / name, tmp_path / "copy" / name, ignore=ignored)
    for name in ("train.py", SHAPES.name):
        shutil.copy(REPOSITORY / name, tmp_path / "copy" / name)
    return tmp_path / "copy"


def command(repository: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=repository, capture_output=True, text=True, timeout=300)


def add_branch(repository: Path, *, imported: bool) -> None:
    """What tutorials add to parse_model for their class, at the place that looks most like theirs."""
    file = repository / "models/yolo.py"
    text = file.read_text(encoding="utf-8")
    place, imports = "    elif m is nn.BatchNorm2d:\n", "from models.common import "
    branch = "    elif m is SE:\n        c1 = ch[f]\n        c2 = args[0]\n        args = [c1, args[1]]\n"
    assert text.count(place) == 1 and text.count(imports) == 1
    text = text.replace(place, branch + place)
    file.write_text(text.replace(imports, f"{imports}SE, ") if imported else text, encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(("source", "row", "branch"), [("yolov5s-se-last", 10, True), ("yolov5s-se-presppf", 9, False)])
def test_the_recipe_followed_literally_trains(
    repository: Path, tiny_dataset: TinyDataset, source: str, row: int, branch: bool
) -> None:
    with open(repository / "models/common.py", "a", encoding="utf-8") as file:
        file.write(SE.format(name="SE"))
    if branch:
        add_branch(repository, imported=True)
    text = (repository / f"models/{source}.yaml").read_text(encoding="utf-8")
    small = text.replace("width_multiple: 0.50", "width_multiple: 0.25")  # of the size of the weights
    (repository / "models/yolov5s-se.yaml").write_text(small, encoding="utf-8")
    words = f"train.py --cfg models/yolov5s-se.yaml --weights {SHAPES.name} --epochs 1 --img 64 --workers 0 --noplots"
    done = command(repository, *words.split(), "--data", str(tiny_dataset.yaml), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert f"layer {row} SE: not neutral: starts as built" in said and "def neutralise_(self)" in said
    assert "Transferred 349/351 tensors" in said
    stored = read(repository / "runs/train/exp/weights/best.pt")
    assert stored.tensors[f"model.{row}.l1.weight"].shape == (16, 256)


@pytest.mark.slow
def test_a_branch_for_a_class_that_is_not_imported_is_one_line(repository: Path) -> None:
    add_branch(repository, imported=False)
    done = command(repository, "models/yolo.py", "--cfg", "yolov5n.yaml")
    assert done.returncode == 2 and "models/yolo.py: 'SE' is not defined. Remove the branch" in done.stderr, done.stderr


@pytest.mark.slow
def test_a_name_missing_where_the_class_stands_is_one_line(repository: Path) -> None:
    with open(repository / "models/common.py", "a", encoding="utf-8") as file:
        file.write("\n\nclass Mine(nn.Module):\n    start = np.ones(3)\n")
    for words in (f"train.py --weights {SHAPES.name} --data shapes.yaml", "models/yolo.py"):
        done = command(repository, *words.split())
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert "models/common.py:" in done.stderr and "name 'np' is not defined" in done.stderr
