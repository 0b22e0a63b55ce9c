"""Every gate at every place of every network: what is built is right, and a neutral gate changes not one bit.

CI takes a fixed sample of each; `make exact` (EXACT=all) takes all of them, in about an hour.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from models import graph as graphs
from models.checkpoints.files import Checkpoint, read, save
from models.common import Gate
from models.gates.insert import Insertion, insert, places
from models.gates.start import absorbing, gates_in
from models.gates.transfer import transfer
from models.graph import HEADS, Graph, layer_classes
from models.yolo import DetectionModel, build_model
from utils.config import ROOT

ALL = os.environ.get("EXACT") == "all"
GATES = sorted(name for name, layer in layer_classes().items() if issubclass(layer, Gate))
NEUTRAL = [name for name in GATES if layer_classes()[name].neutral is not None]  # type: ignore[attr-defined]
NETWORKS = sorted(path for path in (ROOT / "models").rglob("yolo*.yaml") if "segment" not in path.parts)
SMALL = {"width_multiple": 0.5, "depth_multiple": 0.33}
BUILT_PER_NETWORK, EXACT_PER_NETWORK = 8, 10  # of about 600 each
# networks whose outputs are compared: both small sizes, a P6 network, several consumers and repeated sources, residuals
COMPARED = ("yolov5n.yaml", "yolov5s.yaml", "hub/yolov5n6.yaml", "hub/yolov5-bifpn.yaml", "hub/yolov5s-ghost.yaml")


def legal_places(graph: Graph) -> Iterator[tuple[str, str]]:
    """(kind, place) of every insertion the tool offers."""
    for row, place in zip(graph.rows, places(graph)):
        if row.module not in HEADS:
            yield "after", place
        if row.index:
            yield "before", place
            if len(row.sources) > 1:
                yield from (("before", f"{place}/{number}") for number in range(1, len(row.sources) + 1))
        if row.index and -1 in graphs.listed(row.raw_from):
            yield "at", str(row.index)


def chosen(graph: Graph, gates: list[str], count: int) -> list[tuple[str, str, str]]:
    """All (gate, kind, place), or `count` of them, the same ones every time."""
    combinations = [(gate, *place) for place in legal_places(graph) for gate in gates]
    if ALL:
        return combinations
    picked = np.random.default_rng(len(graph.rows)).choice(len(combinations), count, replace=False)
    return [combinations[i] for i in sorted(picked)]


def narrow(cfg: Path | str) -> dict[str, Any]:
    """The network's YAML, no deeper and wider than the small network: the rows are the same."""
    data = dict(graphs.read(cfg).yaml)
    return {**data, **{key: min(data[key], most) for key, most in SMALL.items()}}


# ------------------------------------------------------------------------------------------------------------- building


@pytest.mark.slow
@pytest.mark.parametrize("cfg", NETWORKS, ids=lambda path: path.stem)
def test_a_gate_anywhere_builds_the_right_network(cfg: Path) -> None:
    plain = graphs.read(cfg)
    least = min(row.channels for row in plain.rows) / plain.width
    small = {"width_multiple": max(0.25, 16 / least), "depth_multiple": 0.33}  # 16 channels: a reduction of 16 is legal
    strides = build_model({**plain.yaml, **small}).stride
    for gate, kind, place in chosen(plain, GATES, BUILT_PER_NETWORK):
        what = f"{cfg.name} {gate} {kind} {place}"
        new = graphs.read(yaml.safe_load(insert(cfg, [Insertion(gate, (), kind, place)])))
        inserted = [row for row in new.rows if row.module == gate and not _is_old(row.index, plain, new)]
        assert inserted and len(new.rows) == len(plain.rows) + len(inserted), what
        kept = [row for row in new.rows if row not in inserted]
        for old, row in zip(plain.rows, kept, strict=True):
            same = ("module", "args", "repeats", "inputs", "channels", "stride")
            assert all(getattr(old, name) == getattr(row, name) for name in same), f"{what}: {row.where}"
        model = build_model({**new.yaml, **small})
        assert torch.equal(model.stride, strides), what
        for row in inserted:
            assert row.consumers and all(gates_in(model.model[row.index])), what


def _is_old(index: int, plain: Graph, new: Graph) -> bool:
    """Whether row `index` of the new network is a gate that the plain one had already (the shipped SE networks)."""
    from models.gates.alignment import align

    return index in align(plain, new).values()


# ------------------------------------------------------------------------------------------------------------ exactness


@pytest.fixture(scope="module", params=COMPARED)
def plain(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, DetectionModel, Checkpoint]:
    """A network with the statistics of a trained one, and its checkpoint."""
    torch.manual_seed(0)
    model = DetectionModel(narrow(request.param), nc=4)
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d) and part.running_mean is not None and part.running_var is not None:
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 2)
    content = {"model": model.state_dict(), "yaml": model.yaml, "names": model.names, "stride": model.stride}
    return request.param, model, read(save(tmp_path_factory.mktemp("plain") / "plain.pt", content))


def outputs(model: DetectionModel, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Raw outputs in eval and in train mode, in fp32 and in bf16; changes the model (batch norms, then the dtype)."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for training in (False, True):
            model.to(dtype).train(training)
            with torch.no_grad():
                out = model(x.to(dtype))
            raw = out if training else out[1]
            found[f"{dtype} {'train' if training else 'eval'}"] = torch.cat([level.flatten() for level in raw])
    return found


@pytest.mark.slow
def test_a_neutral_gate_anywhere_changes_not_one_bit(plain: tuple[str, DetectionModel, Checkpoint]) -> None:
    cfg, model, checkpoint = plain
    side = 2 * int(model.stride.max())
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    before = outputs(copy.deepcopy(model), x)
    refused = []
    for gate, kind, place in chosen(graphs.read(cfg), NEUTRAL, EXACT_PER_NETWORK):
        text = insert(cfg, [Insertion(gate, (), kind, place)])
        for start in ("absorbed", "gain"):
            what = f"{cfg} {gate} {kind} {place} {start}"
            size = {key: model.yaml[key] for key in SMALL}
            target = DetectionModel({**yaml.safe_load(text), **size}, nc=4)
            report = transfer(target, checkpoint, gate=start)
            assert report.placed == report.stored and not report.warnings, what
            whys = [row.why for row in report.rows if row.new in report.gates]
            if not all(why.startswith("neutral") for why in whys):
                obstacles = [absorbing(target, index, 0.5)[1] for index in report.gates]
                assert start == "absorbed" and any(obstacles), what  # by gain every place is exact
                refused.append(f"{kind} {place}: {next(filter(None, obstacles))}")
                continue
            after = outputs(target, x)
            for mode, values in before.items():
                assert torch.equal(values, after[mode]), f"{what}: {mode} differs"
    print("\n".join(sorted(set(refused))))
