"""What is measured on a model's outputs."""

import torch
import torchmetrics.functional.classification as M
from torch import Tensor


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
        "nll": torch.nn.functional.nll_loss(probabilities.clamp_min(1e-12).log(), labels),
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
