"""Where, in what precision and how to compute."""

import importlib.util
import os
import shutil

import torch

WORTH_COMPILING = 10_000  # steps: compiling takes a minute or two, and saves a few ms of each


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto" is CUDA, then Apple's MPS, then the CPU.

    Raises:
        ValueError: torch does not know the device, or it is not here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps' (got {device!r})") from error
    is_here = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(found.type, lambda: True)
    if not is_here():
        raise ValueError(f"there is no {found.type} device here; pass device='auto' or 'cpu'")
    return found


def resolve_precision(precision: str, device: torch.device) -> str:
    """ "float32" or "bf16"; "auto" takes bf16 on GPUs that have it. On CPUs small networks are slower in it (measured)."""
    if precision not in ("auto", "float32", "bf16"):
        raise ValueError(f"precision must be 'auto', 'float32' or 'bf16' (got {precision!r})")
    if precision != "auto":
        return precision
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "float32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def resolve_compile(compile: str | bool, device: torch.device, steps: int) -> bool:
    """Whether to compile: "auto" does where a GPU has so many steps to do that it pays; a CPU hardly gains (measured).

    Raises:
        ValueError: it is neither "auto", True nor False, or there is no compiler here.
    """
    if compile not in ("auto", True, False):
        raise ValueError(f"compile must be 'auto', True or False (got {compile!r})")
    is_here = has_compiler(device)
    if compile is True and not is_here:
        need = "triton (pip install triton)" if device.type == "cuda" else "a C++ compiler (g++, or the one that CXX names)"
        raise ValueError(f"torch.compile needs {need} on {device.type} and there is none here; pass compile=False")
    return compile is True or (compile == "auto" and device.type == "cuda" and is_here and steps >= WORTH_COMPILING)


def has_compiler(device: torch.device) -> bool:
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def tune(device: torch.device) -> None:
    """On NVIDIA's GPUs: the fastest convolution of each shape, and float32 products in TF32."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
