"""Locality guidance: its formula, term by term, and what it must not do."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from hdkd_lib.methods import LocalityGuidance, Supervised
from hdkd_lib.methods.locality import guidance_loss

VIT = {"name": "deit_tiny_distilled_patch16_224", "img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}


@pytest.fixture
def make(build):
    def make(**options):
        student, teacher = build(**VIT), build("hdkd_teacher_nano", seed=7)
        return LocalityGuidance(student=student, teacher=teacher, **{"taps": {0: 4, 2: 8}} | options).double()

    return make


def test_the_loss_is_its_formula(make, batch):
    task, (images, y) = make(guidance_weight=1.7).train(), (batch[0].double(), batch[1])
    tokens, hidden = task.student.forward_intermediates(images, [0, 2])
    with torch.no_grad():
        _, maps = task.teacher.network.forward_intermediates(images, [1, 2])
    assert [tuple(m.shape[2:]) for m in (*hidden, *maps)] == [(4, 4), (4, 4), (4, 4), (2, 2)]
    class_loss = F.cross_entropy(task.student.forward_head(tokens), y)
    guidance = torch.zeros(())
    for block, found, taught in zip((0, 2), hidden, maps, strict=True):
        taught = F.interpolate(taught, size=(4, 4), mode="bilinear", align_corners=False)  # the larger grid
        projection = task.auxiliary[f"projection{block}"]
        projected = torch.einsum("bdhw,cd->bchw", found, projection.weight[:, :, 0, 0]) + projection.bias[:, None, None]
        guidance = guidance + (projected - taught).square().mean()
    terms = task(images, y)
    assert_close(terms["class_loss"], class_loss)
    assert_close(terms["guidance_loss"], guidance)
    assert_close(terms["loss"], class_loss + 1.7 * guidance)


def test_student_and_projections_learn_and_the_teacher_does_not(make, batch):
    task = make()
    before = {name: value.clone() for name, value in task.teacher.state_dict().items()}
    task.train()(batch[0].double(), batch[1])["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in task.auxiliary.parameters())
    assert task.student.patch_embed.proj.weight.grad.any()
    assert not any(p.requires_grad for p in task.teacher.parameters())
    assert_close(dict(task.teacher.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"guidance_weight": 0.0}, {"taps": {}}, {"distill_until": 0.5}])
def test_without_guidance_it_is_training_without_a_teacher(make, batch, options):
    task = make(**options).train()
    task.set_progress(0.75)
    plain = Supervised(student=task.student).train()
    images = batch[0].double()
    assert_close(task(images, batch[1])["loss"], plain(images, batch[1])["loss"])


def test_maps_are_compared_on_the_larger_grid_of_each_side():
    student, teacher = torch.randn(2, 3, 4, 2), torch.randn(2, 3, 2, 6)
    expected = [F.interpolate(of, size=(4, 6), mode="bilinear") for of in (student, teacher)]
    assert_close(guidance_loss(student, teacher), (expected[0] - expected[1]).square().mean())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_weight": -1.0}, "guidance_weight must be at least 0"),
        ({"taps": {3: 4}}, "taps name block 3; the student has blocks 0 to 2"),
        ({"taps": {0: 16}}, "taps ask for the teacher's map of stride 16; HDKDTeacher has strides 2, 4, 8"),
    ],
)
def test_a_wrong_option_is_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_networks_of_the_other_family_are_refused(build):
    with pytest.raises(ValueError, match="LocalityGuidance needs a vision transformer as student"):
        LocalityGuidance(student=build("resnet10t"), teacher=build("hdkd_teacher_nano"))
    with pytest.raises(ValueError, match="LocalityGuidance needs a CNN as teacher"):
        LocalityGuidance(student=build(**VIT), teacher=build(**VIT))
