import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hdkd_lib.losses import hard_distillation, logit_distillation, soft_distillation


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
    soft, hard = (logit_distillation(student, teacher, kind=k, tau=tau, reduction=reduction) for k in ("soft", "hard"))
    assert soft == soft_distillation(student, teacher, tau=tau, reduction=reduction)
    assert hard == hard_distillation(student, teacher)


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="reduction must be 'classes' or 'batchmean'"):
        soft_distillation(torch.zeros(1, 2), torch.zeros(1, 2), reduction="mean")
