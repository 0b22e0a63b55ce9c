"""Work dealt out to forked processes, and its answers in order. Processes of this kind exist on Linux only."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import warnings
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection
from typing import TypeVar

from utils.config import UserError

CAN_FORK = sys.platform.startswith("linux")  # elsewhere forked processes may not use the platform's libraries
Task = TypeVar("Task")
Answer = TypeVar("Answer")


def may_fork() -> bool:
    """Whether this process may have children of this kind: those of a pool may not."""
    return CAN_FORK and not multiprocessing.current_process().daemon


def in_processes(
    work: Callable[[Task], Answer], tasks: Sequence[Task], processes: int
) -> Generator[Answer, None, None]:
    """`work(task)` of every task, in their order, by that many processes; an exception of `work` is raised here.

    `work` need not be picklable, its answers must be, and it must use neither torch nor OpenCV. Each process sends its
    answers through a pipe of its own and holds no end of another, so that either side notices the end of the other.

    Raises:
        UserError: a process was ended from outside.
    """
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(processes)]

    def share(number: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's, which then ends this one
        for place, (reader, writer) in enumerate(pipes):
            reader.close()
            if place != number:
                writer.close()
        with contextlib.suppress(BrokenPipeError):  # the main process is gone
            _send_answers(pipes[number][1], work, tasks[number::processes])

    children = [context.Process(target=share, args=(number,), daemon=True) for number in range(processes)]
    try:
        with warnings.catch_warnings():
            # Python 3.12+ warns of any fork beside threads
            warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
            for child in children:
                child.start()
        for _, writer in pipes:
            writer.close()
        for number in range(len(tasks)):
            answer = pipes[number % processes][0].recv()
            if isinstance(answer, Exception):
                raise answer
            yield answer
    except (EOFError, ConnectionError):
        raise UserError("a process was ended from outside, most likely for want of memory. Start again.") from None
    finally:
        for child in children:
            if child.pid is not None:
                child.terminate()
                child.join()
        for reader, _ in pipes:
            reader.close()


def _send_answers(writer: Connection, work: Callable[[Task], Answer], tasks: Sequence[Task]) -> None:
    for task in tasks:
        try:
            answer: Answer | Exception = work(task)
        except Exception as error:  # raised where the answer is read
            answer = error
        writer.send(answer)
