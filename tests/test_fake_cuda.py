"""Networks, test-time augmentation, the loss and the way up to NMS on a CUDA device that has no data (fake_cuda.py).

Every test says which waits of the host for the device it allows; where it says nothing, there are none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fake_cuda import CUDA, fake_cuda
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from models.backends import PyTorch
from models.common import Conv, Gate
from models.graph import layer_classes
from models.yolo import DetectionModel, build_model
from utils.boxes import Letterbox
from utils.config import ROOT
from utils.dataloaders import Batch
from utils.inference import DetectOptions, Detector, to_float
from utils.loss import ComputeLoss, _Pick, assign_targets, scale_gains

SIZE, CLASSES = 128, 4
# Three levels of strides 8, 16 and 32 in as few rows as there can be: for all that does not depend on the layers.
SMALL: dict[str, Any] = {
    "nc": CLASSES,
    "depth_multiple": 1.0,
    "width_multiple": 1.0,
    "anchors": [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119], [116, 90, 156, 198, 373, 326]],
    "backbone": [[-1, 1, "Conv", [8, 3, 2]], *([-1, 1, "Conv", [8, 3, stride]] for stride in (4, 2, 2))],
    "head": [[[1, 2, 3], 1, "Detect", ["nc", "anchors"]]],
}


def narrow(file: Path) -> dict[str, Any]:
    """A network's YAML with few channels and one repeat; it has the same rows in all its sizes."""
    text = file.read_text(encoding="utf-8")
    data, width = yaml.safe_load(text), 0.25 if "C3SE" in text else 0.125  # SE divides the channels inside by 16
    return {**data, "width_multiple": width, "depth_multiple": 0.1, "nc": CLASSES}


def families() -> list[Any]:
    """One file of every kind of network below models/: sizes of the same rows count once."""
    found: dict[str, Path] = {}
    for file in sorted((ROOT / "models").rglob("yolo*.yaml")):
        found.setdefault(repr(narrow(file)), file)
    quick = "yolov5s-se-last.yaml"
    return [pytest.param(f, id=f.stem, marks=() if f.name == quick else pytest.mark.slow) for f in found.values()]


def targets(count: int = 7) -> Tensor:
    rows = torch.rand(count, 6, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.3
    rows[:, :2] = rows[:, :2].round()
    return rows


def images(batch: int = 2) -> Tensor:
    return torch.zeros(batch, 3, SIZE, SIZE, dtype=torch.uint8)


def devices(value: Any) -> set[torch.device]:
    """Where all tensors of a nested result are."""
    if isinstance(value, Tensor):
        return {value.device}
    return set().union(*(devices(item) for item in value if item is not None))


@pytest.mark.slow
@pytest.mark.parametrize("file", families())
def test_every_network_trains_and_infers_on_the_device_as_it_is_and_fused(file: Path) -> None:
    training, fused = build_model(narrow(file)), build_model(narrow(file)).eval().fuse()
    with fake_cuda() as cuda:
        for model in (training, fused):
            model.to(CUDA, memory_format=torch.channels_last)
        cuda.waits.clear()  # moving the weights waits
        batch = to_float(images(), CUDA)
        with torch.autocast("cuda", torch.float16):
            assert devices(training(batch)) == {CUDA}
        with torch.inference_mode():
            for model in (training.eval(), fused):
                first, again = model(batch), model(batch)
                assert devices(first) == devices(again) == {CUDA}
                assert first[0].shape[-1] == model.head.no
    assert cuda.waits == []


def gates() -> list[str]:
    return sorted(name for name, layer in layer_classes().items() if issubclass(layer, Gate) and layer is not Gate)


@pytest.mark.parametrize("name", gates())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_gate_runs_on_the_device_in_both_modes_and_folded(name: str, dtype: torch.dtype) -> None:
    gate = layer_classes()[name](64, 64, gain=2.0).to(dtype)
    with fake_cuda() as cuda:
        gate.to(CUDA)
        cuda.waits.clear()
        maps = torch.zeros(2, 64, 8, 8, device=CUDA, dtype=dtype)
        found = [gate(maps), gate.eval()(maps)]
        for part in gate.modules():
            if isinstance(part, Conv):
                part.fuse_()
        found.append(gate(maps))
        assert devices(found) == {CUDA} and {out.dtype for out in found} == {dtype}
    assert cuda.waits == []


def network(**hyp: float) -> DetectionModel:
    model = DetectionModel(SMALL)
    model.hyp = scale_gains(hyp, model.head.nl, CLASSES, SIZE)
    return model


def test_test_time_augmentation_runs_on_the_device() -> None:
    model = network().eval()
    with fake_cuda() as cuda:
        model.to(CUDA)
        cuda.waits.clear()
        with torch.inference_mode():
            found, nothing = model(to_float(images(), CUDA), augment=True)
        assert found.device == CUDA and found.shape[::2] == (2, 5 + CLASSES) and nothing is None
    assert cuda.waits == []


@pytest.mark.parametrize("half", [False, True])
def test_images_become_numbers_on_the_device(half: bool) -> None:
    dtype = torch.float16 if half else torch.float32
    with fake_cuda() as cuda:
        batch = to_float(images(), CUDA, dtype)
        assert (batch.device, batch.dtype) == (CUDA, dtype)
        assert batch.is_contiguous(memory_format=torch.channels_last)
    assert cuda.waits == []


# ---------------------------------------------------------------------------------------------------------------- loss


def balancing_loss(model: DetectionModel) -> ComputeLoss:
    """A loss with autobalance; for it the strides are read once, and only those on the CPU have values here."""
    model.head.stride = model.stride
    return ComputeLoss(model, autobalance=True)


@pytest.mark.parametrize("changed", [False, True], ids=["defaults", "fl_gamma, autobalance"])
def test_the_loss_is_made_and_taken_on_the_device(changed: bool) -> None:
    model = network(**({"fl_gamma": 1.5, "label_smoothing": 0.1} if changed else {}))
    with fake_cuda() as cuda:
        model.to(CUDA)
        compute_loss = balancing_loss(model) if changed else ComputeLoss(model)
        predictions, labels = model(to_float(images(), CUDA)), targets().to(CUDA, non_blocking=True)
        cuda.waits.clear()  # making the loss copies its constants to the device
        for rows in (labels, labels[:0]):
            total, items = compute_loss(predictions, rows)
            assert (total.device, items.device, compute_loss.balance.device) == (CUDA,) * 3
            assert total.requires_grad and not items.requires_grad
    assert cuda.waits == []


def test_the_loss_of_one_class_is_taken_on_the_device() -> None:
    model = DetectionModel({**SMALL, "nc": 1})
    model.hyp = scale_gains({}, model.head.nl, 1, SIZE)
    with fake_cuda() as cuda:
        compute_loss = ComputeLoss(model.to(CUDA))
        predictions, labels = model(to_float(images(), CUDA)), targets().to(CUDA, non_blocking=True)
        cuda.waits.clear()
        assert devices(compute_loss(predictions, labels)) == {CUDA}
    assert cuda.waits == []


def test_everything_the_loss_keeps_is_on_the_device_of_the_head() -> None:
    model = network()
    with fake_cuda():
        compute_loss = balancing_loss(model.to(CUDA))
        kept = {name: value.device for name, value in vars(compute_loss).items() if isinstance(value, Tensor)}
    assert set(kept) == {"anchors", "balance", "_positive_weights"} and set(kept.values()) == {CUDA}


def test_targets_are_assigned_without_a_wait_and_with_one_a_level_where_rows_are_left_out() -> None:
    with fake_cuda() as cuda:
        labels, anchors = torch.zeros(7, 6, device=CUDA), torch.ones(3, 3, 2, device=CUDA)
        padded = assign_targets(labels, [(16, 16), (8, 8), (4, 4)], anchors, 4.0, compact=False)
        assert all(devices(vars(level).values()) == {CUDA} and len(level.valid) == 5 * 3 * 7 for level in padded)
        assert cuda.waits == []
        with pytest.raises(DynamicOutputShapeException):
            assign_targets(labels, [(16, 16)], anchors[:1], 4.0)
        assert cuda.waits == ["nonzero in utils/loss.py:_assign_level"]


def test_picking_rows_needs_the_cells_on_the_device() -> None:
    with fake_cuda() as cuda:
        level = torch.zeros(2, 3, 8, 8, 9, device=CUDA, requires_grad=True)
        rows, objectness = _Pick.apply(level, torch.zeros(5, dtype=torch.long, device=CUDA))
        assert devices((rows, objectness)) == {CUDA} and (rows.shape, len(objectness)) == ((5, 9), 2 * 3 * 8 * 8)
        assert cuda.waits == []
        _Pick.apply(level, torch.zeros(5, dtype=torch.long))
        assert cuda.waits == ["index from the CPU in utils/loss.py:forward"]


# ---------------------------------------------------------------------------------------------------------- up to NMS


def batch_of(count: int = 2) -> Batch:
    letterboxes = [Letterbox(1.0, (0.0, 0.0), (SIZE, SIZE), (SIZE, SIZE))] * count
    return Batch(images(count), targets(), letterboxes, ["a.jpg"] * count, [*range(count)])


CLOCKED = ["synchronize cuda:0 in utils/runtime.py:_now"] * 5  # around pre-processing and inference, and before NMS


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("augment", [False, True])
def test_inference_waits_for_its_clocks_only_until_nms_reads_the_predictions(half: bool, augment: bool) -> None:
    model = network().eval().fuse()
    model = model.half() if half else model
    with fake_cuda() as cuda, torch.inference_mode():
        detector = Detector(PyTorch([model.to(CUDA)]), DetectOptions(augment=augment), keep_raw=not augment)
        assert detector.device == CUDA and detector.dtype == (torch.float16 if half else torch.float32)
        cuda.waits.clear()
        detector.warm_up((SIZE, SIZE))
        assert cuda.waits == []
        with pytest.raises(DynamicOutputShapeException):  # how many boxes pass depends on values
            detector(images())
    after = cuda.waits[len(CLOCKED) :]
    assert cuda.waits[: len(CLOCKED)] == CLOCKED
    assert after[0] == "nonzero in utils/nms.py:non_max_suppression" and after[1:] in ([], CLOCKED[:1])


# --------------------------------------------------------------------------------------------------- the device itself


def test_the_device_refuses_tensors_of_the_cpu_and_counts_what_waits() -> None:
    with fake_cuda() as cuda:
        there, here = torch.zeros(4, device=CUDA), torch.ones(4)
        with pytest.raises(RuntimeError, match=r"two (different )?devices"):
            there + here
        assert cuda.waits == [] and here.sum().item() == 4  # the CPU's tensors have values
        there.to("cpu")
        here.to(CUDA)
        torch.tensor([1, 2], device=CUDA)
        for reads in (lambda: there.sum().item(), lambda: bool(there.any()), lambda: there[there > 0]):
            with pytest.raises((RuntimeError, DynamicOutputShapeException)):
                reads()
        kinds = [wait.rpartition(" in ")[0] for wait in cuda.waits]
    assert kinds[:3] == ["copy to the CPU", "blocking copy to the device", "blocking copy to the device"]
    assert kinds[3:6] == ["_local_scalar_dense", "_local_scalar_dense", "mask as index"]


def test_a_layer_that_stays_behind_is_found() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with fake_cuda():
        model[0].to(CUDA)
        with pytest.raises(RuntimeError, match=r"two (different )?devices"):
            model(torch.zeros(2, 3, 8, 8, device=CUDA))
