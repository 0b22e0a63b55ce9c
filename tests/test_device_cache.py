"""`--cache device`: the host's labels bit for bit, its pixels but for rounding, and no wait for the device."""

from __future__ import annotations

import argparse
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import TinyDataset
from fake_cuda import CUDA, fake_cuda
from test_dataloaders import STRONG, TRAIN, build, spoil
from test_train import HYP, check_resumed, quick, rows_of, same, weights_of

import train
from utils import augmentations, device_cache
from utils.augmentations import HSV, Flip
from utils.config import UserError
from utils.dataloaders import Batch, LoaderOptions
from utils.device_cache import DeviceLoader
from utils.images import ImageError

CPU = torch.device("cpu")
GREY = dict(hsv_h=0.0, hsv_s=0.0, hsv_v=0.0)  # no change of colours
STILL = dict(degrees=0.0, translate=0.0, scale=0.0, shear=0.0, perspective=0.0, mosaic=0.0)
# OpenCV 4 rounds the coordinates of a warp to 1/32 pixel: half of that in x and y, of 255 levels
FLOAT_WARP = int(cv2.__version__.split(".")[0]) >= 5
MOST, UNEQUAL = (1, 1e-3) if FLOAT_WARP else (8, 0.3)


@pytest.fixture(scope="module", autouse=True)
def tables() -> Iterator[None]:
    """The tables of colours, which take a second, made once."""
    made = device_cache.colour_tables()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_cache, "colour_tables", lambda: made)
        yield


def both(data: TinyDataset, device: torch.device = CPU, **options: Any) -> tuple[Any, DeviceLoader]:
    """The host's loader and the device's of the same dataset."""
    settings: dict[str, Any] = {**TRAIN, "workers": 0, **options}
    loader, dataset = build(data, **settings)
    return loader, DeviceLoader(dataset, LoaderOptions(**settings), device)


def pairs(loaders: tuple[Any, DeviceLoader], epochs: int = 3) -> Iterator[tuple[Batch, Batch]]:
    for epoch in range(epochs):
        for loader in loaders:
            loader.set_epoch(epoch)
        yield from zip(*loaders, strict=True)


def check_labels(host: Batch, ours: Batch) -> None:
    assert host.targets.dtype == ours.targets.dtype and torch.equal(host.targets, ours.targets)
    assert (host.paths, host.indices, host.letterboxes) == (ours.paths, ours.indices, ours.letterboxes)
    assert ours.images.dtype == torch.uint8 and ours.images.shape == host.images.shape
    assert ours.images.is_contiguous(memory_format=torch.channels_last)


def differences(host: Batch, ours: Batch) -> np.ndarray:
    return (host.images.short() - ours.images.short()).abs().numpy()


# --- the same as on the host ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hyp",
    (STRONG, {**STRONG, "perspective": 0.0, "mosaic": 1.0, "mixup": 1.0}, {**STRONG, "mosaic": 0.0}, {}),
    ids=("all", "affine", "single", "defaults"),
)
@pytest.mark.parametrize("imgsz", (64, 160))
def test_labels_are_equal_bit_for_bit_and_pixels_but_for_rounding(
    hyp: dict[str, float], imgsz: int, tiny_dataset: TinyDataset
) -> None:
    found, boxes = [], 0
    for host, ours in pairs(both(tiny_dataset, imgsz=imgsz, hyp={**hyp, **GREY})):
        check_labels(host, ours)
        found.append(differences(host, ours).ravel())
        boxes += len(ours.targets)
    all_of_them = np.concatenate(found)
    assert all_of_them.max() <= MOST and (all_of_them > 0).mean() < UNEQUAL and boxes > 20


def test_colours_are_opencvs_exactly(tiny_dataset: TinyDataset) -> None:
    """Without a warp nothing is rounded: letterboxes, colours and flips give the host's very pixels."""
    seen = 0
    for host, ours in pairs(both(tiny_dataset, hyp={**STILL, "hsv_h": 0.5, "flipud": 0.5})):
        check_labels(host, ours)
        assert torch.equal(host.images, ours.images)
        seen += len(ours)
    assert seen == 24


def test_every_colour_is_recoloured_as_on_the_host(tiny_dataset: TinyDataset) -> None:
    """In widths of whole strides: what is left of others OpenCV's vector instructions do not do, which rounds else."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (3, 61, 96, 3), np.uint8)
    images = both(tiny_dataset)[1].images
    tables = [HSV.table(HSV(1.0, 0.9, 0.9).sample(rng)) for _ in image]  # type: ignore[arg-type]
    ours = images._coloured(torch.from_numpy(image), torch.from_numpy(np.stack(tables)).mT).numpy()
    for each, table, rgb in zip(image, tables, ours):
        hsv = cv2.LUT(cv2.cvtColor(each, cv2.COLOR_RGB2HSV), table[None])
        assert np.array_equal(rgb, cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


def test_mixtures_are_opencvs_exactly() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 256, (2, 4, 50, 70, 3), np.uint8)
    shares = rng.beta(32, 32, 4)
    rows = torch.from_numpy(np.stack((shares, 1 - shares), 1).astype(np.float32))
    ours = device_cache._blended(torch.from_numpy(first), torch.from_numpy(second), rows).numpy()
    for one, other, share, mixed in zip(first, second, shares.tolist(), ours):
        assert np.array_equal(mixed, cv2.addWeighted(one, share, other, 1 - share, 0.0))


def test_with_colours_a_difference_of_rounding_stays_rare(tiny_dataset: TinyDataset) -> None:
    found = [differences(*pair).ravel() for pair in pairs(both(tiny_dataset))]
    all_of_them = np.concatenate(found)
    assert (all_of_them > 0).mean() < UNEQUAL and all_of_them.mean() < 0.2


def test_every_transform_of_the_host_has_its_form_on_the_device() -> None:
    assert set(augmentations.IMAGE_TRANSFORMS) == {HSV, Flip}


@pytest.mark.parametrize("mosaic", (1.0, 0.0))
def test_outlines_follow_the_warp_as_on_the_host(mosaic: float, own_tiny_dataset: TinyDataset) -> None:
    for file in (own_tiny_dataset.root / "labels" / "train").iterdir():
        file.write_text("0 0.2 0.2 0.8 0.2 0.8 0.8 0.2 0.8\n1 0.4 0.1 0.6 0.1 0.5 0.3 0.45 0.25\n", encoding="utf-8")
    hyp = {**STRONG, **GREY, "mosaic": mosaic, "degrees": 30}
    boxes = 0
    for host, ours in pairs(both(own_tiny_dataset, hyp=hyp), 1):
        check_labels(host, ours)
        boxes += len(ours.targets)
    assert boxes > 8


def test_images_without_labels_are_samples_like_others(own_tiny_dataset: TinyDataset) -> None:
    for file in sorted((own_tiny_dataset.root / "labels" / "train").iterdir())[1:]:
        file.write_text("", encoding="utf-8")
    for host, ours in pairs(both(own_tiny_dataset)):
        check_labels(host, ours)


def test_with_single_cls_all_labels_are_of_class_0(tiny_dataset: TinyDataset) -> None:
    for host, ours in pairs(both(tiny_dataset, single_cls=True), 1):
        check_labels(host, ours)
        assert (ours.targets[:, 1] == 0).all()


# --- (seed, epoch, index) ---------------------------------------------------------------------------------------------


def test_a_sample_does_not_depend_on_its_batch_its_process_or_the_chunks(
    tiny_dataset: TinyDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def samples(**options: Any) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        loader = both(tiny_dataset, **options)[1]
        loader.set_epoch(3)
        return {
            index: (batch.images[i], batch.targets[batch.targets[:, 0] == i, 1:])
            for batch in loader
            for i, index in enumerate(batch.indices)
        }

    expected = samples()
    monkeypatch.setattr(device_cache, "CHUNK_PIXELS", 2 * 64 * 64)
    shared = {**samples(batch_size=2, rank=0, world_size=2), **samples(batch_size=2, rank=1, world_size=2)}
    assert expected.keys() == shared.keys() == set(range(8))
    for index, parts in expected.items():
        assert all(torch.equal(a, b) for a, b in zip(parts, shared[index], strict=True))
    other_seed = samples(seed=1)
    assert not any(torch.equal(expected[index][0], other_seed[index][0]) for index in expected)


def test_leaving_an_epoch_early_leaves_no_thread_running(tiny_dataset: TinyDataset) -> None:
    loader = both(tiny_dataset, batch_size=1)[1]
    before = threading.active_count()
    batches = iter(loader)
    first = next(batches)
    assert threading.active_count() == before + 1
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
    assert torch.equal(next(iter(loader)).images, first.images)


# --- what cannot be done ----------------------------------------------------------------------------------------------


def test_the_next_image_stands_for_one_that_cannot_be_decoded(own_tiny_dataset: TinyDataset, said: list[str]) -> None:
    for number in (2, 3, 7):
        spoil(own_tiny_dataset.train[number])
    loaders = both(own_tiny_dataset)
    warnings = [line for line in said if "cannot be decoded" in line]
    assert len(warnings) == 1 and "3 of the images" in warnings[0] and "train2.png" in warnings[0]
    for host, ours in pairs(loaders):
        check_labels(host, ours)
        assert (differences(host, ours) > 8).mean() < 1e-3


def test_images_that_cannot_be_read_end_the_run_with_a_name(own_tiny_dataset: TinyDataset) -> None:
    settings = dict(imgsz=64, batch_size=3, augment=True, workers=0)
    _, dataset = build(own_tiny_dataset, **settings)
    own_tiny_dataset.train[3].unlink()
    with pytest.raises(ImageError, match=r"train3\.png: cannot be read"):
        DeviceLoader(dataset, LoaderOptions(**settings), CPU)  # type: ignore[arg-type]
    for file in own_tiny_dataset.train:
        if file.exists():
            spoil(file)
    shutil.copy(own_tiny_dataset.train[0], own_tiny_dataset.train[3])
    with pytest.raises(UserError, match=r"none of the 8 images can be decoded. .*train0\.png"):
        DeviceLoader(dataset, LoaderOptions(**settings), CPU)  # type: ignore[arg-type]


def test_too_little_memory_is_said_with_the_size_and_the_alternative(
    tiny_dataset: TinyDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_cache, "available_memory", lambda: 2**20)
    with pytest.raises(UserError, match=r"the images need 0\.1 GiB of memory on cpu, 0\.0 GiB are free.*--cache ram"):
        both(tiny_dataset)
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (asked.append(device), (2**20, 2**30))[1])
    with pytest.raises(UserError, match="on cuda:0"):
        both(tiny_dataset, CUDA)
    assert asked == [CUDA]


def test_without_a_change_of_colours_there_are_no_tables(tiny_dataset: TinyDataset) -> None:
    assert both(tiny_dataset, hyp=GREY)[1].images.tables is None
    assert both(tiny_dataset)[1].images.tables is not None


def test_what_the_device_does_not_do_is_refused(tiny_dataset: TinyDataset) -> None:
    with pytest.raises(UserError, match=r"copy_paste 0\.5 .*Set it to 0, or use --cache ram"):
        both(tiny_dataset, hyp={"copy_paste": 0.5})
    with pytest.raises(UserError, match=r"for CUDA and for cpu. Use --cache ram"):
        both(tiny_dataset, torch.device("mps"))
    _, dataset = build(tiny_dataset, imgsz=64, batch_size=3, augment=True, workers=0)
    dataset.image_transforms.append(type("Blur", (), {})())
    with pytest.raises(UserError, match=r"Blur is not done on the device. Use --cache ram"):
        DeviceLoader(dataset, LoaderOptions(imgsz=64, batch_size=3, augment=True), CPU)


@pytest.mark.parametrize("flags", (["--rect"], ["--batch-size", "-1"]), ids=str)
def test_flags_that_contradict_it_are_refused_at_once(flags: list[str]) -> None:
    with pytest.raises(UserError, match=r"--cache device.*(--cache ram|Give a number)"):
        train.check(train.build_parser().parse_args(["--cache", "device", *flags]))


# --- without a wait ---------------------------------------------------------------------------------------------------


def test_no_batch_waits_for_the_device(tiny_dataset: TinyDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**40, 2**40))
    monkeypatch.setattr(device_cache, "num_cpus", lambda: 1)  # fake tensors do not bear several threads
    with fake_cuda() as cuda:
        loader = both(tiny_dataset, CUDA)[1]
        cuda.waits.clear()  # filling it waits
        batches = [batch for epoch in range(2) for batch in loader]
        assert {batch.images.device for batch in batches} == {CUDA}
        assert {batch.images.shape for batch in batches} == {(3, 3, 64, 64), (2, 3, 64, 64)}
        assert all(batch.images.is_contiguous(memory_format=torch.channels_last) for batch in batches)
    assert cuda.waits == []


def test_threads_work_on_the_device_of_their_process(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for device in (torch.device("cuda", 1), CPU):
        with device_cache._threads(1, device) as pool:
            assert pool.submit(lambda: "done").result() == "done"
    assert chosen == [torch.device("cuda", 1)]


# --- training ---------------------------------------------------------------------------------------------------------

MOSAIC = {**HYP, "mosaic": 1.0, "mixup": 0.3, "degrees": 5.0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: TinyDataset) -> dict[str, argparse.Namespace]:
    """The same run with both paths, and once more."""
    folder = tmp_path_factory.mktemp("device")
    common: dict[str, Any] = dict(hyp=MOSAIC, save_period=1, multi_scale=True)
    return {
        name: quick(folder, tiny_dataset, cache=cache, name=name, **common)
        for name, cache in (("host", None), ("first", "device"), ("again", "device"))
    }


@pytest.mark.slow
def test_a_run_ends_close_to_the_hosts_and_equal_to_itself(runs: dict[str, argparse.Namespace]) -> None:
    host, first, again = (rows_of(run.save_dir) for run in runs.values())
    for ours, theirs, most in zip(first, host, (0.01, 0.1), strict=True):  # steps in bf16 let differences grow
        losses = [name for name in ours if name.startswith("train/")]
        assert len(losses) == 3
        assert [ours[name] for name in losses] == pytest.approx([theirs[name] for name in losses], rel=most)
    assert first == again
    weights = [weights_of(runs[name].save_dir / "weights/last.pt") for name in ("first", "again")]
    assert same(*weights)


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit(runs: dict[str, argparse.Namespace], tmp_path: Path) -> None:
    check_resumed(runs["first"].save_dir, tmp_path / "stopped")


@pytest.mark.slow
def test_the_first_batches_are_drawn(tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    run = quick(tmp_path, tiny_dataset, cache="device", noplots=False, epochs=1)
    assert (run.save_dir / "train_batch0.jpg").is_file()
