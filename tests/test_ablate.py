"""Experiments: arms and seeds as they are asked for, splits that hold out, cells that are run once and go on."""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ablate
import train
from experiments.registration import digest, looks, note_look, register, registered
from experiments.trials import (
    Arm,
    Cell,
    against_of,
    alone_in,
    arms_of,
    check_recipe,
    draw_splits,
    fold,
    make_cells,
    plain_recipe,
    planned_of,
    runs_of,
    seeds_of,
    threads_of,
    untouched_fits,
    write_splits,
)
from tests.conftest import TinyDataset
from utils.config import ROOT, UserError
from utils.data import load_dataset
from utils.engine import NonFiniteLoss
from utils.files import write_yaml
from utils.shapes import draw


def arms(*cfgs: str, arm: tuple[str, ...] = ()) -> list[Arm]:
    return arms_of(cfgs, arm, train.build_parser())


# ------------------------------------------------------------------------------------------------------ arms and seeds


def test_an_arm_is_a_yaml_or_a_yaml_with_gates() -> None:
    plain, gated, two = arms("models/yolov5n.yaml", "yolov5n.yaml+SE@after:SPPF", "yolov5n.yaml+SE:8@at:10+ECA@at:4")
    assert (plain.name, plain.options) == ("yolov5n", {"cfg": "models/yolov5n.yaml"})
    assert gated.options == {"cfg": "yolov5n.yaml", "insert": ["SE@after:SPPF"]} and "SE@after" in gated.name
    assert two.options["insert"] == ["SE:8@at:10", "ECA@at:4"] and "/" not in two.folder and ":" not in two.folder


def test_a_plus_in_a_folder_is_no_gate_and_an_empty_value_is_one() -> None:
    both = arms("my+nets/a.yaml", "my+nets/a.yaml+SE@after:SPPF", arm=("scratch:weights=",))
    assert [arm.options.get("cfg") for arm in both] == ["my+nets/a.yaml", "my+nets/a.yaml", None]
    assert "insert" not in both[0].options and both[2].options == {"weights": ""}


def test_an_arm_may_differ_in_flags_and_hyper_parameters() -> None:
    _, arm = arms("a.yaml", arm=("frozen:cfg=b.yaml,gate=absorbed,freeze=10 10,lr0=0.02,cos_lr=true",))
    assert arm.name == "frozen"
    assert arm.options == {
        "cfg": "b.yaml",
        "gate": "absorbed",
        "freeze": [10, 10],
        "hyp_changes": {"lr0": 0.02},
        "cos_lr": True,
    }


@pytest.mark.parametrize(("key", "value"), [("nominal_batch", 32.0), ("anchors", 3.0)])
def test_an_arm_may_differ_in_a_hyper_parameter_that_the_usual_file_does_not_have(key: str, value: float) -> None:
    _, arm = arms("a.yaml", arm=(f"x:{key}={value:g}",))
    assert arm.options == {"hyp_changes": {key: value}}


def test_an_arm_may_load_and_train_as_everybody_does() -> None:
    """The plain network by index, so that a head of other classes is drawn anew; YOLOv5's warm-up and steps."""
    _, usual = arms("a.yaml", arm=("usual:cfg=a.yaml,transfer=index,short_warmup=0,last_step=0",))
    assert usual.options["transfer"] == "index" and usual.options["hyp_changes"] == {"short_warmup": 0, "last_step": 0}
    with pytest.raises(UserError, match="'last_step' is 2, expected 0 or 1"):
        arms("a.yaml", arm=("usual:last_step=2",))


@pytest.mark.parametrize(
    ("cfgs", "specs", "message"),
    [
        (["a.yaml"], [], "at least two arms"),
        (["a.yaml", "b.yaml"], ["a:gate=gain"], "two arms are called 'a'"),
        (["a.yaml"], ["..:gate=gain"], "an arm cannot be called '..'"),
        (["a.yaml"], ["untouched:gate=gain"], "an arm cannot be called 'untouched': ablate.py adds one"),
        (["a.yaml"], ["x:patience=5"], "'patience' is neither a flag of train.py nor a hyper-parameter"),
        (["a.yaml"], ["x:data=coco.yaml"], "data must be the same for all arms"),
        (["a.yaml"], ["x:single_cls=true"], "single_cls must be the same for all arms"),
        (["a.yaml"], ["x"], "expected NAME:KEY=VALUE"),
        (["a.yaml"], ["x:gate"], "expected KEY=VALUE, found 'gate'"),
        (["a.yaml"], ["x:gaet=gain"], "neither a flag of train.py nor a hyper-parameter. Did you mean 'gate'"),
        (["a.yaml"], ["x:lr0=fast"], "--arm x:lr0=fast: 'lr0' must be a number, found 'fast'"),
        (["a.yaml"], ["x:nominal_batch=0"], "--arm x:nominal_batch=0: 'nominal_batch' is 0, expected 1 to 65536"),
        (["a.yaml"], ["x:anchors=11"], "'anchors' is 11, expected 0 to 10"),
        (["a.yaml"], ["x:nominal_bach=32"], "Did you mean 'nominal_batch'"),
        (["a.yaml"], ["x:cos_lr=maybe"], "expected true or false"),
    ],
)
def test_what_no_arm_can_be_is_answered_in_a_line(cfgs: list[str], specs: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        arms_of(cfgs, specs, train.build_parser())
    assert message in str(caught.value)


def test_seeds_are_a_number_or_a_list() -> None:
    assert seeds_of(["4"]) == [0, 1, 2, 3] and seeds_of(["3", "5"]) == [3, 5] and seeds_of(["3,5"]) == [3, 5]
    assert seeds_of(["7,"]) == [7]
    for words in (["many"], ["0"], ["1", "1"], ["-1", "2"], ["1.5"]):
        with pytest.raises(UserError, match="--seeds"):
            seeds_of(words)


def test_arms_are_compared_with_the_first_unless_said_otherwise() -> None:
    names = ["plain", "frozen", "SE:8@at:10", "eca"]
    assert against_of([], names) == {"frozen": "plain", "SE:8@at:10": "plain", "eca": "plain"}
    assert against_of(["SE:8@at:10:frozen"], names)["SE:8@at:10"] == "frozen"
    for specs, message in (
        (["eca:eca"], "compared once, and with another one"),
        (["eca:frozen", "eca:plain"], "compared once"),
        (["plain:eca"], "'plain' is the first arm"),
        (["eca"], "expected ARM:BASELINE"),
    ):
        with pytest.raises(UserError, match=message):
            against_of(specs, names)


def test_seeds_are_trained_on_each_split_and_no_two_splits_share_a_seed(tmp_path: Path) -> None:
    assert runs_of([3, 5], []) == {3: 3, 5: 5}
    runs = runs_of([0, 1], [2, 4])
    assert runs == {(2, 0): 2, (2, 1): 2, (4, 0): 4, (4, 1): 4}
    recipe = vars(train.build_parser().parse_args([]))
    both = [Arm("a", {"cfg": "a.yaml"}), Arm("redraw", {"cfg": "a.yaml"}), Arm("untouched", {})]
    cells = make_cells(both, {run: f"{split}.yaml" for run, split in runs.items()}, recipe, tmp_path)
    assert [cell.folder.name for cell in cells[::3]] == ["seed0-split2", "seed1-split2", "seed0-split4", "seed1-split4"]
    assert len({cell.options["seed"] for cell in cells[::3]}) == 4
    assert all(cell.options["patience"] == 0 for cell in cells)
    assert cells[0].options.get("init_seed") is None
    assert [cell.options["init_seed"] - cell.options["seed"] for cell in cells[1::3]] == [1_000_000] * 4
    assert [cell.trains for cell in cells[:3]] == [True, True, False]


def test_arms_that_begin_and_train_alike_are_named_before_anything_is_trained() -> None:
    tried = {"plain": {"start": "1", "new": 7}, "se": {"start": "2", "new": 9}, "same": {"start": "2", "new": 9}}
    with pytest.raises(UserError, match="the arms 'se' and 'same' begin with the same network and train alike"):
        ablate._check_starts(tried)
    ablate._check_starts({**tried, "same": {"start": "3", "new": 9}, "redraw": {"start": "4", "new": 7}})
    with pytest.raises(UserError, match=r"--placebo: 'plain' has no weights that do not come .*--split-seeds 8"):
        ablate._check_starts({"plain": {"start": "1", "new": 0}, "redraw": {"start": "1", "new": 0}})


def test_the_checkpoint_is_judged_where_its_classes_are_those_of_the_data() -> None:
    names = load_dataset("shapes.yaml").names
    assert untouched_fits("yolov5n-shapes.pt", names) == ""
    assert untouched_fits("yolov5n-shapes.pt", {0: "disc"}) == "its 6 classes are not the 1 of the data"
    assert untouched_fits("", names) == "nothing is started from"


# ------------------------------------------------------------------------------------------------ before and in between


def test_what_is_registered_stays_and_cells_carry_its_checksum(tmp_path: Path) -> None:
    fixed = {"arms": {"a": {}, "b": {"gate": "gain"}}, "against": {"b": "a"}, "rule": {"margin": 0.01}}
    register(tmp_path, fixed, {"commit": "0123"}, "python ablate.py")
    first = digest(tmp_path)
    write_yaml(tmp_path / "recipe.yaml", fixed)
    register(tmp_path, {**fixed, "rule": {"margin": 0.1}}, {}, "another")
    assert digest(tmp_path) == first != ""
    cell = tmp_path / "cells/a/seed0/cell.json"
    assert registered(tmp_path, fixed, {cell: first})["environment"] == {"commit": "0123"}
    with pytest.raises(UserError, match=r"recipe\.yaml: rule: not as in preregistered\.yaml"):
        registered(tmp_path, {**fixed, "rule": {"margin": 0.1}}, {cell: first})
    file = tmp_path / "preregistered.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace("0.01", "0.1"), encoding="utf-8")
    with pytest.raises(UserError, match=r"preregistered\.yaml: was changed after .*seed0 was trained under it"):
        registered(tmp_path, fixed, {cell: first})
    assert registered(tmp_path / "old", fixed, {cell: ""}) == {}


def test_reports_before_the_end_are_remembered(tmp_path: Path) -> None:
    assert looks(tmp_path) == []
    note_look(tmp_path, 3, 16)
    note_look(tmp_path, 8, 16)
    note_look(tmp_path, 16, 16)
    assert [(look.done, look.cells) for look in looks(tmp_path)] == [(3, 16), (8, 16)]
    (tmp_path / "looks.csv").write_text("time,done,cells\nnow,many,3\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"looks\.csv: not as ablate.py writes it"):
        looks(tmp_path)


# -------------------------------------------------------------------------------------------------------------- splits


def test_consecutive_seeds_hold_out_every_image_once() -> None:
    images = [Path(f"{number}.jpg") for number in range(10)]
    held = [fold(images, seed, 4) for seed in range(8)]
    for train_part, val_part in held:
        assert not set(train_part) & set(val_part) and set(train_part) | set(val_part) == set(images)
    for first in (0, 4):
        parts = [set(val_part) for _, val_part in held[first : first + 4]]
        assert set().union(*parts) == set(images) and sum(map(len, parts)) == 10
    assert held[0][1] != held[4][1] and fold(images, 0, 4) == held[0]


def test_pooled_images_are_all_held_out_once_and_val_may_be_missing(
    own_tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    yaml = own_tiny_dataset.yaml
    both = {path.name for part in ("train", "val") for path in (own_tiny_dataset.root / "images" / part).iterdir()}
    held, alone = set[str](), set[str]()
    for pool, found in ((True, held), (False, alone)):
        folder = tmp_path / f"pool {pool}"
        for seed in write_splits(str(yaml), range(4), 4, folder, insist=False, pool=pool):
            found |= {Path(line).name for line in (folder / f"seed{seed}-val.txt").read_text().splitlines()}
    assert held == both and alone < both
    text = yaml.read_text(encoding="utf-8").replace("val: images/val\n", "")
    yaml.write_text(text, encoding="utf-8")
    for pool in (True, False):
        assert len(write_splits(str(yaml), [0], 4, tmp_path / f"none {pool}", insist=False, pool=pool)) == 1
    with pytest.raises(UserError, match="has no 'val' entry"):
        write_splits(str(yaml), [0], 0, tmp_path, insist=False)


def test_every_split_draws_a_dataset_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.trials.SPLITS", {"train": 2, "val": 1})
    first = draw_splits("shapes.yaml", [0, 1], 3, tmp_path / "data")
    assert {seed: Path(file).name for seed, file in first.items()} == {0: "seed0.yaml", 1: "seed1.yaml"}
    images = {file: file.read_bytes() for file in sorted((tmp_path / "data").rglob("*.png"))}
    assert [file.parts[-4] for file in images] == ["seed0"] * 5 + ["seed1"] * 5
    assert len(set(images.values())) == 10
    spec = load_dataset(first[1])
    assert [path.name for path in spec.train + spec.val] == ["train", "val"] and spec.names[5] == "cross"
    (tmp_path / "data/seed1/images/val/0002.png").unlink()
    assert draw_splits("shapes.yaml", [0, 1], 3, tmp_path / "data") == first
    assert {file: file.read_bytes() for file in images} == images
    with pytest.raises(UserError, match=r"coco128\.yaml: --fresh-data needs a dataset that is drawn"):
        draw_splits("coco128.yaml", [0], 0, tmp_path)


def test_a_seed_draws_other_pictures_than_the_usual_dataset() -> None:
    usual, *others = draw("train", 3), draw("train", 3, 0), draw("train", 3, 1)
    assert len({picture.image.tobytes() for picture in (usual, *others)}) == 3
    assert np.array_equal(draw("train", 3, 1).image, others[1].image)


def test_validating_on_the_training_images_must_be_insisted_on(own_tiny_dataset: TinyDataset, said: list[str]) -> None:
    yaml, folder = own_tiny_dataset.yaml, own_tiny_dataset.root / "splits"
    assert write_splits(str(yaml), [0, 1], 0, folder, insist=False) == {0: str(yaml), 1: str(yaml)}
    yaml.write_text(yaml.read_text(encoding="utf-8").replace("val: images/val", "val: images/train"), encoding="utf-8")
    with pytest.raises(UserError, match="which measures memory"):
        write_splits(str(yaml), [0], 0, folder, insist=False)
    write_splits(str(yaml), [0], 0, folder, insist=True)
    assert any("how much is remembered" in line for line in said)
    with pytest.raises(UserError, match="--folds 9: expected 2 to 8"):
        write_splits(str(yaml), [0], 9, folder, insist=False)
    split = write_splits(str(yaml), [3], 4, folder, insist=False)[3]
    lines = [
        Path(split).with_name(f"seed3-{part}.txt").read_text(encoding="utf-8").split() for part in ("train", "val")
    ]
    assert [len(part) for part in lines] == [6, 2] and not set(lines[0]) & set(lines[1])


def test_another_recipe_in_the_same_folder_is_refused_and_shown(tmp_path: Path) -> None:
    recipe = {"recipe": {"epochs": 3, "hyp": None}, "folds": 0}
    check_recipe(tmp_path, recipe)
    write_yaml(tmp_path / "recipe.yaml", plain_recipe(recipe))
    check_recipe(tmp_path, recipe)
    check_recipe(tmp_path, {"recipe": {"epochs": 3, "hyp": None, "skip_bad": True}, "folds": 0})
    with pytest.raises(UserError, match=r"recipe\.epochs: 3 there, 5 now.*--name"):
        check_recipe(tmp_path, {"recipe": {"epochs": 5, "hyp": None}, "folds": 0})


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such lock")
def test_one_ablation_works_in_a_folder_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "exp"
    another = pytest.raises(UserError, match=r"exp: another ablate.py works in this folder.*--name")
    with alone_in(folder), another, alone_in(folder):
        pass
    with alone_in(folder), alone_in(tmp_path / "other"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"exp: cannot be made .*Change --project"), alone_in(tmp_path / "file/exp"):
        pass


def test_arms_may_not_change_places_nor_leave_unnoticed(tmp_path: Path) -> None:
    """The first is the baseline; one without options of its own leaves no line in a flat recipe."""
    recipe = {"arms": {"printed": {}, "a": {"gate": "gain"}, "b": {"gate": "absorbed"}}, "seeds": [0, 1]}
    write_yaml(tmp_path / "recipe.yaml", plain_recipe(recipe))
    check_recipe(tmp_path, {**recipe, "seeds": [0, 1, 2]})
    for order in (("a", "b"), ("b", "printed", "a")):
        with pytest.raises(UserError, match=r"order of arms: 'printed, a, b' there"):
            check_recipe(tmp_path, {**recipe, "arms": {arm: recipe["arms"][arm] for arm in order}})  # type: ignore[index]
    assert planned_of(tmp_path, [0, 1, 2]) == [0, 1] and planned_of(tmp_path / "new", [5]) == [5]


def test_a_recipe_may_be_moved_with_its_repository() -> None:
    assert plain_recipe({"recipe": {"hyp": str(ROOT / "data" / "x.yaml")}}) == {"recipe": {"hyp": "data/x.yaml"}}


def test_arms_that_come_to_the_same_are_refused(tmp_path: Path) -> None:
    recipe = vars(train.build_parser().parse_args([]))
    same = arms(arm=("a:cfg=y.yaml", "b:cfg=y.yaml,lr0=0.01,epochs=100"))
    with pytest.raises(UserError, match="the arms 'a' and 'b' are identical"):
        make_cells(same, {0: "x.yaml"}, recipe, tmp_path)


def test_a_split_that_would_change_is_refused(own_tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    """Its cells would be judged on images that they have trained on."""
    data = str(own_tiny_dataset.yaml)
    before = write_splits(data, [0, 1], 4, tmp_path, insist=False)
    assert write_splits(data, [0, 1, 2], 4, tmp_path, insist=False)[1] == before[1]
    next((own_tiny_dataset.root / "images/train").iterdir()).unlink()
    with pytest.raises(UserError, match=r"seed0-train.txt: the training images are not those.*--name"):
        write_splits(data, [0], 4, tmp_path, insist=False)


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
def test_linked_images_keep_the_labels_beside_the_link(own_tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    images = own_tiny_dataset.root / "images/train"
    for number, file in enumerate(sorted(images.iterdir())):
        stored = tmp_path / "store" / f"{number}{file.suffix}"
        stored.parent.mkdir(exist_ok=True)
        file.rename(stored)
        file.symlink_to(stored)
    split = write_splits(str(own_tiny_dataset.yaml), [0], 4, tmp_path / "splits", insist=False)[0]
    listed = Path(split).with_name("seed0-train.txt").read_text(encoding="utf-8").split()
    assert listed and all(Path(line).parent == images for line in listed)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--insert SE@after:SPPF", r"--insert belongs to a single training. Write it into an arm"),
        ("--seed 5", r"--seed belongs to a single training. Give --seeds 5,"),
        ("--resume", r"--resume belongs to a single training"),
        ("--exist-ok", r"--exist-ok belongs to a single training"),
        ("--patience 50", r"--patience belongs to a single training. An ablation judges the last epoch"),
        ("--init-seed 5", r"--init-seed belongs to a single training. --placebo adds an arm"),
        ("--fresh-data --folds 4", r"--fresh-data draws images for every split: leave --folds, --pool"),
        ("--pool", r"--pool puts the training and val images together, to be split again: add --folds 4"),
        ("--val-images 50", r"--val-images is about images that are drawn anew: add --fresh-data"),
        ("--split-seeds 4", r"--split-seeds: all seeds share one split here. Add --folds 4"),
        ("--margin 0", r"--margin 0, --least 0.005: expected a margin above 0"),
        ("--against b:c", r"--against b:c: expected ARM:BASELINE, two of the arms a, b"),
        ("--engine ray --devices 0,1 --jobs 2", r"--devices: Ray hands out the GPUs itself"),
        ("--devices 0, --jobs 2", r"--devices 0,: expected CUDA numbers"),
        ("--devices 0,1,2", r"--devices 0,1,2: more than --jobs 1. Give --jobs 3"),
    ],
)
def test_flags_that_would_be_dropped_are_refused(words: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        ablate.main(["--cfg", "a.yaml", "b.yaml", "--project", str(tmp_path), *words.split()])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("project", "name", "message"),
    [
        (".", "file", r"file: cannot be made \(File exists\)\. Change --project or --name"),
        ("file", "exp", r"file.*: cannot be made"),
        (".", "n" * 300, r"cannot be made \(File name too long\)"),
        ("p" * 300, "exp", r"cannot be made \(File name too long\)"),
        (".", "folder", r"\.lock: cannot be made \(Is a directory\)"),
    ],
)
def test_a_folder_that_cannot_be_made_is_one_line(in_tmp: Path, project: str, name: str, message: str) -> None:
    (in_tmp / "file").write_text("in the way")
    (in_tmp / "folder" / ".lock").mkdir(parents=True)
    with pytest.raises(UserError, match=message):
        ablate.main(["--cfg", "yolov5n.yaml", "yolov5s.yaml", "--project", project, "--name", name])


def test_splits_that_cannot_be_read_are_one_line(own_tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    (tmp_path / "splits").write_text("in the way")
    with pytest.raises(UserError, match=r"seed0-train\.txt: cannot be read or made .*Move the folder away"):
        write_splits(str(own_tiny_dataset.yaml), [0], 4, tmp_path / "splits", insist=False)
    other = tmp_path / "other"
    (other).mkdir()
    (other / "seed0-train.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"seed0-train\.txt: the training images are not those"):
        write_splits(str(own_tiny_dataset.yaml), [0], 4, other, insist=False)


def test_more_seeds_than_anybody_trains_are_refused() -> None:
    for words in (["1" + "0" * 15], [",".join(map(str, range(10_001)))]):
        with pytest.raises(UserError, match=r"--seeds .{1,40}: expected at most 10,000"):
            seeds_of(words)


def test_an_arm_whose_name_is_too_long_for_a_folder_is_refused() -> None:
    with pytest.raises(UserError, match=r"the arm 'a{40}\.\.\.' has too long a name"):
        arms(arm=("a" * 300 + ":gate=gain", "b:gate=absorbed"))


def test_flags_of_train_are_not_taken_for_longer_ones_of_ablate() -> None:
    own, rest = ablate.build_parser().parse_known_args(["--device", "cpu", "--seed", "5"])
    assert own.devices == "" and own.seeds == ["3"] and rest == ["--device", "cpu", "--seed", "5"]


def test_an_ablation_keeps_the_threads_it_was_begun_with(tmp_path: Path) -> None:
    """Sums depend on them; without this, fewer --jobs would be refused as another recipe."""
    assert threads_of(tmp_path, 2) == 2
    write_yaml(tmp_path / "recipe.yaml", {"threads": 1})
    assert threads_of(tmp_path, 2) == 1
    write_yaml(tmp_path / "recipe.yaml", {"threads": "all", "seeds": 5})
    with pytest.raises(UserError, match=r"recipe.yaml: threads: expected 1 or more, found 'all'"):
        threads_of(tmp_path, 2)
    with pytest.raises(UserError, match=r"recipe.yaml: seeds: expected a list, found 5"):
        planned_of(tmp_path, [0])


def test_cells_go_seed_by_seed_with_the_arms_hyper_parameters(tmp_path: Path) -> None:
    recipe = vars(train.build_parser().parse_args([]))
    both = [Arm("a", {"cfg": "a.yaml"}), Arm("b", {"cfg": "a.yaml", "hyp_changes": {"lr0": 0.5}})]
    cells = make_cells(both, {0: "x.yaml", 1: "y.yaml"}, recipe, tmp_path)
    assert [(cell.arm, cell.seed, cell.options["data"]) for cell in cells] == [
        ("a", 0, "x.yaml"),
        ("b", 0, "x.yaml"),
        ("a", 1, "y.yaml"),
        ("b", 1, "y.yaml"),
    ]
    assert cells[1].options["hyp"]["lr0"] == 0.5 and cells[0].options["hyp"] == recipe["hyp"]
    assert "hyp_changes" not in cells[1].options and cells[3].options["seed"] == 1


# ---------------------------------------------------------------------------------------------------------- the running


def options(data: Path, project: Path, **changes: Any) -> tuple[argparse.Namespace, dict[str, Any]]:
    own = ablate.build_parser().parse_args(["--project", str(project), "--seeds", "2", "--folds", "2"])
    own.cfg = ["yolov5n.yaml", "yolov5n.yaml+SE@after:SPPF"]
    for key, value in changes.items():
        setattr(own, key, value)
    words = (
        f"--data {data} --weights yolov5n-shapes.pt --epochs 1 --img 70 --batch 4 --workers 0 --noplots --device cpu"
    )
    return own, vars(train.build_parser().parse_args(words.split()))


def test_a_failed_cell_is_named_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_cell(cell: Cell) -> dict[str, Any]:
        if cell.seed == 1:
            raise RuntimeError("no space left\nand more")
        return {"mAP50": 0.5, "mAP50-95": 0.25}

    monkeypatch.setattr(ablate, "run_cell", run_cell)
    cells = [Cell("a", seed, tmp_path, {}) for seed in range(3)]
    with ThreadPoolExecutor(1) as pool:
        failed = ablate._run_all(pool, cells)  # type: ignore[arg-type]
    assert failed == [(cells[1], "RuntimeError: no space left")]


@pytest.mark.slow
def test_one_class_is_judged_as_one_class(own_tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    own, recipe = options(own_tiny_dataset.yaml, tmp_path / "runs", seeds=["0,"])
    folder = ablate.ablate(own, {**recipe, "single_cls": True})
    entries = [json.loads(file.read_text(encoding="utf-8")) for file in folder.rglob("cell.json")]
    assert len(entries) == 2 and all(list(entry["per_class"]) == ["item"] for entry in entries)
    for file in folder.rglob("judged.npz"):
        with np.load(file) as judged:
            assert set(judged["truth"][:, 0]) == {0} and set(judged["detections"][:, 5]) <= {0}
    assert (folder / "report.html").is_file() and (folder / "report.md").is_file()


@pytest.mark.slow
def test_a_diverged_cell_is_a_score_of_zero_and_the_report_says_so(
    own_tiny_dataset: TinyDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, recipe = options(own_tiny_dataset.yaml, tmp_path / "runs")

    def diverge(**_: Any) -> None:
        raise NonFiniteLoss("epoch 0: the loss is not finite")

    with monkeypatch.context() as patch:
        patch.setattr(train, "run", diverge)
        data = str(own_tiny_dataset.yaml)
        cell = Cell("a", 0, tmp_path / "cells/a/seed0", {**recipe, "data": data, "device": "cpu"})
        result = ablate.run_cell(cell)
    assert result["diverged"] == "epoch 0: the loss is not finite" and result["mAP50-95"] == 0
    with np.load(cell.folder / "judged.npz") as judged:
        assert len(judged["detections"]) == 0 and len(judged["truth"]) > 0
    assert set(result["per_class"].values()) == {0.0} and cell.done


@pytest.mark.slow
def test_an_ablation_runs_every_cell_once_and_goes_on(own_tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    own, recipe = options(own_tiny_dataset.yaml, tmp_path / "runs")
    folder = ablate.ablate(own, recipe)
    results = {file.parent: json.loads(file.read_text(encoding="utf-8")) for file in folder.rglob("cell.json")}
    assert len(results) == 4 and {entry["seed"] for entry in results.values()} == {0, 1}
    for cell, entry in results.items():
        with np.load(cell / "judged.npz", allow_pickle=False) as judged:
            assert len(judged["paths"]) == 4 and judged["truth"].shape == (8, 5)
        assert set(entry) >= {"precision", "recall", "mAP50", "mAP50-95", "per_class", "seconds"}
        assert (cell / "results.csv").is_file() and (cell / "log.txt").stat().st_size > 0
    assert (folder / "gates-yolov5n+SE@after_SPPF.png").is_file()
    assert "](gates-yolov5n%2BSE%40after_SPPF.png)" in (folder / "report.md").read_text(encoding="utf-8")
    assert (folder / "report.html").read_text(encoding="utf-8").count("data:image/png") == 1
    stamps = {file: file.stat().st_mtime_ns for file in folder.rglob("last.pt")}
    victim = next(cell for cell in results if results[cell]["seed"] == 1)
    (victim / "cell.json").unlink()  # as if it had been killed while judging
    ablate.ablate(own, recipe)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("last.pt")} == stamps
    again = json.loads((victim / "cell.json").read_text(encoding="utf-8"))
    assert again["seconds"] is None and {**again, "seconds": 0} == {**results[victim], "seconds": 0}
    (victim / "cell.json").unlink()
    arms = json.loads((folder / "arms.json").read_text(encoding="utf-8"))
    (folder / "arms.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"arms.json: cannot be read .*Delete it"):
        ablate.ablate(own, recipe)
    arms["yolov5n"]["fingerprint"] = "that of another YAML"
    (folder / "arms.json").write_text(json.dumps(arms), encoding="utf-8")
    with pytest.raises(UserError, match="arm 'yolov5n': its YAML, hyper-parameters, class names or weights are not"):
        ablate.ablate(own, recipe)
    assert not (victim / "cell.json").exists()


@pytest.mark.slow
def test_a_broken_arm_is_found_before_anything_is_trained(own_tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    own, recipe = options(own_tiny_dataset.yaml, tmp_path / "runs", cfg=["yolov5n.yaml", "yolov5n.yaml+SE@after:SPFF"])
    with pytest.raises(UserError, match=r"arm 'yolov5n.SE@after:SPFF': .*SPFF.*Did you mean"):
        ablate.ablate(own, recipe)
    assert not list((tmp_path / "runs").rglob("cell.json"))


@pytest.mark.parametrize(
    ("tensors", "percent", "said"),
    [
        ("343/351", 93.808, "1,880,349 parameters, 93.8 % of them from the checkpoint (343/351 tensors)"),
        ("0", 0.0, "1,880,349 parameters, none of them from a checkpoint"),
    ],
)
def test_what_an_arm_starts_with_is_said_in_words(tensors: str, percent: float, said: str) -> None:
    tried = {"fingerprint": "ab12", "parameters": 1880349, "tensors": tensors, "percent": percent}
    assert ablate._in_words(tried) == said
