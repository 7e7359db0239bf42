"""Run a graph node by node, each node on all batches before the next.

Values are dropped when their last reader has run. Dequantized activations are not stored at all: they are made from
their integers at each reading, which costs little time and saves three quarters of the memory. Where a graph overwrites
memory, other nodes may read it by other names, so that all is stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx import Node

from fxq.aliases import overwrites
from fxq.copying import copy_inputs
from fxq.graph_module import QuantModule
from fxq.interpreter import graph_signature, plain
from fxq.ops import LINEAR
from fxq.partition import Inputs
from fxq.qdq import is_dequantize, is_quantize

_PART = 1 << 16  # elements quantized or dequantized at a time


class Walk:
    """One graph run node by node, each node on all batches.

    Args:
        module: prepared or reference; its observers are passed by.
        inputs: ``(args, kwargs)`` of each call; shapes may differ.
        frugal: do not store what leads to one quantize only, either; it is made batch by batch, when that quantize
            runs and at each reading before. Takes the least memory where each layer is read once.

    Example:
        >>> walk = Walk(reference, [((images,), {})])                                 # doctest: +SKIP
        >>> for node in reference.graph.nodes:                                        # doctest: +SKIP
        ...     walk.run(node); print(node, walk.values(node)); walk.release(node)
    """

    def __init__(self, module: QuantModule, inputs: Sequence[Inputs], *, frugal: bool = False) -> None:
        self.module = module
        self.size = len(inputs)
        self._interpreter = fx.Interpreter(module)
        self._observers = set(module.plan.observer_nodes(module.graph))
        overwritten = any(_overwrites(node, module) for node in module.graph.nodes)
        self._inputs = [bound_arguments(module, *copy_inputs(given, own=overwritten)) for given in inputs]
        self._made_at_reading = _constants(module.graph) if overwritten else _made_at_reading(module.graph, frugal)
        self._values: dict[Node, list[Any]] = {}
        self._constants: dict[Node, Any] = {}
        self._last = _last_reads(module.graph, self._made_at_reading)

    def run(self, node: Node) -> None:
        """Run a node whose inputs have run; once more, if a constant it reads has changed."""
        self._constants.clear()
        if node.op == "placeholder":
            name = str(node.target).lstrip("*")
            self._values[node] = [bound.pop(name, None) for bound in self._inputs]
        elif node not in self._made_at_reading:
            self._values[node] = [self._call(node, batch) for batch in range(self.size)]

    def values(self, node: Node) -> list[Any]:
        """A node's value for each batch; it has run, and has not been released."""
        return [self.value(node, batch) for batch in range(self.size)]

    def value(self, node: Node, batch: int) -> Any:
        """A node's value for one batch."""
        if node not in self._made_at_reading:
            return self._values[node][batch]
        return self._constant(node) if _is_constant(node) else self._call(node, batch)

    def arguments(self, node: Node, batch: int) -> tuple[Any, ...]:
        """What a node is called with in one batch: ``node.args`` with values for nodes."""
        return fx.map_arg(node.args, lambda source: self.value(source, batch))

    def release(self, node: Node) -> None:
        """Drop the values that no node after this one reads."""
        for source in self._last.get(node, ()):
            self._values.pop(source, None)

    def _call(self, node: Node, batch: int) -> Any:
        if node.name in self._observers:
            return self.value(node.args[0], batch)  # type: ignore[arg-type]
        if node.target is LINEAR.target and is_dequantize(node.args[1]) and _is_constant(node.args[1]):  # type: ignore[arg-type]
            return self._linear(node, node.args[1], batch)  # type: ignore[arg-type]
        args, kwargs = plain((node.args, node.kwargs), lambda source: self.value(source, batch))
        if is_quantize(node):
            return _quantize_in_parts(node.target, *args)
        return getattr(self._interpreter, node.op)(node.target, args, kwargs)

    def _linear(self, layer: Node, weight: Node, batch: int) -> torch.Tensor:
        def value(node: Node) -> Any:
            return fx.map_arg(weight.args, self._constant) if node is weight else self.value(node, batch)

        args: Any = fx.map_arg(layer.args, value)
        return _linear_in_parts(weight.target, *args)

    def _constant(self, node: Node) -> Any:
        """Made once for all batches of what runs."""
        if node not in self._constants:
            args = fx.map_arg(node.args, self._constant)
            self._constants[node] = getattr(self._interpreter, node.op)(node.target, args, {})
        return self._constants[node]


def _linear_in_parts(
    dequantize: Any, x: torch.Tensor, weight: Sequence[Any], bias: torch.Tensor | None = None
) -> torch.Tensor:
    """A linear layer, some outputs at a time: the last layer's weight in float is half of some models."""
    rows = max(1, _PART // weight[0].shape[1])
    parts = []
    for start in range(0, len(weight[0]), rows):
        own = slice(start, start + rows)
        part = dequantize(*(value[own] if isinstance(value, torch.Tensor) else value for value in weight))
        parts.append(F.linear(x, part, None if bias is None else bias[own]))
    return torch.cat(parts, -1)


def _quantize_in_parts(quantize: Any, x: torch.Tensor, *how: Any) -> torch.Tensor:
    """What quantize gives, whose temporaries would be as large as the layer's output beside it."""
    integers = torch.empty(x.numel(), dtype=how[-1])
    for part, result in zip(x.flatten().split(_PART), integers.split(_PART), strict=True):
        result.copy_(quantize(part, *how))
    return integers.view(x.shape)


def bound_arguments(module: QuantModule, args: tuple[Any, ...], kwargs: Any) -> dict[str, Any]:
    """What the parameters of a graph's forward get, by name, in the order of its placeholders."""
    bound = graph_signature(module.graph).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _is_constant(node: Node) -> bool:
    """A tensor of the module, or what is dequantized from one."""
    return node.op == "get_attr" or (is_dequantize(node) and node.args[0].op == "get_attr")  # type: ignore[union-attr]


def _overwrites(node: Node, module: QuantModule) -> bool:
    """Whether a node writes to memory that others may read."""
    if not node.op.startswith("call_"):
        return False
    leaf = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return overwrites(node, leaf) or "out" in node.kwargs


def _constants(graph: fx.Graph) -> set[Node]:
    return {node for node in graph.nodes if _is_constant(node)}


def _made_at_reading(graph: fx.Graph, frugal: bool) -> set[Node]:
    """Nodes whose values are not stored: constants, what is dequantized, and the rest as :class:`Walk` says."""
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        leads = frugal and node.op.startswith("call_") and len(node.users) == 1 and not is_quantize(node)
        if leads:
            reader = next(iter(node.users))
            leads = is_quantize(reader) or reader in found
        if leads or node.op == "get_attr" or is_dequantize(node):
            found.add(node)
    return found


def _last_reads(graph: fx.Graph, made: set[Node]) -> dict[Node, list[Node]]:
    """For each node, those whose values nobody reads after it, itself included if nobody reads it at all."""
    last: dict[Node, Node] = {}
    for node in graph.nodes:
        last[node] = node
        for source in node.all_input_nodes:
            for stored in _stored(source, made):
                last[stored] = node
    found: dict[Node, list[Node]] = {}
    for node, reader in last.items():
        found.setdefault(reader, []).append(node)
    return found


def _stored(node: Node, made: set[Node]) -> Iterator[Node]:
    """The nodes whose values are read when this one is."""
    if node not in made:
        yield node
    for source in node.all_input_nodes if node in made else ():
        yield from _stored(source, made)
