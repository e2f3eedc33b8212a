"""The fused passes against the plain formulas: on a GPU where there is one, else by Triton's interpreter.

Triton is interpreted only if the environment says so before anything imports it: one test runs this file anew that way.
"""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hdkd_lib import models
from hdkd_lib.methods import HDKD
from hdkd_lib.models import fused
from hdkd_lib.models.mbcsa import CBAM, MBCSA, ConvUnit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not IS_INTERPRETED, reason="kernels need a GPU or Triton's interpreter")
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2}  # of a tensor's norm; bf16 rounds, which may move a maximum's place


def maps(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE).contiguous(memory_format=torch.channels_last)


def both(monkeypatch, compute) -> list:
    """What `compute` gives by plain operations and by the kernels."""
    results = []
    for is_fused in (False, True):
        monkeypatch.setattr(fused, "is_for", lambda x, is_fused=is_fused: is_fused)
        results.append(compute())
    return results


@pytest.mark.skipif(DEVICE == "cuda" or IS_INTERPRETED, reason="the kernels are tested directly")
def test_the_kernels_compute_the_plain_formulas_in_tritons_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "kernels"]
    answer = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout
    assert answer.stdout.split()[0].strip(".") == "s", "this test is skipped there, and no other"


@needs_kernels
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 48, 5, 7), (3, 80, 9, 8), (1, 16, 1, 1)])
def test_kernels_gate_as_plain_operations_do(shape, dtype, monkeypatch):
    torch.manual_seed(0)
    gate, x, grad = CBAM(shape[1]).to(DEVICE, dtype), maps(*shape, dtype=dtype).requires_grad_(), maps(*shape, dtype=dtype)

    def compute():
        y = gate(x)
        return [y, *torch.autograd.grad(y, [x, *gate.parameters()], grad)]

    plain, kernels = both(monkeypatch, compute)
    assert kernels[0].is_contiguous(memory_format=torch.channels_last)
    for expected, value in zip(plain, kernels, strict=True):
        assert value.dtype == dtype
        assert (value - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@needs_kernels
def test_kernels_give_a_maximums_gradient_to_the_first_of_equals():
    x, a = torch.zeros(1, 16, 2, 3, device=DEVICE).requires_grad_(), torch.ones(1, 16, 1, 1, device=DEVICE)
    (grad,) = torch.autograd.grad(fused.pool_positions(x)[2].sum(), x)
    assert grad[0, :, 0, 0].eq(1).all()
    assert grad.sum() == 16
    (grad,) = torch.autograd.grad(fused.pool_channels(x, a)[1][:, 1].sum(), x)
    assert grad[0, 0].eq(1).all()
    assert grad.sum() == 6


@needs_kernels
def test_kernels_normalise_as_batch_norm_does_in_inference(monkeypatch):
    torch.manual_seed(0)
    unit, x = ConvUnit(3, 24).to(DEVICE).eval(), maps(2, 3, 5, 7)
    for statistic in (unit[1].running_mean, unit[1].weight.data, unit[1].bias.data):
        statistic.normal_()
    unit[1].running_var.uniform_(0.5, 2)
    with torch.no_grad():
        plain, kernels = both(monkeypatch, lambda: unit(x))
    assert_close(kernels, plain, rtol=0, atol=1e-5)


@needs_kernels
def test_kernels_leave_a_step_of_hdkd_as_it_was(monkeypatch):
    # The plain convolutions between the kernels would round what differs in the seventh digit to TF32's three.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)

    def compute():
        torch.manual_seed(0)
        names = {"student": "hdkd_student_distilled_nano", "teacher": "hdkd_teacher_nano"}
        task = HDKD(**{of: models.create(name, num_classes=7, img_size=32) for of, name in names.items()}).train()
        task.to(DEVICE, memory_format=torch.channels_last)
        loss = task(maps(2, 3, 32, 32), torch.tensor([1, 3], device=DEVICE))["loss"]
        loss.backward()
        return [loss.detach(), *(p.grad for p in task.student.parameters() if p.requires_grad)]

    for expected, value in zip(*both(monkeypatch, compute), strict=True):
        assert_close(value, expected, rtol=0, atol=1e-4 * expected.abs().max().item() + 1e-7)


@needs_kernels
def test_kernels_all_launch_on_the_smallest_map():
    fused._kernels().try_all(torch.device(DEVICE))


def test_norms_that_learn_are_watched_or_span_processes_stay_modules_of_their_own(monkeypatch):
    calls = []
    kernels = type("Kernels", (), {"norm_gelu": lambda x, *_: calls.append(x) or x})
    monkeypatch.setattr(fused, "is_for", lambda x: True)
    monkeypatch.setattr(fused, "_kernels", lambda: kernels)
    norm, gelu, x = nn.BatchNorm2d(4).eval(), nn.GELU(), torch.randn(2, 4, 3, 3)
    watched = copy.deepcopy(norm)
    watched.register_forward_pre_hook(lambda *_: None)
    fused.norm_gelu(norm, gelu, x)  # with gradients
    with torch.no_grad():
        fused.norm_gelu(copy.deepcopy(norm).train(), gelu, x)
        fused.norm_gelu(watched, gelu, x)
        fused.norm_gelu(nn.SyncBatchNorm(4).eval(), gelu, x)
        assert not calls
        fused.norm_gelu(norm, gelu, x)
        assert len(calls) == 1


def test_where_kernels_do_not_run_plain_operations_do_and_one_warning_says_so(monkeypatch):
    assert not fused.is_for(torch.zeros(1, 4, 2, 2))
    monkeypatch.setattr(fused, "_kernels", lambda: (_ for _ in ()).throw(RuntimeError("Failed to find C compiler.")))
    with pytest.warns(UserWarning, match="plain operations on cuda:7.*Failed to find C compiler"):
        assert not fused._run_on(torch.device("cuda:7"))
    assert not fused._run_on(torch.device("cuda:7"))
    fused._run_on.cache_clear()


def test_blocks_compile_in_one_graph():
    for block in (MBCSA(16, 24, downsample=True), ConvUnit(16, 24).eval()):
        compiled = torch.compile(block, backend="eager", fullgraph=True)
        with torch.no_grad():
            assert compiled(torch.randn(2, 16, 8, 8)).shape[1] == 24
