"""Batches: rectangular shapes, the way back to the file, and samples that depend on (seed, epoch, index) alone."""

from __future__ import annotations

import logging
import multiprocessing
import re
import threading
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import TinyDataset
from utils.boxes import cxcywhn_to_xyxy, undo_letterbox
from utils.config import UserError
from utils.data import prepare
from utils.dataloaders import (
    Batch,
    BatchOrder,
    ImageDataset,
    Loader,
    LoaderOptions,
    build_loader,
    num_workers,
    rect_order,
    rect_shapes,
    wanted_workers,
)
from utils.images import ImageError, read_image

STRONG = dict(mosaic=0.7, mixup=0.5, degrees=10, scale=0.5, translate=0.1, shear=2, perspective=0.0005, flipud=0.5)
TRAIN: dict[str, Any] = dict(imgsz=64, batch_size=3, augment=True, shuffle=True, hyp=STRONG)


def build(data: TinyDataset, task: str = "train", **options: Any) -> tuple[Loader, ImageDataset]:
    spec = prepare(data.yaml, task=task)
    return build_loader(spec, spec.split(task), LoaderOptions(**options))


def same(a: Batch, b: Batch) -> bool:
    return (
        torch.equal(a.images, b.images)
        and torch.equal(a.targets, b.targets)
        and (a.paths, a.indices, a.letterboxes) == (b.paths, b.indices, b.letterboxes)
    )


# --- rectangular batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratios", "pad", "shapes"),
    (
        ((1.0, 1.0), 0.5, [(672, 672)]),
        ((0.75, 0.75), 0.5, [(512, 672)]),
        ((0.6, 0.75), 0.5, [(512, 672)]),
        ((4 / 3, 1.5), 0.5, [(672, 512)]),
        ((0.75, 1.5), 0.5, [(672, 672)]),
        ((0.75, 0.75), 0.0, [(480, 640)]),
        ((0.5, 0.5, 2.0), 0.0, [(320, 640), (640, 320)]),
    ),
)
def test_rectangular_shapes_are_those_of_yolov5(
    ratios: tuple[float, ...], pad: float, shapes: list[tuple[int, int]]
) -> None:
    assert rect_shapes(np.array(ratios), 2, LoaderOptions(imgsz=640, batch_size=2, pad=pad)) == shapes


def test_rectangular_batches_hold_every_image_once_in_order_of_aspect_ratio(tiny_dataset: TinyDataset) -> None:
    loader, dataset = build(tiny_dataset, imgsz=64, batch_size=4, rect=True, pad=0.5, workers=0)
    batches = list(loader)
    assert [tuple(batch.images.shape) for batch in batches] == [(4, 3, 64, 96), (4, 3, 96, 64)]
    names = [Path(path).name for batch in batches for path in batch.paths]
    assert names == [f"train{i}.png" for i in (0, 2, 4, 6, 1, 3, 5, 7)], "images of equal shape keep their order"
    assert [i for batch in batches for i in batch.indices] == list(range(8)) and len(dataset) == 8


def test_of_equal_ratios_the_larger_image_comes_first_and_the_rest_keep_their_order() -> None:
    shapes_hw = np.array(((50, 50), (30, 40), (60, 80), (20, 40), (60, 80)))
    assert rect_order(shapes_hw).tolist() == [3, 2, 4, 1, 0]


def test_rect_and_shuffle_together_keep_the_order_and_say_so(
    tiny_dataset: TinyDataset, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("yolov5"), "propagate", True)
    loader, _ = build(tiny_dataset, **{**TRAIN, "rect": True, "workers": 0})
    assert "not shuffled" in caplog.text
    assert [i for batch in loader for i in batch.indices] == list(range(8))


# --- from the batch back to the file ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rect", (True, False))
@pytest.mark.parametrize("imgsz", (64, 128, 160))
def test_targets_lead_back_to_the_labels_in_the_file(rect: bool, imgsz: int, tiny_dataset: TinyDataset) -> None:
    loader, dataset = build(tiny_dataset, "val", imgsz=imgsz, batch_size=3, rect=rect, pad=0.5, workers=0)
    seen = 0
    for batch in loader:
        height, width = batch.images.shape[2:]
        for number, (fitted, index) in enumerate(zip(batch.letterboxes, batch.indices)):
            assert fitted is not None and fitted.size_hw == (height, width)
            original_h, original_w = dataset.shapes_hw[index].tolist()
            assert fitted.original_hw == (original_h, original_w)
            assert fitted.scale == pytest.approx(imgsz / max(original_h, original_w), rel=0.02)
            rows = batch.targets[batch.targets[:, 0] == number]
            back = undo_letterbox(cxcywhn_to_xyxy(rows[:, 2:], width, height), fitted).numpy()
            labels = dataset.labels_list[index]
            assert np.array_equal(rows[:, 1].numpy(), labels[:, 0])
            assert np.abs(back - cxcywhn_to_xyxy(labels[:, 1:], original_w, original_h)).max() < 1
            seen += 1
    assert seen == 4


def test_the_scale_is_that_of_the_height_when_the_width_was_rounded_up(own_tiny_dataset: TinyDataset) -> None:
    for file in own_tiny_dataset.val:
        cv2.imwrite(str(file), np.zeros((101, 77, 3), np.uint8))
    loader, _ = build(own_tiny_dataset, "val", imgsz=64, batch_size=1, workers=0)
    fitted = next(iter(loader)).letterboxes[0]
    assert fitted is not None and fitted.scale == 64 / 101
    assert fitted.pad_xy == (7.5, 0.0), "77 * 64 / 101 = 48.8 pixels are rounded up to 49"


def test_images_arrive_as_rgb_planes_on_grey(tiny_dataset: TinyDataset) -> None:
    loader, _ = build(tiny_dataset, "val", imgsz=128, batch_size=4, workers=0)
    batch = next(iter(loader))
    assert batch.images.dtype == torch.uint8 and batch.images.is_contiguous() and len(batch) == 4
    for image, path, fitted in zip(batch.images, batch.paths, batch.letterboxes):
        assert fitted is not None
        x, y = (int(pad) for pad in fitted.pad_xy)
        file = read_image(path)
        inner = image[:, y : y + file.shape[0], x : x + file.shape[1]].permute(1, 2, 0).numpy()
        assert np.array_equal(inner, file[..., ::-1])
        assert (image[:, :y] == 114).all() and (image[:, :, :x] == 114).all()


def test_targets_are_grouped_by_image_and_lie_in_0_to_1(tiny_dataset: TinyDataset) -> None:
    loader, _ = build(tiny_dataset, **{**TRAIN, "workers": 0})
    for epoch in range(4):
        loader.set_epoch(epoch)
        for batch in loader:
            assert batch.targets.shape[1] == 6 and batch.targets.dtype == torch.float32
            numbers = batch.targets[:, 0]
            assert (numbers.diff() >= 0).all() and (numbers < len(batch)).all()
            corners = cxcywhn_to_xyxy(batch.targets[:, 2:], 1, 1)
            assert (corners >= -1e-6).all() and (corners <= 1).all() and (batch.targets[:, 4:] > 0).all()
            assert batch.letterboxes == [None] * len(batch)


def test_images_without_labels_give_empty_targets(own_tiny_dataset: TinyDataset) -> None:
    for file in (own_tiny_dataset.root / "labels" / "val").iterdir():
        file.unlink()
    loader, _ = build(own_tiny_dataset, "val", imgsz=64, batch_size=4, workers=0)
    batch = next(iter(loader))
    assert batch.targets.shape == (0, 6) and len(batch) == 4


# --- what a sample depends on -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", (None, "auto", "ram"))
def test_batches_are_the_same_bits_whatever_the_workers_and_after_resuming(
    cache: str | None, tiny_dataset: TinyDataset
) -> None:
    epochs: dict[int, list[list[Batch]]] = {}
    for workers in (0, 1, 2):
        loader, _ = build(tiny_dataset, **TRAIN, workers=workers, cache=cache)
        assert loader.num_workers <= workers
        for epoch in (0, 1, 3) if workers else (3, 0, 1):
            loader.set_epoch(epoch)
            epochs.setdefault(epoch, []).append(list(loader))
    for variants in epochs.values():
        for variant in variants[1:]:
            assert all(same(a, b) for a, b in zip(variants[0], variant, strict=True))
    assert not torch.equal(epochs[0][0][0].images, epochs[1][0][0].images)
    assert [b.indices for b in epochs[0][0]] != [b.indices for b in epochs[1][0]]


@pytest.mark.parametrize("augment", (False, True))
def test_threads_give_the_same_bits_as_one(
    augment: bool, own_tiny_dataset: TinyDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(own_tiny_dataset.train[2])
    loader, _ = build(own_tiny_dataset, **{**TRAIN, "augment": augment, "batch_size": 8}, workers=0)
    made_by: set[int] = set()
    barrier = threading.Barrier(3, timeout=30)
    make = ImageDataset.__getitem__

    def noted(self: ImageDataset, key: tuple[int, int]) -> Any:
        if threading.get_ident() not in made_by:
            made_by.add(threading.get_ident())
            barrier.wait()
        return make(self, key)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = list(loader)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(ImageDataset, "__getitem__", noted)
    together = list(loader)
    assert len(made_by) == 3 and threading.get_ident() not in made_by
    assert all(same(a, b) and a.failed == b.failed for a, b in zip(alone, together, strict=True))
    assert any(batch.failed for batch in together)


def test_an_abandoned_epoch_does_not_leak_into_the_next(tiny_dataset: TinyDataset) -> None:
    loader, _ = build(tiny_dataset, **TRAIN, workers=2)
    expected = list(loader)
    next(iter(loader))
    assert all(same(a, b) for a, b in zip(expected, loader, strict=True))


def test_an_image_kept_in_memory_is_decoded_once_and_gives_the_same_batches(
    tiny_dataset: TinyDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = build(tiny_dataset, **TRAIN, workers=0)
    decoded: list[str] = []

    def noted(path: str, max_pixels: int) -> Any:
        decoded.append(path)
        return read_image(path, max_pixels)

    monkeypatch.setattr("utils.images.read_image", noted)
    kept, _ = build(tiny_dataset, **TRAIN, workers=0, cache="auto")
    for epoch in (0, 1):
        kept.set_epoch(epoch)
        plain.set_epoch(epoch)
        batches = list(kept)
        assert sorted(decoded) == sorted(map(str, tiny_dataset.train))
        with monkeypatch.context() as patch:
            patch.setattr("utils.images.read_image", read_image)
            assert all(same(a, b) for a, b in zip(plain, batches, strict=True))


def test_images_are_not_kept_unasked_where_workers_could_not_share_them(
    tiny_dataset: TinyDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("utils.dataloaders.CAN_FORK", False)
    assert not build(tiny_dataset, **TRAIN, workers=2, cache="auto")[1].store.in_memory
    assert build(tiny_dataset, **TRAIN, workers=0, cache="auto")[1].store.in_memory


def test_a_sample_is_the_same_in_batches_of_any_size(tiny_dataset: TinyDataset) -> None:
    def by_index(**changes: Any) -> dict[int, torch.Tensor]:
        loader, _ = build(tiny_dataset, **{**TRAIN, "workers": 0, **changes})
        return {index: image for batch in loader for index, image in zip(batch.indices, batch.images)}

    reference = by_index()
    for changes in (dict(batch_size=5), dict(shuffle=False), dict(rank=1, world_size=2)):
        assert all(torch.equal(image, reference[index]) for index, image in by_index(**changes).items())
    assert not all(torch.equal(image, reference[index]) for index, image in by_index(seed=1).items())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 5), st.booleans(), st.booleans(), st.integers(0, 3))
def test_the_processes_parts_make_up_the_epoch(
    count: int, batch_size: int, world_size: int, rect: bool, shuffle: bool, epoch: int
) -> None:
    parts = []
    for rank in range(world_size):
        order = BatchOrder(
            count, LoaderOptions(64, batch_size, rect=rect, shuffle=shuffle, rank=rank, world_size=world_size)
        )
        order.epoch = epoch
        batches = list(order)
        assert len(batches) == len(order) and {e for batch in batches for e, _ in batch} == {epoch}
        assert all(0 < len(batch) <= batch_size for batch in batches)
        parts.append([index for batch in batches for _, index in batch])
    everything = [index for part in parts for index in part]
    assert set(everything) == set(range(count)), "an image is missing"
    if not rect:
        assert len({len(part) for part in parts}) == 1, "processes would wait for each other for ever"
        assert len(everything) < count + world_size
        if not shuffle and world_size == 1:
            assert everything == list(range(count))
    else:  # every batch comes from one stretch of equal shape
        assert len(everything) <= count + (world_size - 1) * min(batch_size, count)


def test_every_epoch_shuffles_anew_and_the_same_epoch_alike() -> None:
    order = BatchOrder(50, LoaderOptions(64, 50, shuffle=True))
    epochs = []
    for epoch in (0, 1, 0):
        order.epoch = epoch
        epochs.append([index for _, index in next(iter(order))])
    assert epochs[0] == epochs[2] != epochs[1] and epochs[0] != sorted(epochs[0])


# --- workers ----------------------------------------------------------------------------------------------------------


def test_workers_are_limited_by_cores_batch_and_what_there_is_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.dataloaders.num_cpus", lambda: 16)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def workers(num_batches: int = 100, **options: Any) -> int:
        return num_workers(LoaderOptions(imgsz=64, **options), num_batches)

    assert workers(batch_size=32) == 8
    assert workers(batch_size=32, workers=16) == 8, "half of the cores belong to the other GPU"
    assert workers(batch_size=4) == 4
    assert workers(batch_size=32, workers=3) == 3
    assert workers(3, batch_size=32) == 3
    assert workers(1, batch_size=32) == workers(batch_size=1) == workers(batch_size=8, workers=0) == 0


def test_a_network_on_the_cpu_gets_the_cores_for_itself_unless_workers_are_asked_for() -> None:
    assert [wanted_workers(None, device) for device in ("cpu", "cuda", "mps")] == [0, 8, 8]
    assert [wanted_workers(workers, "cpu") for workers in (0, 2)] == [0, 2]
    assert wanted_workers(0, "cuda") == 0


def test_loading_leaves_the_main_process_its_threads(tiny_dataset: TinyDataset) -> None:
    before = cv2.getNumThreads(), torch.get_num_threads()
    loader, _ = build(tiny_dataset, **TRAIN, workers=2)
    list(loader)
    assert (cv2.getNumThreads(), torch.get_num_threads()) == before


def test_closing_ends_the_workers_at_once_and_iterating_again_starts_new_ones(tiny_dataset: TinyDataset) -> None:
    before = set(multiprocessing.active_children())
    loader, _ = build(tiny_dataset, **TRAIN, workers=2)
    first = list(loader)
    assert len(set(multiprocessing.active_children()) - before) == loader.num_workers
    loader.close()
    assert set(multiprocessing.active_children()) <= before
    assert all(same(a, b) for a, b in zip(first, loader, strict=True))
    loader.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs CUDA")
def test_batches_arrive_in_page_locked_memory(tiny_dataset: TinyDataset) -> None:
    loader, _ = build(tiny_dataset, **TRAIN, workers=2)
    assert all(batch.images.is_pinned() and batch.targets.is_pinned() for batch in loader)


# --- what bad input gets ----------------------------------------------------------------------------------------------


def spoil(file: Path) -> None:
    """Make a PNG that a scan lets pass, for it is whole and its sums are right, and that cannot be decoded."""
    data = file.read_bytes()
    place = data.index(b"IDAT")
    length = int.from_bytes(data[place - 4 : place], "big")
    block = b"IDAT" + bytes(length)
    file.write_bytes(data[:place] + block + zlib.crc32(block).to_bytes(4, "big") + data[place + 8 + length :])


@pytest.mark.parametrize("workers", (0, 2))
@pytest.mark.parametrize("augment", (True, False))
def test_an_image_that_is_gone_since_the_scan_stops_the_run_with_its_name(
    augment: bool, workers: int, own_tiny_dataset: TinyDataset
) -> None:
    before = set(multiprocessing.active_children())
    loader, _ = build(own_tiny_dataset, imgsz=64, batch_size=2, workers=workers, augment=augment, hyp=STRONG)
    own_tiny_dataset.train[3].unlink()
    with pytest.raises(ImageError, match=r"train3\.png: cannot be read \(No such file") as caught:
        list(loader)
    assert "Traceback" not in str(caught.value)
    assert set(multiprocessing.active_children()) <= before, "workers were left running"


@pytest.mark.parametrize("cache", (None, "ram", "disk"))
@pytest.mark.parametrize("hyp", (STRONG, dict(mosaic=0.0), dict(mosaic=1.0, mixup=1.0)))
def test_in_training_the_next_image_stands_for_one_that_cannot_be_decoded(
    hyp: dict[str, float],
    cache: Any,
    own_tiny_dataset: TinyDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: list[str],
) -> None:
    monkeypatch.setenv("YOLOV5_CACHE_DIR", str(tmp_path / "cache"))
    files = own_tiny_dataset.train
    spoil(files[3])
    spoil(files[7])  # the last one: the first one stands for it
    options = {**TRAIN, "hyp": hyp, "cache": cache}
    loaders = [build(own_tiny_dataset, **options, workers=workers)[0] for workers in (0, 2)]
    epochs = [[list(loader) for _ in range(2)] for loader in loaders]
    assert sum(len(batch) for batch in epochs[0][0]) == 8
    assert all(same(a, b) for first, second in zip(*epochs) for a, b in zip(first, second))
    warnings = [line for line in said if "cannot be decoded" in line]
    assert len(warnings) == 2, "one line per run, however many epochs"
    for line in warnings:
        assert "2 of the images passed the scan but cannot be decoded; others took their places" in line
        assert "train3.png" in line and "train7.png" in line
    for loader in loaders:
        loader.close()
    for broken, other in ((3, 4), (7, 0)):
        files[broken].write_bytes(files[other].read_bytes())
        label = own_tiny_dataset.root / "labels/train"
        (label / f"train{broken}.txt").write_bytes((label / f"train{other}.txt").read_bytes())
    whole, _ = build(own_tiny_dataset, **options, workers=0)
    for batch, expected in zip(epochs[0][0], whole):
        assert torch.equal(batch.images, expected.images) and torch.equal(batch.targets, expected.targets)


def test_training_ends_where_no_image_can_be_decoded(own_tiny_dataset: TinyDataset) -> None:
    for file in own_tiny_dataset.train:
        spoil(file)
    loader, _ = build(own_tiny_dataset, **TRAIN, workers=0)
    with pytest.raises(UserError, match=r"none of the 8 images can be decoded\. .*train\d\.png: not a readable"):
        list(loader)


@pytest.mark.parametrize("cache", (None, "ram", "disk"))
@pytest.mark.parametrize("workers", (0, 2))
def test_in_validation_an_image_that_cannot_be_decoded_is_grey_and_keeps_its_labels(
    workers: int, cache: Any, own_tiny_dataset: TinyDataset, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setenv("YOLOV5_CACHE_DIR", str(own_tiny_dataset.root / "cache"))
    options: dict[str, Any] = dict(imgsz=64, batch_size=4, rect=True, pad=0.5, workers=workers)
    whole = list(build(own_tiny_dataset, **options)[0])
    spoil(own_tiny_dataset.train[2])
    loader, _ = build(own_tiny_dataset, **options, cache=cache)
    for _ in range(2):
        for batch, before in zip(loader, whole):
            assert torch.equal(batch.targets, before.targets) and batch.paths == before.paths
            assert batch.letterboxes == before.letterboxes
            for path, image, old in zip(batch.paths, batch.images, before.images):
                assert bool((image == 114).all()) if path.endswith("train2.png") else torch.equal(image, old)
    loader.close()
    (line,) = (line for line in said if "cannot be decoded" in line)
    assert "1 of the images" in line and "judged as grey, their objects as missed" in line and "train2.png" in line


def test_a_folder_without_images_is_refused(own_tiny_dataset: TinyDataset) -> None:
    for file in own_tiny_dataset.val:
        file.unlink()
    with pytest.raises(UserError, match=re.escape("tiny.yaml: no usable image in")):
        build(own_tiny_dataset, "val", imgsz=64, batch_size=2)


def test_training_without_any_label_is_refused(own_tiny_dataset: TinyDataset) -> None:
    for file in (own_tiny_dataset.root / "labels" / "train").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="none of the 8 images"):
        build(own_tiny_dataset, **TRAIN)


def test_copy_paste_on_boxes_without_outlines_says_that_it_does_nothing(
    tiny_dataset: TinyDataset, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("yolov5"), "propagate", True)
    build(tiny_dataset, **{**TRAIN, "hyp": {"copy_paste": 0.1}, "workers": 0})
    assert "copy_paste is set, but no label is a polygon" in caplog.text


def test_polygons_become_boxes_that_follow_the_warp(own_tiny_dataset: TinyDataset) -> None:
    for file in (own_tiny_dataset.root / "labels" / "train").iterdir():
        file.write_text("0 0.2 0.2 0.8 0.2 0.8 0.8 0.2 0.8\n1 0.4 0.1 0.6 0.1 0.5 0.3 0.45 0.25\n", encoding="utf-8")
    loader, dataset = build(own_tiny_dataset, **{**TRAIN, "hyp": {"copy_paste": 1.0, "degrees": 20}, "workers": 0})
    assert all(len(sample.segments) == 2 for sample in dataset.samples)
    assert sum(len(batch.targets) for batch in loader) > 8


def test_validation_on_coco128_has_the_reference_shapes(datasets_dir: Path) -> None:
    images = str(datasets_dir / "coco128" / "images" / "train2017")
    spec = prepare({"train": images, "val": images, "names": [str(i) for i in range(80)]})
    loader, dataset = build_loader(
        spec, spec.split("val"), LoaderOptions(imgsz=640, batch_size=32, rect=True, pad=0.5, workers=0)
    )
    assert sum(map(len, dataset.labels_list)) == 929
    ratios = dataset.shapes_hw[:, 0] / dataset.shapes_hw[:, 1]
    assert (np.diff(ratios) >= 0).all()
    assert dataset.batch_shapes == [(448, 672), (512, 672), (672, 672), (672, 608)] and len(loader) == 4
