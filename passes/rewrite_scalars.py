"""Bring arithmetic with scalars to ``tensor + c`` and ``tensor * c``, for which int8 kernels exist.

``c + x`` becomes ``x + c``, ``x - c`` becomes ``x + (-c)``, ``x / c`` becomes ``x * (1 / c)``. Only tensors are
touched: arithmetic on shapes stays exactly as it was.
"""

from __future__ import annotations

from numbers import Real

from torch.fx import Node

from fxq.graph_module import QuantModule
from fxq.ops import ADD, DIV, MUL, SUB, Dictionary
from fxq.pass_base import Pass
from fxq.plan import QuantPlan, TensorFact


class RewriteScalars(Pass):
    """Scalar operands go second; subtraction and division by a scalar become addition and multiplication."""

    requires = frozenset({"canonical", "facts"})

    def __init__(self, ops: Dictionary) -> None:
        self.ops = ops

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        changed = 0
        for node in module.graph.nodes:
            op = self.ops.op_of(node)
            fact = plan.facts.get(node.name)
            if op not in (ADD, SUB, MUL, DIV) or fact is None:
                continue
            left, right = node.args
            if any(not known.is_float32 for known in (fact, *_facts_of_inputs(node, plan))):
                continue  # integers and booleans have rules of their own, and nothing to gain here
            if op in (ADD, MUL) and isinstance(left, Real) and isinstance(right, Node):
                node.args = (right, left)
            elif op is SUB and isinstance(left, Node) and isinstance(right, Real):
                node.target, node.args = ADD.target, (left, -right)
            elif op is DIV and isinstance(left, Node) and isinstance(right, Real) and right != 0:
                node.target, node.args = MUL.target, (left, 1 / right)
            else:
                continue
            changed += 1
        return changed


def _facts_of_inputs(node: Node, plan: QuantPlan) -> list[TensorFact]:
    return [plan.facts[source.name] for source in node.all_input_nodes if source.name in plan.facts]
