"""What a start costs as a dataset grows: scan, label cache and first batch, and memory of loader processes (Linux).

    python benchmarks/scale.py --sizes 10000 100000 1000000

Every size is a dataset of its own in a temporary folder: small JPEG files and labels of 1 to 12 boxes, hard links to
256 different ones of each kind, which the file system and the scan take for files like any others. "first start" reads
all of them up to the first training batch, "next start" finds the label cache; memory is that of all processes, pages
that are shared counted once. "copied by a worker" is what one loader process has written to of what it shared with its
parent, plus its own buffers: after the first batches, and after the last of `--batches`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.measuring import machine, peak_memory

KINDS, PER_FOLDER = 256, 1000  # ext4 allows 65,000 links to a file
EARLY = 20  # batches after which a worker has all its buffers
IMGSZ, BATCH = 64, 16


def main() -> None:
    """Print a table with a row for each size."""
    from utils.config import ArgumentParser, UserError, check_minimum

    parser = ArgumentParser(prog="benchmarks/scale.py", description="What starting costs as a dataset grows.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000], help="numbers of images")
    parser.add_argument("--batches", type=int, default=1000, help="batches of 16 over which workers are watched")
    parser.add_argument("--workers", type=int, default=2, help="loader processes")
    parser.add_argument("--folder", help="where the temporary folder is made")
    parser.add_argument("--start", help=argparse.SUPPRESS)  # measure one start on this dataset and say so there
    options = parser.parse_args()
    check_minimum(options, batches=EARLY + 1, workers=1)
    if min(options.sizes) < BATCH * (EARLY + 1):
        raise UserError(f"--sizes {min(options.sizes)}: expected {BATCH * (EARLY + 1)} or more.")
    if options.start:
        (Path(options.start) / "result.json").write_text(json.dumps(_start(options)))
        return
    print(machine())
    print("| images | first start | CPU | memory | next start | CPU | memory | copied by a worker |")
    print("|---|---|---|---|---|---|---|---|")
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            make_dataset(Path(folder), size)
            first, then = (_measured(options, folder, batches) for batches in (1, options.batches))
        cells = [f"{size:,}"]
        for start in (first, then):
            cells += [f"{start['seconds']:.1f} s", f"{start['cpu']:.1f} s", f"{start['memory'] / 1000:.2f} GB"]
        early, late = then["copied"]
        print(f"| {' | '.join(cells)} | {early:.0f}, later {late:.0f} MB |", flush=True)


def make_dataset(root: Path, size: int) -> None:
    """`images/` and `labels/` with that many files below `root`."""
    import cv2
    import numpy as np

    rng = np.random.default_rng(0)
    source = root / "source"
    source.mkdir()
    for kind in range(KINDS):
        shape_wh = (128, 96) if kind % 2 else (96, 128)
        picture = cv2.resize(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), shape_wh)
        cv2.imwrite(str(source / f"{kind}.jpg"), picture)
        boxes = rng.uniform((0.3, 0.3, 0.05, 0.05), (0.7, 0.7, 0.5, 0.5), (rng.integers(1, 13), 4))
        lines = (f"{rng.integers(80)} {' '.join(f'{value:.6f}' for value in box)}\n" for box in boxes)
        (source / f"{kind}.txt").write_text("".join(lines))
    for number in range(size):
        place = f"{number // PER_FOLDER:05d}"
        for folder, suffix in (("images", "jpg"), ("labels", "txt")):
            if number % PER_FOLDER == 0:
                (root / folder / place).mkdir(parents=True)
            os.link(source / f"{number % KINDS}.{suffix}", root / folder / place / f"{number:08d}.{suffix}")


def _measured(options: argparse.Namespace, folder: str, batches: int) -> dict[str, Any]:
    """One start in a process of its own."""
    words = ["--start", folder, "--batches", str(max(batches, EARLY + 1)), "--workers", str(options.workers)]
    memory = peak_memory([sys.executable, __file__, *words])[1]
    return {**json.loads((Path(folder) / "result.json").read_text()), "memory": memory}


def _start(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and CPU seconds to the first batch, imports left out, and MB that a worker has copied early and late."""
    from utils.data import load_dataset
    from utils.dataloaders import LoaderOptions, build_loader

    names = [f"class {number}" for number in range(80)]
    spec = load_dataset({"path": options.start, "train": "images", "val": "images", "names": names})
    how = LoaderOptions(IMGSZ, BATCH, augment=True, shuffle=True, workers=options.workers)
    begun, used = time.perf_counter(), _cpu_seconds()
    loader, _ = build_loader(spec, spec.train, how)
    batches, copied = iter(loader), []
    next(batches)
    result: dict[str, Any] = {"seconds": time.perf_counter() - begun, "cpu": _cpu_seconds() - used}
    last = min(options.batches, len(loader))
    for number, _ in enumerate(batches, 2):
        if number in (EARLY, last):
            copied.append(_copied_mb())
        if number == last:
            break
    loader.close()
    return {**result, "copied": (copied[0], copied[-1])}


def _cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


def _copied_mb() -> float:
    """The most that one child process holds alone."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    sizes = []
    for child in children:
        lines = Path(f"/proc/{child}/smaps_rollup").read_text().splitlines()
        sizes.append(sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty:", "Swap:"))) / 1000)
    return max(sizes)


if __name__ == "__main__":
    from utils.runtime import run_script

    run_script(main)
