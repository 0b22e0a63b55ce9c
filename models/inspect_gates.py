"""Show what the attention gates of a trained network do.

python models/inspect_gates.py --weights runs/train/exp/weights/best.pt --source data/images
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from utils.config import ArgumentParser


def build_parser() -> ArgumentParser:
    """The command line."""
    from utils.config import ArgumentParser

    parser = ArgumentParser(prog="models/inspect_gates.py", description="Show what the gates of a trained network do.")
    add = parser.add_argument
    add("--weights", required=True, help="checkpoint of a network with gates")
    add("--source", default="data/images", help="images, a folder, a glob or a list")
    add("--imgsz", "--img", "--img-size", type=int, default=640, help="image size in pixels")
    add("--max-images", type=int, default=500, help="look at this many images at most")
    add("--device", default="", help="cpu, mps, or a CUDA number")
    add("--project", default="runs/gates", help="folder of the runs")
    add("--name", default="exp", help="name of this run")
    add("--exist-ok", action="store_true", help="write into an existing run folder")
    add("--noplots", action="store_true", help="no picture")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Inspect as the command line says; a user's mistake raises UserError."""
    options = build_parser().parse_args(argv)
    from models.gates.inspect import run  # only now: --help should not wait for torch

    run(options)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from utils.runtime import run_script

    run_script(main)
