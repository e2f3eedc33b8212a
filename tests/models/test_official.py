"""Official checkpoints: their names, and files as they come from elsewhere."""

import pytest
import torch
from torch.testing import assert_close

from hdkd_lib import models
from hdkd_lib.models.official import convert_official_state_dict, load_official

NETS = {"teacher": "hdkd_teacher", "student": "hdkd_student", "distilled": "hdkd_student_distilled"}


def on_meta(name: str, **arguments):
    with torch.device("meta"):
        return models.create(name, **arguments)


@pytest.fixture
def weights(official_weights):
    """`weights(net)`: the official weights in float32, as training leaves them."""
    return lambda net: {name: v.float() if v.is_floating_point() else v for name, v in official_weights(net).items()}


@pytest.mark.parametrize(("net", "name"), NETS.items())
def test_official_checkpoints_convert_to_every_entry_of_ours_without_a_copy(net, name, golden):
    official = {entry: torch.empty(shape, device="meta") for entry, shape in golden["shapes"][net].items()}
    converted = convert_official_state_dict({f"module.{entry}": value for entry, value in official.items()})
    ours = on_meta(name, num_classes=7).state_dict()
    assert {entry: value.shape for entry, value in converted.items()} == {entry: value.shape for entry, value in ours.items()}
    assert {id(v) for v in converted.values()} == {id(v) for v in official.values()}


def test_checkpoints_of_other_networks_are_not_converted():
    with pytest.raises(ValueError, match=r"not a checkpoint of the official HDKD code.*'conv1"):
        convert_official_state_dict(on_meta("test_resnet").state_dict())
    with pytest.raises(ValueError, match=r"not a checkpoint of the official HDKD code.*'stages"):
        convert_official_state_dict(on_meta("hdkd_teacher_nano").state_dict())


@pytest.mark.parametrize(("net", "name"), NETS.items())
def test_official_files_give_the_official_logits(net, name, weights, golden, golden_images, tmp_path):
    torch.save(weights(net), tmp_path / "official.pth")
    model = load_official(tmp_path / "official.pth")
    assert (model.creation["name"], model.num_classes, model.training) == (name, 7, False)
    values = golden["values"]["eval"]
    parts = ["distilled_class", "distilled_distillation"] if net == "distilled" else [net]
    with torch.no_grad():
        logits = model(golden_images.float())
    assert_close(logits, torch.tensor([values[part] for part in parts]).mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("net", ["student", "distilled"])
def test_a_students_image_size_and_classes_are_read_from_its_weights(net, weights, tmp_path):
    state = {name: v[:4] if name.startswith(("classifier", "head")) else v for name, v in weights(net).items()}
    state["DFLT_module.pos_embedding"] = state["DFLT_module.pos_embedding"][:, : 16 + 1 + (net == "distilled")]
    torch.save(state, tmp_path / "official.pth")
    model = load_official(str(tmp_path / "official.pth"))
    assert model.img_size == (64, 64)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 4)


def test_a_file_that_would_run_code_is_refused_and_runs_none(weights, tmp_path):
    class Harmful:
        def __reduce__(self):
            return open, (str(tmp_path / "harm"), "w")

    torch.save(weights("teacher") | {"epoch": Harmful()}, tmp_path / "official.pth")
    with pytest.raises(ValueError, match=r"official\.pth is not a file of tensors, as torch\.save\(model\.state_dict"):
        load_official(tmp_path / "official.pth")
    assert not (tmp_path / "harm").exists()
    torch.load(tmp_path / "official.pth", weights_only=False)
    assert (tmp_path / "harm").exists()


def test_missing_files_and_files_of_other_things_are_refused(weights, build, tmp_path):
    path, teacher = tmp_path / "official.pth", weights("teacher")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*official\.pth"):
        load_official(path)
    for content, message in (
        (b"<!DOCTYPE html>", r"official\.pth is not a file of tensors"),
        (b"PK\x03\x04 half a download", r"official\.pth is not a file of tensors"),
        ([torch.zeros(1)], r"official\.pth holds no state dict; save it by"),
        ({"state_dict": teacher}, r"official\.pth holds no state dict; save it by"),
        (build().state_dict(), "not a checkpoint of the official HDKD code"),
        ({name: v for name, v in teacher.items() if name != "fn1.bias"}, r"hdkd_teacher: 1 entries are missing .*'fc.bias'"),
    ):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            load_official(path)


@pytest.mark.parametrize(
    "content", [b"", b"hello world\n", b"\x80\x02.", b"(", {}, {"stage1.0.0.weight": torch.zeros(1)}, {1: 2}]
)
def test_whatever_is_in_the_file_the_answer_is_a_sentence(content, tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=r"not a file of tensors|holds no state dict|only a part of an official network"):
        load_official(path)
