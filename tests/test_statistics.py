"""Intervals and tests of an ablation, beside scipy's, published examples, literal versions and simulated runs."""

from __future__ import annotations

import itertools
import math
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.statistics import (
    Comparison,
    bca_interval,
    compare,
    holm,
    paired_differences,
    seeds_needed,
    sign_flip_p,
    smallest_p,
)
from utils.config import UserError

stats = pytest.importorskip("scipy.stats", reason="scipy is the optional extra [ablate]")
quick = settings(max_examples=60, deadline=None)  # no deadline: a busy machine is no failure
# Darwin's maize: crossed minus self-fertilised heights in eighths of an inch, in Fisher's Design of Experiments
DARWIN = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
integers = st.lists(st.integers(-9, 9), max_size=9)
p_lists = st.lists(st.floats(0, 1), max_size=6)


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def experiment(rng: np.random.Generator, arms: int, seeds: int, effect: float = 0.0) -> dict[str, dict[int, float]]:
    """Runs whose scores share the seed's luck; every arm but the first is `effect` better, their noise is 0.01."""
    luck = rng.normal(0.5, 0.05, seeds)
    scores = luck + rng.normal(0, 0.01, (arms, seeds)) + effect * (np.arange(arms) > 0)[:, None]
    return {f"arm {index}": dict(enumerate(row.tolist())) for index, row in enumerate(scores)}


def only(values: dict[str, dict[int, float]]) -> Comparison:
    (comparison,) = compare(values, "plain")
    return comparison


def against_zero(*differences: float, arms: int = 1) -> dict[str, dict[int, float]]:
    """A baseline of zeros, the arm `se` with these differences, and other arms equal to the baseline."""
    plain = dict.fromkeys(range(len(differences)), 0.0)
    return {"plain": plain, "se": dict(enumerate(differences)), **{f"other {i}": plain for i in range(arms - 1)}}


# --------------------------------------------------------------------------------------------------- paired differences


def test_differences_are_arm_minus_baseline_in_the_order_of_seeds() -> None:
    values = {"plain": {2: 0.5, 0: 0.25, 1: 0.0}, "se": {0: 0.5, 1: 1.0, 2: 0.25}}
    differences = paired_differences(values, "plain", "se")
    assert differences == {0: 0.25, 1: 1.0, 2: -0.25}
    assert list(differences) == [0, 1, 2]


def test_cells_missing_or_not_finite_in_either_arm_are_left_out() -> None:
    values = {"plain": {0: 0.5, 1: math.nan, 2: 0.5, 3: 0.5}, "se": {0: 0.75, 1: 0.5, 3: math.inf, 4: 0.5}}
    assert paired_differences(values, "plain", "se") == {0: 0.25}


# ------------------------------------------------------------------------------------------------------- BCa intervals


def bca_by_hand(sample: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """Efron's formulas (1987, equations 2.3 and 6.6; acceleration from the jackknife), written out."""
    rng = np.random.default_rng(seed)
    means = np.sort(rng.choice(sample, (resamples, len(sample))).mean(1))
    below = ((means < sample.mean()).mean() + (means <= sample.mean()).mean()) / 2
    bias = stats.norm.ppf(below)
    left_out = np.array([np.delete(sample, index).mean() for index in range(len(sample))])
    pull = left_out.mean() - left_out
    acceleration = (pull**3).sum() / (6 * (pull**2).sum() ** 1.5)
    shifted = bias + stats.norm.ppf([0.025, 0.975])
    low, high = np.quantile(means, stats.norm.cdf(bias + shifted / (1 - acceleration * shifted)))
    return float(low), float(high)


def test_bca_interval_agrees_with_the_formulas_written_out() -> None:
    sample = np.array(DARWIN, float)
    assert bca_interval(sample, resamples=50_000) == pytest.approx(bca_by_hand(sample, 50_000, 1), abs=1.0)


def test_bca_interval_is_scipys_for_the_sorted_differences() -> None:
    rng = np.random.default_rng(3)
    expected = stats.bootstrap((np.sort(DARWIN),), np.mean, confidence_level=0.9, n_resamples=999, rng=rng)
    assert bca_interval(DARWIN, 0.9, 999, 3) == pytest.approx(tuple(expected.confidence_interval))


def test_bca_interval_repeats_itself_and_ignores_the_order_of_seeds() -> None:
    assert bca_interval(DARWIN) == bca_interval(DARWIN[::-1])
    assert bca_interval(DARWIN, seed=1) != bca_interval(DARWIN, seed=2)


def test_bca_interval_follows_scale() -> None:
    low, high = bca_interval(DARWIN)
    assert bca_interval(np.array(DARWIN) / 1024) == pytest.approx((low / 1024, high / 1024))


@pytest.mark.parametrize("differences", [[], [0.25]])
def test_fewer_than_two_differences_have_no_interval(differences: list[float]) -> None:
    assert all(math.isnan(end) for end in bca_interval(differences))


@pytest.mark.parametrize("difference", [0.0, 0.25, -0.1])
def test_identical_differences_have_an_interval_of_no_width(difference: float) -> None:
    assert bca_interval([difference] * 5) == (difference, difference)
    assert bca_interval([difference, difference * (1 + 1e-15)]) == pytest.approx((difference, difference))


@quick
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=8))
def test_bca_interval_of_ties_is_finite_and_within_the_differences(differences: list[int]) -> None:
    low, high = bca_interval(differences, resamples=499)
    assert min(differences) <= low <= high <= max(differences)


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "documented"), [(4, 0.80), (8, 0.87)])
def test_bca_interval_covers_as_often_as_its_docstring_says(seeds: int, documented: float) -> None:
    samples = np.random.default_rng(1).normal(size=(1_500, seeds))
    ends = np.array([bca_interval(sample, resamples=999) for sample in samples])
    covered = ((ends[:, 0] <= 0) & (ends[:, 1] >= 0)).mean()
    assert covered == pytest.approx(documented, abs=0.03)  # three standard errors


def test_without_scipy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UserError, match=r"needs scipy: pip install scipy \(or pip install -e '\.\[ablate\]'\)"):
        bca_interval(DARWIN)
    assert sign_flip_p(DARWIN) < 1  # the test itself needs numpy only


# ------------------------------------------------------------------------------------------------------ sign-flip test


def test_sign_flips_of_darwins_maize_give_fishers_number() -> None:
    assert sign_flip_p(DARWIN) == 1726 / 32768


def scipy_p(differences: np.ndarray) -> float:
    result = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf)
    return float(result.pvalue)


def exact_p(differences: list[int]) -> float:
    """p of whole differences from how many patterns give each sum: the coefficients of the product of 1 + x^(2 d)."""
    ways = np.ones(1)
    for difference in map(abs, differences):
        ways = np.convolve(ways, np.bincount([0, 2 * difference], minlength=2 * difference + 1))
    sums = np.arange(len(ways)) - sum(map(abs, differences))
    return float(ways[np.abs(sums) >= abs(sum(differences))].sum() / ways.sum())


@pytest.mark.parametrize("n", [2, 3, 5, 8, 11])
def test_sign_flip_p_agrees_with_scipy(n: int) -> None:
    rng = np.random.default_rng(n)
    for shift in (0.0, 0.5, 2.0):
        sample = rng.normal(shift, 1, n)
        assert sign_flip_p(sample) == pytest.approx(scipy_p(sample))


@pytest.mark.parametrize("n", [20, 21, 40])
def test_sign_flip_p_of_many_seeds_is_exact_to_twenty_and_close_beyond(n: int) -> None:
    for shift in (0, 15, 30):
        differences = [d + shift - 20 for d in (DARWIN * 3)[:n]]
        expected = exact_p(differences)
        tolerance = 4 * math.sqrt(expected * (1 - expected) / 100_000) + 1e-5 if n > 20 else 1e-12
        assert sign_flip_p(differences) == pytest.approx(expected, abs=tolerance)


def test_many_seeds_on_one_side_give_a_small_p_but_never_zero() -> None:
    assert sign_flip_p(np.arange(1, 31)) == 1 / 100_000


@quick
@given(integers)
def test_sign_flip_p_counts_patterns_ties_and_zeros_exactly(differences: list[int]) -> None:
    patterns = itertools.product((-1, 1), repeat=len(differences))
    sums = [abs(sum(sign * d for sign, d in zip(signs, differences))) for signs in patterns]
    expected = sum(value >= abs(sum(differences)) for value in sums) / len(sums)
    assert sign_flip_p(differences) == expected
    assert sign_flip_p([d * 0.001 for d in differences]) == expected  # ties survive rounding
    assert sign_flip_p([*differences, 0]) == expected


@quick
@given(st.lists(st.floats(-1, 1, allow_subnormal=False), max_size=24), st.randoms(use_true_random=False))
def test_sign_flip_p_ignores_order_scale_and_direction(differences: list[float], random: Any) -> None:
    p = sign_flip_p(differences)
    shuffled = random.sample(differences, len(differences))
    assert sign_flip_p(shuffled) == sign_flip_p([-d for d in differences]) == p
    assert sign_flip_p([d * 1024 for d in differences]) == p
    assert min(smallest_p(len(differences)), 1 / 100_000) <= p <= 1


@pytest.mark.parametrize(("differences", "p"), [([], 1), ([0.3], 1), ([0.3, 0.1], 0.5), ([0.3, -0.3], 1), ([0, 0], 1)])
def test_sign_flip_p_of_hardly_any_seeds(differences: list[float], p: float) -> None:
    assert sign_flip_p(differences) == p


def test_a_difference_that_is_no_number_is_refused() -> None:
    for function in (sign_flip_p, bca_interval):
        with pytest.raises(ValueError, match="differences must be finite"):
            function([0.1, math.nan])


# ------------------------------------------------------------------------------------------------------------- Holm


def test_holm_on_a_textbook_set() -> None:
    # the worked example of Wikipedia's "Holm-Bonferroni method": at 0.05 the fourth and the first are rejected
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@quick
@given(p_lists)
def test_holm_is_the_closed_test_of_bonferronis(p_values: list[float]) -> None:
    """A hypothesis falls when Bonferroni rejects every set with it: Marcus, Peritz and Gabriel, Biometrika (1976)."""
    indices = range(len(p_values))
    sets = [s for size in indices for s in itertools.combinations(indices, size + 1)]
    bonferroni = {s: min(1.0, len(s) * min(p_values[i] for i in s)) for s in sets}
    assert holm(p_values) == pytest.approx([max(bonferroni[s] for s in sets if i in s) for i in indices])


@quick
@given(p_lists)
def test_holm_keeps_the_order_and_never_lowers_a_p(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(p <= corrected <= 1 for p, corrected in zip(p_values, adjusted))
    in_order = [adjusted[index] for index in np.argsort(p_values, kind="stable")]
    assert in_order == sorted(in_order)
    assert holm(p_values[::-1]) == adjusted[::-1]


@pytest.mark.parametrize("wrong", [math.nan, -0.1, 1.5])
def test_holm_refuses_what_is_no_probability(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"p-values lie in 0\.\.1"):
        holm([0.5, wrong])


# ------------------------------------------------------------------------------------------------------- seeds needed


@pytest.mark.parametrize(("comparisons", "seeds"), [(1, 6), (2, 7), (3, 7), (6, 8), (25, 10)])
def test_seeds_needed(comparisons: int, seeds: int) -> None:
    assert seeds_needed(comparisons) == seeds
    assert comparisons * smallest_p(seeds) <= 0.05 < comparisons * smallest_p(seeds - 1)


def test_a_corrected_p_of_exactly_alpha_is_small_enough() -> None:
    assert seeds_needed(1, alpha=1 / 16) == 5
    assert seeds_needed(3, alpha=3 / 64) == 7


def test_the_smallest_p_is_that_of_differences_with_one_sign() -> None:
    for n in range(12):
        assert sign_flip_p(np.arange(1, n + 1)) == smallest_p(n)


@pytest.mark.parametrize(("comparisons", "alpha"), [(0, 0.05), (3, 0.0), (3, 1.0)])
def test_seeds_needed_refuses_what_has_no_answer(comparisons: int, alpha: float) -> None:
    with pytest.raises(ValueError, match=r"comparisons must be at least 1 and alpha in 0\.\.1"):
        seeds_needed(comparisons, alpha)


# ---------------------------------------------------------------------------------------------------------- comparing


def test_compare_puts_the_parts_together() -> None:
    values = {
        "plain": dict.fromkeys(range(8), 0.5),
        "better": {seed: 0.5 + 0.01 * (seed + 1) for seed in range(8)},
        "same": dict.fromkeys(range(8), 0.5),
    }
    better, same = compare(values, "plain")
    assert (better.arm, better.n, better.missing, better.wins, better.ties) == ("better", 8, (), 8, 0)
    assert better.mean == pytest.approx(0.045)
    assert better.spread == pytest.approx(np.std(np.arange(8) * 0.01, ddof=1))
    assert better.interval == bca_interval(paired_differences(values, "plain", "better").values())
    assert (better.p, better.p_holm) == (2 / 256, 4 / 256)
    assert better.significant
    assert (same.mean, same.spread, same.interval, same.p, same.ties) == (0, 0, (0, 0), 1, 8)
    assert same.can_be_significant and not same.significant


def test_missing_cells_are_named_and_cost_only_their_seed() -> None:
    values = experiment(np.random.default_rng(0), 3, 8, effect=0.05)
    del values["arm 0"][2], values["arm 2"][5]
    values["arm 1"][7] = math.nan
    first, second = compare(values, "arm 0")
    assert (first.n, first.missing) == (6, (2, 7))
    assert (second.n, second.missing) == (6, (2, 5))


def test_an_arm_that_failed_everywhere_still_counts_as_a_comparison() -> None:
    values = {**experiment(np.random.default_rng(0), 2, 8, effect=0.05), "failed": {}}
    first, failed = compare(values, "arm 0")
    assert first.p_holm == 2 * first.p
    assert failed.n == 0 and failed.p == 1 and math.isnan(failed.mean) and not failed.significant


def test_too_few_seeds_are_never_significant_however_clear() -> None:
    assert not only(against_zero(*[1.0] * 5)).significant
    assert only(against_zero(*[1.0] * 6)).significant
    assert not compare(against_zero(*[1.0] * 6, arms=3), "plain")[0].significant
    assert compare(against_zero(*[1.0] * 7, arms=3), "plain")[0].significant


def test_an_arm_with_failed_cells_needs_as_many_seeds_as_the_others() -> None:
    values = {**against_zero(*[1.0] * 8), "fewer": dict.fromkeys(range(6), 1.0)}
    _, fewer = compare(values, "plain")
    assert fewer.p_holm <= 0.05  # by Holm's last factor alone, 1
    assert not fewer.significant
    assert "from 6 seeds: at least 7 would be needed for 2 comparisons" in fewer.sentence("mAP50")


def test_an_unknown_baseline_is_named() -> None:
    with pytest.raises(UserError, match="'plane' is none of the arms: plain, se"):
        compare(against_zero(0.1), "plane")


def test_no_other_arm_is_no_comparison() -> None:
    assert compare({"plain": {0: 0.5}}, "plain") == []


@pytest.mark.parametrize("noise", ["normal", "heavy tails", "ties"])
def test_without_an_effect_at_most_one_family_in_twenty_has_a_finding(noise: str) -> None:
    """8 seeds, 3 arms that differ from the baseline in nothing but luck, the baseline's luck shared by all three."""
    rng, families = np.random.default_rng(11), 2_000
    draw = {
        "normal": lambda size: rng.normal(size=size),
        "heavy tails": lambda size: rng.standard_cauchy(size),
        "ties": lambda size: rng.integers(0, 4, size),
    }[noise]
    found = 0
    for scores in draw((families, 4, 8)):
        found += min(holm([sign_flip_p(scores[arm] - scores[0]) for arm in (1, 2, 3)])) <= 0.05
    assert found <= stats.binom.ppf(0.999, families, 0.05)


def test_compare_finds_nothing_in_noise_and_what_is_there() -> None:
    rng = np.random.default_rng(12)
    null = [compare(experiment(rng, 4, 8), "arm 0") for _ in range(200)]
    assert sum(any(c.significant for c in family) for family in null) <= stats.binom.ppf(0.999, 200, 0.05)
    real = [c for _ in range(30) for c in compare(experiment(rng, 4, 8, effect=0.03), "arm 0")]
    assert np.mean([c.significant and c.mean > 0 for c in real]) > 0.9
    assert all(c.wins == c.n == 8 for c in real if c.p == smallest_p(8))


# ---------------------------------------------------------------------------------------------------------- sentences


def sentence(*differences: float, arms: int = 3) -> str:
    return compare(against_zero(*differences, arms=arms), "plain")[0].sentence("mAP50-95")


def test_sentence_of_a_finding() -> None:
    text = sentence(0.004, 0.006, 0.009, 0.012, 0.013, 0.015, 0.017, 0.02)
    assert text.startswith("se: mAP50-95 +0.012 (95 % interval 0.008 to 0.015) against the baseline, ")
    assert text.endswith("higher in 8 of 8 paired seeds; significant after Holm correction (p = 0.0234).")


def test_sentence_of_a_finding_for_the_worse_alone() -> None:
    text = sentence(*[-0.25] * 6, arms=1)
    assert text == (
        "se: mAP50-95 -0.250 (95 % interval -0.250 to -0.250) against the baseline, "
        "higher in 0 of 6 paired seeds; significant (p = 0.0312)."
    )


def test_sentence_where_nothing_was_found() -> None:
    text = sentence(0.25, -0.25, 0.25, -0.25, 0.25, -0.25, 0.0001)
    assert text.startswith("se: mAP50-95 +0.000 (95 % interval -0.")
    assert text.endswith("higher in 4 of 7 paired seeds; no difference was found after Holm correction (p = 1).")


def test_sentence_of_too_few_seeds_says_how_many_would_do() -> None:
    assert sentence(0.25, 0.25, 0.5, 0.25).endswith(
        "; no significance can be claimed from 4 seeds: at least 7 would be needed for 3 comparisons."
    )
    assert sentence(0.25, arms=1) == (
        "se: mAP50-95 +0.250 against the baseline, higher in 1 of 1 paired seed; "
        "no significance can be claimed from 1 seed: at least 6 would be needed for 1 comparison."
    )


def test_sentence_of_equal_arms_and_of_no_seeds() -> None:
    equal = "se: mAP50-95 equal to the baseline's in 6 of 6 paired seeds; no difference was found (p = 1)."
    assert sentence(*[0.0] * 6, arms=1) == equal
    assert only({"plain": {0: 0.5, 1: 0.5}, "se": {}}).sentence("mAP50") == (
        "se: no seed in which both it and the baseline have mAP50 (2 seeds missing); nothing can be said."
    )


def test_sentence_mentions_missing_seeds_and_hides_no_sign_in_rounding() -> None:
    values = {"plain": {0: 0.5, 1: 0.5, 2: 0.5}, "se": {0: 0.4999, 1: 0.4998}}
    text = only(values).sentence("mAP50", digits=5)
    assert "mAP50 -0.00015 (95 % interval -0.00020 to -0.00010)" in text
    assert "higher in 0 of 2 paired seeds (1 seed missing); no significance" in text
    only_half = {"plain": {0: 0.5, 1: 0.5}, "se": {0: 0.5004, 1: 0.4995}}
    assert "mAP50 +0.000 (95 % interval" in only(only_half).sentence("mAP50"), "not -0.000"


def test_a_sentence_says_nothing_is_higher_where_no_digit_would_show_it() -> None:
    values = {"plain": {0: 0.0, 1: 0.0}, "se": {0: 0.0002, 1: 0.00049}}
    text = only(values).sentence("mAP50")
    assert text.startswith("se: mAP50 within 0.0005 of the baseline's in 2 of 2 paired seeds; no significance")
    assert "higher" not in text
    assert "higher in 2 of 2" in only({**values, "se": {0: 0.0002, 1: 0.0005}}).sentence("mAP50")
