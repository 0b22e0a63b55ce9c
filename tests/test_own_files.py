"""A file written here, given to `--cfg` again, is the network it was: nothing that is no tensor gets lost.

CI takes a sample of the places; EXACT=all takes every place of every compared network.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from models import graph as graphs
from models.checkpoints.files import read, save
from models.gates.insert import Insertion, insert
from models.gates.transfer import output_difference, transfer
from models.yolo import DetectionModel
from tests.test_exact import ALL, COMPARED, GATES, SMALL, legal_places, narrow

COMBINATIONS = list(itertools.product(GATES, ("gain", "absorbed", "random")))


def written(path: Path, model: DetectionModel) -> Path:
    """The network as a checkpoint of ours."""
    content = {"model": model.state_dict(), "yaml": model.yaml, "names": model.names, "stride": model.stride}
    return save(path, content)


def trained_(model: DetectionModel) -> None:
    """Move every floating-point tensor a little, as an epoch would, anchors as AutoAnchor would."""
    generator = torch.Generator().manual_seed(2)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.mul_(1 + 0.1 * torch.rand(tensor.shape, generator=generator))


def chosen(number: int) -> list[tuple[str, str, str]]:
    """(network, kind, place) for a combination of gate and start: one of them, or all."""
    networks = COMPARED if ALL else COMPARED[number % len(COMPARED) :][:1]
    found = [(network, *place) for network in networks for place in legal_places(graphs.read(network))]
    return found if ALL else [found[int(np.random.default_rng(number).integers(len(found)))]]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(COMBINATIONS)), ids=["-".join(each) for each in COMBINATIONS])
def test_a_file_given_to_its_yaml_again_computes_the_same(number: int, tmp_path: Path) -> None:
    gate, start = COMBINATIONS[number]
    for network, kind, place in chosen(number):
        what = f"{network} {gate} {kind} {place} {start}"
        plain = DetectionModel(narrow(network), nc=4)
        text = yaml.safe_load(insert(network, [Insertion(gate, (), kind, place)]))
        cfg = {**text, **{key: plain.yaml[key] for key in SMALL}}
        first = DetectionModel(cfg, nc=4)
        transfer(first, read(written(tmp_path / "plain.pt", plain)), gate=start)
        trained_(first)
        file = read(written(tmp_path / "own.pt", first))
        second = DetectionModel(cfg, nc=4)
        report = transfer(second, file, gate=start)
        assert report.copied == report.total and not report.warnings and not report.gates, what
        assert output_difference(second, file, second.names) == 0, what
