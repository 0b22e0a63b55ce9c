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
    Rule,
    chance_of_equivalence,
    compare,
    detectable,
    equivalence_p,
    higher_p,
    holm,
    paired_differences,
    seeds_needed,
    sign_flip_interval,
    sign_flip_p,
    smallest_p,
    superiority,
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
    for function in (sign_flip_p, higher_p, sign_flip_interval):
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
    assert better.interval == sign_flip_interval(paired_differences(values, "plain", "better").values())
    assert (better.p, better.p_holm) == (2 / 256, 4 / 256)
    assert better.verdict == "better"
    assert (same.mean, same.spread, same.interval, same.p, same.ties) == (0, 0, (0, 0), 1, 8)
    assert (same.p_equal, same.p_equal_holm, same.verdict) == (1 / 256, 2 / 256, "equivalent")


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
    assert failed.n == 0 and failed.p == 1 and math.isnan(failed.mean) and failed.verdict == "undecided"


def test_too_few_seeds_give_no_verdict_however_clear() -> None:
    assert only(against_zero(*[1.0] * 5)).verdict == "undecided"
    assert only(against_zero(*[1.0] * 6)).verdict == "better"
    assert compare(against_zero(*[1.0] * 6, arms=3), "plain")[0].verdict == "undecided"
    assert compare(against_zero(*[1.0] * 7, arms=3), "plain")[0].verdict == "better"


def test_an_arm_with_failed_cells_needs_as_many_seeds_as_the_others() -> None:
    values = {**against_zero(*[1.0] * 8), "fewer": dict.fromkeys(range(6), 1.0)}
    _, fewer = compare(values, "plain")
    assert fewer.p_holm <= 0.05  # by Holm's last factor alone, 1
    assert fewer.verdict == "undecided"
    assert "from 6 seeds, at least 7 would be needed for 2 comparisons" in fewer.sentence("mAP50")


def test_an_unknown_baseline_is_named() -> None:
    with pytest.raises(UserError, match="'plane', which is to be compared, is none of the arms: plain, se"):
        compare(against_zero(0.1), "plane")


def test_no_other_arm_is_no_comparison() -> None:
    assert compare({"plain": {0: 0.5}}, "plain") == []


def test_differences_in_the_last_bit_are_no_finding() -> None:
    """Eight of 5e-17 came out significant: 0.1 + 0.2 is not 0.3."""
    values = {"plain": dict.fromkeys(range(8), 0.3), "se": dict.fromkeys(range(8), 0.1 + 0.2)}
    comparison = only(values)
    assert (comparison.p, comparison.ties, comparison.wins, comparison.mean) == (1, 8, 0, 0)


def test_what_is_compared_with_what_can_be_said() -> None:
    values = {"plain": dict.fromkeys(range(8), 0.5), "frozen": dict.fromkeys(range(8), 0.6)}
    values["se"] = {seed: 0.62 + 0.001 * seed for seed in range(8)}
    se, frozen = compare(values, {"se": "frozen", "frozen": "plain"})
    assert (se.arm, se.baseline, se.comparisons) == ("se", "frozen", 2)
    assert se.mean == pytest.approx(0.0235) and frozen.mean == pytest.approx(0.1)
    assert se.sentence("mAP50").startswith("se against frozen: mAP50 +0.024")
    with pytest.raises(UserError, match="'gate', which is to be compared, is none of the arms"):
        compare(values, {"se": "gate"})


def test_seeds_of_one_split_are_one_difference() -> None:
    """What an arm owes to a split's images is in all of its seeds, so they are not flipped one by one."""
    runs = [(split, seed) for split in range(7) for seed in range(3)]
    values = {"plain": dict.fromkeys(runs, 0.25), "se": {run: 0.25 + 0.03 * run[1] for run in runs}}
    comparison = only(values)
    assert (comparison.n, comparison.unit, comparison.p) == (7, "split", smallest_p(7))
    assert paired_differences(values, "plain", "se") == dict.fromkeys(range(7), 0.03)
    del values["se"][2, 0], values["plain"][3, 1], values["se"][4, 0], values["se"][4, 1], values["se"][4, 2]
    differences = paired_differences(values, "plain", "se")
    assert differences == {0: 0.03, 1: 0.03, 2: 0.045, 3: 0.03, 5: 0.03, 6: 0.03}
    assert only(values).missing == (4,)


# -------------------------------------------------------------------------------------------- intervals and equivalence


@pytest.mark.parametrize("n", [6, 7, 8, 11])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_the_interval_is_the_shifts_that_the_test_does_not_reject(n: int, confidence: float) -> None:
    sample = np.random.default_rng(n).normal(0.3, 1, n)
    low, high = sign_flip_interval(sample, confidence)
    level = 1 - confidence
    for end, outwards in ((low, -1e-6), (high, 1e-6)):
        assert sign_flip_p(sample - end) > level >= sign_flip_p(sample - end - outwards)


def test_the_interval_of_darwins_maize_is_nearly_that_of_students_t() -> None:
    """Fisher's comparison, The Design of Experiments, section 21: t gives -0.03 to 41.89 eighths of an inch."""
    assert sign_flip_interval(DARWIN) == pytest.approx((-0.03, 41.9), abs=1)
    assert sign_flip_interval(DARWIN[::-1]) == sign_flip_interval(DARWIN)


def test_few_differences_have_no_interval_and_many_have_one_by_random_subsets() -> None:
    for few in ([], [0.25], [0.1, 0.2, 0.3, 0.4, 0.5]):
        assert all(math.isnan(end) for end in sign_flip_interval(few))
    assert sign_flip_interval([0.25] * 6) == (0.25, 0.25)
    many = np.random.default_rng(0).normal(0.5, 1, 40)
    half = stats.t.ppf(0.975, 39) * many.std(ddof=1) / 40**0.5
    assert sign_flip_interval(many) == pytest.approx((many.mean() - half, many.mean() + half), abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [6, 8])
def test_the_interval_covers_as_often_as_it_says(seeds: int) -> None:
    for draw in (np.random.default_rng(1).standard_normal, lambda size: np.random.default_rng(1).standard_t(2, size)):
        ends = np.array([sign_flip_interval(sample) for sample in draw((3_000, seeds))])
        covered = int(((ends[:, 0] <= 0) & (ends[:, 1] >= 0)).sum())
        assert covered >= stats.binom.ppf(0.001, 3_000, 0.95)
        assert covered <= stats.binom.ppf(0.999, 3_000, 1 - int(0.05 * 2 ** (seeds - 1)) / 2 ** (seeds - 1))


@quick
@given(st.lists(st.integers(-9, 9), max_size=8), st.integers(-4, 4))
def test_one_sided_p_counts_patterns(differences: list[int], bound: int) -> None:
    shifted = [d - bound for d in differences]
    sums = [sum(s * d for s, d in zip(signs, shifted)) for signs in itertools.product((-1, 1), repeat=len(shifted))]
    assert higher_p(differences, bound) == sum(value >= sum(shifted) for value in sums) / len(sums)


@quick
@given(st.lists(st.integers(-9, 9), max_size=8))
def test_two_sided_p_is_twice_the_smaller_one_sided(differences: list[int]) -> None:
    one = min(higher_p(differences), higher_p([-d for d in differences]))
    assert sign_flip_p(differences) == min(1.0, 2 * one)


def test_equivalence_needs_every_seed_within_the_margin_or_nearly() -> None:
    assert equivalence_p([0.001] * 8, 0.01) == 1 / 256 == equivalence_p([-0.001] * 8, 0.01)
    assert equivalence_p([0.02] * 8, 0.01) == 1
    assert equivalence_p([], 0.01) == 1
    many = np.random.default_rng(3).normal(0, 0.01, 30)
    assert equivalence_p(many, 0.01) == pytest.approx(
        float(stats.ttest_1samp(many, 0.01, alternative="less")[1]), abs=0.01
    )


def test_a_small_but_sure_difference_is_equivalent_and_a_large_one_is_not() -> None:
    assert only(against_zero(*[0.004 + 0.0001 * i for i in range(8)])).verdict == "equivalent"
    assert only(against_zero(*[0.005] * 8)).verdict == "better", "a difference comes before equivalence"
    assert only(against_zero(*[-0.02, -0.03] * 4)).verdict == "worse"
    assert only(against_zero(*[0.03, -0.03] * 4)).verdict == "undecided"
    wide = compare(against_zero(*[0.004] * 8), "plain", rule=Rule(least=0.001, margin=0.002))
    assert wide[0].verdict == "better"


@pytest.mark.parametrize(
    "wrong", [dict(margin=0.0), dict(margin=1.0), dict(least=-0.1), dict(least=0.02), dict(alpha=0.0)]
)
def test_a_rule_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match="expected a margin above 0 and below 1"):
        Rule(**wrong)


def test_the_chance_of_winning_has_an_exact_interval() -> None:
    share, low, high = superiority(7, 0, 8)
    exact = stats.binomtest(7, 8).proportion_ci(method="exact")
    assert (share, low, high) == pytest.approx((7 / 8, exact.low, exact.high))
    assert superiority(0, 0, 8)[1] == 0 and superiority(8, 0, 8)[2] == 1
    assert superiority(0, 8, 8)[0] == 0.5 and superiority(0, 8, 8)[1] < 0.5 < superiority(0, 8, 8)[2]
    assert all(math.isnan(value) for value in superiority(0, 0, 0))


# ------------------------------------------------------------------------------------------------ simulated experiments

NOISES = ("normal", "heavy tails", "uniform", "ties")


def tables(noise: str, count: int, arms: int, seeds: int, rng: np.random.Generator) -> np.ndarray:
    """Differences (count, arms, seeds) about 0 with a standard deviation of about 0.01; the arms of a table share the
    baseline's noise, which is half of it."""
    draw = {
        "normal": rng.standard_normal,
        "heavy tails": lambda size: rng.standard_t(3, size) / 3**0.5,
        "uniform": lambda size: rng.uniform(-(3**0.5), 3**0.5, size),
        "ties": lambda size: rng.integers(-2, 3, size) / 2**0.5,
    }[noise]
    return 0.01 / 2**0.5 * (draw((count, arms, seeds)) - draw((count, 1, seeds)))


def families(differences: np.ndarray) -> list[list[str]]:
    """The verdicts of every table (arms, seeds)."""
    found = []
    for table in differences:
        values = {"plain": dict.fromkeys(range(table.shape[1]), 0.5)}
        values |= {f"arm {index}": dict(enumerate((0.5 + row).tolist())) for index, row in enumerate(table)}
        found.append([comparison.verdict for comparison in compare(values, "plain")])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("noise", NOISES)
def test_without_an_effect_at_most_one_table_in_twenty_has_a_finding(noise: str) -> None:
    found = families(tables(noise, 2_000, 3, 8, np.random.default_rng(11)))
    wrong = sum("better" in table or "worse" in table for table in found)
    assert wrong <= stats.binom.ppf(0.999, 2_000, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(("spread", "seeds"), [(1.0, 8), (0.2, 8), (1.0, 16)])
def test_at_the_margin_at_most_one_table_in_twenty_claims_equivalence(noise: str, spread: float, seeds: int) -> None:
    rng = np.random.default_rng(13)
    signs = rng.choice((-1, 1), (2_000, 2, 1))
    found = families(spread * tables(noise, 2_000, 2, seeds, rng) + 0.01 * signs)
    wrong = sum("equivalent" in table for table in found)
    assert wrong <= stats.binom.ppf(0.999, 2_000, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "comparisons"), [(7, 1), (8, 5), (12, 3), (16, 2)])
def test_power_is_what_the_page_states(seeds: int, comparisons: int) -> None:
    """An effect of the size that a table calls detectable is found in 80 % of tables, within 3 points."""
    spread, rng = 0.012, np.random.default_rng(seeds)
    differences = rng.normal(0, spread, (2_000, comparisons, seeds))
    differences[:, 1:] /= 100  # the others do not differ: Holm's hardest step for the first
    differences[:, 0] += detectable(seeds, spread, comparisons)
    found = [table[0] for table in families(differences)]
    assert found.count("better") / 2_000 == pytest.approx(0.8, abs=0.03)
    equal = families(rng.normal(0, 0.006, (2_000, 1, seeds)))
    stated = chance_of_equivalence(seeds, 0.006, 1)
    reached = sum(table[0] == "equivalent" for table in equal) / 2_000
    # a sure difference of 0.005 or more is called by its name, and these are not equivalent
    named = sum(table[0] in ("better", "worse") for table in equal) / 2_000
    assert reached == pytest.approx(stated - named, abs=0.03)


def test_too_few_seeds_detect_nothing() -> None:
    assert detectable(5, 0.01, 1) == math.inf and detectable(6, 0.01, 2) == math.inf
    assert detectable(6, 0.01, 1) < 0.02 and chance_of_equivalence(5, 0.001, 1) == 0
    assert detectable(8, 0.0, 1) == 0.005, "the rule's least difference"
    assert detectable(8, 0.02, 1) == pytest.approx(2 * detectable(8, 0.01, 1), rel=0.01)
    assert detectable(8, math.nan, 1) == math.inf


# ---------------------------------------------------------------------------------------------------------- sentences


def sentence(*differences: float, arms: int = 3) -> str:
    return compare(against_zero(*differences, arms=arms), "plain")[0].sentence("mAP50-95")


def test_sentence_of_a_finding() -> None:
    text = sentence(0.004, 0.006, 0.009, 0.012, 0.013, 0.015, 0.017, 0.02)
    assert text == (
        "se against plain: mAP50-95 +0.012 (95 % interval 0.007 to 0.017), "
        "higher in 8 of 8 paired seeds; better (p = 0.0234, Holm-corrected)."
    )


def test_sentence_of_a_finding_for_the_worse_alone() -> None:
    text = sentence(*[-0.25] * 6, arms=1)
    assert text == (
        "se against plain: mAP50-95 -0.250 (95 % interval -0.250 to -0.250), "
        "higher in 0 of 6 paired seeds; worse (p = 0.0312)."
    )


def test_sentence_where_nothing_was_found() -> None:
    text = sentence(0.25, -0.25, 0.25, -0.25, 0.25, -0.25, 0.0001)
    assert text.startswith("se against plain: mAP50-95 +0.000 (95 % interval -0.")
    assert text.endswith(
        "higher in 4 of 7 paired seeds; undecided: neither a difference of 0.005 or more (p = 1, Holm-corrected) nor "
        "equivalence within 0.01 (p = 0.352, Holm-corrected) was shown."
    )


def test_sentence_of_equivalence() -> None:
    assert sentence(0.001, -0.001, 0.002, -0.002, 0.001, 0.0, 0.001, arms=1).endswith(
        "; equivalent within 0.01 (p = 0.00781)."
    )


def test_sentence_of_too_few_seeds_says_how_many_would_do() -> None:
    assert sentence(0.25, 0.25, 0.5, 0.25).endswith(
        "; undecided: no verdict can be reached from 4 seeds, at least 7 would be needed for 3 comparisons."
    )
    assert sentence(0.25, arms=1) == (
        "se against plain: mAP50-95 +0.250, higher in 1 of 1 paired seed; "
        "undecided: no verdict can be reached from 1 seed, at least 6 would be needed for 1 comparison."
    )


def test_sentence_of_equal_arms_and_of_no_seeds() -> None:
    equal = "se against plain: mAP50-95 equal in 6 of 6 paired seeds; equivalent within 0.01 (p = 0.0156)."
    assert sentence(*[0.0] * 6, arms=1) == equal
    assert only({"plain": {0: 0.5, 1: 0.5}, "se": {}}).sentence("mAP50") == (
        "se against plain: no seed in which both have mAP50 (2 seeds missing); nothing can be said."
    )


def test_sentence_mentions_missing_seeds_and_hides_no_sign_in_rounding() -> None:
    values = {"plain": dict.fromkeys(range(7), 0.5), "se": {seed: 0.4999 - 0.00001 * seed for seed in range(6)}}
    text = only(values).sentence("mAP50", digits=5)
    assert "mAP50 -0.00013 (95 % interval -0.00015 to -0.00010)" in text
    assert "higher in 0 of 6 paired seeds (1 seed missing); equivalent" in text
    only_half = {"plain": {0: 0.5, 1: 0.5}, "se": {0: 0.5004, 1: 0.4995}}
    assert "mAP50 +0.000, higher" in only(only_half).sentence("mAP50"), "not -0.000"


def test_a_sentence_says_nothing_is_higher_where_no_digit_would_show_it() -> None:
    values = {"plain": {0: 0.0, 1: 0.0}, "se": {0: 0.0002, 1: 0.00049}}
    text = only(values).sentence("mAP50")
    assert text.startswith("se against plain: mAP50 within 0.0005 of each other in 2 of 2 paired seeds; undecided")
    assert "higher" not in text
    assert "higher in 2 of 2" in only({**values, "se": {0: 0.0002, 1: 0.0005}}).sentence("mAP50")


def test_without_scipy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UserError, match=r"needs scipy: pip install scipy \(or pip install -e '\.\[ablate\]'\)"):
        superiority(1, 0, 2)
    assert sign_flip_p(DARWIN) < 1  # the tests themselves need numpy only
