"""Intervals and tests over repeated runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A mean, the half-width of its interval (nan for one value), the number of values, and p if it is a test."""

    mean: float
    half_width: float
    n: int
    p: float = math.nan

    def __str__(self) -> str:
        """In percent: "81.2 ± 1.3", or "81.2" where one value gives no interval."""
        return format(self, "")

    def __format__(self, sign: str) -> str:
        """As `str`; with "+" the mean has its sign, as a difference should."""
        return f"{100 * self.mean:{sign}.1f}" + ("" if math.isnan(self.half_width) else f" ± {100 * self.half_width:.1f}")


def interval(values: Sequence[float], level: float = 0.95) -> Estimate:
    """Mean and Student's t interval of independent values (runs)."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return Estimate(values.mean().item(), math.nan, len(values))
    half_width = stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values)
    return Estimate(values.mean().item(), half_width.item(), len(values))


def paired(values: Sequence[float], baseline: Sequence[float], level: float = 0.95) -> Estimate:
    """Mean difference to a baseline run on the same seeds and splits, its t interval and the two-sided paired t-test's p.

    With equal differences (no variance but rounding) p is nan. Three runs make a weak test: read the interval, not only p.
    """
    difference = np.asarray(values, float) - np.asarray(baseline, float)
    estimate = interval(difference, level)
    if len(difference) < 2 or np.ptp(difference) < 1e-9:
        return estimate
    return Estimate(estimate.mean, estimate.half_width, estimate.n, stats.ttest_1samp(difference, 0).pvalue.item())


def false_discoveries(p: Sequence[float]) -> np.ndarray:
    """q of each p (Benjamini and Hochberg): of those below .05 one in twenty is expected to be by chance; nan stays nan."""
    p = np.asarray(p, float)
    q, tested = np.full(len(p), math.nan), ~np.isnan(p)
    if tested.any():
        q[tested] = stats.false_discovery_control(p[tested])
    return q
