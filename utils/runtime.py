"""What a run stands on: logging, device, seeds, distributed rank, run folder, caches, timing.

torch is imported inside the functions that need it, so that `--help` stays fast.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.config import ROOT, UserError, display_path

if TYPE_CHECKING:
    import torch

__all__ = [
    "LOGGER",
    "ROOT",
    "Stopwatch",
    "fp16_works",
    "increment_path",
    "init_seeds",
    "local_rank",
    "make_run_dir",
    "rank",
    "rank_zero_first",
    "relative",
    "run_script",
    "select_device",
    "setup_logging",
    "user_cache_dir",
    "world_size",
]

LOGGER = logging.getLogger("yolov5")
relative = display_path


def setup_logging() -> None:
    """Show the log on stdout, plain; ranks other than 0 show warnings only. Calling it again changes nothing."""
    if LOGGER.handlers:
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_PlainFormatter())
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO if rank() in (-1, 0) else logging.WARNING)
    LOGGER.propagate = False


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = f"{record.levelname}: " if record.levelno >= logging.WARNING else ""
        return prefix + record.getMessage()


def run_script(main: Callable[[], Any]) -> None:
    """Run a script's `main`: a user's mistake becomes one line and exit code 2, an interruption 130, a bug 1."""
    setup_logging()
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of our output (head, less) went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        name = f"{error.filename}: " if error.filename else ""
        print(f"error: {name}{error.strerror}. Free some space, or write elsewhere with --project.", file=sys.stderr)
        raise SystemExit(2) from None


# ------------------------------------------------------------------------------------------------------------ processes


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


# -------------------------------------------------------------------------------------------------------------- folders


def increment_path(path: str | Path, exist_ok: bool = False) -> Path:
    """The path itself where it is free (or `exist_ok`), else the first free one of `exp2`, `exp3`, ..."""
    path = Path(path)
    if exist_ok or not path.exists():
        return path
    stem, suffix = (path.stem, path.suffix) if path.is_file() else (path.name, "")
    for n in range(2, 10_000):
        candidate = path.with_name(f"{stem}{n}{suffix}")
        if not candidate.exists():
            return candidate
    raise UserError(f"{path}: 9998 numbered neighbours exist already. Choose another --name.")


def make_run_dir(options: argparse.Namespace, inside: str = "") -> Path:
    """The run folder `project/name`, numbered unless `exist_ok`, made together with a folder inside it.

    Raises:
        UserError: a file is in the way, or the place may not be written to.
    """
    run_dir = increment_path(Path(options.project) / options.name, options.exist_ok)
    try:
        (run_dir / inside).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"{relative(run_dir)}: cannot be made ({error.strerror}). Choose another --project.") from None
    return run_dir


def write_texts(texts: Mapping[Path, str]) -> None:
    """Write files, line ends as given, each in one step: all lie on the disk beside their places before any is moved.

    An interruption leaves an old file whole.

    Raises:
        UserError: a folder that is not there, may not be written to, or a full disk.
    """
    partials = {file: file.with_name(f".{file.name}.{os.getpid()}.partial") for file in texts}
    try:
        for file, partial in partials.items():
            partial.write_bytes(texts[file].encode("utf-8"))
        for file, partial in partials.items():
            os.replace(partial, file)
    except OSError as error:
        raise UserError(f"{relative(file)}: cannot be written ({error.strerror}).") from None
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)


def user_cache_dir() -> Path:
    """Our folder for what can be made again: `YOLOV5_CACHE_DIR`, else the system's cache folder. Not created here."""
    if os.environ.get("YOLOV5_CACHE_DIR"):
        return Path(os.environ["YOLOV5_CACHE_DIR"]).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "yolov5-attention"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "yolov5-attention"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "yolov5-attention"


# --------------------------------------------------------------------------------------------------------------- device


def select_device(name: str | torch.device = "", batch_size: int = 0) -> torch.device:
    """The device a flag such as `''`, `cpu`, `0`, `cuda:1` or `mps` stands for; the choice is logged.

    An empty name takes the first CUDA device, then Apple's, then the CPU. Under a launcher each process takes the CUDA
    device of its local rank. A CUDA device becomes this process's current one, which is where NCCL, pinned memory and
    everything without a device of its own go; otherwise every process would also hold memory on device 0.

    Raises:
        UserError: a device this machine does not have, or several of them without a launcher.
    """
    import torch

    text = str(name).strip().lower()
    text = "0" if text == "cuda" else text.replace("cuda:", "")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    available = f"{count} CUDA device{'s' * (count != 1)}"
    ids = [part.strip() for part in text.split(",") if part.strip()]
    if text == "cpu":
        device = torch.device("cpu")
    elif text == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("--device mps: this machine has no Apple GPU that torch can use. Use --device cpu.")
        device = torch.device("mps")
    elif ids:
        if not all(part.isdigit() for part in ids):
            raise UserError(f"--device {name}: expected cpu, mps, or CUDA numbers such as 0 or 0,1.")
        wrong = [part for part in ids if int(part) >= count]
        if wrong:
            raise UserError(
                f"--device {name}: there is no CUDA device {wrong[0]} here ({available}). Use --device cpu."
            )
        if len(ids) > 1 and local_rank() < 0:
            raise UserError(
                f"--device {name}: several GPUs need one process each. Start with "
                f"`torchrun --nproc_per_node {len(ids)} train.py --device {name} ...`."
            )
        if batch_size > 0 and batch_size % len(ids):
            raise UserError(
                f"--batch-size {batch_size} is not a multiple of the {len(ids)} devices in --device {name}."
            )
        device = torch.device("cuda", int(ids[local_rank() % len(ids)] if local_rank() >= 0 else ids[0]))
    elif count:
        device = torch.device("cuda", max(local_rank(), 0) % count)
    elif torch.backends.mps.is_available():
        device = torch.device("mps")
    else:
        device = torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before the description, which is the first to touch CUDA
    LOGGER.info(_describe(device))
    return device


def fp16_works(device: torch.device) -> bool:
    """Whether `--half` can be done on the device; a warning says so where it cannot, and fp32 is used."""
    if device.type != "cuda":
        LOGGER.warning("--half needs a CUDA device: computing in fp32.")
    return device.type == "cuda"


def _describe(device: torch.device) -> str:
    import torch

    where = "CPU"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        where = f"CUDA:{device.index} ({properties.name}, {properties.total_memory / 2**20:.0f} MiB)"
    elif device.type == "mps":
        where = "MPS"
    return f"Python {platform.python_version()}, torch {torch.__version__}, {where}"


def init_seeds(seed: int, deterministic: bool = True) -> None:
    """Seed Python, NumPy and torch; with `deterministic`, ask torch for reproducible kernels (warning where none)."""
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when its first handle is made
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False


class Stopwatch:
    """Adds up the time spent inside `with stopwatch:`; waits for an accelerator first: two syncs per block."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.seconds = 0.0
        self._device = device if device is not None and device.type != "cpu" else None

    def __enter__(self) -> Stopwatch:
        self._start = self._now()
        return self

    def __exit__(self, *exc: object) -> None:
        self.seconds += self._now() - self._start

    def _now(self) -> float:
        if self._device is not None:
            import torch

            torch.accelerator.synchronize(self._device)
        return time.perf_counter()
