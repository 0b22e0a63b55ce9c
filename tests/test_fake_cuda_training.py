"""The parts of a training step on a CUDA device that has no data (fake_cuda.py): none of them may wait for it."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import CUDA, fake_cuda
from test_fake_cuda import SIZE, devices, images, network, targets
from torch import nn

from models.yolo import DetectionModel
from utils.engine import ACCELERATOR_LOG_INTERVAL, LossMonitor, Trainer, TrainOptions, rescale
from utils.inference import to_float
from utils.optim import EarlyStopping, ModelEMA, OptimHyp, build_optimizer
from utils.training import build_trainer, restore_, training_state

OPTIMIZERS = ("SGD", "Adam", "AdamW")


def trainer_of(model: DetectionModel, optimizer: str = "SGD", **changes: Any) -> Trainer:
    """What train.py builds for a network on its device, for two epochs of three batches."""
    options = argparse.Namespace(
        imgsz=SIZE,
        epochs=2,
        batch_size=2,
        optimizer=optimizer,
        cos_lr=False,
        seed=0,
        multi_scale=False,
        compile=False,
        **changes,
    )
    loader: Any = type("Loader", (), {"__len__": lambda self: 3})()
    return build_trainer(model, loader, options, {})


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def one_step(trainer: Trainer) -> None:
    """Forward, loss, gradients put in by hand where backward would, the optimizer's step and the average."""
    batch, labels = to_float(images(), CUDA), targets().to(CUDA, non_blocking=True)
    loss, items = trainer.loss(batch, labels)
    assert devices((loss, items, trainer.scaler.scale(loss))) == {CUDA}
    for parameter in trainer.parameters:
        parameter.grad = torch.zeros_like(parameter)
    trainer.step_()
    assert all(parameter.grad is None for parameter in trainer.parameters)


@pytest.mark.parametrize(
    "optimizer", ["SGD", pytest.param("Adam", marks=pytest.mark.slow), pytest.param("AdamW", marks=pytest.mark.slow)]
)
def test_a_step_in_half_precision_never_waits_for_the_device(optimizer: str) -> None:
    model = network()
    with fake_cuda() as cuda:
        trainer = trainer_of(model.to(CUDA, memory_format=torch.channels_last), optimizer)
        assert trainer.dtype is torch.float16 and trainer.scaler.is_enabled()
        trainer.start_epoch_()
        one_step(trainer)  # the first one makes the optimizer's state
        cuda.waits.clear()
        one_step(trainer)
        state = trainer.optimizer.state_dict()["state"]
        assert devices([v for values in state.values() for v in values.values() if v is not None]) == {CUDA}
    assert cuda.waits == []
    assert trainer.ema is not None and trainer.ema.updates == 2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_takes_the_loss_scale_itself_on_cuda(name: str) -> None:
    """A kernel that does not would make the scaler read on the host whether a gradient overflowed."""
    model = small()
    with fake_cuda() as cuda:
        model.to(CUDA)
        cuda.waits.clear()
        optimizer = build_optimizer(model, name, OptimHyp(), 16)
        assert optimizer.defaults["fused"] and optimizer._step_supports_amp_scaling  # type: ignore[attr-defined]
        assert all(p.device == CUDA for group in optimizer.param_groups for p in group["params"])
    assert cuda.waits == []


@pytest.mark.parametrize("name", ["SGD", pytest.param("AdamW", marks=pytest.mark.slow)])
def test_a_run_begun_on_a_cpu_goes_on_with_the_kernels_of_cuda_and_the_other_way_round(name: str) -> None:
    """torch keeps the stored choice of kernels, and the CPU's end with an AssertionError under the loss scale."""
    begun, stopping = trainer_of(network(), name), EarlyStopping(10)
    for parameter in begun.parameters:
        parameter.grad = torch.zeros_like(parameter)
    begun.step_()
    state = training_state(begun, begun.model, stopping)
    model = network()
    with fake_cuda() as cuda:
        trainer = trainer_of(model.to(CUDA), name)
        restore_(trainer, stopping, state)
        assert [group["fused"] for group in trainer.optimizer.param_groups] == [True] * 3
        one_step(trainer)
        cuda.waits.clear()
        one_step(trainer)
        assert cuda.waits == []
        there = trainer.optimizer.state_dict()["param_groups"]
    restore_(begun, stopping, {**state, "optimizer": {**state["optimizer"], "param_groups": there}})
    assert [(group["fused"], group["foreach"]) for group in begun.optimizer.param_groups] == [(None, True)] * 3


def test_the_average_is_on_the_networks_device_and_is_updated_without_a_wait() -> None:
    model = small()
    with fake_cuda() as cuda:
        model.to(CUDA)
        cuda.waits.clear()
        ema = ModelEMA(model)
        assert devices(list(ema.ema.state_dict().values())) == {CUDA}
        ema.update()
    assert cuda.waits == []


def test_gradients_are_clipped_without_a_wait() -> None:
    parameters = [nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(5))]
    with fake_cuda() as cuda:
        moved = [nn.Parameter(p.to(CUDA)) for p in parameters]
        for parameter in moved:
            parameter.grad = torch.zeros_like(parameter)
        cuda.waits.clear()
        assert torch.nn.utils.clip_grad_norm_(moved, 10.0, foreach=True).device == CUDA
    assert cuda.waits == []


def test_multi_scale_resizes_on_the_device() -> None:
    options = TrainOptions(epochs=1, imgsz=SIZE, multi_scale=True)
    with fake_cuda() as cuda:
        batch = to_float(images(), CUDA)
        sizes = {rescale(batch, options, np.random.default_rng(seed)).shape[-1] for seed in range(8)}
        assert devices([rescale(batch, options, np.random.default_rng(seed)) for seed in range(8)]) == {CUDA}
    assert len(sizes) > 2 and cuda.waits == []


def test_the_loss_monitor_waits_once_per_interval() -> None:
    with fake_cuda() as cuda:
        monitor = LossMonitor(CUDA)
        items = torch.zeros(3, device=CUDA)
        for _ in range(ACCELERATOR_LOG_INTERVAL - 1):
            assert not monitor.add(items, ["a.jpg"], last=False)
        assert cuda.waits == []
        with pytest.raises(RuntimeError, match="numpy"):  # there are no values to read
            monitor.add(items, ["a.jpg"], last=False)
    assert cuda.waits == ["copy to the CPU in utils/engine.py:add"]
