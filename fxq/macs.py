"""Counting multiply-accumulates: of convs, transposed convs and linears, from weights and activation shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fxq.compiled import python_modules
from fxq.ops import CONV_TRANSPOSES, CONVS, LINEAR, Op

_LAYERS = {op.target: op for op in (*CONVS, *CONV_TRANSPOSES, LINEAR)}
_ATEN = torch.ops.aten
_CONVOLUTIONS = (_ATEN.convolution.default, _ATEN._convolution.default, _ATEN._convolution.deprecated)


def count_macs(weight: torch.Tensor, x: torch.Tensor, out: torch.Tensor, transposed: bool) -> int:
    """Multiply-accumulates of one layer: each output of a conv or linear, each input of a transposed conv, meets one
    slice of the weight."""
    return (x if transposed else out).numel() * weight.shape[1:].numel()


def node_macs(op: Op, arguments: tuple[Any, ...], out: torch.Tensor) -> int:
    """Multiply-accumulates of a canonical node of an op with a weight, from the values it ran with."""
    return count_macs(arguments[op.index(str(op.weight))], arguments[0], out, op in CONV_TRANSPOSES)


def attention_macs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, embed_dim: int) -> int:
    """Multiply-accumulates of the four projections of ``F.multi_head_attention_forward``."""
    return embed_dim * (2 * query.numel() + key.numel() + value.numel())


class Counter(TorchFunctionMode):
    """While open, adds up the multiply-accumulates of convs and linears, also of those inside attention.

    Attributes:
        path: where what is found is added.
        found: multiply-accumulates by path.
    """

    def __init__(self) -> None:
        super().__init__()
        self.path = ""
        self.found: dict[str, int] = {}
        self.calls = 0  # of functions that run now

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.calls += 1
        try:
            out = func(*args, **kwargs)
        finally:
            self.calls -= 1
        if func in _LAYERS:
            op = _LAYERS[func]
            values = op.signature.bind(args, kwargs)
            if values is not None:
                self.add(node_macs(op, op.arguments(values)[0], out))
        elif func is F.multi_head_attention_forward:
            given = dict(zip(("query", "key", "value", "embed_dim_to_check"), args, strict=False)) | kwargs
            self.add(attention_macs(given["query"], given["key"], given["value"], given["embed_dim_to_check"]))
        return out

    def add(self, macs: int) -> None:
        self.found[self.path] = self.found.get(self.path, 0) + macs


class _Scripted(TorchDispatchMode):
    """Adds to a counter what it cannot see: convs and linears that no Python function calls, but TorchScript."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.counter.calls == 0 and func in _CONVOLUTIONS:
            self.counter.add(count_macs(args[1], args[0], out, bool(args[6])))
        elif self.counter.calls == 0 and func in (_ATEN.addmm.default, _ATEN.mm.default):
            self.counter.add(out.numel() * args[-1].shape[0])
        return out


@contextmanager
def counting(module: nn.Module) -> Iterator[dict[str, int]]:
    """While open, adds up the multiply-accumulates of convs and linears inside ``module``, by the module's path."""
    counter = Counter()
    around: list[str] = []
    handles = []
    for path, part in python_modules(module):

        def enter(_: nn.Module, __: Any, path: str = path) -> None:
            around.append(counter.path)
            counter.path = path

        def leave(_: nn.Module, __: Any, ___: Any) -> None:
            counter.path = around.pop()

        handles.append(part.register_forward_pre_hook(enter))
        handles.append(part.register_forward_hook(leave))
    scripted = any(isinstance(part, torch.jit.ScriptModule) for part in module.modules())
    try:
        with counter, _Scripted(counter) if scripted else nullcontext():
            yield counter.found
    finally:
        for handle in handles:
            handle.remove()
