"""What the gates of a network do: numbers that follow from the gate, verdicts, the command and its files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from models.checkpoints.files import save
from models.gates.inspect import GateStatistics, inspect_gates, run, table
from models.gates.start import gates_in
from models.yolo import DetectionModel
from tests.conftest import TinyDataset
from utils.config import UserError

IMAGES = [np.random.default_rng(seed).integers(0, 256, (96, 128, 3), dtype=np.uint8) for seed in range(4)]


def network(gate: list[Any]) -> DetectionModel:
    torch.manual_seed(0)
    return DetectionModel(
        {
            "nc": 2,
            "depth_multiple": 1.0,
            "width_multiple": 1.0,
            "anchors": [[10, 13, 16, 30]],
            "backbone": [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [16, 3, 2]], [-1, 1, *gate]],
            "head": [[[2], 1, "Detect", ["nc", "anchors"]]],
        }
    )


@pytest.mark.parametrize("gate", ["SE", "ECA", "CBAM", "CoordAtt", "SCSE", "EMA", "GlobalContext", "GAM"])
def test_a_gate_made_neutral_is_said_never_to_have_left(gate: str) -> None:
    model = network([gate, [16]])
    (part,) = gates_in(model.model[2])
    part.neutralise_()
    (found,) = inspect_gates(model, IMAGES, 64)
    assert found.verdict == "never left neutral" and found.distance == 0 and found.mean == part.neutral
    assert found.over_channels == found.over_images == found.over_positions == 0
    assert found.by_image.shape == (4, 16) and found.index == 2 and found.name == gate


def test_the_numbers_are_the_gates_own() -> None:
    model = network(["SE", [16, 4]])
    (part,) = gates_in(model.model[2])
    with torch.no_grad():
        part.l2.weight.mul_(200)
    seen: list[np.ndarray] = []
    part.register_forward_hook(lambda gate, inputs, output: seen.append((output / inputs[0]).numpy()))
    (found,) = inspect_gates(model, IMAGES, 64)
    values = np.stack([np.nanmean(image, (2, 3))[0] for image in seen])
    np.testing.assert_allclose(found.by_image, values, atol=1e-4)
    assert found.mean == pytest.approx(values.mean(), abs=1e-4)
    assert found.over_channels == pytest.approx(values.mean(0).std(), abs=1e-4)
    assert found.over_images == pytest.approx(values.std(0).mean(), abs=1e-4)
    assert (
        found.saturated == pytest.approx(((values < 0.01) | (values > 0.99)).mean(), abs=0.01) and found.saturated > 0
    )
    assert found.distance == pytest.approx(np.abs(values / 0.5 - 1).mean(), abs=1e-3)


def statistics(values: np.ndarray, positions: float = 0.0, neutral: float | None = 0.5) -> GateStatistics:
    distance = float("nan") if neutral is None else float(np.abs(values / neutral - 1).mean())
    return GateStatistics(9, "SE", neutral, values, positions, 0.0, distance)


@pytest.mark.parametrize(
    ("values", "positions", "verdict"),
    [
        (np.full((3, 8), 0.5), 0.0, "never left neutral"),
        (np.full((3, 8), 0.7), 0.0, "a constant"),
        (np.tile(np.linspace(0.2, 0.8, 8), (3, 1)), 0.0, "weighs the channels, the same for every image"),
        (np.linspace(0.2, 0.8, 3)[:, None].repeat(8, 1), 0.0, "depends on the image"),
        (np.full((3, 8), 0.7), 0.1, "depends on the position"),
    ],
)
def test_the_verdict_says_what_the_numbers_say(values: np.ndarray, positions: float, verdict: str) -> None:
    assert statistics(values, positions).verdict == verdict


def test_one_image_or_no_neutral_leaves_a_dash() -> None:
    cells = statistics(np.full((1, 8), 0.7), neutral=None).cells()
    assert cells[4] == "-" and cells[7] == "-" and "nan" not in table([statistics(np.full((1, 8), 0.7), neutral=None)])


def test_a_network_without_gates_is_told_so() -> None:
    with pytest.raises(UserError, match=r"no attention gate \(CBAM, .*SE.*\)"):
        inspect_gates(network(["Conv", [16]]), IMAGES, 64)


def test_the_hooks_are_gone_afterwards() -> None:
    model = network(["SE", [16, 4]])
    inspect_gates(model, IMAGES[:1], 64)
    assert all(not part._forward_hooks for part in model.modules())


def arguments(weights: Path, source: Path, project: Path, **changes: Any) -> argparse.Namespace:
    settings = {"imgsz": 64, "max_images": 3, "device": "cpu", "name": "exp", "exist_ok": False, "noplots": False}
    return argparse.Namespace(weights=str(weights), source=str(source), project=str(project), **{**settings, **changes})


def test_the_command_writes_a_table_and_a_picture(tmp_path: Path, tiny_dataset: TinyDataset, said: list[str]) -> None:
    model = network(["CBAM", [16, 4]])
    content = {"model": model.state_dict(), "yaml": model.yaml, "names": model.names, "stride": model.stride}
    weights = save(tmp_path / "gated.pt", content)
    found = run(arguments(weights, tiny_dataset.root / "images/train", tmp_path))
    assert len(found[0].by_image) == 3 and any("3 images at 64 pixels" in line and "CBAM" in line for line in said)
    rows = (tmp_path / "exp/gates.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 2 and rows[0].startswith("layer,gate,mean") and rows[1].startswith("2,CBAM,")
    picture = cv2.imread(str(tmp_path / "exp/gates.png"))
    assert picture is not None and picture.std() > 5


def test_a_file_without_gates_is_named(tmp_path: Path, tiny_dataset: TinyDataset) -> None:
    model = network(["Conv", [16]])
    content = {"model": model.state_dict(), "yaml": model.yaml, "names": model.names, "stride": model.stride}
    weights = save(tmp_path / "plain.pt", content)
    with pytest.raises(UserError, match=r"plain\.pt: its network has no attention gate"):
        run(arguments(weights, tiny_dataset.root / "images/train", tmp_path))
    assert not (tmp_path / "exp").exists()
