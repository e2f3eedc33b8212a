"""Classifiers that train no network: what they learn from, what they are measured on."""

import json
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hdkd_lib import baselines, data, runs, tables


@pytest.fixture
def frame(finished_run, tmp_path):
    """Two replicates, of one split and another fold."""
    for fold in (0, 1):
        folder = tmp_path / f"student-seed{fold}-fold{fold}"
        shutil.copytree(finished_run.path, folder)
        config = finished_run.config | {"seed": fold, "data": data.load("digits", image_size=16, fold=fold).config}
        (folder / "config.json").write_text(json.dumps(config))
    return runs.load(tmp_path)


def test_every_replicate_is_measured_on_its_own_test_images(frame):
    table = baselines.measure(frame, network="").set_index(["classifier", "replicate"])
    assert set(table.index.get_level_values("replicate")) == set(frame.replicate)
    for fold in (0, 1):
        digits = data.load("digits", image_size=16, fold=fold)
        grey = [F.adaptive_avg_pool2d(of.images[:].float().mean(1), 16).flatten(1) for of in (digits.train, digits.test)]
        nearest = torch.cdist(grey[1], grey[0]).argmin(1)
        expected = (digits.train.labels[nearest] == digits.test.labels).float().mean().item()
        found = table.loc["nearest neighbour on pixels", f"seed {fold}, fold {fold}"]
        assert found.accuracy == pytest.approx(expected, abs=2e-6)
        assert found.macro_auroc == pytest.approx((1 + (found.balanced_accuracy - (1 - found.accuracy) / 9)) / 2, abs=2e-3)
        assert table.loc["chance", f"seed {fold}, fold {fold}"].balanced_accuracy == pytest.approx(0.1)


def test_a_run_of_an_older_rule_is_compared_on_its_own_images(frame, finished_run, digits):
    config = runs.read_json(finished_run.path / "config.json")
    for path in frame.path:
        config["data"] |= {"split": "of an older rule"}
        (Path(path) / "config.json").write_text(json.dumps(config))
    table = baselines.measure(frame, network="").set_index("classifier")
    grey = [F.adaptive_avg_pool2d(of.images[:].float().mean(1), 16).flatten(1) for of in (digits.train, digits.test)]
    expected = (digits.train.labels[torch.cdist(grey[1], grey[0]).argmin(1)] == digits.test.labels).float().mean().item()
    assert table.accuracy["nearest neighbour on pixels"].tolist() == pytest.approx([expected] * 2, abs=2e-6)


class Means(nn.Module):
    """Mean colours of the image's quarters, as features."""

    pretrained_cfg: ClassVar = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}

    def forward(self, images):
        assert images.shape[1:] == (3, 32, 32)
        assert -2 <= images.min() < images.max() <= 2, "normalised as the network's weights want it"
        return F.adaptive_avg_pool2d(images, 2).flatten(1)


def test_features_of_a_pretrained_network_are_compared_and_learned(frame, monkeypatch):
    asked = []
    monkeypatch.setattr(baselines.models, "create", lambda name, **options: asked.append((name, options)) or Means())
    table = baselines.measure(frame[frame.fold == 0], network="efficientnet_lite0", image_size=32).set_index("classifier")
    assert asked == [("efficientnet_lite0", {"pretrained": True, "num_classes": 0})]
    for name in ("nearest neighbour on ImageNet features", "linear probe on ImageNet features"):
        assert 0.2 < table.accuracy[name] < 1


@pytest.mark.filterwarnings("ignore:Mean of empty slice")  # of one class there is no AUROC
def test_test_images_in_the_training_part_do_not_count(frame, monkeypatch):
    digits = data.load("digits", image_size=16)
    kept = digits.test.labels == 3
    left_out = frozenset(np.array(digits.test.ids)[~kept.numpy()])
    monkeypatch.setattr(tables, "excluded", lambda _: left_out)
    table = baselines.measure(frame[frame.fold == 0], network="").set_index("classifier")
    assert table.accuracy["nearest neighbour on pixels"] == table.balanced_accuracy["nearest neighbour on pixels"]
    assert table.accuracy["chance"] in (0, 1), "one class is left"
