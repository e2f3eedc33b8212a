from dataclasses import asdict

import pytest

from hdkd_lib import recipes
from hdkd_lib.recipes import Recipe


def test_hdkds_recipes_are_those_of_the_official_code():
    shared = {"epochs": 200, "batch_size": 16, "augment": "hdkd", "imbalance": "none", "aug_repeats": 1}
    shared |= {"mixup": 0, "cutmix": 0, "label_smoothing": 0, "protocol": "honest", "layer_decay": 1, "ema": 0}
    assert asdict(recipes.get("hdkd_teacher")) == {
        **shared,
        **{"optimizer": "adam", "lr": 1e-3, "weight_decay": 0, "schedule": "constant"},
        **{"min_lr": 0, "warmup_epochs": 0, "warmup_lr": 0},
    }
    assert asdict(recipes.get("hdkd_student")) == {
        **shared,
        **{"optimizer": "adamw", "lr": 5e-5, "weight_decay": 0.05, "schedule": "cosine"},
        **{"min_lr": 2e-5, "warmup_epochs": 5, "warmup_lr": 2e-5},
    }


def test_deits_recipe_is_that_of_its_code():
    assert asdict(recipes.get("deit")) == {
        **{"epochs": 300, "batch_size": 1024, "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05, "schedule": "cosine"},
        **{"min_lr": 1e-5, "warmup_epochs": 5, "warmup_lr": 1e-6, "augment": "deit", "imbalance": "none"},
        **{
            "mixup": 0.8,
            "cutmix": 1.0,
            "label_smoothing": 0.1,
            "aug_repeats": 3,
            "protocol": "honest",
            "layer_decay": 1,
            "ema": 0,
        },
    }


def test_what_is_not_named_keeps_the_recipes_value():
    assert recipes.get("nano") == recipes.NANO
    changed = recipes.get("nano", epochs=3, augment="none")
    assert asdict(changed) == asdict(recipes.NANO) | {"epochs": 3, "augment": "none"}


@pytest.mark.parametrize(
    ("typed", "answer"),
    [("hdkd_studnet", "did you mean 'hdkd_student'"), ("x", "known are hdkd_teacher, hdkd_student, deit, nano")],
)
def test_an_unknown_recipe_is_answered_with_a_known_one(typed, answer):
    with pytest.raises(ValueError, match=answer):
        recipes.get(typed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs >= 1"),
        ({"batch_size": 1}, "batch_size >= 2"),  # batch norm has no variance for one image
        ({"lr": 0.0}, "lr > 0"),
        ({"schedule": "linear"}, "schedule must be 'constant' or 'cosine'"),
        ({"protocol": "test"}, r"protocol must be 'honest' or 'paper' \(got 'test'\)"),
        ({"augment": "mixup"}, "augment must be one of none, flip_shift, hdkd, deit"),
        ({"imbalance": "weights"}, "imbalance must be one of none, class_weights, balanced_sampler, smote"),
        ({"mixup": -0.1}, "mixup and cutmix must be at least 0"),
        ({"cutmix": -1}, "mixup and cutmix must be at least 0"),
        ({"label_smoothing": 1.0}, r"label_smoothing in \[0, 1\)"),
        ({"label_smoothing": -0.1}, r"label_smoothing in \[0, 1\)"),
        ({"aug_repeats": 0}, "aug_repeats at least 1"),
    ],
)
def test_values_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**({"epochs": 1, "batch_size": 2, "optimizer": "adam", "lr": 1e-3} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": "6"}, r"epochs must be a whole number \(got '6'\)"),
        ({"epochs": 6.0}, r"epochs must be a whole number \(got 6\.0\)"),
        ({"epochs": True}, r"epochs must be a whole number \(got True\)"),
        ({"lr": "1e-3"}, r"lr must be a number \(got '1e-3'\)"),
        ({"mixup": False}, r"mixup must be a number \(got False\)"),
        ({"augment": None}, r"augment must be text \(got None\)"),
        ({"optimizer": 1}, r"optimizer must be text \(got 1\)"),
    ],
)
def test_values_of_another_type_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        recipes.get("nano", **changes)
    with pytest.raises(ValueError, match=f"^{message}$"):
        Recipe(**({"epochs": 1, "batch_size": 2, "optimizer": "adam", "lr": 1e-3} | changes))


def test_every_given_field_is_taken_as_it_is():
    changed = recipes.get("deit", mixup=0, warmup_epochs=0, min_lr=0.0, label_smoothing=0.0, weight_decay=0, lr=1)
    assert (changed.mixup, changed.warmup_epochs, changed.min_lr, changed.label_smoothing, changed.weight_decay) == (0,) * 5
    assert changed.lr == 1
    for empty, message in (
        ({"epochs": 0}, "epochs >= 1"),
        ({"batch_size": 0}, "batch_size >= 2"),
        ({"lr": 0.0}, "lr > 0"),
        ({"schedule": ""}, "schedule must be 'constant' or 'cosine' "),
        ({"augment": ""}, "augment must be one of none, flip_shift"),
        ({"imbalance": ""}, "imbalance must be one of none, class_weights"),
        ({"protocol": ""}, "protocol must be 'honest' or 'paper' "),
    ):
        with pytest.raises(ValueError, match=message):
            recipes.get("deit", **empty)


def test_an_unknown_field_suggests_the_nearest():
    with pytest.raises(ValueError, match="a recipe has no field 'warmup_epoch'; did you mean 'warmup_epochs'"):
        recipes.get(**{"name": "nano", "warmup_epoch": 5})
    with pytest.raises(ValueError, match=r"^a recipe has no field 'mixing'$"):
        recipes.get("deit", mixing="none")


@pytest.mark.parametrize("layer_decay", [0.0, 1.5, -0.5])
def test_a_layer_decay_out_of_range_is_refused(layer_decay):
    with pytest.raises(ValueError, match="layer_decay must be above 0 and at most 1"):
        recipes.get("nano", layer_decay=layer_decay)
