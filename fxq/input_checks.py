"""What a traced model's inputs must be, and what is wrong with those it failed on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxq.errors import InputError
from fxq.plan import QuantPlan, TensorFact

FIXED = "when the model was traced, and can have no other"  # of what the message of a traced assertion says
REMEDY = "quantize it with example inputs that are given as they are here"


def input_facts(graph: fx.Graph, plan: QuantPlan) -> dict[str, TensorFact | None]:
    """The parameters of a graph's forward, with the facts of those that a tensor was given for when it was traced."""
    return {str(node.target): plan.facts.get(node.name) for node in graph.nodes if node.op == "placeholder"}


def require_float32(graph: fx.Graph, plan: QuantPlan, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise InputError for a tensor of another dtype in the place of a float32 one."""
    if "trainable" in plan.properties:  # training may be in another precision
        return
    facts = input_facts(graph, plan)
    for name, value in (dict(zip(facts, args, strict=False)) | dict(kwargs)).items():
        fact = facts.get(name)
        if fact is not None and fact.is_float32 and isinstance(value, torch.Tensor) and value.dtype != fact.dtype:
            raise InputError(_wrong_dtype(name, value, fact))


def explain_inputs(graph: fx.Graph, plan: QuantPlan, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """What is wrong with the inputs of a failed call, or ``None`` if nothing is seen to be."""
    facts = input_facts(graph, plan)
    given = dict(zip(facts, args, strict=False)) | dict(kwargs)
    for name, fact in facts.items():
        if fact is not None and given.get(name) is None:
            return f"input '{name}' is not given, with which the model was traced; give it, or {REMEDY}"
    if len(args) > len(facts) or not given.keys() <= facts.keys():
        return f"the model was traced with {', '.join(facts)} and takes no other inputs; {REMEDY}"
    misfits = (_misfit(name, given[name], fact) for name, fact in facts.items() if fact is not None)
    return next(filter(None, misfits), None)


def _misfit(name: str, value: Any, fact: TensorFact) -> str | None:
    """How a value differs from the tensor that was given when the model was traced."""
    if not isinstance(value, torch.Tensor):
        return f"input '{name}' is a {type(value).__name__}; the model takes a tensor of {_describe(fact)}"
    if value.dtype != fact.dtype:
        return _wrong_dtype(name, value, fact)
    channels_differ = value.dim() > 1 and value.shape[1:2] != fact.shape[1:2]
    if value.dim() != len(fact.shape) or channels_differ:
        return f"input '{name}' has shape {list(value.shape)}; the model was prepared with {_describe(fact)}"
    if value.shape != fact.shape:
        return (
            f"input '{name}' has shape {list(value.shape)}, and the model fails on it; it was prepared with "
            f"{_describe(fact)}"
        )
    return None


def _wrong_dtype(name: str, value: torch.Tensor, fact: TensorFact) -> str:
    return f"input '{name}' is {value.dtype}; the model was prepared for {fact.dtype}: convert it with .to()"


def _describe(fact: TensorFact) -> str:
    return f"shape {list(fact.shape)} and {fact.dtype}"
