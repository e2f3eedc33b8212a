import numpy as np
import pytest
import sklearn.metrics
import torch

from hdkd_lib.metrics import (
    Predictions,
    classification,
    diversity,
    frechet_distance,
    linear_cka,
    precision_recall,
    weighted,
)


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_scikit_learns(seed):
    random = np.random.default_rng(seed)
    probabilities = random.dirichlet(np.ones(4), 80)
    labels = np.concatenate([np.arange(4), random.choice(4, 76, p=[0.6, 0.2, 0.15, 0.05])])  # unbalanced, no class absent
    decisions = probabilities.argmax(1)
    scores = classification(torch.tensor(probabilities), torch.tensor(labels))
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(labels, decisions),
        "balanced_accuracy": sklearn.metrics.balanced_accuracy_score(labels, decisions),
        "macro_f1": sklearn.metrics.f1_score(labels, decisions, average="macro"),
        "macro_auroc": sklearn.metrics.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro"),
        "nll": sklearn.metrics.log_loss(labels, probabilities),
    }
    assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=2e-6)
    assert scores["confusion"] == sklearn.metrics.confusion_matrix(labels, decisions).tolist()


def test_calibration_error_is_the_gap_between_confidence_and_accuracy_weighted_by_bin():
    # Confidence .9 twice, one right: gap .4; .6 twice, both right: gap .4; .75 four times, three right: 0
    top = torch.tensor([0.9, 0.9, 0.6, 0.6, 0.75, 0.75, 0.75, 0.75])
    labels = torch.tensor([0, 1, 0, 0, 0, 0, 0, 1])
    scores = classification(torch.stack([top, 1 - top], 1), labels)
    assert scores["ece"] == pytest.approx((2 * 0.4 + 2 * 0.4 + 4 * 0) / 8, abs=1e-6)


def test_calibration_is_not_guessed_where_only_the_class_is_kept():
    of = Predictions(np.arange(3), np.zeros(3, int), np.zeros(3, int), np.full(3, np.nan))
    assert weighted("accuracy", of) == 1
    with pytest.raises(ValueError, match="ece needs the probability of the predicted class"):
        weighted("ece", of)


def test_a_probability_of_zero_for_the_true_class_costs_a_finite_number_of_nats():
    scores = classification(torch.eye(3)[[0, 1, 2, 0]], torch.tensor([0, 1, 2, 1]))
    assert scores["nll"] == pytest.approx(12 * np.log(10) / 4, rel=1e-6)


def test_cka_ignores_rotation_scale_and_shift_and_sees_shared_structure_only():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, 4, generator=random)
    rotation, _ = torch.linalg.qr(torch.randn(12, 12, generator=random))
    assert linear_cka(x, 5 * x.flatten(1) @ rotation + 3) == pytest.approx(1, abs=1e-6)
    y = torch.randn(400, 6, generator=random)
    assert linear_cka(x, y) < 0.1
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x), rel=1e-12)
    half = torch.cat([x.flatten(1)[:, :6], torch.randn(400, 6, generator=random)], 1)
    assert 0.3 < linear_cka(x, half) < 0.7


def test_diversity_is_the_mean_distance_within_a_class_on_the_unit_sphere():
    features = torch.tensor([[2.0, 0.0], [0.0, 5.0], [1.0, 0.0], [-1.0, 0.0], [3.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 1, 1])
    assert diversity(features, labels) == pytest.approx((2**0.5 + (2 + 0 + 2) / 3) / 2, rel=1e-6)


def test_precision_and_recall_are_the_shares_within_reach_of_each_other():
    real = torch.arange(10.0)[:, None]
    narrow = torch.tensor([0.05, 0.15, 0.25, 0.35])[:, None]
    assert precision_recall(real, narrow, neighbours=1) == (1.0, pytest.approx(1 / 10))
    wide = torch.tensor([0.5, 40.0, 60.0])[:, None]
    assert precision_recall(real, wide, neighbours=1) == (pytest.approx(1 / 3), 1.0)
    assert precision_recall(real, real, neighbours=1) == (1.0, 1.0)


def test_frechet_distance_is_that_of_gaussians():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 3, generator=random)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-3)
    assert frechet_distance(x, x + torch.tensor([3.0, 0.0, 4.0])) == pytest.approx(25, rel=1e-3)
    assert frechet_distance(x, 2 * x) == pytest.approx(3 * (2 - 1) ** 2, rel=0.05)
