"""train.py with attention: gates put in by a flag, neutral starts, and weights that must arrive."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_train import HYP, quick

import train
from models import graph
from models.checkpoints.files import load_model, read, save
from models.gates.insert import insert, parse
from models.gates.start import gates_in
from models.gates.transfer import start_network
from tests.conftest import TinyDataset
from utils.config import ROOT, UserError, options_from

SHAPES = str(ROOT / "yolov5n-shapes.pt")


def test_a_gate_put_in_by_a_flag_trains_and_its_yaml_stays_in_the_run_folder(
    tiny_dataset: TinyDataset, tmp_path: Path, said: list[str]
) -> None:
    done = quick(
        tmp_path,
        tiny_dataset,
        weights=SHAPES,
        cfg="yolov5n.yaml",
        insert=["SE:8@after:SPPF", "ECA@before:Detect/1"],
        epochs=1,
        min_transfer=90,
    )
    assert any("outputs differ by 0 from the file's" in line for line in said)
    written = done.save_dir / "yolov5n-inserted.yaml"
    specs = [parse("SE:8@after:SPPF"), parse("ECA@before:Detect/1")]
    text = insert("yolov5n.yaml", specs)
    with_gains = text.replace("SE, [1024, 8]", "SE, [1024, 8, 2.0]").replace("ECA, [256]", "ECA, [256, None, 2.0]")
    assert with_gains != text and written.read_text(encoding="utf-8") == with_gains
    model = load_model(done.best)
    gates = {row.module: gates_in(model.model[row.index])[0] for row in model.graph.rows if row.module in ("SE", "ECA")}
    assert gates["SE"].gain == gates["ECA"].gain == 2.0 and gates["SE"].l1.out_features == 32
    assert bool(gates["SE"].l2.weight.any()), "one epoch must move a neutral gate"
    assert graph.read(written).rows[10].args == [1024, 8, 2.0]


@pytest.mark.slow
def test_an_absorbed_gate_keeps_the_papers_form(tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    done = quick(tmp_path, tiny_dataset, weights=SHAPES, cfg="yolov5n-se-last.yaml", gate="absorbed", epochs=1)
    model = load_model(done.best)
    assert gates_in(model.model[10])[0].gain == 1.0
    before, after = read(SHAPES).tensors["model.10.conv.weight"], read(done.best).tensors["model.11.conv.weight"]
    ratio = (after / before)[before.abs() > 1e-3].median()
    assert float(ratio) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"insert": ["SE@after:SPPF"], "cfg": "", "weights": SHAPES}, "--insert needs the YAML"),
        (
            {"gate": "gain", "weights": "", "cfg": "yolov5n.yaml"},
            "--gate and --min-transfer are about what comes from --weights",
        ),
        ({"min_transfer": 50.0, "weights": SHAPES, "transfer": "none"}, "--gate and --min-transfer are about"),
        ({"insert": ["SE@behind:SPPF"], "cfg": "yolov5n.yaml", "weights": SHAPES}, "expected MODULE"),
        ({"insert": ["SE@after:SPPG"], "cfg": "yolov5n.yaml", "weights": SHAPES}, "Did you mean 'SPPF'"),
        ({"weights": SHAPES, "cfg": "yolov5s.yaml", "min_transfer": 50.0}, "--min-transfer 50: only 0.0%"),
        ({"weights": SHAPES, "gate_lr": 0.0}, "--gate-lr 0: expected a factor above 0, at most 1000"),
        ({"weights": SHAPES, "gate_lr": float("nan")}, "--gate-lr nan: expected a factor above 0"),
        (
            {"weights": SHAPES, "gate_lr": 10.0},
            "--gate-lr 10: the network has no gate to train that is new. Put one in",
        ),
        (
            {"weights": SHAPES, "cfg": "yolov5n.yaml", "insert": ["SE@inside:SPPF"]},
            "is no place inside a row. Rows that",
        ),
    ],
)
def test_wrong_words_about_gates_leave_no_run_folder(
    options: dict[str, object], message: str, tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        train.run(data=str(tiny_dataset.yaml), device="cpu", project=str(tmp_path / "runs"), **options)
    assert message in str(caught.value) and not (tmp_path / "runs").exists()


def judged_before_training(**options: Any) -> tuple[float, ...]:
    """Precision, recall, mAPs and losses of the network with which a run would begin."""
    parts = train.Training(options_from(train.build_parser(), options), torch.device("cpu"), None)
    result = parts._judge(copy.deepcopy(parts.trainer.ema.ema).fuse(), pictures=False)
    parts.loader.close()
    parts.val_loader.close()
    return result.summary


@pytest.mark.slow
@pytest.mark.parametrize("start", ["gain", "absorbed"])
@pytest.mark.parametrize("gate", ["SE", "CBAM", "ECA"])
def test_a_second_fine_tune_begins_where_the_first_one_ended(
    gate: str, start: str, tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    settings = {"cfg": "yolov5n.yaml", "insert": [f"{gate}@after:SPPF"], "hyp": {**HYP, "lr0": 0.001}, "batch_size": 4}
    first = quick(tmp_path, tiny_dataset, weights=SHAPES, gate=start, epochs=1, imgsz=128, autoanchor=True, **settings)
    assert first.results[2] > 0.1, "the network finds something"
    settings |= {"data": str(tiny_dataset.yaml), "imgsz": 128, "noplots": True, "workers": 0}
    again = judged_before_training(weights=str(first.best), project=str(tmp_path / "again"), **settings)
    assert again == first.results


@pytest.mark.slow
def test_looking_at_the_anchors_costs_nothing(weights_dir: Path, datasets_dir: Path, tmp_path: Path) -> None:
    """At 320 pixels the pretrained anchors reach a recall below AutoAnchor's limit on coco128, and must stay."""
    options = {"weights": str(weights_dir / "yolov5n.pt"), "data": "coco128.yaml", "imgsz": 320, "noplots": True}
    summary = judged_before_training(cfg="yolov5n.yaml", workers=0, project=str(tmp_path), **options)
    assert summary[2] == pytest.approx(0.423, abs=0.005)


def rates_of(run: Path) -> list[list[str]]:
    rows = [line.split(",") for line in (run / "results.csv").read_text(encoding="utf-8").splitlines()]
    return [[cell.strip() for cell in row] for row in rows]


@pytest.mark.slow
def test_gates_in_every_bottleneck_train_at_their_own_rate(
    tiny_dataset: TinyDataset, tmp_path: Path, said: list[str]
) -> None:
    settings = {"weights": SHAPES, "cfg": "yolov5n.yaml", "insert": ["SE@inside:Bottleneck"], "epochs": 1}
    moved = {}
    for gate_lr in (1.0, 10.0):
        said.clear()
        (tmp_path / f"{gate_lr:g}").mkdir()
        done = quick(tmp_path / f"{gate_lr:g}", tiny_dataset, **settings, gate_lr=gate_lr)
        assert any("outputs differ by 0 from the file's" in line for line in said)
        assert any("at 10 times the rate 0 weight(decay=0.0), 22 weight(" in line for line in said) == (gate_lr == 10)
        tensors, cells = read(done.best).tensors, rates_of(done.save_dir)
        moved[gate_lr] = sum(
            float(value.abs().sum()) for key, value in tensors.items() if key.endswith("gate.l2.weight")
        )
        assert cells[0][-3:] == ["x/lr0", "x/lr1", "x/lr2"] and len(cells[1]) == len(cells[0])
        written = (done.save_dir / "yolov5n-inserted.yaml").read_text(encoding="utf-8")
        assert written.count("C3SE, [") == 8 and written.count("{gain: 2.0}") == 8
        assert load_model(done.best).graph.rows[2].inner.options == {"gain": 2.0}
    assert moved[10.0] > 3 * moved[1.0] > 0


def test_the_gates_that_learn_faster_are_the_new_ones(tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    first, _ = start_network(yaml.safe_load(insert("yolov5n.yaml", [parse("SE@after:SPPF")])), Path(SHAPES), None)
    content = {"model": first.state_dict(), "yaml": first.yaml, "names": first.names, "stride": first.stride}
    weights = save(tmp_path / "first.pt", content)
    given = {"data": str(tiny_dataset.yaml), "imgsz": 64, "noplots": True, "workers": 0, "gate_lr": 5.0}
    given |= {"weights": str(weights), "cfg": "yolov5n.yaml", "insert": ["SE@after:SPPF", "ECA@inside:C3:1"]}
    parts = train.Training(
        options_from(train.build_parser(), {**given, "project": str(tmp_path / "x")}), torch.device("cpu"), None
    )
    gate = parts.model.model[2].gate
    assert parts.new_gates == [2] and type(gate).__name__ == "ECA"
    *usual, fast, rest = parts.trainer.optimizer.param_groups
    assert [id(p) for p in fast["params"]] == [id(gate.conv.weight)] and not rest["params"]
    assert id(parts.model.model[10].l1.weight) in [id(p) for p in usual[1]["params"]]
    parts.loader.close()
    parts.val_loader.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "gates",
    [
        {"insert": ["SE@after:SPPF"]},
        {"insert": ["CoordAtt@inside:C3", "ECA@after:SPPF"], "gate_lr": 10.0},
        {"insert": ["SE@inside:Bottleneck"], "gate_lr": 0.5, "optimizer": "AdamW"},
    ],
    ids=["after", "inside at 10 times the rate", "in bottlenecks with AdamW"],
)
def test_a_gated_run_that_was_stopped_goes_on(gates: dict[str, Any], tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    """The gain was written into the stored YAML, so the resumed network has it, too."""
    settings = {"weights": SHAPES, "cfg": "yolov5n.yaml", **gates}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    whole = quick(tmp_path / "a", tiny_dataset, epochs=2, **settings)

    class Stop(Exception):
        pass

    real = train.Training._finish_epoch

    def stop_after_the_first(self: train.Training, epoch: int, losses: object) -> bool:
        real(self, epoch, losses)  # type: ignore[arg-type]
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Training, "_finish_epoch", stop_after_the_first)
        with pytest.raises(Stop):
            quick(tmp_path / "b", tiny_dataset, epochs=2, **settings)
    last = next((tmp_path / "b").rglob("last.pt"))
    train.run(resume=str(last), device="cpu")
    first, second = read(whole.save_dir / "weights/last.pt").tensors, read(last).tensors
    assert all(torch.equal(first[key], second[key]) for key in first)
