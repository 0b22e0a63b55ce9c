"""Boxes: conversions, letterbox space and the IoU family, against independent arithmetic and torchvision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou as torchvision_box_iou
from torchvision.ops import complete_box_iou, distance_box_iou, generalized_box_iou

from utils.boxes import (
    Letterbox,
    box_iou,
    clip_xyxy,
    cxcywh_to_xyxy,
    cxcywhn_to_xyxy,
    paired_iou,
    undo_letterbox,
    xyxy_to_cxcywh,
    xyxy_to_cxcywhn,
)

coordinate = st.floats(-1000, 1000, width=32)
side = st.floats(1, 1000, width=32)
cxcywh = st.tuples(coordinate, coordinate, side, side)
boxes = st.lists(cxcywh, min_size=1, max_size=8).map(lambda rows: np.array(rows, np.float64))
quick = settings(max_examples=40, deadline=None)  # no deadline: a busy machine is no failure
pairs = st.tuples(cxcywh, cxcywh).map(lambda pair: torch.tensor(pair, dtype=torch.float64).unbind())


def plain_ciou(a: list[float], b: list[float]) -> dict[str, float]:
    """The whole family for two cxcywh boxes in plain Python, from the papers' formulas and without any epsilon."""
    ax1, ay1, ax2, ay2 = a[0] - a[2] / 2, a[1] - a[3] / 2, a[0] + a[2] / 2, a[1] + a[3] / 2
    bx1, by1, bx2, by2 = b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2
    inter = max(0.0, min(ax2, bx2) - max(ax1, bx1)) * max(0.0, min(ay2, by2) - max(ay1, by1))
    union = a[2] * a[3] + b[2] * b[3] - inter
    iou = inter / union
    hull_w, hull_h = max(ax2, bx2) - min(ax1, bx1), max(ay2, by2) - min(ay1, by1)
    diou = iou - ((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) / (hull_w**2 + hull_h**2)
    v = 4 / math.pi**2 * (math.atan(b[2] / b[3]) - math.atan(a[2] / a[3])) ** 2
    alpha = v / (1 - iou + v) if v else 0.0
    giou = iou - (hull_w * hull_h - union) / (hull_w * hull_h)
    return {"iou": iou, "giou": giou, "diou": diou, "ciou": diou - alpha * v}


@quick
@given(boxes)
def test_centre_and_corner_formats_round_trip(rows: np.ndarray) -> None:
    np.testing.assert_allclose(xyxy_to_cxcywh(cxcywh_to_xyxy(rows)), rows, atol=1e-9)


@quick
@given(boxes, st.floats(16, 2000), st.floats(16, 2000))
def test_fractions_and_pixels_round_trip(rows: np.ndarray, width: float, height: float) -> None:
    fractions = rows / 1000
    pixels = cxcywhn_to_xyxy(fractions, width, height)
    np.testing.assert_allclose(xyxy_to_cxcywhn(pixels, width, height), fractions, atol=1e-9)


@quick
@given(boxes)
def test_arrays_and_tensors_convert_alike(rows: np.ndarray) -> None:
    for convert in (cxcywh_to_xyxy, xyxy_to_cxcywh, lambda b: cxcywhn_to_xyxy(b, 640, 480, 3.5, 2)):
        np.testing.assert_array_equal(convert(torch.from_numpy(rows)).numpy(), convert(rows))


def test_conversions_keep_dtype_further_columns_and_their_argument() -> None:
    rows = np.array([[10, 20, 4, 6, 0.5, 7]], np.float32)
    before = rows.copy()
    for convert in (
        cxcywh_to_xyxy,
        xyxy_to_cxcywh,
        lambda b: cxcywhn_to_xyxy(b, np.float64(640), np.float64(480)),
        lambda b: xyxy_to_cxcywhn(b, np.float64(640), 480, clip=True),
        lambda b: clip_xyxy(b, (10, 10)),
        lambda b: undo_letterbox(b, Letterbox(0.5, (1.5, 0.0), (480, 640), (320, 320))),
    ):
        for given_rows in (rows, torch.from_numpy(rows)):
            result = convert(given_rows)
            assert result.dtype == given_rows.dtype
            np.testing.assert_array_equal(np.asarray(result)[:, 4:], before[:, 4:])
    np.testing.assert_array_equal(rows, before)


def test_whole_numbers_are_not_cut_off() -> None:
    np.testing.assert_array_equal(cxcywh_to_xyxy(np.array([[5, 5, 3, 3]])), [[3.5, 3.5, 6.5, 6.5]])


def test_no_boxes_convert_to_no_boxes() -> None:
    letterbox = Letterbox(0.5, (0.0, 0.0), (10, 10), (5, 5))
    assert undo_letterbox(torch.zeros(0, 6), letterbox).shape == (0, 6)
    assert cxcywh_to_xyxy(np.zeros((0, 4), np.float32)).shape == (0, 4)
    assert box_iou(torch.zeros(0, 4), torch.zeros(3, 4)).shape == (0, 3)


@quick
@given(boxes)
def test_clipped_boxes_lie_inside_and_inner_ones_stay(rows: np.ndarray) -> None:
    corners = cxcywh_to_xyxy(rows)
    clipped = clip_xyxy(corners, (300, 400))
    assert (clipped >= 0).all() and (clipped[:, [0, 2]] <= 400).all() and (clipped[:, [1, 3]] <= 300).all()
    inside = (corners >= 0).all(1) & (corners[:, 2] <= 400) & (corners[:, 3] <= 300)
    np.testing.assert_array_equal(clipped[inside], corners[inside])


def test_clipping_before_normalising_keeps_the_margin() -> None:
    row = xyxy_to_cxcywhn(np.array([[-10.0, -10.0, 700.0, 500.0]]), 640, 480, clip=True, eps=0.5)
    np.testing.assert_allclose(cxcywh_to_xyxy(row) * [640, 480, 640, 480], [[0, 0, 639.5, 479.5]])


@quick
@given(
    st.integers(16, 2000),
    st.integers(16, 2000),
    st.integers(64, 1280),
    st.lists(st.tuples(*[st.floats(0, 1)] * 4), min_size=1, max_size=5),
)
def test_letterbox_then_undo_is_the_identity_within_a_pixel(
    height: int, width: int, size: int, corners: list[tuple[float, ...]]
) -> None:
    scale = min(size / height, size / width)
    pad = ((size - round(width * scale)) / 2, (size - round(height * scale)) / 2)
    letterbox = Letterbox(scale, pad, (height, width), (size, size))
    xyxy = torch.tensor(corners) * torch.tensor([width, height, width, height])
    there = xyxy * scale + torch.tensor(pad * 2)
    assert there.min() >= 0 and there.max() <= size + 1
    torch.testing.assert_close(undo_letterbox(there, letterbox), xyxy, atol=1, rtol=0)


def test_undoing_a_letterbox_clips_to_the_original_image() -> None:
    letterbox = Letterbox(0.5, (0.0, 80.0), (480, 640), (400, 320))
    result = undo_letterbox(torch.tensor([[-5.0, 0.0, 400.0, 399.0, 0.9, 3.0]]), letterbox)
    torch.testing.assert_close(result, torch.tensor([[0.0, 0.0, 640.0, 480.0, 0.9, 3.0]]))


@quick
@given(pairs)
def test_iou_family_equals_plain_arithmetic(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    expected = plain_ciou(pair[0].tolist(), pair[1].tolist())
    for kind, value in expected.items():
        assert paired_iou(*pair, kind).item() == pytest.approx(value, abs=2e-6)
        corners = paired_iou(cxcywh_to_xyxy(pair[0]), cxcywh_to_xyxy(pair[1]), kind, "xyxy")
        assert corners.item() == pytest.approx(value, abs=2e-6)


def test_iou_family_equals_torchvision() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (cxcywh_to_xyxy(torch.rand(50, 4, generator=generator, dtype=torch.float64) * 100 + 1) for _ in range(2))
    torch.testing.assert_close(box_iou(a, b), torchvision_box_iou(a, b), atol=1e-6, rtol=0)
    theirs = {"giou": generalized_box_iou, "diou": distance_box_iou, "ciou": complete_box_iou}
    for kind, function in theirs.items():
        ours = paired_iou(a, b, kind, "xyxy")  # type: ignore[arg-type]
        torch.testing.assert_close(ours, function(a, b).diagonal(), atol=1e-6, rtol=0)


@quick
@given(pairs, st.floats(-500, 500), st.floats(0.5, 10))
def test_iou_is_symmetric_in_0_to_1_and_unmoved_by_shift_and_scale(
    pair: tuple[torch.Tensor, torch.Tensor], shift: float, scale: float
) -> None:
    a, b = pair
    iou = paired_iou(a, b, "iou").item()
    assert 0 <= iou <= 1
    assert paired_iou(b, a, "iou").item() == pytest.approx(iou, abs=1e-12)
    move = torch.tensor([shift, shift, 0, 0], dtype=torch.float64)
    moved = paired_iou((a + move) * scale, (b + move) * scale, "iou")
    assert moved.item() == pytest.approx(iou, abs=1e-5)  # eps is an area, so it does not scale


@quick
@given(pairs)
def test_ciou_is_at_most_diou_is_at_most_iou(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    iou, diou, ciou = (paired_iou(*pair, kind).item() for kind in ("iou", "diou", "ciou"))
    assert -2 <= ciou <= diou <= iou


@quick
@given(boxes)
def test_a_box_overlaps_itself_completely(rows: np.ndarray) -> None:
    tensor = torch.from_numpy(rows)
    torch.testing.assert_close(paired_iou(tensor, tensor), torch.ones_like(tensor[:, 0]), atol=1e-6, rtol=0)
    corners = cxcywh_to_xyxy(tensor)
    torch.testing.assert_close(box_iou(corners, corners).diagonal(), torch.ones_like(tensor[:, 0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["iou", "giou", "diou", "ciou"])
def test_gradients_stay_finite_for_collapsed_and_identical_boxes(kind: str) -> None:
    a = torch.tensor([[0.0, 0, 0, 0], [0, 0, 1, 0], [5, 5, 2, 2], [5, 5, 1e-20, 1e-20]], requires_grad=True)
    b = torch.tensor([[0.0, 0, 0, 0], [5, 5, 2, 2], [5, 5, 2, 2], [900, 5, 2, 2]])
    value = paired_iou(a, b, kind)  # type: ignore[arg-type]
    value.sum().backward()
    assert value.isfinite().all() and a.grad is not None and a.grad.isfinite().all()


def test_ciou_gradient_holds_the_aspect_weight_constant() -> None:
    """alpha counts as a constant (after eq. 11 of the paper): the gradient is that of DIoU - alpha v."""
    a = torch.tensor([3.0, 4.0, 5.0, 2.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([3.5, 4.2, 2.0, 3.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(paired_iou(a, b, "ciou", eps=0.0), a)
    step, base, numeric = 1e-6, plain_ciou(a.tolist(), b.tolist()), []

    def aspect(box: list[float]) -> float:
        return 4 / math.pi**2 * (math.atan(b[2].item() / b[3].item()) - math.atan(box[2] / box[3])) ** 2

    alpha = aspect(a.tolist()) / (1 - base["iou"] + aspect(a.tolist()))
    for axis in range(4):
        ends = []
        for sign in (1, -1):
            box = a.tolist()
            box[axis] += sign * step
            ends.append(plain_ciou(box, b.tolist())["diou"] - alpha * aspect(box))
        numeric.append((ends[0] - ends[1]) / (2 * step))
    np.testing.assert_allclose(gradient.numpy(), numeric, atol=1e-7)
