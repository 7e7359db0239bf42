"""Copies of modules that share nothing with the original and never run its code; what they may borrow for a while.

While one call quantizes a model, nobody else changes it, so a copy may read the model's own weights until they are
integers. A borrowed weight must never be written: only layers whose code is known borrow theirs, and what is still
borrowed at the end becomes a copy (:func:`give_back`).
"""

from __future__ import annotations

import copy
import itertools
import operator
import types
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fxq.compiled import compiled_from
from fxq.scaled_weight import ScaledWeight

# Layers that read their weights and do nothing else with them. An embedding, for one, may scale them in its forward.
_READING = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
    nn.MultiheadAttention, NonDynamicallyQuantizableLinear,
)  # fmt: skip
# Functions of torch that make a new tensor of a weight, as subclasses of these layers call them.
READING_FUNCTIONS = frozenset({
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear,
})  # fmt: skip
_TABLES = ("_parameters", "_buffers", "_modules")
_COMPILED = "_compiled_call_impl"  # what module.compile() sets: the original's code, on the original's parts
_CONTAINERS = (dict, list, set, OrderedDict)


def copy_structure(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy of a module, its submodules and tensors, also where ``copy.deepcopy`` refuses.

    deepcopy refuses tensors computed from parameters, as the older weight_norm leaves them, and parametrized
    modules. Of what ``torch.compile`` made, the modules that it was made of are copied.

    Args:
        memo: what was copied so far by ``id``: one object stays one object, and what is in it beforehand is taken
            instead of a copy.
    """
    if id(module) in memo:
        return memo[id(module)]  # type: ignore[no-any-return]
    if isinstance(module, torch.jit.ScriptModule):
        memo[id(module)] = copy.deepcopy(module)
        return memo[id(module)]  # type: ignore[no-any-return]
    inner = compiled_from(module)
    if inner is not module:
        memo[id(module)] = copy_structure(inner, memo)
        return memo[id(module)]  # type: ignore[no-any-return]
    left_out = (*_TABLES, _COMPILED)
    clone = object.__new__(type(module))
    memo[id(module)] = memo[id(clone)] = clone
    clone.__dict__ = {n: _copy_attribute(value, memo) for n, value in vars(module).items() if n not in left_out}
    for table in _TABLES[:2]:
        tensors = {name: t if t is None else copy_tensor(t, memo) for name, t in getattr(module, table).items()}
        clone.__dict__[table] = tensors
    clone.__dict__["_modules"] = {
        name: child if child is None else copy_structure(child, memo) for name, child in module._modules.items()
    }
    return clone


def _copy_attribute(value: Any, memo: dict[int, Any]) -> Any:
    """Containers are copied, and what they hold: tensors, as recurrent layers keep them; modules, as models do that
    call their parts in another order than they registered them; methods of modules, as hooks often are.
    """
    if type(value) is list:
        return [_copy_item(item, memo) for item in value]
    if type(value) is tuple:
        return tuple(_copy_item(item, memo) for item in value)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _copy_item(item, memo)) for key, item in value.items())
    if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
        return types.MethodType(value.__func__, copy_structure(value.__self__, memo))
    return copy_container(value)


def _copy_item(item: Any, memo: dict[int, Any]) -> Any:
    if isinstance(item, torch.Tensor):
        return copy_tensor(item, memo)
    return copy_structure(item, memo) if isinstance(item, nn.Module) else _copy_attribute(item, memo)


def replace_listed(module: nn.Module, replaced: Mapping[int, nn.Module]) -> None:
    """Let the lists, tuples and dicts of a module's attributes hold modules of ``replaced``, by the ``id`` of the
    modules whose places these took.
    """
    for name, value in vars(module).items():
        if name not in _TABLES:
            vars(module)[name] = _with_replaced(value, replaced)


def _with_replaced(value: Any, replaced: Mapping[int, nn.Module]) -> Any:
    """A container with other modules in it, itself where it has none to replace."""
    if type(value) in (list, tuple):
        items = [_replaced(item, replaced) for item in value]
        return value if all(map(operator.is_, items, value)) else type(value)(items)
    if type(value) is dict:
        items = [_replaced(item, replaced) for item in value.values()]
        return value if all(map(operator.is_, items, value.values())) else dict(zip(value, items, strict=True))
    return value


def _replaced(item: Any, replaced: Mapping[int, nn.Module]) -> Any:
    return replaced[id(item)] if id(item) in replaced else _with_replaced(item, replaced)


def copy_tensor(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    """An independent copy: a parameter of a parameter, a plain tensor of any other."""
    if id(tensor) not in memo:
        clone = tensor.detach().clone()
        memo[id(tensor)] = nn.Parameter(clone, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else clone
        memo[id(memo[id(tensor)])] = memo[id(tensor)]  # already a copy when met again
    return memo[id(tensor)]  # type: ignore[no-any-return]


def copy_container(value: Any) -> Any:
    """A shallow copy of a container, anything else as it is."""
    if type(value) in _CONTAINERS:  # every module has a dozen of them, and copy.copy takes five times as long
        return value.copy()
    return copy.copy(value) if isinstance(value, (dict, list, set)) else value


def copy_inputs(value: Any, *, own: bool = False) -> Any:
    """Inputs as they are now: tensors on the same memory, which a model may let go of, and copies of objects that it
    may change, such as a cache of keys and values.

    Args:
        own: tensors get memory of their own, for a run that must not change the user's, as ``x *= 255`` does.
    """
    return _copy_input(value, {}, own)


def _copy_input(value: Any, memo: dict[int, Any], own: bool) -> Any:
    if type(value) is torch.Tensor:
        if id(value) not in memo:
            memo[id(value)] = value.detach().clone() if own else value.detach()
        return memo[id(value)]  # one stays one: attention asks if keys are values
    if value is None or isinstance(value, (torch.Tensor, nn.Module, bool, int, float, str)):
        return value
    if type(value) in (tuple, list):
        return type(value)(_copy_input(item, memo, own) for item in value)
    if isinstance(value, dict):
        clone = copy.copy(value)
        clone.update((key, _copy_input(item, memo, own)) for key, item in value.items())
        return clone
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # what cannot be copied is taken to be constant
        return value


def borrowed(parameters: Iterable[nn.Parameter]) -> dict[int, Any]:
    """Parameters on the memory of others, by the others' ``id``: a memo for :func:`copy_structure`."""
    memo: dict[int, Any] = {}
    for tensor in parameters:
        if id(tensor) not in memo:
            made = nn.Parameter(tensor.detach(), tensor.requires_grad)
            memo[id(tensor)] = memo[id(made)] = made
    return memo


def only_read(
    known: Iterable[nn.Module],
    others: Iterable[nn.Module],
    tensors: Iterable[Any] = (),
    arguments: Iterable[nn.Parameter] = (),
) -> Iterator[nn.Parameter]:
    """The parameters that nothing but known code reads.

    Args:
        known: modules of which :func:`only_reads` is true.
        others: all other modules; what is inside them counts only if it is given too.
        tensors: what is read without a module.
        arguments: what is read without a module, but only by :data:`READING_FUNCTIONS`.
    """
    elsewhere = {id(tensor) for tensor in tensors}
    elsewhere |= {id(tensor) for module in others for tensor in (*module._parameters.values(), *_listed(module))}
    own = (p for module in known for p in module._parameters.values() if p is not None)
    return (p for p in itertools.chain(own, arguments) if id(p) not in elsewhere)


def _listed(module: nn.Module) -> Iterator[Any]:
    """What lists of a module hold, such as a recurrent layer's weights."""
    return (item for value in vars(module).values() if isinstance(value, list) for item in value)


def only_reads(module: nn.Module) -> bool:
    """Whether a module reads its own weights and runs no code but torch's."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) in _READING and not hooked


def give_back(modules: Iterable[nn.Module], model: nn.Module) -> None:
    """Replace each tensor of some modules that is on the memory of ``model``, or computed from it, by their own."""
    lent = {memory_of(tensor) for tensor in model.parameters()} - {None}
    memo: dict[int, Any] = {}
    for module in modules:
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in list(table.items()):
                if isinstance(tensor, ScaledWeight):
                    delattr(module, name)
                    module.register_parameter(name, tensor.__deepcopy__(memo))
                elif tensor is not None and memory_of(tensor) in lent:
                    table[name] = copy_tensor(tensor, memo)


def memory_of(tensor: torch.Tensor) -> int | None:
    """The address of a tensor's memory, ``None`` of tensors without one, as empty and mkldnn ones."""
    return (tensor.untyped_storage().data_ptr() or None) if tensor.layout is torch.strided else None
