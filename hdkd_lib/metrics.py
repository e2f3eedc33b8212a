"""What is measured on a model's outputs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


def classification(probabilities: Tensor, labels: Tensor) -> dict:
    """Metrics of probabilities (N, C) against labels (N,); all in [0, 1] but `nll` (nats).

    accuracy; balanced_accuracy (mean recall of the classes); macro_f1; macro_auroc (one class against the rest); ece (expected
    calibration error of the top class, 15 bins, Guo et al. 2017); nll (cross-entropy); confusion (C x C counts, rows are true
    classes).
    """
    import torchmetrics.functional.classification as M  # takes seconds

    C = probabilities.shape[1]
    scores = {
        "accuracy": M.multiclass_accuracy(probabilities, labels, C, average="micro"),
        "balanced_accuracy": M.multiclass_accuracy(probabilities, labels, C, average="macro"),
        "macro_f1": M.multiclass_f1_score(probabilities, labels, C, average="macro"),
        "macro_auroc": M.multiclass_auroc(probabilities, labels, C, average="macro"),
        "ece": M.multiclass_calibration_error(probabilities, labels, C, n_bins=15),
        "nll": nn.functional.nll_loss(probabilities.clamp_min(1e-12).log(), labels),
    }
    confusion = M.multiclass_confusion_matrix(probabilities, labels, C)
    return {name: round(value.item(), 6) for name, value in scores.items()} | {"confusion": confusion.tolist()}


@dataclass(frozen=True)
class Predictions:
    """What a network says of N images.

    Attributes:
        ids: (N,) names of the images.
        labels, predicted: (N,) numbers of the true and of the most probable class.
        confidence: (N,) probability of the latter, in [0, 1]; nan where it was not kept.
        probabilities: (N, C), or None where only the former are kept.
    """

    ids: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    probabilities: np.ndarray | None = None

    @classmethod
    def of(cls, ids: Sequence[str], labels: Sequence[int], probabilities: np.ndarray) -> "Predictions":
        probabilities = np.asarray(probabilities, float)
        predicted = probabilities.argmax(1)
        return cls(np.asarray(ids), np.asarray(labels, int), predicted, probabilities.max(1), probabilities)

    def __getitem__(self, chosen: np.ndarray) -> "Predictions":
        """Of some of the images, by a mask or by numbers."""
        probabilities = None if self.probabilities is None else self.probabilities[chosen]
        return Predictions(
            self.ids[chosen], self.labels[chosen], self.predicted[chosen], self.confidence[chosen], probabilities
        )


def weighted(metric: str, of: Predictions, weights: np.ndarray | None = None) -> np.ndarray:
    """(B,) values of a metric when the images count `weights` (B, N) times, as in B resamples; without them (1,), as they are.

    accuracy, balanced_accuracy, macro_f1, macro_auroc and ece as in `classification`; classes without an image in a resample do
    not count there (of macro_f1: where they are not predicted, either).

    Raises:
        ValueError: another metric, or macro_auroc or ece where only the predicted class is kept.
    """
    weights = np.ones((1, len(of.labels))) if weights is None else np.asarray(weights, float)
    is_right, total = of.predicted == of.labels, weights.sum(1)
    if metric == "accuracy":
        return weights @ is_right / total
    if metric == "ece":
        if np.isnan(of.confidence).any():
            raise ValueError("ece needs the probability of the predicted class, and only the class is kept")
        number = np.clip(np.ceil(of.confidence * 15), 1, 15)
        gaps = [weights @ np.where(number == i, of.confidence - is_right, 0.0) for i in range(1, 16)]
        return np.abs(gaps).sum(0) / total
    classes = np.unique(of.labels)
    true, said = (classes[:, None] == side for side in (of.labels, of.predicted))  # (C, N) each
    with np.errstate(invalid="ignore"):
        if metric == "balanced_accuracy":
            return np.nanmean([weights @ (of_class & is_right) / (weights @ of_class) for of_class in true], 0)
        if metric == "macro_f1":
            scores = [2 * (weights @ (t & s)) / (weights @ t + weights @ s) for t, s in zip(true, said, strict=True)]
            return np.nanmean(scores, 0)
        if metric == "macro_auroc":
            if of.probabilities is None:
                raise ValueError("macro_auroc needs the probabilities of all classes, and only the predicted class is kept")
            columns = np.ascontiguousarray(weights.T)
            return np.nanmean([_auroc(of.probabilities[:, c], of.labels == c, columns) for c in classes], 0)
    raise ValueError(f"unknown metric {metric!r}; known: accuracy, balanced_accuracy, ece, macro_auroc, macro_f1")


def auroc_of(of: Predictions, positive: Sequence[int]) -> float:
    """AUROC of the classes `positive` (numbers), by the sum of their probabilities, against all others; in [0, 1].

    Raises:
        ValueError: only the predicted class is kept.
    """
    if of.probabilities is None:
        raise ValueError("an AUROC of some classes needs the probabilities of all, and only the predicted class is kept")
    scores = of.probabilities[:, list(positive)].sum(1).round(9)  # sums of equal terms are equal
    return _auroc(scores, np.isin(of.labels, list(positive)), np.ones((len(of.labels), 1)))[0].item()


def _auroc(scores: np.ndarray, is_positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(B,): the share of pairs of a positive and a negative that `scores` (N,) order rightly; a tie is half; weights (N, B)."""
    negatives = np.flatnonzero(~is_positive)
    negatives = negatives[np.argsort(scores[negatives])]
    below = np.vstack([np.zeros_like(weights[:1]), weights[negatives].cumsum(0)])  # weight of the first 0, 1, ... negatives
    smaller, at_most = (np.searchsorted(scores[negatives], scores[is_positive], side) for side in ("left", "right"))
    positive = weights[is_positive]
    won = np.einsum("pb,pb->b", positive, below[smaller] + below[at_most]) / 2
    return won / (positive.sum(0) * below[-1])


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of two representations (N, ...) of the same N images, in [0, 1].

    Kornblith et al. 2019 (arXiv 1905.00414), computed from the N x N Gram matrices in float64.
    """
    grams = []
    for features in (x, y):
        features = features.flatten(1).double()
        features = features - features.mean(0)
        grams.append(features @ features.T)
    a, b = grams
    return ((a * b).sum() / (a.norm() * b.norm())).item()


def diversity(features: Tensor, labels: Tensor) -> float:
    """Mean distance between the unit-length features (N, D) of two images of one class, in [0, 2], mean over classes."""
    z = nn.functional.normalize(features.float(), dim=1)
    return torch.stack([torch.pdist(z[labels == label]).mean() for label in labels.unique()]).mean().item()


def precision_recall(real: Tensor, synthetic: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Kynkaanniemi et al. 2019 (arXiv 1904.06991): the share of the synthetic features (N, D) within reach of real ones (M, D),
    and of the real within reach of synthetic ones; reach is the distance to the k-th neighbour among one's own.
    """

    def covered(points: Tensor, by: Tensor) -> float:
        reach = torch.cdist(by, by).kthvalue(neighbours + 1, dim=1).values  # the nearest is the point itself
        return (torch.cdist(points, by) <= reach).any(1).float().mean().item()

    return covered(synthetic.float(), real.float()), covered(real.float(), synthetic.float())


def frechet_distance(real: Tensor, synthetic: Tensor) -> float:
    """Squared Frechet distance of Gaussians fitted to features (N, D) and (M, D): the FID, in the teacher's features."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    given = nn.Identity()
    given.num_features = real.shape[1]
    metric = FrechetInceptionDistance(feature=given)
    metric.update(real.float(), real=True)
    metric.update(synthetic.float(), real=False)
    return metric.compute().item()
