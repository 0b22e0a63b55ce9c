"""The report of an ablation: its numbers by hand, nasty names, and that it is never half."""

from __future__ import annotations

import csv
import dataclasses
import html
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

from experiments.page import DifferenceRow, Table, curve_panel, difference_plot, markdown, page, ticks
from experiments.report import load, write
from utils.config import UserError

pytest.importorskip("scipy.stats", reason="scipy is the optional extra [ablate]")

SMALL, LARGE = (10, 10, 30, 30), (120, 20, 320, 220)  # 400 and 40,000 pixels
NASTY = '<b>&"|`x`</b>'
ENVIRONMENT = {"commit": "0123abc", "machine": "two cores & <no> GPU"}
HEADER = "               epoch,     metrics/mAP_0.5"


class Balanced(HTMLParser):
    """Collects tags and attributes and fails where an end tag does not close the innermost element."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in {"meta", "img", "wbr"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag


def boxes(detections: list[tuple[float, ...]], truth: list[tuple[float, ...]]) -> dict[str, Any]:
    """The arrays of `judged.npz` with everything on the first of two images."""
    return {
        "detections": np.array(detections, np.float32).reshape(-1, 6),
        "detection_image": np.zeros(len(detections), int),
        "truth": np.array(truth, np.float32).reshape(-1, 5),
        "truth_image": np.zeros(len(truth), int),
        "paths": np.array(["/data/a.jpg", "/data/b.jpg"]),
    }


PERFECT = boxes([(*SMALL, 0.9, 0), (*LARGE, 0.8, 1)], [(0, *SMALL), (1, *LARGE)])


def write_cell(folder: Path, arm: str, seed: int, score: float, judged: dict[str, Any] | None = None) -> Path:
    place = folder / "cells" / re.sub(r"\W", "_", arm) / f"seed{seed}"
    place.mkdir(parents=True, exist_ok=True)
    cell = {"arm": arm, "seed": seed, "seconds": 100.0 + seed, "precision": score + 0.3, "recall": score + 0.2}
    cell |= {"mAP50": score + 0.1, "mAP50-95": score, "per_class": {"cat": score, "dog": 0.5}}
    (place / "cell.json").write_text(json.dumps(cell), encoding="utf-8")
    (place / "results.csv").write_text(f"{HEADER}\n0, 0.1\n1, {score}\n", encoding="utf-8")
    np.savez_compressed(place / "judged.npz", **(judged or PERFECT))
    return place


def ablation_in(folder: Path, scores: dict[str, dict[int, float]], **costs: Any) -> Path:
    """A finished ablation; `scores` is arm -> seed -> mAP50-95, `costs` go to the last arm in arms.json."""
    folder.mkdir(parents=True, exist_ok=True)
    arms = {arm: {"cfg": "yolov5n.yaml", "gate": "gain"} for arm in scores}
    recipe = {"arms": arms, "folds": 4, "threads": 1, "recipe": {"data": "tiny.yaml", "epochs": 2, "weights": ""}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    (folder / "arms.json").write_text(
        json.dumps({arm: {"parameters": 1234567, **(costs if arm == list(scores)[-1] else {})} for arm in scores})
    )
    for arm, by_seed in scores.items():
        for seed, score in by_seed.items():
            write_cell(folder, arm, seed, score)
    return folder


def report(folder: Path, **options: Any) -> tuple[str, list[dict[str, str]], str]:
    """Markdown, rows of the CSV and HTML."""
    options = {"command": "python ablate.py --seeds 6", "environment": ENVIRONMENT, "resamples": 5, **options}
    text, table, web = write(load(folder), folder, **options)
    with table.open(encoding="utf-8", newline="") as lines:
        return text.read_text(encoding="utf-8"), list(csv.DictReader(lines)), web.read_text(encoding="utf-8")


def md_rows(text: str, first: str) -> list[list[str]]:
    """The rows of every Markdown table that begin with this cell."""
    rows = [re.split(r" (?<!\\)\| ", line.strip()[2:-2]) for line in text.splitlines() if line.startswith("| ")]
    return [row for row in rows if row[0] == first]


SIX = {"plain": dict.fromkeys(range(6), 0.25), "se": {s: 0.30 + 0.01 * s for s in range(6)}}


# ------------------------------------------------------------------------------------------------------------- numbers


def test_the_tables_hold_the_numbers_one_gets_by_hand(tmp_path: Path) -> None:
    text, rows, web = report(ablation_in(tmp_path / "exp", SIX, gflops=4.25, latency_ms=12.5))
    # se is 0.30 .. 0.35: mean 0.325, standard deviation 0.01 * sqrt(3.5) = 0.0187
    assert md_rows(text, "se")[0] == ["se", "6", "0.625 ± 0.019", "0.525 ± 0.019", "0.425 ± 0.019", "0.325 ± 0.019"]
    # all six differences are positive: p = 2 / 2**6, and six seeds are just enough for one comparison
    difference = md_rows(text, "se")[1]
    assert difference[:4] == ["se", "plain", "6", "+0.075"] and difference[-3:] == ["0.0312", "1", "better"]
    assert difference[4:6] == ["+0.050 to +0.100", "+0.000 to +0.000"]  # over the images: the same boxes in both arms
    # the standard deviation of six differences from 0.05 to 0.10; all six higher: 0.025 ** (1 / 6) is 54 %
    power = md_rows(text, "se")[3]
    assert power[:2] == ["se", "0.019"] and power[3:] == ["3%", "6 of 6", "100% (54% to 100%)"]
    assert md_rows(text, "se")[4] == [
        "se",
        "1,234,567",
        "4.25",
        "12.5",
        "102",
    ]  # median of 100 .. 105 is 102.5, to even
    assert "by mAP50-95: better: se." in text and "from random weights" in text
    assert [float(row["mAP50-95"]) for row in rows if row["arm"] == "se"] == [SIX["se"][s] for s in range(6)]
    for cell in ("0.325 ± 0.019", "+0.075", "0.0312", "better", "1,234,567"):
        assert f">{cell}</td>" in web


def test_an_arm_that_loses_is_called_worse(tmp_path: Path) -> None:
    scores = {"plain": SIX["se"], "se": SIX["plain"]}
    text, *_ = report(ablation_in(tmp_path, scores))
    assert md_rows(text, "se")[1][-1] == "worse" and "worse: se." in text


def test_arms_within_the_margin_are_called_equivalent(tmp_path: Path) -> None:
    scores = {"plain": SIX["plain"], "se": {s: 0.25 + 0.001 * (-1) ** s for s in range(6)}}
    text, *_ = report(ablation_in(tmp_path, scores))
    assert md_rows(text, "se")[1][-3:] == ["1", "0.0156", "equivalent"] and "by mAP50-95: equivalent: se." in text


def stated(folder: Path, **changes: Any) -> None:
    """Put further entries into an ablation's recipe."""
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **changes}, sort_keys=False), encoding="utf-8")


def test_an_arm_is_compared_with_the_one_that_the_recipe_names_and_references_are_only_shown(tmp_path: Path) -> None:
    scores = {"plain": SIX["plain"], "frozen": dict.fromkeys(range(6), 0.3), "se": SIX["se"], "untouched": SIX["plain"]}
    folder = ablation_in(tmp_path, scores)
    stated(folder, against={"frozen": "plain", "se": "frozen"}, rule={"least": 0.001, "margin": 0.02})
    text, *_ = report(folder)
    assert md_rows(text, "se")[1][:4] == ["se", "frozen", "6", "+0.025"]
    assert "corrected for all 2 comparisons" in text and "a mean difference of 0.001 or more" in text
    assert "untouched: mAP50-95 +0.000 against plain, higher in 0 of 6 seeds; shown, not judged." in text
    assert ["untouched", "6", "+0.000", "+0.000 to +0.000", "0 of 6", "1"] in md_rows(text, "untouched")
    assert "harms" not in text
    for seed in range(6):
        write_cell(folder, "untouched", seed, 0.26)
    text, *_ = report(folder)
    assert "This recipe harms what it starts from: the untouched checkpoint is +0.010 above 'plain'" in text
    for wrong in (
        {"against": {"se": "gate"}},
        {"against": ["se"]},
        {"against": {"se": ["plain"]}},
        {"rule": {"least": "x"}},
        {"rule": {"last": 1}},
        {"rule": 1},
    ):
        stated(folder, **{"against": {"se": "frozen"}, "rule": {}, **wrong})
        with pytest.raises(UserError, match=r"recipe\.yaml.*as ablate.py writes them"):
            load(folder)


def test_seeds_of_one_split_are_one_difference_and_have_a_column_each(tmp_path: Path) -> None:
    folder = ablation_in(tmp_path, {"plain": {}, "se": {}})
    for arm, higher in (("plain", 0.0), ("se", 0.05)):
        for run in range(12):
            place = write_cell(folder, arm, run, 0.25 + higher)
            cell = json.loads((place / "cell.json").read_text(encoding="utf-8"))
            (place / "cell.json").write_text(json.dumps({**cell, "split": run // 2, "seed": run % 2}))
    text, rows, _ = report(folder)
    assert md_rows(text, "se")[1][:4] == ["se", "plain", "6", "+0.050"] and "6 of 6 paired splits" in text
    assert [(row["split"], row["seed"]) for row in rows[:3]] == [("0", "0"), ("0", "1"), ("1", "0")]
    assert md_rows(text, "plain")[-2][1] == "split 5 seed 1"


def test_a_diverged_cell_counts_as_zero_and_is_named(tmp_path: Path) -> None:
    folder = ablation_in(tmp_path, SIX)
    file = folder / "cells/se/seed3/cell.json"
    zeros = dict.fromkeys(("precision", "recall", "mAP50", "mAP50-95"), 0.0)
    entry = {**json.loads(file.read_text(encoding="utf-8")), **zeros, "diverged": "epoch 1: the loss is not finite"}
    file.write_text(json.dumps(entry), encoding="utf-8")
    (file.parent / "results.csv").unlink()
    text, *_ = report(folder)
    assert "The training diverged, which counts as a score of 0: se 3." in text
    assert md_rows(text, "se")[1][2:4] == ["6", "+0.020"]  # 0.05 + 0.06 + 0.07 - 0.25 + 0.09 + 0.1 is 0.12


def test_mixed_signs_with_seeds_enough_are_undecided(tmp_path: Path) -> None:
    scores = {"plain": SIX["plain"], "se": {s: 0.25 + 0.01 * (-1) ** s for s in range(6)}}
    text, *_ = report(ablation_in(tmp_path, scores))
    assert md_rows(text, "se")[1][-1] == "undecided"
    assert "by mAP50-95: undecided: se." in text


def test_all_three_files_agree_on_every_seed(tmp_path: Path) -> None:
    text, rows, web = report(ablation_in(tmp_path, SIX))
    web = re.sub(r' data-label="[^"]*"', "", web)
    cells = re.findall(r'<tr><th scope="row">(\w+)</th><td>(\d)</td>((?:<td>[\d.]+</td>){5})</tr>', web)
    of_web = sorted((arm, seed, *re.findall(r"<td>([\d.]+)</td>", rest)[:4]) for arm, seed, rest in cells)
    of_csv = sorted(
        (r["arm"], r["seed"], *(f"{float(r[k]):.4f}" for k in ("precision", "recall", "mAP50", "mAP50-95")))
        for r in rows
    )
    of_text = sorted(tuple(row[:6]) for arm in SIX for row in md_rows(text, arm) if len(row) == 7 and "." in row[5])
    of_text = [row for row in of_text if re.fullmatch(r"0\.\d{4}", row[2])]
    assert of_web == of_csv == of_text and len(of_csv) == 12


def test_classes_are_listed_with_their_change_and_labels(tmp_path: Path) -> None:
    text, *_ = report(ablation_in(tmp_path, SIX))
    assert md_rows(text, "cat") == [["cat", "1", "0.250", "+0.075"]]  # one label, on one image, in six seeds
    assert md_rows(text, "dog") == []  # did not change


# ---------------------------------------------------------------------------------------------------------- the images


def photos(folder: Path, names: str) -> list[str]:
    files = [folder / f"{name}.jpg" for name in names]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), np.zeros((8, 8, 3), np.uint8))
    return [str(file.resolve()) for file in files]


@pytest.mark.parametrize(("val", "remembered"), [("train", True), ("val", False)])
def test_numbers_of_training_images_are_announced_as_memory(tmp_path: Path, val: str, remembered: bool) -> None:
    photos(tmp_path / "data" / "train", "ab")
    photos(tmp_path / "data" / "val", "cd")
    data = {"path": str(tmp_path / "data"), "train": "train", "val": val, "names": ["cat", "dog"]}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(data))
    folder = ablation_in(tmp_path / "exp", {"plain": {}, "se": {}})
    judged = {**PERFECT, "paths": np.array(photos(tmp_path / "data" / val, "ab" if remembered else "cd"))}
    for arm in ("plain", "se"):
        write_cell(folder, arm, 0, 0.3, judged)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["folds"], recipe["recipe"]["data"] = 0, str(tmp_path / "tiny.yaml")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    text, _, web = report(folder)
    assert ("how much is remembered" in text) == ('class="warning"' in web) == remembered
    assert ("none of which is trained on" in text) != remembered


def test_sizes_are_compared_with_all_objects_by_the_same_rule(tmp_path: Path) -> None:
    folder = ablation_in(tmp_path, {"plain": {0: 0.3}, "se": {}})
    missed = boxes([(*SMALL, 0.9, 0)], [(0, *SMALL), (1, *LARGE)])
    write_cell(folder, "plain", 0, 0.3, PERFECT)
    write_cell(folder, "se", 0, 0.3, missed)
    text, *_ = report(folder)
    header = "| arm | all (2 labels) | small, below 32² px (1 label) | medium, 32² to 96² px (0 labels) | large, "
    assert header in text
    assert ["plain", "1.000", "1.000", "-", "1.000"] in md_rows(text, "plain")
    assert ["se", "-0.500", "+0.000", "-", "-1.000"] in md_rows(text, "se")


# ---------------------------------------------------------------------------------------------------- nothing was found


def without_scores(folder: Path, scores: dict[str, dict[int, float]]) -> Path:
    """An ablation of one epoch in which every score of each cell is that of `scores`, and nothing was detected."""
    ablation_in(folder, scores)
    for arm, by_seed in scores.items():
        for seed, score in by_seed.items():
            place = write_cell(folder, arm, seed, score, boxes([], [(0, *SMALL), (1, *LARGE)]))
            cell = json.loads((place / "cell.json").read_text(encoding="utf-8"))
            cell |= {**dict.fromkeys(("precision", "recall", "mAP50", "mAP50-95"), score), "per_class": {"cat": score}}
            cell["per_class"]["dog"] = score
            (place / "cell.json").write_text(json.dumps(cell), encoding="utf-8")
            (place / "results.csv").write_text(f"{HEADER}\n0, {score}\n", encoding="utf-8")
    return folder


def test_a_report_of_nothing_compares_nothing(tmp_path: Path) -> None:
    """Two arms that found nothing, one by a hair less."""
    folder = without_scores(tmp_path, {"plain": {0: 0.0, 1: 0.0}, "se": {0: 0.0002, 1: 0.0004}})
    text, rows, web = report(folder)
    assert len(rows) == 4 and float(rows[-1]["mAP50"]) == 0.0004
    for shown in (text, web):
        assert "No arm found anything" in shown
        for claim in ("higher in", "Holm", "interval", "By class", "Differences within each seed", "nan"):
            assert claim not in shown, claim
    assert md_rows(text, "se")[0] == ["se", "2", *["0.000 ± 0.000"] * 4]


def test_one_arm_that_found_something_is_compared(tmp_path: Path) -> None:
    text, *_ = report(without_scores(tmp_path, {"plain": {0: 0.0, 1: 0.0}, "se": {0: 0.0, 1: 0.1}}))
    assert "No arm found anything" not in text and "higher in 1 of 2 paired seeds" in text


def test_a_single_epoch_is_a_point_on_an_axis_of_one_epoch() -> None:
    one = curve_panel("one", [np.array([0.2]), np.array([0.4])], [np.array([0.1])], (1, 0.4))
    assert re.findall('text-anchor="middle">([^<]+)<', one) == ["1", "epoch"]
    assert 'class="point"' in one and 'class="span"' in one and '<line class="base"' in one
    assert "polyline" not in one and "polygon" not in one
    two = curve_panel("two", [np.array([0.2, 0.3])], [], (2, 0.3))
    assert "polyline" in two and 'class="point"' not in two


def test_no_line_crosses_the_name_of_an_arm() -> None:
    rows = [DifferenceRow(f"arm {i}", {0: 0.0, 1: 0.1 * i}, 0.05 * i, (0.0, 0.1 * i)) for i in range(3)]
    svg = difference_plot("difference", rows)
    names = [float(y) for y in re.findall(r'class="name" x="[\d.]+" y="([\d.]+)"', svg)]
    lines = re.findall(r'class="(?:axis|zero)" x1="[\d.]+" y1="([\d.]+)" x2="[\d.]+" y2="([\d.]+)"', svg)
    assert len(names) == 3 and len(lines) >= 6
    for y in names:
        assert not any(float(low) < y + 4 and float(high) > y - 12 for low, high in lines)


def test_differences_too_small_to_be_shown_stay_at_the_zero_line() -> None:
    svg = difference_plot("difference", [DifferenceRow("se", {0: 0.00001, 1: 0.00002}, 0.000015, (math.nan, math.nan))])
    zero = float(re.findall(r'class="zero" x1="([\d.]+)"', svg)[0])
    assert all(abs(float(x) - zero) < 5 for x in re.findall(r'class="dot" cx="([\d.]+)"', svg))


def test_a_table_too_wide_for_a_phone_names_its_columns_in_every_cell() -> None:
    wide = Table("wide", ["arm", "seeds", 'a "long" name', "another one"], [["plain", "6", "0.625 ± 0.019", "x" * 20]])
    narrow = Table("narrow", ["arm", "seeds"], [["plain", "6"]])
    text = page("title", [wide, narrow])
    Balanced(text)
    assert text.count('<table class="stack">') == 1 == text.count("<table>")
    assert re.findall(r'data-label="([^"]*)"', text) == ["seeds", "a &quot;long&quot; name", "another one"]


def test_seeds_that_were_added_later_are_told_of(tmp_path: Path) -> None:
    """Looking, adding seeds, and looking again makes significant what is not."""
    folder = ablation_in(tmp_path / "exp", SIX)
    for planned, told in (([0, 1, 2, 3], True), ([0, 1, 2, 3, 4, 5], False)):
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "seeds": planned}, sort_keys=False))
        text, _, web = report(folder)
        for shown in (text, web):
            assert ("Begun with 4 seeds, and 2 were added later" in shown) is told


def test_a_cell_trained_in_several_goes_has_no_time(tmp_path: Path) -> None:
    folder = ablation_in(tmp_path / "exp", SIX)
    file = folder / "cells/se/seed3/cell.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), "seconds": None}), encoding="utf-8")
    text, rows, web = report(folder)
    assert [row["seconds"] == "" for row in rows if row["arm"] == "se"] == [False] * 3 + [True] + [False] * 2
    assert "nan" not in text and "nan" not in web


# ------------------------------------------------------------------------------------------------------------- the page


def test_the_page_is_balanced_and_asks_nothing_of_anyone(tmp_path: Path) -> None:
    header = ["layer", "gate", "mean", "channels", "images", "positions", "saturated", "from neutral", "verdict"]
    gates = [header, ["10", "SE", "0.998", "0.013", "0.004", "-", "0.0%", "1.2%", "never left neutral"]]
    picture = Path(photos(tmp_path, "p")[0])
    pictures = [("Found by plain & se", picture), ("gone", tmp_path / "gone.png")]
    _, _, web = report(ablation_in(tmp_path / "exp", SIX, gates=gates), pictures=pictures)
    parsed = Balanced(web)
    assert "<script" not in web and "http" not in web and "@import" not in web and "url(" not in web
    assert [link[:23] for link in parsed.links] == ["data:image/jpeg;base64,"]
    assert parsed.tags.count("h1") == 1 and parsed.tags.count("svg") == 3  # two arms' curves and the differences
    assert web.startswith("<!DOCTYPE html>") and '<html lang="en">' in web and "prefers-color-scheme: dark" in web
    assert "never left neutral" in web and "gone" not in web


def test_nasty_names_stay_text_everywhere(tmp_path: Path) -> None:
    folder = ablation_in(tmp_path, {"plain": {0: 0.25}, NASTY: {0: 0.35, 1: 0.3}})
    text, rows, web = report(folder, command=f"python ablate.py --arm '{NASTY}:gate=gain' </pre><script>")
    assert "b" not in Balanced(web).tags and "<b>" not in web and "<script" not in web
    assert html.escape(NASTY) in web
    assert {row["arm"] for row in rows} == {"plain", NASTY}
    assert r"\<b\>\&" in text
    header = next(line for line in text.splitlines() if line.startswith("| arm | seeds"))
    row = next(line for line in text.splitlines() if line.startswith(r"| \<b"))
    assert len(re.findall(r"(?<!\\)\|", row)) == header.count("|")


def test_the_command_versions_and_options_are_there(tmp_path: Path) -> None:
    text, _, web = report(ablation_in(tmp_path, SIX))
    assert "    python ablate.py --seeds 6" in text and "cfg=yolov5n.yaml gate=gain" in web
    assert all(html.escape(value) in web for value in ENVIRONMENT.values())


def test_pictures_of_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.svg").write_text("<svg/>")
    with pytest.raises(UserError, match=r"p\.svg: a report shows"):
        report(ablation_in(tmp_path, SIX), pictures=[("a", tmp_path / "p.svg")])


def test_a_table_without_rows_is_still_a_table() -> None:
    table = Table("caption", ["a", "b"], [])
    Balanced(page("title", [table]))
    assert "| a | b |" in markdown("title", [table], Path("."))


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 0.48, 4) == [0, 0.2, 0.4]
    assert ticks(-0.13, 0.07) == [-0.1, -0.05, 0, 0.05]
    assert ticks(0, 0) == [0]


# ------------------------------------------------------------------------------------------------------- half a report


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_report_leaves_the_old_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    folder = ablation_in(tmp_path, SIX)
    before = report(folder)
    write_cell(folder, "se", 6, 0.4)

    def stopped(descriptor: int) -> None:
        if any(folder.glob(".report.html.*")):  # the last of the three
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", stopped)
        with pytest.raises((KeyboardInterrupt, UserError)) as raised:
            report(folder)
    if isinstance(error, OSError):
        assert re.search(r"report\.html: cannot be written \(No space left", str(raised.value))
    after = [(folder / name).read_text() for name in ("report.md", "report.html")]
    assert after == [before[0], before[2]]
    assert not [name for name in os.listdir(folder) if name.endswith(".partial")]


def test_the_same_ablation_gives_the_same_report(tmp_path: Path) -> None:
    folder = ablation_in(tmp_path, SIX)
    assert report(folder) == report(folder)


def test_an_ablation_of_one_arm_compares_nothing(tmp_path: Path) -> None:
    text, rows, _ = report(ablation_in(tmp_path, {"plain": SIX["plain"]}))
    assert len(rows) == 6 and "only one arm" in text


def test_the_baseline_is_the_first_arm_of_the_recipe(tmp_path: Path) -> None:
    ablation = load(ablation_in(tmp_path, {"z": {0: 0.2}, "a": {0: 0.3}}))
    assert ablation.baseline == "z" and list(ablation.cells) == ["z", "a"]
    assert dataclasses.is_dataclass(ablation) and len(ablation.images) == 2 and len(ablation.labels) == 2
