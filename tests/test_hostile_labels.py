"""Label files and label caches that are huge, odd or made to mislead: answered in lines, within bounds."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import TinyDataset
from tests.test_hostile_images import at_most
from tests.test_labels import same
from utils import labels
from utils.config import UserError
from utils.data import load_dataset
from utils.labels import Scan, parse_label_file, scan

GOOD = "0 0.5 0.5 0.2 0.4\n"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLOV5_CACHE_DIR", str(tmp_path / "user cache"))


@pytest.fixture
def label_file(tmp_path: Path) -> Path:
    return tmp_path / "a.txt"


# ----------------------------------------------------------------------------------------------------------- text files


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("1_0 0.5 0.5 0.2 0.4", "'1_0' is not a number. Write it with the digits 0 to 9"),
        ("0 0.5 0.5 0.2 0_1", "'0_1' is not a number"),
        ("0 ٠.٥ 0.5 0.2 0.4", "is not a number. Write it with the digits 0 to 9"),
        ("０ 0.5 0.5 0.2 0.4", "is not a number. Write it with the digits 0 to 9"),
        ("0 0.5 0.5 0.2 1e400", "coordinate 1e400 is outside 0..1"),
        ("0 nan 0.5 0.2 0.4", "coordinate nan is outside 0..1"),
        ("inf 0.5 0.5 0.2 0.4", "class inf is not a whole number"),
        ("nan 0.5 0.5 0.2 0.4", "class nan is not a whole number"),
        ("1e300 0.5 0.5 0.2 0.4", "class 1e300 is not a whole number from 0 to 16777215"),
        ("0 0.5 \0 0.2 0.4", r"'\x00' is not a number"),
        ("0 0.5 0.5 0.2 0.4\x0c1 0.5 0.5 0.2 0.4", "10 numbers"),  # one line to every editor
        ("0 0.5 0.5 0.2 " + "a" * 5000, "is not a number"),
        ("0 0.5 0.5 0.2 " + "9" * 5000, "is outside 0..1"),
    ],
)
@pytest.mark.parametrize("num_classes", [2, None])
def test_a_number_is_what_every_tool_takes_for_one(
    text: str, complaint: str, num_classes: int | None, label_file: Path
) -> None:
    label_file.write_text(f"{GOOD}{text}\n", encoding="utf-8")
    (error,) = parse_label_file(label_file, num_classes).errors
    assert error.startswith(f"{label_file}:2: ") and complaint in error
    assert len(error) < 400 and error.isprintable()


@pytest.mark.parametrize(
    "text", ["0 5e-1 .5 +0.2 0.4", "0.0 0.5 0.5 0.2 0.4\r", "\ufeff0 0.5 0.5 0.2 0.4", "\t0 .5 .5\t.2 .4 "]
)
def test_other_spellings_of_the_same_number_are_read(text: str, label_file: Path) -> None:
    label_file.write_text(text, encoding="utf-8")
    parsed = parse_label_file(label_file, 1)
    assert not parsed.errors and np.allclose(parsed.labels, [[0, 0.5, 0.5, 0.2, 0.4]])


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", ["0 1 1 1 1\n", "a\n", "0 0 0 ", "0 0 0 1 0 1 1\n", "\n", "1" * 1000, "0 .5 .5 0 0\n", "é"]
)
def test_a_file_of_a_gigabyte_takes_no_more_than_one_of_eight_megabytes(line: str, label_file: Path) -> None:
    with label_file.open("wb") as file:
        file.write((line * (1 + (8 << 20) // len(line.encode()))).encode())
        file.truncate(1 << 30)
    with at_most(2, 100):
        assert "more than 8 MB of them for one image" in parse_label_file(label_file, 2).errors[0]
    content = (line * ((8 << 20) // len(line.encode()))).encode()
    label_file.write_bytes(content)
    with at_most(30, 600):
        parsed = parse_label_file(label_file, 2)
    assert len(parsed.labels) <= labels.MAX_LABELS and len(parsed.errors) + len(parsed.notes) <= 102
    assert sum(map(len, (*parsed.errors, *parsed.notes))) < 50_000


def test_more_rows_than_any_picture_has_are_an_error_with_the_line(
    label_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labels, "MAX_LABELS", 1000)
    label_file.write_text("0 .5 .5 .2 .2\n" * 1000)
    assert not parse_label_file(label_file, 1).errors
    label_file.write_text("0 .5 .5 .2 .2\n" * 1001)
    assert "a.txt:1001: more than 1,000 labels for one image" in parse_label_file(label_file, 1).errors[0]


def test_of_many_errors_and_notes_the_first_are_kept_and_the_rest_is_mentioned(label_file: Path) -> None:
    label_file.write_text("bad\n" * 1000)
    errors = parse_label_file(label_file, 1).errors
    assert len(errors) == 51 and errors[-1] == f"{label_file}: the lines after 50 were not looked at."
    label_file.write_text(GOOD * 1000)
    parsed = parse_label_file(label_file, 1)
    assert len(parsed.labels) == 1 and len(parsed.notes) == 51 and "949 more labels left out" in parsed.notes[-1]


@pytest.mark.parametrize("name", ["a" * 300, "a\0b"])
def test_names_that_no_file_can_have_are_answered_in_a_line(name: str, own_tiny_dataset: TinyDataset) -> None:
    spec, listed = load_dataset(own_tiny_dataset.yaml), own_tiny_dataset.root / "some.txt"
    with pytest.raises(UserError, match="no such folder, image list or image"):
        scan([own_tiny_dataset.root / name], spec)
    listed.write_text(f"./images/train/train0.png\n{name}.jpg\n", encoding="utf-8")
    found = scan([listed], spec)
    assert (len(found.samples), found.corrupt) == (1, 1) and ".jpg: " in found.messages[-1]


# ---------------------------------------------------------------------------------------------------------------- cache

Arrays = dict[str, np.ndarray]


def read(data: TinyDataset) -> Scan:
    spec = load_dataset(data.yaml)
    return scan(spec.train, spec)


def change(name: str, make: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {**arrays, name: make(arrays[name].copy())}


def at(index: int | tuple[int, int], value: float) -> Callable[[np.ndarray], np.ndarray]:
    def put(array: np.ndarray) -> np.ndarray:
        array[index] = value
        return array

    return put


WRONG: dict[str, Callable[[Arrays], Arrays]] = {
    "a missing array": lambda arrays: {k: v for k, v in arrays.items() if k != "points"},
    "labels of whole numbers": change("labels", lambda a: a.astype(np.int64)),
    "labels of four columns": change("labels", lambda a: a[:, :4]),
    "labels in one row": change("labels", np.ravel),
    "too few labels": change("labels", lambda a: a[1:]),
    "a label that is not a number": change("labels", at((0, 1), np.nan)),
    "a class nobody named": change("labels", at((0, 0), 2)),
    "half a class": change("labels", at((0, 0), 0.5)),
    "a box outside": change("labels", at((0, 3), 1.5)),
    "a negative count": change("label_counts", lambda a: np.array([-2, 6, *a[2:]], np.int32)),
    "a huge count": change("label_counts", at(0, 2**31 - 1)),
    "counts of floats": change("label_counts", lambda a: a.astype(np.float64)),
    "counts that add up after overflowing": change("point_counts", lambda _: np.full(4, 2**30, np.int32)),
    "segments without points": change("segment_counts", at(0, 2)),
    "statuses nobody gave": change("status", at(0, 7)),
    "statuses of other images": change("status", lambda a: a[:-1]),
    "pictures of no size": change("shapes_hw", at((0, 0), 0)),
    "pictures of negative size": change("shapes_hw", at((0, 0), -96)),
    "messages that are numbers": change("messages", lambda _: np.zeros(3)),
    "one message": change("messages", lambda _: np.array("text")),
    "objects": change("labels", lambda a: a.astype(object)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_cache_with_the_right_key_and_wrong_arrays_is_made_again(wrong: str, own_tiny_dataset: TinyDataset) -> None:
    expected = read(own_tiny_dataset)
    file = own_tiny_dataset.root / "labels" / "train.labels.npz"
    with np.load(file) as stored:
        arrays = {name: stored[name] for name in stored.files}
    np.savez(file, allow_pickle=True, **WRONG[wrong](arrays))
    before = file.read_bytes()
    found = read(own_tiny_dataset)
    assert same(found.samples, expected.samples) and (found.found, found.corrupt) == (8, 0)
    assert file.read_bytes() != before, "the wrong cache stayed"


def members(file: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.slow
@pytest.mark.parametrize("bomb", ["packed", "claimed", "long", "text"])
def test_a_cache_that_would_unpack_to_gigabytes_takes_no_memory(bomb: str, own_tiny_dataset: TinyDataset) -> None:
    expected = read(own_tiny_dataset)
    file = own_tiny_dataset.root / "labels" / "train.labels.npz"
    content = members(file)
    rows = 40 * 2**20 // 20 if bomb == "long" else 200_000_000
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, 5), }}".ljust(117) + "\n"
    head = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if bomb == "packed" else zipfile.ZIP_STORED) as archive:
        for name, data in content.items():
            if name != "labels.npy":
                archive.writestr(name, data)
        with archive.open("labels.npy", "w") as stream:
            if bomb == "text":
                stream.write(content["labels.npy"].replace(b"'<f4'", b"'<U536870912'"))
            else:
                stream.write(head)
                for _ in range({"packed": 400, "long": 40}.get(bomb, 0)):
                    stream.write(bytes(1 << 20))
    with at_most(5, 25):
        assert same(read(own_tiny_dataset).samples, expected.samples)
