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
from fxq.plan import QuantPlan


class RewriteScalars(Pass):
    """Scalar operands go second; subtraction and division by a scalar become addition and multiplication."""

    requires = frozenset({"canonical", "facts"})

    def __init__(self, ops: Dictionary) -> None:
        self.ops = ops

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        changed = 0
        for node in module.graph.nodes:
            op = self.ops.op_of(node)
            if op not in (ADD, SUB, MUL, DIV) or node.name not in plan.facts:
                continue
            left, right = node.args
            if op in (ADD, MUL) and isinstance(left, Real) and isinstance(right, Node):
                node.args = (right, left)
            elif op is SUB and isinstance(left, Node) and isinstance(right, Real):
                node.target, node.args = ADD.target, (left, -right)
            elif op is DIV and isinstance(left, Node) and isinstance(right, Real) and right != 0:
                node.target, node.args = MUL.target, (left, 1 / right)  # type: ignore[operator]
            else:
                continue
            changed += 1
        return changed
