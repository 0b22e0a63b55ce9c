"""Reading what an ablation left: missing cells and broken files are named, whatever does not fit is refused."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.test_report import HEADER, PERFECT, SIX, ablation_in, md_rows, report, write_cell
from utils.config import UserError
from utils.report import load

# --------------------------------------------------------------------------------------------------- missing and broken


def test_missing_cells_are_left_out_and_those_begun_are_named(tmp_path: Path) -> None:
    scores = {"plain": {0: 0.2, 1: 0.3, 2: 0.4}, "se": {0: 0.3, 1: 0.5}}
    folder = ablation_in(tmp_path, scores)
    (folder / "cells" / "se" / "seed2").mkdir()
    text, rows, _ = report(folder)
    assert len(rows) == 5 and "Begun, but not done, and left out: se seed2." in text
    assert md_rows(text, "se")[1][:3] == ["se", "2", "+0.150"]
    assert "1 seed missing" in text and "would need at least 6" in text


def test_an_arm_without_any_cell_has_no_numbers(tmp_path: Path) -> None:
    text, rows, web = report(ablation_in(tmp_path, {"plain": {0: 0.2}, "se": {}}))
    assert len(rows) == 1 and md_rows(text, "se")[0] == ["se", "0", "-", "-", "-", "-"]
    assert md_rows(text, "se")[1][:4] == ["se", "0", "-", "-"] and "nan" not in text + web


def test_an_ablation_without_a_finished_cell_still_says_so(tmp_path: Path) -> None:
    text, rows, web = report(ablation_in(tmp_path, {"plain": {}, "se": {}}))
    assert rows == [] and "0 finished trainings" in text and "nan" not in text + web


def test_a_single_seed_gives_no_interval_and_no_claim(tmp_path: Path) -> None:
    text, _, web = report(ablation_in(tmp_path, {"plain": {0: 0.25}, "se": {0: 0.35}}))
    row = md_rows(text, "se")[1]
    assert row[1:4] == ["1", "+0.100", "-"] and row[-1] == "too few seeds (6 needed)"
    assert md_rows(text, "se")[0][-1] == "0.350"  # and no ±
    assert "No significance can be claimed" in text and "No significance can be claimed" in html.unescape(web)
    assert 'class="whisker"' not in web and 'class="band"' not in web


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cell.json", "{"),
        ("cell.json", "[]"),
        ("cell.json", '{"arm": "se", "seed": 0}'),
        ("results.csv", ""),
        ("results.csv", "epoch, loss\n0, 1\n"),
        ("results.csv", f"{HEADER}\n0, much\n"),
        ("judged.npz", ""),
        ("judged.npz", "PK no archive"),
    ],
)
def test_a_broken_file_of_a_cell_is_named(tmp_path: Path, name: str, content: str) -> None:
    folder = ablation_in(tmp_path, SIX)
    (folder / "cells" / "se" / "seed3" / name).write_text(content)
    with pytest.raises(UserError, match=rf"se.seed3.{re.escape(name)}: .*(Delete)"):
        load(folder)


@pytest.mark.parametrize("missing", ["results.csv", "judged.npz"])
def test_a_finished_cell_without_its_files_is_named(tmp_path: Path, missing: str) -> None:
    folder = ablation_in(tmp_path, SIX)
    (folder / "cells" / "se" / "seed3" / missing).unlink()
    with pytest.raises(UserError, match=rf"seed3.{re.escape(missing)}: "):
        load(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"truth_image": np.array([0, 2])},
        {"truth_image": np.array([0, -1])},
        {"detections": np.zeros((2, 5), np.float32)},
        {"paths": np.array(["/data/a.jpg", "/data/a.jpg"])},
    ],
)
def test_judged_arrays_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = ablation_in(tmp_path, SIX)
    write_cell(folder, "se", 3, 0.3, {**PERFECT, **change})
    with pytest.raises(
        UserError, match=r"seed3.judged\.npz: (expected|cannot be read \(detections is float32 of shape \(2, 5\))"
    ):
        load(folder)


def test_a_pickle_in_judged_npz_is_not_opened(tmp_path: Path) -> None:
    folder = ablation_in(tmp_path, SIX)
    write_cell(folder, "se", 3, 0.3, {**PERFECT, "paths": np.array([{"a": 1}], dtype=object)})
    with pytest.raises(UserError, match=r"seed3.judged\.npz: cannot be read"):
        load(folder)


def test_arms_judged_on_other_images_in_the_same_seed_are_refused(tmp_path: Path) -> None:
    folder = ablation_in(tmp_path, SIX)
    write_cell(folder, "se", 3, 0.3, {**PERFECT, "paths": np.array(["/data/a.jpg", "/data/c.jpg"])})
    with pytest.raises(UserError, match=r"seed3.judged\.npz: other images"):
        load(folder)


def test_cells_of_unknown_arms_and_doubles_are_refused(tmp_path: Path) -> None:
    folder = ablation_in(tmp_path, SIX)
    stray = write_cell(folder, "other", 0, 0.3)
    with pytest.raises(UserError, match=r"cell\.json: 'other' seed 0 is no arm"):
        load(folder)
    stray.rename(stray.parent / "away")
    (folder / "cells" / "se" / "seed0").rename(stray)
    write_cell(folder, "se", 0, 0.3)
    with pytest.raises(UserError, match="'se' seed 0 is there twice"):
        load(folder)


@pytest.mark.parametrize("content", ["arms: {}\n", "arms: [a]\nrecipe: {}\nfolds: 0\n", ": :"])
def test_a_broken_recipe_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        load(tmp_path)
    with pytest.raises(UserError, match=r"nowhere.recipe\.yaml: cannot be read"):
        load(tmp_path / "nowhere")
