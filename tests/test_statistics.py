import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hdkd_lib.statistics import Estimate, false_discoveries, interval, paired

scores = st.lists(st.tuples(*[st.integers(0, 1000).map(lambda n: n / 1000)] * 2), min_size=2, max_size=8)


@given(scores, st.sampled_from([0.8, 0.95, 0.99]))
def test_the_interval_is_students(pairs, level):
    values = [value for value, _ in pairs]
    estimate = interval(values, level)
    sem = stats.sem(values)
    low, high = stats.t.interval(level, len(values) - 1, np.mean(values), sem) if sem > 0 else (np.mean(values),) * 2
    assert (estimate.mean - estimate.half_width, estimate.mean + estimate.half_width) == pytest.approx((low, high), abs=1e-9)
    assert estimate.n == len(values)


@given(scores)
def test_the_paired_test_is_scipys_and_its_p_is_nan_where_all_differences_are_equal(pairs):
    values, baseline = np.array(pairs).T
    estimate = paired(values, baseline)
    assert estimate.mean == pytest.approx(np.mean(values - baseline), abs=1e-12)
    assert estimate.half_width == pytest.approx(interval(values - baseline).half_width, abs=1e-12)
    if len({round(1000 * v) - round(1000 * b) for v, b in pairs}) == 1:
        assert math.isnan(estimate.p)
    else:
        assert estimate.p == pytest.approx(stats.ttest_rel(values, baseline).pvalue, rel=1e-6)


def test_differences_that_are_equal_but_for_rounding_are_no_evidence():
    assert 0.8 - 0.7 != 0.9 - 0.8
    assert math.isnan(paired([0.8, 0.9], [0.7, 0.8]).p)


def test_one_value_has_no_interval_and_no_p():
    assert math.isnan(interval([0.5]).half_width)
    estimate = paired([0.6], [0.5])
    assert (estimate.mean, estimate.n) == (pytest.approx(0.1), 1)
    assert math.isnan(estimate.half_width)
    assert math.isnan(estimate.p)


def test_an_estimate_reads_as_percent():
    assert str(interval([0.812])) == "81.2"
    assert str(interval([0.80, 0.82, 0.84])) == "82.0 ± 5.0"
    for mean, text in ((0.02, "+2.0 ± 1.3"), (-0.02, "-2.0 ± 1.3"), (0.0, "+0.0 ± 1.3")):
        assert f"{Estimate(mean, 0.013, 3):+}" == text
        assert f"{Estimate(mean, 0.013, 3)}" == str(Estimate(mean, 0.013, 3)) == text.removeprefix("+")
    assert f"{interval([0.02]):+}" == "+2.0"


def test_false_discoveries_are_controlled_over_what_was_tested():
    # by hand, p (i-th smallest of m) m / i, and none above a larger p's: .01 * 3 / 1, .04 * 3 / 2, .05 * 3 / 3
    assert false_discoveries([0.04, math.nan, 0.01, 0.05]) == pytest.approx([0.05, math.nan, 0.03, 0.05], nan_ok=True)
    assert np.isnan(false_discoveries([math.nan])).all()
    assert len(false_discoveries([])) == 0
