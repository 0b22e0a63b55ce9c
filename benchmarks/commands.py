"""Whole commands, from typing to the end: seconds, and peak memory of all their processes (Linux).

python benchmarks/commands.py --data coco128.yaml --weights yolov5n.pt --img 640
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.measuring import Row, main_of, peak_memory

ROUNDS = 3


def measure(options: argparse.Namespace) -> list[Row]:
    """Seconds and MB of val.py, detect.py and three epochs of train.py."""
    from utils.data import prepare

    source = str(prepare(options.data).split("val")[0])
    common = ["--weights", options.weights, "--img", str(options.imgsz), "--device", "cpu"]
    data = ["--data", options.data]
    train = [*common, *data, "--epochs", "3", "--batch", "16", "--noplots"]
    commands = {
        "`val.py`": ["val.py", *common, *data],
        "`detect.py`": ["detect.py", *common, "--source", source],
        "`train.py`, 3 epochs, no plots": ["train.py", *train],
    }
    rows = []
    for name, words in commands.items():
        seconds, memory = [], []
        for _ in range(min(options.rounds, ROUNDS)):
            with tempfile.TemporaryDirectory() as folder:
                taken, peak = peak_memory([sys.executable, *words, "--project", folder])
            seconds.append(taken)
            memory.append(peak)
        spread = f"{min(seconds):.1f} to {max(seconds):.1f} s"
        rows.append(Row(f"{name}, {options.imgsz} px", f"{statistics.median(seconds):.1f} s", spread))
        rows.append(Row(f"{name}, peak memory", f"{statistics.median(memory) / 1000:.2f} GB"))
    return rows


if __name__ == "__main__":
    main_of("commands", measure)
