"""What one call may take: CPU seconds and megabytes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.fuzz.harness import _reset_peak, _status


@contextmanager
def bounded(seconds: float, megabytes: float) -> Iterator[None]:
    """Fail where the block takes more CPU or, on Linux, more memory than it may."""
    _reset_peak()
    cpu, memory = time.process_time(), _status("VmRSS")
    yield
    spent, grown = time.process_time() - cpu, _status("VmHWM") - memory
    assert spent <= seconds, f"{spent:.1f} s of CPU, allowed are {seconds:g}"
    assert grown <= megabytes, f"{grown:.0f} MB, allowed are {megabytes:g}"
