"""An experiment's numbers beside the page that tells of it, and the page's tables made from them alone.

    python -m experiments.publish runs/ablate/exp --name se-bccd

writes `docs/experiments/se-bccd/` (cells.csv, images.csv, costs.csv, preregistered.yaml, report.md) and puts the tables
into docs/experiments.md, between the lines `<!-- experiment: se-bccd -->` and `<!-- end -->`, where these are. A test
makes the tables anew from the CSV files and compares.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.data import METRICS, PRIMARY, SECOND, Ablation, load
from experiments.page import table_markdown
from experiments.registration import FILE
from experiments.statistics import Comparison, Rule, Run, compare
from utils.config import ROOT, ArgumentParser, UserError, display_path, read_yaml
from utils.files import write_texts
from utils.runtime import LOGGER, run_script, setup_logging

PAGE = ROOT / "docs/experiments.md"
FILES = ("cells.csv", "images.csv", "costs.csv", FILE, "report.md")
RESAMPLES = 300  # of the images, as in reports
COSTS = ("parameters", "gflops", "latency_ms", "latency_ms_low", "latency_ms_high", "memory_mb")
Rows = list[dict[str, str]]


# ---------------------------------------------------------------------------------------------------------- the folder


def publish(ablation: Ablation, out: Path, *, resamples: int = RESAMPLES) -> None:
    """Write what a page needs of a finished ablation into the folder `out`.

    Raises:
        UserError: a cell is missing, nothing was registered beforehand, or there is no report.
    """
    folder, report = ablation.folder, ablation.folder / "report.md"
    done = sum(map(len, ablation.cells.values()))
    if not ablation.registered or not report.is_file() or done < ablation.planned_cells:
        found = f"{done} of {ablation.planned_cells} cells, {'a' if report.is_file() else 'no'} report"
        raise UserError(f"{display_path(folder)}: only a finished, registered ablation is published; found {found}.")
    texts = {
        "cells.csv": _cells(ablation),
        "images.csv": _images(ablation, resamples),
        "costs.csv": _costs(ablation),
        FILE: (folder / FILE).read_text(encoding="utf-8"),
        "report.md": report.read_text(encoding="utf-8"),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_texts({out / name: texts[name] for name in FILES})


def _csv(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def _cells(ablation: Ablation) -> str:
    rows = []
    for cell in (cell for cells in ablation.cells.values() for cell in cells.values()):
        split = "" if cell.split is None else cell.split
        seconds = cell.seconds if math.isfinite(cell.seconds) else ""
        scores = [cell.scores[name] for name in METRICS]
        rows.append([cell.arm, split, cell.seed, *scores, seconds, int(bool(cell.diverged))])
    return _csv(["arm", "split", "seed", *METRICS, "seconds", "diverged"], rows)


def _images(ablation: Ablation, resamples: int) -> str:
    """The interval over images of every comparison: it needs every detection, so the tables take it from here."""
    from experiments.report import image_interval

    ends = {} if ablation.fresh else {arm: image_interval(ablation, arm, resamples) for arm in ablation.against}
    return _csv(["arm", "low", "high", "resamples"], [[arm, *both, resamples] for arm, both in ends.items()])


def _costs(ablation: Ablation) -> str:
    rows = [[arm, *(ablation.costs.get(arm, {}).get(key, "") for key in COSTS)] for arm in ablation.arms]
    return _csv(["arm", *COSTS], rows)


# ----------------------------------------------------------------------------------------------------------- the tables


def tables(folder: Path) -> str:
    """The tables of a published experiment as Markdown, from the files in its folder alone.

    Raises:
        UserError: a file is missing, or not as it was written.
    """
    stated = read_yaml(folder / FILE).data
    cells, images, costs = (_read(folder / name) for name in ("cells.csv", "images.csv", "costs.csv"))
    try:
        rule, against = Rule(**stated["rule"]), dict(stated["against"])
        arms = list(dict.fromkeys(row["arm"] for row in cells))
        scores = {metric: _values(cells, metric) for metric in (SECOND, PRIMARY)}
        judged = {c.arm: c for c in compare(scores[PRIMARY], against, rule=rule)}
        over_images = {row["arm"]: f"{float(row['low']):+.3f} to {float(row['high']):+.3f}" for row in images}
        parts = [
            _table_of_scores(arms, scores, judged, over_images),
            rule.in_words(),
            _table_of_power(judged),
            _table_of_costs(costs),
        ]
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{display_path(folder)}: not as experiments.publish writes it ({error!r}).") from None
    return "\n\n".join(part for part in parts if part)


def _read(file: Path) -> Rows:
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            return list(csv.DictReader(lines))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{display_path(file)}: cannot be read ({error}). Publish the experiment again.") from None


def _values(cells: Rows, metric: str) -> dict[str, dict[Run, float]]:
    values: dict[str, dict[Run, float]] = {}
    for row in cells:
        run: Run = (int(row["split"]), int(row["seed"])) if row["split"] else int(row["seed"])
        values.setdefault(row["arm"], {})[run] = float(row[metric])
    return values


def _table_of_scores(
    arms: Sequence[str],
    scores: Mapping[str, Mapping[str, Mapping[Run, float]]],
    judged: Mapping[str, Comparison],
    over_images: Mapping[str, str],
) -> str:
    header = ["arm", SECOND, PRIMARY, "against", f"difference in {PRIMARY}", "95 % interval"]
    header += ["95 % interval over images"] if over_images else []
    header += ["p of a difference", "p of equivalence", "verdict"]
    rows = []
    for arm in arms:
        means = [spread(list(scores[metric][arm].values())) for metric in (SECOND, PRIMARY)]
        c = judged.get(arm)
        if c is None:
            rows.append([arm, *means, *[""] * (len(header) - 3)])
            continue
        ends = f"{c.interval[0]:+.3f} to {c.interval[1]:+.3f}" if math.isfinite(c.interval[0]) else "-"
        images = [over_images.get(arm, "-")] if over_images else []
        row = [arm, *means, c.baseline, f"{c.mean:+.3f}", ends, *images, f"{c.p_holm:.2g}", f"{c.p_equal_holm:.2g}"]
        rows.append([*row, c.verdict])
    return table_markdown(header, rows)


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation, three digits."""
    deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{deviation}"


def _table_of_power(judged: Mapping[str, Comparison]) -> str:
    rows = []
    for c in judged.values():
        share, low, high = c.superiority
        chance = f"{share:.0%} ({low:.0%} to {high:.0%})"
        rows.append(
            [c.arm, str(c.n), f"{c.spread:.3f}", f"{c.detectable:.3f}", f"{c.chance_of_equivalence:.0%}", chance]
        )
    unit = next((c.unit for c in judged.values()), "seed")
    header = ["arm", f"{unit}s", "standard deviation of the difference", "detectable with 80 % power"]
    header += ["equal arms found equivalent", "chance to be higher"]
    return table_markdown(header, rows) if rows else ""


def _table_of_costs(costs: Rows) -> str:
    rows = []
    for row in costs:
        ends = (
            f" ({float(row['latency_ms_low']):.3g} to {float(row['latency_ms_high']):.3g})"
            if row["latency_ms_low"]
            else ""
        )
        latency = f"{float(row['latency_ms']):.3g}{ends}" if row["latency_ms"] else "-"
        parameters = f"{int(row['parameters']):,}" if row["parameters"] else "-"
        rows.append([row["arm"], parameters, f"{float(row['gflops']):.3f}" if row["gflops"] else "-", latency])
    return table_markdown(["arm", "parameters", "GFLOPs", "latency in ms, 95 % interval"], rows)


# ------------------------------------------------------------------------------------------------------------- the page


def published(text: str) -> dict[str, str]:
    """What stands between the markers of a page, by experiment."""
    found = re.findall(r"<!-- experiment: ([\w.-]+) -->\n(.*?)\n?<!-- end -->", text, flags=re.S)
    return {name: block.strip("\n") for name, block in found}


def with_tables(text: str, name: str, block: str) -> str:
    """A page with new tables of an experiment; unchanged where it has no markers for it."""
    start = f"<!-- experiment: {name} -->"
    pattern = re.compile(rf"{re.escape(start)}\n.*?<!-- end -->", re.S)
    return pattern.sub(lambda _: f"{start}\n{block}\n<!-- end -->", text)


def build_parser() -> ArgumentParser:
    """The command's flags."""
    parser = ArgumentParser(prog="experiments.publish", description="Put an ablation's numbers beside a page.")
    parser.add_argument("folder", help="the ablation's folder, such as runs/ablate/exp")
    parser.add_argument("--name", default="", help="name of the experiment; the folder's unless given")
    parser.add_argument("--page", default=str(PAGE), help="the page with the markers; the numbers go beside it")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Command line; a user's mistake raises UserError."""
    setup_logging()
    arguments = build_parser().parse_args(argv)
    run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """What the command line asks for."""
    page, name = Path(arguments.page), arguments.name or Path(arguments.folder).resolve().name
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise UserError(f"--name {name}: expected letters, digits, '-', '_' and dots.")
    out = page.parent / "experiments" / name
    publish(load(arguments.folder), out)
    text, block = page.read_text(encoding="utf-8"), tables(out)
    new = with_tables(text, name, block)
    if new != text:
        write_texts({page: new})
    there = f"tables in {display_path(page)}" if name in published(text) else f"the page has no markers for '{name}'"
    LOGGER.info(f"{display_path(out)}: {', '.join(FILES)}; {there}")


if __name__ == "__main__":
    run_script(main)
