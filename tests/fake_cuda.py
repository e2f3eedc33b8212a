"""A CUDA device that is not there: shapes, dtypes and devices are computed, values are not.

    with FakeCuda() as gpu:
        task.to("cuda")
        counts = gpu.count(lambda: task(images, labels)["loss"].backward())
    gpu.waits, gpu.blocking_copies, gpu.operations

Tensors on "cuda" are torch's FakeTensors; tensors on the CPU stay real, so that what the host draws and decides is as always.
What is copied to the host has made-up values: 0.5, or 0 of integers. Operations that mix devices raise RuntimeError, as CUDA's.
What the host would wait for is kept with the line of the project that asked for it.
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
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
HOST_ATTENTION, HOST_SAVE, HOST_BACKWARD = F.scaled_dot_product_attention, torch.save, torch.autograd._engine_run_backward
ROOT = Path(__file__).parents[1]
# NVIDIA H100 SXM5 80 GB, data sheet: memory bandwidth in bytes/s, dense bf16 tensor cores in FLOP/s.
BANDWIDTH, PEAK = 3.35e12, 989e12

NO_KERNEL = {  # besides views: what only allocates, or gives the same memory another shape
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten._unsafe_view, aten.lift_fresh,
    aten.resize_, aten.set_,
}  # fmt: skip
OVERWRITES = {aten.copy_, aten.fill_, aten.zero_, aten.normal_, aten.uniform_, aten.bernoulli_, aten.random_}  # not read before
GATHERS = {aten.index, aten.index_select, aten.gather, aten.embedding}  # read of their first tensor as much as they write
SCATTERS = {aten.index_copy_, aten.index_put_, aten.scatter_, aten.index_add_}  # touch of it as much as they are given


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
        waits: "operation at file:line" of what the host waits for: values, and results whose size depends on values.
        blocking_copies: the same of copies from the host without `non_blocking`, for which the host waits too.
    """

    avoid_device_init = True  # whatever `torch.cuda.is_available` says

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.operations: list[Operation] = []
        self.waits: list[str] = []
        self.blocking_copies: list[str] = []
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
            self.patches.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", _backward))
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        if not self.enter_stack:
            self.patches.close()

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
        if name is aten._local_scalar_dense:
            self.waits.append(f"{name} at {_line()}")
            return {torch.bool: True}.get(args[0].dtype, 0.5 if args[0].is_floating_point() else 0)
        if fakes and (target == "cpu" or (name is aten.copy_ and not isinstance(args[0], FakeTensor))):
            if not (kwargs.get("non_blocking") or (name is aten.copy_ and len(args) > 2 and args[2])):
                self.waits.append(f"{name} to the host at {_line()}")
            return _made_up(args[0], kwargs.get("dtype")) if target == "cpu" else args[0]
        is_copy = name is aten._to_copy or name is aten.copy_
        if is_copy and len(fakes) < len(tensors):
            if not (kwargs.get("non_blocking") or (name is aten.copy_ and len(args) > 2 and args[2])):
                self.blocking_copies.append(f"{name} at {_line()}")
        elif name in (aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_):
            args = (args[0], [self._number(index) for index in args[1]], *args[2:])
        elif any(of.ndim for of in tensors if not isinstance(of, FakeTensor)):
            raise RuntimeError(f"{name} mixes cuda and cpu at {_line()}")
        if name is aten.nonzero:
            self.waits.append(f"{name} at {_line()}")
            func, args, kwargs = aten.new_empty.default, (args[0], (args[0].numel(), args[0].ndim)), {"dtype": torch.long}
        if name is aten.masked_select:
            self.waits.append(f"{name} at {_line()}")
            func, args = aten.new_empty.default, (args[0], (args[1].numel(),))
        self.is_computing = True
        try:
            out = compute(func, types, args, kwargs)
        finally:
            self.is_computing = False
        self._log(func, args, kwargs, out)
        return out

    def _number(self, index: Tensor | None) -> Tensor | None:
        """An index of numbers on the device; a mask becomes as many numbers as it has entries."""
        if isinstance(index, Tensor) and not isinstance(index, FakeTensor) and index.ndim:
            self.blocking_copies.append(f"index at {_line()}")
            return torch.empty(index.shape, dtype=index.dtype, device="cuda")
        return index

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
        flops = flop_registry[name](*args, **kwargs, out_val=out) if name in flop_registry else 0
        self.operations.append(Operation(func.name(), _line(), flops, sum(sizes_read) + sum(sizes_written)))


def _bytes(tensor: Tensor) -> int:
    """Of memory: what is expanded counts once."""
    return prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step) * tensor.element_size()


def _made_up(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    with torch.utils._mode_utils.no_dispatch():
        return torch.full(tensor.shape, 0.5 if tensor.is_floating_point() else 0, dtype=dtype or tensor.dtype)


def _backward(outputs, gradients, keep_graph, create_graph, inputs, **options) -> tuple:
    """What torch's engine does, which looks for the devices it works on: nodes from the last to the first of the forward pass."""
    if not isinstance(outputs[0], FakeTensor):
        return HOST_BACKWARD(outputs, gradients, keep_graph, create_graph, inputs, **options)
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
            elif options["accumulate_grad"]:
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
