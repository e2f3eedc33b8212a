"""Attention against its equation, Grad-CAM on a network whose evidence is known."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from hdkd_lib import explain, models

SMALL = {"depth": 2, "embed_dim": 64, "num_heads": 2}
VITS = {"hdkd_student_nano": {}, "hdkd_student_distilled_nano": {}, "deit_tiny_distilled_patch16_224": SMALL}
IMAGES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=VITS)
def vit(request):
    """A transformer for 32x48 images, six patches, whose attention is far from uniform."""
    torch.manual_seed(0)
    model = models.create(request.param, num_classes=10, img_size=(32, 48), **VITS[request.param]).eval()
    for block in model.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.3)
    return model


def attention_by_hand(model, block):
    """softmax(q k^T / sqrt(d)) of one block, from what its qkv layer gives."""
    attention, caught = model.blocks[block].attn, []
    hook = attention.qkv.register_forward_hook(lambda _m, _i, output: caught.append(output))
    with torch.no_grad():
        model(IMAGES)
    hook.remove()
    q, k, _ = caught[0].unflatten(2, (3, attention.num_heads, attention.head_dim)).permute(2, 0, 3, 1, 4)
    return (q @ k.transpose(2, 3) / attention.head_dim**0.5).softmax(-1)


def test_attention_is_the_softmax_of_scaled_products_in_every_block(vit):
    maps = explain.attention_maps(vit, IMAGES)
    assert [tuple(m.shape) for m in maps] == [(2, 2, vit.num_prefix_tokens + 6, vit.num_prefix_tokens + 6)] * 2
    for block, attention in enumerate(maps):
        assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
        assert_close(attention, attention_by_hand(vit, block))
        assert attention.std() > 0.05


@pytest.mark.parametrize("training", [True, False])
def test_attention_is_that_of_eval_mode_and_the_mode_stays(build, batch, training):
    model = build().train(training)
    assert_close(explain.attention_maps(model, batch[0]), explain.attention_maps(build().eval(), batch[0]))
    assert_close(model.state_dict(), build().state_dict(), rtol=0, atol=0)
    assert model.training == training


@pytest.mark.parametrize("name", ["hdkd_teacher_nano", "test_resnet"])
def test_networks_without_attention_are_refused(name, build, batch):
    with pytest.raises(ValueError, match="has no fused attention to look at; take a vision transformer"):
        explain.attention_maps(build(name), batch[0])
    with pytest.raises(ValueError, match="has 0 prefix tokens"):
        explain.token_attention(build(name), batch[0])


def test_a_tokens_attention_lies_on_the_patch_grid_and_sums_to_one(vit):
    prefix, looked = vit.num_prefix_tokens, {}
    for token, block in itertools.product(range(prefix), (0, -1)):
        row = attention_by_hand(vit, block)[:, :, token, prefix:].mean(1)
        looked[token, block] = explain.token_attention(vit, IMAGES, token, block)
        assert_close(looked[token, block], (row / row.sum(1, keepdim=True)).reshape(2, 2, 3))
        assert_close(looked[token, block].sum((1, 2)), torch.ones(2))
    assert_close(explain.token_attention(vit, IMAGES), looked[0, -1], rtol=0, atol=0)
    assert prefix == 1 or not torch.allclose(looked[0, -1], looked[1, -1], atol=0.01)
    for token in (-1, prefix):
        with pytest.raises(ValueError, match=rf"has {prefix} prefix tokens \(asked for token {token}, counted from 0"):
            explain.token_attention(vit, IMAGES, token)


class Corners(nn.Module):
    """The score of class 0 is the brightness of the upper left twenty-fourth of the image, of class 1 of the lower right."""

    num_classes = 2

    def __init__(self):
        super().__init__()
        self.masks = nn.Parameter(torch.zeros(2, 4, 6))
        self.masks.data[0, 0, 0] = self.masks.data[1, -1, -1] = 1
        self.stage = nn.Identity()

    def forward(self, images):
        return self.stage(F.avg_pool2d(images, 8) * self.masks).mean((2, 3))


def test_grad_cam_finds_the_corner_that_a_class_depends_on():
    images = torch.rand(2, 1, 32, 48, generator=torch.Generator().manual_seed(0)) + torch.linspace(0, 1, 48)  # brighter right
    upper_left, lower_right = explain.grad_cam(Corners().requires_grad_(False), images, "stage", torch.tensor([0, 1]))
    assert upper_left.shape == lower_right.shape == (32, 48)
    for heat, corner in ((upper_left, (slice(8), slice(8))), (lower_right, (slice(-8, None), slice(-8, None)))):
        assert heat[corner].max() == heat.max() == pytest.approx(1, abs=1e-4)
        assert heat.min() == 0
    assert_close(explain.grad_cam(Corners(), images, "stage"), torch.stack([lower_right] * 2))  # what it predicts


def test_grad_cam_explains_frozen_networks_and_leaves_them_frozen(build, batch):
    free, partly, frozen = (build("hdkd_teacher_nano") for _ in range(3))
    partly.stages.requires_grad_(False)
    frozen.requires_grad_(False)
    maps = []
    for model in (free, partly, frozen):
        before = [p.requires_grad for p in model.parameters()]
        maps.append(explain.grad_cam(model, batch[0], "stages.2", batch[1]))
        assert [p.requires_grad for p in model.parameters()] == before
        assert all(p.grad is None for p in model.parameters())
    assert maps[0].shape == (8, 16, 16)
    assert 0 <= maps[0].min() < maps[0].max() <= 1
    assert_close(maps[1:], [maps[0]] * 2)


def test_attention_distance_is_that_of_the_patches_a_query_looks_at(vit, monkeypatch):
    prefix, grid = vit.num_prefix_tokens, vit.patch_embed.dynamic_feat_size((32, 48))
    count = prefix + grid[0] * grid[1]
    own, uniform = torch.eye(count), torch.full((count, count), 1 / count)
    monkeypatch.setattr(explain, "attention_maps", lambda *_: [torch.stack([own, uniform]).expand(2, -1, -1, -1)])
    distances = explain.attention_distance(vit, IMAGES)
    centres = [(16 * y, 16 * x) for y in range(grid[0]) for x in range(grid[1])]  # patches of 16 pixels
    between = [((a - c) ** 2 + (b - d) ** 2) ** 0.5 for a, b in centres for c, d in centres]
    assert grid == (2, 3)
    assert_close(distances, torch.tensor([[0.0, sum(between) / len(between)]]))


def test_grad_cam_refuses_classes_and_layers_that_are_not_there_and_leaves_no_trace():
    model = Corners().requires_grad_(False).train()
    for change, error in (({"classes": torch.tensor([2])}, ValueError), ({"layer": "stages"}, AttributeError)):
        with pytest.raises(error):
            explain.grad_cam(model, IMAGES[:1], **({"layer": "stage"} | change))
    assert model.training
    assert not model.masks.requires_grad


def test_modes_of_frozen_parts_are_given_back():
    network = models.create("vit_tiny_patch16_224", num_classes=2, img_size=32, **SMALL).train()
    network.blocks[0].eval()
    before = {name: module.training for name, module in network.named_modules()}
    explain.attention_maps(network, torch.randn(1, 3, 32, 32))
    assert {name: module.training for name, module in network.named_modules()} == before


def test_position_kernels_are_seen_from_the_middle_of_the_grid(build):
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
    network = build("dearkd_tiny_patch16_224", conv_blocks=1, conv_options={"strength": 50.0}, **options)
    [kernels] = explain.position_kernels(network)
    assert kernels.shape == (2, 4, 4)
    assert [int(kernel.argmax()) for kernel in kernels] == [2 * 4 + 2, 1 * 4 + 2]
    assert (
        explain.position_kernels(build("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=8, depth=1, num_heads=2))
        == []
    )
