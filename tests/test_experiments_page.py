"""Every number of docs/experiments.md, computed anew from the CSV files beside it."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from experiments.publish import PAGE, main, publish, published, spread, tables, with_tables
from experiments.registration import digest, register
from experiments.report import load
from experiments.statistics import compare, holm, sign_flip_p
from tests.test_report import SIX, ablation_in, report, stated
from utils.config import UserError

stats = pytest.importorskip("scipy.stats", reason="scipy is the optional extra [ablate]")
EARLIER = [file.stem for file in sorted((PAGE.parent / "experiments").glob("*.csv"))]  # published as one CSV each


# ---------------------------------------------------------------------------------------------------- published folders


def registered_ablation(folder: Path) -> Path:
    """A finished ablation of two arms and six seeds, registered before its cells, with its report."""
    ablation_in(folder, SIX, gflops=4.25, latency_ms=12.5, latency_ms_low=12.0, latency_ms_high=13.0)
    stated(folder, against={"se": "plain"}, rule={"alpha": 0.05, "least": 0.005, "margin": 0.01}, seeds=[*range(6)])
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    (folder / "recipe.yaml").rename(folder / "away.yaml")
    register(folder, recipe, {"commit": "0123abc"}, "python ablate.py")
    (folder / "away.yaml").rename(folder / "recipe.yaml")
    for file in folder.glob("cells/*/*/cell.json"):
        text = file.read_text(encoding="utf-8")
        file.write_text(text[:-1] + f', "registered": "{digest(folder)}"}}', encoding="utf-8")
    report(folder)
    return folder


def test_a_published_experiment_is_its_files_and_its_tables(tmp_path: Path) -> None:
    folder, page = registered_ablation(tmp_path / "exp"), tmp_path / "docs/page.md"
    page.parent.mkdir()
    page.write_text("# Page\n<!-- experiment: cells -->\nold\n<!-- end -->\nafter\n", encoding="utf-8")
    main([str(folder), "--name", "cells", "--page", str(page)])
    out = page.parent / "experiments/cells"
    assert {file.name for file in out.iterdir()} == {
        "cells.csv",
        "images.csv",
        "costs.csv",
        "preregistered.yaml",
        "report.md",
    }
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Page\n<!-- experiment: cells -->\n| arm |") and text.endswith("<!-- end -->\nafter\n")
    block = published(text)["cells"]
    assert block == tables(out)
    row = next(line for line in block.splitlines() if line.startswith("| se |"))
    wanted = ["se", "0.425 ± 0.019", "0.325 ± 0.019", "plain", "+0.075", "+0.050 to +0.100", "+0.000 to +0.000"]
    assert row[2:-2].split(" | ") == [*wanted, "0.031", "1", "better"]
    assert "| se | 1,234,567 | 4.250 | 12.5 (12 to 13) |" in block
    with (out / "cells.csv").open("a", encoding="utf-8") as lines:
        lines.write("se,,6,0.1,0.1,0.1,0.1,9,0\n")
    assert tables(out) != block, "other cells, other tables"
    assert with_tables("no markers", "cells", block) == "no markers"


def test_what_is_not_finished_or_not_registered_is_not_published(tmp_path: Path) -> None:
    folder = registered_ablation(tmp_path / "exp")
    (folder / "cells/se/seed3/cell.json").unlink()
    with pytest.raises(
        UserError, match="only a finished, registered ablation is published; found 11 of 12 cells, a report"
    ):
        publish(load(folder), tmp_path / "out")
    with pytest.raises(UserError, match="found 12 of 12 cells, no report"):
        publish(load(ablation_in(tmp_path / "old", SIX)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"--name \.\./x: expected letters"):
        main([str(folder), "--name", "../x"])


@pytest.mark.parametrize("name", sorted(path.name for path in (PAGE.parent / "experiments").iterdir() if path.is_dir()))
def test_the_pages_tables_are_those_of_the_published_cells(name: str) -> None:
    assert published(PAGE.read_text(encoding="utf-8"))[name] == tables(PAGE.parent / "experiments" / name)


def test_the_page_has_markers_for_published_experiments_only() -> None:
    for name in published(PAGE.read_text(encoding="utf-8")):
        assert (PAGE.parent / "experiments" / name / "cells.csv").is_file()


# -------------------------------------------------------------------------------------------- earlier ones, by the page


def scores_of(name: str) -> dict[str, dict[str, dict[int, float]]]:
    """Metric -> arm -> seed -> score."""
    with (PAGE.parent / f"experiments/{name}.csv").open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    scores: dict[str, dict[str, dict[int, float]]] = {"mAP50": {}, "mAP50-95": {}}
    for row in rows:
        for metric, of_arm in scores.items():
            of_arm.setdefault(row["arm"], {})[int(row["seed"])] = float(row[metric])
    return scores


def table_of(name: str) -> list[dict[str, str]]:
    """The last table before the link to a CSV file: a row per arm, in the file's order."""
    text = PAGE.read_text(encoding="utf-8")
    before = text[: text.index(f"(experiments/{name}.csv)")]
    lines = re.findall(r"(?m)^\|.*\|$(?:\n^\|.*\|$)+", before)[-1].splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(header, row)) for row in rows]


def bca(differences: list[float]) -> str:
    """The interval that these tables were made with; later ones invert the test."""
    sample, rng = (np.sort(differences),), np.random.default_rng(0)
    low, high = stats.bootstrap(sample, np.mean, n_resamples=9_999, method="BCa", rng=rng).confidence_interval
    return f"{low:+.3f} to {high:+.3f}"


def same(shown: str, computed: str) -> bool:
    """Whether the numbers in two texts agree; `-0.000` and `+0.000` are the same."""
    zero = [re.sub(r"[+-](0\.000\b)", r"\1", text) for text in (shown, computed)]
    return zero[0].lstrip("+") == zero[1].lstrip("+")


@pytest.mark.parametrize("name", EARLIER)
def test_an_earlier_table_is_that_of_its_csv_file(name: str) -> None:
    scores, table = scores_of(name), table_of(name)
    arms = list(scores["mAP50"])
    baseline = arms[0]
    others = compare(scores["mAP50-95"], baseline)
    p_values = {
        c.arm: sign_flip_p(
            [scores["mAP50-95"][c.arm][s] - scores["mAP50-95"][baseline][s] for s in scores["mAP50"][c.arm]]
        )
        for c in others
    }
    corrected = dict(zip(p_values, holm(list(p_values.values()))))
    compared = 0
    if "judged on its training images: mAP50, mAP50-95" in table[0]:
        for arm, row in zip(arms, table, strict=True):
            both = [f"{next(iter(scores[metric][arm].values())):.3f}" for metric in ("mAP50", "mAP50-95")]
            assert row["judged on its training images: mAP50, mAP50-95"] == ", ".join(both)
        return
    for arm, row in zip(arms, table, strict=True):
        for metric in ("mAP50", "mAP50-95"):
            assert row[metric] == spread(list(scores[metric][arm].values())), (arm, metric)
        if arm == baseline:
            continue
        differences = [scores["mAP50-95"][arm][seed] - score for seed, score in scores["mAP50-95"][baseline].items()]
        assert same(row["difference in mAP50-95"], f"{np.mean(differences):+.3f}"), arm
        assert same(row["95 % interval"], bca(differences)), (arm, row["95 % interval"], bca(differences))
        for column, p in (("p", p_values[arm]), ("Holm's p", corrected[arm])):
            if column in row:
                digits = len(row[column].partition(".")[2])
                assert float(row[column]) == pytest.approx(p, abs=0.51 * 10.0**-digits), (arm, column)
                compared += 1
        if "verdict" in row:
            worse = corrected[arm] <= 0.05 and np.mean(differences) < 0
            assert row["verdict"] == ("worse" if worse else "no difference found")
    assert compared >= len(others)
