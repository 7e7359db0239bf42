"""The state dict of a graph module: its tensors, and the qparams that stand in its graph as numbers.

A calibration is part of a model's state, so each quantize node adds one key, ``<node>_qparams``: float64
``[scale, zero_point, quant_min, quant_max]``; the dequantize of a per-tensor weight adds ``[scale, zero_point]``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx import Node

from fxq.qdq import DEQUANTIZE, is_dequantize, is_quantize

_SUFFIX = "_qparams"
_LIMITS = {torch.uint8: (0, 255), torch.int8: (-128, 127)}


def graph_qparams(graph: fx.Graph) -> dict[str, torch.Tensor]:
    """The numbers of a graph's quantize nodes and per-tensor weights, by state dict key."""
    return {
        f"{node.name}{_SUFFIX}": torch.tensor([value for value in node.args[1:5]], dtype=torch.float64)
        for node in graph.nodes
        if is_quantize(node) or _is_weight(node)
    }


def _is_weight(node: Node) -> bool:
    return node.op == "call_function" and node.target is DEQUANTIZE and not is_quantize(node.args[0])  # type: ignore


def split_state(module: nn.Module) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """A module's state without that of the modules it calls, and the prefixes of these.

    Modules that cannot be called only hold tensors at a path; theirs is the module's own state.
    """
    inside = tuple(f"{path}." for path, child in module.named_modules() if path and not _is_holder(child))
    state = module.state_dict(keep_vars=True)
    return {key: value for key, value in state.items() if not key.startswith(inside)}, inside


def _is_holder(module: nn.Module) -> bool:
    return type(module).forward is nn.Module.forward


def misfit(own: torch.Tensor, given: Any) -> str | None:
    """Why a value cannot be loaded in place of another, ``None`` if it can."""
    if not isinstance(given, torch.Tensor):
        return f"is a {type(given).__name__}, not a tensor"
    if given.shape != own.shape or given.dtype != own.dtype:
        return f"is {given.dtype} {list(given.shape)}, the model's is {own.dtype} {list(own.shape)}"
    return None


def misfit_qparams(graph: fx.Graph, values: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Why numbers cannot be those of a graph's quantize nodes and weights, by their key; they have the right shapes."""
    found = {}
    for node in graph.nodes:
        key = f"{node.name}{_SUFFIX}"
        if key not in values:
            continue
        scale, *integers = values[key].tolist()
        zero_point, low, high = integers if len(integers) == 3 else (*integers, *integers, *integers)
        least, most = _LIMITS[node.args[5] if is_quantize(node) else torch.int8]
        inside = least <= low <= high <= most and least <= zero_point <= most
        if not 0 < scale < math.inf:
            found[key] = f"has the scale {scale}"
        elif not inside or not all(map(float.is_integer, integers)):
            found[key] = f"has a zero_point or bounds that are no integers from {least} to {most}"
    return found


def set_state(module: fx.GraphModule, values: Mapping[str, torch.Tensor], replace: bool = False) -> None:
    """Copy values into a module's tensors and graph; they fit and are keys of :func:`split_state`'s result.

    Args:
        replace: give the module other tensors instead, because kernels may have been packed on the memory of these.
    """
    own, _ = split_state(module)
    with torch.no_grad():
        for key, value in values.items():
            if replace and not key.endswith(_SUFFIX):
                _replace(module, key, torch.empty_like(own[key]).copy_(value))
            else:
                own[key].copy_(value)
    for node in module.graph.nodes:
        numbers = values.get(f"{node.name}{_SUFFIX}")
        if numbers is not None:
            scale, *integers = numbers.tolist()
            node.args = (node.args[0], scale, *map(int, integers), *node.args[1 + len(numbers) :])
            for reader in filter(is_dequantize, list(node.users)):
                reader.args = (node, *node.args[1:3])
    module.recompile()


def _replace(module: nn.Module, path: str, value: torch.Tensor) -> None:
    parent, _, name = path.rpartition(".")
    owner = module.get_submodule(parent)
    if name in owner._parameters:
        owner._parameters[name] = nn.Parameter(value, owner._parameters[name].requires_grad)  # type: ignore[union-attr]
    else:
        owner._buffers[name] = value
