"""CSKD: the official loss, any CNN as teacher, any vision transformer as student."""

import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from hdkd_lib import models
from hdkd_lib.methods import CSKD, DeiT
from hdkd_lib.methods.cskd import SCHEDULES, decay, fuse, local_responses, patch_logits, spatial_loss

# The official loss (Zzzzz1/CSKD at fa0d8b8) on fixed random logits, 300 epochs, hard labels.
OFFICIAL_SPATIAL = {
    "linear": {0: 2.452813, 75: 2.451535, 150: 2.447946, 299: 2.371162},
    "x2": {0: 2.452813, 75: 2.459349, 150: 2.441501, 299: 2.371162},
    "cos": {0: 2.452813, 75: 2.452813, 150: 2.465398, 299: 2.371162},
}
OFFICIAL_CLASS, OFFICIAL_DISTILLATION = 3.220527, 2.654590
OFFICIAL_TOTAL = {0: 5.390371, 75: 5.389093, 150: 5.385504, 299: 5.308720}


@pytest.fixture(scope="module")
def official_logits() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    N, K = 2, 10
    logits = {name: torch.randn(N, K, generator=g) for name in ("cls", "dist")}
    logits["dense"] = torch.randn(N, 196, K, generator=g)
    logits["local"] = 2 * torch.randn(N, K, 7, 7, generator=g)
    logits["target"] = torch.zeros(N, K)
    logits["target"][0, 3], logits["target"][0, 7], logits["target"][1, 5] = 0.6, 0.4, 1
    return logits


@pytest.mark.parametrize("schedule", OFFICIAL_SPATIAL)
@pytest.mark.parametrize("epoch", [0, 75, 150, 299])
def test_the_spatial_loss_is_the_official_one(official_logits, schedule, epoch):
    local = official_logits["local"]
    fused = fuse(local, local.mean((2, 3)), decay(epoch / 300, schedule))
    patches = official_logits["dense"].unflatten(1, (14, 14)).movedim(3, 1)
    assert spatial_loss(patches, fused).item() == pytest.approx(OFFICIAL_SPATIAL[schedule][epoch], abs=1e-6)


@pytest.mark.parametrize("epoch", OFFICIAL_TOTAL)
def test_the_sum_of_the_terms_is_the_official_total(official_logits, epoch, monkeypatch):
    """The whole method, with networks that answer with the fixed logits: heads that pass on what the tokens hold."""
    student = models.create("deit_tiny_distilled_patch16_224", num_classes=10, embed_dim=10, num_heads=2, depth=1)
    for head in ("head", "head_dist"):
        setattr(student, head, torch.nn.Identity())
    tokens = torch.cat([official_logits["cls"][:, None], official_logits["dist"][:, None], official_logits["dense"]], 1)
    monkeypatch.setattr(student, "forward_features", lambda images: tokens)
    task = CSKD(student=student, teacher=models.create("hdkd_teacher_nano", num_classes=10)).train()
    local = official_logits["local"]
    monkeypatch.setattr("hdkd_lib.methods.cskd.local_responses", lambda *_: (local, local.mean((2, 3))))
    task.set_progress(epoch / 300)
    result = task(torch.zeros(2, 3, 224, 224), official_logits["target"])
    assert result["class_loss"].item() == pytest.approx(OFFICIAL_CLASS, abs=1e-6)
    assert result["distillation_loss"].item() == pytest.approx(OFFICIAL_DISTILLATION, abs=1e-6)
    assert result["loss"].item() == pytest.approx(OFFICIAL_TOTAL[epoch], abs=2e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_start_and_end_where_they_say(schedule):
    values = [decay(t, schedule) for t in (0, 0.25, 0.5, 0.75, 1)]
    start, end = {"local": (1, 1), "global": (0, 0)}.get(schedule, (1, 0))
    assert (values[0], values[-1]) == pytest.approx((start, end))
    assert values == sorted(values, reverse=True)


CNNS = [
    "convnext_atto", "densenet121", "dpn48b", "edgenext_xx_small", "efficientnet_b0", "ghostnet_050", "hdkd_teacher_nano",
    "hrnet_w18_small", "inception_v3", "mambaout_femto", "maxvit_rmlp_pico_rw_256", "mobilenetv3_small_050",
    "mobilenetv4_conv_small", "nfnet_l0", "poolformer_s12", "regnetx_002", "regnety_002", "repvgg_a0", "res2net50d",
    "resnet10t", "resnetv2_50", "rexnet_100", "tf_efficientnet_lite0", "vgg11", "xception41",
]  # fmt: skip


@pytest.mark.parametrize("name", CNNS)
def test_local_responses_are_right_for_every_family(name):
    torch.manual_seed(0)
    teacher = timm.create_model(name, num_classes=5).eval().double()
    for parameter in teacher.get_classifier().parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    size = 256 if "256" in name else 128
    images = torch.randn(1, 3, size, size, dtype=torch.float64)
    local, global_ = local_responses(teacher, images)
    assert local.shape[1] == 5
    assert local.shape[2] * local.shape[3] > 1
    with torch.no_grad():
        features = teacher.forward_features(images)
        is_last = getattr(teacher, "output_fmt", "NCHW") == "NHWC"
        assert_close(global_, teacher(images))
        for place in (0, -1):
            cell = features[:, place, place][:, None, None] if is_last else features[:, :, place, place][..., None, None]
            assert_close(local[:, :, place, place], teacher.forward_head(cell))


# These take no image as small as their stride, or make more than one cell of it.
LARGER = {"hdkd_teacher_nano", "inception_v3", "maxvit_rmlp_pico_rw_256", "vgg11", "xception41"}


@pytest.mark.parametrize("name", sorted({*CNNS} - LARGER))
def test_one_cell_answers_as_the_network_itself(name):
    teacher = timm.create_model(name, num_classes=5).eval().double()
    images = torch.randn(1, 3, *[teacher.feature_info[-1]["reduction"]] * 2, dtype=torch.float64)
    local, global_ = local_responses(teacher, images)
    assert local.shape == (1, 5, 1, 1)
    assert_close(global_, teacher(images))
    assert_close(local[:, :, 0, 0], global_)


@pytest.mark.parametrize(("name", "is_affine"), [("resnet10t", True), ("hdkd_teacher_nano", True), ("convnext_atto", False)])
def test_the_global_answer_is_the_mean_of_the_local_ones_only_where_the_head_is_affine(name, is_affine):
    torch.manual_seed(0)
    teacher = timm.create_model(name, num_classes=5).eval().double()
    torch.nn.init.normal_(teacher.get_classifier().weight)
    local, global_ = local_responses(teacher, torch.randn(2, 3, 96, 96, dtype=torch.float64))
    assert local.shape[2] > 1
    assert torch.allclose(local.mean((2, 3)), global_) == is_affine


STUDENTS = {
    "deit_tiny_distilled_patch16_224": {"img_size": 64},
    "vit_tiny_patch16_224": {"img_size": (64, 96), "patch_size": 8},
    "vit_wee_patch16_reg1_gap_256": {"img_size": 64, "embed_dim": 64},
    "vit_medium_patch16_reg4_gap_256": {"img_size": 64, "embed_dim": 64},
    "deit_small_patch16_224": {"img_size": 80},
    "hdkd_student_nano": {"img_size": 64},
    "hdkd_student_distilled_nano": {"img_size": 64},
}


@pytest.mark.parametrize("name", STUDENTS)
def test_students_of_every_kind_learn_from_every_grid(name):
    options = dict(STUDENTS[name])
    if "deit" in name or "vit" in name:
        options |= {"depth": 2, "num_heads": 2, "embed_dim": 64}
    student = models.create(name, num_classes=4, **options)
    size = options["img_size"] if isinstance(options["img_size"], tuple) else (options["img_size"],) * 2
    task = CSKD(student=student, teacher=models.create("hdkd_teacher_nano", num_classes=4)).train()
    images, labels = torch.randn(2, 3, *size), torch.tensor([0, 3])
    result = task(images, labels)
    result["loss"].backward()
    head = student.head_dist if hasattr(student, "head_dist") else student.head
    assert head.weight.grad.abs().sum() > 0
    assert task.eval().predict(images).shape == (2, 4)


def test_pooling_tokens_or_logits_is_the_same_loss_and_gradient():
    student = models.create("deit_tiny_distilled_patch16_224", num_classes=4, img_size=64, depth=1, embed_dim=32, num_heads=2)
    student.double()
    images, fused = torch.randn(2, 3, 64, 64).double(), torch.randn(2, 4, 2, 2).double()
    tokens = torch.randn(2, 18, 32).double().requires_grad_()
    pooled_first = spatial_loss(patch_logits(student, tokens, images, (2, 2)), fused)
    dense = student.head_dist(tokens[:, 2:]).unflatten(1, (4, 4)).movedim(3, 1)
    head_first = spatial_loss(dense, fused)
    assert_close(pooled_first, head_first)
    assert_close(*(torch.autograd.grad(loss, tokens, retain_graph=True)[0] for loss in (pooled_first, head_first)))


def test_prediction_is_the_mean_of_three_heads_or_of_two():
    student = models.create("hdkd_student_distilled_nano", num_classes=4, img_size=64).eval()
    teacher, images = models.create("hdkd_teacher_nano", num_classes=4), torch.randn(2, 3, 64, 64)
    tokens = student.forward_features(images)
    heads = [student.head(tokens[:, 0]), student.head_dist(tokens[:, 1]), student.head_dist(tokens[:, 2:]).mean(1)]
    assert_close(CSKD(student=student, teacher=teacher).eval().predict(images), sum(heads) / 3)
    assert_close(CSKD(student=student, teacher=teacher, prediction=2).eval().predict(images), sum(heads[:2]) / 2)


def test_without_the_spatial_term_it_is_deits_distillation():
    student = models.create("hdkd_student_distilled_nano", num_classes=4, img_size=64)
    teacher, images, labels = models.create("hdkd_teacher_nano", num_classes=4), torch.randn(4, 3, 64, 64), torch.arange(4)
    cskd = CSKD(student=student, teacher=teacher, spatial_weight=0.0).train()
    deit = DeiT(student=student, teacher=teacher).train()
    assert_close(cskd(images, labels)["loss"], deit(images, labels)["loss"])


def test_soft_distillation_of_places_is_the_mean_divergence():
    patches, fused = torch.randn(2, 5, 4, 4), torch.randn(2, 5, 4, 4)
    tau = 2.0
    expected = F.kl_div((patches / tau).log_softmax(1), (fused / tau).softmax(1), reduction="sum") * tau**2 / (2 * 16)
    assert_close(spatial_loss(patches, fused, "soft", tau), expected)


def test_a_student_grid_coarser_than_the_teachers_meets_at_its_own():
    patches, fused = torch.randn(1, 3, 2, 2), torch.randn(1, 3, 6, 4)
    pooled = F.adaptive_avg_pool2d(fused, (2, 2))
    assert_close(spatial_loss(patches, fused), spatial_loss(patches, pooled))


def test_one_cell_is_warned_of_and_tokens_of_teachers_are_refused():
    student = models.create("hdkd_student_distilled_nano", num_classes=4, img_size=32)
    task = CSKD(student=student, teacher=models.create("resnet10t", num_classes=4)).train()
    with pytest.warns(UserWarning, match=r"one cell.*smaller stride"):
        task(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CSKD(student=student, teacher=models.create("hdkd_teacher_nano", num_classes=4))(
            torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
        )
    with pytest.raises(ValueError, match=r"needs a CNN as teacher.*VisionTransformer"):
        CSKD(student=student, teacher=timm.create_model("test_vit", num_classes=4))
    with pytest.raises(ValueError, match="has no last map"):
        local_responses(timm.create_model("test_vit", num_classes=4).eval(), torch.randn(1, 3, 160, 160))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "cosine"}, "schedule must be one of linear, x2, cos, local, global"),
        ({"spatial_weight": -1.0}, "spatial_weight must be at least 0"),
        ({"prediction": 4}, "prediction 2 or 3"),
        ({"alpha": 2.0}, "alpha must be in"),
        ({"distill_type": "medium"}, "distill_type must be"),
        ({"student": "resnet10t"}, "needs a student with patch tokens"),
        ({"student": "vit_tiny_patch16_224"}, "patch dropout leaves holes"),
        ({"teacher": "classes"}, "the teacher has 5 classes and the student 4"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    options = {"patch_drop_rate": 0.1, "img_size": 64} if change.get("student", "").startswith("vit") else {}
    student = models.create(change.get("student", "hdkd_student_distilled_nano"), num_classes=4, **options)
    teacher = models.create("hdkd_teacher_nano", num_classes=5 if "teacher" in change else 4)
    with pytest.raises(ValueError, match=message):
        CSKD(student=student, teacher=teacher, **{k: v for k, v in change.items() if k not in ("student", "teacher")})
