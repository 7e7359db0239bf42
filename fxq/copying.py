"""Copies of modules that share nothing with the original and never run its code."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def copy_structure(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy of a module, its submodules and tensors, also where ``copy.deepcopy`` refuses.

    deepcopy refuses tensors computed from parameters, as the older weight_norm leaves them, and parametrized
    modules.

    Args:
        memo: what was copied so far by ``id``: one object stays one object, and what is in it beforehand is taken
            instead of a copy.
    """
    if id(module) in memo:
        return memo[id(module)]  # type: ignore[no-any-return]
    clone = object.__new__(type(module))
    memo[id(module)] = memo[id(clone)] = clone
    clone.__dict__ = {name: _copy_attribute(value, memo) for name, value in vars(module).items()}
    for table in ("_parameters", "_buffers"):
        tensors = {name: t if t is None else copy_tensor(t, memo) for name, t in getattr(module, table).items()}
        clone.__dict__[table] = tensors
    clone.__dict__["_modules"] = {
        name: child if child is None else copy_structure(child, memo) for name, child in module._modules.items()
    }
    return clone


def _copy_attribute(value: Any, memo: dict[int, Any]) -> Any:
    """Containers are copied, and tensors in lists, as recurrent layers keep them."""
    if isinstance(value, list):
        return [copy_tensor(item, memo) if isinstance(item, torch.Tensor) else item for item in value]
    return copy_container(value)


def copy_tensor(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    """An independent copy: a parameter of a parameter, a plain tensor of any other."""
    if id(tensor) not in memo:
        clone = tensor.detach().clone()
        memo[id(tensor)] = nn.Parameter(clone, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else clone
        memo[id(memo[id(tensor)])] = memo[id(tensor)]  # already a copy when met again
    return memo[id(tensor)]  # type: ignore[no-any-return]


def copy_container(value: Any) -> Any:
    """A shallow copy of a container, anything else as it is."""
    return copy.copy(value) if isinstance(value, (dict, list, set)) else value
