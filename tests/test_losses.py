import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from hdkd_lib.losses import (
    batchnorm_loss,
    competition_loss,
    hard_distillation,
    intra_divergence_loss,
    logit_distillation,
    soft_distillation,
    standardise_logits,
    total_variation,
)


@st.composite
def cases(draw):
    """Student and teacher logits (B, C) in float64, a temperature and a reduction."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = 2, draw(st.integers(1, 6)), draw(st.integers(2, 9))
    student, teacher = torch.randn(shape, generator=random, dtype=torch.float64) * draw(st.floats(0.01, 30))
    return student, teacher, draw(st.floats(0.1, 20)), draw(st.sampled_from(["classes", "batchmean"]))


@given(cases())
def test_soft_distillation_is_torchs_divergence_times_tau_squared(case):
    student, teacher, tau, reduction = case
    kl = torch.nn.KLDivLoss(reduction="sum")((student / tau).log_softmax(1), (teacher / tau).softmax(1)) * tau**2
    expected = kl / (student.numel() if reduction == "classes" else len(student))
    assert_close(soft_distillation(student, teacher, tau=tau, reduction=reduction), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("ours", "torchs"), [("classes", "mean"), ("batchmean", "batchmean")])
@pytest.mark.filterwarnings("ignore:reduction. 'mean'")
def test_the_reductions_are_torchs_mean_and_batchmean(ours, torchs):
    student, teacher = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.KLDivLoss(reduction=torchs)(student.log_softmax(1), teacher.softmax(1))
    assert_close(soft_distillation(student, teacher, reduction=ours), expected)


@given(cases())
def test_soft_distillation_is_never_negative_and_zero_for_the_teachers_logits(case):
    student, teacher, tau, reduction = case
    assert soft_distillation(student, teacher, tau=tau, reduction=reduction) >= -1e-9
    shifted = teacher + 3  # the same probabilities
    assert_close(soft_distillation(shifted, teacher, tau=tau, reduction=reduction).item(), 0.0, rtol=0, atol=1e-9)


@given(cases())
def test_hard_distillation_is_cross_entropy_with_the_teachers_decisions(case):
    student, teacher, *_ = case
    decisions = teacher.max(1).indices
    assert_close(hard_distillation(student, teacher), -student.log_softmax(1)[range(len(student)), decisions].mean())


@given(cases())
def test_logit_distillation_is_the_kind_that_is_asked_for(case):
    student, teacher, tau, reduction = case
    soft, hard = (logit_distillation(student, teacher, distill_type=k, tau=tau, reduction=reduction) for k in ("soft", "hard"))
    assert soft == soft_distillation(student, teacher, tau=tau, reduction=reduction)
    assert hard == hard_distillation(student, teacher)


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="reduction must be 'classes' or 'batchmean'"):
        soft_distillation(torch.zeros(1, 2), torch.zeros(1, 2), reduction="mean")


# Inversion

BALANCED = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])


def test_batchnorm_loss_is_the_sum_of_norms_of_both_differences():
    x, y = torch.randn(4, 3, 5, 5), torch.randn(4, 2, 3, 3)
    norms = [nn.BatchNorm2d(3), nn.BatchNorm2d(2)]
    norms[0].running_mean, norms[1].running_var = torch.randn(3), torch.rand(2) + 0.5
    by_hand = []
    for z, norm in zip((x, y), norms, strict=True):
        mean = z.mean((0, 2, 3))
        var = ((z - mean.view(1, -1, 1, 1)) ** 2).mean((0, 2, 3))
        by_hand.append((mean - norm.running_mean).square().sum().sqrt() + (var - norm.running_var).square().sum().sqrt())
    assert_close(batchnorm_loss([x, y], norms), by_hand[0] + by_hand[1])
    assert_close(batchnorm_loss([x, y], norms, first=10.0), 10 * by_hand[0] + by_hand[1])


def test_batchnorm_loss_is_zero_for_the_images_that_made_the_statistics():
    x, norm = torch.randn(8, 3, 4, 4), nn.BatchNorm2d(3, momentum=1.0)
    norm(x)
    norm.running_var *= 127 / 128  # torch keeps the unbiased estimate
    assert batchnorm_loss([x], [norm]) < 1e-5


def test_total_variation_knows_all_four_directions():
    x = torch.zeros(1, 1, 3, 3)
    x[0, 0, 1, 1] = 1.0  # two differences along each direction
    assert_close(total_variation(x), torch.tensor(4 * math.sqrt(2)))
    assert total_variation(torch.full((1, 1, 3, 3), 7.0)) == 0


def test_competition_is_one_less_the_jensen_shannon_divergence():
    p, q = torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]])
    assert_close(competition_loss(p, p), torch.tensor(1.0))
    assert_close(competition_loss(p, q), torch.tensor(1 - math.log(2)))
    a, b = torch.randn(5, 3), torch.randn(5, 3)
    m = (a.softmax(1) + b.softmax(1)) / 2
    divergence = sum((x.softmax(1) * (x.softmax(1) / m).log()).sum(1).mean() for x in (a, b)) / 2
    assert_close(competition_loss(a, b), 1 - divergence)


def naive_intra_divergence(features, labels, margin, weight):
    z = F.normalize(features, dim=1)
    n, boundary, spread = len(z), 0.0, []
    for i in range(n):
        same = [(z[i] - z[j]).norm() for j in range(n) if j != i and labels[j] == labels[i]]
        others = [(z[i] - z[j]).norm() for j in range(n) if labels[j] != labels[i]]
        boundary += torch.clamp(max(same) - min(others) + margin, min=0) / n
        if max(same) + margin < min(others):
            spread.append(sum(same) / len(same))
    return boundary - weight * (sum(spread) / len(spread) if spread else 0.0)


@pytest.mark.parametrize("distance", [0.0, 1.0, 5.0])  # of the classes: mixed, between, apart
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_intra_divergence_is_its_definition_with_its_gradient(distance, weight):
    torch.manual_seed(3)
    features = torch.randn(8, 6, dtype=torch.float64)
    features[:4, 0] += distance
    features[4:, 0] -= distance
    ours, theirs = (features.clone().requires_grad_() for _ in range(2))
    loss, by_hand = intra_divergence_loss(ours, BALANCED, 0.2, weight), naive_intra_divergence(theirs, BALANCED, 0.2, weight)
    assert_close(loss, by_hand)
    loss.backward()
    by_hand.backward()
    assert_close(ours.grad, theirs.grad)


def test_images_of_one_class_spread_only_within_the_margin():
    torch.manual_seed(0)
    apart = torch.eye(2, 6).repeat_interleave(4, 0) + 0.01 * torch.randn(8, 6)
    apart.requires_grad_()
    intra_divergence_loss(apart, BALANCED).backward()
    moved = (apart - 0.01 * apart.grad / apart.grad.abs().max()).detach()
    z, far = (F.normalize(x.detach(), dim=1) for x in (apart, moved))
    assert torch.pdist(far[:4]).mean() > torch.pdist(z[:4]).mean()
    mixed = torch.randn(8, 6)
    assert intra_divergence_loss(mixed, BALANCED, weight=1.0) == intra_divergence_loss(mixed, BALANCED, weight=0.0)


def test_distances_stay_exact_under_autocast():
    features = torch.randn(8, 6)
    plain = intra_divergence_loss(features, BALANCED)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(intra_divergence_loss(features, BALANCED), plain)


@pytest.mark.parametrize("labels", [[0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 2, 3]])
def test_intra_divergence_refuses_unbalanced_batches(labels):
    with pytest.raises(ValueError, match="equally many images, at least two, of each of at least two classes"):
        intra_divergence_loss(torch.randn(4, 3), torch.tensor(labels))


def test_standardised_logits_do_not_depend_on_shift_and_size():
    logits = torch.randn(6, 5, dtype=torch.float64)
    standard = standardise_logits(logits)
    assert_close(standard.mean(1), torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)
    assert_close(standard.std(1), torch.ones(6, dtype=torch.float64), atol=1e-5, rtol=0)
    assert_close(standardise_logits(3 * logits + 7), standard, atol=1e-5, rtol=0)
    assert standardise_logits(torch.ones(2, 3)).isfinite().all()
