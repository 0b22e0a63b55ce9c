"""Datasets: where their folders are looked for, what a wrong entry is answered with, and how missing images come."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import TinyDataset
from tests.test_config import write
from utils.config import UserError
from utils.data import load_dataset, prepare


def test_the_dataset_root_is_looked_for_below_the_variable_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sets" / "pets").mkdir(parents=True)
    monkeypatch.setenv("YOLOV5_DATASETS_DIR", str(tmp_path / "sets"))
    path = write(tmp_path, "path: ../datasets/pets\ntrain: a\nval: [b, c]\nnames: [cat]\n")
    spec = load_dataset(path)
    assert spec.root == tmp_path / "sets" / "pets"
    assert spec.val == (spec.root / "b", spec.root / "c")
    assert spec.names == {0: "cat"}


def test_upstreams_spelling_of_the_variable_means_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pets").mkdir()
    monkeypatch.delenv("YOLOV5_DATASETS_DIR", raising=False)
    monkeypatch.setenv("YOLOv5_DATASETS_DIR", str(tmp_path))
    assert (
        load_dataset({"path": "../datasets/pets", "train": "a", "val": "b", "names": ["x"]}).root == tmp_path / "pets"
    )


def test_the_dataset_root_may_be_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("YOLOV5_DATASETS_DIR", raising=False)
    assert load_dataset({"path": "mine", "train": "a", "val": "b", "names": ["x"]}).root == tmp_path / "mine"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an empty repository, work (the working directory) and sets (YOLOV5_DATASETS_DIR)."""
    for name in ("repository", "work", "sets"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("utils.data.ROOT", tmp_path / "repository")
    monkeypatch.setattr("utils.data.WORK", tmp_path / "repository")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("YOLOv5_DATASETS_DIR", raising=False)
    monkeypatch.setenv("YOLOV5_DATASETS_DIR", str(tmp_path / "sets"))
    return tmp_path


def root_of(path: str) -> Path:
    return load_dataset({"path": path, "train": "a", "val": "b", "names": ["x"]}).root


@pytest.mark.parametrize("path", ["pets", "datasets/pets", "../datasets/pets", "../../pets", "a/../../pets", "../pets"])
def test_what_is_nowhere_goes_below_the_variable_else_below_the_repository(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    assert root_of(path) == elsewhere / "sets" / "pets"
    monkeypatch.delenv("YOLOV5_DATASETS_DIR")
    assert root_of(path) == elsewhere / "repository" / "datasets" / "pets"


def test_what_lies_somewhere_is_found_there(elsewhere: Path) -> None:
    for place in ("repository/datasets/pets", "datasets/pets", "sets/pets"):  # the later ones come first
        (elsewhere / place).mkdir(parents=True)
        assert root_of("../datasets/pets") == elsewhere / place


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("val: b\nnames: [x]\n", "has no 'train' entry"),
        ("train: a\nval: b\n", "expected `names:`"),
        ("train: a\nval: b\nnames:\n  1: x\n", "some.yaml:4: class numbers must run 0, 1, 2"),
        ("train: a\nval: b\nnames: [x]\nnc: 2\n", "some.yaml:4: nc is 2, but 1 names follow"),
        ("train: a\nval: b\nnames: [x]\ndownload: bash get.sh\n", "some.yaml:4: 'download' takes the https address"),
        ("train: 3\nval: b\nnames: [x]\n", "some.yaml:1: 'train' takes folders"),
        ("train: a\nval: b\nnames: [x]\ndraw: cats\n", "some.yaml:4: can draw 'shapes' only"),
    ],
)
def test_a_wrong_dataset_entry_names_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_dataset(write(tmp_path, text))
    assert message in str(caught.value)


def test_a_split_the_yaml_does_not_name_says_which() -> None:
    spec = load_dataset({"train": "a", "val": "b", "names": ["x"]})
    with pytest.raises(UserError, match="names no 'test' images"):
        spec.split("test")


@pytest.mark.parametrize(("name", "count", "last"), [("coco128", 80, "toothbrush"), ("coco", 80, "toothbrush")])
def test_shipped_datasets_name_their_classes(name: str, count: int, last: str) -> None:
    spec = load_dataset(f"{name}.yaml")
    assert spec.num_classes == count and spec.names[count - 1] == last and spec.names[0] == "person"


def test_coco128_and_coco_have_the_same_classes() -> None:
    assert load_dataset("coco128.yaml").names == load_dataset("coco.yaml").names


def test_missing_images_name_the_line_of_the_yaml_and_a_way_out(tmp_path: Path) -> None:
    yaml = tmp_path / "d.yaml"
    yaml.write_text("path: nowhere\ntrain: images/a\nval: images/b\nnames: [x]\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"d\.yaml:3: the 'val' images are not at .*nowhere.*b.*shapes\.yaml"):
        prepare(yaml, task="val")
    with pytest.raises(UserError, match=r"d\.yaml:2: the 'train' images"):
        prepare(yaml, task="train")


def test_missing_images_are_fetched_and_found_below_the_archives_own_folder(
    own_tiny_dataset: TinyDataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fetched = []

    def fetch(url: str, folder: Path) -> Path:
        fetched.append((url, folder))
        return own_tiny_dataset.root

    monkeypatch.setattr("utils.data.fetch_archive", fetch)
    yaml = tmp_path / "d.yaml"
    address = "https://example.com/tiny.zip"
    yaml.write_text(
        f"path: {tmp_path}/data/other\ntrain: images/train\nval: images/val\nnames: [a, b]\ndownload: {address}\n",
        encoding="utf-8",
    )
    spec = prepare(yaml, task="train")
    assert fetched == [(address, tmp_path / "data")]
    assert spec.split("val") == (own_tiny_dataset.root / "images" / "val",)


# ---------------------------------------------------------------------------------------------------- without a `path:`


def without_path(dataset: TinyDataset, train_entry: str = "images/train") -> Path:
    text = f"train: {train_entry}\nval: images/val\nnames: [square, disc]\n"
    dataset.yaml.write_text(text, encoding="utf-8")
    return dataset.yaml


def test_a_dataset_without_path_is_found_beside_its_yaml(
    own_tiny_dataset: TinyDataset, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (in_tmp / "elsewhere").mkdir()
    monkeypatch.chdir(in_tmp / "elsewhere")
    for entry in ("images/train", "../images/train"):  # the second is what exports of labelling tools have
        spec = prepare(without_path(own_tiny_dataset, entry), task="train")
        assert spec.root == own_tiny_dataset.root and all(path.is_dir() for path in (*spec.train, *spec.val))


def test_images_below_the_working_directory_come_before_those_beside_the_yaml(
    own_tiny_dataset: TinyDataset, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = in_tmp / "copy"
    shutil.copytree(own_tiny_dataset.root, copy)
    monkeypatch.chdir(copy)
    assert load_dataset(without_path(own_tiny_dataset)).root == copy
    shutil.rmtree(copy / "images/val")  # a place that lacks a split is passed over
    assert load_dataset(own_tiny_dataset.yaml).root == own_tiny_dataset.root


def test_a_relative_path_is_found_beside_its_yaml_last(
    own_tiny_dataset: TinyDataset, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = own_tiny_dataset.yaml.read_text(encoding="utf-8").replace(f"path: {own_tiny_dataset.root}", "path: tiny")
    file = own_tiny_dataset.root.parent / "nearby.yaml"
    file.write_text(text, encoding="utf-8")
    (in_tmp / "elsewhere").mkdir()
    monkeypatch.chdir(in_tmp / "elsewhere")
    assert prepare(file).root == own_tiny_dataset.root


def test_images_that_are_nowhere_are_said_to_be_looked_for_beside_the_yaml(
    own_tiny_dataset: TinyDataset, in_tmp: Path
) -> None:
    with pytest.raises(UserError, match=r"tiny\.yaml:1: the 'train' images are not at .*none.*beside the YAML"):
        prepare(without_path(own_tiny_dataset, "images/none"), task="train")


def test_a_dataset_that_cannot_be_fetched_says_where_it_is_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YOLOV5_DATASETS_DIR", str(tmp_path))
    with pytest.raises(
        UserError, match=r"bccd\.yaml:\d+: the 'val' images are not at .*Clone github.com/Shenggan/BCCD_Dataset"
    ):
        prepare("bccd.yaml")
    for part in ("train", "val"):
        (tmp_path / "bccd/images" / part).mkdir(parents=True)
    spec = prepare("bccd.yaml", task="train")
    assert spec.root == (tmp_path / "bccd").resolve() and list(spec.names.values()) == ["RBC", "WBC", "Platelets"]
