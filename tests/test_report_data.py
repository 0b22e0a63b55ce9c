"""Reading what an ablation left: missing cells and broken files are named, whatever does not fit is refused."""

from __future__ import annotations

import html
import json
import math
import re
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.report import load
from tests.test_report import HEADER, PERFECT, SIX, ablation_in, md_rows, report, write_cell
from utils.config import UserError

# --------------------------------------------------------------------------------------------------- missing and broken


def test_missing_cells_are_left_out_and_those_begun_are_named(tmp_path: Path) -> None:
    scores = {"plain": {0: 0.2, 1: 0.3, 2: 0.4}, "se": {0: 0.3, 1: 0.5}}
    folder = ablation_in(tmp_path, scores)
    (folder / "cells" / "se" / "seed2").mkdir()
    text, rows, _ = report(folder)
    assert len(rows) == 5 and "Begun, but not done, and left out: se seed2." in text
    assert md_rows(text, "se")[1][:4] == ["se", "plain", "2", "+0.150"]
    assert "1 seed missing" in text and "would need at least 6" in text


def test_an_arm_without_any_cell_has_no_numbers(tmp_path: Path) -> None:
    text, rows, web = report(ablation_in(tmp_path, {"plain": {0: 0.2}, "se": {}}))
    assert len(rows) == 1 and md_rows(text, "se")[0] == ["se", "0", "-", "-", "-", "-"]
    assert md_rows(text, "se")[1][1:5] == ["plain", "0", "-", "-"] and "nan" not in text + web


def test_an_ablation_without_a_finished_cell_still_says_so(tmp_path: Path) -> None:
    text, rows, web = report(ablation_in(tmp_path, {"plain": {}, "se": {}}))
    assert rows == [] and "0 finished trainings" in text and "nan" not in text + web


def test_a_single_seed_gives_no_interval_and_no_claim(tmp_path: Path) -> None:
    text, _, web = report(ablation_in(tmp_path, {"plain": {0: 0.25}, "se": {0: 0.35}}))
    row = md_rows(text, "se")[1]
    assert row[2:5] == ["1", "+0.100", "-"] and row[-1] == "too few seeds (6 needed)"
    assert md_rows(text, "se")[0][-1] == "0.350"  # and no ±
    assert "Nothing can be claimed" in text and "Nothing can be claimed" in html.unescape(web)
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


# ------------------------------------------------------------------------------------------------------ made to hurt

LAST = "cells/se/seed3"
GOOD = {"arm": "se", "seed": 3, "seconds": 1.0, "precision": 0.5, "recall": 0.5, "mAP50": 0.5, "mAP50-95": 0.3}


@pytest.mark.parametrize(
    "content",
    [
        "[" * 200_000,
        '{"a":' * 200_000,
        '"' + "a" * 2**22 + '"',
        '{"seed": ' + "9" * 5000 + "}",
        *(
            json.dumps({**GOOD, "per_class": {"cat": 0.3, "dog": 0.5}, key: value})
            for key, value in (
                ("precision", math.nan),
                ("recall", math.inf),
                ("mAP50", True),
                ("mAP50", "0.5"),
                ("mAP50-95", 1.5),
                ("mAP50-95", 10**400),
                ("seconds", -math.inf),
                ("seconds", "long"),
                ("seed", 1e300),
                ("seed", [3]),
                ("arm", None),
                ("arm", ["se"]),
                ("per_class", {"cat": math.nan, "dog": 0.5}),
                ("per_class", ["cat", "dog"]),
                ("per_class", 5),
            )
        ),
    ],
)
def test_a_hostile_cell_json_is_one_short_line(tmp_path: Path, content: str) -> None:
    folder = ablation_in(tmp_path, SIX)
    (folder / LAST / "cell.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"seed3.cell\.json: .*Delete the cell's cell\.json") as raised:
        load(folder)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


@pytest.mark.parametrize(
    "arms",
    [
        "[" * 200_000,
        '{"se": [1]}',
        '{"se": {"gflops": "many"}}',
        '{"se": {"latency_ms": Infinity}}',
        '{"se": {"parameters": NaN}}',
        '{"se": {"gates": [["a", "b"], ["c"]]}}',
        '{"se": {"gates": [[1, 2]]}}',
        '{"se": {"gates": {"a": 1}}}',
        '{"se": {"gates_picture": "' + "a" * 300 + '"}}',
        '{"se": {"gates_picture": "a\\u0000"}}',
        '{"se": {"tensors": 5}}',
    ],
)
def test_a_hostile_arms_json_is_one_line(tmp_path: Path, arms: str) -> None:
    folder = ablation_in(tmp_path, SIX)
    (folder / "arms.json").write_text(arms, encoding="utf-8")
    with pytest.raises(UserError, match=r"arms\.json: .*Delete it") as raised:
        load(folder)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


@pytest.mark.parametrize("curve", ["0, inf", "0, -0.1", "0, 1e999", "0, 2", "0", ""])
def test_a_learning_curve_that_is_none_is_refused(tmp_path: Path, curve: str) -> None:
    folder = ablation_in(tmp_path, SIX)
    (folder / LAST / "results.csv").write_text(f"{HEADER}\n{curve}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"results\.csv: cannot be read as a table"):
        load(folder)


@pytest.mark.parametrize(
    ("array", "place", "value"),
    [
        ("detections", (0, 0), np.nan),
        ("detections", (0, 2), np.inf),
        ("detections", (0, 4), 1.5),
        ("detections", (0, 5), 1e9),
        ("detections", (0, 5), 0.5),
        ("truth", (0, 0), -1),
        ("truth", (0, 1), 1e30),
    ],
)
def test_judged_numbers_that_mean_nothing_are_refused(
    tmp_path: Path, array: str, place: tuple[int, int], value: float
) -> None:
    """A class of 1e9 would ask for a table with as many rows."""
    folder = ablation_in(tmp_path, SIX)
    changed = PERFECT[array].copy()
    changed[place] = value
    write_cell(folder, "se", 3, 0.3, {**PERFECT, array: changed})
    with pytest.raises(UserError, match=r"seed3.judged\.npz: expected boxes in pixels"):
        load(folder)


@pytest.mark.parametrize("change", [{"detection_image": np.zeros(2)}, {"truth": np.zeros(5, np.float32)}, {"paths": 5}])
def test_judged_arrays_of_other_kinds_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = ablation_in(tmp_path, SIX)
    write_cell(folder, "se", 3, 0.3, {**PERFECT, **change})
    with pytest.raises(UserError, match=rf"seed3.judged\.npz: cannot be read \({next(iter(change))} is "):
        load(folder)


def test_labels_of_no_image_at_all_are_refused(tmp_path: Path) -> None:
    folder = ablation_in(tmp_path, SIX)
    write_cell(folder, "se", 3, 0.3, {**PERFECT, "paths": np.zeros(0, "<U1")})
    with pytest.raises(UserError, match=r"seed3.judged\.npz: expected of each detection and each label the image"):
        load(folder)


def test_classes_that_only_some_cells_have_do_not_stop_the_report(tmp_path: Path) -> None:
    folder = ablation_in(tmp_path, SIX)
    cell = json.loads((folder / LAST / "cell.json").read_text(encoding="utf-8"))
    cell["per_class"] = {{"dog": "a", "cat": "b"}[name]: value for name, value in cell["per_class"].items()}
    (folder / LAST / "cell.json").write_text(json.dumps(cell), encoding="utf-8")
    report(folder)


def rezipped(file: Path, **changed: bytes) -> None:
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**entries, **{f"{key}.npy": value for key, value in changed.items()}}.items():
            archive.writestr(name, content)


def header(shape: str, descr: str = "<f4") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\1\0" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n"


@pytest.mark.parametrize(
    "content",
    [
        header("(1000000000000, 6)"),
        header("(3000000000, 3000000000, 6)"),
        header("(-1, 6)"),
        header("(1000000000000000,)", "<U0"),
        header("(((((" * 20),
        header("(2, 6)", "O"),
        header("(2, 6)") + bytes(2**27),
        b"",
    ],
)
def test_a_judged_npz_made_to_fill_the_memory_is_refused_before_it_does(tmp_path: Path, content: bytes) -> None:
    folder = ablation_in(tmp_path, SIX)
    rezipped(folder / LAST / "judged.npz", detections=content)
    del content
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"seed3.judged\.npz: cannot be read"):
            load(folder)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def test_a_judged_npz_with_thousands_of_entries_is_refused(tmp_path: Path) -> None:
    folder = ablation_in(tmp_path, SIX)
    rezipped(folder / LAST / "judged.npz", **{f"extra{number}": b"" for number in range(2000)})
    with pytest.raises(UserError, match=r"seed3.judged\.npz: cannot be read \(no zip as numpy writes it\)"):
        load(folder)


@pytest.mark.parametrize(
    "content",
    [
        "arms: {1: {}}\nrecipe: {}\nfolds: 0\n",
        "arms: {a: [1]}\nrecipe: {}\nfolds: 0\n",
        "arms: {a: {}}\nrecipe: {}\nfolds: many\n",
        "arms: {a: {}}\nrecipe: {}\nfolds: 0\nseeds: 5\n",
        "arms: {a: {}}\nrecipe: {}\nfolds: 0\nseeds: [one]\n",
    ],
)
def test_a_recipe_of_other_kinds_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(UserError, match=r"recipe\.yaml(:\d)?: expected"):
        load(tmp_path)


@pytest.mark.parametrize("content", ["arms: {}\n", "arms: [a]\nrecipe: {}\nfolds: 0\n", ": :"])
def test_a_broken_recipe_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        load(tmp_path)
    with pytest.raises(UserError, match=r"nowhere.recipe\.yaml: cannot be read"):
        load(tmp_path / "nowhere")
