"""Charts: they are written, hold what they should, and leave pyplot alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils import plots
from utils.config import UserError
from utils.metrics import APResult, AveragePrecision
from utils.plots import plot_confusion, plot_curves, plot_labels, plot_results, plot_study
from utils.recorder import COLUMNS

REPOSITORY = Path(__file__).resolve().parent.parent
HEADER = ("epoch", *COLUMNS)


def judged(num_classes: int, per_class: int = 20) -> APResult:
    rng = np.random.default_rng(0)
    ap = AveragePrecision(num_classes)
    for _ in range(10):
        target = rng.integers(0, num_classes, per_class) if num_classes else np.zeros(0)
        predicted = target.copy()
        correct = rng.random((len(predicted), 1)) < np.linspace(0.9, 0.3, 10)
        ap.update(correct, rng.random(len(predicted)), predicted, target)
    return ap.compute()


def size(file: Path) -> tuple[int, int]:
    image = cv2.imread(str(file))
    assert image is not None and image.std() > 5, f"{file.name} is missing or blank"
    return image.shape[1], image.shape[0]


def share_of_ink(file: Path) -> float:
    return float((cv2.imread(str(file)) < 250).any(2).mean())


def test_curves_are_four_pictures(tmp_path: Path) -> None:
    plot_curves(judged(3), {0: "a", 1: "b_$x$", 2: "c"}, tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["F1_curve.png", "PR_curve.png", "P_curve.png", "R_curve.png"]
    assert {size(tmp_path / name) for name in files} == {(1350, 900)}


@pytest.mark.slow
def test_many_classes_and_none_are_drawn_too(tmp_path: Path) -> None:
    for name, result in (("many", judged(80)), ("none", AveragePrecision(2).compute())):
        (tmp_path / name).mkdir()
        plot_curves(result, {i: f"class {i}" for i in range(80)}, tmp_path / name)
        assert size(tmp_path / name / "R_curve.png") == (1350, 900)


def test_the_confusion_matrix_divides_columns_and_leaves_small_shares_blank(tmp_path: Path) -> None:
    matrix = np.array([[999, 0, 0], [1, 0, 5], [0, 0, 0]])
    plot_confusion(matrix, {0: "cat", 1: "dog"}, tmp_path / "c.png")
    picture = cv2.imread(str(tmp_path / "c.png"))
    assert picture.shape == (1350, 1800, 3)
    cells = picture[120:1140, 240:1380]  # inside the axes
    dark = (cells[..., 2] < 40) & (cells[..., 0] < 140)
    # two of nine cells are 1: cat as cat, and the background found as dog; 1 of 1000 is too little to be shown
    assert 0.12 < dark.mean() < 0.3


@pytest.mark.slow
def test_a_large_confusion_matrix_has_no_numbers(tmp_path: Path) -> None:
    plot_confusion(np.eye(121) * 5, {i: str(i) for i in range(120)}, tmp_path / "c.png")
    assert size(tmp_path / "c.png") == (1800, 1350)


def test_label_charts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.column_stack((rng.integers(0, 5, 3000), rng.random((3000, 4)) * 0.5))
    plot_labels(labels, {i: f"class {i}" for i in range(5)}, tmp_path)
    assert size(tmp_path / "labels.jpg") == (1500, 1500)
    assert size(tmp_path / "labels_correlogram.jpg") == (1500, 1500)


def test_objects_high_up_are_high_up_in_both_label_charts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.column_stack((np.zeros(500), rng.random(500), rng.uniform(0.0, 0.3, 500), rng.random((500, 2))))
    plot_labels(labels, {0: "a"}, tmp_path)
    panels = {  # rows and columns of the panel of centres, in pixels
        "labels.jpg": (slice(810, 1410), slice(110, 700)),
        "labels_correlogram.jpg": (slice(395, 680), slice(120, 370)),
    }
    for name, (rows, columns) in panels.items():
        ink = (cv2.imread(str(tmp_path / name))[rows, columns] < 200).any(2)
        upper, lower = np.split(ink[: len(ink) // 2 * 2], 2)
        assert upper.mean() > 0.1 > 10 * lower.mean(), name


@pytest.mark.slow
def test_label_charts_of_no_labels(tmp_path: Path) -> None:
    plot_labels(np.zeros((0, 5)), {0: "a"}, tmp_path)
    assert size(tmp_path / "labels.jpg") == (1500, 1500)


def results_csv(path: Path, epochs: int, width: int = len(HEADER)) -> Path:
    lines = [",".join(f"{name:>20}" for name in HEADER[:width])]
    for epoch in range(epochs):
        values = [epoch, *np.random.default_rng(epoch).random(width - 1)]
        lines.append(",".join(f"{value:20.5g}" for value in values))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("epochs", [1, pytest.param(60, marks=pytest.mark.slow)])
def test_results_are_drawn_beside_their_csv(tmp_path: Path, epochs: int) -> None:
    file = plot_results(results_csv(tmp_path / "results.csv", epochs))
    assert file == tmp_path / "results.png" and size(file) == (3000, 1200)


def test_a_loss_that_is_nan_is_a_gap_not_an_error(tmp_path: Path) -> None:
    csv_file = results_csv(tmp_path / "results.csv", 12)
    lines = csv_file.read_text().splitlines()
    cells = lines[4].split(",")
    cells[1] = f"{'nan':>20}"
    lines[4] = ",".join(cells)
    csv_file.write_text("\n".join(lines) + "\n")
    assert np.isnan(plots._read_results(csv_file)[1][3, 1])
    smooth = plots._smooth(np.array([1.0, np.nan, 1.0, 1.0, 1.0, 1.0]))
    assert smooth == pytest.approx(np.ones(6))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("epoch,a\n", "no epoch yet"),
        ("epoch,a\n1,2,3\n", r"results\.csv:2: 3 values"),
        ("epoch,a\n1,two\n", "two"),
    ],
)
def test_a_broken_results_csv_says_what_is_wrong(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "results.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        plot_results(tmp_path / "results.csv")


@pytest.mark.slow
def test_the_study_draws_a_line_per_file(tmp_path: Path) -> None:
    for name, gain in (("n", 0.0), ("s", 0.1)):
        rows = [(0.6, 0.5, 0.5, 0.3 + gain + k / 100, 0, 0, 0, 0.2, 5 * k, 1) for k in range(11)]
        np.savetxt(tmp_path / f"study_coco_yolov5{name}.txt", rows, fmt="%10.4g")
    one, both = tmp_path / "one.png", tmp_path / "both.png"
    files = sorted(tmp_path.glob("study_*.txt"))
    plot_study(files[:1], range(256, 1537, 128), one)
    plot_study(files, range(256, 1537, 128), both)
    assert size(both) == (1800, 1200) and share_of_ink(both) > share_of_ink(one)


def test_chinese_names_are_printed_or_become_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "system_font", lambda text: None)
    plots._cached_labels.cache_clear()
    shown, _ = plots._labels({0: "cat", 1: "红绿灯", 2: "a$b"})
    plots._cached_labels.cache_clear()
    assert shown == {0: "cat", 1: "1", 2: r"a\$b"}


@pytest.mark.slow
def test_drawing_leaves_pyplot_and_its_backend_alone() -> None:
    code = (
        "import sys, numpy as np, tempfile, utils.plots as p; d = tempfile.mkdtemp();"
        "p.plot_labels(np.full((3, 5), .5) * [0, 1, 1, 1, 1], {0: 'a'}, d);"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=60)
