"""Intervals, verdicts and power of differences between two arms of a plan.

A difference has an interval that holds for other training images and other test images, not for these alone:

- `crossed`: every replicate has training images of its own and all share one test split, so that both are random factors. The
  variance of the mean is s²/n + V, with s² the variance of the differences and V what all replicates share, the test images:
  V = max(0, (n v - w) / (n - 1)), v the variance of the mean difference over test images, w the mean of each difference's own.
- `folds`: replicates are folds, whose training images overlap: s² (1/n + n_test/n_train) (Nadeau and Bengio 2003).

`contrast` makes the interval simultaneous within a question (Bonferroni) and reads the verdict from it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

POWER = 0.8  # chance of finding a difference that a design should be able to find
ALPHA = 0.05
PERMUTED_FROM = 8  # replicates; with fewer than 6 a sign-flip test cannot reach .05


@dataclass(frozen=True)
class Interval:
    """A mean, the half-width of its interval (nan for one value) and the number of values."""

    mean: float
    half_width: float
    n: int

    def __str__(self) -> str:
        """In percent: "81.2 ± 1.3", or "81.2" where one value gives no interval."""
        return format(self, "")

    def __format__(self, sign: str) -> str:
        """As `str`; with "+" the mean has its sign, as a difference should; "+.2" has two decimals."""
        sign, _, decimals = sign.partition(".")
        digits = decimals or "1"
        width = "" if math.isnan(self.half_width) else f" ± {100 * self.half_width:.{digits}f}"
        return f"{100 * self.mean:{sign}.{digits}f}{width}"


@dataclass(frozen=True)
class Variance:
    """Variance of a mean difference.

    Attributes:
        value: of the mean of `n` differences.
        df: degrees of freedom (Satterthwaite).
        n: independent differences: replicates, or folds.
        sd: standard deviation of the differences.
        shared: the part of `value` that more replicates do not make smaller.
        overlap: of folds: what their common training images add to `value`, in units of sd².
    """

    value: float
    df: float
    n: int
    sd: float
    shared: float = 0.0
    overlap: float = 0.0


@dataclass(frozen=True)
class Contrast(Interval):
    """The mean difference of two arms with its simultaneous interval.

    Attributes:
        verdict: "helps", "hurts" (by more or by less than the smallest difference that matters, where the interval says so),
            "equal", "undecided" or, for a single replicate, "no verdict".
        opposite: replicates whose own difference has the other sign than the mean: what a single run would have told.
        p: of the sign-flip permutation test, from eight replicates on; it decides nothing.
        needed: replicates for which this design finds the smallest difference with 80 % power, if "undecided"; None where no
            number of replicates does, since the test images are too few, or folds are not, whose number is fixed.
        sd: standard deviation of the differences.
        differences: of every replicate (or fold).
    """

    verdict: str
    opposite: int
    p: float
    needed: int | None
    sd: float
    differences: tuple[float, ...]

    @property
    def text(self) -> str:
        """Difference and interval in points, with as many decimals as it takes to read the verdict from them."""
        for digits in (1, 2, 3):
            mean, half = round(100 * self.mean, digits), round(100 * self.half_width, digits)
            if (abs(mean) > half) == (abs(self.mean) > self.half_width):
                break
        return format(self, f"+.{digits}")


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean and Student's t interval of independent values (runs)."""
    from scipy import stats  # takes seconds

    values = np.asarray(values, float)
    if len(values) < 2:
        return Interval(values.mean().item(), math.nan, len(values))
    half_width = stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values)
    return Interval(values.mean().item(), half_width.item(), len(values))


def crossed(differences: Sequence[float], v: float, w: float, images: int) -> Variance:
    """Variance of the mean of n differences that have training images of their own and share `images` test images.

    Args:
        differences: (n,) of the score, n > 1.
        v: variance over test images of the mean difference (`image_variances`, or `resampled_variances`).
        w: mean over replicates of the variance over test images of a single difference.
    """
    n, s2 = len(differences), float(np.var(differences, ddof=1))
    shared = max(0.0, (n * v - w) / (n - 1))
    value = s2 / n + shared
    spread = (s2 / n) ** 2 / (n - 1) + shared**2 / (images - 1)
    return Variance(value, value**2 / spread if spread > 0 else n - 1, n, math.sqrt(s2), shared)


def folds(differences: Sequence[float], share: float) -> Variance:
    """Variance of the mean of n folds' differences, each the mean over its seeds; `share`: n_test / n_train."""
    n, s2 = len(differences), float(np.var(differences, ddof=1))
    return Variance(s2 * (1 / n + share), n - 1, n, math.sqrt(s2), overlap=share)


def image_variances(differences: np.ndarray, groups: Sequence | None = None) -> tuple[float, float]:
    """v and w of `crossed` for a score that is a mean over images, such as accuracy.

    Args:
        differences: (n, N), each replicate's difference on every test image: -1, 0 or 1 for accuracy.
        groups: N names of groups that are drawn together, such as lesions; None: images are independent.
    """
    differences = np.asarray(differences, float)
    N = differences.shape[1]
    deviations = differences - differences.mean(1, keepdims=True)
    if groups is not None:
        _, number = np.unique(np.asarray(groups), return_inverse=True)
        deviations = np.stack([np.bincount(number, row) for row in deviations])
    G = deviations.shape[1]

    def variance(sums: np.ndarray) -> np.ndarray:
        return (sums**2).sum(-1) * G / (G - 1) / N**2

    return variance(deviations.mean(0)).item(), variance(deviations).mean().item()


def resampled_variances(differences: np.ndarray) -> tuple[float, float]:
    """v and w of `crossed` for any score: (B, n) differences on B resamples of the test images, the same for all replicates."""
    differences = np.asarray(differences, float)
    return differences.mean(1).var(ddof=1).item(), differences.var(axis=0, ddof=1).mean().item()


def contrast(differences: Sequence[float], variance: Variance | None, smallest: float, contrasts: int = 1) -> Contrast:
    """Interval and verdict of a mean difference.

    The interval has level 1 - .05 / `contrasts`, so that all intervals of a question hold together with 95 %. "equal" needs
    the 90 % interval within ± `smallest` (two one-sided tests).

    Args:
        differences: of every replicate (or fold): the mean is theirs.
        variance: of the mean, by `crossed` or `folds`; None for a single replicate.
        smallest: the smallest difference that matters, as a fraction (.02 is two points).
        contrasts: how many the question has.
    """
    from scipy import stats  # takes seconds

    differences = np.asarray(differences, float)
    mean, n, each = differences.mean().item(), len(differences), tuple(differences.tolist())
    opposite = int((differences * mean < 0).sum())
    if variance is None:
        return Contrast(mean, math.nan, n, "no verdict", opposite, math.nan, None, math.nan, each)
    half, tost = (stats.t.ppf(1 - a, variance.df) * math.sqrt(variance.value) for a in (ALPHA / contrasts / 2, ALPHA))
    p = math.nan
    if n >= PERMUTED_FROM:
        p = stats.permutation_test(
            (differences,), np.mean, permutation_type="samples", n_resamples=2**14, vectorized=True, rng=0
        ).pvalue.item()
    points, needed = f"{100 * smallest:g} point{'' if smallest == 0.01 else 's'}", None
    if abs(mean) > half:
        verdict = "helps" if mean > 0 else "hurts"
        if abs(mean) - half > smallest:
            verdict += f" by more than {points}"
        elif abs(mean) + half < smallest:
            verdict += f" by less than {points}"
    elif abs(mean) + tost < smallest:
        verdict = "equal"
    else:
        verdict = "undecided"
        if variance.overlap:
            found = detectable(variance.sd * math.sqrt(1 + n * variance.overlap), n, contrasts=contrasts)
            needed = n if found <= smallest else None
        else:
            needed = replicates(variance.sd, smallest, contrasts=contrasts, shared=variance.shared)
    return Contrast(mean, half.item(), n, verdict, opposite, p, needed, variance.sd, each)


def power(sd: float, n: int, difference: float, *, contrasts: int = 1, shared: float = 0.0) -> float:
    """Chance that the simultaneous interval of n replicates excludes zero when the true difference is `difference`.

    Args:
        sd: standard deviation of the differences between replicates, in the units of `difference`.
        contrasts: how many the question has.
        shared: variance that all replicates share, of the test images.

    Raises:
        ValueError: n < 2, which gives no interval.
    """
    from scipy import stats  # takes seconds

    if n < 2:
        raise ValueError(f"{n} replicates give no interval; take two or more")
    value = sd**2 / n + shared
    if value == 0:
        return float(difference != 0)
    df = value**2 / ((sd**2 / n) ** 2 / (n - 1)) if sd else 1e6
    critical, shift = stats.t.ppf(1 - ALPHA / contrasts / 2, df), difference / math.sqrt(value)
    far = np.nan_to_num(stats.nct.cdf(-critical, df, shift))  # scipy gives nan for some of the smallest
    return (stats.nct.sf(critical, df, shift) + far).item()


def detectable(sd: float, n: int, *, contrasts: int = 1, shared: float = 0.0) -> float:
    """The smallest difference that n replicates find with 80 % power, in the units of `sd`."""
    low, high = 0.0, math.sqrt(sd**2 + shared)
    if not high:
        return 0.0
    while power(sd, n, high, contrasts=contrasts, shared=shared) < POWER:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if power(sd, n, middle, contrasts=contrasts, shared=shared) >= POWER else (middle, high)
    return high


def wilson(share: float, n: float) -> tuple[float, float]:
    """Ends of the 95 % interval of a share of n independent images (Wilson 1927)."""
    z2 = 1.959964**2
    middle, half = share + z2 / (2 * n), math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n**2)))
    return (middle - half) / (1 + z2 / n), (middle + half) / (1 + z2 / n)


def replicates(sd: float, difference: float, *, contrasts: int = 1, shared: float = 0.0, most: int = 10_000) -> int | None:
    """How many replicates find `difference` with 80 % power; None where even `most` do not."""

    def suffice(n: int) -> bool:
        return power(sd, n, difference, contrasts=contrasts, shared=shared) >= POWER

    if not suffice(most):
        return None
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if suffice(middle) else (middle, high)
    return high
