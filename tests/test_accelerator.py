"""The whole program trains, resumes, validates and detects on an accelerator that is simulated (on_accelerator.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration


@pytest.mark.skipif(
    torch.accelerator.is_available(), reason="torch knows one accelerator at a time, and here is a real one"
)
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no backends written in Python",
)
@pytest.mark.slow
def test_the_program_runs_on_a_simulated_accelerator() -> None:
    """In a process of its own: the autograd engine must know the device before its first backward pass."""
    file = Path(__file__).with_name("on_accelerator.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        cwd=file.parent.parent,
        text=True,
        capture_output=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
