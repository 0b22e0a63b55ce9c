"""Judging an ablation: paired differences over seeds, exact tests, intervals, one plain sentence per comparison.

`values[arm][run]` is one number per finished run, higher meaning better, such as mAP50-95 on held-out images. A run is
a seed, which fixes split, data order and augmentation for all arms, or (split, seed) where the two are crossed. Arms
are compared within a run, never across.

What is exchangeable: if two arms do not differ, they may swap their names in any split. Runs of one split share its
images, and so whatever an arm owes to these images; their differences are averaged, and the split is what is flipped.

The verdict comes from `sign_flip_p` and `equivalence_p`, corrected by `holm`, by a `Rule` that was there before.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.config import UserError

Run = int | tuple[int, int]  # a seed, or (split, seed)
Values = Mapping[str, Mapping[Any, float]]  # by arm and Run
Metric = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], float]  # correct, confidence, class, target class

EXACT_SEEDS = 20  # 2**20 sums take 8 MB and some 10 ms
RANDOM_FLIPS = 99_999  # beyond that; with the observed signs 100,000
ROUNDING = 1e-12  # relative to the sum of magnitudes: sums this close are ties
DIGITS = 9  # of differences: eight of 5e-17, the last bit of a sum in another order, would be a finding
POWER = 0.8
SIMULATED_SEEDS = 12  # up to here power is that of the exact test; beyond, that of the t-test, which it then is near to
SIMULATIONS = 4_000


def scipy_stats() -> Any:
    """The module `scipy.stats`. Call it before the first training run, so that a missing package is found by then."""
    try:
        from scipy import stats
    except ImportError:
        message = "Judging an ablation needs scipy: pip install scipy (or pip install -e '.[ablate]')"
        raise UserError(message) from None
    return stats


@dataclass(frozen=True)
class Rule:
    """How verdicts are reached; fixed before the first run. Differences are in units of the metric, 0..1."""

    alpha: float = 0.05  # of both corrected tests
    least: float = 0.005  # a smaller mean difference is neither better nor worse
    margin: float = 0.01  # within it arms are equivalent

    def __post_init__(self) -> None:
        if not 0 < self.margin < 1 or not 0 <= self.least <= self.margin or not 0 < self.alpha < 1:
            raise UserError(
                f"--margin {self.margin:g}, --least {self.least:g}: expected a margin above 0 and below 1, and a least"
                " difference of 0 to the margin."
            )

    def in_words(self) -> str:
        """The rule as a report states it."""
        return (
            f"Better or worse: Holm's p of the two-sided sign-flip test at most {self.alpha:g}, and a mean difference"
            f" of {self.least:g} or more. Else equivalent: Holm's p of two one-sided sign-flip tests against"
            f" {self.margin:g} at most {self.alpha:g}. Else undecided."
        )


# ------------------------------------------------------------------------------------------------------ over the seeds


def split_of(run: Run) -> int:
    """What is flipped, see the head of this file."""
    return run[0] if isinstance(run, tuple) else run


def paired_differences(values: Values, baseline: str, arm: str) -> dict[int, float]:
    """Arm minus baseline for every split, ascending: the mean over its runs for which both have a finite value.

    Rounded to DIGITS. Splits without such a run are left out.
    """
    ours, theirs = values[arm], values[baseline]
    by_split: dict[int, list[float]] = {}
    for run in sorted(run for run in ours if run in theirs):
        difference = float(ours[run]) - float(theirs[run])
        if math.isfinite(difference):
            by_split.setdefault(split_of(run), []).append(difference)
    return {split: round(math.fsum(several) / len(several), DIGITS) + 0.0 for split, several in by_split.items()}


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
    return _share(np.abs(_flipped_sums(sample)), abs(math.fsum(sample)), sample)


def higher_p(differences: Iterable[float], bound: float = 0.0) -> float:
    """One-sided p of the hypothesis that the differences lie symmetrically about `bound` or lower; 1.0 for none.

    The share of sign patterns of the differences minus `bound` whose sum is at least the observed one.
    """
    sample = _finite(differences) - bound
    return _share(_flipped_sums(sample), math.fsum(sample), sample)


def equivalence_p(differences: Iterable[float], margin: float) -> float:
    """p of the hypothesis that the mean difference is `margin` or more, either way: the larger of two one-sided ones.

    D. Schuirmann, "A comparison of the two one-sided tests procedure and the power approach for assessing the
    equivalence of average bioavailability", J. Pharmacokinet. Biopharm. 15 (1987), here with sign-flip tests: a true
    difference of exactly `margin`, with noise as likely up as down, is called equivalent in at most alpha of cases.
    """
    sample = _finite(differences)
    return max(higher_p(sample, -margin), higher_p(-sample, -margin))


def _flipped_sums(sample: np.ndarray) -> np.ndarray:
    """The sum of every sign pattern (2**n,), or of random ones (RANDOM_FLIPS,); order and signs do not matter."""
    magnitudes = np.sort(np.abs(sample))
    if len(sample) > EXACT_SEEDS:
        plus = np.random.default_rng(0).integers(0, 2, (RANDOM_FLIPS, len(sample)), np.int8)
        return 2 * (plus @ magnitudes) - magnitudes.sum()
    sums = np.zeros(1)
    for magnitude in magnitudes:
        sums = np.concatenate((sums + magnitude, sums - magnitude))
    return sums


def _share(statistics: np.ndarray, observed: float, sample: np.ndarray) -> float:
    """How many patterns reach the observed one, which counts as one more where they were drawn."""
    reached = int(np.count_nonzero(statistics >= observed - ROUNDING * np.abs(sample).sum()))
    drawn = len(sample) > EXACT_SEEDS
    return (reached + drawn) / (len(statistics) + drawn)


def sign_flip_interval(differences: Iterable[float], confidence: float = 0.95) -> tuple[float, float]:
    """The shifts of the differences that `sign_flip_p` does not reject: it covers as often as it says, for any noise
    that is as likely up as down.

    A shift is not rejected where enough of the 2**n - 1 subset means lie on either side of it, so the ends are two of
    these means: J. A. Hartigan, "Using subsample values as typical values", JASA 64 (1969). Above 20 differences,
    random subsets. (nan, nan) where so few differences, below 6 for 95 %, allow no such interval.
    """
    sample = np.sort(_finite(differences))
    means = _subset_means(sample[None])[0]
    rank = int((1 - confidence) * (len(means) + 1) / 2 * (1 + ROUNDING))
    if rank < 1:
        return math.nan, math.nan
    low, high = np.partition(means, (rank - 1, len(means) - rank))[[rank - 1, len(means) - rank]]
    return float(low), float(high)


def _subset_means(samples: np.ndarray) -> np.ndarray:
    """The mean of every subset that is not empty (t, 2**n - 1), or of random ones, for each sample (t, n)."""
    count = samples.shape[1]
    if count > EXACT_SEEDS:
        chosen = np.random.default_rng(0).integers(0, 2, (RANDOM_FLIPS, count), np.int8)
        chosen[chosen.sum(1) == 0] = 1  # hardly ever
        return samples @ chosen.T / chosen.sum(1)
    sums, sizes = np.zeros((len(samples), 1)), np.zeros(1)
    for column in samples.T:
        sums, sizes = np.concatenate((sums, sums + column[:, None]), 1), np.concatenate((sizes, sizes + 1))
    return sums[:, 1:] / sizes[1:]


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


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """The median of independent measurements, and an interval that needs no distribution: two of the values, sorted.

    W. Conover, Practical Nonparametric Statistics (1999), section 3.2. NaN ends where there are too few values.
    """
    ordered = sorted(values)
    rank = int(scipy_stats().binom.ppf((1 - confidence) / 2, len(ordered), 0.5))
    ends = (ordered[rank - 1], ordered[-rank]) if rank > 0 else (math.nan, math.nan)
    return float(np.median(ordered)), float(ends[0]), float(ends[1])


def superiority(wins: int, ties: int, n: int, confidence: float = 0.95) -> tuple[float, float, float]:
    """The chance that the arm beats the baseline in a new split, ties being halves, and the ends of its interval.

    C. Clopper and E. Pearson, "The use of confidence or fiducial limits", Biometrika 26 (1934). NaN without splits.
    """
    if not n:
        return math.nan, math.nan, math.nan
    won, tail, beta = wins + ties / 2, (1 - confidence) / 2, scipy_stats().beta
    low = float(beta.ppf(tail, won, n - won + 1)) if won > 0 else 0.0
    high = float(beta.ppf(1 - tail, won + 1, n - won)) if won < n else 1.0
    return won / n, low, high


# --------------------------------------------------------------------------------------------------------------- power


def detectable(n: int, spread: float, comparisons: int, rule: Rule = Rule(), power: float = POWER) -> float:
    """The smallest true difference that n splits call better (or, downwards, worse) with this power; inf for none.

    For normal differences whose standard deviation is `spread`, judged as one of so many `comparisons` among which it
    is the only one with an effect: Holm's hardest step. The rule's `least` difference counts.
    """
    bounds = _bounds(n, rule.alpha / comparisons / 2)
    if bounds is None or not math.isfinite(spread):
        return math.inf
    low, _, mean = bounds
    needed = np.maximum(-low * spread, rule.least - mean * spread)
    return max(float(np.quantile(needed, power)), 0.0)


def chance_of_equivalence(n: int, spread: float, comparisons: int, rule: Rule = Rule()) -> float:
    """The chance that n splits call an arm equivalent that does not differ at all; assumptions as in `detectable`."""
    bounds = _bounds(n, rule.alpha / comparisons)
    if n < seeds_needed(comparisons, rule.alpha) or bounds is None or not math.isfinite(spread):
        return 0.0
    low, high, _ = bounds
    return float(np.mean(np.maximum(-low, high) * spread < rule.margin))


@functools.lru_cache(64)
def _bounds(n: int, tail: float) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Of simulated standard normal samples, the ends of the interval that leaves out `tail` on each side, and means.

    None where n is too small for that. A one-sided test at level `tail` rejects a shift exactly where it lies outside.
    """
    rank = int(tail * 2.0**n * (1 + ROUNDING))
    if rank < 1:
        return None
    samples = np.random.default_rng(0).standard_normal((SIMULATIONS, n))
    mean = samples.mean(1)
    if n > SIMULATED_SEEDS:
        half = scipy_stats().t.ppf(1 - tail, n - 1) * samples.std(1, ddof=1) / math.sqrt(n)
        return mean - half, mean + half, mean
    ends = []
    for part in np.array_split(samples, 8):  # 32 MB at a time
        means = _subset_means(part)
        ends.append(np.partition(means, (rank - 1, means.shape[1] - rank), 1)[:, [rank - 1, -rank]])
    low, high = np.concatenate(ends).T
    return low, high, mean


# ---------------------------------------------------------------------------------------------------------- comparisons


@dataclass(frozen=True)
class Comparison:
    """One arm against its baseline over `n` splits; `mean`, `spread` and `interval` are of arm minus baseline."""

    arm: str
    baseline: str
    n: int
    missing: tuple[int, ...]  # splits that some arm has, but not both of these
    mean: float  # nan without splits
    spread: float  # sample standard deviation of the differences, nan below two splits
    interval: tuple[float, float]  # see `sign_flip_interval`
    p: float  # see `sign_flip_p`
    p_holm: float  # corrected for `comparisons`
    p_equal: float  # see `equivalence_p`
    p_equal_holm: float
    wins: int  # splits in which the arm is higher
    ties: int  # splits in which both are equal
    largest: float  # of the differences' magnitudes, 0 without splits
    comparisons: int  # how many were made
    rule: Rule
    confidence: float
    unit: str = "seed"  # what is flipped: a seed, or the split that several seeds share

    @property
    def enough(self) -> bool:
        """Whether so few splits could give a verdict at all, see `seeds_needed`.

        Stricter than Holm in one case: an arm with failed cells, for which its later and smaller factor would do.
        """
        return self.n >= seeds_needed(self.comparisons, self.rule.alpha)

    @property
    def verdict(self) -> str:
        """better, worse, equivalent or undecided, by the rule."""
        if self.enough and self.p_holm <= self.rule.alpha and abs(self.mean) >= self.rule.least - 0.5 * 10**-DIGITS:
            return "better" if self.mean > 0 else "worse"
        return "equivalent" if self.enough and self.p_equal_holm <= self.rule.alpha else "undecided"

    @property
    def superiority(self) -> tuple[float, float, float]:
        """The chance of being higher in a new split, and its interval."""
        return superiority(self.wins, self.ties, self.n, self.confidence)

    @property
    def detectable(self) -> float:
        """The smallest true difference that this table finds with a power of POWER, if its spread is the true one."""
        return detectable(self.n, self.spread, self.comparisons, self.rule)

    @property
    def chance_of_equivalence(self) -> float:
        """The chance that this table calls an arm equivalent that is, if its spread is the true one."""
        return chance_of_equivalence(self.n, self.spread, self.comparisons, self.rule)

    def sentence(self, metric: str, digits: int = 3) -> str:
        """Effect, interval, splits and verdict in one plain sentence; `digits` after the point."""
        lacking = f" ({_count(len(self.missing), self.unit)} missing)" if self.missing else ""
        name = f"{self.arm} against {self.baseline}"
        if self.n == 0:
            return f"{name}: no {self.unit} in which both have {metric}{lacking}; nothing can be said."
        seeds = f"{_count(self.n, f'paired {self.unit}')}{lacking}"
        if self.ties == self.n:
            return f"{name}: {metric} equal in {self.ties} of {seeds}; {self._verdict()}."
        if self.largest < 0.5 * 10**-digits:  # the effect would read +0.000, and "higher" be said of nothing
            least = f"{0.5 * 10**-digits:.{digits + 1}f}"
            return f"{name}: {metric} within {least} of each other in {self.n} of {seeds}; {self._verdict()}."
        low, high = (_rounded(end, digits) for end in self.interval)
        finite = math.isfinite(self.interval[0])
        interval = f" ({100 * self.confidence:g} % interval {low} to {high})" if finite else ""
        effect = f"{metric} {_rounded(self.mean, digits, '+')}{interval}"
        return f"{name}: {effect}, higher in {self.wins} of {seeds}; {self._verdict()}."

    def _verdict(self) -> str:
        if not self.enough:
            needed, comparisons = seeds_needed(self.comparisons, self.rule.alpha), self.comparisons
            claim = f"undecided: no verdict can be reached from {_count(self.n, self.unit)}"
            return f"{claim}, at least {needed} would be needed for {_count(comparisons, 'comparison')}"
        corrected = ", Holm-corrected" if self.comparisons > 1 else ""
        verdict, equal = self.verdict, f"within {self.rule.margin:g} (p {_p(self.p_equal_holm)}"
        if verdict in ("better", "worse"):
            return f"{verdict} (p {_p(self.p_holm)}{corrected})"
        if verdict == "equivalent":
            return f"equivalent {equal}{corrected})"
        difference = f"a difference of {self.rule.least:g} or more (p {_p(self.p_holm)}{corrected})"
        return f"undecided: neither {difference} nor equivalence {equal}{corrected}) was shown"


def against_first(arms: Iterable[str]) -> dict[str, str]:
    """Every arm but the first, and the first as its baseline."""
    first, *others = arms
    return dict.fromkeys(others, first)


def compare(
    values: Values, against: str | Mapping[str, str], *, rule: Rule = Rule(), confidence: float = 0.95
) -> list[Comparison]:
    """The comparisons that `against` names, arm -> baseline, in its order; one name is the baseline of all others.

    All of them count in the correction, also one without a single pair of finished runs (its p is 1): how many were
    asked about was settled before the results.
    """
    pairs = {arm: against for arm in values if arm != against} if isinstance(against, str) else dict(against)
    for name in (*pairs, *pairs.values(), *([against] if isinstance(against, str) else [])):
        if name not in values:
            raise UserError(f"{name!r}, which is to be compared, is none of the arms: {', '.join(values)}.")
    runs = {run for cells in values.values() for run in cells}
    found = [list(paired_differences(values, baseline, arm).items()) for arm, baseline in pairs.items()]
    samples = [np.array([difference for _, difference in pair]) for pair in found]
    p_values = [sign_flip_p(sample) for sample in samples]
    p_equal = [equivalence_p(sample, rule.margin) for sample in samples]
    tests = zip(p_values, holm(p_values), p_equal, holm(p_equal))
    comparisons = []
    for (arm, baseline), pair, sample, (p, p_holm, equal, equal_holm) in zip(pairs.items(), found, samples, tests):
        comparison = Comparison(
            arm=arm,
            baseline=baseline,
            n=len(sample),
            missing=tuple(sorted({split_of(run) for run in runs} - {split for split, _ in pair})),
            mean=float(sample.mean()) if len(sample) else math.nan,
            spread=float(sample.std(ddof=1)) if len(sample) > 1 else math.nan,
            interval=sign_flip_interval(sample, confidence),
            p=p,
            p_holm=p_holm,
            p_equal=equal,
            p_equal_holm=equal_holm,
            wins=int((sample > 0).sum()),
            ties=int((sample == 0).sum()),
            largest=float(np.abs(sample).max(initial=0)),
            comparisons=len(pairs),
            rule=rule,
            confidence=confidence,
            unit="split" if any(isinstance(run, tuple) for run in runs) else "seed",
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


def _p(value: float) -> str:
    return f"= {value:.3g}" if value >= 1e-4 else "< 0.0001"


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
