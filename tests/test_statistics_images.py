"""How much a difference depends on the images that were drawn: beside scipy's bootstrap and literal duplication."""

from __future__ import annotations

import math

import numpy as np
import pytest

from experiments.statistics import Judged, Metric, image_bootstrap_seeds
from tests.test_statistics import no_warnings, quick, stats  # noqa: F401
from utils.metrics import IOU_THRESHOLDS, AveragePrecision


def image_bootstrap(baseline: Judged, arm: Judged, metric: Metric, resamples: int = 100) -> tuple[float, float]:
    return image_bootstrap_seeds([(baseline, arm)], metric, resamples=resamples)


def judged(seed: int, images: int = 12, quality: float = 0.6, truth: int = 0) -> Judged:
    """A run on images with labels of 3 classes, the same ones for the same `truth`; two images have no label."""
    rng, labels = np.random.default_rng(seed), np.random.default_rng(truth)
    target_image = np.sort(labels.integers(0, images - 2, 4 * images))
    target_cls = labels.integers(0, 3, len(target_image))
    image, cls = np.concatenate((target_image, rng.integers(0, images, 20))), rng.integers(0, 3, len(target_image) + 20)
    cls[: len(target_cls)] = target_cls
    right = rng.uniform(size=len(image)) < np.where(np.arange(len(image)) < len(target_image), quality, 0)
    correct = right[:, None] & (rng.uniform(size=(len(image), 1)) > np.linspace(0, 0.9, len(IOU_THRESHOLDS)))
    return Judged(image, correct, rng.uniform(size=len(image)), cls, target_image, target_cls, images)


def mean_ap(correct: np.ndarray, conf: np.ndarray, cls: np.ndarray, target_cls: np.ndarray) -> float:
    collected = AveragePrecision(num_classes=3)
    collected.update(correct, conf, cls, target_cls)
    return collected.compute().map


def hits_at_50(correct: np.ndarray, conf: np.ndarray, cls: np.ndarray, target_cls: np.ndarray) -> float:
    return float(correct[:, 0].sum())


def test_an_image_drawn_twice_counts_twice() -> None:
    run, drawn = judged(1), [3, 3, 0, 7, 7, 7, 11, 1, 1, 1, 1, 5]
    collected = AveragePrecision(num_classes=3)
    for image in drawn:
        mine = run.image == image
        targets = run.target_cls[run.target_image == image]
        collected.update(run.correct[mine], run.conf[mine], run.cls[mine], targets)
    score = run.score(mean_ap, np.bincount(drawn, minlength=run.images))
    assert score == pytest.approx(collected.compute().map)
    assert score != pytest.approx(run.score(mean_ap, np.ones(run.images, int)))


def test_image_interval_agrees_with_scipy_where_the_metric_is_a_sum() -> None:
    baseline, arm = judged(1, 40), judged(2, 40, quality=0.8)
    per_image = np.bincount(arm.image, arm.correct[:, 0], 40) - np.bincount(baseline.image, baseline.correct[:, 0], 40)
    ours = image_bootstrap(baseline, arm, hits_at_50, resamples=8_000)
    theirs = stats.bootstrap(
        (per_image,), np.sum, n_resamples=8_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert ours == pytest.approx(tuple(theirs), abs=0.1 * per_image.std() * 40**0.5)


def test_image_interval_of_a_run_with_itself_is_zero_and_swapping_turns_the_sign() -> None:
    a, b = judged(1), judged(2, quality=0.9)
    assert image_bootstrap(a, a, mean_ap, resamples=50) == (0, 0)
    low, high = image_bootstrap(a, b, mean_ap, resamples=200)
    assert image_bootstrap(b, a, mean_ap, resamples=200) == pytest.approx((-high, -low))
    assert low < b.score(mean_ap, np.ones(12, int)) - a.score(mean_ap, np.ones(12, int)) < high
    assert image_bootstrap(a, b, mean_ap, resamples=50) == image_bootstrap(a, b, mean_ap, resamples=50)


def test_images_shared_by_the_seeds_narrow_nothing_while_separate_ones_do() -> None:
    pair = (judged(1, 40), judged(2, 40, quality=0.8))
    alone = image_bootstrap(*pair, hits_at_50, resamples=4_000)
    assert image_bootstrap_seeds([pair] * 4, hits_at_50, same_images=True, resamples=4_000) == alone
    low, high = image_bootstrap_seeds([pair] * 4, hits_at_50, resamples=4_000)
    assert (alone[1] - alone[0]) / (high - low) == pytest.approx(2, rel=0.1)


def test_seeds_may_have_different_images_and_numbers_of_them() -> None:
    pairs = [(judged(1, 12), judged(2, 12, 0.9)), (judged(3, 20, truth=5), judged(4, 20, 0.9, truth=5))]
    low, high = image_bootstrap_seeds(pairs, mean_ap, resamples=100)
    assert 0 < low < high < 1
    with pytest.raises(ValueError, match=r"equally many images in every seed, found \[12, 20\]"):
        image_bootstrap_seeds(pairs, mean_ap, same_images=True)


def test_without_images_or_seeds_there_is_no_interval() -> None:
    none = np.zeros(0, int)
    empty = Judged(none, np.zeros((0, 10), bool), np.zeros(0), none, none, none, 0)
    assert all(math.isnan(end) for end in image_bootstrap(empty, empty, mean_ap))
    assert all(math.isnan(end) for end in image_bootstrap_seeds([], mean_ap))


def test_runs_without_detections_differ_in_nothing() -> None:
    run, none = judged(1), np.zeros(0, int)
    blind = Judged(none, np.zeros((0, 10), bool), np.zeros(0), none, run.target_image, run.target_cls, run.images)
    assert image_bootstrap(blind, blind, mean_ap, resamples=20) == (0, 0)
    assert image_bootstrap(blind, run, mean_ap, resamples=100)[0] > 0


def test_pairs_on_different_images_and_arrays_that_do_not_fit_are_refused() -> None:
    run = judged(1)
    for other in (judged(1, truth=1), judged(1, images=13)):
        with pytest.raises(ValueError, match="judged on the same images"):
            image_bootstrap(run, other, mean_ap)
    arrays = (run.correct, run.conf, run.cls, run.target_image, run.target_cls)
    with pytest.raises(ValueError, match="equally long"):
        Judged(run.image[1:], *arrays, run.images)
    with pytest.raises(ValueError, match=r"numbered 0\.\.4, found 0\.\.11"):
        Judged(run.image, *arrays, 5)
