"""The folder that an ablation's report reads, with one of its files damaged."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data import load
from experiments.trials import check_recipe, planned_of, threads_of
from tests.fuzz.damage import WORDS, damage_bytes, damage_text
from tests.fuzz.harness import Target
from tests.test_report import PERFECT, ablation_in
from utils.files import write_yaml

GATES = {"gates": [["row", "gate"], ["10", "SE"]], "gates_picture": "gates-se.png", "gflops": 4.2, "tensors": "1/1"}
REPLACEMENTS: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3.5, 1e400, -1e400, float("nan"), 10**30, "", "x", "0.5", [], [1], {}, {"a": 1}, "\x00",
    "a" * 999,
)  # fmt: skip


def _replaced(rng: np.random.Generator, data: Any) -> Any:
    """Plain data with some value, anywhere in it, replaced or renamed."""
    if isinstance(data, (dict, list)) and data and rng.random() < 0.8:
        keys = list(data) if isinstance(data, dict) else list(range(len(data)))
        key = keys[int(rng.integers(0, len(keys)))]
        if isinstance(data, dict) and rng.random() < 0.2:
            return {(WORDS[int(rng.integers(0, len(WORDS)))] if k == key else k): v for k, v in data.items()}
        changed = dict(data) if isinstance(data, dict) else list(data)
        changed[key] = _replaced(rng, data[key])  # type: ignore[index]
        return changed
    return REPLACEMENTS[int(rng.integers(0, len(REPLACEMENTS)))]


def _damaged_json(rng: np.random.Generator, file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    kind = rng.integers(0, 4)
    if kind == 0:
        text = damage_text(rng, text)
    elif kind == 1:
        text = json.dumps(_replaced(rng, json.loads(text)))
    elif kind == 2:
        text = text.replace("0.", "[" * int(10 ** rng.uniform(0, 6)), 1)
    else:
        text = "[" * int(10 ** rng.uniform(0, 6)) + text
    file.write_bytes(text.encode("utf-8", "surrogatepass"))


def _damaged_arrays(rng: np.random.Generator, file: Path) -> None:
    """Other arrays, headers that promise anything, or other bytes."""
    arrays = {name: np.array(array) for name, array in PERFECT.items()}
    name = list(arrays)[int(rng.integers(0, len(arrays)))]
    kind = rng.integers(0, 5)
    if kind == 0:
        file.write_bytes(damage_bytes(rng, file.read_bytes()))
        return
    if kind == 1 and arrays[name].dtype.kind in "fi" and arrays[name].size:
        place = int(rng.integers(0, arrays[name].size))
        value = rng.choice([np.nan, np.inf, -np.inf, 1e38, -1.0, 0.5, 2.0**31, 1e18])
        with np.errstate(all="ignore"):
            arrays[name].flat[place] = np.float64(value).astype(arrays[name].dtype)
    elif kind == 2:
        dtype = rng.choice(["f8", "f2", "i8", "u1", "U3", "S3", "c16", "M8[s]", "?"])
        shape = tuple(rng.integers(0, 4, int(rng.integers(0, 4))).tolist())
        arrays[name] = np.zeros(shape, dtype)
    elif kind == 3:
        del arrays[name]
    np.savez_compressed(file, **arrays)
    if kind == 4:
        _rewritten(rng, file, f"{name}.npy")


def _rewritten(rng: np.random.Generator, file: Path, name: str) -> None:
    """One entry with a damaged header, or far more zeros than it should have."""
    with zipfile.ZipFile(file) as archive:
        contents = {entry: archive.read(entry) for entry in archive.namelist()}
    header, data = contents[name][:128], contents[name][128:]
    if rng.random() < 0.8:
        header = damage_bytes(rng, header, most=3)
    else:
        data = bytes(int(10 ** rng.uniform(3, 8.5)))
        text = header.decode("latin-1")
        shape = f"({len(data) // 24}, 6), }}" if name == "detections.npy" else f"({len(data) // 8},), }}"
        header = (text[: text.index("(")] + shape).ljust(127).encode("latin-1") + b"\n"
    contents[name] = header + data
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, content in contents.items():
            archive.writestr(entry, content)
    file.write_bytes(out.getvalue())


def read(rng: np.random.Generator, folder: Path) -> object:
    """Damage one file, and read the folder."""
    ablation_in(folder, {"plain": {0: 0.2, 1: 0.3}, "se": {0: 0.3}}, **GATES)
    cell = folder / "cells" / "se" / "seed0"
    file = (
        folder / "recipe.yaml",
        folder / "arms.json",
        cell / "cell.json",
        cell / "results.csv",
        cell / "judged.npz",
    )[int(rng.integers(0, 5))]
    if file.suffix == ".json":
        _damaged_json(rng, file)
    elif file.suffix == ".npz":
        _damaged_arrays(rng, file)
    elif rng.random() < 0.5:
        file.write_bytes(damage_text(rng, file.read_text(encoding="utf-8")).encode("utf-8", "surrogatepass"))
    else:
        file.write_bytes(damage_bytes(rng, file.read_bytes()))
    return load(folder)


def report(rng: np.random.Generator, folder: Path) -> object:
    """Read a damaged folder, and write its report."""
    from experiments.report import write

    ablation = read(rng, folder)
    return write(ablation, folder, command="x", environment={}, resamples=2)  # type: ignore[arg-type]


def go_on(rng: np.random.Generator, folder: Path) -> object:
    """A damaged recipe, met by the command that goes on with an ablation."""
    recipe = {
        "seeds": [0, 1],
        "arms": {"a": {"gate": "gain"}, "b": {}},
        "folds": 4,
        "threads": 1,
        "recipe": {"data": "x"},
    }
    write_yaml(folder / "recipe.yaml", recipe)
    file = folder / "recipe.yaml"
    if rng.random() < 0.5:
        file.write_bytes(damage_text(rng, file.read_text(encoding="utf-8")).encode("utf-8", "surrogatepass"))
    else:
        changed = _replaced(rng, recipe)
        write_yaml(file, changed if isinstance(changed, dict) else {"arms": changed})
    check_recipe(folder, recipe)
    return planned_of(folder, [0]), threads_of(folder, 1)


TARGETS = (
    Target("ablation", read),
    Target("report", report),
    Target("recipe", go_on),
)
