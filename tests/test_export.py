import importlib.util
import json

import numpy as np
import pytest
import timm
import torch
from scipy.stats import binomtest

from hdkd_lib import experiment, export, models, recipes
from hdkd_lib.runs import Run

pytest.importorskip("onnxruntime", reason="needs the extra export")
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2}
NETWORKS = {
    "hdkd_student_distilled_nano": {"img_size": 16},
    "hdkd_teacher_nano": {},
    "deit_tiny_distilled_patch16_224": VIT,
    "dearkd_tiny_patch16_224": VIT | {"conv_blocks": 2},
}


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory) -> Run:
    made = experiment.build(digits, "hdkd_student_distilled_nano", recipes.get("nano", epochs=1))
    return made.run(tmp_path_factory.mktemp("runs") / "student", device="cpu")


@pytest.mark.parametrize("name", NETWORKS)
def test_timm_and_onnxruntime_give_the_logits_of_the_network(name, tmp_path):
    torch.manual_seed(0)
    model = models.create(name, num_classes=3, **NETWORKS[name]).eval()
    images = torch.randn(5, 3, 16, 16)
    export.to_timm(model, tmp_path, ["a", "b", "c"])
    export.to_onnx(model, tmp_path / "model.onnx", images[:2])
    with torch.no_grad():
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)
        call = export.onnx_call(tmp_path / "model.onnx")
        for count in (1, 5):  # not the number it was made with
            torch.testing.assert_close(call(images[:count]), model(images[:count]), rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "config.json").read_text())["label_names"] == ["a", "b", "c"]


def test_a_run_is_exported_with_its_card(run, digits, tmp_path):
    table = export.export(run, digits, tmp_path / "model")
    assert list(table.index) == ["PyTorch", "onnxruntime"]
    assert 0 < table.loc["onnxruntime", "largest difference of a logit"] < 1e-4
    assert (table["ms per image"] > 0).all()
    card = (tmp_path / "model" / "README.md").read_text()
    low, accuracy, high = (100 * value for value in export.accuracy_interval(run))
    assert (
        f"Accuracy {accuracy:.1f} % (95 % interval for other test images of the same source: {low:.1f} to {high:.1f} %)" in card
    )
    for words in ("CC BY 4.0", "120 train, 60 val, 60 test", "trained by Supervised for 1 epochs", "Not for", "9 (180 images)"):
        assert words in card
    assert "or `model.onnx` with any ONNX runtime" in card
    export.save(run, digits, tmp_path / "alone")
    assert "model.onnx" not in (tmp_path / "alone" / "README.md").read_text()
    again = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    for key, value in run.student().state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=0)


def test_the_interval_is_wilsons_and_counts_groups_once(run, digits, monkeypatch):
    right = run.predictions("best")
    count = int((right.predicted == right.labels).sum())
    wilson = binomtest(count, 60).proportion_ci(method="wilson")
    assert export.accuracy_interval(run) == pytest.approx((wilson.low, count / 60, wilson.high), abs=1e-6)
    split = run.split.assign(group=np.arange(len(run.split)) // 2)
    monkeypatch.setattr(Run, "split", split)
    low, _, high = export.accuracy_interval(run)
    assert high - low > 1.2 * (wilson.high - wilson.low)


@pytest.mark.parametrize("absent", export.ONNX)
def test_without_the_extra_one_sentence_names_it(run, digits, tmp_path, monkeypatch, absent):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == absent else found(name, *rest))
    with pytest.raises(ValueError, match=rf"ONNX needs {absent}, not installed here: pip install .*\[export\]"):
        export.export(run, digits, tmp_path)


def test_wrong_logits_and_other_data_are_refused(run, digits, tmp_path, monkeypatch):
    other = type("Other", (), {"config": digits.config | {"fold": 1}})()
    with pytest.raises(ValueError, match="another data set or split"):
        export.export(run, other, tmp_path)
    monkeypatch.setattr(export, "onnx_call", lambda file: lambda images: run.student()(images) + 0.1)
    with pytest.raises(ValueError, match=r"other logits than PyTorch, by up to 0\.1"):
        export.export(run, digits, tmp_path)
