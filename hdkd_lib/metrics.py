"""What is measured on a model's outputs."""

import torch
import torchmetrics.functional.classification as M
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance


def classification(probabilities: Tensor, labels: Tensor) -> dict:
    """Metrics of probabilities (N, C) against labels (N,); all in [0, 1] but `nll` (nats).

    accuracy; balanced_accuracy (mean recall of the classes); macro_f1; macro_auroc (one class against the rest); ece (expected
    calibration error of the top class, 15 bins, Guo et al. 2017); nll (cross-entropy); confusion (C x C counts, rows are true
    classes).
    """
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
    given = nn.Identity()
    given.num_features = real.shape[1]
    metric = FrechetInceptionDistance(feature=given)
    metric.update(real.float(), real=True)
    metric.update(synthetic.float(), real=False)
    return metric.compute().item()
