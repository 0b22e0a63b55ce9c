"""Evaluation and training of one epoch, on small networks and on a network whose answers are known."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyDataset
from torch import Tensor, nn

from models.backends import PyTorch
from models.base import Output
from models.yolo import DetectionModel
from utils.boxes import Letterbox
from utils.config import UserError
from utils.data import prepare
from utils.dataloaders import Batch, LoaderOptions, build_loader
from utils.engine import (
    TABLE_HEADER,
    EvalOptions,
    LossMonitor,
    NonFiniteLoss,
    Trainer,
    TrainOptions,
    detections_to_draw,
    evaluate,
    labels_to_draw,
    native_bf16,
    rescale,
    table_rows,
    train_one_epoch,
)
from utils.inference import CPU_CHUNK, round_up, to_float
from utils.loss import ComputeLoss, scale_gains
from utils.optim import ModelEMA, OptimHyp, Schedule, build_optimizer

SIZE, CLASSES = 64, 3
QUIET = EvalOptions(num_classes=CLASSES, progress=False)
CPU = torch.device("cpu")


def make_batch(num_images: int, seed: int = 0, *, scale: float = 0.5) -> Batch:
    """Random images with two labels each, class 0 left and class 1 or 2 right; the files are 1 / `scale` as big."""
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(0, 256, (num_images, 3, SIZE, SIZE), dtype=np.uint8))
    rows = []
    for i in range(num_images):
        rows.append([i, 0, 0.25, 0.5, *rng.uniform(0.2, 0.4, 2)])
        rows.append([i, 1 + i % 2, 0.75, 0.5, *rng.uniform(0.2, 0.4, 2)])
    fitted = Letterbox(scale, (0.0, 0.0), (round(SIZE / scale), round(SIZE / scale)), (SIZE, SIZE))
    targets = torch.tensor(rows, dtype=torch.float32)
    return Batch(images, targets, [fitted] * num_images, [f"{i}.png" for i in range(num_images)], [*range(num_images)])


class Oracle(nn.Module):
    """Answers with the labels of the batches it was told about, in the order in which it will see the images."""

    def __init__(
        self, batches: Sequence[Batch], *, shift: float = 0.0, wrong_class: bool = False, confidence: float = 0.9
    ) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))  # evaluation asks a parameter for the device
        self.names, self.num_masks, self.stride = dict.fromkeys(range(CLASSES), "x"), 0, torch.tensor([32.0])
        self.shift, self.wrong_class, self.confidence = shift, wrong_class, confidence
        self.answers: Iterator[Tensor] = iter([self._answer(batch, i) for batch in batches for i in range(len(batch))])

    def _answer(self, batch: Batch, index: int) -> Tensor:
        rows = batch.targets[batch.targets[:, 0] == index]
        answer = torch.zeros(len(rows), 5 + CLASSES)
        answer[:, :4] = rows[:, 2:] * SIZE
        answer[:, 0] += self.shift
        answer[:, 4] = self.confidence
        wanted = (rows[:, 1].long() + self.wrong_class) % CLASSES
        answer[torch.arange(len(rows)), 5 + wanted] = 1.0
        return answer

    def forward(self, images: Tensor, **options: Any) -> Output:
        return Output(torch.stack([next(self.answers) for _ in images]))


def test_perfect_answers_get_full_marks_whatever_the_batch_size() -> None:
    results = []
    for sizes in ((6,), (1, 5), (2, 2, 2), (CPU_CHUNK + 2,)):
        batches = [make_batch(n, seed) for seed, n in enumerate(sizes)]
        result = evaluate(Oracle(batches), batches, replace(QUIET, confusion=True))
        assert result.seen == sum(sizes)
        assert result.summary == pytest.approx((1.0, 1.0, 0.995, 0.995, 0, 0, 0), abs=1e-6)
        assert result.confusion is not None and np.trace(result.confusion.matrix) == 2 * sum(sizes)
        results.append(result)
    assert results[0].fitness == pytest.approx(0.995)


def test_answers_of_the_wrong_class_or_place_count_for_nothing() -> None:
    batches = [make_batch(4)]
    for oracle in (Oracle(batches, wrong_class=True), Oracle(batches, shift=30.0)):
        assert evaluate(oracle, batches, QUIET).ap.map50 == 0.0
    # classes do not matter where all are one
    oracle = Oracle(batches, wrong_class=True)
    one = evaluate(oracle, [_as_one_class(batches[0])], replace(QUIET, num_classes=1, single_cls=True))
    assert one.ap.map50 == pytest.approx(0.995)


def _as_one_class(batch: Batch) -> Batch:
    targets = batch.targets.clone()
    targets[:, 1] = 0
    return replace(batch, targets=targets)


def test_detections_and_labels_are_handed_out_in_pixels_of_the_file() -> None:
    batches = [make_batch(3)]
    images = []
    evaluate(Oracle(batches), batches, QUIET, on_image=images.append)
    assert [image.path for image in images] == batches[0].paths
    for index, image in enumerate(images):
        rows = batches[0].targets[batches[0].targets[:, 0] == index]
        wanted_xy = (rows[:, 2:4] - rows[:, 4:6] / 2) * 2 * SIZE
        torch.testing.assert_close(image.truth[:, 1:3], wanted_xy)
        order = image.detections[:, 0].argsort()
        torch.testing.assert_close(image.detections[order, :2], wanted_xy, rtol=1e-4, atol=1e-3)
        assert image.shape_hw == (2 * SIZE, 2 * SIZE)


def test_boxes_for_pictures_stay_in_pixels_of_the_batch_and_leave_out_unsure_ones() -> None:
    batch = make_batch(2)
    labels = labels_to_draw(batch)
    assert [len(rows) for rows in labels] == [2, 2]
    assert float(labels[0][:, 1:].max()) <= SIZE
    detections = [torch.tensor([[1.0, 2, 3, 4, 0.9, 2], [1, 2, 3, 4, 0.2, 1]]), torch.zeros(0, 6)]
    drawn = detections_to_draw(detections)
    assert drawn[0].tolist() == [[2.0, 1.0, 2.0, 3.0, 4.0, pytest.approx(0.9)]] and len(drawn[1]) == 0


def test_labels_that_join_as_detections_are_found_with_certainty() -> None:
    batches = [make_batch(2)]
    silent = Oracle(batches, shift=500.0)
    images = []
    result = evaluate(silent, batches, replace(QUIET, hybrid=True), on_image=images.append)
    assert result.ap.map50 == pytest.approx(0.995)
    assert all(float(image.detections[:, 4].max()) == 1.0 for image in images)


def test_an_image_without_labels_or_detections_is_seen_and_changes_nothing() -> None:
    batch = make_batch(3)
    targets = batch.targets[batch.targets[:, 0] != 1]
    batch = replace(batch, targets=targets)
    answers = itertools.cycle([targets[targets[:, 0] == i] for i in range(3)])  # however many images a pass takes

    class Model(Oracle):
        def forward(self, images: Tensor, **options: Any) -> Output:
            out = torch.zeros(len(images), 2, 5 + CLASSES)
            for i, rows in zip(range(len(images)), answers):
                out[i, : len(rows), :4] = rows[:, 2:] * SIZE
                out[i, : len(rows), 4] = 0.9
                out[i, torch.arange(len(rows)), 5 + rows[:, 1].long()] = 1.0
            return Output(out)

    result = evaluate(Model([]), [batch], QUIET)
    assert (result.seen, int(result.ap.instances.sum())) == (3, 4)
    assert result.ap.map50 == pytest.approx(0.995)
    empty = evaluate(Model([]), [replace(batch, targets=torch.zeros(0, 6))], QUIET)
    assert empty.summary == (0.0,) * 7


def test_classes_without_labels_get_the_mean_in_maps() -> None:
    batch = make_batch(1)  # classes 0 and 1
    result = evaluate(Oracle([batch]), [batch], QUIET)
    np.testing.assert_allclose(result.maps, [0.995] * 3, atol=1e-6)


def test_an_ensemble_puts_the_candidates_of_its_members_together() -> None:
    batches = [make_batch(2)]
    wrong, right = Oracle(batches, shift=500.0, confidence=0.3), Oracle(batches)
    assert evaluate(PyTorch([wrong, right]), batches, QUIET).ap.map50 == pytest.approx(0.995)


def test_the_table_has_a_row_per_class_with_labels_in_upstreams_columns() -> None:
    batch = make_batch(3)
    result = evaluate(Oracle([batch]), [batch], QUIET)
    rows = table_rows(result, {0: "cat", 1: "dog", 2: "a long name of a class"}, per_class=True)
    assert TABLE_HEADER.split() == ["Class", "Images", "Instances", "P", "R", "mAP50", "mAP50-95"]
    assert all(len(row) == len(TABLE_HEADER) == 22 + 6 * 11 for row in rows)
    assert [row[:22].strip() for row in rows] == ["all", "cat", "dog", "a long name of a class"]
    assert rows[0].split() == ["all", "3", "6", "1", "1", "0.995", "0.995"]
    assert len(table_rows(result, {}, per_class=False)) == 1


# ------------------------------------------------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def network() -> DetectionModel:
    """A network of yolov5n's shape with 8 to 16 channels."""
    torch.manual_seed(0)
    model = DetectionModel(micro_yaml(), nc=CLASSES)
    model.hyp = scale_gains({}, model.head.nl, CLASSES, SIZE)
    return model


def micro_yaml() -> dict:
    yaml = copy.deepcopy(DetectionModel("yolov5n.yaml").yaml)
    yaml.update(width_multiple=0.03, depth_multiple=0.33, nc=CLASSES)
    return yaml


def make_trainer(model: DetectionModel, *, batches: int = 3, batch_size: int = 4, **options: object) -> Trainer:
    hyp = OptimHyp(warmup_epochs=0)
    settings = {"epochs": 2, "imgsz": SIZE, "progress": False, **options}
    return Trainer(
        model=model,
        optimizer=build_optimizer(model, "SGD", hyp, batch_size),
        schedule=Schedule(hyp, 2, batches, batch_size),
        compute_loss=ComputeLoss(model),
        device=CPU,
        options=TrainOptions(**settings),
        ema=ModelEMA(model),
    )


def training_batches(count: int = 3, size: int = 4) -> list[Batch]:
    return [make_batch(size, seed) for seed in range(count)]


def test_evaluation_averages_the_loss_over_batches_and_chunks_do_not_change_it(network: DetectionModel) -> None:
    model, batches = copy.deepcopy(network), [make_batch(CPU_CHUNK + 3, seed) for seed in range(2)]
    compute = ComputeLoss(model)
    result = evaluate(model, batches, QUIET, compute_loss=compute)
    model.eval()
    with torch.no_grad():
        wanted = sum(compute(model(to_float(b.images, CPU))[1], b.targets)[1] for b in batches) / 2
    torch.testing.assert_close(torch.tensor(result.losses), wanted, rtol=1e-4, atol=1e-6)
    assert all(time > 0 for time in result.times_ms)


def test_accumulated_batches_step_like_one_large_batch(network: DetectionModel) -> None:
    """Two batches, one step: the gradients add up, are clipped together and move the weights once."""
    batches = training_batches(2)
    model = copy.deepcopy(network)
    trainer = make_trainer(model, batches=2)
    assert trainer.schedule.steps_in(0) == [False, True]
    train_one_epoch(trainer, batches, 0)

    wanted = copy.deepcopy(network).train()
    optimizer = build_optimizer(wanted, "SGD", OptimHyp(warmup_epochs=0), 4)
    compute = ComputeLoss(wanted)
    for batch in batches:
        compute(wanted(to_float(batch.images, CPU)), batch.targets)[0].backward()
    torch.nn.utils.clip_grad_norm_(wanted.parameters(), 10.0)
    optimizer.step()
    for (name, value), other in zip(model.named_parameters(), wanted.parameters()):
        torch.testing.assert_close(value, other, msg=lambda text, name=name: f"{name}: {text}")
    assert trainer.ema is not None and trainer.ema.updates == 1


def test_the_epochs_losses_are_the_mean_of_the_batches(network: DetectionModel) -> None:
    model, seen = copy.deepcopy(network), []
    trainer = make_trainer(model)
    compute = trainer.compute_loss

    def recording(predictions: list[Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        total, items = compute(predictions, targets)
        seen.append(items.clone())
        return total, items

    trainer.compute_loss = recording
    losses = train_one_epoch(trainer, training_batches(), 0)
    np.testing.assert_allclose(losses, torch.stack(seen).double().mean(0).numpy(), rtol=1e-6)


def test_frozen_layers_keep_their_weights_and_their_statistics(network: DetectionModel) -> None:
    model = copy.deepcopy(network)
    frozen = list(model.model[:5])
    for layer in frozen:
        layer.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    trainer = make_trainer(model)
    trainer.frozen = frozen
    train_one_epoch(trainer, training_batches(), 0)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert not {k for k in changed if int(k.split(".")[1]) < 5}
    assert {"model.5.conv.weight", "model.5.bn.running_mean"} <= changed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_the_images_and_leaves_the_weights_alone(
    network: DetectionModel, value: float
) -> None:
    model = copy.deepcopy(network)
    trainer = make_trainer(model, batches=2)
    compute, calls = trainer.compute_loss, []

    def broken(predictions: list[Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(1)
        total, items = compute(predictions, targets)
        return (total, items) if len(calls) == 1 else (total * value, items * value)

    trainer.compute_loss = broken
    batches = training_batches(2)
    batches[1] = replace(batches[1], paths=["a/bad.jpg", "b/worse.jpg", "c.jpg", "d.jpg"])
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(NonFiniteLoss, match=r"a/bad\.jpg, b/worse\.jpg, c\.jpg, d\.jpg"):
        train_one_epoch(trainer, batches, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_an_accelerators_losses_are_read_once_per_interval_and_still_name_the_right_batch() -> None:
    monitor = LossMonitor(torch.device("meta"))  # any device that is not the CPU
    good, bad = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    reads = [monitor.add(good * i, [f"{i}.jpg"], last=False) for i in range(monitor.interval)]
    assert reads == [False] * (monitor.interval - 1) + [True]
    assert monitor.mean == pytest.approx(np.full(3, (monitor.interval - 1) / 2))
    assert not monitor.add(good, ["fine.jpg"], last=False)
    assert not monitor.add(bad, ["broken.jpg"], last=False)
    with pytest.raises(NonFiniteLoss, match=r"obj nan.*broken\.jpg"):
        monitor.add(good, ["later.jpg"], last=True)


def test_multi_scale_sizes_depend_on_seed_epoch_and_batch_only() -> None:
    options = TrainOptions(epochs=1, imgsz=320, multi_scale=True)
    images = torch.rand(1, 3, 320, 320)
    sizes = [rescale(images, options, np.random.default_rng((0, 0, i))).shape[-2:] for i in range(60)]
    again = [rescale(images, options, np.random.default_rng((0, 0, i))).shape[-2:] for i in range(60)]
    assert sizes == again
    assert all(h == w and h % 32 == 0 and 160 <= h <= 480 for h, w in sizes)
    assert len(set(sizes)) > 5 and min(sizes)[0] < 224 and max(sizes)[0] > 416


def test_multi_scale_keeps_the_shape_of_rectangular_batches() -> None:
    options = TrainOptions(epochs=1, imgsz=320, multi_scale=True)
    for i in range(20):
        height, width = rescale(torch.rand(1, 3, 192, 320), options, np.random.default_rng(i)).shape[-2:]
        assert height % 32 == width % 32 == 0 and height <= width


def test_images_travel_as_bytes_and_arrive_as_numbers_in_channels_last() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 4).contiguous()
    floats = to_float(images, CPU)
    assert floats.dtype == torch.float32 and floats.is_contiguous(memory_format=torch.channels_last)
    assert floats[0, :, 0, 0].tolist() == pytest.approx([0.0, 0.2, 1.0])
    assert images.dtype == torch.uint8


@pytest.mark.parametrize(("asked", "wanted"), [(640, 640), (641, 672), (1, 32), (100, 128)])
def test_sizes_are_rounded_up_to_the_stride_with_a_warning(asked: int, wanted: int, said: list[str]) -> None:
    assert round_up(asked, 32) == wanted
    assert (f"using {wanted}" in "".join(said)) == (asked != wanted)
    assert round_up(32, 32, floor=64) == 64


def test_an_image_size_that_no_memory_holds_is_refused() -> None:
    assert round_up(16_384, 32) == 16_384
    with pytest.raises(UserError, match="--imgsz 16385: expected at most 16384 pixels"):
        round_up(16_385, 32)


def test_lower_precision_follows_the_processors_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    from utils import engine, runtime

    for text, native in (("flags : fpu avx512_bf16 sse", True), ("flags: amx_bf16", False), ("flags : avx2", False)):
        monkeypatch.setattr(runtime.Path, "read_text", lambda self, text=text, **_: text)
        assert native_bf16() == (native or " amx_bf16" in text)
    monkeypatch.setattr(engine, "native_bf16", lambda: True)
    assert engine.autocast_dtype(CPU) is torch.bfloat16
    monkeypatch.setattr(engine, "native_bf16", lambda: False)
    assert engine.autocast_dtype(CPU) is None
    assert engine.autocast_dtype(torch.device("cuda")) is torch.float16


def test_bf16_training_moves_the_weights_like_fp32_does(network: DetectionModel) -> None:
    losses = []
    for dtype in (None, torch.bfloat16):
        trainer = make_trainer(copy.deepcopy(network))
        trainer.dtype = dtype
        losses.append(train_one_epoch(trainer, training_batches(), 0))
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.05)


def test_evaluation_of_a_real_loader_counts_every_image_and_label(
    network: DetectionModel, tiny_dataset: TinyDataset
) -> None:
    spec = prepare(tiny_dataset.yaml, task="val")
    options = LoaderOptions(imgsz=SIZE, batch_size=3, rect=True, pad=0.5, workers=0)
    loader, _ = build_loader(spec, spec.val, options)
    result = evaluate(copy.deepcopy(network), loader, QUIET)
    assert (result.seen, int(result.ap.instances.sum())) == (4, 8)
