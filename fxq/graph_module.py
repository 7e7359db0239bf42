"""The module class of every stage: a ``torch.fx.GraphModule`` that carries a plan."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn

from fxq.engine import running
from fxq.errors import InputError, StageError
from fxq.plan import QuantPlan, Stage, TensorFact


class QuantModule(fx.GraphModule):
    """A traced model with its :class:`~fxq.plan.QuantPlan` in ``meta["fxq"]``; called like the model."""

    @property
    def plan(self) -> QuantPlan:
        plan = self.meta.get("fxq")
        if not isinstance(plan, QuantPlan):
            raise StageError("this graph module has no quantization plan; make one with fxq.prepare")
        return plan

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            plan = self.__dict__.get("meta", {}).get("fxq")
            if plan is None or name not in plan.attributes:
                raise
            return plan.attributes[name]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        lowered = "fxq" in self.meta and self.plan.stage is Stage.LOWERED
        try:
            if not lowered:  # a quantize of torch refuses other dtypes itself
                _require_float32(self, args, kwargs)
                return super().__call__(*args, **kwargs)
            with running():
                return super().__call__(*args, **kwargs)
        except (RuntimeError, TypeError, AttributeError) as error:
            explanation = explain_inputs(self, args, kwargs)
            if explanation is None:
                raise
            raise InputError(explanation) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantModule:
        # Packed weights never change, and copying one would pack it again under whatever engine is set.
        for value in vars(self).values():
            if isinstance(value, torch.ScriptObject):
                memo[id(value)] = value
        clone = super().__deepcopy__(memo)
        assert isinstance(clone, QuantModule)
        return clone


class Tensors(nn.Module):
    """Holds the tensors that stood at a module's path; prints their names and shapes."""

    def extra_repr(self) -> str:
        tensors = [*self._parameters.items(), *self._buffers.items()]
        return ", ".join(f"{name}{list(tensor.shape)}" for name, tensor in tensors if tensor is not None)


def get_attribute(module: nn.Module, path: str) -> Any:
    """The parameter, buffer or other attribute at a dotted path."""
    parent, _, name = path.rpartition(".")
    return getattr(module.get_submodule(parent), name)


def set_tensor(module: nn.Module, path: str, value: torch.Tensor) -> None:
    """Put a tensor at a dotted path, as a parameter if it is one, else as a buffer; makes what modules lack."""
    parent, _, name = path.rpartition(".")
    owner = module
    for part in filter(None, parent.split(".")):
        if part not in owner._modules:
            owner.add_module(part, Tensors())
        owner = owner.get_submodule(part)
    if name in owner.__dict__ or name in owner._parameters or name in owner._buffers:
        delattr(owner, name)
    if isinstance(value, nn.Parameter):
        owner.register_parameter(name, value)
    else:
        owner.register_buffer(name, value)


def free_path(module: nn.Module, path: str) -> str:
    """``path``, or ``path_1``, ``path_2``, ... where that is taken."""
    candidate, number = path, 0
    while _taken(module, candidate):
        number += 1
        candidate = f"{path}_{number}"
    return candidate


def _taken(module: nn.Module, path: str) -> bool:
    try:
        get_attribute(module, path)
    except AttributeError:
        return False
    return True


def copy_module(module: QuantModule) -> QuantModule:
    """An independent copy of a module and its plan."""
    return copy.deepcopy(module)


def _require_float32(module: QuantModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if "fxq" not in module.meta:
        return
    names = [node.name for node in module.graph.nodes if node.op == "placeholder"]
    for name, value in (dict(zip(names, args, strict=False)) | kwargs).items():
        fact = module.plan.facts.get(name)
        if fact is not None and fact.is_float32 and isinstance(value, torch.Tensor) and value.dtype != fact.dtype:
            raise InputError(_wrong_dtype(name, value, fact))


def _wrong_dtype(name: str, value: torch.Tensor, fact: TensorFact) -> str:
    return f"input '{name}' is {value.dtype}; the model was prepared for {fact.dtype}: convert it with .to()"


def explain_inputs(module: QuantModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """What is wrong with the inputs of a failed call, or ``None`` if nothing is seen to be."""
    if "fxq" not in module.meta:
        return None
    given = dict(zip((n.name for n in module.graph.nodes if n.op == "placeholder"), args, strict=False)) | kwargs
    for name, value in given.items():
        fact = module.plan.facts.get(name)
        if fact is None:
            continue
        if not isinstance(value, torch.Tensor):
            return f"input '{name}' is a {type(value).__name__}; the model takes a tensor of {_describe(fact)}"
        if value.dtype != fact.dtype:
            return _wrong_dtype(name, value, fact)
        channels_differ = value.dim() > 1 and value.shape[1:2] != fact.shape[1:2]
        if value.dim() != len(fact.shape) or channels_differ:
            return f"input '{name}' has shape {list(value.shape)}; the model was prepared with {_describe(fact)}"
        if value.shape[2:] != fact.shape[2:]:
            return (
                f"input '{name}' has shape {list(value.shape)}, and the model fails on it; it was prepared with "
                f"{_describe(fact)}"
            )
    return None


def _describe(fact: TensorFact) -> str:
    return f"shape {list(fact.shape)} and {fact.dtype}"
