"""How the benchmarks measure: variants in turns within one run, ratios of each turn, peak memory of a process tree."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_SECONDS = 0.05


@dataclass(frozen=True)
class Row:
    """One line of a table: what was measured, its median, and how it compares with something else of the same run."""

    what: str
    value: str
    against: str = ""
    ratio: float | None = None
    spread: tuple[float, float] | None = None

    def cells(self) -> list[str]:
        """The cells of a Markdown table."""
        if self.ratio is None or self.spread is None:
            return [self.what, self.value, self.against, "", ""]
        return [
            self.what,
            self.value,
            self.against,
            f"{self.ratio:.2f}",
            f"{self.spread[0]:.2f} to {self.spread[1]:.2f}",
        ]


def build_parser(what: str) -> argparse.ArgumentParser:
    """The flags that all benchmarks share."""
    from utils.config import ArgumentParser

    parser = ArgumentParser(prog=f"benchmarks/{what}.py", description=f"Benchmark of {what}.")
    parser.add_argument("--weights", default=str(ROOT / "yolov5n-shapes.pt"), help="checkpoint")
    parser.add_argument("--data", default=str(ROOT / "data/shapes.yaml"), help="dataset YAML")
    parser.add_argument("--imgsz", "--img", type=int, default=640, help="image size in pixels")
    parser.add_argument("--images", type=int, default=128, help="most images")
    parser.add_argument("--rounds", type=int, default=5, help="turns of all variants")
    return parser


def in_turns(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round, after one round that is not counted.

    Variants are taken in turns, so that a slow minute of the machine falls on all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def compared(what: str, ours: Sequence[float], against: str, theirs: Sequence[float], per: float, unit: str) -> Row:
    """A row with our median in `unit` (seconds divided by `per`) and the ratio ours / theirs, round by round."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    value = f"{statistics.median(ours) / per:.3g} {unit}"
    return Row(what, value, against, statistics.median(ratios), (min(ratios), max(ratios)))


def peak_memory(command: Sequence[str]) -> tuple[float, float]:
    """Seconds that a command took, and MB that its whole process tree held at most (Linux; shared pages once)."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0.0
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_SECONDS):
            peak = max(peak, sum(map(_share_mb, _tree(process.pid))))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    code = process.wait()
    done.set()
    thread.join()
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with status {code}")
    return time.perf_counter() - start, peak


def _tree(pid: int) -> list[int]:
    """A process and everything it started."""
    found = [pid]
    for each in found:
        for task in Path(f"/proc/{each}/task").glob("*/children"):
            try:
                found += [int(child) for child in task.read_text().split()]
            except OSError:  # it ended
                continue
    return found


def _share_mb(pid: int) -> float:
    """MB of a process, pages shared with others counted in parts; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1000 for line in lines if line.startswith("Pss:")), 0.0)


def machine() -> str:
    """The processor, its cores, the versions and the commit."""
    import cv2
    import torch

    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return (
        f"{model}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}, "
        f"OpenCV {cv2.__version__}; commit {commit.strip() or 'unknown'}"
    )


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| what | median | against | ratio | of the rounds |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(row.cells()) + " |" for row in rows)])


def main_of(what: str, measure: Callable[[argparse.Namespace], list[Row]]) -> None:
    """Run one benchmark from the command line and print its table."""
    from utils.runtime import run_script

    def main() -> None:
        print(table(measure(build_parser(what).parse_args(sys.argv[1:]))))

    run_script(main)
