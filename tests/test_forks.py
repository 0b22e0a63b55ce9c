"""Work dealt out to forked processes: its order, its errors, and who ends when."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils.config import UserError
from utils.forks import CAN_FORK, in_processes, may_fork

pytestmark = pytest.mark.skipif(not CAN_FORK, reason="processes are forked on Linux only")


@pytest.mark.parametrize("processes", (1, 2, 5))
def test_answers_come_in_the_order_of_the_tasks_from_other_processes(processes: int) -> None:
    answers = list(in_processes(lambda task: (task * 2, os.getpid()), range(11), processes))
    assert [answer for answer, _ in answers] == list(range(0, 22, 2))
    assert len({pid for _, pid in answers} - {os.getpid()}) == processes
    assert not multiprocessing.active_children()


def test_an_answer_larger_than_a_pipe_arrives_whole() -> None:
    assert [len(answer) for answer in in_processes(lambda task: bytes(task), [1 << 20, 3, 1 << 21], 2)] == [
        1 << 20,
        3,
        1 << 21,
    ]


def test_an_error_in_a_process_is_raised_and_ends_the_others() -> None:
    def work(task: int) -> int:
        return 1 // (task - 3)

    with pytest.raises(ZeroDivisionError):
        list(in_processes(work, range(100), 2))
    assert not multiprocessing.active_children()


def test_a_process_that_is_killed_ends_the_work_in_one_line() -> None:
    def work(task: int) -> int:
        if task == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return task

    with pytest.raises(UserError, match="ended from outside"):
        list(in_processes(work, range(100), 2))
    assert not multiprocessing.active_children()


def test_leaving_early_ends_the_processes() -> None:
    answers = in_processes(lambda task: task, range(10_000), 2)
    assert next(answers) == 0 and len(multiprocessing.active_children()) == 2
    answers.close()
    assert not multiprocessing.active_children()


def test_the_process_of_a_pool_may_not_fork() -> None:
    assert may_fork() and list(in_processes(lambda task: may_fork(), [0], 1)) == [False]


PARENT = """
import os, sys
from utils.forks import in_processes
for pid in in_processes(lambda task: os.getpid(), range(10**6), 2):
    print(pid, flush=True)
    if len(sys.argv) > 2 and sys.argv.pop():
        continue
    os.kill(os.getpid(), 9)
"""


def test_the_processes_end_with_a_parent_that_is_killed() -> None:
    root = Path(__file__).resolve().parent.parent
    words = [sys.executable, "-c", PARENT, "first", "second"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=root, timeout=60)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(set(pids)) == 2
    for _ in range(100):
        if not any(_is_alive(pid) for pid in pids):
            return
        time.sleep(0.1)
    pytest.fail(f"{pids} still run")


def _is_alive(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
