"""The blocks; their values are checked through the networks' parity with the official code."""

import pytest
import torch
from torch.testing import assert_close

from hdkd_lib.models.mbcsa import CBAM, MBCSA, ConvUnit, conv_stage


@pytest.mark.parametrize("downsample", [False, True])
@pytest.mark.parametrize("gate", ["cbam", "se", "none"])
def test_the_frozen_bias_has_no_gradient_but_rounding_noise(gate, downsample):
    torch.manual_seed(0)
    block = MBCSA(16, 24 if downsample else 16, downsample=downsample, gate=gate).double().train()
    assert not block.norm.bias.requires_grad
    assert all(p.requires_grad for p in block.parameters() if p is not block.norm.bias)
    block.norm.bias.requires_grad_(True)
    output = block(torch.randn(4, 16, 8, 8, dtype=torch.float64))
    (output * torch.randn_like(output)).sum().backward()
    assert block.norm.bias.grad.abs().max() < 1e-12
    assert block.norm.weight.grad.abs().max() > 1e-3


def test_a_block_halves_height_and_width_where_it_downsamples_and_keeps_its_input_else():
    x = torch.randn(2, 16, 8, 12)
    assert MBCSA(16, 24, downsample=True)(x).shape == (2, 24, 4, 6)
    block = MBCSA(16, 16)
    torch.nn.init.zeros_(block.project_norm.weight)
    assert_close(block(x), x)  # an identity shortcut, and nothing after the addition


def test_cbam_adds_its_input_to_the_gated_maps():
    gate = CBAM(32)
    for parameter in gate.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.randn(2, 32, 4, 4)
    assert_close(gate(x), 0.25 * x + x)  # sigmoid(0) twice, and the residual


def test_only_the_first_unit_of_a_stage_has_the_stride():
    stem, stage = conv_stage(3, 16, 3, stride=4, block=None), conv_stage(16, 24, 3)
    assert [type(unit) for unit in stem] == [ConvUnit] * 3
    assert stem(torch.randn(2, 3, 32, 32)).shape == (2, 16, 8, 8)
    assert stage(torch.randn(2, 16, 8, 8)).shape == (2, 24, 4, 4)
    assert [unit.expand.stride for unit in stage] == [(2, 2), (1, 1), (1, 1)]
