"""What a run stands on: logging and its wording, interruptions, device, seeds, timing.

torch is imported inside the functions that need it, so that `--help` stays fast.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from utils.config import UserError
from utils.distributed import local_rank, rank

if TYPE_CHECKING:
    from types import FrameType

    import torch

LOGGER = logging.getLogger("yolov5")
GRACE_SECONDS = 10.0  # between the first Ctrl-C and one that no longer waits for an orderly ending


def setup_logging() -> None:
    """Show the log on stdout, plain; ranks other than 0 show warnings only. Calling it again changes nothing."""
    if LOGGER.handlers:
        return
    handler = _Output(sys.stdout)
    handler.setFormatter(_PlainFormatter())
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO if rank() in (-1, 0) else logging.WARNING)
    LOGGER.propagate = False


class _Output(logging.StreamHandler):
    """A full disk or a reader that went away ends the script, once, in `run_script`."""

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], OSError):
            raise  # the error that is being handled where this is called
        super().handleError(record)


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = f"{record.levelname}: " if record.levelno >= logging.WARNING else ""
        return prefix + record.getMessage()


def run_script(main: Callable[[], Any]) -> None:
    """Run a script's `main`: a user's mistake becomes one line and exit code 2, an interruption 130, a bug 1."""
    setup_logging()
    _interrupt_once()
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as interruption:
        advice = f". {interruption}" if interruption.args else ""
        print(f"interrupted{advice}", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of our output (head, less) went away
        _drop_output()
        raise SystemExit(1) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        _drop_output()  # it may be what did not fit
        name = f"{error.filename}: " if error.filename else ""
        print(f"error: {name}{error.strerror}. Free some space, or write elsewhere with --project.", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # unlike a handler it holds while Python shuts down


def _drop_output() -> None:
    """Let the flush at the end of the process succeed."""
    with contextlib.suppress(io.UnsupportedOperation):  # not the process's own
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupt_once() -> None:
    """Let the first Ctrl-C raise KeyboardInterrupt and those after it nothing, so that they cannot disturb the ending.

    Once the ending has taken GRACE_SECONDS the next one ends the process at once. Where Python cannot raise
    (destructors, callbacks) the first one does. A process forked from this one ends silently.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, as by a shell's `&`, or taken
        return
    owner = os.getpid()
    taken: list[float] = []

    def end() -> NoReturn:
        os.write(2, b"interrupted\n")
        os._exit(130)

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            os._exit(130)
        taken.append(time.monotonic())
        if len(taken) == 1:
            raise KeyboardInterrupt
        if taken[-1] - taken[0] > GRACE_SECONDS:
            end()

    def unraisable(what: sys.UnraisableHookArgs) -> None:
        if what.exc_type is KeyboardInterrupt:
            end()
        sys.__unraisablehook__(what)

    signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = unraisable


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


def native_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 itself (AVX512-BF16 or AMX); where it does not, bf16 is slower than fp32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return False
    return " avx512_bf16" in flags or " amx_bf16" in flags


def check_half(device: torch.device) -> None:
    """Log what `--half` stands for on a CPU.

    Raises:
        UserError: neither a CUDA device nor a CPU with bf16 of its own.
    """
    if device.type == "cpu" and native_bf16():
        LOGGER.info("--half: computing in bf16, which this CPU multiplies itself; boxes and scores stay in fp32.")
    elif device.type != "cuda":
        raise UserError(
            "--half needs a CUDA device (fp16) or a CPU with AVX512-BF16 or AMX (bf16), and neither is used here. "
            "Leave it out: fp32 is the default."
        )


def _describe(device: torch.device) -> str:
    import torch

    where = "CPU"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        where = f"CUDA:{device.index} ({properties.name}, {properties.total_memory / 2**20:.0f} MiB)"
    elif device.type == "mps":
        where = "MPS"
    return f"Python {platform.python_version()}, torch {torch.__version__}, {where}"


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU, let the C library keep the memory of freed tensors for the next ones; glibc only, elsewhere nothing.

    By default glibc takes every large block from the kernel and gives it back when it is freed. The kernel then clears
    each page again at its first touch, which is up to a sixth of a training step (benchmarks/train.py). The process
    stays as large as it ever was.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of <malloc.h>
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


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
