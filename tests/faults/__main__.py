"""`python -m tests.faults --kills 50`: kill trainings that often, and say whether all ended like an undisturbed one."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from tests.faults.kills import run


def main() -> None:
    """What the command line asks for; exit status 1 where a training ended otherwise."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep everything there")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        tally = run(folder.resolve(), options.kills, options.seed, lambda text: print(text, flush=True))
    print("\n".join([f"\n{tally}", *tally.failures]))
    sys.exit(bool(tally.failures))


if __name__ == "__main__":
    main()
