"""Several processes that train together: ranks, the group, and what all of them agree on.

torch is imported inside the functions that need it, so that `--help` stays fast.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from utils.config import UserError

if TYPE_CHECKING:
    import torch

MAX_PATH = 4096  # bytes, Linux's own limit


def rank() -> int:
    """This process's rank under a distributed launcher, -1 without one."""
    return int(os.environ.get("RANK", "-1"))


def local_rank() -> int:
    """This process's rank on its own machine, -1 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "-1"))


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def rank_zero_first() -> Iterator[None]:
    """Let rank 0 run the block (fetch, draw, cache) before the others; nothing happens in a single process."""
    import torch.distributed as dist

    together = dist.is_available() and dist.is_initialized()
    if together and rank() > 0:
        dist.barrier()
    yield
    if together and rank() == 0:
        dist.barrier()


def is_main() -> bool:
    """Whether this process validates and writes: the only one, or rank 0."""
    return rank() in (-1, 0)


@contextlib.contextmanager
def process_group(device: torch.device, batch_size: int) -> Iterator[None]:
    """The processes a launcher started, able to talk to each other inside the block; nothing for a single one.

    Raises:
        UserError: a batch that cannot be shared out equally, or that a single GPU would have to measure.
    """
    if world_size() == 1:
        yield
        return
    if batch_size == -1:
        raise UserError(
            f"--batch-size -1 measures one GPU, and here {world_size()} processes train. Give a number, a multiple of "
            f"{world_size()}."
        )
    if batch_size % world_size():
        raise UserError(f"--batch-size {batch_size}: expected a multiple of the {world_size()} processes.")
    import torch.distributed as dist

    # Hours: the other processes wait while rank 0 fetches data or validates.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=3))
    try:
        yield
    finally:
        dist.destroy_process_group()


def agreed(stop: bool, device: torch.device) -> bool:
    """The main process's decision, on every process."""
    if world_size() == 1:
        return stop
    import torch
    import torch.distributed as dist

    flag = torch.tensor([int(stop)], device=device)
    dist.broadcast(flag, 0)
    return bool(flag.item())


def agreed_path(path: Path | None, device: torch.device) -> Path:
    """The main process's path, on every process; the others give None."""
    if world_size() == 1:
        assert path is not None
        return path
    import torch
    import torch.distributed as dist

    name = os.fsencode(path) if path is not None else b""
    buffer = torch.zeros(MAX_PATH, dtype=torch.uint8)
    buffer[: len(name)] = torch.frombuffer(bytearray(name), dtype=torch.uint8) if name else 0
    buffer = buffer.to(device)
    dist.broadcast(buffer, 0)
    return Path(os.fsdecode(bytes(buffer.tolist()).rstrip(b"\0")))
