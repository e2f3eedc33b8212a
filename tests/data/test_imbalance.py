import builtins

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight

from hdkd_lib.data.batches import Part, Rows
from hdkd_lib.data.imbalance import class_weights, smote

COUNTS = [9, 2, 4, 9, 7]


def part_of(counts: list[int], seed: int = 0) -> Part:
    """Images of 4x5 noise over all 256 values, classes mixed."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=random)]
    images = torch.randint(0, 256, (len(labels), 3, 4, 5), dtype=torch.uint8, generator=random)
    return Part(images, labels, [f"image-{i}" for i in range(len(labels))], np.arange(len(labels)) // 2)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=40))
def test_class_weights_are_inverse_frequencies(labels):
    labels, classes = torch.tensor(labels), 6
    weights = class_weights(labels, classes)
    present = labels.unique().tolist()
    for c in present:
        assert weights[c] == pytest.approx(len(labels) / (classes * (labels == c).sum().item()))
    assert weights.shape == (classes,)
    assert weights.isfinite().all()
    assert weights[labels].mean() == pytest.approx(len(present) / classes)


def test_class_weights_are_scikit_learns_and_one_on_average_over_the_images():
    labels = part_of(COUNTS).labels
    expected = compute_class_weight("balanced", classes=np.arange(5), y=labels.numpy())
    assert class_weights(labels, 5).tolist() == pytest.approx(expected.tolist())
    assert class_weights(labels, 5)[labels].mean() == pytest.approx(1)


def test_smote_makes_all_classes_equal_and_leaves_the_originals_in_front():
    part = part_of(COUNTS)
    before = part.images.clone()
    whole = smote(part)
    assert whole.labels.bincount().tolist() == [9] * 5
    count = len(part)
    assert torch.equal(whole.images[:count], before)
    assert torch.equal(part.images, before)
    assert torch.equal(whole.labels[:count], part.labels)
    assert whole.ids[:count] == part.ids
    assert (whole.groups[:count] == part.groups).all()
    assert (whole.images.shape, whole.images.dtype) == ((45, 3, 4, 5), torch.uint8)
    assert whole.labels.dtype == torch.int64
    assert len(whole) == len(whole.ids) == len(set(whole.ids)) == len(whole.groups) == len(whole.images)
    assert set(whole.groups[count:]) & set(part.groups) == set(), "a synthetic image is in no group of the data"


@pytest.mark.parametrize("seed", range(3))
def test_each_synthetic_image_lies_between_two_of_its_class(seed):
    part = part_of(COUNTS, seed=seed)
    whole = smote(part, seed=seed)
    synthetic, labels = whole.images[len(part) :].double().flatten(1), whole.labels[len(part) :]
    for image, label in zip(synthetic, labels, strict=True):
        own = part.images[part.labels == label].double().flatten(1)
        assert (image >= own.amin(0)).all()
        assert (image <= own.amax(0)).all(), "the official code wraps around here"
        from_a, a_to_b = image - own[:, None], own[None] - own[:, None]
        share = ((from_a * a_to_b).sum(-1) / a_to_b.square().sum(-1).clamp(min=1)).clamp(0, 1)
        distance = (from_a - share[..., None] * a_to_b).abs().amax(-1)
        distance.fill_diagonal_(torch.inf)
        assert distance.min() < 1.05, "rounded, so the share found is not quite the one drawn"
    assert not torch.isin(synthetic.sum(1), part.images.double().flatten(1).sum(1)).all(), "not mere copies"


def test_an_image_is_mixed_with_its_nearest_neighbours_alone():
    part, levels = part_of([12, 200]), torch.tensor([0, 10, 20, 30, 40, 50, 200, 210, 220, 230, 240, 250])
    part.images[part.labels == 0] = levels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 5)
    for neighbours, reaches_over in ((5, False), (11, True)):
        synthetic = smote(part, neighbours=neighbours).images[212:].flatten(1)
        assert (synthetic == synthetic[:, :1]).all(), "nothing of the other class, which is noise"
        assert ((synthetic > 50) & (synthetic < 200)).any() == reaches_over
        assert len(synthetic.unique()) > 30


def test_smote_repeats_with_its_seed_and_not_with_torchs():
    part, outs = part_of(COUNTS), []
    for seed in (0, 0, 1):
        torch.manual_seed(len(outs))
        np.random.seed(len(outs))  # noqa: NPY002
        outs.append(smote(part, seed=seed).images)
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_two_images_are_enough_and_one_is_refused():
    assert smote(part_of([8, 2])).labels.bincount().tolist() == [8, 8]
    with pytest.raises(ValueError, match="class 1 has a single training image and SMOTE needs two; choose another treatment"):
        smote(part_of([8, 1]))
    assert len(smote(part_of([1, 1]))) == 2, "where nothing is missing nothing is needed"


def test_a_class_without_images_stays_without():
    assert smote(part_of([5, 0, 3])).labels.bincount().tolist() == [5, 0, 5]


def test_smote_takes_rows_of_a_store():
    part = part_of(COUNTS)
    order = torch.randperm(len(part))
    rows = Part(Rows(part.images[order], order.argsort().numpy()), part.labels, part.ids, part.groups)
    assert torch.equal(smote(rows).images, smote(part).images)


def test_without_imbalanced_learn_the_package_is_named(monkeypatch):
    whole = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("imblearn"):
            raise ImportError(name)
        return whole(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="SMOTE needs the package imbalanced-learn: pip install imbalanced-learn"):
        smote(part_of(COUNTS))
