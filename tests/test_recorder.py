"""results.csv: whole at any time, continued where it is right, refused in one line where it is not."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import NoReturn

import pytest

from utils.config import UserError
from utils.plots import plot_results
from utils.recorder import COLUMNS, MAX_BYTES, Recorder


def recorded(folder: Path, epochs: int) -> Path:
    recorder = Recorder(folder)
    for epoch in range(epochs):
        recorder.log(epoch, [epoch / 10] * len(COLUMNS))
    return recorder.file


def epochs_in(file: Path) -> list[int]:
    return [int(line.split(",")[0]) for line in file.read_text(encoding="utf-8").splitlines()[1:]]


def test_a_run_goes_on_where_its_checkpoint_is_and_later_rows_are_cut(tmp_path: Path) -> None:
    file = recorded(tmp_path, 4)
    before = file.read_text(encoding="utf-8").splitlines()
    Recorder(tmp_path, start_epoch=2).log(2, [0.5] * len(COLUMNS))
    after = file.read_text(encoding="utf-8").splitlines()
    assert after[:3] == before[:3] and epochs_in(file) == [0, 1, 2] and "0.5" in after[3]


def test_what_an_interruption_left_after_the_checkpoint_is_not_looked_at(tmp_path: Path) -> None:
    file = recorded(tmp_path, 3)
    file.write_text(file.read_text(encoding="utf-8") + "   3,  0.1, 0\n\0\0", encoding="utf-8")
    Recorder(tmp_path, start_epoch=3)
    assert epochs_in(file) == [0, 1, 2]


def test_a_history_that_began_late_is_continued(tmp_path: Path) -> None:
    """Its file was moved away once, as the message for a damaged one advises."""
    for start in (5, 6):
        Recorder(tmp_path, start_epoch=start).log(start, [0.1] * len(COLUMNS))
    assert epochs_in(Recorder(tmp_path, start_epoch=7).file) == [5, 6]


def test_rows_saved_by_a_spreadsheet_are_understood(tmp_path: Path) -> None:
    file = recorded(tmp_path, 3)
    text = "\r\n".join(line.replace(" ", "") for line in file.read_text(encoding="utf-8").splitlines())
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    Recorder(tmp_path, start_epoch=3)
    assert epochs_in(file) == [0, 1, 2]


@pytest.mark.parametrize(
    ("pattern", "replacement", "message"),
    [
        (r"epoch,", "", r":1: expected the columns epoch, train/box_loss"),
        (r"\A.*\n", "", r":1: expected the columns"),
        (r"(?m)^ +2,", "2;", r":4: expected the 14 numbers of epoch 2, found '2;"),
        (r"(?m)^( +2,.*),.*$", r"\1", r":4: expected the 14 numbers of epoch 2"),
        (r"(?m)^ +2,.*\n", "", r":4: expected the 14 numbers of epoch 2, found ' +3"),
        (r"(?m)^( +2,.*\n)", r"\1\1", r":5: expected the 14 numbers of epoch 3, found ' +2"),
        (r"(?m)^ +2,", "-2,", r":4: expected"),
        (r"(?m)^ +2,", "9" * 5000 + ",", r":4: expected the 14 numbers of epoch 2, found '9{40}'"),
        (r"(?m)^ +2, +0.2", "2, much", r":4: expected"),
        (r"(?m)^ +0,", "\0,", r":2: expected the 14 numbers of epoch 0"),
        (r"(?m)^ +3,.*\n", "", r": ends with epoch 2, the checkpoint with 3\."),
    ],
)
def test_a_damaged_file_is_one_line_and_stays_as_it_is(
    tmp_path: Path, pattern: str, replacement: str, message: str
) -> None:
    file = recorded(tmp_path, 4)
    damaged = re.sub(pattern, replacement, file.read_text(encoding="utf-8"), count=1)
    file.write_text(damaged, encoding="utf-8")
    with pytest.raises(UserError, match=rf"results\.csv{message}.*Move the file away") as raised:
        Recorder(tmp_path, start_epoch=4)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
    assert file.read_text(encoding="utf-8") == damaged


def test_what_is_no_text_or_no_file_is_one_line(tmp_path: Path) -> None:
    file = recorded(tmp_path, 3)
    file.write_bytes(file.read_bytes()[:400] + b"\xff\xfe")
    with pytest.raises(UserError, match=r"results\.csv: cannot be read .*Move the file away"):
        Recorder(tmp_path, start_epoch=3)
    with file.open("wb") as stream:
        stream.truncate(MAX_BYTES + 1)
    with pytest.raises(UserError, match=r"results\.csv: expected a text file of at most"):
        Recorder(tmp_path, start_epoch=3)
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match=r"results\.csv: expected a text file of at most"):
        Recorder(tmp_path, start_epoch=3)


def test_a_full_disk_is_one_line_and_leaves_the_rows_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(tmp_path)
    recorder.log(0, [0.1] * len(COLUMNS))
    before = recorder.file.read_bytes()

    def full(descriptor: int) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"results\.csv: cannot be written \(No space left on device\)"):
        recorder.log(1, [0.2] * len(COLUMNS))
    assert recorder.file.read_bytes() == before and list(tmp_path.iterdir()) == [recorder.file]


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e308", "-1.7e308", "1e-320"])
def test_numbers_that_no_axis_can_show_do_not_stop_the_picture(tmp_path: Path, value: str) -> None:
    file = recorded(tmp_path, 3)
    file.write_text(file.read_text(encoding="utf-8").replace("0.1", value), encoding="utf-8")
    Recorder(tmp_path, start_epoch=3).log(3, [float(value)] * len(COLUMNS))
    assert plot_results(file).stat().st_size > 1000


def test_a_header_that_looks_like_a_formula_is_drawn(tmp_path: Path) -> None:
    file = recorded(tmp_path, 3)
    file.write_text(file.read_text(encoding="utf-8").replace("train/box_loss", r"$\frac$"), encoding="utf-8")
    assert plot_results(file).is_file()


def test_a_drawn_file_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    file.write_bytes(b"epoch,a\n0,\xff\n")
    with pytest.raises(UserError, match=r"results\.csv: cannot be read"):
        plot_results(file)
