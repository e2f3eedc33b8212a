"""Images from a teacher alone: the optimisation, its images' quality, and a folder that survives interruptions."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from hdkd_lib import data, inversion
from hdkd_lib.data.batches import Preprocess
from hdkd_lib.inversion import PRESETS, Inversion, invert, synthesize
from hdkd_lib.methods import Supervised
from hdkd_lib.runs import load
from hdkd_lib.training import fit

TINY = Inversion(batch_size=8, lr=0.1, stages=((0.5, 3), (1.0, 4)), warmup=2, cosine=True, tv=1e-3, batchnorm=0.1, jitter=1)
LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])


@pytest.fixture
def teacher(build):
    """A nano CNN of two classes whose batch norms have seen some images."""
    network = build("hdkd_teacher_nano", num_classes=2).train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain average
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(16, 3, 16, 16))
    return network.eval()


# The optimisation


def test_inverting_lowers_the_loss_and_leaves_the_teacher_as_it_was(teacher):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    settings = replace(TINY, stages=((1.0, 60),), jitter=0, divergence=0.5)
    start = invert(teacher, LABELS, 16, replace(settings, stages=((1.0, 1),)))[1]
    images, report = invert(teacher, LABELS, 16, settings)
    assert report["loss"] < 0.7 * start["loss"]
    assert report["class_loss"] < start["class_loss"]
    assert (images.shape, images.dtype) == ((8, 3, 16, 16), torch.uint8)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not teacher.training
    assert all(module._forward_pre_hooks == {} for module in teacher.modules())
    with torch.no_grad():
        decided = teacher(Preprocess(teacher)(images)).argmax(1)
    assert report["accuracy"] == (decided == LABELS).float().mean()


def test_the_reported_terms_are_those_of_the_settings_and_sum_to_the_loss(teacher, build):
    settings = replace(TINY, l2=1e-2, competition=1.0, flip=True)
    student = build("hdkd_student_nano", num_classes=2).train()
    _, report = invert(teacher, LABELS, 16, settings, student=student)
    assert student.training  # as it was: it trains in turn with the images
    assert any(parameter.requires_grad for parameter in student.parameters())
    terms = {name: value for name, value in report.items() if name.endswith("_loss")}
    names = {"class_loss", "batchnorm_loss", "tv_loss", "l2_loss", "divergence_loss", "competition_loss"}
    assert terms.keys() == names
    assert sum(terms.values()) == pytest.approx(report["loss"], rel=1e-5)
    plain = replace(TINY, tv=0.0, divergence=0.0)
    assert {n for n in invert(teacher, LABELS, 16, plain)[1] if n.endswith("_loss")} == {"class_loss", "batchnorm_loss"}


def test_snapshots_are_taken_as_images_grow_and_the_same_seed_gives_the_same(teacher):
    runs = [invert(teacher, LABELS, 16, TINY, seed=seed, snapshot_at=(0, 2, 7)) for seed in (5, 5, 6)]
    (first, report), (again, _), (other, _) = runs
    assert [tuple(images.shape[2:]) for images in report["snapshots"].values()] == [(8, 8), (8, 8), (16, 16)]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_grey_images_have_one_channel_which_the_teacher_sees_in_its_own_normalisation(teacher, monkeypatch):
    teacher.pretrained_cfg = teacher.pretrained_cfg | {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
    seen, real = [], inversion._terms
    monkeypatch.setattr(inversion, "_terms", lambda *arguments: seen.append(arguments[3].detach()) or real(*arguments))
    images, report = invert(teacher, LABELS, 16, replace(TINY, grey=True), snapshot_at=(0,))
    for made in (images, report["snapshots"][0]):
        assert torch.equal(made[:, 0], made[:, 1])
        assert torch.equal(made[:, 0], made[:, 2])
    assert len(images.unique()) > 2
    mean, std = (torch.tensor(teacher.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    pixels = seen[-1] * std + mean
    assert torch.allclose(pixels[:, 0], pixels[:, 2], atol=1e-6)
    coloured, _ = invert(teacher, LABELS, 16, TINY)
    assert not torch.equal(coloured[:, 0], coloured[:, 1])


def test_a_network_without_batch_norm_is_refused_and_told_what_has_it(build):
    network = build("convnext_atto", num_classes=2)
    with pytest.raises(ValueError, match=r"ConvNeXt cannot be inverted: .*\(LayerNorm.*take a ResNet, RegNet"):
        invert(network, LABELS, 32, TINY)


def test_competition_needs_a_student_and_labels_a_balance(teacher):
    with pytest.raises(ValueError, match="competition needs a student"):
        invert(teacher, LABELS, 16, replace(TINY, competition=1.0))
    with pytest.raises(ValueError, match="no other term has one"):
        invert(teacher, LABELS, 16, TINY, student=teacher)
    with pytest.raises(ValueError, match="equally many images"):
        invert(teacher, LABELS[:7], 16, TINY)


@pytest.mark.parametrize("change", [{"batch_size": 2}, {"lr": 0.0}, {"stages": ()}, {"stages": ((0.5, 10),)}])
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match="an inversion needs"):
        replace(TINY, **change)


# The folder


def pictures(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}


def test_a_folder_of_images_is_written_that_load_reads(teacher, tmp_path, capsys):
    folder = synthesize(teacher, ["cat", "dog"], 8, tmp_path / "made", image_size=16, settings=TINY, device="cpu")
    assert "2 batches of 7 iterations: about" in capsys.readouterr().out
    loaded = data.load("folder", folder, image_size=16)
    assert loaded.classes == ["cat", "dog"]
    assert sorted(path.split("/")[0] for path in pictures(folder)) == ["cat"] * 8 + ["dog"] * 8
    record = json.loads((folder / "synthesis.json").read_text())
    assert len(record["batches"]) == 2
    assert all(math.isfinite(batch["loss"]) and batch["restarts"] == 0 for batch in record["batches"])
    before = pictures(folder)
    synthesize(teacher, ["cat", "dog"], 8, folder, image_size=16, settings=TINY, device="cpu")
    assert pictures(folder) == before
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("finished", [0, 1])
def test_an_interrupted_synthesis_goes_on_with_the_batch_it_was_in(teacher, tmp_path, monkeypatch, finished):
    arguments = (teacher, ["a", "b"], 12)
    options = {"image_size": 16, "settings": TINY, "device": "cpu", "precision": "float32"}
    whole = pictures(synthesize(*arguments, tmp_path / "whole", **options))
    calls, real = [], inversion.invert

    def interrupted(*args, **kwargs):
        calls.append(kwargs)
        if len(calls) == 2 + finished:  # the probe, perhaps the first batch, and now
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(inversion, "invert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        synthesize(*arguments, tmp_path / "cut", **options)
    assert len(pictures(tmp_path / "cut")) == 8 * finished
    synthesize(*arguments, tmp_path / "cut", **options)
    assert len(calls) == 2 + finished + 4 - finished  # a probe and the two or three batches that were left
    assert pictures(tmp_path / "cut") == whole


def test_a_batch_that_becomes_nan_is_begun_again_with_half_the_rate(teacher, tmp_path, monkeypatch):
    rates, real = [], inversion.invert

    def failing(teacher, labels, size, settings, **kwargs):
        if "progress" in kwargs:
            rates.append(settings.lr)
            if len(rates) < 3:
                raise FloatingPointError("the loss became nan in iteration 4")
        return real(teacher, labels, size, settings, **kwargs)

    monkeypatch.setattr(inversion, "invert", failing)
    options = {"image_size": 16, "settings": TINY, "device": "cpu"}
    with pytest.warns(UserWarning, match=r"batch 0: the loss became nan.*begun again with lr=0\.0"):
        folder = synthesize(teacher, ["a", "b"], 4, tmp_path / "made", **options)
    assert rates == [0.1, 0.05, 0.025]
    assert json.loads((folder / "synthesis.json").read_text())["batches"][0]["restarts"] == 2

    def hopeless(*_, **kwargs):
        if "progress" in kwargs:
            raise FloatingPointError("nan")

    monkeypatch.setattr(inversion, "invert", hopeless)
    with (
        pytest.warns(UserWarning, match="nan") as said,
        pytest.raises(FloatingPointError, match=r"batch 0 failed at four rates .*lower lr"),
    ):
        synthesize(teacher, ["a", "b"], 4, tmp_path / "never", **options)
    assert len([warning for warning in said if "begun again" in str(warning.message)]) == 3


def test_a_loss_that_is_no_number_is_noticed(teacher):
    with pytest.raises(FloatingPointError, match="the loss became nan in iteration"):
        invert(teacher, LABELS, 16, replace(TINY, tv=math.nan))


def test_wrong_demands_are_refused_before_anything_is_written(teacher, tmp_path):
    folder, options = tmp_path / "made", {"image_size": 16, "settings": TINY, "device": "cpu"}
    for classes, per_class, change, message in (
        (["a"], 4, {}, "the teacher has 2 classes and needs as many names"),
        (["a", "b"], 3, {}, "at least 4 images of each"),
        (["a", "b/c"], 4, {}, "'b/c' cannot name a folder"),
        (["a", "b"], 4, {"settings": "tiny"}, "a preset of inversion is one of cifar, imagenet, small"),
    ):
        with pytest.raises(ValueError, match=message):
            synthesize(teacher, classes, per_class, folder, **options | change)
    assert not folder.exists()
    (folder / "a").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(folder / "a" / "mine.png")
    with pytest.raises(ValueError, match="holds images that were made otherwise"):
        synthesize(teacher, ["a", "b"], 4, folder, **options)


def test_a_folder_of_another_teacher_is_left_alone(teacher, build, tmp_path):
    options = {"image_size": 16, "settings": TINY, "device": "cpu"}
    folder = synthesize(teacher, ["a", "b"], 4, tmp_path / "made", **options)
    with pytest.raises(ValueError, match="holds images that were made otherwise"):
        synthesize(build("hdkd_teacher_nano", seed=5, num_classes=2), ["a", "b"], 4, folder, **options)


@given(st.integers(2, 60), st.integers(4, 70), st.sampled_from([4, 8, 84, 256]))
def test_batches_are_balanced_and_together_hold_every_image_once(classes, per_class, batch_size):
    plan = inversion._batches(classes, per_class, batch_size)
    made = [(int(label), number) for labels, numbers in plan for label, number in zip(labels, numbers, strict=True)]
    assert sorted(made) == [(label, number) for label in range(classes) for number in range(per_class)]
    for labels, _ in plan:
        counts = labels.bincount()[labels.unique()]
        assert len(counts) >= 2
        assert counts.min() == counts.max() >= 4


def test_presets_are_the_published_settings():
    imagenet, cifar = PRESETS["imagenet"], PRESETS["cifar"]
    assert (imagenet.batch_size, imagenet.lr, imagenet.betas, imagenet.jitter) == (84, 0.25, (0.5, 0.9), 30)
    assert imagenet.stages == ((0.5, 2000), (1.0, 1000))
    assert (imagenet.batchnorm, imagenet.first, imagenet.tv, imagenet.l2) == (0.01, 10.0, 1e-4, 1e-5)
    assert (cifar.batch_size, cifar.lr, cifar.batchnorm, cifar.tv, cifar.jitter) == (256, 0.05, 10.0, 2.5e-5, 2)


def test_settings_are_those_of_a_preset_with_some_changed():
    assert inversion.settings() == PRESETS["small"]
    assert inversion.settings("cifar", divergence=0.0, lr=0.1) == replace(PRESETS["cifar"], divergence=0.0, lr=0.1)
    assert inversion.settings(preset="imagenet", stages=[[1.0, 5]]).stages[0] == [1.0, 5]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "tiny"}, r"^a preset of inversion is one of cifar, imagenet, small \(got 'tiny'\)$"),
        ({"divergense": 0.0}, "^an inversion has no setting 'divergense'; did you mean 'divergence'"),
        ({"xyz": 0.0}, "^an inversion has no setting 'xyz'$"),
        ({"lr": 0.0}, "an inversion needs batch_size >= 4, lr > 0"),
    ],
)
def test_unknown_presets_and_settings_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        inversion.settings(**given)


# Training without data

OF_DIGITS = {"stages": ((1.0, 2),), "warmup": 0, "batch_size": 40}  # changes of the preset small
ON_CPU = {"device": "cpu", "precision": "float32"}


@pytest.fixture
def of_digits(build):
    return build("hdkd_teacher_nano", seed=7).eval()


def test_training_and_validation_images_are_made_and_the_test_part_stays_real(of_digits, digits, tmp_path):
    made = inversion.replace_training(digits, of_digits, per_class=5, folder=tmp_path, **OF_DIGITS, **ON_CPU)
    assert made.test is digits.test
    assert made.classes == digits.classes
    assert len(made.train) + len(made.val) == 50
    assert (torch.cat([made.train.labels, made.val.labels]).bincount() == 5).all()
    assert not {*made.train.ids, *made.val.ids} & {*digits.train.ids, *digits.val.ids, *digits.test.ids}
    [folder] = [path for path in tmp_path.iterdir() if path.is_dir()]
    images = {tuple(part.images[i : i + 1].flatten().tolist()) for part in (made.train, made.val) for i in range(len(part))}
    written = [np.array(Image.open(path)).transpose(2, 0, 1) for path in folder.glob("*/*.png")]
    assert images == {tuple(pixels.ravel().tolist()) for pixels in written}
    own = {key: value for key, value in made.config.items() if key != "training"}
    assert own == digits.config
    assert made.config["training"]["dataset"] == "folder"
    batches = json.loads((folder / "synthesis.json").read_text())["batches"]
    assert made.card["synthesis_seconds"] == round(sum(batch["seconds"] for batch in batches), 1)
    assert made.card["synthesis_quality"] == pytest.approx(inversion.quality(of_digits, made.train, digits.val), abs=1e-4)
    assert made.card.keys() - digits.card.keys() == {"synthesis_seconds", "synthesis_quality"}


def test_images_are_made_once_and_shared(of_digits, digits, build, tmp_path, monkeypatch):
    calls, real = [], inversion.invert
    monkeypatch.setattr(inversion, "invert", lambda *args, **kwargs: calls.append(args) or real(*args, **kwargs))
    options = {"per_class": 5, "folder": tmp_path, **OF_DIGITS, **ON_CPU}
    first = inversion.replace_training(digits, of_digits, **options)
    made = len(calls)
    assert made > 1
    other_split = data.load("digits", image_size=16, fold=1)
    for of in (digits, other_split):
        again = inversion.replace_training(of, build("hdkd_teacher_nano", seed=7), **options)
        assert len(calls) == made
        assert torch.equal(again.train.images[:], first.train.images[:])
        assert again.config["training"] == first.config["training"]
        assert again.card["synthesis_seconds"] == first.card["synthesis_seconds"]
    changes = ({"seed": 1}, {"per_class": 6}, {"lr": 0.2}, {"preset": "cifar"})
    for number, change in enumerate(changes, start=2):
        made = len(calls)
        inversion.replace_training(digits, of_digits, **options | change)
        assert len(calls) > made
        assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == number
    made = len(calls)
    inversion.replace_training(digits, build("hdkd_teacher_nano", seed=8), **options)
    assert len(calls) > made


def test_without_a_folder_the_images_lie_among_the_results(of_digits, digits, tmp_path, monkeypatch):
    monkeypatch.setenv("HDKD_RESULTS", str(tmp_path))
    inversion.replace_training(digits, of_digits, per_class=5, **OF_DIGITS, **ON_CPU)
    assert len(list((tmp_path / "runs" / "synthetic").glob("*/synthesis.json"))) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"per_class": 4}, "per_class must be at least 5"), ({"preset": "tiny"}, "a preset of"), ({"lrr": 1}, "no setting 'lrr'")],
)
def test_what_cannot_be_made_is_refused_before_anything_is_written(wrong, message, of_digits, digits, tmp_path):
    with pytest.raises(ValueError, match=message):
        inversion.replace_training(digits, of_digits, **{"per_class": 5, "folder": tmp_path / "made"} | wrong, **ON_CPU)
    assert not (tmp_path / "made").exists()


def test_a_run_on_made_images_says_what_they_cost(of_digits, digits, recipe, build, tmp_path):
    made = inversion.replace_training(digits, of_digits, per_class=5, folder=tmp_path / "made", **OF_DIGITS, **ON_CPU)
    made = replace(made, card=made.card | {"synthesis_seconds": 12.5})
    runs = []
    for name, of in (("made", made), ("real", digits)):
        task = Supervised(student=build("hdkd_student_nano"))
        runs.append(fit(task, of, replace(recipe, epochs=1), tmp_path / name / "run", **ON_CPU))
    assert runs[0].metrics["synthesis_seconds"] == 12.5
    assert runs[0].metrics["synthesis_quality"] == made.card["synthesis_quality"]
    assert runs[0].metrics["images"] == {"train": len(made.train), "val": len(made.val), "test": 60}
    assert "synthesis_seconds" not in runs[1].metrics
    frame = load(tmp_path).set_index("path").synthesis_seconds
    assert (frame[str(tmp_path / "made" / "run")], frame.isna().sum()) == (12.5, 1)


# Quality


def test_quality_tells_real_images_from_noise(digits, recipe, build, tmp_path):
    task = Supervised(student=build("hdkd_teacher_nano"))
    teacher = fit(task, digits, replace(recipe, epochs=6), tmp_path, device="cpu", precision="float32").student()
    noise = replace(digits.test, images=torch.randint(0, 256, (60, 3, 16, 16), dtype=torch.uint8))
    good, bad = (inversion.quality(teacher, part, digits.val) for part in (digits.test, noise))
    assert good["accuracy"] > bad["accuracy"]
    assert good["frechet_distance"] < bad["frechet_distance"]
    assert good["statistics_gap"] < bad["statistics_gap"]
    assert good["precision"] > bad["precision"]


def test_statistics_gap_is_zero_for_the_images_that_made_the_statistics(build):
    images = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8)
    network = build("resnet10t", num_classes=2)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(Preprocess(network)(images))
    rows = inversion.statistics_gap(network, images)
    assert [row["layer"] for row in rows][:2] == ["conv1.1", "conv1.4"]
    assert max(row["mean"] for row in rows[:3]) < 1e-3
    assert max(row["var"] for row in rows[:3]) < 1e-2


def test_statistics_gap_is_that_of_all_images_whatever_the_batches(build):
    images = torch.randint(0, 256, (10, 3, 16, 16), dtype=torch.uint8)
    images[5:] //= 4  # the batches differ
    network = build("resnet10t", num_classes=2)
    whole, parts = (inversion.statistics_gap(network, images, batch_size=size) for size in (10, 4))
    for one, other in zip(whole, parts, strict=True):
        assert one["layer"] == other["layer"]
        assert (other["mean"], other["var"]) == pytest.approx((one["mean"], one["var"]), rel=1e-5)
