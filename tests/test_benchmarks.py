"""The benchmarks measure what they say: turns, ratios within a round, memory of a whole process tree; and they run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.measuring import Row, compared, in_turns, peak_memory, table

ROOT = Path(__file__).resolve().parent.parent


def test_variants_take_turns_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    seconds = in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_ratios_are_taken_round_by_round() -> None:
    row = compared("work", [2.0, 30.0, 3.0], "other", [1.0, 10.0, 2.0], 1, "s")
    assert (row.value, row.ratio, row.spread) == ("3 s", 2.0, (1.5, 3.0))
    assert table([row, Row("size", "5 MB")]).splitlines()[2:] == [
        "| work | 3 s | other | 2.00 | 1.50 to 3.00 |",
        "| size | 5 MB |  |  |  |",
    ]


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from Linux's /proc")
def test_the_memory_of_child_processes_counts() -> None:
    child = "import time; block = b'1' * 200_000_000; time.sleep(0.6)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    seconds, peak = peak_memory([sys.executable, "-c", parent])
    assert 200 < peak < 300 and seconds > 0.6


@pytest.mark.slow
def test_a_benchmark_prints_its_table() -> None:
    command = [sys.executable, "benchmarks/steps.py", "--img", "64", "--rounds", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line.split(" | ")[0] for line in done.stdout.splitlines() if line.startswith("|")][2:] == [
        "| loss and its gradient, batch of 16",
        "| average of the weights",
        "| NMS at confidence 0.001, batch of 16",
    ]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from Linux's /proc")
def test_the_scale_benchmark_prints_a_row_for_each_size() -> None:
    command = [sys.executable, "benchmarks/scale.py", "--sizes", "400", "700", "--batches", "30"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| images", "| 400", "| 700"] and all(len(row) == 8 for row in rows)
