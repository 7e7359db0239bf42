"""Forward hooks of the user's: what they do while a model is traced, and whether its forward needs what they do.

A hook that returns something changes what its module gives, and is traced like code. One that returns nothing is there
for what else it does: it goes on doing so where its module stays as it is, unless the forward that is traced reads what
it collects. Then it is traced, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves

from fxq.copying import copy_inputs, copy_structure

Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks around its forward that are not torch's own."""
    return any(not _is_traced(hook) for hooks in _tables(module) for hook in hooks.values())


def require_results(module: nn.Module) -> None:
    """Let each hook that returns nothing be an error; what is replaced are the values of the module's tables."""
    for hooks in _tables(module):
        hooks.update({key: _returning(hook) for key, hook in hooks.items() if not _is_traced(hook)})


def forward_needs_hooks(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a model without its hooks gives something else, or fails."""
    if not any(map(has_hooks, model.modules())):
        return False
    bare = copy_structure(model, {})
    for module in bare.modules():
        for hooks in _tables(module):
            for key in [key for key, hook in hooks.items() if not _is_traced(hook)]:
                del hooks[key]
    try:
        return not gives_the_same(bare, model, inputs)
    except Exception:  # of any kind: it is the user's code
        return True


def gives_the_same(one: nn.Module, model: nn.Module, inputs: Inputs) -> bool:
    """Whether a module gives what a copy of a model gives, but for rounding."""
    found = [_leaves(module, inputs) for module in (one, copy_structure(model, {}))]
    if len(found[0]) != len(found[1]):
        return False
    return all(map(_same, *found))


def _leaves(module: nn.Module, inputs: Inputs) -> list[Any]:
    args, kwargs = copy_inputs(inputs, own=True)
    with torch.no_grad():
        return tree_leaves(module(*args, **kwargs))


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return type(one) is type(other)
    same_kind = one.shape == other.shape and one.dtype == other.dtype
    return same_kind and torch.allclose(one, other, rtol=1e-3, atol=1e-5, equal_nan=True)


def _tables(module: nn.Module) -> tuple[dict[int, Callable[..., Any]], ...]:
    return module._forward_hooks, module._forward_pre_hooks


def _returning(hook: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        result = hook(*args, **kwargs)
        if result is None:
            raise TypeError("a forward hook returns nothing, and so does more than a graph can")
        return result

    return call


def _is_traced(hook: Any) -> bool:
    """Whether what a hook does is part of any traced forward though it returns nothing: those of older torch versions
    set a weight that they compute, those of transformers collect outputs for the forward around them.
    """
    collects = (getattr(hook, "__module__", None) or "").startswith("transformers.")
    return collects or isinstance(hook, (BasePruningMethod, SpectralNorm, WeightNorm))
