"""The whole program on a simulated accelerator. Run by tests/test_accelerator.py, in a process of its own.

`python -m pytest tests/on_accelerator.py` runs it by hand.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simulated_accelerator as simulated
import torch
from conftest import TinyDataset
from test_dataloaders import STRONG, build
from test_engine import CLASSES, make_batch, micro_yaml
from test_train import check_resumed, quick, rows_of, weights_of

import detect
import train
import val
from models.checkpoints.files import load_model
from models.common import Gate
from models.gates.inspect import inspect_gates
from models.graph import layer_classes
from models.yolo import DetectionModel
from utils import device_cache, engine
from utils.dataloaders import LoaderOptions
from utils.device_cache import DeviceLoader
from utils.engine import EvalOptions, Trainer, TrainOptions, evaluate, train_one_epoch
from utils.images import read_image
from utils.inference import DetectOptions, Detector
from utils.loss import ComputeLoss, scale_gains
from utils.optim import ModelEMA, OptimHyp, Schedule, build_optimizer

DEVICE = torch.device("privateuseone", 0)  # its name before `register` gives it another: sim:0
CPU = torch.device("cpu")
SIZE = 64


@pytest.fixture(scope="session", autouse=True)
def device() -> Iterator[None]:
    """The device, known to torch before anything else happens, and by the name `sim` to the scripts."""
    kept = simulated.register()
    with pytest.MonkeyPatch.context() as patch:
        for script in (train, val, detect):
            choose = script.select_device
            patch.setattr(script, "select_device", lambda name, *a, c=choose: DEVICE if name == "sim" else c(name, *a))
        patch.setattr(engine, "native_bf16", lambda: False)  # the runs on the CPU to compare with: in fp32, too
        yield
    assert kept


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: TinyDataset) -> dict[str, argparse.Namespace]:
    """The same run of two epochs on both devices."""
    folder = tmp_path_factory.mktemp("runs")
    return {name: quick(folder, tiny_dataset, device=name, name=name, save_period=1) for name in ("cpu", "sim")}


def test_a_run_on_the_accelerator_ends_like_the_one_on_the_cpu(runs: dict[str, argparse.Namespace]) -> None:
    """Padding rows of the loss and summing in another order change the last bits only, which six steps let grow."""
    cpu, sim = (rows_of(run.save_dir) for run in runs.values())
    for ours, theirs in zip(sim, cpu, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    cpu_weights, sim_weights = (weights_of(run.save_dir / "weights/last.pt") for run in runs.values())
    for name, value in cpu_weights.items():
        torch.testing.assert_close(sim_weights[name], value, rtol=1e-2, atol=1e-3)


def test_a_run_goes_on_bit_for_bit_on_the_accelerator(runs: dict[str, argparse.Namespace], tmp_path: Path) -> None:
    check_resumed(runs["sim"].save_dir, tmp_path / "stopped")


def test_validation_and_detection_on_the_accelerator_find_what_the_cpu_finds(
    runs: dict[str, argparse.Namespace], tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    weights, found = str(runs["cpu"].best), {}
    common: dict[str, Any] = {"weights": weights, "imgsz": SIZE, "conf_thres": 0.001, "project": str(tmp_path)}
    for name in ("cpu", "sim"):
        summary, maps, _ = val.run(
            **common, data=str(tiny_dataset.yaml), device=name, name=f"val-{name}", workers=0, noplots=True
        )
        source = str(tiny_dataset.root / "images/val")
        detect.run(**common, source=source, device=name, name=name, nosave=True, save_txt=True, save_conf=True)
        labels = {file.name: np.loadtxt(file, ndmin=2) for file in (tmp_path / name / "labels").glob("*.txt")}
        found[name] = summary, maps, labels
    assert found["sim"][0] == pytest.approx(found["cpu"][0], abs=1e-6)
    np.testing.assert_allclose(found["sim"][1], found["cpu"][1], atol=1e-6)
    assert len(found["cpu"][2]) == len(tiny_dataset.val) and found["sim"][2].keys() == found["cpu"][2].keys()
    for name, rows in found["cpu"][2].items():
        np.testing.assert_allclose(found["sim"][2][name], rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flags", [{"augment": True}, {"save_hybrid": True, "single_cls": True}], ids=str)
def test_validation_with_other_flags_finds_on_the_accelerator_what_the_cpu_finds(
    flags: dict[str, Any], runs: dict[str, argparse.Namespace], tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    common = dict(data=str(tiny_dataset.yaml), imgsz=SIZE, workers=0, noplots=True, project=str(tmp_path), **flags)
    found = [val.run(weights=str(runs["cpu"].best), device=name, **common)[0] for name in ("cpu", "sim")]
    assert found[1] == pytest.approx(found[0], abs=1e-6)


@pytest.mark.parametrize(
    "flags", [{"augment": True, "classes": [1]}, {"visualize": True, "agnostic_nms": True}], ids=str
)
def test_detection_with_other_flags_finds_on_the_accelerator_what_the_cpu_finds(
    flags: dict[str, Any], runs: dict[str, argparse.Namespace], tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    source, weights = str(tiny_dataset.val[0]), [str(runs["cpu"].best)]
    weights = weights * 2 if "augment" in flags else weights  # an ensemble
    for name in ("cpu", "sim"):
        common = dict(
            weights=weights, source=source, device=name, name=name, project=str(tmp_path), imgsz=SIZE, **flags
        )
        detect.run(**common, conf_thres=0.001, save_txt=True, save_crop=True)
    ours, theirs = (sorted(file.name for file in (tmp_path / name).rglob("*.*")) for name in ("sim", "cpu"))
    assert ours == theirs and any(name.endswith(".txt") for name in ours)


def test_inference_warms_up_on_an_accelerator_and_not_on_a_cpu(runs: dict[str, argparse.Namespace]) -> None:
    for device, passes in ((CPU, 0), (DEVICE, 1)):
        model, seen = load_model(runs["cpu"].best, device), []
        model.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        Detector(model, DetectOptions()).warm_up((SIZE, SIZE))
        assert len(seen) == passes


def test_gates_are_inspected_on_the_accelerator_as_on_the_cpu(tiny_dataset: TinyDataset) -> None:
    torch.manual_seed(0)
    model = DetectionModel({**DetectionModel("yolov5n-se-last.yaml").yaml, "width_multiple": 0.0625})
    images = [read_image(file) for file in tiny_dataset.val]
    cpu, sim = (inspect_gates(model.to(device), images, SIZE)[0] for device in (CPU, DEVICE))
    np.testing.assert_allclose(sim.by_image, cpu.by_image, rtol=1e-4)
    assert (sim.saturated, sim.distance) == pytest.approx((cpu.saturated, cpu.distance), rel=1e-4)


# ----------------------------------------------------------------------------------------------------- a training step


def network() -> DetectionModel:
    torch.manual_seed(0)
    model = DetectionModel(micro_yaml(), nc=CLASSES)
    model.hyp = scale_gains({}, model.head.nl, CLASSES, SIZE)
    return model


def trainer_on(device: torch.device, optimizer: str = "SGD", batches: int = 3, **options: Any) -> Trainer:
    model = network().to(device, memory_format=torch.channels_last)
    hyp = OptimHyp(warmup_epochs=0, nominal_batch=4)
    settings = TrainOptions(epochs=2, imgsz=SIZE, progress=False, **options)
    return Trainer(
        model=model,
        optimizer=build_optimizer(model, optimizer, hyp, 4),
        schedule=Schedule(hyp, 2, batches, 4),
        compute_loss=ComputeLoss(model),
        device=device,
        options=settings,
        ema=ModelEMA(model),
    )


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW"])
def test_steps_on_the_accelerator_move_weights_and_average_like_those_on_the_cpu(optimizer: str) -> None:
    batches = [make_batch(4, seed) for seed in range(3)]
    results = []
    for device in (CPU, DEVICE):
        trainer = trainer_on(device, optimizer)
        losses = train_one_epoch(trainer, batches, 0)
        assert trainer.ema is not None
        results.append((losses, trainer.model.state_dict(), trainer.ema.ema.state_dict()))
        assert {value.device for state in results[-1][1:] for value in state.values()} == {device}
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=1e-4)
    if optimizer == "SGD":  # Adam divides by gradients that are next to nothing: their last bits decide
        for cpu, sim in zip(results[0][1:], results[1][1:], strict=True):
            for name, value in cpu.items():
                torch.testing.assert_close(sim[name].cpu(), value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("multi_scale", [False, True])
def test_an_epoch_waits_only_where_the_losses_are_read(multi_scale: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "ACCELERATOR_LOG_INTERVAL", 3)
    count = 5
    trainer = trainer_on(DEVICE, batches=count, multi_scale=multi_scale)
    batches = [make_batch(2, seed) for seed in range(count)]
    train_one_epoch(trainer, batches[:1], 0)  # the first step makes the optimizer's state
    simulated.WAITS.clear()
    train_one_epoch(trainer, batches, 0)
    assert simulated.WAITS == ["copy to the CPU in utils/engine.py:add"] * 2  # after three batches, and at the end


def test_batches_made_on_the_accelerator_are_those_made_on_the_cpu_and_wait_for_nothing(
    tiny_dataset: TinyDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_cache, "num_cpus", lambda: 1)
    options = LoaderOptions(imgsz=SIZE, batch_size=3, augment=True, hyp=STRONG, workers=0)
    _, dataset = build(tiny_dataset, imgsz=SIZE, batch_size=3, augment=True, hyp=STRONG, workers=0)
    ours, theirs = (DeviceLoader(dataset, options, device) for device in (DEVICE, CPU))
    trainer = trainer_on(DEVICE, batches=len(ours))
    train_one_epoch(trainer, ours, 0)  # the first step makes the optimizer's state
    simulated.WAITS.clear()
    train_one_epoch(trainer, ours, 1)
    assert simulated.WAITS == ["copy to the CPU in utils/engine.py:add"]  # at the end
    for batch, expected in zip(ours, theirs, strict=True):
        assert batch.images.device == DEVICE and torch.equal(batch.images.cpu(), expected.images)
        assert torch.equal(batch.targets, expected.targets)


def test_a_run_with_its_images_on_the_accelerator_ends_like_the_one_without(
    runs: dict[str, argparse.Namespace], tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    cached = quick(tmp_path, tiny_dataset, device="sim", cache="device")
    for ours, theirs in zip(rows_of(cached.save_dir), rows_of(runs["sim"].save_dir), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2, abs=1e-4)


def test_an_epoch_with_labels_and_without_them_has_finite_losses_and_gradients() -> None:
    batches = [make_batch(2), replace(make_batch(2), targets=torch.zeros(0, 6))]
    assert np.isfinite(train_one_epoch(trainer_on(DEVICE, batches=2), batches, 0)).all()


def test_a_loss_whose_constants_are_on_the_cpu_is_refused() -> None:
    """What CUDA's first step ended with."""
    trainer = trainer_on(DEVICE)
    assert isinstance(trainer.compute_loss, ComputeLoss)
    trainer.compute_loss.balance = trainer.compute_loss.balance.cpu()
    with pytest.raises(RuntimeError, match=r"aten\.mul.*expected all tensors on one device, found sim:0 and cpu"):
        train_one_epoch(trainer, [make_batch(2)], 0)


@pytest.mark.parametrize("name", sorted(n for n, c in layer_classes().items() if issubclass(c, Gate) and c is not Gate))
def test_every_gate_trains_on_the_accelerator_as_on_the_cpu(name: str) -> None:
    torch.manual_seed(0)
    ours = layer_classes()[name](32, 32, gain=2.0)
    theirs, x = copy.deepcopy(ours).to(DEVICE), torch.randn(2, 32, 6, 6)
    grads = []
    for gate, values in ((ours, x.clone()), (theirs, x.to(DEVICE))):
        values.requires_grad_()
        gate(values).square().sum().backward()
        grads.append([values.grad, *(p.grad for p in gate.parameters())])
    for cpu, sim in zip(*grads, strict=True):
        torch.testing.assert_close(sim.cpu(), cpu, rtol=1e-4, atol=1e-5)


def test_evaluation_waits_for_the_clocks_nms_and_the_results() -> None:
    model = network().to(DEVICE)
    simulated.WAITS.clear()
    result = evaluate(model, [make_batch(2)], EvalOptions(CLASSES, progress=False), compute_loss=ComputeLoss(model))
    assert result.seen == 2 and all(loss > 0 for loss in result.losses)
    files = {wait.rpartition(" in ")[2].partition(":")[0] for wait in simulated.WAITS}
    assert files == {"utils/runtime.py", "utils/nms.py", "utils/inference.py", "utils/engine.py", "utils/loss.py"}
    assert all("loss.py:__init__" in wait for wait in simulated.WAITS if "loss.py" in wait)
    clocks = [wait for wait in simulated.WAITS if "utils/runtime.py" in wait]
    assert clocks == ["synchronize sim:0 in utils/runtime.py:_now"] * 6
