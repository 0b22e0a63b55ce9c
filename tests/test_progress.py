"""Progress on terminals of every width, by the bytes that reach one, and its absence in files and pipes."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY, TinyDataset
from tqdm.utils import disp_len

from tests.test_train import micro_network
from utils.progress import Bar, EpochLog, EpochRow, clock, fit_table, terminal_width, train_header

ROW = EpochRow(9, 100, 11.234, (0.0412345, 0.0912345, 1.23e-05), 1234, 1280)
WIDTHS = (20, 40, 60, 80, 100, 120, 200)


class Terminal:
    """A pseudo terminal: `stream` is the program's side, `shown()` what has reached the screen's side since."""

    def __init__(self, columns: int) -> None:
        self.master, self.slave = os.openpty()
        self.resize(columns)
        self.stream = open(self.slave, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        self._found: list[bytes] = []
        self._reader = threading.Thread(target=self._read, daemon=True)  # the buffer between the sides is small
        self._reader.start()

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # what Linux says where nobody writes any more
            while data := os.read(self.master, 1 << 16):
                self._found.append(data)

    def shown(self) -> str:
        self.stream.flush()
        time.sleep(0.1)  # for the reader
        found, self._found = b"".join(self._found), []
        return found.decode()

    def close(self) -> None:
        self.stream.close()
        os.close(self.slave)
        self._reader.join(timeout=5)
        os.close(self.master)


@pytest.fixture
def terminal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.delenv("COLUMNS", raising=False)
    terminal = Terminal(request.param)
    yield terminal
    terminal.close()


def pieces(shown: str) -> list[str]:
    """What was written between two returns or ends of line: each may fill a line of the screen, but not more."""
    return [piece for piece in re.split(r"[\r\n]|\x1b\[A", shown) if piece.strip()]


@pytest.mark.parametrize("terminal", WIDTHS, indirect=True)
def test_a_bar_of_training_fits_the_terminal_and_says_how_far_and_how_long(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal.stream)  # not in the fixture: pytest sets it before the test
    width = terminal_width(sys.stderr)
    assert width == request.node.callspec.params["terminal"]
    bar = Bar(range(230), ROW, total=230)
    bar.mininterval = 0.0
    for step in bar:
        if step == 100:
            time.sleep(0.01)
    lines = pieces(terminal.shown())
    assert len(lines) > 20
    assert all(disp_len(line) < width for line in lines), max(map(len, lines))
    half = [line for line in lines if " 50%" in line]
    assert half and all(line.split()[0] == "9/99" for line in half)
    assert width < 40 or all("|" in line for line in half)
    assert width < 60 or all(line.rstrip().endswith(" left") or "it/s]" in line for line in half)
    assert width < 80 or all(
        {"1234", "1280", "0.0412", "0.0912", "11.2G"} <= set(line.split()) or "0.04123" in line for line in half
    )
    assert width < 120 or any("115/230 [" in line and "it/s]" in line for line in half)


@pytest.mark.parametrize("terminal", [30, 60, 120], indirect=True)
def test_a_long_or_wide_title_gives_way_to_the_bar(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal.stream)  # not in the fixture: pytest sets it before the test
    width = terminal_width(sys.stderr) or 0
    for title in ("train: Scanning " + "/very/long/folder" * 9, "图片" * 100):
        for _ in Bar(range(3), title):
            pass
        lines = pieces(terminal.shown())
        assert lines and all(disp_len(line) < width for line in lines)
        assert width < 60 or all("%|" in line for line in lines)


@pytest.mark.parametrize("terminal", [80], indirect=True)
def test_a_window_that_becomes_narrower_is_followed_and_the_bar_leaves_nothing_behind(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal.stream)  # not in the fixture: pytest sets it before the test
    bar = Bar(range(100), ROW, total=100)
    bar.mininterval = 0.0
    for step in bar:
        if step == 50:
            terminal.shown()
            terminal.resize(60)
    lines = [line.rstrip() for line in pieces(terminal.shown())]
    assert lines and all(len(line) < 60 for line in lines[1:])
    assert terminal.shown() == "" and not lines[-1].strip().endswith("|")


def test_nothing_is_shown_in_a_file_or_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (io.StringIO(), open(os.devnull, "w", encoding="utf-8")):  # noqa: SIM115
        monkeypatch.setattr(sys, "stderr", stream)
        assert terminal_width(sys.stderr) is None
        assert list(Bar(range(1000), "Validating")) == list(range(1000))
        if isinstance(stream, io.StringIO):
            assert stream.getvalue() == ""
        stream.close()
    assert terminal_width(sys.stderr) is None  # closed


@pytest.mark.parametrize(
    ("columns", "real", "expected"), [("60", 120, 60), ("200", 80, 80), ("70", 0, 70), ("", 0, 80), ("wide", 90, 90)]
)
def test_columns_in_the_environment_can_only_make_it_narrower(
    columns: str, real: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal(real)
    monkeypatch.setenv("COLUMNS", columns)
    assert terminal_width(terminal.stream) == expected
    terminal.close()


# --------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("width", [None, 40, 60, 79, 80, 112, 119, 129, 300])
def test_a_row_stands_below_its_headings(width: int | None) -> None:
    header, row = train_header(width), ROW.text(width)
    assert len(header) == len(row) <= (width or 1000)
    for text in (header, row):  # each cell ends where its heading ends
        ends = [match.end() for match in re.finditer(r"\S+", text)]
        assert ends == [match.end() for match in re.finditer(r"\S+", header)]


def test_without_a_limit_the_table_is_yolov5s() -> None:
    assert train_header() == "      Epoch    GPU_mem   box_loss   obj_loss   cls_loss  Instances       Size"
    assert EpochRow(0, 3, 0.0, (0.0412345, 0.5, 0.25), 7, 64).text() == (
        "        0/2         0G    0.04123        0.5       0.25          7         64"
    )


@pytest.mark.parametrize("width", [50, 60, 79, 87, 88, None])
def test_a_validations_table_fits_and_keeps_its_numbers(width: int | None) -> None:
    header = ("%22s" + "%11s" * 6) % ("Class", "Images", "Instances", "P", "R", "mAP50", "mAP50-95")
    row = "%22s" + "%11i" * 2 + "%11.3g" * 4
    rows = [row % (name, 128, 929, 0.671, 0.521, 0.599, 0.00123) for name in ("all", "traffic light", "a" * 30)]
    fitted = fit_table([header, *rows], width)
    assert all(len(line) <= (width or 1000) for line in fitted) and len({*map(len, fitted)}) <= 2
    for line, full in zip(fitted, [header, *rows]):
        assert line.split()[-6:] == full.split()[-6:]
    assert fitted == [header, *rows] or width is not None
    assert width == 50 or fitted[2].split()[0] == "traffic"


def test_time_is_said_in_minutes_and_hours() -> None:
    assert [clock(seconds) for seconds in (0.4, 65, 7205)] == ["0:00", "1:05", "2:00:05"]


def test_a_log_in_a_file_has_one_line_an_epoch_below_one_header() -> None:
    said: list[str] = []
    log = EpochLog(said.append)  # pytest's output is no terminal
    for epoch in range(3):
        log.begin()
        row = EpochRow(epoch, 3, 0.0, (0.1, 0.2, 0.3), 5, 64)
        log.trained(row, 230)
        log.finished(row, (0.5, 0.25, 0.125, 0.1) if epoch == 2 else (), [])
    assert len(said) == 4 and "mAP50-95" in said[0]
    assert [line.split()[0] for line in said[1:]] == ["0/2", "1/2", "2/2"]
    assert said[1].split()[-5:-1] == ["-"] * 4 and said[3].split()[-5:-1] == ["0.5", "0.25", "0.125", "0.1"]


# ------------------------------------------------------------------------------------------------------ whole trainings


def arguments(folder: Path, dataset: TinyDataset, epochs: int = 2) -> list[str]:
    words = f"--weights= --cfg {micro_network(folder)} --data {dataset.yaml} --img 64 --batch 1 --epochs {epochs}"
    words += f" --workers 0 --noplots --device cpu --project {folder / 'runs'}"
    return [sys.executable, str(REPOSITORY / "train.py"), *words.split()]


@pytest.mark.slow
def test_a_training_in_80_columns_never_wraps_a_line_of_its_tables(tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    terminal = Terminal(80)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("COLUMNS", None)
    process = subprocess.Popen(
        arguments(tmp_path, tiny_dataset), stdout=terminal.slave, stderr=terminal.slave, env=environment
    )
    shown = ""
    while process.poll() is None:
        shown += terminal.shown()
    shown += terminal.shown()
    terminal.close()
    assert process.returncode == 0, shown
    lines = pieces(shown[shown.index("Training epochs") :])
    assert all(disp_len(line) < 80 for line in lines if "/weights/" not in line and "runs" not in line), lines
    assert any(re.search(r"0/1 .* \d+%\|.*\| .*left", line) for line in lines)
    assert [line.split()[0] for line in lines if "8 batches in" in line] == ["0/1", "1/1"]
    assert sum("mAP50-95" in line for line in lines) == 3


@pytest.mark.slow
def test_a_training_in_a_pipe_says_what_it_does_and_one_line_an_epoch(
    tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    done = subprocess.run(arguments(tmp_path, tiny_dataset), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert not any("\r" in line or "%|" in line for line in lines + done.stderr.splitlines())
    assert [line.split()[0] for line in lines if re.match(r" +\d/1 ", line)] == ["0/1", "1/1"]
    assert lines[0].startswith("train: weights=, cfg=") and ", epochs=2, batch_size=1, imgsz=64," in lines[0]
    assert any(line.startswith("hyperparameters: lr0=0.01, lrf=0.01, momentum=0.937") for line in lines)
    assert any(
        re.fullmatch(r"micro summary: \d+ layers, [\d,]+ parameters, [\d,]+ gradients, .* GFLOPs", line)
        for line in lines
    )
    expected = "optimizer: SGD(lr=0.01) with parameter groups 57 weight(decay=0.0), 60 weight(decay=0.0005), 60 bias"
    assert expected in lines
    assert any(
        line.startswith("TensorBoard: ") and f"tensorboard --logdir {tmp_path / 'runs'}" in line for line in lines
    )
    assert any(re.fullmatch(r"2 epochs completed in \d+\.\d{3} hours\.", line) for line in lines)


@pytest.mark.slow
def test_ctrl_c_ends_with_the_command_that_goes_on(tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    process = subprocess.Popen(
        arguments(tmp_path, tiny_dataset, epochs=500),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's `&` has it ignored
    )
    last = tmp_path / "runs/exp/weights/last.pt"
    deadline = time.monotonic() + 60
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == f"interrupted. Go on with: python {REPOSITORY / 'train.py'} --resume runs/exp/weights/last.pt\n"
