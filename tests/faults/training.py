"""A tiny training as a process that can be disturbed, and what it left."""

from __future__ import annotations

import os
import sys
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import yaml

import models.gates.transfer
import train
import utils.training
from models.checkpoints.files import read
from tests.conftest import TinyDataset, write_tiny_dataset
from utils.runtime import run_script

IMPORTED_ONCE = (models.gates.transfer, utils.training)  # here, and not by every training
EPOCHS = 3
# no warm-up and a step per batch, so that every batch of the eight images moves the weights
HYP = {"lr0": 0.005, "warmup_epochs": 0.0, "nominal_batch": 2, "mosaic": 0.5}


def prepare(folder: Path) -> TinyDataset:
    """The data and hyper-parameters of one run."""
    dataset = write_tiny_dataset(folder / "tiny")
    (folder / "hyp.yaml").write_text(yaml.safe_dump(HYP), encoding="utf-8")
    return dataset


def arguments(folder: Path, *more: str) -> list[str]:
    """The command line of the run in a folder that was prepared; it writes to `folder/run`."""
    words = f"--cfg yolov5n.yaml --img 64 --batch 2 --epochs {EPOCHS} --noplots --device cpu --name run --exist-ok"
    data, hyp = folder / "tiny" / "tiny.yaml", folder / "hyp.yaml"
    return [*words.split(), "--weights", "", "--data", str(data), "--hyp", str(hyp), "--project", str(folder), *more]


def start(words: list[str], log: Path) -> BaseProcess:
    """Train in a process forked from this one, which saves importing everything; its output goes to a file.

    This process may not have computed anything with torch, whose threads a fork would not take along.
    """
    process = get_context("fork").Process(target=_train, args=(words, log))
    process.start()
    return process


def _train(words: list[str], log: Path) -> None:
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.stdout.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    run_script(lambda: train.main(words))


def outcome(run: Path) -> dict[str, Any]:
    """What must be equal for equal runs: the history, and of both checkpoints everything but their date and paths."""
    found: dict[str, Any] = {"results.csv": (run / "results.csv").read_text(encoding="utf-8")}
    for name in ("best.pt", "last.pt"):
        checkpoint = read(run / "weights" / name)
        found[f"{name} epoch"] = checkpoint.epoch
        found[f"{name} fitness"] = checkpoint.best_fitness
        found[f"{name} is stripped"] = checkpoint.training is None
        found[f"{name} tensors"] = checkpoint.tensors
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of what differs between two outcomes."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        return bool(a == b)

    return [name for name in one if not same(one[name], other[name])]
