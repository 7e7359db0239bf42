"""Pairs of layers that follow each other with nothing between them but what works on each channel by itself.

What such a pair computes can be moved from one layer to the other, channel by channel: :mod:`fxq.passes.equalize`
moves factors, :mod:`fxq.passes.absorb_bias` moves part of the biases. Between the two layers may be relu, leaky_relu,
clamps at zero such as relu6, and pooling where axis 1 is the channels. Nothing else may read what is between, and
no other layer shares a weight: no residual add, no second branch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxq.graph_module import QuantModule
from fxq.ops import (
    ADAPTIVE_AVG_POOL2D,
    AVG_POOL2D,
    CLAMP,
    CONV_TRANSPOSES,
    CONVS,
    LEAKY_RELU,
    LINEAR,
    MAX_POOL2D,
    RELU,
    Dictionary,
    Op,
)
from fxq.partition import Inputs
from fxq.passes.layer_weights import (
    axis_one_is_channels,
    is_shared,
    set_parameters,
    static_parameters,
)
from fxq.plan import QuantPlan
from fxq.walk import Walk

POOLS = (MAX_POOL2D, AVG_POOL2D, ADAPTIVE_AVG_POOL2D)  # between convs, where they go over places, not channels
_BETWEEN = (RELU, LEAKY_RELU)


@dataclass(eq=False)
class Layer:
    """A layer with constant weights, in float64 while a pass runs.

    Attributes:
        node: calls it; ``op`` is what it calls.
        where: its module path, or its name where it has none.
        weight, bias: as they will be written by :func:`store_layers`.
    """

    node: Node
    op: Op
    where: str
    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Pair:
    """Two layers and the nodes between them, in order."""

    first: Layer
    second: Layer
    between: tuple[Node, ...]

    def by_channel(self, x: torch.Tensor) -> torch.Tensor:
        """A value between the two as ``[channels, values of each]``."""
        return x.movedim(-1 if self.first.op is LINEAR else 1, 0).flatten(1)


def find_pairs(module: QuantModule, plan: QuantPlan, ops: Dictionary, readers: Counter[int]) -> list[Pair]:
    """All pairs of a graph, in order; a layer in the middle of a chain is the same object in both of its pairs.

    ``readers`` is what :func:`fxq.passes.layer_weights.count_readers` counted.
    """
    layers = _layers(module, plan, ops, readers)
    return [pair for layer in layers.values() if (pair := _pair(layer, layers, ops)) is not None]


def _layers(module: QuantModule, plan: QuantPlan, ops: Dictionary, readers: Counter[int]) -> dict[Node, Layer]:
    """The layers whose weights may be changed: constant, and read by nobody else."""
    found = {}
    for node in module.graph.nodes:
        op = ops.op_of(node)
        if op is None or op not in (*CONVS, *CONV_TRANSPOSES, LINEAR):
            continue
        layer = layer_at(node, op, module, plan, readers)
        if layer is not None and (op is LINEAR or axis_one_is_channels(node, layer.weight, plan)):
            found[node] = layer
    return found


def layer_at(node: Node, op: Op, module: QuantModule, plan: QuantPlan, readers: Counter[int]) -> Layer | None:
    """The layer that a node calls; ``None`` if its weight or bias is not constant, or others read it too."""
    parameters = static_parameters(node, op, module)
    given = [op.get(node, name) for name in ("weight", "bias") if op.get(node, name) is not None]
    if parameters is None or any(is_shared(tensor, module, readers) for tensor in given):
        return None
    return Layer(node, op, plan.origin(node.name).module_path or node.name, *parameters)


def _pair(first: Layer, layers: dict[Node, Layer], ops: Dictionary) -> Pair | None:
    """The pair that ``first`` begins, if what is between it and the next layer works on channels."""
    between: list[Node] = []
    node = first.node
    while len(node.users) == 1:
        user = next(iter(node.users))
        op = ops.op_of(user)
        if op is None or op.get(user, next(iter(op.signature.defaults))) is not node:
            return None
        if user in layers:
            same_axis = (first.op is LINEAR) == (op is LINEAR)
            return Pair(first, layers[user], tuple(between)) if same_axis else None
        passes = op in _BETWEEN or (op in POOLS and first.op is not LINEAR)
        if not passes and upper_bound(user, ops) is None:
            return None
        between.append(user)
        node = user
    return None


def upper_bound(node: Node, ops: Dictionary) -> float | None:
    """The upper bound of a clamp at zero and a positive number; ``None`` for anything else."""
    if ops.op_of(node) is not CLAMP:
        return None
    low, high = node.args[1:]
    numbers = isinstance(low, (int, float)) and isinstance(high, (int, float))
    return float(high) if numbers and low == 0 and high > 0 else None  # type: ignore[arg-type, operator]


def values_of(nodes: Collection[Node], module: QuantModule, inputs: Inputs) -> Iterator[tuple[Node, torch.Tensor]]:
    """The nodes with their values as the graph runs on the inputs; it does not run if there are none."""
    if not nodes:
        return
    module.recompile()  # inputs are bound to the parameters of its forward
    walk = Walk(module, [inputs])
    with torch.no_grad():
        for node in module.graph.nodes:
            walk.run(node)
            if node in nodes:
                yield node, walk.values(node)[0]
            walk.release(node)


def store_layers(layers: Iterable[Layer], module: QuantModule, readers: Counter[int]) -> None:
    """Write the weights and biases of layers that a pass has changed; one that is named twice is written once."""
    for layer in {layer.node: layer for layer in layers}.values():
        set_parameters(layer.node, layer.op, layer.weight, layer.bias, module, readers)
    module.graph.eliminate_dead_code()
    module.release_unused()
