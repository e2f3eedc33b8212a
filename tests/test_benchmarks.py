"""`make bench`: the GPU's benchmark runs on a CPU too, here with small networks in place of the papers'."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hdkd_lib import models

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import gpu

SMALL = {"regnety_160": "resnet10t", "resnet18": "resnet10t", "resnet50": "resnet10t"}
SMALL |= {name: f"{name}_nano" for name in ("hdkd_teacher", "hdkd_student_distilled")}


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """`bench(*arguments)` runs the program on a CPU; it writes to `bench.out`."""

    def bench(*arguments: str) -> None:
        fixed = ["--device=cpu", "--size=32", "--batch=4", "--repeats=1", f"--out={bench.out}"]
        monkeypatch.setattr(sys, "argv", ["gpu.py", *fixed, *arguments])
        gpu.main()

    bench.out = tmp_path / "gpu.json"
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # the program sets it; put back at the end
    return bench


@pytest.mark.filterwarnings("ignore:No positive samples", "ignore:the teacher's last map has one cell")
def test_every_step_is_measured_beside_what_was_published(bench, monkeypatch):
    create, compiled = models.create, []

    def small(name: str, **options):
        return create(SMALL.get(name, name), **options, **({"embed_dim": 24, "num_heads": 2} if "patch16" in name else {}))

    monkeypatch.setattr(models, "create", small)
    monkeypatch.setattr(torch, "compile", lambda network, **_: compiled.append(network) or network)
    monkeypatch.setattr(gpu, "PEAKS", {"CPU": 0.5})
    bench("--precision=bf16")
    result = json.loads(bench.out.read_text())
    assert len(compiled) == 1
    assert result["networks"].keys() == {"DeiT-Ti", "DeiT-S", "DeiT-S compiled", "ResNet-50"}
    assert result["methods"].keys() == {"HDKD", "CSKD", "DearKD stage I", "DearKD stage II", "DeiT", "LocalityGuidance"}
    assert result["epochs"].keys() == {"HDKD", "DeiT"}
    for section, batch in (("networks", 8), ("methods", 4)):
        for of in result[section].values():
            assert of["batch"] == batch
            assert of["images_per_second"] == pytest.approx(1000 * batch / of["milliseconds"], rel=0.01)
            assert of["share_of_peak"] == pytest.approx(1000 * of["tflop"] / of["milliseconds"] / 0.5, rel=0.01)
    assert all(of["images_per_second"] > 0 for of in result["epochs"].values())
    assert result["networks"]["ResNet-50"]["published"] == {"A100": 2470}
    arithmetic = {name: of["tflop"] for name, of in result["methods"].items()}
    assert arithmetic["DearKD stage I"] > arithmetic["DearKD stage II"] > 0  # the teacher's counts
    assert result["environment"].keys() >= {"device", "torch", "commit"}
    assert "official" not in result


def test_a_grouped_convolution_costs_what_its_groups_do():
    convolution, images = torch.nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), torch.randn(2, 16, 8, 8)
    given = {torch.ops.aten.convolution_backward: gpu.convolution_backward_flops}
    with gpu.FlopCounterMode(display=False, custom_mapping=given) as counter:
        convolution(images.requires_grad_(True)).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * images.numel() * 9  # forward, and for images and weights


def test_what_cannot_be_measured_is_named_and_the_rest_is_there(bench, monkeypatch, tmp_path):
    def step(make, *_) -> dict:
        if make is tasks["CSKD"]:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")
        return {"images_per_second": 1.0}

    def run(program, **options) -> subprocess.CompletedProcess:
        if "hdkd_step.py" not in str(program):
            return start(program, **options)
        return subprocess.CompletedProcess(program, 1, "", "Traceback\nModuleNotFoundError: No module named 'einops'\n")

    start, tasks = subprocess.run, gpu.methods(32)
    monkeypatch.setattr(gpu, "methods", lambda size: tasks)
    monkeypatch.setattr(gpu, "step", step)
    monkeypatch.setattr(gpu, "epoch", lambda *_: {"images_per_second": 1.0})
    monkeypatch.setattr(gpu.subprocess, "run", run)
    message = r"not measured: CSKD \(OutOfMemoryError: CUDA out of memory.\); official HDKD \(.*No module named 'einops'\)"
    with pytest.raises(SystemExit, match=message):
        bench(f"--official={tmp_path}")
    result = json.loads(bench.out.read_text())
    assert result["methods"]["CSKD"] == {"error": "OutOfMemoryError: CUDA out of memory."}
    assert result["methods"]["DeiT"] == {"images_per_second": 1.0}
