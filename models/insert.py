"""Put attention gates into a model YAML, as rows or inside blocks: later numbers move along, all other text stays.

python models/insert.py --cfg yolov5s.yaml --list-places                                              # where, by name
python models/insert.py --cfg yolov5s.yaml --module SE --args 16 --after SPPF --out models/my.yaml    # all who read it
python models/insert.py --cfg yolov5s.yaml --module SE --args 16 --before Detect/1 --before Detect/3  # one who reads
python models/insert.py --cfg yolov5s.yaml --module SE --args 16 --at 10                              # as row 10
python models/insert.py --cfg yolov5s.yaml --insert SE:16@after:C3:4 --insert ECA@before:Detect       # of several kinds
python models/insert.py --cfg yolov5s.yaml --module SE --args 16 --after every:C3                     # after each C3
python models/insert.py --cfg yolov5s.yaml --module SE --args 16 --inside Bottleneck                  # C3SE: see below

Inside blocks: Bottleneck is each residual branch, before the addition; C3 the block's first path, before cv3; C3:2 that
of the second C3; 6 or backbone each residual branch of row 6 or of the backbone; 6/C3 the first path of row 6.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from utils.config import ArgumentParser


def build_parser() -> ArgumentParser:
    """The command line."""
    from utils.config import ArgumentParser

    parser = ArgumentParser(prog="models/insert.py", description="Insert an attention gate into a model YAML.")
    add = parser.add_argument
    add("--cfg", required=True, help="model YAML, by path or bare name")
    add("--list-places", action="store_true", help="show the rows, their places and who reads them")
    add("--module", help="the gate's class, such as SE")
    add("--args", nargs="*", default=[], help="its arguments after the channels")
    kinds = {
        "after": "read by all that read PLACE: SPPF, C3:2, every:C3, every:neck:C3 or a row's number",
        "before": "read by PLACE alone, which may name an input: Detect/1",
        "at": "read by row PLACE, one further down",
        "inside": "in blocks: Bottleneck (each residual branch), C3 (before cv3), C3:2, backbone, 6, 6/C3",
    }
    for kind, what in kinds.items():  # in one list, so that the order across the four is kept
        option = dict(dest="places", action="append", type=f"{kind}:{{}}".format, metavar="PLACE")
        add(f"--{kind}", **option, help=f"{what}; may be repeated")  # type: ignore[arg-type]
    add("--insert", action="append", metavar="MODULE[:ARG...]@KIND:PLACE", help="all of it in one word")
    add("--out", help="the new YAML; shown where it is left out")
    add("--exist-ok", action="store_true", help="--out may replace a file")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Insert as the command line says; a user's mistake raises UserError."""
    options = build_parser().parse_args(argv)
    from models.gates.insert import run  # only now: --help should not wait for torch

    run(options)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from utils.runtime import run_script, setup_logging

    with redirect_stdout(sys.stderr):  # the log; stdout is for the YAML
        setup_logging()
    run_script(main)
