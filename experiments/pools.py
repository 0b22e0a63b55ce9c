"""Where the cells of an experiment run: a pool of processes here, or the slots of a Ray cluster.

Both are executors as in `concurrent.futures`.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from utils.config import UserError
from utils.runtime import LOGGER

CARRIED = ("YOLOV5_WEIGHTS_DIR", "YOLOV5_DATASETS_DIR", "YOLOv5_DATASETS_DIR", "YOLOV5_CACHE_DIR")


class LocalPool(ProcessPoolExecutor):
    """`jobs` processes with `threads` threads each; `devices` are CUDA numbers dealt out to them in turn.

    They end at once when the ablation is interrupted or killed: trainings that go on unseen would meet those of its
    next start in the same folders.
    """

    def __init__(self, jobs: int, threads: int, devices: Sequence[str]) -> None:
        context = get_context("spawn")
        shares = None
        if devices:
            shares = context.Queue()
            for job in range(jobs):
                shares.put(devices[job % len(devices)])
        # Only this process holds the end that is written to, and nothing is: its readers wake when it is closed.
        reader, self._lifeline = context.Pipe(duplex=False)
        super().__init__(jobs, context, _start_process, (threads, shares, reader))

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """A future of `work(*args, **kwargs)`. The process that may be started for it never hears Ctrl-C.

        What is blocked here is blocked in a new process, too; here it comes a moment later.
        """
        if sys.platform == "win32":
            return super().submit(work, *args, **kwargs)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().submit(work, *args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> bool | None:
        if kind is not None and not issubclass(kind, Exception):  # Ctrl-C; after a mistake there is time to end well
            self._lifeline.close()
        self.shutdown(cancel_futures=kind is not None)
        return None


def _start_process(threads: int, shares: Any, lifeline: Connection) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the ablation's: here it would only end one cell of many
    torch.set_num_threads(threads)
    if shares is not None:
        os.environ["ABLATE_DEVICE"] = shares.get()
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()


def _end_with(lifeline: Connection) -> None:
    wait([lifeline])
    os._exit(1)


class RayPool(Executor):
    """One cell per slot of a Ray cluster: one GPU where it has any, else as many CPUs as a cell has threads.

    It is the cluster that RAY_ADDRESS names or that runs on this machine; without one, Ray is started here and ends
    with the pool. Every node must see this repository, the data and the ablation's folder under the same paths. A cell
    whose node is lost is started again elsewhere, and goes on from its last epoch.

    Raises:
        UserError: Ray is not installed, or the cluster cannot be reached or has no such slot.
    """

    def __init__(self, threads: int) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read by ray.init; without it Ray reports its use over the network
        try:
            import ray
        except ImportError:
            raise UserError('--engine ray needs Ray: pip install -e ".[ray]". Or use --engine local.') from None
        self._ray, self._threads = ray, threads
        address = os.environ.get("RAY_ADDRESS", "")
        if "://" not in address and ":" in address:
            _check_reachable(address)  # Ray itself gives up after two minutes, with a page of its own log
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            ray.init(address="auto", **quiet)
        except ConnectionError as error:
            if address:
                raise UserError(f"RAY_ADDRESS={address}: {str(error).splitlines()[0]}") from None
            ray.init(num_cpus=os.cpu_count(), include_dashboard=False, object_store_memory=100 * 2**20, **quiet)
        has = ray.cluster_resources()
        gpus = int(has.get("GPU", 0))
        needs: dict[str, Any] = {"num_cpus": 1, "num_gpus": 1} if gpus else {"num_cpus": threads, "num_gpus": 0}
        slots = gpus or sum(int(node["Resources"].get("CPU", 0)) // threads for node in ray.nodes() if node["Alive"])
        if not slots:
            ray.shutdown()
            raise UserError(f"no node of the Ray cluster has the {threads} CPUs of a cell. Give more --jobs per node.")
        LOGGER.info(f"Ray: {slots} slots of {'one GPU' if gpus else f'{threads} CPUs'} on {len(ray.nodes())} nodes")
        self._task = ray.remote(**needs)(_at_node)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let go of the cluster; cells that still run there are ended."""
        self._ray.shutdown()

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """A future of `work(*args, **kwargs)`, `work` being a function of one of the repository's modules."""
        # By name: Ray would send a function of the script that was started by value, with all that it refers to.
        module = Path(sys.argv[0]).stem if work.__module__ == "__main__" else work.__module__
        carried = {name: os.environ[name] for name in CARRIED if name in os.environ}
        reference = self._task.remote(os.getcwd(), carried, self._threads, module, work.__name__, args, kwargs)
        answer: Future[Any] = Future()

        def hand_over(done: Future[Any]) -> None:
            error = done.exception()
            if error is None:
                answer.set_result(done.result())
            else:  # what was raised there, not Ray's wrapping of it
                answer.set_exception(getattr(error, "cause", None) or error)

        reference.future().add_done_callback(hand_over)
        return answer


def _check_reachable(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"RAY_ADDRESS={address}: no Ray cluster answers there ({error}). Start one with 'ray start --head', or"
            " unset RAY_ADDRESS: then Ray is started here."
        ) from None


def _at_node(
    folder: str, variables: dict[str, str], threads: int, module: str, name: str, args: Any, kwargs: Any
) -> Any:
    """What a slot does: stand where the ablation was started, and run `module.name(*args, **kwargs)`."""
    import torch

    os.environ.update(variables)
    os.chdir(folder)
    torch.set_num_threads(threads)
    return getattr(importlib.import_module(module), name)(*args, **kwargs)
