"""An ablation that is killed again and again says in the end what one that was left alone says."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import TinyDataset
from utils.config import ROOT

pytest.importorskip("scipy.stats", reason="scipy is the optional extra [ablate]")

COMMAND = (
    "ablate.py --cfg yolov5n.yaml yolov5n.yaml+SE@after:SPPF --folds 2 --seeds 2 --epochs 2 --img 64 --batch 4"
    " --workers 0 --noplots --device cpu --weights"
)
TIMES = ("latency", "memory", "seconds", "registered |", "commit |")  # decided by the clock, or changed meanwhile


def start(data: Path, project: Path) -> subprocess.Popen[bytes]:
    words = [*COMMAND.split(), str(ROOT / "yolov5n-shapes.pt"), "--data", str(data), "--project", str(project)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def kill_when(moment: Callable[[], bool], data: Path, project: Path) -> None:
    """Start the ablation, and kill all of its processes at once when something has come about."""
    run, limit = start(data, project), time.monotonic() + 500
    while not moment():
        assert run.poll() is None, f"ended with {run.returncode} before the moment came"
        assert time.monotonic() < limit
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()


def lines_of(report: Path) -> list[str]:
    """A report without what the clock decides: times, costs of running, and when it was registered."""
    text = re.sub(r"(?s)\n## Cost\n.*?\n## ", "\n## ", report.read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if not any(word in line for word in TIMES)]
    every_seed = text[text.index("## Every seed") : text.index("## Registered")].splitlines()
    shortened = {line: line.rsplit(" | ", 1)[0] for line in every_seed}  # the last column: seconds
    return [shortened.get(line, line) for line in lines]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no process groups to kill")
def test_killed_three_times_it_gives_the_same_report(own_tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    killed, alone = tmp_path / "killed", tmp_path / "alone"
    cells = killed / "exp/cells"
    data = own_tiny_dataset.yaml
    kill_when(lambda: (cells / "yolov5n/seed0").is_dir(), data, killed)  # the first cell has begun
    kill_when(lambda: any(cells.glob("yolov5n+SE*/seed0/weights/last.pt")), data, killed)  # within the second
    kill_when(lambda: len(list(cells.glob("*/seed*/cell.json"))) >= 2, data, killed)  # between cells, or in another one
    assert not (killed / "exp/report.md").exists()
    for project in (killed, alone):
        assert start(data, project).wait() == 0
    reports = [lines_of(project / "exp/report.md") for project in (killed, alone)]
    reports[0] = [line.replace(str(killed), str(alone)) for line in reports[0]]
    assert reports[0] == reports[1]
    assert "before the end" not in "\n".join(reports[0]) and len(reports[0]) > 80
    rows = []
    for project in (killed, alone):
        with (project / "exp/results.csv").open(encoding="utf-8", newline="") as lines:
            rows.append([{**row, "seconds": ""} for row in csv.DictReader(lines)])
    assert rows[0] == rows[1] and len(rows[0]) == 4
    for file in alone.rglob("judged.npz"):
        with np.load(file) as ours, np.load(killed / file.relative_to(alone)) as theirs:
            assert all(np.array_equal(ours[name], theirs[name]) for name in ours.files)
