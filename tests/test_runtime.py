"""Device choice, seeds, interruptions, exit codes."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch

from utils.config import ROOT, UserError
from utils.runtime import Stopwatch, init_seeds, run_script, select_device


@pytest.fixture(autouse=True)
def own_interrupts() -> Iterator[None]:
    """`run_script` sets them for the rest of its process."""
    handler, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    yield
    signal.signal(signal.SIGINT, handler)
    sys.unraisablehook = hook


def raising(error: BaseException) -> Callable[[], NoReturn]:
    def main() -> NoReturn:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("a.yaml:3: no"), 2, "error: a.yaml:3: no\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/last.pt"), 2, "runs/last.pt"),
    ],
)
def test_a_users_mistake_is_one_line(
    error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_script(raising(error))
    assert caught.value.code == code
    stderr = capsys.readouterr().err
    assert text in stderr
    assert stderr.count("\n") == 1


@pytest.mark.parametrize(("sink", "code", "said"), [("/dev/full", 2, "No space left on device"), (None, 1, "")])
def test_output_that_cannot_be_written_ends_the_script_without_a_traceback(
    sink: str | None, code: int, said: str
) -> None:
    """A full disk below `> log.txt`, and a reader such as `head` that went away."""
    if sink and not Path(sink).exists():
        pytest.skip("this system has no /dev/full")
    script = (
        "from utils.runtime import LOGGER, run_script\nrun_script(lambda: [LOGGER.info('a line') for _ in range(9)])"
    )
    reader, writer = os.pipe()
    os.close(reader)
    with open(sink, "w") if sink else os.fdopen(writer, "w") as output:
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, stdout=output, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == code and done.stderr.count("\n") == bool(said) and said in done.stderr


INTERRUPTED = """
import signal, sys, time
import utils.runtime
from utils.runtime import run_script
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored

class Slow:
    def __del__(self):
        print("here", flush=True)
        time.sleep(30)

def cleanup(seconds):
    try:
        print("here", flush=True)
        time.sleep(30)
    finally:
        time.sleep(seconds)
        print("cleaned", flush=True)

def impatient():
    utils.runtime.GRACE_SECONDS = 0.1
    cleanup(30)

def destructor():
    Slow()
    time.sleep(30)

run_script({"ending": lambda: cleanup(1.5), "impatient": impatient, "destructor": destructor}[sys.argv[1]])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows interrupts whole consoles only")
@pytest.mark.parametrize(("what", "out"), [("ending", "cleaned\n"), ("impatient", ""), ("destructor", "")])
def test_an_ending_is_not_disturbed_by_more_ctrl_c_unless_it_takes_too_long(what: str, out: str) -> None:
    """And where Python swallows what is raised, in a destructor, Ctrl-C is not lost."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    command = [sys.executable, "-c", INTERRUPTED, what]
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "here\n"
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        assert process.communicate(timeout=20) == (out, "interrupted\n")
    assert process.returncode == 130


def test_our_own_mistake_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_script(raising(ZeroDivisionError()))


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="no CUDA device 99"):
        select_device("99")
    with pytest.raises(UserError, match="expected cpu, mps, or CUDA numbers"):
        select_device("gpu")


def test_several_devices_without_a_launcher_name_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="torchrun --nproc_per_node 2"):
        select_device("0,1")


def test_each_process_takes_the_device_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    done: list[tuple[str, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(("current", device)))
    monkeypatch.setattr("utils.runtime._describe", lambda device: done.append(("described", device)))
    monkeypatch.setenv("LOCAL_RANK", "1")
    third, second = torch.device("cuda", 3), torch.device("cuda", 1)
    assert select_device("2,3") == third
    assert select_device("") == second
    # the description is the first to touch CUDA: it must find the current device set
    assert done == [("current", third), ("described", third), ("current", second), ("described", second)]


def test_cpu_is_cpu() -> None:
    assert select_device("cpu") == torch.device("cpu")


def test_the_same_seed_gives_the_same_numbers() -> None:
    def draw() -> tuple[float, float, float]:
        init_seeds(3, deterministic=False)
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    assert draw() == draw()


def test_a_stopwatch_waits_for_its_own_device_and_not_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    for device in (torch.device("cuda", 3), torch.device("mps"), torch.device("cpu"), None):
        with Stopwatch(device):
            pass
    assert waited == [torch.device("cuda", 3)] * 2 + [torch.device("mps")] * 2


def test_a_stopwatch_adds_up() -> None:
    watch = Stopwatch()
    with watch:
        first = watch.seconds
    with watch:
        pass
    assert first == 0.0
    assert watch.seconds > 0.0


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_used_again_without_new_pages_from_the_kernel() -> None:
    program = """
import resource, sys
import torch
from utils.runtime import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
plain = faults()
keep_freed_memory(torch.device("cpu"))
faults()
print(plain, faults())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    plain, kept = map(int, done.stdout.split())
    assert plain > 0 and kept < plain / 20
