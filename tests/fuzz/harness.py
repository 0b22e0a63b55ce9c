"""Runs fuzz cases in a process of their own, and watches it.

A right answer to any input is a result or a `UserError` of one line. A finding is anything else: another exception, a
case that takes more CPU seconds or memory than its target allows, or a process that dies. Case `i` of a target is the
same on every machine: its random generator is made from (seed, target, i) alone.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from utils.config import MAX_MESSAGE, UserError

POLL_SECONDS = 0.2
KILL_MB = 4000.0  # growth at which a case is ended before it takes the machine down


@dataclass(frozen=True)
class Target:
    """One entry of the program. `case(rng, folder)` makes an input in the empty folder and gives it to the program.

    `seconds` of CPU and `megabytes` of growth are what one case may take.
    """

    name: str
    case: Callable[[np.random.Generator, Path], object]
    seconds: float = 10.0
    megabytes: float = 1000.0


@dataclass(frozen=True)
class Finding:
    """What went wrong in one case: `python -m tests.fuzz --only TARGET --seed SEED --case NUMBER` shows it again."""

    target: str
    seed: int
    number: int
    what: str

    def __str__(self) -> str:
        again = f"python -m tests.fuzz --only {self.target} --seed {self.seed} --case {self.number}"
        return f"{self.target} case {self.number}: {self.what}\n  {again}"


@dataclass
class Tally:
    """What the cases of one target came to; the peaks are those of a single case."""

    target: str
    results: int = 0
    refusals: int = 0
    peak_seconds: float = 0.0
    peak_megabytes: float = 0.0
    findings: list[Finding] = field(default_factory=list)

    @property
    def cases(self) -> int:
        return self.results + self.refusals + len(self.findings)

    def __str__(self) -> str:
        return (
            f"{self.target}: {self.cases} cases, {self.results} read, {self.refusals} refused,"
            f" {len(self.findings)} findings; at most {self.peak_seconds:.1f} s of CPU and"
            f" {self.peak_megabytes:.0f} MB in one"
        )


def random_of(target: Target, seed: int, number: int) -> np.random.Generator:
    """The generator of one case."""
    return np.random.default_rng([seed, zlib.crc32(target.name.encode()), number])


def run_case(target: Target, seed: int, number: int) -> str:
    """Run one case in this process: 'result', 'refusal', or the traceback of what should not have been raised."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        target.case(random_of(target, seed, number), folder)
    except UserError as error:
        text = str(error)
        if "\n" in text or len(text) > MAX_MESSAGE:
            return f"a message of {len(text)} characters and {text.count(chr(10)) + 1} lines: {text[:200]!r}"
        return "refusal"
    except Exception:
        return traceback.format_exc()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return "result"


def run(target: Target, *, seed: int = 0, cases: int | None = None, seconds: float | None = None) -> Tally:
    """Run cases 0, 1, 2, ... until there were `cases` of them, or `seconds` have passed since the first one began."""
    assert cases is not None or seconds is not None
    tally, number, end = Tally(target.name), 0, float("inf")

    def over() -> bool:
        return (cases is not None and number >= cases) or time.monotonic() >= end

    while not over():
        worker = _Worker(target, seed, number)
        if seconds is not None and number == 0:
            end = time.monotonic() + seconds
        try:
            while not over() and worker.alive:
                outcome, spent, grown = worker.next()
                tally.peak_seconds = max(tally.peak_seconds, spent)
                tally.peak_megabytes = max(tally.peak_megabytes, grown)
                problem = _problem(target, outcome, spent, grown)
                if problem:
                    tally.findings.append(Finding(target.name, seed, number, problem))
                else:
                    tally.results += outcome == "result"
                    tally.refusals += outcome == "refusal"
                number += 1
        finally:
            worker.close()
    return tally


def _problem(target: Target, outcome: str, seconds: float, megabytes: float) -> str:
    if outcome not in ("result", "refusal"):
        return outcome
    if seconds > target.seconds:
        return f"took {seconds:.1f} s of CPU, allowed are {target.seconds:g}"
    if megabytes > target.megabytes:
        return f"took {megabytes:.0f} MB, allowed are {target.megabytes:g}"
    return ""


class _Worker:
    """A process that runs cases from `first` on, one per message, and is ended where one takes too much."""

    def __init__(self, target: Target, seed: int, first: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._limit = target.seconds
        self._process = context.Process(target=_work, args=(theirs, target, seed, first), daemon=True)
        self._process.start()
        theirs.close()
        self.alive = True
        self._connection.recv()  # everything is imported

    def next(self) -> tuple[str, float, float]:
        """Outcome, CPU seconds and megabytes of the next case."""
        cpu, memory = _usage(self._process.pid)
        self._connection.send("go")
        spent = grown = 0.0
        while not self._connection.poll(POLL_SECONDS):
            now, peak = _usage(self._process.pid)
            spent, grown = now - cpu, max(peak - memory, grown)
            if spent > 2 * self._limit + 5 or grown > KILL_MB:
                self.close()
                return f"ended after {spent:.0f} s of CPU at {grown:.0f} MB", spent, grown
        try:
            return self._connection.recv()
        except EOFError:
            self.close()
            return f"the process died (exit code {self._process.exitcode})", spent, grown

    def close(self) -> None:
        self.alive = False
        self._process.kill()
        self._process.join()


def _work(connection: Connection, target: Target, seed: int, number: int) -> None:
    import torch

    torch.set_num_threads(1)
    os.chdir(tempfile.mkdtemp(prefix="fuzz-cwd-"))
    connection.send("ready")
    while True:
        connection.recv()
        _reset_peak()
        cpu, memory = time.process_time(), _status("VmRSS")
        outcome = run_case(target, seed, number)
        connection.send((outcome, time.process_time() - cpu, max(_status("VmHWM") - memory, 0.0)))
        number += 1


def _status(name: str, pid: int | str = "self") -> float:
    """A line of /proc/PID/status in MB; 0 on systems without."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:")), 0.0)


def _reset_peak() -> None:
    """Let the kernel forget the highest memory use so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:  # not Linux: the peak is then 0
        return


def _usage(pid: int | None) -> tuple[float, float]:
    """CPU seconds and resident MB of a process; zeros where /proc does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0.0, 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), _status("VmRSS", pid or 0)


def report(tallies: Sequence[Tally]) -> str:
    """A line per target, then every finding."""
    lines = [str(tally) for tally in tallies]
    return "\n".join([*lines, *(str(finding) for tally in tallies for finding in tally.findings)])
