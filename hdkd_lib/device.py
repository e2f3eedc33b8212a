"""Where and in what precision to compute."""

import torch


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
