"""Intervals and verdicts against worked examples, scipy, and plans simulated from known differences."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hdkd_lib import statistics
from hdkd_lib.statistics import Interval, contrast, crossed, detectable, folds, interval, power, replicates

scores = st.lists(st.integers(0, 1000).map(lambda n: n / 1000), min_size=2, max_size=8)


@given(scores, st.sampled_from([0.8, 0.95, 0.99]))
def test_the_interval_is_students(values, level):
    found = interval(values, level)
    sem = stats.sem(values)
    low, high = stats.t.interval(level, len(values) - 1, np.mean(values), sem) if sem > 0 else (np.mean(values),) * 2
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high), abs=1e-9)
    assert found.n == len(values)


def test_an_interval_reads_as_percent():
    assert str(interval([0.812])) == "81.2"
    assert str(interval([0.80, 0.82, 0.84])) == "82.0 ± 5.0"
    for mean, text in ((0.02, "+2.0 ± 1.3"), (-0.02, "-2.0 ± 1.3"), (0.0, "+0.0 ± 1.3")):
        assert f"{Interval(mean, 0.013, 3):+}" == text
        assert f"{Interval(mean, 0.013, 3)}" == str(Interval(mean, 0.013, 3)) == text.removeprefix("+")
    assert f"{interval([0.02]):+}" == "+2.0"
    assert f"{Interval(0.02, 0.013, 3):+.2}" == "+2.00 ± 1.30"


# Variances


def test_without_shared_variance_the_crossed_interval_is_the_paired_t_interval():
    differences = np.array([0.01, 0.03, 0.02, 0.05])
    variance = crossed(differences, v=0.0, w=0.0, images=100)
    found = contrast(differences, variance, smallest=0.02)
    assert found.half_width == pytest.approx(interval(differences).half_width)
    assert (variance.df, variance.sd) == (pytest.approx(3), pytest.approx(differences.std(ddof=1)))


def test_shared_variance_and_degrees_of_freedom_by_hand():
    # n = 2, s² = 2e-4, v = 5e-4, w = 4e-4: V = (2 * 5e-4 - 4e-4) / 1 = 6e-4, s²/n = 1e-4
    variance = crossed([0.01, 0.03], v=5e-4, w=4e-4, images=11)
    assert (variance.value, variance.shared) == (pytest.approx(7e-4), pytest.approx(6e-4))
    assert variance.df == pytest.approx(7e-4**2 / (1e-4**2 / 1 + 6e-4**2 / 10))
    assert crossed([0.01, 0.03], v=1e-4, w=4e-4, images=11).shared == 0  # an estimate below zero


def test_folds_count_the_overlap_of_their_training_images():
    differences = [0.01, 0.03, 0.02, 0.04, 0.05]
    variance = folds(differences, share=0.25)
    assert variance.value == pytest.approx(np.var(differences, ddof=1) * (1 / 5 + 1 / 4))  # Nadeau and Bengio 2003
    assert variance.df == 4


def test_folds_are_not_asked_for_more_of_them_but_say_whether_they_would_have_found_the_difference():
    differences = np.array([-0.02, 0.03, -0.02, 0.04, 0.01]) + 0.035
    variance = folds(differences, share=0.25)
    found = detectable(variance.sd * math.sqrt(1 + 5 * 0.25), 5)
    for smallest, needed in ((0.99 * found, None), (1.01 * found, 5)):
        result = contrast(differences, variance, smallest)
        assert (result.verdict, result.needed) == ("undecided", needed)


def test_differences_without_spread_are_found_however_small():
    assert detectable(0.0, 5) == 0


def test_image_variances_are_those_of_means_over_images_and_groups_count_as_one():
    differences = np.random.default_rng(0).integers(-1, 2, (3, 50)).astype(float)
    v, w = statistics.image_variances(differences)
    assert v == pytest.approx(differences.mean(0).var(ddof=1) / 50)
    assert w == pytest.approx(differences.var(1, ddof=1).mean() / 50)
    twice = statistics.image_variances(np.repeat(differences, 2, axis=1), np.repeat(np.arange(50), 2))
    assert twice == pytest.approx((v, w))  # each image in a group with its copy: as many independent images as before


def test_resampled_variances_agree_with_those_over_images():
    random = np.random.default_rng(0)
    differences = random.integers(-1, 2, (4, 400)).astype(float)
    counts = random.multinomial(400, np.full(400, 1 / 400), 4000)
    assert statistics.resampled_variances(counts @ differences.T / 400) == pytest.approx(
        statistics.image_variances(differences), rel=0.08
    )


# Verdicts


@pytest.mark.parametrize(
    ("mean", "spread", "verdict"),
    [
        (0.05, 0.001, "helps by more than 2 points"),
        (-0.05, 0.001, "hurts by more than 2 points"),
        (0.03, 0.02, "helps"),
        (-0.03, 0.02, "hurts"),
        (0.01, 0.003, "helps by less than 2 points"),
        (-0.01, 0.003, "hurts by less than 2 points"),
        (0.001, 0.01, "equal"),
        (0.01, 0.04, "undecided"),
    ],
)
def test_the_verdict_is_read_from_the_interval(mean, spread, verdict):
    differences = mean + spread * np.array([-1, 1, -1, 1, -1, 1, -1, 1])
    found = contrast(differences, crossed(differences, 0, 0, 1000), smallest=0.02)
    assert found.verdict == verdict
    assert (found.needed is not None) == (verdict == "undecided")
    assert found.opposite == sum(differences * mean < 0)
    printed, _, width = found.text.partition(" ± ")
    assert (abs(float(printed)) > float(width)) == verdict.startswith(("helps", "hurts"))


def test_more_contrasts_widen_the_interval_as_bonferroni_says():
    differences = np.array([0.01, 0.03, 0.02, 0.05])
    one, three = (contrast(differences, crossed(differences, 0, 0, 100), 0.02, contrasts=k) for k in (1, 3))
    ratio = stats.t.ppf(1 - 0.05 / 6, 3) / stats.t.ppf(1 - 0.05 / 2, 3)
    assert three.half_width == pytest.approx(ratio * one.half_width)


def test_the_sign_flip_p_is_exact_and_given_from_eight_replicates_on():
    differences = np.array([1.0, 2, 3, 4, 5, 6, 7, 8]) / 100
    found = contrast(differences, crossed(differences, 0, 0, 100), 0.02)
    assert found.p == pytest.approx(2 / 2**8)  # all signs as they are, or all turned
    assert math.isnan(contrast(differences[:7], crossed(differences[:7], 0, 0, 100), 0.02).p)


def test_equal_scores_are_equal_and_a_single_replicate_has_no_verdict():
    zero = np.zeros(8)
    found = contrast(zero, crossed(zero, 0, 0, 100), 0.02)
    assert (found.verdict, found.half_width, found.opposite) == ("equal", 0, 0)
    single = contrast([0.03], None, 0.02)
    assert (single.verdict, single.n) == ("no verdict", 1)
    assert math.isnan(single.half_width)
    assert single.text == "+3.0"


def test_a_difference_is_printed_so_that_the_verdict_can_be_read():
    close = statistics.Contrast(0.0124, 0.0121, 8, "helps", 0, math.nan, None, 0.01, ())
    assert close.text == "+1.24 ± 1.21"  # +1.2 ± 1.2 would not say it
    assert statistics.Contrast(0.0324, 0.0121, 8, "helps", 0, math.nan, None, 0.01, ()).text == "+3.2 ± 1.2"


# Power


def test_power_is_that_of_the_paired_t_test_of_statsmodels():
    # TTestPower().power(effect_size=1.0, nobs=8, alpha=0.05), and of 1.2 at .05 / 3
    assert power(1.0, 8, 1.0) == pytest.approx(0.6808339582, abs=1e-6)
    assert power(1.0, 8, 1.2, contrasts=3) == pytest.approx(0.6186565792, abs=1e-6)
    assert power(2.0, 8, 2.0) == pytest.approx(power(1.0, 8, 1.0))
    assert power(1.0, 8, 0.0) == pytest.approx(0.05)


@pytest.mark.parametrize(("n", "expected"), [(5, (1.7, 2.1, 2.3)), (8, (1.2, 1.3, 1.5)), (10, (1.0, 1.1, 1.2))])
def test_the_smallest_difference_that_is_found(n, expected):
    assert [detectable(1.0, n, contrasts=k) for k in (1, 2, 3)] == pytest.approx(expected, abs=0.055)


@given(st.floats(0.5, 3), st.integers(1, 3))
def test_as_many_replicates_as_are_needed_find_the_difference_and_one_fewer_do_not(sd, k):
    n = replicates(sd, 1.0, contrasts=k)
    assert power(sd, n, 1.0, contrasts=k) >= 0.8
    assert n == 2 or power(sd, n - 1, 1.0, contrasts=k) < 0.8


def test_no_number_of_replicates_makes_up_for_too_few_test_images():
    assert replicates(1.0, 1.0, shared=0.2) is None
    with pytest.raises(ValueError, match="1 replicates give no interval"):
        power(1.0, 1, 1.0)


# Simulated plans: draws and test images both drawn anew


def simulated(random, n: int, truth: float, own: float, shared: float, images: int = 500, k: int = 1) -> list:
    """The results of one question of k contrasts: differences of draws with SD `own`, of images with SD `shared`, and noise."""
    results = []
    for _ in range(k):
        per_image = (
            truth + random.normal(0, own, (n, 1)) + random.normal(0, shared, images) + random.normal(0, 0.4, (n, images))
        )
        differences = per_image.mean(1)
        variance = crossed(differences, *statistics.image_variances(per_image), images)
        results.append(contrast(differences, variance, smallest=0.02, contrasts=k))
    return results


@pytest.mark.parametrize(("n", "own", "shared"), [(5, 0.01, 0.3), (5, 0.02, 0.1), (10, 0.005, 0.5), (10, 0.02, 0.0)])
def test_the_interval_covers_the_true_difference_of_simulated_plans(n, own, shared):
    random, plans = np.random.default_rng(n), 600
    found = [simulated(random, n, 0.03, own, shared)[0] for _ in range(plans)]
    covered = sum(abs(of.mean - 0.03) <= of.half_width for of in found) / plans
    assert 0.93 <= covered <= 0.97  # 95 %, give or take 2.2 standard errors of 600 plans


@pytest.mark.parametrize("n", [5, 10])
def test_a_question_without_effect_gets_a_false_verdict_in_at_most_one_of_twenty_plans(n):
    random, plans = np.random.default_rng(7 * n), 400
    wrong = [
        any(of.verdict.startswith(("helps", "hurts")) for of in simulated(random, n, 0.0, 0.015, 0.3, k=3))
        for _ in range(plans)
    ]
    assert sum(wrong) / plans <= 0.07  # 5 % and two standard errors


def test_the_interval_agrees_with_a_bootstrap_that_draws_replicates_and_images_anew():
    """The multi-bootstrap of Sellam et al. 2022."""
    random = np.random.default_rng(3)
    n, images = 40, 400
    per_image = 0.02 + random.normal(0, 0.02, (n, 1)) + random.normal(0, 0.3, images) + random.normal(0, 0.3, (n, images))
    variance = crossed(per_image.mean(1), *statistics.image_variances(per_image), images)
    draws, tested = random.integers(n, size=(2000, n)), random.integers(images, size=(2000, images))
    means = [per_image[np.ix_(d, i)].mean() for d, i in zip(draws, tested, strict=True)]
    assert math.sqrt(variance.value) == pytest.approx(np.std(means), rel=0.08)
