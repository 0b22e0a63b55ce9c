"""AutoAnchor: judging anchors, finding better ones, and writing them into a head."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from utils.autoanchor import (
    AnchorHyp,
    anchor_fit,
    judge_anchors,
    kmeans_anchors,
    label_sizes,
    write_anchors,
)
from utils.config import UserError, check_hyp, read_hyp

COCO = [[[10, 13], [16, 30], [33, 23]], [[30, 61], [62, 45], [59, 119]], [[116, 90], [156, 198], [373, 326]]]


class Head(nn.Module):
    def __init__(self, anchors_px: object = COCO, strides: tuple[float, ...] = (8.0, 16.0, 32.0)) -> None:
        super().__init__()
        self.register_buffer("stride", torch.tensor(strides))
        self.register_buffer("anchors", torch.tensor(anchors_px, dtype=torch.float32) / self.stride.view(-1, 1, 1))


def dataset(
    seed: int, width_px: float, height_px: float, images: int = 60
) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
    """Labels of 640 x 480 images, log-normal around the given size in pixels."""
    rng = np.random.default_rng(seed)
    labels = []
    for _ in range(images):
        count = rng.integers(0, 6)
        wh = np.exp(rng.normal(np.log([width_px / 640, height_px / 480]), 0.35, (count, 2)))
        labels.append(
            np.concatenate((np.zeros((count, 1)), np.full((count, 2), 0.5), wh.clip(0, 1)), 1).astype(np.float32)
        )
    return labels, [(480, 640)] * images


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def slow_fit(wh: np.ndarray, anchors: np.ndarray, thr: float) -> tuple[float, float]:
    best, above = [], []
    for w, h in wh:
        inverse = [min(w / a, a / w, h / b, b / h) for a, b in anchors.reshape(-1, 2)]
        best.append(max(inverse) > 1 / thr)
        above.append(sum(x > 1 / thr for x in inverse))
    return float(np.mean(best)), float(np.mean(above))


def test_fit_equals_a_loop_over_labels_and_anchors() -> None:
    wh, anchors = rng(1).uniform(3, 600, (200, 2)), np.array(COCO, float)
    for thr in (2.0, 4.0):
        fit = anchor_fit(wh, anchors, thr)
        expected = slow_fit(wh, anchors, thr)
        assert (fit.best_possible_recall, fit.anchors_per_label) == pytest.approx(expected)


def test_label_sizes_are_in_pixels_of_the_longer_side() -> None:
    labels = [
        np.array([[0, 0.5, 0.5, 0.5, 0.25]], np.float32),
        np.zeros((0, 5), np.float32),
        np.array([[1, 0.5, 0.5, 1, 1]]),
    ]
    wh = label_sizes(labels, [(480, 640), (10, 10), (1000, 500)], 320)
    np.testing.assert_allclose(wh, [[160, 60], [160, 320]], rtol=1e-6)
    jittered = label_sizes(labels, [(480, 640), (10, 10), (1000, 500)], 320, rng())
    assert (np.abs(jittered / wh - 1) <= 0.1).all() and not np.allclose(jittered, wh)
    assert label_sizes([], [], 640).shape == (0, 2)


def test_anchors_that_fit_stay() -> None:
    result = judge_anchors(Head(), *dataset(0, 80, 90), 640, rng=rng())
    assert not result.changed and result.before == result.after and result.before.best_possible_recall > 0.98
    np.testing.assert_allclose(result.anchors, COCO, rtol=1e-6)
    assert "the anchors stay" in result.messages[0] and not result.warnings


def test_anchors_that_do_not_fit_are_replaced_by_better_ones() -> None:
    head = Head()
    before = head.anchors.clone()
    result = judge_anchors(head, *dataset(0, 300, 12), 640, rng=rng(), generations=200)
    assert result.changed and torch.equal(head.anchors, before)  # nothing written yet
    assert result.before.best_possible_recall < 0.5 < 0.98 < result.after.best_possible_recall
    assert "replaced" in result.messages[0]
    write_anchors(head, result.anchors)
    np.testing.assert_allclose((head.anchors * head.stride.view(-1, 1, 1)).numpy(), result.anchors, rtol=1e-6)
    again = judge_anchors(head, *dataset(0, 300, 12), 640, rng=rng())
    assert not again.changed and again.before.best_possible_recall > 0.98


def test_anchors_to_be_kept_are_judged_only() -> None:
    labels, shapes_hw = dataset(1, 8, 300)
    check = judge_anchors(Head(), labels, shapes_hw, 640, keep=True, rng=np.random.default_rng(0))
    assert not check.changed and check.before.best_possible_recall < 0.98
    assert check.messages == (
        f"AutoAnchor: {check.before.anchors_per_label:.2f} anchors per label, best possible recall "
        f"{check.before.best_possible_recall:.3f}: the anchors stay, the head's weights were trained with them "
        "(--autoanchor looks for others).",
    )


def test_worse_anchors_are_not_adopted() -> None:
    """One kind of label in nine hundred is out of reach of what is found as of what there is: nothing changes."""
    labels, shapes = dataset(0, 60, 60)
    tiny = np.array([[0, 0.5, 0.5, 0.9 / 640, 0.9 / 480]] * 20, np.float32)
    result = judge_anchors(Head(), [*labels, tiny], [*shapes, (480, 640)], 640, rng=rng(), generations=0)
    assert not result.changed and result.after == result.before
    assert "reach no more" in result.messages[0]
    assert "20 of " in result.warnings[0] and "less than 3 pixels" in result.warnings[0]


def test_no_labels_and_only_tiny_labels_leave_the_anchors_alone() -> None:
    empty = judge_anchors(Head(), [np.zeros((0, 5), np.float32)], [(480, 640)], 640, rng=rng())
    assert not empty.changed and "no labels" in empty.messages[0]
    tiny = [np.array([[0, 0.5, 0.5, 0.001, 0.001]], np.float32)]
    result = judge_anchors(Head(), tiny, [(480, 640)], 640, rng=rng())
    assert not result.changed and "no label reaches 2 pixels" in result.messages[0]


def test_the_same_generator_finds_the_same_anchors() -> None:
    wh = np.exp(rng(2).normal(3.5, 1, (500, 2)))
    one, other, third = (kmeans_anchors(wh, 9, 640, 4.0, 80, rng(seed)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one, other)
    assert not np.array_equal(one, third)


def test_clusters_are_found() -> None:
    sizes = np.array([[10, 12], [40, 20], [100, 300], [250, 90], [400, 420], [20, 90]], float)
    wh = (sizes[:, None] * rng(3).uniform(0.98, 1.02, (6, 100, 2))).reshape(-1, 2)
    anchors = kmeans_anchors(wh, 6, 640, 4.0, 0, rng())
    np.testing.assert_allclose(anchors, sizes[sizes.prod(1).argsort()], rtol=0.02)


def quality(wh: np.ndarray, anchors: np.ndarray, thr: float = 4.0) -> float:
    """YOLOv5's fitness of anchors: the mean over the labels of the best ratio, 0 where it is 1 / thr or less."""
    ratio = wh[:, None] / anchors[None]
    best = np.minimum(ratio, 1 / ratio).min(2).max(1)
    return float((best * (best > 1 / thr)).mean())


def test_mutation_never_lowers_the_mean_fit() -> None:
    wh = np.exp(rng(4).normal(3.5, 1, (1000, 2))).clip(2, 640)
    qualities = [quality(wh, kmeans_anchors(wh, 9, 640, 4.0, generations, rng(1))) for generations in (0, 40, 400)]
    assert qualities[0] < qualities[1] < qualities[2]


def test_one_anchor_alone_is_searched_for_too() -> None:
    wh = np.exp(rng(4).normal(3.5, 0.5, (300, 2)))
    assert quality(wh, kmeans_anchors(wh, 1, 640, 4.0, 100, rng(1))) > quality(
        wh, kmeans_anchors(wh, 1, 640, 4.0, 0, rng())
    )


def yolov5_search(wh: np.ndarray, anchors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """1,000 generations as YOLOv5 has them: one mutant of all anchors, steps of 0.1, kept where it is better."""
    best = quality(wh, anchors)
    for _ in range(1000):
        step = (rng.random(anchors.shape) < 0.9) * rng.random() * rng.normal(size=anchors.shape) * 0.1
        mutant = (anchors * (1 + step).clip(0.3, 3.0)).clip(2)
        if quality(wh, mutant) > best:
            anchors, best = mutant, quality(wh, mutant)
    return anchors


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.5, 1.2])
def test_the_search_ends_above_yolov5s_from_the_same_start(spread: float) -> None:
    wh = np.exp(rng(7).normal(3.5, 0.6, (600, 1)) + rng(8).normal(0, spread, (600, 2))).clip(2, 640)
    ours = [quality(wh, kmeans_anchors(wh, 9, 640, 4.0, 1000, rng(seed))) for seed in range(3)]
    theirs = [
        quality(wh, yolov5_search(wh, kmeans_anchors(wh, 9, 640, 4.0, 0, rng(seed)), rng(seed))) for seed in range(3)
    ]
    assert np.mean(ours) > np.mean(theirs)


@pytest.mark.parametrize("kinds", [1, 2, 8])
def test_fewer_kinds_of_labels_than_anchors_still_give_anchors(kinds: int) -> None:
    wh = rng(5).uniform(20, 200, (kinds, 2)).repeat(30, 0)
    anchors = kmeans_anchors(wh, 9, 640, 4.0, 40, rng())
    assert anchors.shape == (9, 2) and (anchors >= 2).all() and (np.diff(anchors.prod(1)) >= 0).all()
    assert anchor_fit(wh, anchors, 4.0).best_possible_recall == 1


def test_labels_of_one_width_are_no_obstacle() -> None:
    wh = np.stack((np.full(100, 32.0), np.linspace(10, 300, 100)), 1)
    anchors = kmeans_anchors(wh, 6, 640, 4.0, 40, rng())
    assert np.isfinite(anchors).all() and anchor_fit(wh, anchors, 4.0).best_possible_recall == 1


def test_no_usable_label_is_the_users_to_mend() -> None:
    with pytest.raises(UserError, match="no label reaches 2 pixels at 64"):
        kmeans_anchors(np.full((5, 2), 0.5), 9, 64, 4.0, 10, rng())


@pytest.mark.parametrize("strides", [(8.0, 16.0, 32.0), (32.0, 16.0, 8.0)])
def test_small_anchors_are_written_to_the_fine_level(strides: tuple[float, ...]) -> None:
    head = Head(strides=strides)
    buffer = head.anchors
    write_anchors(head, np.array(COCO, float))
    assert head.anchors is buffer  # in place: what the optimizer, EMA or checkpoint refers to stays the same
    pixels = (head.anchors * head.stride.view(-1, 1, 1)).tolist()
    assert pixels == (COCO if strides[0] == 8 else COCO[::-1])


def test_many_labels_are_searched_on_a_sample() -> None:
    wh = np.exp(rng(6).normal(3.5, 0.8, (60_000, 2))).clip(2, 640)
    anchors = kmeans_anchors(wh, 9, 640, 4.0, 16, rng())
    assert anchor_fit(wh, anchors, 4.0).best_possible_recall > 0.9


def test_number_of_anchors_per_level_has_a_range() -> None:
    assert check_hyp(read_hyp({}), [AnchorHyp])["anchors"] == 0
    with pytest.raises(UserError, match="'anchors' is -1"):
        check_hyp(read_hyp({"anchors": -1}), [AnchorHyp])
