"""`results.csv` of an interrupted run: continued by the recorder, then drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.fuzz.damage import damage_bytes, damage_text
from tests.fuzz.harness import Target
from utils.plots import plot_results
from utils.recorder import COLUMNS, Recorder

EPOCHS = 6
DRAWN = 0.1  # of the cases: a drawing takes a second


def _write(rng: np.random.Generator, file: Path) -> None:
    """A whole file, or one damaged as text, as bytes, or in its order."""
    recorder = Recorder(file.parent)
    for epoch in range(EPOCHS):
        recorder.log(epoch, rng.random(len(COLUMNS)).tolist())
    content = file.read_bytes()
    kind = rng.integers(0, 4)
    if kind == 0:
        content = damage_text(rng, content.decode()).encode("utf-8", "surrogatepass")
    elif kind == 1:
        content = damage_bytes(rng, content)
    elif kind == 2:
        lines = content.splitlines(keepends=True)
        content = b"".join(lines[i] for i in rng.integers(0, len(lines), len(lines)))
    else:
        rows = [f"{epoch}," + ",".join(map(str, _numbers(rng))) for epoch in range(EPOCHS)]
        content = b"\n".join([content.splitlines()[0], *(row.encode() for row in rows)])
    file.write_bytes(content)


def _numbers(rng: np.random.Generator) -> list[float]:
    return (rng.choice([-1.0, 1.0], len(COLUMNS)) * 10.0 ** rng.uniform(-330, 330, len(COLUMNS))).tolist()


def resume(rng: np.random.Generator, folder: Path) -> object:
    """Go on after some epoch, to the picture at the end."""
    _write(rng, folder / "results.csv")
    start = int(rng.integers(1, EPOCHS + 1))
    recorder = Recorder(folder, start_epoch=start)
    recorder.log(start, [0.5] * len(COLUMNS))
    lines = (folder / "results.csv").read_text(encoding="utf-8").split("\n")
    epochs = [int(line.split(",")[0]) for line in lines[1:-1]]
    assert epochs == list(range(epochs[0], start + 1)), epochs
    return plot_results(folder / "results.csv") if rng.random() < DRAWN else None


def draw(rng: np.random.Generator, folder: Path) -> object:
    """A file from anywhere, drawn."""
    _write(rng, folder / "results.csv")
    return plot_results(folder / "results.csv")


TARGETS = (
    Target("results_csv", resume),
    Target("results_png", draw),
)
