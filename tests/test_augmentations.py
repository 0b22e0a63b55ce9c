"""Letterbox against its arithmetic, and the transforms' properties: boxes stay inside, none appears."""

from __future__ import annotations

import dataclasses
import math

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.augmentations import (
    HSV,
    IMAGE_TRANSFORMS,
    TRANSFORMS,
    CopyPaste,
    Example,
    Flip,
    MixUp,
    Mosaic,
    RandomPerspective,
    Warp,
    letterboxed,
    multi_scale_size,
    resample,
)
from utils.boxes import undo_letterbox
from utils.config import UserError, check_hyp, read_hyp

sides = st.integers(20, 90)
seeds = st.integers(0, 2**32 - 1)
QUICK = settings(max_examples=40, deadline=None)
STRONG = RandomPerspective(degrees=45, translate=0.4, scale=0.8, shear=20, perspective=0.001)


def make_example(seed: int, height: int = 60, width: int = 80, *, count: int = 5, outlined: bool = False) -> Example:
    """A noisy image with `count` boxes; outlines are octagons touching their boxes."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    low = rng.uniform(0, 0.6, (count, 2)) * (width, height)
    high = low + rng.uniform(0.1, 0.4, (count, 2)) * (width, height)
    boxes = np.concatenate((rng.integers(0, 3, (count, 1)), low, high), 1).astype(np.float32)
    angles = np.arange(8) * math.pi / 4
    circle = np.stack((np.cos(angles), np.sin(angles)), 1)
    outlines = [(a + b) / 2 + circle * (b - a) / 2 for a, b in zip(low, high)]
    return Example(image, boxes, tuple(o.astype(np.float32) for o in outlines) if outlined else ())


def assert_inside(example: Example) -> None:
    height, width = example.shape_hw
    boxes = example.boxes[:, 1:]
    assert (boxes >= -1e-3).all() and (boxes <= np.array((width, height, width, height)) + 1e-3).all()
    assert (boxes[:, 2:] >= boxes[:, :2]).all()


# --- letterbox --------------------------------------------------------------------------------------------------------


def test_letterbox_scales_to_fit_and_splits_the_padding() -> None:
    image, fitted = letterboxed(np.zeros((480, 640, 3), np.uint8), (672, 672), scaleup=False)
    assert image.shape == (672, 672, 3)
    assert (fitted.scale, fitted.pad_xy, fitted.original_hw, fitted.size_hw) == (1.0, (16, 96), (480, 640), (672, 672))
    assert (image[:96] == 114).all() and (image[96:-96, 16:-16] == 0).all() and (image[:, :16] == 114).all()


def test_letterbox_puts_an_odd_pixel_right_and_below_and_reports_exact_halves() -> None:
    image, fitted = letterboxed(np.zeros((427, 639, 3), np.uint8), (640, 640), scaleup=False)
    assert fitted.pad_xy == (0.5, 106.5)
    rows, columns = np.nonzero((image == 0).all(-1))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (106, 106 + 426, 0, 638)


def test_letterbox_rounds_half_pixels_to_even() -> None:
    # 25 * 0.5 = 12.5 -> 12 and 27 * 0.5 = 13.5 -> 14
    assert letterboxed(np.zeros((25, 200, 3), np.uint8), (100, 100))[1].pad_xy == (0, 44)
    assert letterboxed(np.zeros((27, 200, 3), np.uint8), (100, 100))[1].pad_xy == (0, 43)


def test_letterbox_auto_pads_to_the_next_stride_only() -> None:
    image, fitted = letterboxed(np.zeros((480, 640, 3), np.uint8), 320, auto=True, stride=32)
    assert image.shape == (256, 320, 3) and fitted.pad_xy == (0, 8) and fitted.scale == 0.5


def test_letterbox_without_scaleup_leaves_small_images_their_size() -> None:
    small = np.full((10, 20, 3), 7, np.uint8)
    image, fitted = letterboxed(small, (40, 40), scaleup=False)
    assert fitted.scale == 1.0 and (image[15:25, 10:30] == 7).all()
    assert letterboxed(small, (40, 40))[1].scale == 2.0


@QUICK
@given(sides, sides, sides, sides, st.booleans(), st.booleans(), seeds)
def test_letterbox_then_undo_is_the_identity_within_a_pixel(
    height: int, width: int, goal_h: int, goal_w: int, auto: bool, scaleup: bool, seed: int
) -> None:
    example = make_example(seed, height, width)
    image, fitted = letterboxed(example.image, (goal_h, goal_w), auto=auto, scaleup=scaleup)
    assert image.shape[:2] == fitted.size_hw and image.dtype == np.uint8
    assert auto or fitted.size_hw == (goal_h, goal_w)
    there = example.boxes[:, 1:] * fitted.scale + np.tile(fitted.pad_xy, 2)
    back = undo_letterbox(there, fitted)
    assert np.abs(back - example.boxes[:, 1:]).max() < 1e-2


@QUICK
@given(st.integers(1, 400), st.integers(1, 400))
def test_letterbox_of_any_shape_has_the_asked_size(height: int, width: int) -> None:
    assert letterboxed(np.zeros((height, width, 3), np.uint8), (64, 96))[0].shape == (64, 96, 3)


def test_letterbox_finds_a_marked_pixel_where_its_arithmetic_says() -> None:
    image = np.zeros((100, 60, 3), np.uint8)
    image[40:60, 20:40] = 255
    canvas, fitted = letterboxed(image, (250, 210))
    ys, xs = np.nonzero(canvas[..., 0] == 255)
    expected = np.array([20.0, 40.0, 40.0, 60.0]) * fitted.scale + np.tile(fitted.pad_xy, 2)
    assert np.abs(np.array((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)) - expected).max() <= 1.5


@QUICK
@given(st.integers(32, 1280), st.sampled_from((32, 64)), seeds)
def test_multi_scale_sizes_are_multiples_of_the_stride_around_the_size(imgsz: int, stride: int, seed: int) -> None:
    size = multi_scale_size(imgsz, stride, np.random.default_rng(seed))
    assert size % stride == 0 and size >= stride
    assert imgsz * 0.5 - stride <= size <= max(imgsz * 1.5 + stride, stride)


# --- hyper-parameters -------------------------------------------------------------------------------------------------


def test_every_transform_field_is_a_key_with_a_range_that_holds_its_default() -> None:
    fields = [f for transform in TRANSFORMS for f in dataclasses.fields(transform)]
    names = [f.name for f in fields]
    assert len(set(names)) == len(names)
    assert {"hsv_h", "degrees", "perspective", "fliplr", "mosaic", "mixup", "copy_paste"} <= set(names)
    for f in fields:
        assert f.metadata["min"] <= f.default <= f.metadata["max"]
    assert set(IMAGE_TRANSFORMS) <= set(TRANSFORMS)


def test_a_probability_above_one_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"'fliplr' is 1\.5, expected 0 to 1"):
        check_hyp(read_hyp({"fliplr": 1.5}), TRANSFORMS)


# --- transforms of one image ------------------------------------------------------------------------------------------


@QUICK
@given(
    st.sampled_from((HSV(0.5, 0.9, 0.9), Flip(0.5, 0.5), STRONG, RandomPerspective(scale=0.9))), seeds, st.booleans()
)
def test_single_image_transforms_keep_boxes_inside_and_add_none(
    transform: HSV | Flip | RandomPerspective, seed: int, outlined: bool
) -> None:
    example = make_example(seed, outlined=outlined)
    pixels, boxes = example.image.copy(), example.boxes.copy()
    result = transform(example, np.random.default_rng(seed))
    assert result.image.shape == example.image.shape and result.image.dtype == np.uint8
    assert len(result.boxes) <= len(example.boxes) and result.boxes.dtype == np.float32
    assert set(result.boxes[:, 0]) <= set(example.boxes[:, 0])
    assert_inside(result)
    assert np.array_equal(example.image, pixels) and np.array_equal(example.boxes, boxes), "the input was written to"


@QUICK
@given(st.booleans(), st.booleans(), seeds)
def test_flip_twice_is_nothing(up: bool, left: bool, seed: int) -> None:
    example = make_example(seed, outlined=True)
    once = Flip.apply(example, (up, left))
    twice = Flip.apply(once, (up, left))
    assert np.array_equal(twice.image, example.image)
    assert np.allclose(twice.boxes, example.boxes, atol=1e-4)
    assert all(np.allclose(a, b, atol=1e-4) for a, b in zip(twice.segments, example.segments))


def test_flip_moves_pixels_boxes_and_outlines_alike() -> None:
    image = np.zeros((20, 30, 3), np.uint8)
    image[2:6, 3:10] = 255
    outline = np.array(((3, 2), (10, 2), (10, 6), (3, 6)), np.float32)
    example = Example(image, np.array([[4, 3, 2, 10, 6]], np.float32), (outline,))
    for up_left, expected in (((False, True), (20, 2, 27, 6)), ((True, False), (3, 14, 10, 18))):
        result = Flip.apply(example, up_left)
        ys, xs = np.nonzero(result.image[..., 0])
        assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == expected
        assert tuple(result.boxes[0]) == (4, *expected)
        assert (*result.segments[0].min(0), *result.segments[0].max(0)) == expected


def test_hsv_of_factors_one_changes_almost_nothing_and_value_zero_is_black() -> None:
    example = make_example(3)
    through_hsv = cv2.cvtColor(cv2.cvtColor(example.image, cv2.COLOR_BGR2HSV), cv2.COLOR_HSV2BGR)
    assert np.array_equal(HSV.apply(example, np.ones(3)).image, through_hsv)
    assert (HSV.apply(example, np.array((1.0, 1.0, 0.0))).image == 0).all()
    assert HSV(0, 0, 0).sample(np.random.default_rng(0)) is None


@given(st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_hsv_is_what_one_table_of_three_channels_gives(seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (int(rng.integers(1, 40)), int(rng.integers(1, 40)), 3), dtype=np.uint8)
    factors = HSV(0.5, 0.9, 0.9).sample(rng)
    assert factors is not None
    levels = np.arange(256)[:, None] * factors
    levels[:, 0] %= 180
    table = np.clip(levels, 0, 255).astype(np.uint8).reshape(1, 256, 3)
    expected = cv2.cvtColor(cv2.LUT(cv2.cvtColor(image, cv2.COLOR_BGR2HSV), table), cv2.COLOR_HSV2BGR)
    assert np.array_equal(HSV.apply(Example(image, np.zeros((0, 5), np.float32)), factors).image, expected)


def test_hsv_hue_goes_round_and_saturation_stops_at_its_end() -> None:
    pixel = cv2.cvtColor(np.array([[[170, 200, 100]]], np.uint8), cv2.COLOR_HSV2BGR)
    result = HSV.apply(Example(pixel, np.zeros((0, 5), np.float32)), np.array((1.2, 2.0, 1.0))).image
    expected = cv2.cvtColor(np.array([[[204 - 180, 255, 100]]], np.uint8), cv2.COLOR_HSV2BGR)
    assert np.array_equal(result, expected)


def test_perspective_with_identity_parameters_changes_nothing() -> None:
    example = make_example(5)
    still = RandomPerspective(degrees=0, translate=0, scale=0, shear=0, perspective=0)
    assert still(example, np.random.default_rng(0)) is example
    result = RandomPerspective.apply(example, Warp(np.eye(3), 1.0, example.shape_hw))
    assert np.array_equal(result.image, example.image)
    assert np.allclose(result.boxes, example.boxes, atol=1e-4)


@pytest.mark.parametrize("outlined", (False, True))
def test_perspective_moves_a_box_with_its_pixels(outlined: bool) -> None:
    image = np.zeros((100, 120, 3), np.uint8)
    image[30:60, 40:80] = 255
    outline = np.array(((40, 30), (80, 30), (80, 60), (40, 60)), np.float32)
    example = Example(image, np.array([[1, 40, 30, 80, 60]], np.float32), (outline,) if outlined else ())
    for seed in range(10):
        warp = STRONG.sample(np.random.default_rng(seed), example.shape_hw, (110, 90))
        assert warp is not None
        result = RandomPerspective.apply(example, warp)
        ys, xs = np.nonzero(result.image[..., 0] > 200)
        if len(result.boxes) and len(xs):
            seen = np.array((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
            assert np.abs(result.boxes[0, 1:] - seen).max() < 5


def test_perspective_samples_stay_in_their_ranges() -> None:
    transform = RandomPerspective(degrees=10, translate=0.2, scale=0.3, shear=0, perspective=0)
    rng = np.random.default_rng(1)
    gains, angles, shifts = [], [], []
    for _ in range(200):
        warp = transform.sample(rng, (80, 80), (40, 60))
        assert warp is not None and warp.size_hw == (40, 60)
        gains.append(math.sqrt(np.linalg.det(warp.matrix[:2, :2])))
        assert gains[-1] == pytest.approx(warp.gain)
        angles.append(math.degrees(math.atan2(warp.matrix[0, 1], warp.matrix[0, 0])))
        shifts.append(warp.matrix @ (40, 40, 1))  # where the centre goes
    assert 0.7 <= min(gains) < 0.75 and 1.25 < max(gains) <= 1.3
    assert -10 <= min(angles) < -9 and 9 < max(angles) <= 10
    assert 0.3 <= np.min(shifts, 0)[0] / 60 < 0.33 and 0.67 < np.max(shifts, 0)[1] / 40 <= 0.7


def test_perspective_drops_boxes_of_which_too_little_is_left() -> None:
    boxes = np.array([[0, 0, 0, 20, 20], [1, 0, 0, 20, 200], [2, 50, 50, 51, 90], [3, 60, 60, 80, 80]], np.float32)
    example = Example(np.zeros((100, 100, 3), np.uint8), boxes)
    matrix = np.eye(3)
    matrix[0, 2] = -19  # leaves a twentieth of the first two boxes; the third is a line
    result = RandomPerspective.apply(example, Warp(matrix, 1.0, (100, 100)))
    assert result.boxes[:, 0].tolist() == [3]


def test_outlines_give_tighter_boxes_than_corners_when_turned() -> None:
    angles = np.linspace(0, 2 * math.pi, 60, endpoint=False)
    circle = (50 + 20 * np.stack((np.cos(angles), np.sin(angles)), 1)).astype(np.float32)
    boxes = np.array([[0, 30, 30, 70, 70]], np.float32)
    turn = np.eye(3)
    turn[:2] = cv2.getRotationMatrix2D((50, 50), 45, 1.0)
    image = np.zeros((100, 100, 3), np.uint8)
    corners = RandomPerspective.apply(Example(image, boxes), Warp(turn, 1.0, (100, 100))).boxes[0, 1:]
    outline = RandomPerspective.apply(Example(image, boxes, (circle,)), Warp(turn, 1.0, (100, 100))).boxes[0, 1:]
    assert np.allclose(corners, (50 - 28.28, 50 - 28.28, 50 + 28.28, 50 + 28.28), atol=0.02)
    assert np.allclose(outline, (30, 30, 70, 70), atol=0.2)


def test_resampling_agrees_with_interpolation_of_each_polygon_alone() -> None:
    rng = np.random.default_rng(0)
    polygons = [rng.uniform(0, 100, (k, 2)).astype(np.float32) for k in (3, 4, 17, 5)]
    together = resample(polygons, 50)
    for polygon, points in zip(polygons, together):
        closed = np.concatenate((polygon, polygon[:1]))
        along = np.linspace(0, len(polygon), 50)
        alone = np.stack([np.interp(along, np.arange(len(closed)), closed[:, axis]) for axis in (0, 1)], 1)
        assert np.allclose(points, alone, atol=1e-4)


# --- several images ---------------------------------------------------------------------------------------------------


@QUICK
@given(seeds)
def test_mosaic_keeps_every_box_inside_the_canvas(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = 40
    examples = [make_example(seed + i, int(rng.integers(20, 41)), 40, outlined=True) for i in range(4)]
    layout = Mosaic(1.0).sample(rng, size, 7, 20)
    assert 7 in layout.indices and all(0 <= i < 20 for i in layout.indices)
    assert all(size / 2 <= c < 3 * size / 2 for c in layout.centre_xy)
    result = Mosaic.apply(examples, layout.centre_xy, size)
    assert result.image.shape == (80, 80, 3) and len(result.boxes) == 20 == len(result.segments)
    assert_inside(result)
    assert_inside(RandomPerspective(translate=0.1, scale=0.5)(result, rng, (size, size)))


def test_mosaic_tiles_meet_at_the_centre_with_their_boxes() -> None:
    examples = []
    for i in range(4):
        image = np.full((20, 30, 3), 10 * i, np.uint8)
        image[5:10, 5:15] = 200 + i
        examples.append(Example(image, np.array([[i, 5, 5, 15, 10]], np.float32)))
    result = Mosaic.apply(examples, (35, 25), 30)
    centre = result.image[24:26, 34:36, 0]
    assert centre.tolist() == [[0, 10], [20, 30]]
    for i in range(4):
        ys, xs = np.nonzero(result.image[..., 0] == 200 + i)
        assert tuple(result.boxes[i]) == (i, xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    assert (result.image[:5] == 114).all() and (result.image[45:] == 114).all()


def test_mosaic_without_an_outline_for_every_box_uses_none() -> None:
    examples = [make_example(i, 30, 30, outlined=i > 0) for i in range(4)]
    assert Mosaic.apply(examples, (30, 30), 30).segments == ()


def test_mixup_blends_pixels_and_keeps_both_images_boxes() -> None:
    first, second = make_example(1), make_example(2, count=3)
    result = MixUp.apply(first, second, 0.25)
    expected = 0.25 * first.image + 0.75 * second.image.astype(float)
    assert np.abs(result.image - expected).max() <= 0.51
    assert np.array_equal(result.boxes, np.concatenate((first.boxes, second.boxes)))
    shares = [MixUp(1.0).sample(np.random.default_rng(i)) for i in range(100)]
    assert all(share is not None and 0.2 < share < 0.8 for share in shares)
    assert MixUp(0.0).sample(np.random.default_rng(0)) is None


def test_copy_paste_pastes_the_mirrored_object_and_its_label() -> None:
    image = np.zeros((40, 100, 3), np.uint8)
    image[10:21, 10:31] = 255
    outline = np.array(((10, 10), (30, 10), (30, 20), (10, 20)), np.float32)
    example = Example(image, np.array([[2, 10, 10, 30, 20]], np.float32), (outline,))
    result = CopyPaste(1.0)(example, np.random.default_rng(0))
    assert result.boxes.tolist() == [[2, 10, 10, 30, 20], [2, 70, 10, 90, 20]] and len(result.segments) == 2
    assert (result.image[10:20, 70:90] == 255).all() and (result.image[10:20, 10:30] == 255).all()
    assert (result.image[:, 35:65] == 0).all()


def test_copy_paste_leaves_out_what_would_hide_a_box() -> None:
    outline = np.array(((40, 10), (60, 10), (60, 20), (40, 20)), np.float32)  # mirrored onto itself
    example = Example(np.zeros((40, 100, 3), np.uint8), np.array([[0, 40, 10, 60, 20]], np.float32), (outline,))
    assert len(CopyPaste(1.0)(example, np.random.default_rng(0)).boxes) == 1


@QUICK
@given(seeds, st.floats(0, 1))
def test_copy_paste_keeps_boxes_inside_and_at_most_doubles_them(seed: int, part: float) -> None:
    example = make_example(seed, outlined=True)
    result = CopyPaste(part)(example, np.random.default_rng(seed))
    assert len(example.boxes) <= len(result.boxes) <= 2 * len(example.boxes)
    assert len(result.segments) == len(result.boxes)
    assert_inside(result)


def test_copy_paste_without_outlines_does_nothing() -> None:
    example = make_example(0)
    assert CopyPaste(1.0)(example, np.random.default_rng(0)) is example
