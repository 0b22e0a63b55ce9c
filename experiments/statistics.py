"""Judging an ablation: paired differences over seeds, intervals, exact tests, one plain sentence per arm.

`values[arm][seed]` is one number per finished run, higher meaning better, such as mAP50-95 on held-out images. A seed
fixes split, data order and augmentation for all arms, so arms are compared within a seed, never across.

The verdict comes from `sign_flip_p`, corrected by `holm`, and from nothing else: intervals describe, never decide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.config import UserError

Values = Mapping[str, Mapping[int, float]]
Metric = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], float]  # correct, confidence, class, target class

EXACT_SEEDS = 20  # 2**20 sums take 8 MB and some 10 ms
RANDOM_FLIPS = 99_999  # beyond that; with the observed signs 100,000
ROUNDING = 1e-12  # relative to the sum of magnitudes: sums this close are ties


def scipy_stats() -> Any:
    """The module `scipy.stats`. Call it before the first training run, so that a missing package is found by then."""
    try:
        from scipy import stats
    except ImportError:
        message = "Judging an ablation needs scipy: pip install scipy (or pip install -e '.[ablate]')"
        raise UserError(message) from None
    return stats


# ------------------------------------------------------------------------------------------------------ over the seeds


def paired_differences(values: Values, baseline: str, arm: str) -> dict[int, float]:
    """Arm minus baseline for every seed, ascending, for which both have a finite value; others are left out."""
    ours, theirs = values[arm], values[baseline]
    both = sorted(seed for seed in ours if seed in theirs)
    differences = {seed: float(ours[seed]) - float(theirs[seed]) for seed in both}
    return {seed: difference for seed, difference in differences.items() if math.isfinite(difference)}


def bca_interval(
    differences: Iterable[float], confidence: float = 0.95, resamples: int = 9_999, seed: int = 0
) -> tuple[float, float]:
    """Bias-corrected and accelerated bootstrap interval of the mean difference, resampling seeds.

    B. Efron, "Better bootstrap confidence intervals", JASA 82 (1987), computed by `scipy.stats.bootstrap`. The order
    of the differences does not matter. Few seeds make it too narrow: with 8 normal differences it covers the true mean
    in 87 % of cases instead of 95 %, with 4 in 80 % (tests/test_statistics.py repeats the measurement).

    Returns (nan, nan) for fewer than two differences, and (d, d) where all of them are d up to rounding.
    """
    sample = np.sort(_finite(differences))
    if len(sample) < 2:
        return math.nan, math.nan
    if np.ptp(sample) <= ROUNDING * np.abs(sample).max():
        return float(sample[0]), float(sample[0])
    options = dict(confidence_level=confidence, n_resamples=resamples, method="BCa", rng=np.random.default_rng(seed))
    low, high = scipy_stats().bootstrap((sample,), np.mean, **options).confidence_interval
    return float(low), float(high)


def sign_flip_p(differences: Iterable[float]) -> float:
    """Two-sided p of the hypothesis that every difference is as likely with the opposite sign; 1.0 for none.

    The share of all 2**n sign patterns whose mean is at least as far from zero as the observed one, itself included:
    R. A. Fisher, The Design of Experiments (1935), section 21; P. Good, Permutation, Parametric and Bootstrap Tests of
    Hypotheses (2005). No distribution is assumed: two arms that do not differ may swap their names in any seed. A
    zero difference stays the same whatever its sign, so it only costs power.

    Above 20 differences, random patterns from a fixed generator, and (b + 1) / (m + 1) as in B. Phipson and G. Smyth,
    "Permutation P-values should never be zero", SAGMB 9 (2010).
    """
    sample = _finite(differences)
    magnitudes = np.sort(np.abs(sample))
    threshold = abs(math.fsum(sample)) - ROUNDING * magnitudes.sum()
    if len(sample) > EXACT_SEEDS:
        plus = np.random.default_rng(0).integers(0, 2, (RANDOM_FLIPS, len(sample)), np.int8)
        extreme = np.count_nonzero(np.abs(2 * (plus @ magnitudes) - magnitudes.sum()) >= threshold)
        return (int(extreme) + 1) / (RANDOM_FLIPS + 1)
    sums = np.zeros(1)
    for magnitude in magnitudes:
        sums = np.concatenate((sums + magnitude, sums - magnitude))
    return float(np.mean(np.abs(sums) >= threshold))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values, in their order, corrected for being several: reject those <= alpha, and the chance of even one
    false rejection is at most alpha.

    S. Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6 (1979): the smallest times
    m, the next times m - 1 and so on, none below the one before it, none above 1.
    """
    p = np.asarray(p_values, np.float64)
    if not np.all((p >= 0) & (p <= 1)):
        raise ValueError(f"p-values lie in 0..1, found {list(p_values)}")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(adjusted, 1.0).tolist()


def smallest_p(n: int) -> float:
    """The smallest p `sign_flip_p` can give for n differences: 2 of 2**n patterns, all signs equal."""
    return min(1.0, 2.0 ** (1 - n))


def seeds_needed(comparisons: int, alpha: float = 0.05) -> int:
    """Fewest paired seeds with which the smallest of so many p-values can still be <= alpha after Holm's correction."""
    if comparisons < 1 or not 0 < alpha < 1:
        raise ValueError(f"comparisons must be at least 1 and alpha in 0..1, found {comparisons} and {alpha}")
    n = 1
    while comparisons * smallest_p(n) > alpha:
        n += 1
    return n


@dataclass(frozen=True)
class Comparison:
    """One arm against the baseline over `n` paired seeds; `mean`, `spread` and `interval` are of arm minus baseline."""

    arm: str
    n: int
    missing: tuple[int, ...]  # seeds that some arm has, but not both of these
    mean: float  # nan without seeds
    spread: float  # sample standard deviation of the differences, nan below two seeds
    interval: tuple[float, float]  # see `bca_interval`
    p: float  # see `sign_flip_p`
    p_holm: float  # corrected for `comparisons`
    wins: int  # seeds in which the arm is higher
    ties: int  # seeds in which both are equal
    largest: float  # of the differences' magnitudes, 0 without seeds
    comparisons: int  # arms compared with the baseline
    alpha: float
    confidence: float

    @property
    def can_be_significant(self) -> bool:
        """Whether so few seeds could give a significant result at all, see `seeds_needed`."""
        return self.n >= seeds_needed(self.comparisons, self.alpha)

    @property
    def significant(self) -> bool:
        """The verdict: the corrected p is at most alpha, and there are seeds enough.

        Stricter than Holm in one case: an arm with failed cells, for which its later and smaller factor would do.
        """
        return self.can_be_significant and self.p_holm <= self.alpha

    def sentence(self, metric: str, digits: int = 3) -> str:
        """Effect, interval, seeds and verdict in one plain sentence; `digits` after the point."""
        lacking = f" ({_count(len(self.missing), 'seed')} missing)" if self.missing else ""
        if self.n == 0:
            return f"{self.arm}: no seed in which both it and the baseline have {metric}{lacking}; nothing can be said."
        seeds = f"{_count(self.n, 'paired seed')}{lacking}"
        if self.ties == self.n:
            return f"{self.arm}: {metric} equal to the baseline's in {self.ties} of {seeds}; {self._verdict()}."
        if self.largest < 0.5 * 10**-digits:  # the effect would read +0.000, and "higher" be said of nothing
            least = f"{0.5 * 10**-digits:.{digits + 1}f}"
            return f"{self.arm}: {metric} within {least} of the baseline's in {self.n} of {seeds}; {self._verdict()}."
        low, high = (_rounded(end, digits) for end in self.interval)
        interval = f" ({100 * self.confidence:g} % interval {low} to {high})" if self.n > 1 else ""
        effect = f"{metric} {_rounded(self.mean, digits, '+')}{interval} against the baseline"
        return f"{self.arm}: {effect}, higher in {self.wins} of {seeds}; {self._verdict()}."

    def _verdict(self) -> str:
        if not self.can_be_significant:
            needed, comparisons = seeds_needed(self.comparisons, self.alpha), _count(self.comparisons, "comparison")
            claim = f"no significance can be claimed from {_count(self.n, 'seed')}"
            return f"{claim}: at least {needed} would be needed for {comparisons}"
        found = "significant" if self.significant else "no difference was found"
        corrected = " after Holm correction" if self.comparisons > 1 else ""
        p = f"p = {self.p_holm:.3g}" if self.p_holm >= 1e-4 else "p < 0.0001"
        return f"{found}{corrected} ({p})"


def compare(values: Values, baseline: str, *, alpha: float = 0.05, confidence: float = 0.95) -> list[Comparison]:
    """Every other arm against the baseline, in the order of `values`.

    All of them count in the correction, also one without a single pair of finished runs (its p is 1): how many were
    asked about was settled before the results.
    """
    if baseline not in values:
        raise UserError(f"The baseline {baseline!r} is none of the arms: {', '.join(values)}.")
    everything = {s for cells in values.values() for s in cells}
    pairs = {arm: paired_differences(values, baseline, arm) for arm in values if arm != baseline}
    p_values = [sign_flip_p(pair.values()) for pair in pairs.values()]
    comparisons = []
    for (arm, pair), p, p_holm in zip(pairs.items(), p_values, holm(p_values)):
        differences, n = np.array(list(pair.values())), len(pair)
        comparison = Comparison(
            arm=arm,
            n=n,
            missing=tuple(sorted(everything - pair.keys())),
            mean=float(differences.mean()) if n else math.nan,
            spread=float(differences.std(ddof=1)) if n > 1 else math.nan,
            interval=bca_interval(differences, confidence),
            p=p,
            p_holm=p_holm,
            wins=int((differences > 0).sum()),
            ties=int((differences == 0).sum()),
            largest=float(np.abs(differences).max(initial=0)),
            comparisons=len(pairs),
            alpha=alpha,
            confidence=confidence,
        )
        comparisons.append(comparison)
    return comparisons


def _finite(differences: Iterable[float]) -> np.ndarray:
    sample = np.array(list(differences), np.float64)
    if not np.isfinite(sample).all():
        raise ValueError(f"differences must be finite, found {sample.tolist()}")
    return sample


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _rounded(value: float, digits: int, sign: str = "-") -> str:
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # + 0.0 turns -0.0 into 0.0


# ----------------------------------------------------------------------------------------------------- over the images


@dataclass(frozen=True, eq=False)
class Judged:
    """The detections of one run on its validation images, judged, and the labels of these images.

    Both runs of a pair number their images alike. Numbers may run through a larger dataset of which a seed validates
    on a part: the other images have neither detections nor labels.
    """

    image: np.ndarray  # (n,) int, 0..images - 1
    correct: np.ndarray  # (n, thresholds) bool, as `utils.metrics.match` gives it
    conf: np.ndarray  # (n,)
    cls: np.ndarray  # (n,) int
    target_image: np.ndarray  # (t,) int, 0..images - 1
    target_cls: np.ndarray  # (t,) int
    images: int

    def __post_init__(self) -> None:
        lengths = {len(self.image), len(self.correct), len(self.conf), len(self.cls)}
        if len(lengths) > 1 or len(self.target_image) != len(self.target_cls):
            raise ValueError("image, correct, conf and cls must be equally long, and so must the two of the labels")
        numbers = np.concatenate((self.image, self.target_image))
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < self.images:
            raise ValueError(f"images are numbered 0..{self.images - 1}, found {numbers.min()}..{numbers.max()}")

    def score(self, metric: Metric, copies: np.ndarray) -> float:
        """The metric where image i occurs `copies[i]` times, each time with all its detections and labels."""
        detections = np.repeat(np.arange(len(self.image)), copies[self.image])
        targets = np.repeat(self.target_cls, copies[self.target_image])
        return metric(self.correct[detections], self.conf[detections], self.cls[detections], targets)


def image_bootstrap_seeds(
    pairs: Sequence[tuple[Judged, Judged]],
    metric: Metric,
    *,
    same_images: bool = False,
    confidence: float = 0.95,
    resamples: int = 1_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of the metric's difference, arm minus baseline, if other images had been drawn.

    Resamples the images, the same for both runs: B. Efron and R. Tibshirani, An Introduction to the Bootstrap (1993),
    chapter 13. It is the mean difference over several seeds; (nan, nan) without seeds or without images.

    Args:
        pairs: (baseline, arm) of one seed each. The seeds themselves are not resampled.
        metric: gets correct, confidence, class, target class, as `AveragePrecision.update` does; called
            2 * resamples * len(pairs) times.
        same_images: image i is the same photo in every seed, so one draw serves all of them. Otherwise each seed has
            its own draw, which for shared photos would make the interval too narrow, by up to the root of the seeds.
    """
    sizes = [baseline.images for baseline, _ in pairs]
    for baseline, arm in pairs:
        ours, theirs = (np.bincount(run.target_image, minlength=run.images) for run in (arm, baseline))
        if not np.array_equal(ours, theirs):
            raise ValueError("the two runs of a pair must be judged on the same images, numbered alike")
    if same_images and len(set(sizes)) > 1:
        raise ValueError(f"same_images needs equally many images in every seed, found {sizes}")
    if min(sizes, default=0) == 0:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for index in range(resamples):
        draws = [_draw(rng, sizes[0])] * len(sizes) if same_images else [_draw(rng, size) for size in sizes]
        differences = [b.score(metric, copies) - a.score(metric, copies) for (a, b), copies in zip(pairs, draws)]
        means[index] = np.mean(differences)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _draw(rng: np.random.Generator, images: int) -> np.ndarray:
    """How often each image is drawn (images,), in as many draws with replacement."""
    return np.bincount(rng.integers(images, size=images), minlength=images)
