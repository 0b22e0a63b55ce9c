"""All benchmarks, and the page with their tables: `docs/performance.md`.

python benchmarks/run.py --data coco128.yaml --weights yolov5n.pt --img 640
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

PARTS = {  # script: heading
    "commands": "Whole commands",
    "train": "Training",
    "inference": "Validation and detection",
    "steps": "Single steps",
}
BEGIN, END = "<!-- written by benchmarks/run.py from here -->", "<!-- to here -->"


def main() -> None:
    """Run every part in a process of its own, and put the tables into the page."""
    from benchmarks.measuring import build_parser, machine

    options: argparse.Namespace = build_parser("run").parse_args()
    words = [f"--{key}={value}" for key, value in vars(options).items()]
    shown = f"--data {Path(options.data).name} --weights {Path(options.weights).name} --img {options.imgsz}"
    parts = [f"`python benchmarks/run.py {shown}` on {datetime.date.today()}: {machine()}."]
    for name, heading in PARTS.items():
        done = subprocess.run(
            [sys.executable, f"benchmarks/{name}.py", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
        parts += [f"## {heading}", "\n".join(lines)]
    text = "\n\n".join(parts)
    print(text)
    page = ROOT / "docs/performance.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
