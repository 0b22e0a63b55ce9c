"""What a checkpoint's exports are worth on this machine: size, mAP50-95 and milliseconds per image of each format.

    python benchmarks/formats.py --weights yolov5n.pt --data coco128.yaml --img 640

The files are written into `--out`. Milliseconds are those of the network alone, one image at a time, the median of
`--runs` after a warm-up; run it on a machine that has nothing else to do.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

CELLS = {  # row of the table -> what export.py is asked for
    "torchscript": {"include": ["torchscript"]},
    "onnx": {"include": ["onnx"]},
    "onnx, slimmed": {"include": ["onnx"], "simplify": True},
    "onnx, dynamic": {"include": ["onnx"], "dynamic": True},
    "openvino fp32": {"include": ["openvino"]},
    "openvino fp16": {"include": ["openvino"], "half": True},
    "openvino int8": {"include": ["openvino"], "int8": True},
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    from utils.config import ArgumentParser

    parser = ArgumentParser(prog="benchmarks/formats.py", description="Size, mAP and time of each export format.")
    parser.add_argument("--weights", default="yolov5n.pt", help="checkpoint")
    parser.add_argument("--data", default=str(ROOT / "data/coco128.yaml"), help="dataset YAML")
    parser.add_argument("--imgsz", "--img", type=int, default=640, help="image size in pixels")
    parser.add_argument("--runs", type=int, default=30, help="timed passes per format")
    parser.add_argument("--out", default=str(ROOT / "runs/formats"), help="folder for the exported files")
    return parser


def main() -> None:
    """Print a Markdown table."""
    options = build_parser().parse_args()
    import shutil

    import export
    from models.backends import load
    from utils.config import UserError
    from utils.downloads import find_weights

    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / Path(options.weights).name
    shutil.copyfile(find_weights(options.weights), weights)
    rows = []
    for name, asked in {"pytorch": None, **CELLS}.items():
        try:
            same = {"weights": str(weights), "imgsz": [options.imgsz], "data": options.data}
            path = Path(export.run(**same, **asked)[0]) if asked else weights
        except (UserError, export.Mismatch) as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        network = load(path)
        size = (options.imgsz, options.imgsz)
        network.size_hw = size
        ap = export.mean_ap(network, options.data)
        rows.append((name, export.size_mb(path), ap, milliseconds(network, size, options.runs)))
    print("| format | MB | mAP50-95 | ms |\n|---|---|---|---|")
    for name, size_mb, ap, ms in rows:
        print(f"| {name} | {size_mb:.1f} | {ap:.4f} | {ms:.1f} |")


def milliseconds(network, size_hw: tuple[int, int], runs: int) -> float:  # type: ignore[no-untyped-def]
    """The median time of a pass over one image."""
    import torch

    image = torch.rand(1, 3, *size_hw).to(memory_format=torch.channels_last)
    times = []
    with torch.inference_mode():
        for number in range(runs + 3):
            start = time.perf_counter()
            network(image)
            if number >= 3:
                times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


if __name__ == "__main__":
    from utils.runtime import run_script

    run_script(main)
