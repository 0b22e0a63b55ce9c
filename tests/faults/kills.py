"""Kills trainings at random moments, resumes them until they end, and compares what they left with an undisturbed run.

Where a training is killed: at a random moment of its whole time, while it writes a file, or in its ending.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from models.checkpoints.files import read
from tests.faults.training import arguments, differences, outcome, prepare, start
from utils.files import PARTIAL

WAYS = ("moment", "write", "ending")
VARIANTS = (
    ("--workers", "0"),
    ("--workers", "2"),
    ("--workers", "0", "--cache", "disk"),
    ("--workers", "2", "--cache"),
)
MOST_PER_RUN = 4
PATIENCE = 300.0  # seconds
POLL = 0.002


@dataclass
class Tally:
    """What the kills came to."""

    runs: int = 0
    resumes: int = 0
    restarts: int = 0  # killed before the first checkpoint was there
    phases: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return sum(self.phases.values())

    def __str__(self) -> str:
        phases = ", ".join(f"{count} {phase}" for phase, count in self.phases.most_common())
        return (
            f"{self.kills} kills ({phases}) of {self.runs} trainings, {self.resumes} resumed and {self.restarts} begun"
            f" anew; {self.runs - len(self.failures)} of {self.runs} ended like the undisturbed one"
        )


def run(folder: Path, kills: int, seed: int, say: Callable[[object], None]) -> Tally:
    """Disturb trainings below an empty folder until there were so many kills."""
    tally = Tally()
    os.environ["YOLOV5_CACHE_DIR"] = str(folder / "cache")
    expected, seconds = _undisturbed(folder / "undisturbed")
    say(f"The undisturbed training takes {seconds:.1f} s.")
    while tally.kills < kills and len(tally.failures) < 5:
        rng = np.random.default_rng([seed, tally.runs])
        place = folder / f"run{tally.runs}"
        variant = VARIANTS[tally.runs % len(VARIANTS)]
        most = min(int(rng.integers(1, MOST_PER_RUN + 1)), kills - tally.kills)
        problem = _disturbed(place, variant, rng, most, seconds, tally) or _compared(place / "run", expected)
        tally.runs += 1
        if problem:
            tally.failures.append(f"seed {seed}, run {tally.runs - 1} ({' '.join(variant)}): {problem}")
        say(f"{' '.join(variant)}: {tally}")
    return tally


def _undisturbed(place: Path) -> tuple[dict[str, Any], float]:
    prepare(place)
    begun = time.monotonic()
    process = start(arguments(place, "--workers", "0"), place / "log.txt")
    process.join(PATIENCE)
    seconds = time.monotonic() - begun
    assert process.exitcode == 0, (place / "log.txt").read_text(encoding="utf-8")
    return outcome(place / "run"), seconds


def _disturbed(
    place: Path, variant: tuple[str, ...], rng: np.random.Generator, most: int, seconds: float, tally: Tally
) -> str:
    """Start, kill and resume one training until it ends; what went wrong."""
    prepare(place)
    log, last = place / "log.txt", place / "run" / "weights" / "last.pt"
    for attempt in range(most + 1):
        if attempt:
            tally.resumes += last.exists()
            tally.restarts += not last.exists()
        begun = log.stat().st_size if log.exists() else 0
        process = start(["--resume", str(last)] if last.exists() else arguments(place, *variant), log)
        if attempt < most:
            _kill(process, rng, log, begun, place / "run", seconds)
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
            return f"attempt {attempt} did not end: {_text(log, begun)[-500:]}"
        if process.exitcode == 0:
            return ""
        if attempt == most or process.exitcode > 0:
            return f"attempt {attempt} ended with {process.exitcode}: {_text(log, begun)[-2000:]}"
        over = last.exists() and read(last).training is None
        tally.phases["after the end" if over else _phase(_text(log, begun), place / "run")] += 1
        if over:  # what remained was to say so
            return ""
    return "it never ended"


def _kill(process: BaseProcess, rng: np.random.Generator, log: Path, begun: int, run: Path, seconds: float) -> None:
    """Kill at a moment that is chosen beforehand; a process that ends before it is left alone."""
    way, share = WAYS[int(rng.integers(0, len(WAYS)))], rng.random()
    if way == "moment":
        process.join(share * seconds)
    elif way == "write":
        number, seen = int(rng.integers(1, 9)), set[str]()
        for _ in _while_alive(process):
            seen.update(file.name for file in _partials(run))
            if len(seen) >= number:
                break
        process.join(0.02 * share)
    else:
        for _ in _while_alive(process):
            if "\nValidating " in _text(log, begun):
                break
        process.join(0.15 * share * seconds)
    process.kill()


def _while_alive(process: BaseProcess) -> Iterator[None]:
    end = time.monotonic() + PATIENCE
    while process.is_alive() and time.monotonic() < end:
        yield
        time.sleep(POLL)


def _text(log: Path, begun: int) -> str:
    return log.read_bytes()[begun:].decode("utf-8", "replace") if log.exists() else ""


def _partials(run: Path) -> list[Path]:
    return [*run.glob(PARTIAL), *(run / "weights").glob(PARTIAL)]


def _phase(text: str, run: Path) -> str:
    """What a killed process was doing, by its output and by what it left."""
    if _partials(run):
        return "writing a file"
    if "\nValidating " in text or "All epochs done" in text:
        return "in the ending"
    if "Training epochs" not in text:
        return "starting"
    epoch = text[text.rfind("Epoch") :]
    if " all " in epoch:
        return "after validation"
    return "validating" if "mAP50" in epoch else "training"


def _compared(run: Path, expected: dict[str, Any]) -> str:
    different = differences(expected, outcome(run))
    if different:
        return f"differs in {', '.join(different)}"
    left = _partials(run)
    return f"left {', '.join(file.name for file in left)}" if left else ""
