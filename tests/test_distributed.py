"""Several processes that train one network: the same result as one, and what they may not be asked."""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_steps import CPU, train_some_steps
from fake_cuda import CUDA, fake_cuda
from test_engine import micro_yaml
from test_train import micro_network
from torch import nn

import train
from models.yolo import DetectionModel
from utils.config import UserError
from utils.distributed import process_group
from utils.optim import ModelEMA, parameter_groups


@pytest.mark.slow
def test_two_processes_end_with_the_weights_and_losses_of_one(tmp_path: Path) -> None:
    """Half the batch each, gradients averaged: sums in another order, so weights differ by float32 rounding only."""
    script = Path(__file__).with_name("distributed_steps.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [*command, str(script), str(tmp_path)], env=environment, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["decisions"] == second["decisions"] == [True, False]  # the main process's, on both

    alone = train_some_steps()
    for name, value in alone["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(first["ema"][name], alone["ema"][name], rtol=1e-5, atol=1e-6)
    assert not second["ema"]  # only the main process averages, validates and saves
    # each process reports the losses of its own images
    torch.testing.assert_close((first["losses"] + second["losses"]) / 2, alone["losses"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (-1, r"--batch-size -1 measures one GPU, and here 2 processes train\. Give a number, a multiple of 2\."),
        (5, r"--batch-size 5: expected a multiple of the 2 processes\."),
    ],
)
def test_a_batch_that_processes_cannot_share_is_refused(
    batch: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=message), process_group(CPU, batch):
        pass
    with pytest.raises(UserError, match=message):
        train.run(weights="", cfg=str(micro_network(tmp_path)), batch_size=batch, device="cpu", project=str(tmp_path))


def test_sync_bn_replaces_the_batch_norms_before_the_network_is_on_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimizer and the average are made of what `_build_model` gives: no batch norm may be replaced later."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for sync in (True, False):
        training = object.__new__(train.Training)
        training.options = argparse.Namespace(
            weights="", cfg=str(micro_network(tmp_path)), sync_bn=sync, insert=[], seed=0, init_seed=None
        )
        training.weights = None
        training.device, training.resumed, training.main, training.hyp = CUDA, None, False, {}
        training.names = {0: "a", 1: "b"}
        with fake_cuda():
            model = training._build_model()
            assert {p.device for p in model.state_dict().values()} == {CUDA}
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        assert len(norms) == 57 and all(isinstance(norm, nn.SyncBatchNorm) == sync for norm in norms)


def test_synchronised_batch_norms_are_grouped_averaged_and_folded_like_plain_ones() -> None:
    torch.manual_seed(0)
    plain = DetectionModel(micro_yaml())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    groups = [[len(group) for group in parameter_groups(model)] for model in (plain, converted)]
    assert groups[0] == groups[1] == [60, 60, 57]
    assert plain.state_dict().keys() == converted.state_dict().keys()
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        wanted, found = (ModelEMA(model).ema.fuse()(images)[0] for model in (plain, converted))
    assert torch.equal(wanted, found)


def test_the_main_process_starts_from_the_seed_of_a_single_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network from nothing is then the same however many processes train it; the others get its weights."""

    class Seeded(Exception):
        """Ends the run where it is seeded."""

    def note(seed: int, deterministic: bool = True) -> None:
        raise Seeded(seed)

    monkeypatch.setattr(train, "init_seeds", note)
    options = train.build_parser().parse_args(["--weights", "", "--cfg", str(micro_network(tmp_path)), "--seed", "7"])
    seeds = []
    for rank in ("-1", "0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(Seeded) as caught:
            train.Training(options, CPU, None)
        seeds.append(caught.value.args[0])
    assert seeds == [7, 7, 8]
