"""Graphs as plain records, node by node, for pickling between processes of one program.

Not for files: unpickling runs code. Files are written by :mod:`fxq.serialization`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.node import Node, map_aggregate, map_arg


@dataclass(frozen=True, slots=True)
class _Reference:
    """Stands for a node among the arguments of another."""

    node: str


@dataclass(frozen=True, slots=True)
class _Operator:
    """Stands for one of ``torch.ops``, whose objects cannot be pickled."""

    name: str  # "aten.relu.default"


class Record(NamedTuple):
    """One node."""

    name: str
    op: str
    target: Any
    args: Any
    kwargs: Any


def records_of(graph: fx.Graph) -> list[Record]:
    """The nodes of a graph in order."""
    return [
        Record(
            node.name,
            node.op,
            _Operator(str(node.target)) if isinstance(node.target, torch._ops.OpOverload) else node.target,
            map_arg(node.args, _reference),
            map_arg(node.kwargs, _reference),
        )
        for node in graph.nodes
    ]


def _reference(node: Node) -> Any:
    return _Reference(node.name)


def graph_of(records: Sequence[Record]) -> fx.Graph:
    """The graph that :func:`records_of` was given, with the same names."""
    graph = fx.Graph()
    nodes: dict[str, Node] = {}

    def node_of(value: Any) -> Any:
        return nodes[value.node] if isinstance(value, _Reference) else value

    for name, op, target, args, kwargs in records:
        function = operator.attrgetter(target.name)(torch.ops) if isinstance(target, _Operator) else target
        nodes[name] = graph.create_node(
            op, function, map_aggregate(args, node_of), map_aggregate(kwargs, node_of), name=name
        )
    return graph
