"""Ranks of tensors inside the graph become numbers, and assertions that hold for them go.

Code that asserts a rank, as in ``torch._assert(x.ndim == 4, ...)``, leaves a read of the tensor beside the op that
computes with it, and a conv with two readers cannot take in the BatchNorm or relu after it. Where inputs have the rank
of the example inputs, so have all tensors; of the inputs themselves the assertions stay.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node, map_arg

from fxq.graph_module import QuantModule
from fxq.pass_base import Pass
from fxq.plan import QuantPlan

_COMPARISONS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)


class FoldRanks(Pass):
    """``x.ndim``, ``x.dim()``, comparisons with them, and assertions that hold."""

    requires = frozenset({"facts"})

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        folded = 0
        for node in list(module.graph.nodes):
            if _is_kept_assertion(node):
                _erase(node, plan)
                folded += 1
                continue
            value = _value(node, plan)
            if value is not None:
                _replace(node, value)
                _erase(node, plan)
                folded += 1
        return folded


def _value(node: Node, plan: QuantPlan) -> Any:
    """What a node always is, ``None`` if that is not known."""
    if node.op == "call_function" and node.target in _COMPARISONS:
        constant = not node.all_input_nodes and not node.kwargs
        return node.target(*node.args) if constant else None
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or source.op == "placeholder" or source.name not in plan.facts:
        return None
    by_method = node.op == "call_method" and node.target in ("dim", "ndimension")
    by_attribute = node.op == "call_function" and node.target is getattr and node.args[1] == "ndim"
    return len(plan.facts[source.name].shape) if by_method or by_attribute else None


def _is_kept_assertion(node: Node) -> bool:
    return node.op == "call_function" and node.target is torch._assert and node.args[0] is True


def _replace(node: Node, value: Any) -> None:
    for user in list(node.users):
        user.args = map_arg(user.args, lambda source: value if source is node else source)
        user.kwargs = map_arg(user.kwargs, lambda source: value if source is node else source)


def _erase(node: Node, plan: QuantPlan) -> None:
    node.graph.erase_node(node)
    plan.forget(node.name)
