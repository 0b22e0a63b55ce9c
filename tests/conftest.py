"""Fixtures of the whole suite: the folders with real data, a tiny drawn dataset, quiet threads and no network."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.runtime import LOGGER, setup_logging

REPOSITORY = Path(__file__).resolve().parent.parent
LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1", "0.0.0.0", ""}


@dataclass(frozen=True)
class TinyDataset:
    """Where the drawn dataset lies: its YAML, its root folder, its images by split and its class names."""

    yaml: Path
    root: Path
    train: tuple[Path, ...]
    val: tuple[Path, ...]
    names: tuple[str, ...]


def pytest_configure(config: pytest.Config) -> None:
    """Keep child processes and OpenMP from starting more threads than there are cores, before torch is imported."""
    os.environ.setdefault("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1)))
    os.environ.setdefault("MPLBACKEND", "Agg")


def _folder_from(variable: str, holds: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set: it would name the folder with {holds}")
    folder = Path(value).expanduser().resolve()
    if not folder.is_dir():
        pytest.skip(f"{variable}={value} is not a folder: it would name the folder with {holds}")
    return folder


@pytest.fixture(scope="session")
def weights_dir() -> Path:
    """The folder with official checkpoints such as yolov5n.pt; the test is skipped where there is none."""
    return _folder_from("YOLOV5_WEIGHTS_DIR", "official checkpoints such as yolov5n.pt")


@pytest.fixture(scope="session")
def datasets_dir() -> Path:
    """The folder with real datasets such as coco128; the test is skipped where there is none."""
    return _folder_from("YOLOV5_DATASETS_DIR", "datasets such as coco128")


def _is_local(address: object) -> bool:
    if not isinstance(address, tuple):  # a Unix socket's path
        return True
    host = address[0]
    return host in LOCAL_HOSTS or str(host).startswith("127.")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches for another machine fails here, and says so, instead of passing on some machines only."""
    real_connect = socket.socket.connect

    def connect(self: socket.socket, address: object) -> None:
        if not _is_local(address):
            raise AssertionError(f"a test tried to connect to {address}: tests run without a network")
        real_connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture(scope="session", autouse=True)
def torch_threads() -> None:
    """As many threads as OMP_NUM_THREADS says, so that tests run side by side do not fight over the cores."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def _draw(rng: np.random.Generator, shape_hw: tuple[int, int]) -> tuple[np.ndarray, list[str]]:
    """A noisy image with one filled rectangle (class 0) and one disc (class 1), side by side, and its label lines."""
    height, width = shape_hw
    image = rng.integers(60, 110, (height, width, 3), dtype=np.uint8)
    lines = []
    for class_index, left in ((0, 0.05), (1, 0.55)):
        size = int(rng.uniform(0.25, 0.4) * min(height, width)) // 2 * 2
        x1 = int(left * width) + int(rng.integers(0, max(1, int(0.4 * width) - size + 1)))
        y1 = int(rng.integers(2, height - size - 2))
        color = tuple(int(v) for v in rng.integers(150, 255, 3))
        if class_index == 0:
            cv2.rectangle(image, (x1, y1), (x1 + size - 1, y1 + size - 1), color, -1)
        else:
            cv2.circle(image, (x1 + size // 2, y1 + size // 2), size // 2, color, -1)
        cx, cy = (x1 + size / 2) / width, (y1 + size / 2) / height
        lines.append(f"{class_index} {cx:.6f} {cy:.6f} {size / width:.6f} {size / height:.6f}")
    return image, lines


def write_tiny_dataset(root: Path, *, num_train: int = 8, num_val: int = 4, seed: int = 0) -> TinyDataset:
    """Write labelled PNG images and `tiny.yaml` below `root`; half are 96 x 128, half 128 x 96 (height x width)."""
    rng = np.random.default_rng(seed)
    images: dict[str, list[Path]] = {"train": [], "val": []}
    for split, count in (("train", num_train), ("val", num_val)):
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        for index in range(count):
            image, lines = _draw(rng, (96, 128) if index % 2 == 0 else (128, 96))
            file = root / "images" / split / f"{split}{index}.png"
            cv2.imwrite(str(file), image)
            (root / "labels" / split / f"{split}{index}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            images[split].append(file)
    yaml = root / "tiny.yaml"
    text = f"path: {root}\ntrain: images/train\nval: images/val\nnames:\n  0: square\n  1: disc\n"
    yaml.write_text(text, encoding="utf-8")
    return TinyDataset(yaml, root, tuple(images["train"]), tuple(images["val"]), ("square", "disc"))


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> TinyDataset:
    """Eight training and four validation images with two objects each; shared by all tests, so do not change it."""
    return write_tiny_dataset(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def own_tiny_dataset(tmp_path: Path) -> TinyDataset:
    """The same images as `tiny_dataset` in a folder of this test's own, to be broken or changed at will."""
    return write_tiny_dataset(tmp_path / "tiny")


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What is logged during the test."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    setup_logging()
    LOGGER.addHandler(handler)
    yield lines
    LOGGER.removeHandler(handler)
