"""Starting from another network's weights: rows are matched by what they are, and the report says what happened."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from models import graph
from models.checkpoints.files import Checkpoint, read, save
from models.gates.alignment import align
from models.gates.transfer import Report, start_network, transfer
from models.yolo import DetectionModel, build_model
from utils.config import ROOT, UserError

COCO_LIKE = {index: f"class {index}" for index in range(80)}


def checkpoint_of(path: Path, model: DetectionModel, **changes: Any) -> Checkpoint:
    """What a file of ours with this network holds."""
    content = {"model": model.state_dict(), "yaml": model.yaml, "names": model.names, "stride": model.stride}
    return read(save(path, {**content, **changes}))


def randomised(model: DetectionModel) -> DetectionModel:
    """The network with numbers everywhere, statistics too, so that a tensor in the wrong place is seen."""
    generator = torch.Generator().manual_seed(1)
    for key, tensor in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            tensor.fill_(7)
        elif not key.endswith("anchors"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return model


@pytest.fixture(scope="module")
def yolov5n(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A fresh yolov5n with 80 classes, saved by us and read again."""
    model = randomised(DetectionModel("yolov5n.yaml"))
    model.names = dict(COCO_LIKE)
    return checkpoint_of(tmp_path_factory.mktemp("weights") / "n.pt", model)


def variant(path: Path, edit: Any) -> Path:
    """yolov5n.yaml with an edited text."""
    path.write_text(edit((ROOT / "models/yolov5n.yaml").read_text(encoding="utf-8")), encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize(
    ("cfg", "index_copied", "gate"), [("yolov5n-se-last.yaml", 198, 10), ("yolov5n-se-presppf.yaml", 186, 9)]
)
def test_an_inserted_gate_loses_nothing(yolov5n: Checkpoint, cfg: str, index_copied: int, gate: int) -> None:
    model = DetectionModel(cfg)
    report = transfer(model, yolov5n)
    assert (report.copied, report.partial, report.total) == (349, 0, 351) and report.warnings == ()
    assert report.percent_parameters == pytest.approx(100 * 1_872_157 / 1_880_349)
    state = model.state_dict()
    for key, value in yolov5n.tensors.items():
        _, index, rest = key.split(".", 2)
        assert torch.equal(state[f"model.{int(index) + (int(index) >= gate)}.{rest}"], value), key
    fresh = [row for row in report.rows if row.status == "new"]
    assert [(row.new, row.module, row.total) for row in fresh] == [(gate, "SE", 2)]
    by_index = transfer(DetectionModel(cfg), yolov5n, mode="index")
    assert (by_index.copied, by_index.total) == (index_copied, 351)


def test_by_index_a_head_of_other_classes_is_dropped_whole(yolov5n: Checkpoint) -> None:
    """As everybody loads a checkpoint; for the plain network nothing else differs from matching rows by structure."""
    names = {0: "RBC", 1: "WBC", 2: "Platelets"}
    usual, ours = (DetectionModel("yolov5n.yaml", nc=3, seed=0) for _ in range(2))
    start = {key: value.clone() for key, value in usual.state_dict().items()}
    report = transfer(usual, yolov5n, mode="index", names=names)
    kept = transfer(ours, yolov5n, names=names)
    head = {f"model.24.m.{level}.{part}" for level in range(3) for part in ("weight", "bias")}
    assert (report.copied, report.partial, report.head) == (report.total - 6, 0, False)
    assert (kept.copied, kept.partial, kept.head) == (report.copied, 6, True)
    for (key, value), other in zip(usual.state_dict().items(), ours.state_dict().values()):
        assert torch.equal(value, start[key]) if key in head else torch.equal(value, other), key
        assert (key in head) != torch.equal(value, other), key


@pytest.mark.parametrize(("cfg", "index_copied"), [("yolov5n-se-last.yaml", 198), ("yolov5n-se-presppf.yaml", 186)])
def test_the_official_file_moves_into_both_variants(weights_dir: Path, cfg: str, index_copied: int) -> None:
    checkpoint = read(weights_dir / "yolov5n.pt")
    model = DetectionModel(cfg)
    model.names = checkpoint.names
    report = transfer(model, checkpoint)
    assert (report.copied, report.total, report.warnings) == (349, 351, ())
    assert transfer(DetectionModel(cfg), checkpoint, mode="index").copied == index_copied
    assert f"Transferred 349/351 tensors from {report.name}, 99.6% of the parameters" in report.summary()
    assert "anchors of the checkpoint" in report.summary() and " SE (neutral" in report.summary()


def test_a_gate_taken_out_again_keeps_everything_else(tmp_path: Path) -> None:
    with_gate = randomised(DetectionModel("yolov5n-se-last.yaml"))
    report = transfer(DetectionModel("yolov5n.yaml"), checkpoint_of(tmp_path / "se.pt", with_gate))
    assert (report.copied, report.total, report.warnings) == (349, 349, ())
    assert [(row.old, row.module) for row in report.rows if row.status == "dropped"] == [(10, "SE")]


def test_the_gate_moves_with_its_row(tmp_path: Path) -> None:
    old = randomised(DetectionModel("yolov5n-se-last.yaml"))
    report = transfer(DetectionModel("yolov5n-se-last.yaml"), checkpoint_of(tmp_path / "se.pt", old))
    assert (report.copied, report.total, report.percent_parameters) == (351, 351, 100.0)


@pytest.mark.parametrize(
    "cfg",
    [
        "hub/yolov3-tiny.yaml",
        *(
            pytest.param(f"hub/yolov5{name}.yaml", marks=pytest.mark.slow)
            for name in ("n6", "s-ghost", "-bifpn", "-p2")
        ),
    ],
)
def test_a_network_transfers_to_itself_whole(tmp_path: Path, cfg: str) -> None:
    if not (ROOT / "models" / cfg).is_file():
        pytest.skip(f"models/{cfg} is not part of this tree")
    old = randomised(DetectionModel(cfg))
    new = DetectionModel(cfg)
    report = transfer(new, checkpoint_of(tmp_path / "a.pt", old))
    assert report.copied == report.total == len(new.state_dict()) and report.warnings == ()
    assert all(torch.equal(value, new.state_dict()[key]) for key, value in old.state_dict().items())


@pytest.mark.parametrize("position", [1, 4, 6, 9, 10, 13, 15, 18, 20, 23])
def test_a_row_inserted_anywhere_is_found(position: int) -> None:
    base = graph.read("yolov5n.yaml")
    rows = copy.deepcopy([*base.yaml["backbone"], *base.yaml["head"]])
    for row in rows:
        sources = row[0] if isinstance(row[0], list) else [row[0]]
        moved = [f + (f >= position) for f in sources]
        row[0] = moved if isinstance(row[0], list) else moved[0]
    rows.insert(position, [-1, 1, "nn.Identity", []])
    target = graph.read({**base.yaml, "backbone": rows[:10], "head": rows[10:]})
    assert align(base, target) == {i: i + (i >= position) for i in range(25)}
    assert align(target, base) == {i + (i >= position): i for i in range(25)}


def test_a_copy_of_a_row_is_told_from_the_row_by_what_reads_it(tmp_path: Path) -> None:
    base = graph.read("yolov5n.yaml")
    rows = copy.deepcopy([*base.yaml["backbone"], *base.yaml["head"]])
    rows[24][0] = [17, 20, 24]  # an extra C3 behind the last one, before Detect
    rows.insert(24, [-1, 3, "C3", [1024, False]])
    pairs = align(base, graph.read({**base.yaml, "backbone": rows[:10], "head": rows[10:]}))
    assert pairs[24] == 25 and pairs[22] == 22 and len(pairs) == 25
    assert all(old == new for old, new in pairs.items() if old < 23)


# ------------------------------------------------------------------------------------------------------------- warnings


def half_renumbered(text: str) -> str:
    """SE after SPPF with the Concats renumbered and Detect forgotten."""
    text = text.replace("SPPF, [1024, 5]]", "SPPF, [1024, 5]]\n  - [-1, 1, SE, [1024, 16]]", 1)
    return text.replace("[[-1, 14], 1, Concat", "[[-1, 15], 1, Concat").replace(
        "[[-1, 10], 1, Concat", "[[-1, 11], 1, Concat"
    )


def line_of(path: Path, words: str) -> int:
    return next(i for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if words in line)


def test_a_forgotten_detect_is_named_with_its_line(tmp_path: Path, yolov5n: Checkpoint) -> None:
    path = variant(tmp_path / "yolov5n-half.yaml", half_renumbered)
    report = transfer(DetectionModel(path), yolov5n)
    assert len(report.warnings) == 1
    (warning,) = report.warnings
    assert f"{path.name}:{line_of(path, 'Detect')}: layer 25 Detect reads 17, 20, 23" in warning
    assert "18, 21, 24" in warning and "Did you mean [18, 21, 24]?" in warning


def test_a_forgotten_concat_is_named_with_its_line(tmp_path: Path, yolov5n: Checkpoint) -> None:
    def edit(text: str) -> str:
        text = half_renumbered(text).replace("[[-1, 15], 1, Concat", "[[-1, 14], 1, Concat")
        return text.replace("[[17, 20, 23], 1, Detect", "[[18, 21, 24], 1, Detect")

    path = variant(tmp_path / "yolov5n-half.yaml", edit)
    report = transfer(DetectionModel(path), yolov5n)
    assert len(report.warnings) == 1
    line = line_of(path, "[[-1, 14], 1, Concat")
    assert report.warnings[0].count(f":{line}: layer 20 Concat reads 19, 14")
    assert report.warnings[0].endswith("Did you mean [-1, 15]?")


def test_nothing_renumbered_names_every_row(tmp_path: Path, yolov5n: Checkpoint) -> None:
    path = variant(
        tmp_path / "a.yaml",
        lambda text: text.replace("SPPF, [1024, 5]]", "SPPF, [1024, 5]]\n  - [-1, 1, SE, [1024, 16]]", 1),
    )
    report = transfer(DetectionModel(path), yolov5n)
    assert [warning.split(": layer ")[1].split(" reads")[0] for warning in report.warnings] == [
        "20 Concat",
        "23 Concat",
        "25 Detect",
    ]


def test_a_gate_whose_reader_reads_past_it_is_no_mistake(tmp_path: Path, yolov5n: Checkpoint) -> None:
    def edit(text: str) -> str:  # SE behind layer 6; the Concat goes on reading the ungated layer 6, others shift
        text = text.replace("9, C3, [512]]", "9, C3, [512]]\n  - [-1, 1, SE, [512, 16]]", 1)
        for old, new in (("[-1, 14]", "[-1, 15]"), ("[-1, 10]", "[-1, 11]"), ("[17, 20, 23]", "[18, 21, 24]")):
            text = text.replace(old, new)
        return text

    report = transfer(DetectionModel(variant(tmp_path / "a.yaml", edit)), yolov5n)
    assert (report.copied, report.warnings) == (349, ())


# -------------------------------------------------------------------------------------------------------------- classes


def test_classes_are_matched_by_name_whatever_their_case(tmp_path: Path, yolov5n: Checkpoint) -> None:
    model = DetectionModel("yolov5n.yaml", nc=3)
    before = copy.deepcopy(model.state_dict())
    report = transfer(model, yolov5n, names={0: "CLASS 41", 1: "unicorn", 2: "class 7"})
    assert (report.copied, report.partial) == (343, 6)
    for level, channels in enumerate((64, 128, 256)):
        for part, rest in (("weight", (channels, 1, 1)), ("bias", ())):
            key = f"model.24.m.{level}.{part}"
            old, new = yolov5n.tensors[key].view(3, 85, *rest), model.state_dict()[key].view(3, 8, *rest)
            assert torch.equal(new[:, :5], old[:, :5]), "boxes and objectness"
            assert torch.equal(new[:, 5], old[:, 46]) and torch.equal(new[:, 7], old[:, 12])
            assert torch.equal(new[:, 6], before[key].view(3, 8, *rest)[:, 6]), "the unicorn stays fresh"
    assert "1 of 3 classes are not in the file" in report.summary()


def test_the_same_classes_in_another_order_are_sorted(yolov5n: Checkpoint) -> None:
    model = DetectionModel("yolov5n.yaml")
    report = transfer(model, yolov5n, names={i: COCO_LIKE[79 - i] for i in range(80)})
    assert report.copied == 349
    old, new = yolov5n.tensors["model.24.m.0.bias"].view(3, 85), model.state_dict()["model.24.m.0.bias"].view(3, 85)
    assert torch.equal(new[:, 5:], old[:, 5:].flip(1))


def test_as_many_classes_of_other_names_keep_their_places(yolov5n: Checkpoint) -> None:
    model = DetectionModel("yolov5n.yaml")
    assert transfer(model, yolov5n, names={i: f"other {i}" for i in range(80)}).copied == 349
    assert torch.equal(model.state_dict()["model.24.m.1.bias"], yolov5n.tensors["model.24.m.1.bias"])


def test_detection_weights_start_a_segmentation_network(yolov5n: Checkpoint) -> None:
    if not (ROOT / "models/segment/yolov5n-seg.yaml").is_file():
        pytest.skip("models/segment is not part of this tree")
    model = build_model(
        "segment/yolov5n-seg.yaml" if not (ROOT / "models/yolov5n-seg.yaml").is_file() else "yolov5n-seg.yaml"
    )
    report = transfer(model, yolov5n, names=COCO_LIKE)
    assert (report.copied, report.partial) == (343, 6)
    old, new = yolov5n.tensors["model.24.m.0.bias"].view(3, 85), model.state_dict()["model.24.m.0.bias"].view(3, 117)
    assert torch.equal(new[:, :85], old)


def test_widths_that_differ_are_reported_and_not_copied(yolov5n: Checkpoint) -> None:
    model = DetectionModel("yolov5s.yaml")
    before = copy.deepcopy(model.state_dict())
    report = transfer(model, yolov5n)
    assert report.copied == 1 and report.percent_parameters == 0.0, "only the anchors"
    first = report.rows[0]
    assert first.status == "reshaped" and first.why == "shape (32, 3, 6, 6) here, (16, 3, 6, 6) in the file"
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items() if not k.endswith("anchors"))


# -------------------------------------------------------------------------------------------------------------- anchors


def shifted_anchors(text: str) -> str:
    return text.replace("[10, 13, 16, 30, 33, 23]", "[12, 13, 16, 30, 33, 23]")


def test_a_yamls_own_anchors_win_over_the_files(tmp_path: Path, yolov5n: Checkpoint) -> None:
    model = DetectionModel(variant(tmp_path / "a.yaml", shifted_anchors))
    report = transfer(model, yolov5n)
    assert report.copied == 348 and "anchors of the YAML" in report.summary()
    assert model.head.anchors[0, 0, 0].item() == 12 / 8


def test_anchors_that_differ_by_rounding_are_the_files(tmp_path: Path, yolov5n: Checkpoint) -> None:
    tensors = dict(yolov5n.tensors)
    tensors["model.24.anchors"] = (tensors["model.24.anchors"] * 1.0003).half()
    checkpoint = read(save(tmp_path / "a.pt", {"model": tensors, "yaml": yolov5n.yaml, "names": COCO_LIKE}))
    model = DetectionModel("yolov5n.yaml")
    assert "anchors of the checkpoint" in transfer(model, checkpoint).summary()
    assert torch.equal(model.head.anchors, tensors["model.24.anchors"].float())


def test_anchors_that_autoanchor_changed_stay_with_the_weights_trained_on_them(
    tmp_path: Path, yolov5n: Checkpoint
) -> None:
    tensors = dict(yolov5n.tensors)
    tensors["model.24.anchors"] = tensors["model.24.anchors"] * 1.5  # as autoanchor leaves them: the YAML is the old
    checkpoint = read(save(tmp_path / "a.pt", {"model": tensors, "yaml": yolov5n.yaml, "names": COCO_LIKE}))
    for cfg in (checkpoint.yaml, "yolov5n.yaml", "yolov5n-se-last.yaml"):
        model = DetectionModel(cfg)
        report = transfer(model, checkpoint)
        assert report.copied == 349 and report.head and not report.warnings
        assert torch.equal(model.head.anchors, tensors["model.24.anchors"])


def test_other_anchors_in_the_yaml_are_a_warning_where_the_head_came_over(tmp_path: Path, yolov5n: Checkpoint) -> None:
    (warning,) = transfer(DetectionModel(variant(tmp_path / "a.yaml", shifted_anchors)), yolov5n).warnings
    assert "a.yaml:43: layer 24 Detect: its anchors are not those that its weights in " in warning


def test_placeholder_anchors_leave_the_head_to_autoanchor(yolov5n: Checkpoint) -> None:
    report = transfer(DetectionModel("yolov5n.yaml", anchors=3), yolov5n)
    assert not report.head and not report.warnings and report.copied == 348


# ------------------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("SPPF, [1024, 5]", "SPPF, [1024, 7]", ":22: layer 9 SPPF has k 7; its weights in {} were trained with k 5."),
        ("[512, False]] # 13", "[512, True]] # 13", ":28: layer 13 C3 has shortcut True; its weights in {} were"),
        (
            "[-1, 9, C3, [512]]",
            "[-1, 3, C3, [512]]",
            ":19: layer 6 C3 has number (after the depth) 1; its weights in {} were",
        ),
        (
            "nc: 80",
            "activation: nn.ReLU()\nnc: 80",
            ": activation: nn.ReLU(); the weights in {} were trained with none",
        ),
    ],
)
def test_an_argument_that_differs_in_a_matched_row_is_a_warning(
    tmp_path: Path, yolov5n: Checkpoint, old: str, new: str, message: str
) -> None:
    cfg = variant(tmp_path / "a.yaml", lambda text: text.replace(old, new))
    assert new in cfg.read_text(encoding="utf-8")
    _, report = start_network(cfg, yolov5n.path, None)
    assert report is not None and len(report.warnings) == 1
    assert f"a.yaml{message}".format(report.name) in report.warnings[0]
    assert report.difference is not None, "the outputs are probed"


def test_an_open_gain_is_the_files(tmp_path: Path, yolov5n: Checkpoint) -> None:
    first, _ = start_network("yolov5n-se-last.yaml", yolov5n.path, None)
    own = checkpoint_of(tmp_path / "own.pt", first)
    again, report = start_network("yolov5n-se-last.yaml", own.path, None)
    assert report is not None and not report.warnings and not report.gates
    assert again.model[10].gain == 2.0 and again.graph.rows[10].args == [1024, 16, 2.0]
    assert again.yaml == first.yaml, "what is built from the stored YAML has the gain, too"


def test_another_gain_in_the_yaml_is_a_warning(tmp_path: Path, yolov5n: Checkpoint) -> None:
    first, _ = start_network("yolov5n-se-last.yaml", yolov5n.path, None)
    own = checkpoint_of(tmp_path / "own.pt", first)
    text = (ROOT / "models/yolov5s-se-last.yaml").read_text(encoding="utf-8")
    cfg = tmp_path / "yolov5s-mine.yaml"
    cfg.write_text(text.replace("SE, [1024, 16]", "SE, [1024, 16, 1.0]"), encoding="utf-8")
    _, report = start_network(tmp_path / "yolov5n-mine.yaml", own.path, None)
    assert report is not None and report.difference
    assert "layer 10 SE has gain 1.0; its weights in " in report.warnings[0]


# -------------------------------------------------------------------------------------------------------- other sources


def test_a_bare_state_dict_is_matched_by_index(tmp_path: Path, yolov5n: Checkpoint) -> None:
    torch.save(yolov5n.tensors, tmp_path / "bare.pt")
    report = transfer(DetectionModel("yolov5n.yaml"), read(tmp_path / "bare.pt"))
    assert (report.copied, report.total) == (349, 349)


def test_a_fused_file_cannot_be_trained_on(tmp_path: Path) -> None:
    model = DetectionModel("yolov5n.yaml").eval()
    fused = checkpoint_of(tmp_path / "a.pt", copy.deepcopy(model).fuse())
    with pytest.raises(UserError, match="batch norms folded"):
        transfer(model, fused)


def test_an_unknown_mode_is_named(yolov5n: Checkpoint) -> None:
    with pytest.raises(UserError, match="--transfer byname"):
        transfer(DetectionModel("yolov5n.yaml"), yolov5n, mode="byname")


def test_the_table_has_a_line_for_every_row_of_both_networks(yolov5n: Checkpoint) -> None:
    report: Report = transfer(DetectionModel("yolov5n-se-last.yaml"), yolov5n)
    lines = report.lines()
    assert len(lines) == 29 and lines[0].split() == ["old", "new", "module", "status", "tensors", "why"]
    assert lines[11].split()[:4] == ["-", "10", "SE", "new"] and lines[26].split() == [
        "24",
        "25",
        "Detect",
        "copied",
        "7/7",
    ]
    assert "\n" not in report.summary()
