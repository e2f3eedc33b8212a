"""The networks against the official code's values and timm's contract."""

import copy

import pytest
import timm
import torch
from torch.testing import assert_close

from hdkd_lib import models

FULL = ["hdkd_teacher", "hdkd_student", "hdkd_student_distilled"]
NAMES = [name + size for name in FULL for size in ("", "_nano")]
STUDENTS = [name for name in NAMES if "student" in name]


def on_meta(name: str, **arguments):
    """The network without memory for its weights: counting needs none."""
    with torch.device("meta"):
        return models.create(name, **arguments)


@pytest.fixture(scope="module", params=NAMES)
def network(request):
    torch.manual_seed(0)
    return models.create(request.param, num_classes=7, img_size=32).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# The official code


@pytest.mark.parametrize("net", ["teacher", "student", "distilled"])
def test_networks_give_the_official_logits_and_stage_statistics(net, golden, golden_network, golden_images):
    network = golden_network(net).eval()
    with torch.no_grad():
        features, stages = network.forward_intermediates(golden_images, [0, 1, 2])
    if net == "distilled":
        logits = {"distilled_class": network.head(features[:, 0]), "distilled_distillation": network.head_dist(features[:, 1])}
    else:
        logits = {net: network.forward_head(features)}
    for name, values in logits.items():
        assert_close(values, torch.tensor(golden["values"]["eval"][name], dtype=torch.float64), rtol=0, atol=1e-8)
    if net != "student":
        measured = torch.stack([torch.stack([stage.mean(), stage.std()]) for stage in stages])
        expected = torch.tensor(golden["values"]["eval_stage_mean_std"][net], dtype=torch.float64)
        assert_close(measured, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "constant", "per_class", "of_7", "of_4"),
    [
        ("hdkd_teacher", 3_947_774, 129, 3_948_677, 3_948_290),
        ("hdkd_student", 3_723_178, 257, 3_724_977, 3_724_206),
        ("hdkd_student_distilled", 3_723_690, 514, 3_727_288, 3_725_746),
    ],
)
def test_parameter_counts_are_the_papers_for_every_class_count(name, constant, per_class, of_7, of_4):
    for classes, expected in ((7, of_7), (4, of_4), (100, constant + per_class * 100)):
        assert sum(p.numel() for p in on_meta(name, num_classes=classes).parameters()) == expected


@pytest.mark.parametrize(
    ("name", "variant", "expected"),
    [
        ("hdkd_student_distilled", {"gate": "se"}, 3_726_798),
        ("hdkd_student_distilled", {"gate": "none"}, 3_534_286),
        ("hdkd_teacher", {"gate": "se"}, 3_947_207),
        ("hdkd_student_distilled", {"stem_stride": 4}, 3_689_656),
    ],
)
def test_parameter_counts_of_the_variants_are_those_measured(name, variant, expected):
    assert sum(p.numel() for p in on_meta(name, num_classes=7, **variant).parameters()) == expected


@pytest.mark.parametrize(
    ("name", "variant", "gflops"),
    [
        ("hdkd_teacher", {}, 11.3997),
        ("hdkd_student", {}, 4.0447),
        ("hdkd_student_distilled", {}, 4.0507),
        ("hdkd_student_distilled", {"stem_stride": 4}, 0.998),
    ],
)
def test_forward_passes_cost_the_flops_measured_at_224(name, variant, gflops):
    assert models.cost(on_meta(name, num_classes=7, **variant), 224)["gflops"] == pytest.approx(gflops, abs=1e-3)


# timm's contract


def test_forward_is_forward_head_of_forward_features(network, images):
    with torch.no_grad():
        features = network.forward_features(images)
        logits = network(images)
        assert_close(logits, network.forward_head(features), rtol=0, atol=0)
    assert logits.shape == (2, 7)
    assert features.shape[-1 if features.ndim == 3 else 1] == network.num_features
    assert network.forward_head(features, pre_logits=True).shape == (2, network.head_hidden_size)


def test_intermediates_are_nchw_maps_as_feature_info_says(network, images):
    with torch.no_grad():
        features, maps = network.forward_intermediates(images)
    assert_close(features, network.forward_features(images), rtol=0, atol=0)
    expected = [(2, info["num_chs"], 32 // info["reduction"], 32 // info["reduction"]) for info in network.feature_info]
    assert [tuple(m.shape) for m in maps] == expected
    modules = dict(network.named_modules())
    for info, intermediate in zip(network.feature_info, maps, strict=True):
        outputs = []
        hook = modules[info["module"]].register_forward_hook(lambda _m, _i, output, outputs=outputs: outputs.append(output))
        with torch.no_grad():
            network(images)
        hook.remove()
        assert len(outputs) == 1
        if outputs[0].ndim == 3:  # tokens: the prefix is no part of the map
            outputs[0] = outputs[0][:, network.num_prefix_tokens :].transpose(1, 2).reshape(intermediate.shape)
        assert_close(outputs[0], intermediate, rtol=0, atol=0)


def test_intermediates_are_chosen_by_index_or_as_the_last_n(network, images):
    with torch.no_grad():
        _, maps = network.forward_intermediates(images)
        count = len(maps)
        for indices, chosen in (([0, 2], [0, 2]), (2, [count - 2, count - 1]), ([-1], [count - 1])):
            only = network.forward_intermediates(images, indices, intermediates_only=True)
            assert len(only) == len(chosen)
            for got, index in zip(only, chosen, strict=True):
                assert_close(got, maps[index], rtol=0, atol=0)


def test_stop_early_runs_nothing_behind_the_last_map_asked_for(network, images):
    modules = dict(network.named_modules())
    ran = []
    hooks = [
        modules[info["module"]].register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, info in enumerate(network.feature_info)
    ]
    for last in range(len(network.feature_info)):
        ran.clear()
        with torch.no_grad():
            maps = network.forward_intermediates(images, [last], stop_early=True, intermediates_only=True)
        assert len(maps) == 1
        assert ran == list(range(last + 1))
    for hook in hooks:
        hook.remove()


def test_maps_in_another_format_are_refused(network, images):
    with pytest.raises(ValueError, match="NCHW"):
        network.forward_intermediates(images, output_fmt="NLC")


@pytest.mark.parametrize("name", STUDENTS)
def test_norm_applies_the_final_layer_norm_to_token_maps_only(name, images):
    student = models.create(name, num_classes=7, img_size=32).eval()
    torch.nn.init.normal_(student.norm.weight)
    with torch.no_grad():
        tokens, normed = student.forward_intermediates(images, norm=True)
        _, raw = student.forward_intermediates(images)
    assert_close(normed[-1].flatten(2).transpose(1, 2), tokens[:, student.num_prefix_tokens :], rtol=0, atol=0)
    assert not torch.allclose(normed[-1], raw[-1])
    assert_close(normed[:3], raw[:3], rtol=0, atol=0)


def test_reset_classifier_changes_the_number_of_logits_and_removes_them_at_zero(network, images):
    fresh = copy.deepcopy(network)
    fresh.reset_classifier(5)
    assert fresh(images).shape == (2, 5)
    assert fresh.num_classes == 5
    fresh.reset_classifier(0)
    with torch.no_grad():
        assert_close(fresh(images), network.forward_head(network.forward_features(images), pre_logits=True))
    assert timm.create_model(network.creation["name"], num_classes=0, img_size=32)(images).shape == fresh(images).shape


@pytest.mark.parametrize("name", [name for name in NAMES if "nano" in name])
def test_grey_images_and_non_square_images_are_taken(name):
    assert models.create(name, num_classes=7, in_chans=1, img_size=32)(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    model = models.create(name, num_classes=7, img_size=(32, 48))
    _, maps = model.forward_intermediates(torch.randn(2, 3, 32, 48))
    assert [tuple(m.shape[2:]) for m in maps] == [(32 // f["reduction"], 48 // f["reduction"]) for f in model.feature_info]
    assert model(torch.randn(2, 3, 32, 48)).shape == (2, 7)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_that_the_strides_do_not_divide_are_refused_with_the_remedy(name):
    for size in (100, (32, 40), 8):
        with pytest.raises(ValueError, match=r"divisible by 16 \(got .*change img_size"):
            models.create(name, img_size=size)
    with pytest.raises(ValueError, match="divisible by 32"):
        models.create(name, img_size=48, stem_stride=4)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_refuses_images_of_another_size_than_it_was_made_for(name):
    with pytest.raises(ValueError, match=r"made for 32x32 images \(got 48x48\); create it with img_size=48"):
        models.create(name, img_size=32)(torch.randn(2, 3, 48, 48))


@pytest.mark.parametrize("name", [name for name in NAMES if "distilled" in name])
def test_a_distilled_student_gives_both_logits_only_while_training_with_distillation_on(name, images):
    student = copy.deepcopy(models.create(name, num_classes=7, img_size=32))  # a copy must switch itself, not its original
    assert torch.is_tensor(student.train()(images))
    student.set_distilled_training(True)
    both = student(images)
    assert isinstance(both, tuple)
    assert [tuple(logits.shape) for logits in both] == [(2, 7), (2, 7)]
    mean = student.eval()(images)
    tokens = student.forward_features(images)
    assert_close(mean, (student.head(tokens[:, 0]) + student.head_dist(tokens[:, 1])) / 2)
    student.set_distilled_training(False)
    assert torch.is_tensor(student.train()(images))


@pytest.mark.parametrize("name", [name for name in NAMES if "distilled" not in name])
def test_networks_without_a_distillation_token_do_not_claim_one(name):
    assert not hasattr(on_meta(name), "set_distilled_training")


@pytest.mark.parametrize("name", [name for name in NAMES if "nano" in name])
def test_gradient_checkpointing_leaves_every_gradient_as_it_was(name, images):
    gradients = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = models.create(name, num_classes=7, img_size=32).double().train()
        model.set_grad_checkpointing(enable)
        model(images.double()).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_a_state_dict_carries_all_that_a_network_computes_with(network, images):
    torch.manual_seed(5)
    other = models.create(network.creation["name"], num_classes=7, img_size=32).eval()
    with torch.no_grad():
        assert not torch.allclose(other(images), network(images))
        other.load_state_dict(network.state_dict())
        assert_close(other(images), network(images), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"stem_stride": 3}, "stem_stride must be 1, 2 or 4"), ({"gate": "eca"}, "gate must be one of cbam, se, none")],
)
def test_unknown_variants_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.create("hdkd_student_nano", **arguments)


def test_a_stem_of_stride_1_gives_small_images_16_tokens_and_the_same_weights():
    student = models.create("hdkd_student_distilled_nano", num_classes=10, img_size=32, stem_stride=1).eval()
    teacher = models.create("hdkd_teacher_nano", num_classes=10, img_size=32, stem_stride=1).eval()
    images = torch.randn(2, 3, 32, 32)
    for network in (student, teacher):
        maps = network.forward_intermediates(images, [0, 1, 2], intermediates_only=True)
        assert [tuple(features.shape[2:]) for features in maps] == [(32, 32), (16, 16), (8, 8)]
        assert [info["reduction"] for info in network.feature_info[:3]] == [1, 2, 4]
    assert student.forward_features(images).shape == (2, 2 + 16, 64)
    assert student.patch_embed.dynamic_feat_size((32, 32)) == (4, 4)
    strided = models.create("hdkd_student_distilled_nano", num_classes=10, img_size=64)
    assert {n: p.shape for n, p in student.named_parameters()} == {n: p.shape for n, p in strided.named_parameters()}


@pytest.mark.parametrize("name", ["hdkd_teacher_nano", "hdkd_student_nano", "hdkd_student_distilled_nano"])
def test_drop_rate_is_dropout_before_the_classifier_in_training(name):
    network, images = models.create(name, num_classes=4, img_size=32, drop_rate=0.5), torch.randn(2, 3, 32, 32)
    features = network.eval().forward_features(images)
    still = network.forward_head(features)
    assert torch.equal(network.forward_head(features), still)
    network.train()
    assert not torch.allclose(network.forward_head(features), network.forward_head(features))
