"""The kernels behind fused.py, in Triton: maps are read as rows of channels (channels_last), arithmetic is float32.

A row is a position of an image. There are two patterns: `by rows`, a program for a few rows with all their channels; and `by
columns`, a program for a few channels of one image that goes over all its rows. Every operation is one kernel, that reads its
inputs once and writes its outputs once, and is registered with torch, so that fake tensors know its shapes.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _row_tile(images, N, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of some rows of all images and all columns: rows, columns, offsets in maps and in (images, C), and what exists."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    maps, channels = (rows * C)[:, None] + columns[None, :], (rows // N * C)[:, None] + columns[None, :]
    return rows, columns, maps, channels, rows < images * N, (rows < images * N)[:, None] & (columns < C)[None, :]


@triton.jit
def _column_tile(start, N, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of some rows and columns of one image: rows in it, rows in all, offsets in maps, and what exists."""
    image = tl.program_id(0).to(tl.int64)
    rows, columns = start + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    maps = ((image * N + rows) * C)[:, None] + columns[None, :]
    return rows, image * N + rows, maps, rows < N, (rows < N)[:, None] & (columns < C)[None, :]


@triton.jit
def _load(pointers, mask, other=0.0):
    return tl.load(pointers, mask=mask, other=other).to(tl.float32)


@triton.jit
def _pool_positions(x, mean, maximum, index, images, N: tl.constexpr, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    best = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
    place = tl.zeros([ROWS, COLUMNS], tl.int32)
    for start in range(0, N, ROWS):
        rows, _, maps, _, exists = _column_tile(start, N, C, ROWS, COLUMNS)
        value = _load(x + maps, exists, float("-inf"))
        total += tl.where(exists, value, 0.0)
        place = tl.where(value > best, rows[:, None], place)
        best = tl.maximum(value, best)
    top = tl.max(best, 0)
    out = tl.program_id(0) * C + columns
    tl.store(mean + out, tl.sum(total, 0) / N, mask=columns < C)
    tl.store(maximum + out, top, mask=columns < C)
    tl.store(index + out, tl.min(tl.where(best == top[None, :], place, N), 0), mask=columns < C)


@triton.jit
def _pool_positions_backward(
    grad, grad_mean, grad_maximum, index, out, images, N, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    rows, _, maps, channels, _, exists = _row_tile(images, N, C, ROWS, COLUMNS)
    is_top = tl.load(index + channels, mask=exists, other=-1) == (rows % N)[:, None]
    value = _load(grad + maps, exists) + _load(grad_mean + channels, exists) / N
    tl.store(out + maps, value + tl.where(is_top, _load(grad_maximum + channels, exists), 0.0), mask=exists)


@triton.jit
def _pool_channels(x, a, pooled, index, images, N, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns, maps, channels, is_row, exists = _row_tile(images, N, C, ROWS, COLUMNS)
    value = _load(x + maps, exists) * _load(a + channels, exists)
    top = tl.max(tl.where(exists, value, float("-inf")), 1)
    tl.store(pooled + 2 * rows, tl.sum(value, 1) / C, mask=is_row)
    tl.store(pooled + 2 * rows + 1, top, mask=is_row)
    tl.store(index + rows, tl.min(tl.where(exists & (value == top[:, None]), columns[None, :], C), 1), mask=is_row)


@triton.jit
def _pool_channels_backward_x(grad, grad_pooled, a, index, out, images, N, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns, maps, channels, is_row, exists = _row_tile(images, N, C, ROWS, COLUMNS)
    mean, maximum = _load(grad_pooled + 2 * rows, is_row) / C, _load(grad_pooled + 2 * rows + 1, is_row)
    is_top = tl.load(index + rows, mask=is_row, other=-1)[:, None] == columns[None, :]
    gated = mean[:, None] + tl.where(is_top, maximum[:, None], 0.0)
    tl.store(out + maps, _load(grad + maps, exists) + gated * _load(a + channels, exists), mask=exists)


@triton.jit
def _pool_channels_backward_a(
    x, grad_pooled, index, grad_a, images, N: tl.constexpr, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, N, ROWS):
        _, rows, maps, is_row, exists = _column_tile(start, N, C, ROWS, COLUMNS)
        mean, maximum = _load(grad_pooled + 2 * rows, is_row) / C, _load(grad_pooled + 2 * rows + 1, is_row)
        is_top = tl.load(index + rows, mask=is_row, other=-1)[:, None] == columns[None, :]
        total += (mean[:, None] + tl.where(is_top, maximum[:, None], 0.0)) * _load(x + maps, exists)
    tl.store(grad_a + tl.program_id(0) * C + columns, tl.sum(total, 0), mask=columns < C)


@triton.jit
def _gate(x, a, s, out, images, N, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, _, maps, channels, is_row, exists = _row_tile(images, N, C, ROWS, COLUMNS)
    value, both = _load(x + maps, exists), _load(a + channels, exists) * _load(s + rows, is_row)[:, None]
    tl.store(out + maps, value + both * value, mask=exists)


@triton.jit
def _gate_backward_x(grad, x, a, s, grad_x, grad_s, images, N, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, _, maps, channels, is_row, exists = _row_tile(images, N, C, ROWS, COLUMNS)
    value = _load(grad + maps, exists)
    gated = value * _load(a + channels, exists)
    tl.store(grad_x + maps, value + gated * _load(s + rows, is_row)[:, None], mask=exists)
    tl.store(grad_s + rows, tl.sum(gated * _load(x + maps, exists), 1), mask=is_row)


@triton.jit
def _gate_backward_a(grad, x, s, grad_a, images, N: tl.constexpr, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, N, ROWS):
        _, rows, maps, is_row, exists = _column_tile(start, N, C, ROWS, COLUMNS)
        total += _load(grad + maps, exists) * _load(x + maps, exists) * _load(s + rows, is_row)[:, None]
    tl.store(grad_a + tl.program_id(0) * C + columns, tl.sum(total, 0), mask=columns < C)


@triton.jit
def _norm_gelu(x, mean, var, weight, bias, eps, out, images, N, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    _, columns, maps, _, _, exists = _row_tile(images, N, C, ROWS, COLUMNS)
    is_column = columns < C
    scale = _load(weight + columns, is_column) * tl.rsqrt(_load(var + columns, is_column) + eps)
    value = (_load(x + maps, exists) - _load(mean + columns, is_column)[None, :]) * scale[None, :]
    value += _load(bias + columns, is_column)[None, :]
    tl.store(out + maps, 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476)), mask=exists)


def _by_rows(images: int, N: int, C: int) -> tuple[tuple[int, ...], dict[str, int]]:
    """The grid of programs and the size of their tiles."""
    columns = triton.next_power_of_2(C)
    rows = max(1, 4096 // columns)
    return (triton.cdiv(images * N, rows),), {"ROWS": rows, "COLUMNS": columns}


def _by_columns(images: int, N: int, C: int) -> tuple[tuple[int, ...], dict[str, int]]:
    return (images, triton.cdiv(C, 32)), {"ROWS": 64, "COLUMNS": 32}


def _operation(kernel, schema: str, pattern: Callable, outputs: Callable) -> Callable:
    """`kernel` as torch's operation of its name. Its first argument is a map (B, C, H, W); `outputs` makes what it writes."""

    def run(*arguments):
        arguments = [_channels_last(of) if isinstance(of, Tensor) and of.ndim == 4 else of for of in arguments]
        results = outputs(*arguments)
        B, C, H, W = arguments[0].shape
        grid, tile = pattern(B, H * W, C)
        with torch.cuda.device_of(arguments[0]):  # Triton launches on the current one
            kernel[grid](*arguments, *(results if isinstance(results, tuple) else (results,)), B, H * W, C, **tile)
        return results

    operation = torch.library.custom_op(f"hdkd::{kernel.fn.__name__[1:]}", run, mutates_args=(), schema=schema)
    operation.register_fake(outputs)
    return operation


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _like(x: Tensor, chans: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """An empty map (B, chans, H, W) in channels_last."""
    B, C, H, W = x.shape
    return x.new_empty((B, H, W, C if chans is None else chans), dtype=dtype).permute(0, 3, 1, 2)


def _pooled(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*x.shape[:2], 1, 1)
    return x.new_empty(shape), x.new_empty(shape), x.new_empty(shape, dtype=torch.int32)


pool_positions = _operation(_pool_positions, "(Tensor x) -> (Tensor, Tensor, Tensor)", _by_columns, _pooled)
pool_positions_backward = _operation(
    _pool_positions_backward,
    "(Tensor grad, Tensor grad_mean, Tensor grad_maximum, Tensor index) -> Tensor",
    _by_rows,
    lambda grad, grad_mean, grad_maximum, index: _like(grad),
)
pool_channels = _operation(
    _pool_channels,
    "(Tensor x, Tensor a) -> (Tensor, Tensor)",
    _by_rows,
    lambda x, a: (_like(x, 2), _like(x, 1, torch.int32)),
)
pool_channels_backward_x = _operation(
    _pool_channels_backward_x,
    "(Tensor grad, Tensor grad_pooled, Tensor a, Tensor index) -> Tensor",
    _by_rows,
    lambda grad, grad_pooled, a, index: _like(grad),
)
pool_channels_backward_a = _operation(
    _pool_channels_backward_a,
    "(Tensor x, Tensor grad_pooled, Tensor index) -> Tensor",
    _by_columns,
    lambda x, grad_pooled, index: x.new_empty((*x.shape[:2], 1, 1)),
)
gate = _operation(_gate, "(Tensor x, Tensor a, Tensor s) -> Tensor", _by_rows, lambda x, a, s: _like(x))
gate_backward_x = _operation(
    _gate_backward_x,
    "(Tensor grad, Tensor x, Tensor a, Tensor s) -> (Tensor, Tensor)",
    _by_rows,
    lambda grad, x, a, s: (_like(x), _like(x, 1)),
)
gate_backward_a = _operation(
    _gate_backward_a,
    "(Tensor grad, Tensor x, Tensor s) -> Tensor",
    _by_columns,
    lambda grad, x, s: x.new_empty((*x.shape[:2], 1, 1)),
)
norm_gelu = _operation(
    _norm_gelu,
    "(Tensor x, Tensor mean, Tensor var, Tensor weight, Tensor bias, float eps) -> Tensor",
    _by_rows,
    lambda x, mean, var, weight, bias, eps: _like(x),
)


def try_all(device: torch.device) -> None:
    """Compiles and launches every kernel on a map of one position."""
    x, s = torch.ones((1, 16, 1, 1), device=device), torch.ones((1, 1, 1, 1), device=device)
    pool_positions_backward(x, *pool_positions(x))
    pooled, index = pool_channels(x, x)
    pool_channels_backward_x(x, pooled, x, index)
    pool_channels_backward_a(x, pooled, index)
    gate_backward_x(gate(x, x, s), x, x, s)
    gate_backward_a(x, x, s)
    norm_gelu(x, *[x.flatten()] * 4, 1e-5)
