"""The embedded dataset: frozen pictures, the promised difficulty, and drawing that survives what happens to folders."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils import shapes
from utils.config import ROOT, UserError
from utils.data import DatasetSpec, load_dataset, prepare_shapes
from utils.shapes import CLASSES, SIZE, SPLITS, UNIT, Picture, Shape, coverage, draw, visible_share

# Decided before anything was trained on the set. Whoever has a reason to change it raises VERSION and trains anew.
FROZEN = "2b37c08d5e91c6a9c4ea83b2d992a124837cc8b0434b5e3c418c1ab2208b19d4"


@pytest.fixture(scope="module")
def pictures() -> dict[str, list[Picture]]:
    with ThreadPoolExecutor(2) as pool:
        return {split: list(pool.map(draw, [split] * count, range(count))) for split, count in SPLITS.items()}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only nine pictures, for tests about files."""
    monkeypatch.setattr(shapes, "SPLITS", {"train": 6, "val": 3})


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DatasetSpec:
    """The shipped YAML, with a root and a user cache of this test's own."""
    monkeypatch.setenv("YOLOV5_CACHE_DIR", str(tmp_path / "cache"))
    return load_dataset("shapes.yaml").moved(tmp_path / "data" / "shapes")


def contents(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def box_iou(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


# ------------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.slow
def test_pictures_and_labels_are_the_frozen_ones(pictures: dict[str, list[Picture]]) -> None:
    digest = hashlib.sha256()
    for split in SPLITS:
        for picture in pictures[split]:
            digest.update(picture.image.tobytes())
            digest.update(picture.label_text().encode())
    assert digest.hexdigest() == FROZEN


def test_there_are_512_training_and_128_validation_images_of_six_classes(pictures: dict[str, list[Picture]]) -> None:
    assert {split: len(drawn) for split, drawn in pictures.items()} == {"train": 512, "val": 128}
    assert len(CLASSES) == 6 and list(load_dataset("shapes.yaml").names.values()) == list(CLASSES)
    assert all(p.image.shape == (SIZE, SIZE, 3) and p.image.dtype == np.uint8 for p in pictures["train"])
    counts = [len(picture.shapes) for drawn in pictures.values() for picture in drawn]
    assert min(counts) == 3 and max(counts) == 10


def test_no_picture_appears_twice(pictures: dict[str, list[Picture]]) -> None:
    hashes = {hashlib.sha256(p.image.tobytes()).digest() for drawn in pictures.values() for p in drawn}
    assert len(hashes) == sum(SPLITS.values())


@pytest.mark.parametrize("split", SPLITS)
def test_at_least_30_percent_of_the_boxes_are_under_32_pixels(pictures: dict[str, list[Picture]], split: str) -> None:
    boxes = np.array([shape.box for picture in pictures[split] for shape in picture.shapes]) / UNIT
    longest = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    assert (longest < 32).mean() >= 0.3
    assert longest.min() >= 18 and longest.max() <= 110
    assert (longest >= 32).mean() >= 0.5  # and large ones are not rare either


@pytest.mark.parametrize("split", SPLITS)
def test_at_least_20_percent_of_the_objects_overlap_another(pictures: dict[str, list[Picture]], split: str) -> None:
    best = []
    for picture in pictures[split]:
        for a in picture.shapes:
            best.append(max(box_iou(a.box, b.box) for b in picture.shapes if b is not a))
    assert (np.array(best) > 0.1).mean() >= 0.2
    assert max(best) <= 0.45


@pytest.mark.parametrize("split", SPLITS)
def test_classes_are_balanced(pictures: dict[str, list[Picture]], split: str) -> None:
    counts = np.bincount([shape.label for picture in pictures[split] for shape in picture.shapes], minlength=6)
    assert counts.min() >= 0.93 * counts.mean() and counts.max() <= 1.07 * counts.mean()


def test_covered_objects_stay_visible(pictures: dict[str, list[Picture]]) -> None:
    for picture in pictures["val"][:50]:
        for index, below in enumerate(picture.shapes):
            hidden = sum(1 - visible_share(below, above) for above in picture.shapes[index + 1 :])
            assert hidden <= 0.45


def colours_and_labels(drawn: list[Picture]) -> tuple[np.ndarray, np.ndarray]:
    colours, labels = [], []
    for picture in drawn:
        for shape in picture.shapes:
            rows, columns, cover = coverage(shape.rings)
            colours.append(picture.image[rows, columns][cover == cover.max()].mean(axis=0))
            labels.append(shape.label)
    return np.array(colours), np.array(labels)


def test_colour_says_nothing_about_the_class(pictures: dict[str, list[Picture]]) -> None:
    colours, labels = colours_and_labels(pictures["train"])
    others, truth = colours_and_labels(pictures["val"])
    distances = (colours**2).sum(axis=1) - 2 * others @ colours.T  # squared, but for a constant per row
    nearest = distances.argpartition(15, axis=1)[:, :15]
    votes = np.array([np.bincount(labels[row], minlength=6).argmax() for row in nearest])
    assert (votes == truth).mean() < 1 / 6 + 4 * np.sqrt(5 / 36 / len(truth))  # four standard deviations above chance


def test_objects_stand_out_from_their_surroundings(pictures: dict[str, list[Picture]]) -> None:
    for picture in pictures["val"][:40]:
        for shape in picture.shapes:
            if any(box_iou(shape.box, other.box) > 0 for other in picture.shapes if other is not shape):
                continue
            rows, columns, cover = coverage(shape.rings)
            patch = picture.image[rows, columns].astype(float)
            assert np.abs(patch[cover == 16].mean(axis=0) - patch[cover == 0].mean(axis=0)).max() > 30


# ------------------------------------------------------------------------------------------------------------- geometry


def test_coverage_counts_the_samples_inside_a_polygon_and_outside_its_hole() -> None:
    square = np.array([[0, 0], [4, 0], [4, 4], [0, 4]]) * UNIT + [UNIT // 2, UNIT]  # half a pixel to the right
    hole = (np.array([[1, 1], [3, 1], [3, 3], [1, 3]]) * UNIT + [UNIT // 2, UNIT])[::-1]
    rows, columns, cover = coverage((square, hole))
    assert (rows, columns) == (slice(1, 5), slice(0, 5))
    edge, inner = [8, 16, 16, 16, 8], [8, 8, 0, 8, 8]
    assert cover.tolist() == [edge, inner, inner, edge]


def test_coverage_agrees_with_testing_every_sample(pictures: dict[str, list[Picture]]) -> None:
    for shape in (shape for picture in pictures["val"][:12] for shape in picture.shapes):
        rows, columns, cover = coverage(shape.rings)
        y = (np.arange(rows.start * 4, rows.stop * 4) * 16 + 8)[:, None]
        x = np.arange(columns.start * 4, columns.stop * 4) * 16 + 8
        inside = np.zeros((len(y), len(x)), dtype=bool)
        for ring in shape.rings:
            for (xa, ya), (xb, yb) in zip(ring.tolist(), np.roll(ring, -1, axis=0).tolist()):
                if ya > yb:
                    xa, ya, xb, yb = xb, yb, xa, ya
                inside ^= (ya <= y) & (y < yb) & ((x - xa) * (yb - ya) >= (y - ya) * (xb - xa))
        expected = inside.reshape(cover.shape[0], 4, cover.shape[1], 4).sum(axis=(1, 3))
        assert np.array_equal(cover, expected), CLASSES[shape.label]


def test_boxes_are_tight_and_inside_the_image(pictures: dict[str, list[Picture]]) -> None:
    for shape in (shape for picture in pictures["val"] for shape in picture.shapes):
        x1, y1, x2, y2 = shape.box
        assert 0 <= x1 < x2 <= SIZE * UNIT and 0 <= y1 < y2 <= SIZE * UNIT
        rows, columns, cover = coverage(shape.rings)
        filled_y, filled_x = np.nonzero(cover.any(axis=1))[0], np.nonzero(cover.any(axis=0))[0]
        assert (
            abs(columns.start + filled_x[0] - x1 / UNIT) <= 2 and abs(columns.start + filled_x[-1] + 1 - x2 / UNIT) <= 2
        )
        assert abs(rows.start + filled_y[0] - y1 / UNIT) <= 2 and abs(rows.start + filled_y[-1] + 1 - y2 / UNIT) <= 2


def test_label_text_holds_the_box_as_fractions_of_the_image() -> None:
    ring = np.array([[32, 64], [96, 64], [96, 160], [32, 160]]) * UNIT
    picture = Picture(np.zeros((SIZE, SIZE, 3), dtype=np.uint8), (Shape(3, (ring,)),))
    assert picture.label_text() == "3 0.200000 0.350000 0.200000 0.300000\n"


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.usefixtures("few")
def test_the_files_hold_the_pictures(spec: DatasetSpec) -> None:
    ready = prepare_shapes(spec)
    assert ready == spec and all(path.is_dir() for path in (*ready.train, *ready.val))
    for index in range(3):
        picture = draw("val", index)
        assert np.array_equal(cv2.imread(str(ready.val[0] / f"{index:04d}.png")), picture.image)
        assert (ready.root / "labels" / "val" / f"{index:04d}.txt").read_text() == picture.label_text()
    assert sorted(p.name for p in ready.train[0].iterdir()) == [f"{i:04d}.png" for i in range(6)]


@pytest.mark.usefixtures("few")
def test_a_complete_set_is_left_alone(spec: DatasetSpec) -> None:
    prepare_shapes(spec)
    before = {file: file.stat().st_mtime_ns for file in spec.root.rglob("*")}
    prepare_shapes(spec)
    assert {file: file.stat().st_mtime_ns for file in spec.root.rglob("*")} == before


@pytest.mark.usefixtures("few")
def test_a_deleted_and_an_empty_file_are_drawn_again(spec: DatasetSpec) -> None:
    prepare_shapes(spec)
    before = contents(spec.root)
    (spec.root / "images" / "train" / "0002.png").unlink()
    (spec.root / "labels" / "val" / "0001.txt").write_bytes(b"")
    untouched = (spec.root / "images" / "train" / "0003.png").stat().st_mtime_ns
    prepare_shapes(spec)
    assert contents(spec.root) == before
    assert (spec.root / "images" / "train" / "0003.png").stat().st_mtime_ns == untouched


@pytest.mark.usefixtures("few")
def test_an_interrupted_drawing_is_completed(spec: DatasetSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(split: str, index: int) -> Picture:
        if index == 4:
            raise KeyboardInterrupt
        return draw(split, index)

    monkeypatch.setattr(shapes, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_shapes(spec)
    assert not (spec.root / "version.txt").exists()
    monkeypatch.setattr(shapes, "draw", draw)
    prepare_shapes(spec)
    assert len(contents(spec.root)) == 2 * 9 + 1


@pytest.mark.usefixtures("few")
def test_a_folder_of_another_version_is_drawn_again(spec: DatasetSpec) -> None:
    prepare_shapes(spec)
    before = contents(spec.root)
    (spec.root / "version.txt").write_text("shapes 0\n")
    (spec.root / "labels" / "val" / "0001.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    prepare_shapes(spec)
    assert contents(spec.root) == before


@pytest.mark.usefixtures("few")
def test_two_processes_may_draw_at_once(spec: DatasetSpec) -> None:
    code = (
        "import pathlib, sys; from utils import shapes; from utils.data import load_dataset, prepare_shapes;"
        "shapes.SPLITS = {'train': 6, 'val': 3};"
        "prepare_shapes(load_dataset('shapes.yaml').moved(pathlib.Path(sys.argv[1])))"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, str(spec.root)], cwd=ROOT) for _ in range(2)]
    assert [child.wait() for child in children] == [0, 0]
    assert len(contents(spec.root)) == 2 * 9 + 1
    assert np.array_equal(cv2.imread(str(spec.root / "images" / "train" / "0005.png")), draw("train", 5).image)


@pytest.mark.usefixtures("few")
def test_a_read_only_place_falls_back_to_the_users_cache(
    spec: DatasetSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_write = shapes._write

    def write(file: Path, content: bytes) -> None:  # permissions mean nothing to root, so chmod would not do
        if file.is_relative_to(spec.root):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(file))
        real_write(file, content)

    monkeypatch.setattr(shapes, "_write", write)
    ready = prepare_shapes(spec)
    assert ready.root == tmp_path / "cache" / "datasets" / "shapes"
    assert ready.train == (ready.root / "images" / "train",) and len(list(ready.train[0].iterdir())) == 6
    assert prepare_shapes(spec) == ready  # found there the next time


@pytest.mark.usefixtures("few")
def test_the_folder_for_datasets_is_where_it_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("utils.data.ROOT", tmp_path / "repository")
    monkeypatch.setattr("utils.data.WORK", tmp_path / "repository")
    monkeypatch.setenv("YOLOV5_CACHE_DIR", str(tmp_path / "cache"))  # a set drawn there before would be used
    data = ROOT / "data" / "shapes.yaml"
    for variable, wanted in ((None, tmp_path / "repository/datasets/shapes"), ("sets", tmp_path / "sets/shapes")):
        shutil.rmtree(tmp_path / "repository", ignore_errors=True)
        if variable:
            monkeypatch.setenv("YOLOV5_DATASETS_DIR", str(tmp_path / variable))
        else:
            monkeypatch.delenv("YOLOV5_DATASETS_DIR", raising=False)
        assert prepare_shapes(load_dataset(data)).root == wanted
        assert len(contents(wanted)) == 2 * 9 + 1 and str(wanted) in said[-1]


@pytest.mark.usefixtures("few")
def test_a_folder_marked_read_only_is_left_alone_whoever_we_are(spec: DatasetSpec, tmp_path: Path) -> None:
    spec.root.parent.mkdir(parents=True)
    spec.root.parent.chmod(0o555)
    try:
        ready = prepare_shapes(spec)
        assert ready.root == tmp_path / "cache" / "datasets" / "shapes" and not spec.root.exists()
    finally:
        spec.root.parent.chmod(0o755)


@pytest.mark.usefixtures("few")
def test_a_full_disk_is_one_message_and_leaves_no_scraps(spec: DatasetSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        assert source.stat().st_size
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match=r"No space left on device.*Free some space"):
        prepare_shapes(spec)
    monkeypatch.undo()
    assert contents(spec.root) == {}


def test_other_names_or_folders_than_the_drawn_ones_are_refused_with_the_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    names = "names: [disc, ring, triangle, square, star, cross]\n"
    file.write_text(f"path: {tmp_path}\ntrain: images/train\nval: images/val\nnames: [a, b]\ndraw: shapes\n")
    with pytest.raises(UserError, match=r"mine\.yaml:4: .*disc, ring, triangle, square, star, cross"):
        prepare_shapes(load_dataset(file))
    file.write_text(f"path: {tmp_path}\ntrain: images/train\nval: images/valid\n{names}draw: shapes\n")
    with pytest.raises(UserError, match=r"mine\.yaml:3: .*images/train and images/val only"):
        prepare_shapes(load_dataset(file))


@pytest.mark.usefixtures("few")
def test_splits_may_share_a_drawn_folder(spec: DatasetSpec) -> None:
    again = replace(spec, test=spec.val)
    assert prepare_shapes(again).test == spec.val
