"""A CUDA device that is not there: shapes, dtypes and devices are computed, values are not.

    with FakeCuda() as gpu:
        task.to("cuda")
        counts = gpu.count(lambda: task(images, labels)["loss"].backward())
    gpu.waits, gpu.blocking_copies, gpu.operations

Tensors on "cuda" are torch's FakeTensors; tensors on the CPU stay real, so that what the host draws and decides is as always.
What is copied to the host has made-up values: 0.5, 0 of integers, True. An operation that mixes devices raises RuntimeError, as
CUDA's does. What the host would wait for is kept with the line of the project that asked for it.
"""

import heapq
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import conv_flop_count, flop_registry

aten = torch.ops.aten
HOST_ATTENTION, HOST_SAVE, HOST_BACKWARD = F.scaled_dot_product_attention, torch.save, torch.autograd._engine_run_backward
ROOT = Path(__file__).parents[1]
# NVIDIA H100 SXM5 80 GB, data sheet: memory bandwidth in bytes/s, dense bf16 tensor cores in FLOP/s.
BANDWIDTH, PEAK = 3.35e12, 989e12

NO_KERNEL = {  # besides views: what only allocates, or gives the same memory another shape
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten._unsafe_view, aten.lift_fresh,
    aten.resize_, aten.set_,
}  # fmt: skip
COPIES, INDEXING = {aten._to_copy, aten.copy_}, {aten.index, aten.index_put, aten.index_put_}
OVERWRITES = {aten.copy_, aten.fill_, aten.zero_, aten.normal_, aten.uniform_, aten.bernoulli_, aten.random_}  # not read before
GATHERS = {aten.index, aten.index_select, aten.gather, aten.embedding}  # read of their first tensor as much as they write
SCATTERS = {
    aten.index_copy_,
    aten.index_put_,
    aten.scatter_,
    aten.scatter_add_,
    aten.index_add_,
}  # touch of it as much as they are given


def convolution_backward_flops(gradient, x, weight, bias_sizes, stride, padding, dilation, transposed, *rest, out_val) -> int:
    """The forward pass's, for each of the gradients of x and weight; torch's formula leaves out the groups of the latter."""
    return sum(rest[-1][:2]) * conv_flop_count(x.shape, weight.shape, gradient.shape, transposed=transposed)


convolution_backward_flops._get_raw = True  # torch's FlopCounterMode then gives it tensors, as here
FLOPS = flop_registry | {aten.convolution_backward: convolution_backward_flops}


@dataclass(frozen=True)
class Operation:
    """One launch on the device: its name in ATen, the project's line that called it, floating point operations and bytes."""

    name: str
    line: str
    flops: int
    bytes: int

    @property
    def seconds(self) -> float:
        """What an H100 needs at least: its memory's or its tensor cores' time, whichever is longer."""
        return max(self.bytes / BANDWIDTH, self.flops / PEAK)


@dataclass(frozen=True)
class Wait:
    """What the host waits for: an operation of ATen, the project's line, and how many operations had been launched before."""

    name: str
    line: str
    launched: int

    def __str__(self) -> str:
        return f"{self.name} at {self.line}"


@dataclass(frozen=True)
class Counts:
    """Sums over operations: launches, floating point operations, bytes, and the time an H100 needs at least."""

    kernels: int
    flops: int
    bytes: int
    seconds: float


class FakeCuda(FakeTensorMode):
    """The device, as a context in which torch believes in one GPU.

    Attributes:
        operations: every launch, in order: what is no view on tensors of the device. Copies from the host are among them.
        waits: copies to the host, and results whose size depends on values.
        blocking_copies: copies from the host without `non_blocking`, for which it waits too.
    """

    avoid_device_init = True  # whatever `torch.cuda.is_available` says

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.operations: list[Operation] = []
        self.waits: list[Wait] = []
        self.blocking_copies: list[Wait] = []
        self.is_computing = False
        self.patches = ExitStack()

    def __enter__(self) -> "FakeCuda":
        believed = {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "is_bf16_supported": lambda including_emulation=True: True,
            "get_device_name": lambda device=None: "fake",
            "mem_get_info": lambda device=None: (80 * 2**30, 80 * 2**30),
            "is_current_stream_capturing": lambda: False,
        }
        if not self.enter_stack:  # FakeTensorMode enters itself again in what it computes
            for name, value in believed.items():
                self.patches.enter_context(mock.patch.object(torch.cuda, name, value))
            self.patches.enter_context(mock.patch.object(Tensor, "pin_memory", lambda tensor, device=None: tensor))
            self.patches.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _attention))
            self.patches.enter_context(mock.patch.object(nn.Module, "_apply", _apply))
            self.patches.enter_context(mock.patch.object(torch, "save", _save))
            self.patches.enter_context(mock.patch.object(torch, "Generator", return_value=torch.Generator()))
            self.patches.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", _backward))
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        if not self.enter_stack:
            self.patches.close()

    def __deepcopy__(self, memo: dict) -> "FakeCuda":
        return self  # a copied tensor is on the same device

    def count(self, action: Callable[[], object]) -> Counts:
        """What an action launches; see `operations` for each of them."""
        start = len(self.operations)
        action()
        done = self.operations[start:]
        return Counts(len(done), sum(of.flops for of in done), sum(of.bytes for of in done), sum(of.seconds for of in done))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        compute = super().__torch_dispatch__
        if self.is_computing or func.namespace == "prim":  # the latter asks for a tensor's device
            return compute(func, types, args, kwargs)
        tensors = [of for of in tree_leaves((args, kwargs)) if isinstance(of, Tensor)]
        fakes = [of for of in tensors if isinstance(of, FakeTensor)]
        target = kwargs.get("device") and torch.device(kwargs["device"]).type
        if not fakes and target != "cuda":
            return func(*args, **kwargs)  # on the host
        with self:  # composite operations come whole in inference mode
            if (out := func.decompose(*args, **kwargs)) is not NotImplemented:
                return out
        name = func.overloadpacket
        may_continue = kwargs.get("non_blocking") or (name is aten.copy_ and len(args) > 2 and args[2])
        if name is aten._local_scalar_dense:
            self._wait(name)
            return _made_up(args[0]).item()
        if fakes and target == "cpu":
            if not may_continue:
                self._wait(f"{name} to the host")
            return _made_up(args[0], kwargs.get("dtype"))
        if name is aten.copy_ and not isinstance(args[0], FakeTensor):
            if not may_continue:
                self._wait("copy_ to the host")
            return args[0]
        if name in COPIES:
            if len(fakes) < len(tensors) and not may_continue:
                self._wait(f"{name} from the host", self.blocking_copies)
        elif name in INDEXING and isinstance(args[0], FakeTensor):
            is_fill = name is not aten.index and not isinstance(args[2], FakeTensor) and args[2].ndim == 0
            args = (args[0], [number for index in args[1] for number in self._numbers(index, is_fill)], *args[2:])
        elif any(of.ndim for of in tensors if not isinstance(of, FakeTensor)):
            raise RuntimeError(f"{name} mixes cuda and cpu at {_line()}")
        elif name is aten.equal:
            self._wait(name)
            return True
        elif name in (aten.nonzero, aten.masked_select):  # their size depends on values: it is the largest
            self._wait(name)
            shape = (args[0].numel(), args[0].ndim) if name is aten.nonzero else (args[1].numel(),)
            dtype = torch.long if name is aten.nonzero else args[0].dtype
            func, args, kwargs = aten.new_zeros.default, (args[0], shape), {"dtype": dtype}
        self.is_computing = True
        try:
            out = compute(func, types, args, kwargs)
        finally:
            self.is_computing = False
        self._log(func, args, kwargs, out)
        return out

    def _numbers(self, index: Tensor | None, is_fill: bool) -> list[Tensor | None]:
        """An index as numbers on the device; a mask becomes as many as it has entries, for each of its dimensions."""
        if index is None:
            return [None]
        if not isinstance(index, FakeTensor):
            self._wait("index from the host", self.blocking_copies)
        if index.dtype == torch.bool and not is_fill:  # filling with a number on the host needs no numbers
            self._wait("index by a mask")
        is_mask = index.dtype == torch.bool
        with self:
            return [
                torch.empty(index.numel() if is_mask else index.shape, dtype=torch.long, device="cuda")
                for _ in range(index.ndim if is_mask else 1)
            ]

    def _wait(self, name: object, waits: list[Wait] | None = None) -> None:
        (self.waits if waits is None else waits).append(Wait(str(name), _line(), len(self.operations)))

    def _log(self, func, args, kwargs, out) -> None:
        name, schema = func.overloadpacket, func._schema
        written, read = [], []
        for argument, value in zip(schema.arguments, args, strict=False):
            of = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            written += of if is_written else []
            read += [] if is_written and name in OVERWRITES else of
        outs = [of for of in tree_leaves(out) if isinstance(of, Tensor)]
        is_view = any(result.alias_info is not None and not result.alias_info.is_write for result in schema.returns)
        if name in NO_KERNEL or is_view or not (outs or written):
            return
        written += [] if schema.is_mutable else outs
        sizes_read, sizes_written = [_bytes(of) for of in read], [_bytes(of) for of in written]
        if name in GATHERS:
            sizes_read[0] = min(sizes_read[0], sum(sizes_written))
        if name in SCATTERS:
            sizes_read[0] = sizes_written[0] = min(sizes_written[0], sum(sizes_read[1:]))
        flops = FLOPS[name](*args, **kwargs, out_val=out) if name in FLOPS else 0
        self.operations.append(Operation(func.name(), _line(), flops, sum(sizes_read) + sum(sizes_written)))


def _bytes(tensor: Tensor) -> int:
    """Of memory: what is expanded counts once."""
    return prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step) * tensor.element_size()


def _made_up(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    value = 0.5 if tensor.is_floating_point() else int(tensor.dtype == torch.bool)
    return torch.full(tensor.shape, value, dtype=dtype or tensor.dtype)


def _backward(outputs, *arguments, **options) -> tuple:
    return (run_backward if isinstance(outputs[0], FakeTensor) else HOST_BACKWARD)(outputs, *arguments, **options)


def run_backward(
    outputs, gradients, keep_graph, create_graph, inputs, allow_unused=False, *, accumulate_grad, **options
) -> tuple:
    """As torch's engine, which looks for the devices it works on: nodes from the forward pass's last to its first."""
    given: dict = {}  # gradients by node and number of its output
    queue, found = [], [None] * len(inputs)

    def pass_on(node, number: int, gradient: Tensor | None) -> None:
        if node is None or gradient is None:
            return
        if node not in given:
            given[node] = [None] * len(node._input_metadata)
            heapq.heappush(queue, (hasattr(node, "variable"), -node._sequence_nr(), id(node), node))  # leaves at the end
        of = node._input_metadata[number]
        gradient = gradient.sum_to_size(of.shape).to(of.dtype)
        given[node][number] = gradient if given[node][number] is None else given[node][number] + gradient

    with torch.set_grad_enabled(create_graph):
        for output, gradient in zip(outputs, gradients, strict=True):
            pass_on(*torch.autograd.graph.get_gradient_edge(output)[:2], gradient)
        while queue:
            *_, node = heapq.heappop(queue)
            gradients = given.pop(node)
            if not hasattr(node, "variable"):
                results = (node.apply if isinstance(node, BackwardCFunction) else node)(*gradients)
                for edge, gradient in zip(
                    node.next_functions, results if isinstance(results, tuple) else (results,), strict=True
                ):
                    pass_on(*edge, gradient)
            elif accumulate_grad:
                leaf = node.variable
                leaf.grad = gradients[0] if leaf.grad is None else leaf.grad.add_(gradients[0])
            else:
                found = [gradients[0] if of is node.variable else kept for of, kept in zip(inputs, found, strict=True)]
    return tuple(found)


def _apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """torch's, which swaps the memory of parameters in place: fake and real tensors cannot be swapped, and are replaced."""
    for child in module.children() if recurse else ():
        child._apply(change)
    for key, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                changed = change(parameter)
            if changed is not parameter:
                module._parameters[key] = nn.Parameter(changed, parameter.requires_grad)
    module._buffers |= {key: change(buffer) for key, buffer in module._buffers.items() if buffer is not None}
    return module


def _save(state: object, file: object) -> None:
    HOST_SAVE(tree_map_only(FakeTensor, Tensor.cpu, state), file)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
    """The kernels that CUDA takes: flash attention for bf16 without a mask, memory-efficient attention else."""
    if not isinstance(query, FakeTensor):
        return HOST_ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (of.to(torch.get_autocast_dtype("cuda")) for of in (query, key, value))
    if attn_mask is None and query.dtype == torch.bfloat16:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=options.get("scale"))[0]
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    needed = torch.is_grad_enabled()
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, needed, dropout_p, is_causal, scale=options.get("scale")
    )[0]


def _line() -> str:
    """The innermost line of the project, this file left out, in the calls that led here."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__ and file.startswith(f"{ROOT}{os.sep}") and ".venv" not in file:
            return f"{Path(file).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside of the project"
