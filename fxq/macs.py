"""Counting multiply-accumulates: of convs, transposed convs and linears, from weights and activation shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from fxq.ops import CONV_TRANSPOSES, CONVS, LINEAR, Op

_LAYERS = {op.target: op for op in (*CONVS, *CONV_TRANSPOSES, LINEAR)}


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

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in _LAYERS:
            op = _LAYERS[func]
            values = op.signature.bind(args, kwargs)
            if values is not None:
                self._add(node_macs(op, op.arguments(values)[0], out))
        elif func is F.multi_head_attention_forward:
            given = dict(zip(("query", "key", "value", "embed_dim_to_check"), args, strict=False)) | kwargs
            self._add(attention_macs(given["query"], given["key"], given["value"], given["embed_dim_to_check"]))
        return out

    def _add(self, macs: int) -> None:
        self.found[self.path] = self.found.get(self.path, 0) + macs


@contextmanager
def counting(module: nn.Module) -> Iterator[dict[str, int]]:
    """While open, adds up the multiply-accumulates of convs and linears inside ``module``, by the module's path."""
    counter = Counter()
    around: list[str] = []
    handles = []
    for path, part in module.named_modules():

        def enter(_: nn.Module, __: Any, path: str = path) -> None:
            around.append(counter.path)
            counter.path = path

        def leave(_: nn.Module, __: Any, ___: Any) -> None:
            counter.path = around.pop()

        handles.append(part.register_forward_pre_hook(enter))
        handles.append(part.register_forward_hook(leave))
    try:
        with counter:
            yield counter.found
    finally:
        for handle in handles:
            handle.remove()
