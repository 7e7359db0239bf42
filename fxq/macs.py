"""Counting multiply-accumulates: of convs, transposed convs and linears, from weights and activation shapes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fxq.ops import CONV_TRANSPOSES, Op

_CONV_MODULES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED_MODULES = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def count_macs(weight: torch.Tensor, x: torch.Tensor, out: torch.Tensor, transposed: bool) -> int:
    """Multiply-accumulates of one layer: each output of a conv or linear, each input of a transposed conv, meets one
    slice ``weight[0]`` of the weight."""
    return (x if transposed else out).numel() * weight[0].numel()


def node_macs(op: Op, arguments: tuple[Any, ...], out: torch.Tensor) -> int:
    """Multiply-accumulates of a canonical node of an op with a weight, from the values it ran with."""
    return count_macs(arguments[op.index(str(op.weight))], arguments[0], out, op in CONV_TRANSPOSES)


@contextmanager
def counting(module: nn.Module) -> Iterator[dict[str, int]]:
    """While open, adds up the multiply-accumulates of each conv and linear module inside ``module``, by path."""
    found: dict[str, int] = {}
    handles = []
    for path, layer in module.named_modules():
        if isinstance(layer, (*_CONV_MODULES, *_TRANSPOSED_MODULES, nn.Linear)):

            def add(layer: nn.Module, args: tuple[Any, ...], out: Any, path: str = path) -> None:
                transposed = isinstance(layer, _TRANSPOSED_MODULES)
                weight = layer.weight
                assert isinstance(weight, torch.Tensor)
                found[path] = found.get(path, 0) + count_macs(weight, args[0], out, transposed)

            handles.append(layer.register_forward_hook(add))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
