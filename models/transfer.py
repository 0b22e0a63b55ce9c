"""Start a network from the checkpoint of another, and write it as a checkpoint.

python models/transfer.py --weights yolov5n.pt --cfg yolov5n-se-last.yaml --out yolov5n-se-last.pt
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

    parser = ArgumentParser(prog="models/transfer.py", description="Start a network from the checkpoint of another.")
    add = parser.add_argument
    add("--weights", required=True, help="checkpoint to start from")
    add("--cfg", required=True, help="YAML of the network to start")
    add("--out", required=True, help="checkpoint to write")
    add("--data", default="", help="dataset YAML with the class names; the checkpoint's if not given")
    add("--transfer", default="aligned", choices=("aligned", "index"), help="how rows are matched")
    add("--gate", choices=("absorbed", "gain", "random"), help="how gates that are new start")
    add("--min-transfer", type=float, default=0, help="fail below this percentage of the parameters")
    add("--exist-ok", action="store_true", help="replace the file of --out")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Transfer as the command line says; a user's mistake raises UserError."""
    options = build_parser().parse_args(argv)
    from models.gates.transfer import run  # only now: --help should not wait for torch

    run(options)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from utils.runtime import run_script

    run_script(main)
