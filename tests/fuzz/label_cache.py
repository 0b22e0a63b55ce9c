"""A label cache with the right key and wrong content: a scan reads the labels again, or finds what they say."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.fuzz.damage import NUMBERS, damage_bytes
from tests.fuzz.harness import Target
from utils.data import load_dataset
from utils.labels import CACHE_SUFFIX, scan

LABELS = ("0 0.5 0.5 0.2 0.2\n1 0.4 0.4 0.1 0.1\n", "1 0.1 0.1 0.9 0.1 0.5 0.9\n0 0.5 0.5 0.2 0.2\n", "", "7 0 0 0 0\n")
ODD = (np.nan, np.inf, -1, 1.5, 3, 1e30, *NUMBERS)
DTYPES = ("<i4", "<i8", "<f8", "<f4", ">f4", "|i1", "<U5", "|S3", "<c16", "|b1", "<M8[s]", "|V8", "<f4,<i4")


def _dataset(folder: Path) -> dict[str, Any]:
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for number, text in enumerate(LABELS):
        Image.new("RGB", (30, 20)).save(folder / "images" / f"{number}.bmp")
        (folder / "labels" / f"{number}.txt").write_text(text)
    return {"path": str(folder), "train": "images", "val": "images", "names": ["a", "b"]}


def _damage(rng: np.random.Generator, arrays: dict[str, np.ndarray]) -> bytes:
    """The arrays changed, and written as an archive of arrays."""
    for _ in range(int(rng.integers(1, 3))):
        name = sorted(arrays)[int(rng.integers(0, len(arrays)))]
        array, kind = arrays[name], rng.integers(0, 7)
        if kind == 0 and array.size:
            with np.errstate(all="ignore"):
                value = np.array(ODD[int(rng.integers(0, len(ODD)))]).astype(array.dtype)
            array.flat[int(rng.integers(0, array.size))] = value
        elif kind == 1:
            array = (
                np.full(array.shape, "1", object)
                if rng.random() < 0.1
                else array[: len(array) // 2]
                if array.ndim
                else array
            )
        elif kind == 2:
            array = np.zeros(array.shape, np.dtype(DTYPES[int(rng.integers(0, len(DTYPES)))]))
        elif kind == 3:
            array = array.reshape(-1)
        elif kind == 4:
            array = np.concatenate((array, array)) if array.ndim else array
        elif kind == 5:
            array = np.zeros((2,) * int(rng.integers(0, 6)), array.dtype)
        elif name != "key":
            del arrays[name]
            continue
        arrays[name] = array
    stream = io.BytesIO()
    save = np.savez_compressed if rng.random() < 0.2 else np.savez
    save(stream, **arrays, allow_pickle=True)  # type: ignore[arg-type]
    return stream.getvalue()


def _lie_in_header(rng: np.random.Generator, data: bytes) -> bytes:
    """The archive with one array's header claiming another shape; sums and lengths of the archive are right."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w") as new:
        chosen = old.namelist()[int(rng.integers(0, len(old.namelist())))]
        for name in old.namelist():
            content = old.read(name)
            if name == chosen:
                many = str(NUMBERS[int(rng.integers(0, len(NUMBERS)))]).encode()
                content = content.replace(b"'shape': (", b"'shape': (" + many + b",", 1)
                content = damage_bytes(rng, content, most=1) if rng.random() < 0.3 else content
            new.writestr(name, content)
    return stream.getvalue()


def _case(rng: np.random.Generator, folder: Path) -> object:
    spec = load_dataset(_dataset(folder))
    expected = scan(spec.train, spec, workers=1)
    place = folder / f"labels{CACHE_SUFFIX}"
    with np.load(place) as stored:
        arrays = {name: stored[name] for name in stored.files}
    data, how = place.read_bytes(), rng.random()
    data = _damage(rng, arrays) if how < 0.6 else _lie_in_header(rng, data) if how < 0.8 else damage_bytes(rng, data)
    place.write_bytes(data)
    found = scan(spec.train, spec, workers=1)
    assert len(found.samples) <= len(LABELS)
    for sample in found.samples:
        assert sample.labels.dtype == np.float32 and sample.labels.shape[1:] == (5,)
        assert ((sample.labels >= 0) & (sample.labels <= 1)).all() and min(sample.shape_hw) >= 10
        assert all(segment.ndim == 2 and len(segment) >= 3 for segment in sample.segments)
    return expected


TARGETS: tuple[Target, ...] = (Target("label_cache", _case, seconds=5, megabytes=500),)
