"""Where and in what precision to compute."""

import pytest
import torch

from hdkd_lib import device
from hdkd_lib.device import resolve_compile, resolve_device, resolve_precision


@pytest.fixture
def here(monkeypatch):
    """`here(*types)`: only these accelerators are in the machine."""

    def here(*types: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in types)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in types)

    return here


@pytest.mark.parametrize(("types", "found"), [(("cuda", "mps"), "cuda"), (("mps",), "mps"), ((), "cpu")])
def test_auto_is_cuda_then_mps_then_the_cpu(types, found, here):
    here(*types)
    assert resolve_device("auto") == torch.device(found)


def test_a_named_device_is_taken(here):
    here("cuda", "mps")
    for name in ("cpu", "cuda", "cuda:1", "mps"):
        assert resolve_device(name) == torch.device(name)
    assert resolve_device(torch.device("cuda:1")) == torch.device("cuda:1")


@pytest.mark.parametrize("name", ["gpu", "CPU", "", "cuda:x", None])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(ValueError, match=rf"^device must be 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps' \(got {name!r}\)$"):
        resolve_device(name)


@pytest.mark.parametrize(("name", "kind"), [("cuda", "cuda"), ("cuda:1", "cuda"), ("mps", "mps")])
def test_a_device_that_is_not_here_is_refused(name, kind, here):
    here()
    with pytest.raises(ValueError, match=f"^there is no {kind} device here; pass device='auto' or 'cpu'$"):
        resolve_device(name)


@pytest.mark.parametrize(
    ("kind", "has_bf16", "precision"),
    [("cuda", True, "bf16"), ("cuda", False, "float32"), ("cpu", True, "float32"), ("mps", True, "float32")],
)
def test_auto_is_bf16_on_gpus_that_have_it_and_float32_elsewhere(kind, has_bf16, precision, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: asked.append(options) or has_bf16)
    assert resolve_precision("auto", torch.device(kind)) == precision
    assert asked == ([{"including_emulation": False}] if kind == "cuda" else [])


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
def test_a_named_precision_is_taken(precision, kind):
    assert resolve_precision(precision, torch.device(kind)) == precision


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match=r"^precision must be 'auto', 'float32' or 'bf16' \(got 'fp16'\)$"):
        resolve_precision("fp16", torch.device("cpu"))


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bf16", torch.bfloat16)])
def test_products_are_computed_in_the_precision(precision, dtype):
    with device.autocast(torch.device("cpu"), precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("place", "steps", "has_compiler", "found"),
    [(CPU, 10**6, True, False), (CUDA, 10**6, True, True), (CUDA, 10**6, False, False), (CUDA, 100, True, False)],
)
def test_auto_compiles_long_runs_on_gpus(place, steps, has_compiler, found, monkeypatch):
    monkeypatch.setattr(device, "has_compiler", lambda place: has_compiler)
    assert resolve_compile("auto", place, steps) is found
    assert resolve_compile(False, place, steps) is False


@pytest.mark.parametrize(("place", "need"), [(CPU, r"a C\+\+ compiler \(g\+\+"), (CUDA, "triton")])
def test_without_a_compiler_nothing_can_be_compiled(place, need, monkeypatch):
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=rf"torch.compile needs {need}.* on {place} and there is none here; pass compile=False"
    ):
        resolve_compile(True, place, 1)


def test_with_a_compiler_what_is_said_is_done(monkeypatch):
    monkeypatch.setattr(device.shutil, "which", lambda name: f"/usr/bin/{name}" if name == "clang++" else None)
    monkeypatch.setenv("CXX", "clang++")
    assert resolve_compile(True, CPU, 1) is True
    with pytest.raises(ValueError, match=r"compile must be 'auto', True or False \(got 'yes'\)"):
        resolve_compile("yes", CPU, 1)


def test_gpus_alone_are_tuned(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    device.tune(CPU)
    assert (asked, torch.backends.cudnn.benchmark) == ([], False)
    device.tune(CUDA)
    assert (asked, torch.backends.cudnn.benchmark) == (["high"], True)
