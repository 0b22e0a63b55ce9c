"""Ctrl-C, once and many times, at random moments of every script: one line, exit code 130, nobody left behind."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import write_tiny_dataset
from utils.config import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc to see what a process has loaded"),
]
REPEATS = int(os.environ.get("INTERRUPTS", "1"))  # of each script

TRAINING = "--data {data} --img 64 --batch 4 --epochs 99 --noplots --workers 2"
COMMANDS = {
    "train": f"train.py --cfg yolov5n.yaml {TRAINING}",
    "val": "val.py --data {data} --img 640 --batch 4 --workers 2 --single-cls",
    "detect": "detect.py --source {images} --img 640",
    "ablate": f"ablate.py --cfg yolov5n.yaml yolov5n.yaml+SE@after:SPPF {TRAINING} --folds 2 --jobs 2",
}
COMMON = "--weights yolov5n-shapes.pt --device cpu --project {folder}"


def loaded(pid: int, name: str) -> bool:
    try:
        return name in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def group(pgid: int) -> list[int]:
    """Processes of a group that still run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, of = (
                (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:3]
            )
        except OSError:
            continue
        if int(of) == pgid and state != "Z":
            found.append(int(folder.name))
    return found


@pytest.mark.parametrize("repeat", range(REPEATS))
@pytest.mark.parametrize("script", COMMANDS)
def test_ctrl_c_pressed_many_times_is_one_line(script: str, repeat: int, tmp_path: Path) -> None:
    dataset = write_tiny_dataset(tmp_path / "tiny", num_train=200, num_val=200)
    places = dict(data=dataset.yaml, folder=tmp_path / "runs", images=dataset.root / "images/train")
    words = f"{COMMANDS[script]} {COMMON}".format(**places)
    rng = random.Random(f"{script} {repeat}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "YOLOV5_CACHE_DIR": str(tmp_path / "cache")}
    log = tmp_path / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *words.split()],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's `&` has it ignored
        )
    try:
        while process.poll() is None and not loaded(process.pid, "numpy"):  # until then Python itself is starting
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 12))
        for _ in range(5):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
                time.sleep(rng.choice([0, 0.001, 0.05, 0.3]))
        code = process.wait(120)
        text = log.read_text(encoding="utf-8", errors="replace")
        assert "Traceback" not in text and "Error" not in text, text[-3000:]
        at_its_end = code == 0 and "Results saved to" in text
        lines = re.findall(r"^interrupted(?:\. Go on with: .* --resume .*last\.pt)?$", text, re.MULTILINE)
        assert at_its_end or (code, len(lines)) == (130, 1), text[-3000:]
        for _ in range(100):  # loader processes look for their parent every five seconds
            if not (left := group(process.pid)):
                break
            time.sleep(0.1)
        assert not left
    finally:
        for pid in group(process.pid):
            os.kill(pid, signal.SIGKILL)
