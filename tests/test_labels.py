"""Label and image files: found, read, checked with file and line, cached, and never changed."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import TinyDataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from utils import labels
from utils.config import UserError
from utils.data import DatasetSpec, load_dataset
from utils.dataloaders import LoaderOptions, build_loader
from utils.forks import CAN_FORK
from utils.labels import Scan, image_files, image_shape, label_path, parse_label_file, scan
from utils.samples import Sample

GOOD = "0 0.5 0.5 0.2 0.4\n"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("YOLOV5_CACHE_DIR", str(tmp_path / "user cache"))
    return tmp_path / "user cache"


@pytest.fixture
def label_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels").mkdir()
    return tmp_path / "labels" / "a.txt"


def picture(file: Path, shape: tuple[int, ...] = (40, 60, 3)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    Image.fromarray(noise).save(file)
    return file


def same(a: Sequence[Sample], b: Sequence[Sample]) -> bool:
    return len(a) == len(b) and all(
        (x.path, x.shape_hw) == (y.path, y.shape_hw)
        and np.array_equal(x.labels, y.labels)
        and len(x.segments) == len(y.segments)
        and all(np.array_equal(s, t) for s, t in zip(x.segments, y.segments))
        for x, y in zip(a, b)
    )


def snapshot(root: Path) -> dict[str, bytes]:
    return {
        str(file): file.read_bytes() for file in root.rglob("*") if file.is_file() and ".labels.npz" not in file.name
    }


# -------------------------------------------------------------------------------------------------------------- finding


def test_a_folder_is_searched_deeply_and_sorted_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    wanted = ["b.JPG", "deep/er/a.png", "deep/z.tiff", "name.with.dots.webp"]
    for name in [*wanted, ".hidden.jpg", ".trash/c.jpg", "notes.txt", "movie.mp4", "noextension"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert image_files([tmp_path]) == [tmp_path / name for name in wanted]


def test_a_list_is_read_relative_to_itself_and_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("set/images/a.jpg", "set/images/b.jpg", "work/c.jpg"):
        picture(tmp_path / name)
    monkeypatch.chdir(tmp_path / "work")
    listed = tmp_path / "set" / "train.txt"
    listed.write_text(f"./images/b.jpg\n\n{tmp_path}/set/images/a.jpg\r\nc.jpg\nimages/b.jpg\n", encoding="utf-8-sig")
    expected = ["set/images/a.jpg", "set/images/b.jpg", "set/images/b.jpg", "work/c.jpg"]
    assert image_files([listed]) == [tmp_path / name for name in expected]


def test_several_sources_of_each_kind_are_joined(tmp_path: Path) -> None:
    picture(tmp_path / "x" / "b.png")
    single = picture(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text("./c.png\n")
    found = image_files([tmp_path / "x", tmp_path / "list.txt", single])
    assert found == [tmp_path / "a.png", tmp_path / "c.png", tmp_path / "x" / "b.png"]


def test_lines_that_name_no_image_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "list.txt").write_text("./c.png\n./c.mp4\n")
    with caplog.at_level(logging.WARNING, "yolov5"):
        assert image_files([tmp_path / "list.txt"]) == [tmp_path / "c.png"]
    assert "list.txt:2: 1 lines name no image" in caplog.text


def test_a_link_that_leads_back_up_ends(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "loop").symlink_to(tmp_path / "images", target_is_directory=True)
    assert image_files([tmp_path / "images"]) == [tmp_path / "images" / "a.png"]


@pytest.mark.parametrize("name", ["nowhere", "file.json"])
def test_a_source_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.json").touch()
    with pytest.raises(UserError, match=name):
        image_files([tmp_path / name])


def test_labels_are_looked_for_in_the_last_images_folder_s_sibling() -> None:
    assert label_path("/images/set/images/train/a.b.jpg") == Path("/images/set/labels/train/a.b.txt")
    assert label_path("/data/pictures/a.jpeg") == Path("/data/pictures/a.txt")
    assert label_path("images/a.png") == Path("labels/a.txt")
    assert label_path("/data/images") == Path("/data/images.txt")  # a file of that name is no folder


# --------------------------------------------------------------------------------------------------------------- labels


def test_boxes_are_read_as_they_are(label_file: Path) -> None:
    label_file.write_text("3 0.5 0.25 0.1 0.2\n\n0 1 0 1 0.5\n")
    parsed = parse_label_file(label_file, 4)
    assert np.allclose(parsed.labels, [[3, 0.5, 0.25, 0.1, 0.2], [0, 1, 0, 1, 0.5]])
    assert parsed.labels.dtype == np.float32 and parsed.segments == () and not parsed.errors + parsed.notes


def test_a_polygon_s_box_is_its_extent(label_file: Path) -> None:
    label_file.write_text("1 0.1 0.2 0.5 0.2 0.3 0.8\n")
    parsed = parse_label_file(label_file, 2)
    assert np.allclose(parsed.labels, [[1, 0.3, 0.5, 0.4, 0.6]])
    assert np.allclose(parsed.segments, [[[0.1, 0.2], [0.5, 0.2], [0.3, 0.8]]])


def test_boxes_and_polygons_may_be_mixed(label_file: Path) -> None:
    label_file.write_text("0 0.5 0.5 0.2 0.4\n1 0.1 0.2 0.5 0.2 0.3 0.8\n")
    parsed = parse_label_file(label_file, 2)
    assert np.allclose(parsed.labels[0], [0, 0.5, 0.5, 0.2, 0.4])  # not a polygon of two points
    assert np.allclose(parsed.segments[0], [[0.4, 0.3], [0.6, 0.3], [0.6, 0.7], [0.4, 0.7]])
    assert len(parsed.segments) == len(parsed.labels) == 2


@pytest.mark.parametrize("text", ["", "\n  \n", None])
def test_an_empty_or_missing_file_is_background(label_file: Path, text: str | None) -> None:
    if text is not None:
        label_file.write_text(text)
    parsed = parse_label_file(label_file, 2)
    assert parsed.labels.shape == (0, 5) and not parsed.errors


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("80 0.5 0.5 0.1 0.1", "class 80 is outside 0..79 (data/coco128.yaml names 80 classes). Fix the label or add"),
        ("-1 0.5 0.5 0.1 0.1", "class -1 is not a whole number from 0"),
        ("1.5 0.5 0.5 0.1 0.1", "class 1.5 is not a whole number"),
        ("nan 0.5 0.5 0.1 0.1", "class nan is not a whole number"),
        ("cat 0.5 0.5 0.1 0.1", "'cat' is not a number"),
        ("0 0.5 0,5 0.1 0.1", "'0,5' is not a number"),
        ("0 nan 0.5 0.1 0.1", "coordinate nan is outside 0..1"),
        ("0 0.5 inf 0.1 0.1", "coordinate inf is outside 0..1"),
        ("0 -0.1 0.5 0.1 0.1", "coordinate -0.1 is outside 0..1"),
        ("0 0.5 0.5 1.01 0.1", "coordinate 1.01 is outside 0..1"),
        ("0 320 240 50 60", "coordinate 320 is outside 0..1. Divide x and widths by the image's width"),
        ("0 0.1 0.2 0.5 0.2 0.3 1.8", "coordinate 1.8 is outside 0..1"),
        ("0 0.5 0.5 0.1", "4 numbers."),
        ("0 0.5 0.5 0.1 0.1 0.9", "6 numbers (the last a confidence, from --save-conf?)"),
        ("0 0.1 0.2 0.5 0.2 0.3 0.8 0.4", "8 numbers."),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(label_file: Path, row: str, message: str) -> None:
    label_file.write_text(GOOD + row + "\n")
    parsed = parse_label_file(label_file, 80, names_file="data/coco128.yaml")
    assert len(parsed.errors) == 1 and parsed.errors[0].startswith(f"labels/a.txt:2: {message}")
    assert len(parsed.labels) == 0  # half of the labels would make the rest background


def test_every_bad_row_is_named(label_file: Path) -> None:
    label_file.write_text("x 0 0 0 0\n" + GOOD + "9 0.5 0.5 0.1 0.1\n")
    assert [error.split(": ")[0] for error in parse_label_file(label_file, 2).errors] == [
        "labels/a.txt:1",
        "labels/a.txt:3",
    ]


def test_a_file_that_is_not_text_is_named(label_file: Path) -> None:
    label_file.write_bytes(b"\xff\xfe\x00\x80")
    assert parse_label_file(label_file, 2).errors[0].startswith("labels/a.txt: cannot be read as labels")


def test_rounding_just_outside_the_image_is_clipped(label_file: Path) -> None:
    label_file.write_text("0 0.5 0.5 1.0005 1\n0 -0.0001 0.2 0.5 0.2 0.3 1.0001\n")
    parsed = parse_label_file(label_file, 1)
    assert not parsed.errors and parsed.labels.min() >= 0 and parsed.labels.max() <= 1
    assert min(s.min() for s in parsed.segments) >= 0 and max(s.max() for s in parsed.segments) <= 1


def test_repeated_rows_are_dropped_in_order_with_a_note(label_file: Path) -> None:
    label_file.write_text("1 0.5 0.5 0.1 0.1\n" + GOOD + "1 0.50 0.50 0.10 0.10\n" + GOOD)
    parsed = parse_label_file(label_file, 2)
    assert parsed.labels[:, 0].tolist() == [1, 0]
    assert [note.split(";")[0] for note in parsed.notes] == [
        "labels/a.txt:3: repeats line 1",
        "labels/a.txt:4: repeats line 2",
    ]


def test_a_box_without_area_is_dropped_with_a_note(label_file: Path) -> None:
    label_file.write_text("0 0.5 0.5 0 0.1\n0 0.1 0.2 0.1 0.5 0.1 0.8\n" + GOOD)
    parsed = parse_label_file(label_file, 1)
    assert len(parsed.labels) == len(parsed.segments) == 1 and len(parsed.notes) == 2
    assert "labels/a.txt:1: the box has no area" in parsed.notes[0]


# --------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize(("orientation", "expected"), [(1, (40, 60)), (3, (40, 60)), (6, (60, 40)), (8, (60, 40))])
def test_the_shape_is_the_upright_one(tmp_path: Path, suffix: str, orientation: int, expected: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (60, 40)).save(tmp_path / f"a.{suffix}", exif=exif)
    assert image_shape(tmp_path / f"a.{suffix}") == expected


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "I;16", "1"])
def test_unusual_pixels_are_valid_images(tmp_path: Path, mode: str) -> None:
    file = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new(mode, (60, 40)).save(file)
    assert image_shape(file) == (40, 60)


def test_an_animation_counts_as_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (60, 40), color) for color in ("red", "blue")]
    for suffix in ("webp", "png", "tiff"):
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
        assert image_shape(tmp_path / f"a.{suffix}") == (40, 60)


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp", "tiff"])
@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_truncated_image_is_refused(tmp_path: Path, suffix: str, keep: float) -> None:
    file = picture(tmp_path / f"a.{suffix}")
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(UserError, match=rf"a\.{suffix}: not a readable image"):
        image_shape(file)


def test_a_truncated_jpeg_with_a_whole_thumbnail_is_refused(tmp_path: Path) -> None:
    thumbnail = picture(tmp_path / "small.jpg", (10, 10, 3)).read_bytes()
    content = picture(tmp_path / "a.jpg").read_bytes()
    block = b"\xff\xe2" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    whole = content[:2] + block + content[2:]
    (tmp_path / "a.jpg").write_bytes(whole)
    assert image_shape(tmp_path / "a.jpg") == (40, 60)
    (tmp_path / "a.jpg").write_bytes(whole[:-2])
    with pytest.raises(UserError, match="no end marker"):
        image_shape(tmp_path / "a.jpg")


def test_a_jpeg_with_something_after_its_end_is_whole(tmp_path: Path) -> None:
    file = picture(tmp_path / "a.jpg")
    file.write_bytes(file.read_bytes() + b"\0" * 9000)
    assert image_shape(file) == (40, 60)


def test_a_damaged_png_is_refused(tmp_path: Path) -> None:
    file = picture(tmp_path / "a.png")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="wrong checksum"):
        image_shape(file)


def test_empty_small_missing_and_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "zero.jpg").touch()
    (tmp_path / "text.jpg").write_text("not an image")
    picture(tmp_path / "tiny.png", (9, 60, 3))
    (tmp_path / "folder.jpg").mkdir()
    for name, reason in [
        ("zero.jpg", "0 bytes"),
        ("text.jpg", "not a readable image"),
        ("tiny.png", "60 x 9 pixels; images need at least 10"),
        ("missing.jpg", "No such file"),
        ("folder.jpg", r"cannot be read \(Is a directory"),
    ]:
        with pytest.raises(UserError, match=f"{name}: .*{reason}"):
            image_shape(tmp_path / name)


# ----------------------------------------------------------------------------------------------------------------- scan


def scan_val(tiny: TinyDataset, **options: bool | int | str) -> Scan:
    spec = load_dataset(tiny.yaml)
    return scan(spec.train, spec, **options)  # type: ignore[arg-type]


def spoil(tiny: TinyDataset) -> None:
    """One image of each fate among the eight."""
    text = [label_path(file) for file in tiny.train]
    text[0].unlink()  # missing
    text[1].write_text("")  # empty
    text[2].write_text("7 0.5 0.5 0.1 0.1\n")  # class out of range
    tiny.train[3].write_bytes(tiny.train[3].read_bytes()[:100])  # truncated
    text[4].write_text("1 0.2 0.2 0.1 0.1\n" * 2)  # repeated
    text[5].write_text("1 0.1 0.2 0.5 0.2 0.3 0.8\n" + GOOD)


def test_a_scan_finds_every_image_with_labels_and_shape(tiny_dataset: TinyDataset) -> None:
    found = scan_val(tiny_dataset)
    assert [sample.path for sample in found.samples] == [str(file) for file in tiny_dataset.train]
    assert (found.found, found.missing, found.empty, found.corrupt, found.messages) == (8, 0, 0, 0, [])
    for sample in found.samples:
        assert sample.labels.shape == (2, 5) and sample.labels[:, 0].tolist() == [0, 1]
        assert cv2.imread(sample.path).shape[:2] == sample.shape_hw


def test_bad_images_and_labels_are_counted_named_and_left_out(
    own_tiny_dataset: TinyDataset, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(own_tiny_dataset)
    before = snapshot(own_tiny_dataset.root)
    with caplog.at_level(logging.INFO, "yolov5"):
        found = scan_val(own_tiny_dataset, prefix="train: ")
    assert (found.found, found.missing, found.empty, found.corrupt) == (5, 1, 1, 2)
    assert len(found.samples) == 6 and not any("train2" in s.path or "train3" in s.path for s in found.samples)
    assert [message.split(": ")[0].rsplit("/", 1)[1] for message in found.messages] == [
        "train2.txt:1",
        "train3.png",
        "train4.txt:2",
    ]
    assert "tiny.yaml names 2 classes" in found.messages[0] and "Image left out." in found.messages[0]
    assert "train: Scanning" in caplog.text and "... 5 images, 2 backgrounds, 2 corrupt" in caplog.text
    assert all(message in caplog.text for message in found.messages)
    assert snapshot(own_tiny_dataset.root) == before  # nothing of the user's has changed


def test_the_cache_gives_the_same_scan(own_tiny_dataset: TinyDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(own_tiny_dataset)
    first = scan_val(own_tiny_dataset)
    assert (own_tiny_dataset.root / "labels" / "train.labels.npz").is_file()
    monkeypatch.setattr(labels, "image_shape", lambda path, _: pytest.fail(f"{path} was read in spite of the cache"))
    second = scan_val(own_tiny_dataset)
    assert same(first.samples, second.samples) and len(first.samples[3].segments) == 2
    assert (first.found, first.missing, first.empty, first.corrupt) == (5, 1, 1, 2)
    assert first.messages == second.messages


def test_processes_scan_many_images_as_threads_do(
    own_tiny_dataset: TinyDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(own_tiny_dataset)
    monkeypatch.setattr(labels, "CHUNK", 3)
    monkeypatch.setattr(labels, "num_cpus", lambda: 2)
    threads = scan_val(own_tiny_dataset)
    monkeypatch.setattr(labels, "MANY", 2)
    monkeypatch.setattr(labels, "CACHE_VERSION", -1)
    pids = own_tiny_dataset.root / "pids"
    examine = labels._examine

    def noted(file: str, **options: Any) -> Any:
        with pids.open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        return examine(file, **options)

    monkeypatch.setattr(labels, "_examine", noted)
    forked = scan_val(own_tiny_dataset)
    if CAN_FORK:
        assert len(set(pids.read_text().split()) - {str(os.getpid())}) == 2
    assert same(threads.samples, forked.samples) and threads.messages == forked.messages
    assert (threads.found, threads.missing, threads.empty, threads.corrupt) == (
        *(forked.found, forked.missing, forked.empty, forked.corrupt),
    )


NUMBER = st.one_of(
    st.integers(0, 3).map(str),
    st.floats(0, 1, width=32).map(repr),
    st.sampled_from(("1.0005", "-0.0005", "-0.0", "nan", "1e-60", "1_0", "0.5x", "7", "-1", "2.5", "1e300", "٣")),
)
ROW = st.lists(NUMBER, min_size=4, max_size=7).map(" ".join)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(ROW, st.just(GOOD.strip())), max_size=4), st.sampled_from(("\n", "\r\n", "\n\n", "\x0b\n")))
def test_a_file_of_boxes_alone_is_read_as_row_by_row(tmp_path: Path, rows: list[str], between: str) -> None:
    file = tmp_path / "labels.txt"
    file.write_bytes(between.join(rows).encode())
    at_once = parse_label_file(file, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labels, "_flawless_boxes", lambda text, num_classes: None)
        by_row = parse_label_file(file, 3)
    assert at_once.labels.tobytes() == by_row.labels.tobytes() and at_once.labels.shape == by_row.labels.shape
    assert (at_once.errors, at_once.notes) == (by_row.errors, by_row.notes)
    assert [s.tobytes() for s in at_once.segments] == [s.tobytes() for s in by_row.segments]


@given(st.lists(st.sampled_from(("images", "a", "images.x", "b.c", "labels")), max_size=5), st.sampled_from("abc"))
def test_the_fast_way_to_a_label_s_path_agrees_with_the_plain_one(folders: list[str], name: str) -> None:
    for suffix in (".jpg", ".b.PNG", "..jpeg"):
        image = os.path.abspath(os.path.join(os.sep, *folders, name + suffix))
        assert labels._label_name(image) == str(label_path(image))


def test_the_number_of_workers_changes_nothing(own_tiny_dataset: TinyDataset) -> None:
    spoil(own_tiny_dataset)
    one = scan_val(own_tiny_dataset, workers=0)
    (own_tiny_dataset.root / "labels" / "train.labels.npz").unlink()
    four = scan_val(own_tiny_dataset, workers=4)
    assert same(one.samples, four.samples) and one.messages == four.messages


@pytest.mark.parametrize("change", ["edit", "touch", "delete", "add", "image", "classes"])
def test_a_change_is_noticed(own_tiny_dataset: TinyDataset, change: str) -> None:
    scan_val(own_tiny_dataset)
    file = label_path(own_tiny_dataset.train[0])
    if change == "edit":
        file.write_text("1 0.3 0.3 0.1 0.1\n")
    elif change == "touch":  # the same size, another content
        time = file.stat().st_mtime_ns
        file.write_text(file.read_text().replace("0 ", "1 ", 1))
        os.utime(file, ns=(time + 1, time + 1))
    elif change == "delete":
        file.unlink()
    elif change == "add":
        shutil.copy(own_tiny_dataset.train[0], own_tiny_dataset.root / "images" / "train" / "new.png")
    elif change == "image":
        picture(own_tiny_dataset.train[0], (50, 70, 3))
    else:
        yaml = own_tiny_dataset.yaml
        yaml.write_text(yaml.read_text().replace("  1: disc\n", ""))
    found = scan_val(own_tiny_dataset)
    results = {
        "edit": lambda: len(found.samples[0].labels) == 1,
        "touch": lambda: found.samples[0].labels[0, 0] == 1,
        "delete": lambda: found.missing == 1,
        "add": lambda: len(found.samples) == 9,
        "image": lambda: found.samples[0].shape_hw == (50, 70),
        "classes": lambda: found.corrupt == 8,
    }
    assert results[change]()


def test_a_read_only_dataset_is_cached_for_the_user(own_tiny_dataset: TinyDataset, own_cache: Path) -> None:
    folder = own_tiny_dataset.root / "labels"
    folder.chmod(0o555)  # the mark is respected even by root, who could write
    try:
        first = scan_val(own_tiny_dataset)
        assert sorted(p.name for p in folder.iterdir()) == ["train", "val"]
        assert len(list((own_cache / "labels").glob("*.labels.npz"))) == 1
        assert same(first.samples, scan_val(own_tiny_dataset).samples)
    finally:
        folder.chmod(0o755)


class Trap:
    """Unpickling it leaves a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.file),)


def test_another_program_s_cache_is_neither_read_nor_replaced(own_tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    content = pickle.dumps(Trap(tmp_path / "sprung"))
    for name in ("train.cache", "train.labels.npz", "train.cache.npy"):
        (own_tiny_dataset.root / "labels" / name).write_bytes(content)
    with open(own_tiny_dataset.root / "labels" / "train.labels.npz", "wb") as file:
        np.save(file, np.array([Trap(tmp_path / "sprung")], dtype=object), allow_pickle=True)
    assert len(scan_val(own_tiny_dataset).samples) == 8
    assert not (tmp_path / "sprung").exists()
    assert (own_tiny_dataset.root / "labels" / "train.cache").read_bytes() == content


@pytest.mark.parametrize("spoilt", [b"", b"PK\x03\x04 half a zip", b"\x93NUMPY", b"text"])
def test_a_broken_cache_is_made_again(own_tiny_dataset: TinyDataset, spoilt: bytes) -> None:
    file = own_tiny_dataset.root / "labels" / "train.labels.npz"
    file.write_bytes(spoilt)
    first = scan_val(own_tiny_dataset)
    assert len(first.samples) == 8 and len(file.read_bytes()) > 100
    file.write_bytes(file.read_bytes()[:-40])
    assert same(scan_val(own_tiny_dataset).samples, first.samples)


def test_single_cls_makes_every_class_0_whatever_the_names(own_tiny_dataset: TinyDataset) -> None:
    label_path(own_tiny_dataset.train[0]).write_text("7 0.5 0.5 0.1 0.1\n")
    assert scan_val(own_tiny_dataset).corrupt == 1
    found = scan_val(own_tiny_dataset, single_cls=True)
    assert len(found.samples) == 8 and {float(c) for s in found.samples for c in s.labels[:, 0]} == {0.0}


def test_a_list_is_cached_beside_itself(own_tiny_dataset: TinyDataset) -> None:
    listed = own_tiny_dataset.root / "some.txt"
    listed.write_text("./images/train/train1.png\n./images/train/train0.png\n./images/train/gone.png\n")
    found = scan([listed], load_dataset(own_tiny_dataset.yaml))
    assert [Path(sample.path).name for sample in found.samples] == ["train0.png", "train1.png"]
    assert found.corrupt == 1 and "gone.png: cannot be read (No such file" in found.messages[0]
    assert (own_tiny_dataset.root / "some.labels.npz").is_file()


def test_only_the_first_problems_are_logged(own_tiny_dataset: TinyDataset, caplog: pytest.LogCaptureFixture) -> None:
    label_path(own_tiny_dataset.train[0]).write_text("5 0.5 0.5 0.1 0.1\n" * 30)
    with caplog.at_level(logging.WARNING, "yolov5"):
        found = scan_val(own_tiny_dataset)
    assert len(found.messages) == 30 and len(caplog.records) == 21
    assert "and 10 more like these" in caplog.records[-1].message


# -------------------------------------------------------------------------------------------------- too many unusable


def load_train(tiny: TinyDataset, **options: bool) -> int:
    """How many images a loader has."""
    spec = load_dataset(tiny.yaml)
    return len(build_loader(spec, spec.train, LoaderOptions(imgsz=64, batch_size=2, workers=0, **options))[1])


def renumbered(tiny: TinyDataset, change: Callable[[int], int]) -> None:
    for file in map(label_path, (*tiny.train, *tiny.val)):
        rows = [line.split(maxsplit=1) for line in file.read_text(encoding="utf-8").splitlines()]
        file.write_text("".join(f"{change(int(label))} {rest}\n" for label, rest in rows), encoding="utf-8")


def test_labels_counted_from_1_stop_the_run_with_the_likely_cause(own_tiny_dataset: TinyDataset) -> None:
    renumbered(own_tiny_dataset, lambda label: label + 1)
    with pytest.raises(UserError) as stop:
        load_train(own_tiny_dataset)
    text = str(stop.value)
    assert "8 of the 8 images" in text and "Do your classes start at 1?" in text and "here they are 1 to 2." in text
    assert "(1) train0.txt:2: class 2 is outside 0..1. (2) train1.txt:2:" in text and "(3) train2.txt:2:" in text
    assert text.endswith("--skip-bad.")


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda label: label * 2, "`names:` has 2 entries, but classes up to 2 occur"),  # class 0 is there, too
        (lambda label: label + 7, "`names:` has 2 entries, but classes up to 8 occur"),
    ],
)
def test_too_few_names_are_said_to_be_too_few(
    change: Callable[[int], int], cause: str, own_tiny_dataset: TinyDataset
) -> None:
    renumbered(own_tiny_dataset, change)
    with pytest.raises(UserError) as stop:
        load_train(own_tiny_dataset)
    assert cause in str(stop.value) and "start at 1" not in str(stop.value)


def test_more_than_a_tenth_of_unusable_images_stops_and_skip_bad_goes_on(own_tiny_dataset: TinyDataset) -> None:
    first = own_tiny_dataset.train[0]
    for index in range(2):  # ten images
        shutil.copy(first, first.with_name(f"more{index}.png"))
        shutil.copy(label_path(first), label_path(first.with_name(f"more{index}.png")))
    first.write_bytes(b"no image")
    assert load_train(own_tiny_dataset) == 9  # a tenth is not more than a tenth
    own_tiny_dataset.train[1].write_bytes(b"no image")
    with pytest.raises(UserError, match=r"2 of the 10 images in .* cannot be used\. The first messages: .*train0\.png"):
        load_train(own_tiny_dataset)
    assert load_train(own_tiny_dataset, skip_bad=True) == 8
    renumbered(own_tiny_dataset, lambda label: label + 1)
    assert load_train(own_tiny_dataset, skip_bad=True, single_cls=True) == 8  # where any class is allowed


def test_nothing_at_all_is_an_empty_scan(tmp_path: Path, tiny_dataset: TinyDataset) -> None:
    (tmp_path / "none").mkdir()
    found = scan([tmp_path / "none"], load_dataset(tiny_dataset.yaml))
    assert list(found.samples) == [] and (found.found, found.missing, found.empty, found.corrupt) == (0, 0, 0, 0)


def test_the_128_photos_have_929_labels(datasets_dir: Path) -> None:
    spec: DatasetSpec = load_dataset("coco128.yaml")
    found = scan(spec.val, spec)
    assert (len(found.samples), found.found, found.missing, found.corrupt) == (128, 126, 2, 0)
    assert sum(len(sample.labels) for sample in found.samples) == 929
    assert spec.root == datasets_dir / "coco128"
