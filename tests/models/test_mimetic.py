"""Mimetic initialisation: the products of the weights are what the paper says."""

import pytest
import torch
from torch.testing import assert_close

from hdkd_lib import models
from hdkd_lib.models.mimetic import mimetic_init

OPTIONS = {"num_classes": 10, "img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 2, "num_heads": 3}


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return models.create("deit_tiny_distilled_patch16_224", init="mimetic", **OPTIONS)


def test_value_and_output_weights_multiply_to_a_negative_identity_and_noise(vit):
    for block in vit.blocks:
        product = (block.attn.proj.weight @ block.attn.qkv.weight.chunk(3)[2]).T  # W_V W_out
        noise = product + 0.4 * torch.eye(96)
        assert_close(noise.mean().item(), 0.0, atol=0.01, rtol=0)
        assert_close(noise.std().item() * 96**0.5, 0.4, atol=0.02, rtol=0)


def test_query_and_key_weights_of_a_head_are_the_best_of_its_rank(vit):
    for block in vit.blocks:
        query, key, _ = block.attn.qkv.weight.chunk(3)
        for rows in torch.arange(96).chunk(3):
            product = query[rows].T @ key[rows]
            assert torch.linalg.matrix_rank(product, rtol=1e-4) == 32
            assert product.trace() / 96 > 0.3, "near a positive multiple of the identity"
            singular = torch.linalg.svdvals(product)[:32]
            assert_close(query[rows].norm(dim=1).sort(descending=True).values ** 2, singular, atol=1e-3, rtol=1e-3)


def test_without_noise_the_products_are_multiples_of_the_identity():
    vit = models.create("deit_tiny_distilled_patch16_224", **OPTIONS | {"num_heads": 1})
    mimetic_init(vit, alpha_1=0.0, beta_1=0.7, alpha_2=0.0, beta_2=0.4)
    query, key, value = vit.blocks[1].attn.qkv.weight.chunk(3)
    assert_close(query.T @ key, 0.7 * torch.eye(96), atol=1e-5, rtol=0)
    assert_close(vit.blocks[1].attn.proj.weight @ value, -0.4 * torch.eye(96), atol=1e-5, rtol=0)


def test_positions_are_sinusoidal_and_prefix_tokens_have_none(vit):
    assert not vit.pos_embed[0, :2].any()
    patches = vit.pos_embed[0, 2:].unflatten(0, (8, 8))
    assert_close(patches.square().sum(-1), torch.full((8, 8), 48.0))  # a sine and a cosine of every frequency
    nearness = (patches[0, 0] * patches[0]).sum(-1)
    assert (nearness[0] > nearness[1:]).all()


def test_it_stays_on_the_network_and_its_seed_decides(vit):
    torch.manual_seed(0)
    again = models.create(**vit.creation)
    assert vit.creation["init"] == "mimetic"
    assert_close(dict(again.state_dict()), dict(vit.state_dict()), rtol=0, atol=0)
    assert vit(torch.zeros(1, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize("name", ["resnet10t", "dearkd_tiny_patch16_224"])
def test_networks_without_plain_attention_are_refused(name):
    with pytest.raises(ValueError, match="mimetic initialisation is for timm's plain vision transformers"):
        models.create(name, init="mimetic", num_classes=10)


def test_an_unknown_initialisation_is_refused():
    with pytest.raises(ValueError, match="init must be '' or 'mimetic'"):
        models.create("resnet10t", init="mimetik")
