"""Run the fuzzers: `python -m tests.fuzz --seconds 600`, or one case again, with its traceback, by `--case`."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from tests.fuzz.harness import Tally, Target, report, run, run_case

NOT_SUBJECTS = ("__init__", "__main__", "harness", "damage")


def targets() -> dict[str, Target]:
    """Every target of the subjects in this folder, by name."""
    files = sorted(file.stem for file in Path(__file__).parent.glob("*.py") if file.stem not in NOT_SUBJECTS)
    found = [target for stem in files for target in importlib.import_module(f"tests.fuzz.{stem}").TARGETS]
    return {target.name: target for target in found}


def main() -> None:
    """What the command line asks for; exit status 1 where there were findings."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], help="names of targets")
    parser.add_argument("--case", type=int, help="run this case of the --only target here, and show what it raises")
    options = parser.parse_args()
    known = targets()
    chosen = options.only or list(known)
    for name in chosen:
        if name not in known:
            parser.error(f"unknown target {name}; there are {', '.join(known)}")
    if options.case is not None:
        print(run_case(known[chosen[0]], options.seed, options.case))
        return
    tallies: list[Tally] = []
    for name in chosen:
        tallies.append(run(known[name], seed=options.seed, seconds=options.seconds / len(chosen)))
        print(tallies[-1], flush=True)
    print(f"\n{report(tallies)}")
    sys.exit(any(tally.findings for tally in tallies))


if __name__ == "__main__":
    main()
