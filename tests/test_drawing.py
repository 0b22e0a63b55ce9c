"""Boxes, mosaics, crops and feature maps as pictures."""

from __future__ import annotations

import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from utils import drawing
from utils.drawing import (
    PALETTE,
    Annotator,
    color,
    drawable_names,
    feature_maps,
    place_labels,
    plot_batch,
    save_crop,
    write_image,
)


def lab(class_index: int) -> np.ndarray:
    pixel = np.array([[color(class_index)]], np.uint8)
    return cv2.cvtColor(pixel.astype(np.float32) / 255, cv2.COLOR_BGR2Lab)[0, 0]


def test_twenty_colours_can_be_told_apart_and_repeat() -> None:
    colors = [lab(index) for index in range(20)]
    nearest = min(np.linalg.norm(a - b) for i, a in enumerate(colors) for b in colors[:i])
    assert nearest > 20, "two colours are too close (CIE76)"
    assert color(3) == color(23) and len(set(PALETTE)) == 20


def test_a_box_is_drawn_on_a_copy_in_its_colour() -> None:
    image = np.zeros((100, 160, 3), np.uint8)
    annotator = Annotator(image, line_width=3)
    annotator.box((40, 50, 120, 90), "", (10, 200, 30))
    assert not image.any()
    assert annotator.image[70, 40].tolist() == [10, 200, 30]
    assert not annotator.image[70, 80].any(), "the inside stays as it was"


@pytest.mark.parametrize(
    ("box", "rows"),
    [((40, 60, 120, 90), slice(44, 58)), ((40, 4, 120, 90), slice(8, 20))],
    ids=["above where it fits", "inside at the upper edge"],
)
def test_the_label_goes_above_the_box_or_inside(box: tuple[int, ...], rows: slice) -> None:
    annotator = Annotator(np.zeros((100, 160, 3), np.uint8), line_width=2)
    annotator.box(box, "dog", (0, 0, 255))
    label = annotator.image[rows, 42:60]
    assert (label > 180).all(2).any() and (label[..., 2] > 200).mean() > 0.9, "white letters on red"


def test_a_label_never_leaves_the_image_at_the_right() -> None:
    annotator = Annotator(np.zeros((100, 160, 3), np.uint8), line_width=2)
    annotator.box((150, 60, 158, 90), "giraffe", (0, 0, 255))
    assert annotator.image[50, 90:158, 2].mean() > 100, "the label moved to the left of the box"


def shared(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Pixels that two xyxy rectangles share."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def placed(boxes: list[tuple[int, ...]], size_wh: tuple[int, int] = (60, 14), side: int = 200) -> list[tuple[int, ...]]:
    """The rectangle of a label of `size_wh` at each box, the first box choosing first."""
    corners = place_labels(boxes, list(range(len(boxes))), [size_wh] * len(boxes), (side, side))
    return [(x, y, x + size_wh[0], y + size_wh[1]) for x, y in corners]


@pytest.mark.parametrize(
    "boxes",
    [
        [(40, 60, 120, 120), (44, 62, 118, 118)],
        [(20, 40, 60, 90), (50, 40, 100, 90), (80, 40, 140, 90)],
        [(0, 0, 20, 20), (22, 0, 60, 40)],
        [(180, 180, 199, 199), (150, 180, 170, 199), (140, 150, 160, 170)],
        [(90, 90, 110, 110)] * 4,
    ],
    ids=["one object twice", "in a row", "upper left corner", "lower right corner", "four at one place"],
)
def test_labels_cover_neither_each_other_nor_leave_the_image(boxes: list[tuple[int, ...]]) -> None:
    labels = placed(boxes)
    assert all(shared(a, b) == 0 for i, a in enumerate(labels) for b in labels[:i])
    assert all(shared(label, (0, 0, 200, 200)) == 60 * 14 for label in labels)


def test_a_label_makes_way_for_a_small_object_but_may_lie_on_a_large_one() -> None:
    small = (50, 88, 62, 98)
    assert placed([(40, 100, 120, 150)])[0][3] == 100, "above, where nothing is"
    moved = placed([(40, 100, 120, 150), small])[0]
    assert shared(moved, small) == 0
    on_large = placed([(40, 100, 120, 150), (0, 0, 199, 199)])[0]
    assert on_large[:2] == placed([(40, 100, 120, 150)])[0][:2]


def test_the_box_drawn_last_has_the_first_choice_and_its_label_is_on_top() -> None:
    boxes = [(60, 80, 120, 140), (62, 82, 118, 138)]
    pictures = []
    for order in (boxes, boxes[::-1]):
        annotator = Annotator(np.zeros((200, 200, 3), np.uint8))
        for box in order:
            annotator.box(box, "dog 0.90", color(boxes.index(box)))
        pictures.append(annotator.image)
    for picture, last in zip(pictures, (1, 0)):
        above = picture[boxes[last][1] - 12 : boxes[last][1] - 4, 64:110].reshape(-1, 3)
        assert (above == color(last)).all(1).mean() > 0.3, "the background of its letters"


def test_a_label_stays_where_it_is_once_the_picture_was_read() -> None:
    annotator = Annotator(np.zeros((200, 200, 3), np.uint8))
    annotator.box((40, 60, 120, 120), "dog", (0, 0, 255))
    first = annotator.image.copy()
    assert (annotator.image == first).all()
    annotator.box((40, 60, 120, 120), "cat", (0, 255, 0))
    assert (annotator.image[48:58, 40:60] == first[48:58, 40:60]).all(), "the second label keeps clear of the first"


def test_placing_300_labels_is_deterministic_and_leaves_few_hidden() -> None:
    rng = np.random.default_rng(0)
    corner, size = rng.uniform(0, 1800, (300, 2)), rng.uniform(10, 150, (300, 2))
    boxes = np.concatenate((corner, corner + size), 1).astype(int).tolist()
    labels = placed(boxes, side=2000)
    assert labels == placed(boxes, side=2000)
    hidden = sum(any(shared(a, b) > 0 for b in labels[:i]) for i, a in enumerate(labels))
    above = [(x, y - 14, x + 60, y) for x, y, *_ in boxes]
    before = sum(any(shared(a, b) > 0 for b in above[:i]) for i, a in enumerate(above))
    assert hidden < before / 4


@pytest.mark.parametrize(("side", "width"), [(64, 1), (320, 2), (640, 2), (1280, 4), (4000, 12)])
def test_lines_and_letters_grow_with_the_image(side: int, width: int) -> None:
    annotator, larger = (Annotator(np.zeros((s, s, 3), np.uint8)) for s in (side, 2 * side))
    assert annotator.line_width == width
    assert 0.4 <= annotator.font_scale <= larger.font_scale <= 2
    assert Annotator(np.zeros((side, side, 3), np.uint8), line_width=7).line_width == 7


def test_letters_are_dark_on_light_colours() -> None:
    for background, ink in (((250, 250, 200), 0), ((90, 20, 10), 255)):
        annotator = Annotator(np.full((60, 120, 3), 127, np.uint8), line_width=3)
        annotator.text((0, 0), "WWW", background=background)
        assert (np.abs(annotator.image.astype(int) - ink) < 60).all(2).any()  # thin strokes are anti-aliased


def test_boxes_over_the_edge_and_empty_boxes_do_no_harm() -> None:
    annotator = Annotator(np.zeros((50, 50, 3), np.uint8))
    for box in ((-20, -20, 500, 500), (10, 10, 10, 10), (60, 60, 70, 70)):
        annotator.box(box, "long label that does not fit", (255, 0, 0))
    assert annotator.image.any()


class Lines(logging.Handler):
    """Keeps the messages logged inside `with`."""

    def __enter__(self) -> list[str]:
        self.lines: list[str] = []
        drawing.LOGGER.addHandler(self)
        return self.lines

    def __exit__(self, *exc: object) -> None:
        drawing.LOGGER.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def test_chinese_names_are_drawn_or_become_numbers_and_that_is_said() -> None:
    with Lines() as log:
        shown = drawable_names({0: "person", 1: "红绿灯"})
    assert shown[0] == "person"
    if shown[1] == "红绿灯":
        pictures = []
        for text in (shown[1], "?", "???"):
            annotator = Annotator(np.zeros((60, 160, 3), np.uint8), line_width=3)
            annotator.text((0, 0), text, background=(0, 0, 0))
            pictures.append(annotator.image.tobytes())
        assert len(set(pictures)) == 3 and not log
    else:
        assert shown[1] == "1" and "红绿灯" in log[0]


def test_names_no_font_holds_become_numbers_once_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "_opencv_draws", str.isascii)
    monkeypatch.setattr(drawing, "system_font", lambda text: None)
    names = {0: "cat", 1: "\U0001f9ff\u0e01", 2: "dog"}
    with Lines() as log:
        assert drawable_names(names) == {0: "cat", 1: "1", 2: "dog"} == drawable_names(names)
    assert len(log) == 1 and log[0].startswith("no font here")


def test_pillow_draws_where_opencv_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "_opencv_draws", str.isascii)  # as OpenCV 4 is
    if drawing.system_font("Ёж") is None:
        pytest.skip("no installed font holds Cyrillic letters")
    annotator = Annotator(np.zeros((60, 160, 3), np.uint8), line_width=3)
    annotator.box((10, 30, 150, 55), "Ёж 0.50", (0, 0, 200))
    white = (annotator.image > 200).all(2)
    assert 30 < white.sum() < 2000


@pytest.mark.parametrize("count", [1, 3, 16, 40])
def test_a_batch_becomes_one_picture_of_at_most_1920_pixels(tmp_path: Path, count: int) -> None:
    images = torch.full((count, 3, 320, 640), 90, dtype=torch.uint8)
    boxes = [torch.tensor([[1.0, 100, 100, 300, 200]])] * count
    plot_batch(
        images, boxes, [f"folder/{'n' * 200}{k}.jpg" for k in range(count)], {0: "a", 1: "b"}, tmp_path / "b.png"
    )
    picture = cv2.imread(str(tmp_path / "b.png"))
    assert max(picture.shape[:2]) <= 1920
    assert picture.shape[1] >= min(640 * int(np.ceil(np.sqrt(min(count, 16)))), 1900)


def test_a_batch_shows_red_as_red_and_only_confident_boxes(tmp_path: Path) -> None:
    images = np.zeros((1, 3, 200, 200), np.uint8)
    images[0, 0] = 180  # RGB
    boxes = [np.array([[0, 20, 20, 90, 90, 0.25], [1, 110, 110, 180, 180, 0.26]])]
    plot_batch(images, boxes, ["a.jpg"], {0: "zero", 1: "one"}, tmp_path / "b.png")
    picture = cv2.imread(str(tmp_path / "b.png"))[22:]  # below the caption
    assert picture[100, 100].tolist() == [0, 0, 180]
    assert (picture[:95, :95] == (0, 0, 180)).all(), "a box of confidence 0.25 is left out"
    edge = picture[150, 108:114].astype(int)
    assert np.abs(edge - color(1)).sum(1).min() < 60, "a thin line, blended with its neighbours"


def test_a_batch_without_boxes_is_still_drawn(tmp_path: Path) -> None:
    plot_batch(
        torch.zeros(2, 3, 64, 64, dtype=torch.uint8),
        [torch.zeros(0, 6), np.zeros((0, 5))],
        "ab",
        {},
        tmp_path / "b.jpg",
    )
    assert cv2.imread(str(tmp_path / "b.jpg")).shape == (64 + 22, 128, 3)


@pytest.mark.parametrize(
    ("box", "shape"),
    [((40, 50, 140, 90), (50, 112, 3)), ((0, 0, 20, 20), (25, 25, 3)), ((90, 10, 90, 10), (10, 10, 3))],
    ids=["102 % and 10 pixels", "cut at the corner", "an empty box"],
)
def test_a_crop_is_a_little_larger_than_its_box(tmp_path: Path, box: tuple[int, ...], shape: tuple[int, ...]) -> None:
    image = np.arange(200 * 300 * 3, dtype=np.uint32).reshape(200, 300, 3).astype(np.uint8)
    crop = save_crop(box, image, tmp_path / "crops/dog/a.jpg")
    assert crop.shape == pytest.approx(shape, abs=1)
    assert cv2.imread(str(tmp_path / "crops/dog/a.jpg")).shape == crop.shape


def test_images_are_written_whatever_letters_the_path_has(tmp_path: Path) -> None:
    write_image(tmp_path / "图片 ü.png", np.zeros((4, 4, 3), np.uint8))
    assert (tmp_path / "图片 ü.png").stat().st_size > 50
    with pytest.raises(ValueError, match=r"a\.xyz"):
        write_image(tmp_path / "a.xyz", np.zeros((4, 4, 3), np.uint8))


def test_feature_maps_write_all_maps_and_draw_32(tmp_path: Path) -> None:
    maps = torch.randn(2, 40, 20, 30, dtype=torch.float16)
    file = feature_maps(4, "models.common.C3", maps, tmp_path)
    assert file == tmp_path / "stage4_C3_features.png"
    assert np.load(tmp_path / "stage4_C3_features.npy").shape == (40, 20, 30)
    assert cv2.imread(str(file)).shape == (4 * (128 + 4) + 4, 8 * (192 + 4) + 4, 3)


@pytest.mark.parametrize(
    ("type_name", "value"),
    [("Detect", torch.ones(1, 3, 4, 4)), ("SE", torch.ones(1, 8, 1, 1)), ("Conv", [torch.ones(1, 3, 4, 4)])],
)
def test_what_is_no_map_is_not_drawn(tmp_path: Path, type_name: str, value: object) -> None:
    assert feature_maps(0, type_name, value, tmp_path) is None and not list(tmp_path.iterdir())
