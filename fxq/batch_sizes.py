"""Which sizes in a graph grow with the batch: the graph runs on shapes alone, with two batch sizes.

A size that is the same in both runs is a constant of the model; one that grows in proportion is a :class:`Batch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch._subclasses import FakeTensorMode
from torch.fx import Node

from fxq.errors import FxqError, InputError
from fxq.graph_module import QuantModule
from fxq.interpreter import Interpreter

_BATCHES = (2, 3)


class Batch(NamedTuple):
    """A size of ``multiple`` times the batch."""

    multiple: int


Size = int | Batch


@dataclass(frozen=True, slots=True)
class Shaped:
    """Sizes and dtype of a tensor."""

    shape: tuple[Size, ...]
    dtype: torch.dtype


def sizes(module: QuantModule, dynamic: bool) -> dict[Node, Any]:
    """The value of each node, with :class:`Shaped` for tensors and :class:`Batch` for numbers that follow the batch.

    Args:
        module: a graph with facts of its inputs.
        dynamic: whether the first dimension of every input is a batch of any size; else sizes are the example's.

    Raises:
        InputError: if the model does not run with other batch sizes.
    """
    if not dynamic:
        first = _run(module, None)
        return {node: _join(first[node], first[node], 1) for node in first}
    try:
        one, two = (_run(module, batch) for batch in _BATCHES)
    except FxqError:
        raise
    except Exception as error:
        raise InputError(
            f"the model does not run with batches of {_BATCHES[0]} and {_BATCHES[1]} "
            f"({type(error).__name__}: {error}); pass dynamic_batch=False to fix the batch size of the example"
        ) from error
    return {node: _join(one[node], two[node], _BATCHES[1] - _BATCHES[0]) for node in one}


def _run(module: QuantModule, batch: int | None) -> dict[Node, Any]:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        inputs = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in example_inputs(module, batch)]
        recorder = _Recorder(module)
        recorder.run(*inputs)
    return recorder.values


def example_inputs(module: QuantModule, batch: int | None = None) -> list[Any]:
    """Zeros of the shapes that a model was prepared with, with another first dimension if ``batch`` is given.

    Inputs that the example left at their defaults are these.
    """
    found: list[Any] = []
    for node in module.graph.nodes:
        fact = module.plan.facts.get(node.name)
        if node.op == "placeholder" and fact is not None:
            shape = (batch, *fact.shape[1:]) if batch is not None and fact.shape else fact.shape
            found.append(torch.zeros(shape, dtype=fact.dtype))
        elif node.op == "placeholder":
            found.append(node.args[0] if node.args else None)
    return found


class _Recorder(Interpreter):
    """Keeps every value; assertions, which look at values that are not there, are taken to hold."""

    def __init__(self, module: QuantModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.extra_traceback = False
        self.values: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        value = None if n.target is torch._assert else super().run_node(n)
        self.values[n] = value
        return value


def _join(one: Any, two: Any, difference: int) -> Any:
    if isinstance(one, torch.Tensor):
        return Shaped(tuple(_size(a, b, difference) for a, b in zip(one.shape, two.shape, strict=True)), one.dtype)
    if isinstance(one, (tuple, list)):
        return [_join(a, b, difference) for a, b in zip(one, two, strict=True)]
    if isinstance(one, dict):
        return {key: _join(value, two[key], difference) for key, value in one.items()}
    if isinstance(one, int) and not isinstance(one, bool):
        return _size(one, two, difference)
    return one


def _size(one: int, two: int, difference: int) -> Size:
    multiple = (two - one) // difference
    if one == two:
        return one
    if multiple * _BATCHES[0] != one or multiple * _BATCHES[1] != two:
        raise InputError(
            f"a size of the model is {one} and {two} for batches of {_BATCHES[0]} and {_BATCHES[1]}, which is no "
            f"multiple of the batch; pass dynamic_batch=False to fix the batch size of the example"
        )
    return Batch(multiple)


def is_fixed(shape: Sequence[Size]) -> bool:
    """Whether no size follows the batch."""
    return not any(isinstance(size, Batch) for size in shape)
