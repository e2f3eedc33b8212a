"""HDKD's gates, and its norms in inference, as single passes over the maps: on a GPU its step waits for memory, not arithmetic.

Each is a formula of mbcsa.py, computed in float32 and rounded once; x (B, C, H, W), gates a (B, C, 1, 1) and s (B, 1, H, W):

    pool_positions   mean and maximum of x over H and W                     reads x once; plain operations twice
    pool_channels    mean and maximum of a x over C                         reads x once; they read or write maps four times
    gate             x + s a x                                              reads x, writes; five times
    norm_gelu        GELU((x - mean) / sqrt(var + eps) * weight + bias)     reads x, writes; four times

The pools hand x on, so that its three gradients are summed up on their way and not in passes of their own. A maximum's gradient
goes to the first place that has it, as in the official code. The kernels are Triton's (kernels.py), loaded at their first use.
Where they do not run, on CPUs, in float64 and under torch.compile, which fuses by itself, mbcsa.py's plain operations do.
"""

import functools
import importlib
import warnings
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def is_for(x: Tensor) -> bool:
    """Whether the kernels take x: on a GPU where they run, in at most 32 bits, not while compiling."""
    if not x.is_cuda or x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or torch.compiler.is_compiling():
        return False
    return _run_on(x.device)


def _kernels() -> ModuleType:
    """kernels.py, which loads Triton."""
    return importlib.import_module("hdkd_lib.models.kernels")


@functools.cache
def _run_on(device: torch.device) -> bool:
    """Whether the kernels compile and launch: Triton, the C compiler that it needs and a GPU that it knows are there."""
    try:
        _kernels().try_all(device)
    except Exception as error:  # whatever it is: the plain formulas give the same values
        warnings.warn(f"HDKD runs its plain operations on {device}, its fused kernels do not run there: {error}", stacklevel=2)
        return False
    return True


class _PoolPositions(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, maximum, index = _kernels().pool_positions(x)
        ctx.save_for_backward(index)
        return x, mean, maximum

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, grad_mean: Tensor, grad_maximum: Tensor) -> Tensor:
        return _kernels().pool_positions_backward(grad, grad_mean, grad_maximum, *ctx.saved_tensors)


class _PoolChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        pooled, index = _kernels().pool_channels(x, a)
        ctx.save_for_backward(x, a, index)
        return x, pooled

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, grad_pooled: Tensor) -> tuple[Tensor, Tensor]:
        x, a, index = ctx.saved_tensors
        grad_x = _kernels().pool_channels_backward_x(grad, grad_pooled, a, index)
        return grad_x, _kernels().pool_channels_backward_a(x, grad_pooled, index).to(a.dtype)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor, s: Tensor) -> Tensor:
        ctx.save_for_backward(x, a, s)
        return _kernels().gate(x, a, s)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, a, s = ctx.saved_tensors
        grad_x, grad_s = _kernels().gate_backward_x(grad, x, a, s)
        return grad_x, _kernels().gate_backward_a(grad, x, s).to(a.dtype), grad_s.to(s.dtype)


def pool_positions(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x handed on, and its mean and maximum over H and W, (B, C, 1, 1) both."""
    return _PoolPositions.apply(x)


def pool_channels(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """x handed on, and mean and maximum over C of a x, (B, 2, H, W)."""
    return _PoolChannels.apply(x, a)


def gate(x: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """x + s a x, (B, C, H, W)."""
    return _Gate.apply(x, a, s)


def norm_gelu(norm: nn.BatchNorm2d, gelu: nn.GELU, x: Tensor) -> Tensor:
    """gelu(norm(x)); in inference, by the running statistics, one pass, unless a hook watches the norm."""
    is_inference = not torch.is_grad_enabled() and type(norm) is nn.BatchNorm2d and not norm.training
    if not is_inference or norm._forward_hooks or norm._forward_pre_hooks or not is_for(x):
        return gelu(norm(x))
    return _kernels().norm_gelu(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
