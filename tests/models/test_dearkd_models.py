"""Convolutional attention against plain attention, its own formula and a convolution; the networks that have it."""

import copy
import io
import itertools
import json

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import Attention
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.testing import assert_close

from hdkd_lib import models
from hdkd_lib.explain import attention_maps
from hdkd_lib.models.dearkd import MODES, ConvAttention, convert_attention, nearest_offsets

SMALL = {"num_classes": 5, "img_size": 64, "embed_dim": 24, "num_heads": 3, "depth": 3}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def dearkd(**arguments) -> nn.Module:
    """A network of 4 x 4 patches whose two first blocks know positions, each head others."""
    torch.manual_seed(0)
    network = models.create("dearkd_tiny_patch16_224", **SMALL | {"conv_blocks": 2} | arguments)
    for block in network.blocks[: arguments.get("conv_blocks", 2)]:
        scatter(block.attn)
    return network


def scatter(attention: ConvAttention) -> ConvAttention:
    """Position weights and gates at random; queries and keys far from uniform attention."""
    with torch.no_grad():
        attention.qkv.weight.normal_(std=0.3)
        attention.position_weight.normal_(std=0.4)
        if attention.gate is not None:
            attention.gate.normal_()
    return attention


def layer(grid=(3, 5), prefix=2, heads=3, **options) -> ConvAttention:
    plain = Attention(4 * heads, num_heads=heads, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm)
    return scatter(ConvAttention(plain, grid, prefix, **options)).double()


def tokens_for(attention: ConvAttention, batch: int = 2) -> torch.Tensor:
    count = attention.prefix + attention.grid[0] * attention.grid[1]
    return torch.randn(batch, count, attention.qkv.in_features, dtype=torch.float64)


def content_alone(attention: ConvAttention, x: torch.Tensor) -> torch.Tensor:
    """timm's attention, with the same modules."""
    plain = Attention(attention.qkv.in_features, num_heads=attention.num_heads, qkv_bias=True).double()
    for name in ("qkv", "q_norm", "k_norm", "proj"):
        setattr(plain, name, copy.deepcopy(getattr(attention, name)))
    return plain(x)


def naive(attention: ConvAttention, x: torch.Tensor) -> torch.Tensor:
    """The layer as its formulas stand, with the whole matrix of scores."""
    (h, w), prefix, heads = attention.grid, attention.prefix, attention.num_heads
    p = torch.zeros(heads, h * w, h * w, dtype=x.dtype)
    places = list(itertools.product(range(h), range(w)))
    for i, query in enumerate(places):
        for j, key in enumerate(places):
            d_y, d_x = key[0] - query[0], key[1] - query[1]
            features = torch.tensor([d_y**2 + d_x**2, d_y, d_x], dtype=x.dtype)
            p[:, i, j] = attention.position_weight @ features
    q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in attention.qkv(x).chunk(3, 2))
    q, k = attention.q_norm(q), attention.k_norm(k)
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    if attention.mode == "add":
        scores[:, :, prefix:, prefix:] += p
        A = scores.softmax(-1)
    else:
        A, s = scores.softmax(-1), torch.sigmoid(attention.gate)[:, None, None]
        of_patches = torch.cat([torch.zeros(heads, h * w, prefix), p.softmax(-1)], 2)
        A = torch.cat([A[:, :, :prefix], (1 - s) * A[:, :, prefix:] + s * of_patches], 2)
    return attention.proj((A @ v).transpose(1, 2).flatten(2))


# The layer


@pytest.mark.parametrize("mode", MODES)
def test_without_position_it_is_plain_attention(mode):
    attention = layer(mode=mode, pos_drop=0.0)
    x = tokens_for(attention)
    assert (attention(x) - content_alone(attention, x)).abs().max() > 0.01
    with torch.no_grad():
        if mode == "add":
            attention.position_weight.zero_()
        else:
            attention.gate.fill_(-1e4)
    assert_close(attention(x), content_alone(attention, x), rtol=0, atol=1e-12)


def test_strength_zero_in_mode_add_is_plain_attention_and_the_gate_starts_at_its_argument():
    x = tokens_for(layer())
    plain = Attention(12, num_heads=3, qkv_bias=True).double()
    assert_close(ConvAttention(plain, (3, 5), 2, mode="add", strength=0.0)(x), plain(x), rtol=0, atol=1e-12)
    converted = ConvAttention(plain, (3, 5), 2, gate=-2.0, strength=3.0)
    assert converted.gate.tolist() == [-2.0] * 3
    assert converted.position_weight.tolist() == [[-3, 0, 0], [-3, -6, 0], [-3, 0, -6]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("grid", [(3, 5), (4, 2), (1, 4)])
def test_the_output_and_its_gradients_are_those_of_the_formula(mode, prefix, grid):
    attention = layer(grid, prefix, mode=mode, pos_drop=0.0)
    x = tokens_for(attention).requires_grad_()
    direction = torch.randn_like(x)
    assert_close(attention(x), naive(attention, x), rtol=1e-5, atol=1e-6)  # positions are float32
    sources = [x, *attention.parameters()]
    ours, by_hand = (torch.autograd.grad((f(x) * direction).sum(), sources) for f in (attention, lambda x: naive(attention, x)))
    assert_close(ours, by_hand, rtol=1e-4, atol=1e-5)
    names = [name for name, _ in attention.named_parameters()]
    assert ours[1 + names.index("position_weight")].abs().max() > 1e-3


@given(st.integers(1, 40))
def test_nearest_offsets_are_the_nearest_and_each_is_there_once(count):
    offsets = nearest_offsets(count)
    assert offsets.shape == (count, 2)
    assert offsets[0].tolist() == [0, 0]
    squares = offsets.square().sum(1)
    assert squares.tolist() == sorted(squares.tolist())
    assert len(set(map(tuple, offsets.tolist()))) == count
    assert offsets.equal(offsets.round())
    nearer = sum(y * y + x * x < squares[-1] for y in range(-count, count + 1) for x in range(-count, count + 1))
    assert nearer <= count - 1, "no offset nearer than the last is missing"


def test_nine_heads_start_at_the_places_of_a_3x3_convolution():
    assert set(map(tuple, nearest_offsets(9).int().tolist())) == set(itertools.product((-1, 0, 1), repeat=2))


@pytest.mark.parametrize(("heads", "grid"), [(3, (4, 4)), (9, (5, 6)), (12, (5, 6))])
def test_sharp_positions_shift_by_each_heads_centre(heads, grid):
    attention = ConvAttention(Attention(heads, num_heads=heads), grid, 1, strength=50.0)
    positions = attention.position_attention()
    h, w = grid
    assert positions.shape == (heads, h * w, h * w)
    assert_close(positions.sum(-1), torch.ones(heads, h * w))
    checked = 0
    for head, (d_y, d_x) in enumerate(nearest_offsets(heads).int().tolist()):
        for y, x in itertools.product(range(h), range(w)):
            if 0 <= y + d_y < h and 0 <= x + d_x < w:
                shifted = F.one_hot(torch.tensor((y + d_y) * w + x + d_x), h * w).float()
                assert_close(positions[head, y * w + x], shifted, rtol=0, atol=1e-20)
                checked += 1
    assert checked > heads * h * w / 2


def test_position_attention_is_the_softmax_of_the_scores():
    attention = layer((2, 4), heads=2)
    rows, columns = attention.position_scores()
    assert rows.shape == (2, 2, 2)
    assert columns.shape == (2, 4, 4)
    p = torch.stack([rows[:, i // 4, j // 4] + columns[:, i % 4, j % 4] for i in range(8) for j in range(8)], 1)
    assert_close(attention.position_attention(), p.unflatten(1, (8, 8)).softmax(-1))


def test_a_layer_set_by_hand_is_a_convolution():
    channels, (h, w), prefix = 4, (5, 6), 2
    kernel = torch.randn(channels, channels, 3, 3, dtype=torch.float64)
    plain = Attention(channels, num_heads=9, attn_head_dim=channels, proj_bias=False).double()
    attention = ConvAttention(plain, (h, w), prefix, gate=1e4, strength=50.0).eval()
    with torch.no_grad():
        attention.qkv.weight[-9 * channels :] = torch.eye(channels).repeat(9, 1)
        places = nearest_offsets(9).int() + 1
        attention.proj.weight.copy_(torch.cat([kernel[:, :, y, x] for y, x in places], 1))
    x = tokens_for(attention)
    output = attention(x)[:, prefix:].transpose(1, 2).unflatten(2, (h, w))
    maps = x[:, prefix:].transpose(1, 2).unflatten(2, (h, w))
    assert_close(output, F.conv2d(F.pad(maps, (1, 1, 1, 1), mode="replicate"), kernel), rtol=0, atol=1e-10)
    assert_close(output[:, :, 1:-1, 1:-1], F.conv2d(maps, kernel), rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_attention_is_fused(mode, monkeypatch):
    calls, fused = [], F.scaled_dot_product_attention

    def count(*args, **kwargs):
        calls.append(kwargs.get("attn_mask") is not None)
        return fused(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    attention = layer(mode=mode)
    attention(tokens_for(attention))
    assert calls == [mode == "add"]


@pytest.mark.parametrize("mode", MODES)
def test_dropout_of_attention_and_of_the_projection_are_in_training_alone(mode):
    plain = Attention(12, num_heads=3, attn_drop=0.5, proj_drop=0.0).double()
    attention = ConvAttention(plain, (3, 5), 2, mode=mode, pos_drop=0.0)
    x = tokens_for(attention)
    assert attention(x).sub(attention(x)).abs().max() > 1e-3
    assert torch.equal(attention.eval()(x), attention(x))
    attention.proj_drop.p = 1.0
    assert attention.train()(x).abs().max() == 0


# Dropout of positions


@pytest.mark.parametrize("mode", MODES)
def test_positions_are_dropped_in_training_alone(mode):
    always, never = layer(mode=mode, pos_drop=1.0), layer(mode=mode, pos_drop=0.0)
    never.load_state_dict(always.state_dict())
    x = tokens_for(always)
    assert_close(always.train()(x), content_alone(always, x), rtol=0, atol=1e-12)
    assert_close(always.eval()(x), never.eval()(x), rtol=0, atol=0)
    assert_close(never.train()(x), never.eval()(x), rtol=0, atol=1e-12)
    assert (always(x) - content_alone(always, x)).abs().max() > 0.01


@pytest.mark.parametrize("mode", MODES)
def test_a_query_of_a_head_loses_its_positions_as_a_whole_or_not_at_all(mode):
    attention = layer((4, 4), mode=mode, pos_drop=0.25)
    attention.proj = nn.Identity()
    x = tokens_for(attention, batch=16)
    mixed, whole = attention.train()(x), attention.eval()(x)
    with torch.no_grad():
        content = content_alone(attention, x)
    is_content, is_whole = (
        (mixed - other).abs().unflatten(2, (attention.num_heads, -1)).amax(-1) < 1e-9 for other in (content, whole)
    )
    assert (is_content | is_whole).all()
    assert_close(mixed[:, :2], content[:, :2])
    dropped = is_content[:, 2:].double()  # (images, queries, heads)
    assert dropped.mean().item() == pytest.approx(0.25, abs=0.06)  # 768 draws
    for dim in range(3):
        assert dropped.amax(dim).ne(dropped.amin(dim)).any(), "images, queries and heads lose different ones"


# Networks


def test_without_convolutional_blocks_it_is_deit():
    network = models.create("dearkd_tiny_patch16_224", **SMALL, conv_blocks=0).eval()
    deit = models.create("deit_tiny_distilled_patch16_224", **SMALL).eval()
    deit.load_state_dict(network.state_dict())
    assert torch.equal(network(IMAGES), deit(IMAGES))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("blocks", [1, 3])
def test_the_entries_are_deits_and_the_positions_of_the_first_blocks(mode, blocks):
    network = models.create("dearkd_tiny_patch16_224", **SMALL, conv_blocks=blocks, conv_mode=mode)
    deit = models.create("deit_tiny_distilled_patch16_224", **SMALL)
    kinds = ("position_weight", "gate") if mode == "gate" else ("position_weight",)
    new = {f"blocks.{i}.attn.{kind}" for i in range(blocks) for kind in kinds}
    assert network.state_dict().keys() == deit.state_dict().keys() | new
    assert [type(block.attn) for block in network.blocks] == [ConvAttention] * blocks + [Attention] * (3 - blocks)


@pytest.mark.parametrize(("size", "width", "heads"), [("tiny", 192, 3), ("small", 384, 6), ("base", 768, 12)])
def test_the_registered_networks_are_deits_with_four_blocks_of_mode_gate(size, width, heads):
    with torch.device("meta"):
        network = timm.create_model(f"dearkd_{size}_patch16_224")
    assert (network.embed_dim, len(network.blocks), network.num_prefix_tokens) == (width, 12, 2)
    assert [isinstance(block.attn, ConvAttention) for block in network.blocks] == [True] * 4 + [False] * 8
    for block in network.blocks[:4]:
        assert (block.attn.mode, block.attn.pos_drop, block.attn.grid) == ("gate", 0.1, (14, 14))
        assert block.attn.position_weight.shape == (heads, 3)


def test_options_go_through_create_and_into_the_description():
    options = {"conv_blocks": 1, "conv_mode": "add", "conv_options": {"strength": 2.0, "pos_drop": 0.0}}
    network = models.create("dearkd_tiny_patch16_224", **SMALL, **options)
    attention = network.blocks[0].attn
    assert (attention.mode, attention.pos_drop, attention.position_weight[0].tolist()) == ("add", 0.0, [-2, 0, 0])
    assert isinstance(network.blocks[1].attn, Attention)
    description = models.describe(network)
    assert description == network.creation == {"name": "dearkd_tiny_patch16_224", **SMALL, **options}
    again = models.create(**json.loads(json.dumps(description)))
    again.load_state_dict(network.state_dict())
    assert torch.equal(again.eval()(IMAGES), network.eval()(IMAGES))


@pytest.mark.parametrize("mode", MODES)
def test_it_trains_under_bf16_autocast(mode):
    network = dearkd(conv_mode=mode, conv_options={"pos_drop": 0.0})
    exact = network(IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        output = network(IMAGES)
    assert output.dtype == torch.bfloat16
    assert_close(output.float(), exact, rtol=0.05, atol=0.05)
    output.float().square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all(), name
    assert all(block.attn.position_weight.grad.abs().max() > 0 for block in network.blocks[:2])


@pytest.mark.parametrize("mode", MODES)
def test_it_compiles_without_a_graph_break(mode):
    network = dearkd(conv_mode=mode, depth=1, conv_blocks=1, conv_options={"pos_drop": 0.0})
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    outputs = [f(IMAGES) for f in (compiled, network)]
    assert_close(*outputs)
    weights = [network.blocks[0].attn.position_weight, network.patch_embed.proj.weight]
    assert_close(*(torch.autograd.grad(output.square().sum(), weights) for output in outputs), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("way", ["copy", "file"])
def test_a_copy_is_a_network_of_its_own(way):
    network = dearkd().eval()
    if way == "copy":
        other = copy.deepcopy(network)
    else:
        torch.save(network, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    expected = network(IMAGES)
    assert torch.equal(other(IMAGES), expected)
    other.set_input_size((32, 64))
    assert other(IMAGES[:, :, :32]).shape == (2, 5)
    assert [block.attn.grid for block in network.blocks[:2]] == [(4, 4)] * 2
    assert [block.attn.grid for block in other.blocks[:2]] == [(2, 4)] * 2
    assert torch.equal(network(IMAGES), expected)
    other.blocks = other.blocks[:1]
    assert {name for name in other.no_weight_decay() if "attn" in name} == {
        "blocks.0.attn.position_weight",
        "blocks.0.attn.gate",
    }
    assert "blocks.1.attn.gate" in network.no_weight_decay()


@pytest.mark.parametrize("mode", MODES)
def test_another_input_size_gives_another_grid(mode):
    network, other = dearkd(conv_mode=mode).eval(), dearkd(conv_mode=mode, img_size=(32, 64)).eval()
    network.set_input_size((32, 64))
    other.load_state_dict(network.state_dict())
    assert network.blocks[0].attn.grid == (4, 4), "set by the next batch"
    assert torch.equal(network(IMAGES[:, :, :32]), other(IMAGES[:, :, :32]))
    assert network.blocks[1].attn.grid == (2, 4)


def test_sizes_may_change_from_batch_to_batch():
    network = dearkd(dynamic_img_size=True).eval()
    first, wide, tall, again = (network(images) for images in (IMAGES, IMAGES[:, :, :32], IMAGES[..., :32], IMAGES))
    assert torch.equal(first, again)
    for output, size in ((wide, (32, 64)), (tall, (64, 32))):
        fixed = copy.deepcopy(network)
        fixed.set_input_size(size)
        assert_close(output, fixed(IMAGES[:, :, : size[0], : size[1]]), rtol=1e-5, atol=1e-6)
    assert (wide - tall).abs().max() > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_training_may_follow_inference_mode(mode):
    network = dearkd(conv_mode=mode)
    with torch.inference_mode():
        network(IMAGES)
    network.train()(IMAGES).square().sum().backward()
    assert network.blocks[0].attn.position_weight.grad.abs().max() > 0


@pytest.mark.parametrize("mode", MODES)
def test_gradient_checkpointing_changes_no_gradient(mode):
    gradients = []
    for is_checkpointed in (False, True):
        network = dearkd(conv_mode=mode, conv_options={"pos_drop": 0.5}).train()
        network.set_grad_checkpointing(is_checkpointed)
        torch.manual_seed(3)
        network(IMAGES).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    assert_close(*gradients)


def test_the_classifier_can_be_reset():
    network = dearkd()
    network.reset_classifier(7)
    assert network(IMAGES).shape == (2, 7)
    assert models.describe(network)["num_classes"] == 7


# Conversion


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["dearkd_tiny_patch16_224", "vit_tiny_patch16_224"])
def test_new_parameters_do_not_decay_and_old_names_stay(name, mode):
    if name == "vit_tiny_patch16_224":
        network = convert_attention(models.create(name, **SMALL), 2, mode)
    else:
        network = dearkd(conv_mode=mode)
    attentions = {f"blocks.{i}.attn": block.attn for i, block in enumerate(network.blocks)}
    attentions = {i: attention for i, attention in attentions.items() if isinstance(attention, ConvAttention)}
    assert len(attentions) == 2
    new = {f"{i}.position_weight" for i in attentions} | {f"{i}.gate" for i, a in attentions.items() if a.gate is not None}
    assert network.no_weight_decay() == type(network).no_weight_decay(network) | new
    assert {"pos_embed", "cls_token"} <= network.no_weight_decay()
    groups = param_groups_weight_decay(network, 0.05, no_weight_decay_list=network.no_weight_decay())
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    of = {name: decays[id(parameter)] for name, parameter in network.named_parameters()}
    assert {of[name] for name in new} == {0.0}
    assert of["pos_embed"] == 0.0
    assert of["blocks.0.attn.qkv.weight"] == of["blocks.2.mlp.fc1.weight"] == 0.05


@pytest.mark.parametrize("options", [{"mode": "gate", "gate": -1e4}, {"mode": "add", "strength": 0.0}])
def test_conversion_keeps_weights_and_can_keep_the_function(options):
    vit = models.create("vit_tiny_patch16_224", **SMALL).eval()
    before, output = copy.deepcopy(vit.state_dict()), vit(IMAGES)
    parameters = dict(vit.named_parameters())
    assert convert_attention(vit, 3, **options) is vit
    assert all(vit.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert_close({name: vit.state_dict()[name] for name in before}, before, rtol=0, atol=0)
    assert_close(vit(IMAGES), output, rtol=1e-5, atol=1e-6)
    assert vit.blocks[0].attn.prefix == 1


def test_registers_and_other_prefix_tokens_are_counted():
    vit = timm.create_model("vit_wee_patch16_reg1_gap_256", num_classes=5, img_size=64, embed_dim=24, num_heads=3, depth=1)
    prefix = vit.num_prefix_tokens
    convert_attention(vit, 1)
    assert vit.blocks[0].attn.prefix == prefix == 1
    assert vit(IMAGES).shape == (2, 5)


# What it attends to


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["dearkd_tiny_patch16_224", "vit_tiny_patch16_224"])
def test_attention_maps_are_what_the_values_are_summed_by(mode, name):
    if name == "dearkd_tiny_patch16_224":
        network = dearkd(conv_mode=mode)
    else:
        network = convert_attention(models.create(name, **SMALL), 2, mode)
        for block in network.blocks[:2]:
            scatter(block.attn)
    caught = []
    for block in network.eval().blocks:
        block.attn.register_forward_hook(lambda module, inputs, output: caught.append((module, inputs[0], output)))
    maps = attention_maps(network, IMAGES)
    assert len(maps) == len(caught) == 3
    for A, (attention, x, output) in zip(maps, caught, strict=True):
        assert_close(A.sum(-1), torch.ones(A.shape[:-1]))
        values = attention.qkv(x).chunk(3, 2)[2].unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
        assert_close(attention.proj((A @ values).transpose(1, 2).flatten(2)), output, rtol=1e-4, atol=1e-5)
    if mode == "gate":
        positions, s = network.blocks[0].attn.position_attention(), network.blocks[0].attn.gate.sigmoid()
        assert (maps[0][:, :, -16:, -16:] >= s[:, None, None] * positions - 1e-6).all()


# Failures are sentences


def test_an_unknown_mode_is_refused_and_the_network_stays():
    vit = models.create("vit_tiny_patch16_224", **SMALL)
    with pytest.raises(ValueError, match=r"conv_mode must be one of gate, add \(got 'multiply'\)"):
        convert_attention(vit, 1, "multiply")
    assert all(type(block.attn) is Attention for block in vit.blocks)
    with pytest.raises(ValueError, match=r"conv_mode must be one of gate, add \(got 'gated'\)"):
        models.create("dearkd_tiny_patch16_224", **SMALL, conv_blocks=3, conv_mode="gated")


@pytest.mark.parametrize("blocks", [4, -1])
def test_blocks_that_the_network_does_not_have_are_refused(blocks):
    vit = models.create("vit_tiny_patch16_224", **SMALL)
    with pytest.raises(ValueError, match=rf"VisionTransformer has 3 transformer blocks.*; {blocks} cannot be converted"):
        convert_attention(vit, blocks)
    with pytest.raises(ValueError, match=rf"VisionTransformerDistilled has 3 .*; {blocks} cannot be converted"):
        models.create("dearkd_tiny_patch16_224", **SMALL, conv_blocks=blocks)


def test_a_cnn_is_refused():
    with pytest.raises(ValueError, match="ResNet has 0 transformer blocks on a grid of patches; 4 cannot be converted"):
        convert_attention(timm.create_model("test_resnet"))


def test_attention_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"can take the place of timm's plain Attention \(got Attention\("):
        ConvAttention(Attention(12, num_heads=3, gated=True), (2, 2), 1)
    with pytest.raises(ValueError, match=r"can take the place of timm's plain Attention \(got ConvAttention\("):
        convert_attention(dearkd(), 1)


def test_patch_dropout_and_masks_are_refused():
    network = dearkd(patch_drop_rate=0.5).train()
    with pytest.raises(ValueError, match=r"takes all 2 \+ 4 x 4 tokens and no mask \(got 9 tokens\).*without patch dropout"):
        network(IMAGES)
    attention = layer()
    x = tokens_for(attention)
    for mask in ({"attn_mask": torch.ones(17, 17, dtype=torch.bool)}, {"is_causal": True}):
        with pytest.raises(ValueError, match="all 2 \\+ 3 x 5 tokens and no mask"):
            attention(x, **mask)
