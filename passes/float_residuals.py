"""Let the sums of a residual stream run in float.

A transformer adds the output of every block to one stream, and each block reads the stream through a layer_norm. A few
channels of the stream grow far beyond the others; with one scale for all of them the others round to a few integers,
and each sum rounds them again. Kept in float until the norm has evened them out, the stream costs no more time:
torch's int8 layer_norm and int8 add of tokens are no faster than those in float.

A class token that joins the patches has a range of its own, often far smaller than theirs; it is what the classifier
reads in the end. So what joins tokens for a layer_norm or for such a sum is float, too.
"""

from __future__ import annotations

from torch.fx import Node

from fxq.graph_module import QuantModule
from fxq.op_table import Backend, sharing_ends
from fxq.ops import ADD, CAT, LAYER_NORM, MUL, Dictionary
from fxq.pass_base import Pass
from fxq.plan import JOINED, RESIDUAL, QuantPlan, Status


class FloatResiduals(Pass):
    """Sums and joins that reach a layer_norm, directly or through others and moves, and factors of their terms."""

    requires = frozenset({"annotated"})

    def __init__(self, backend: Backend, ops: Dictionary) -> None:
        self.backend, self.ops = backend, ops

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        moving = sharing_ends(plan, self.backend) | {
            name for name, decision in plan.decisions.items() if decision.status is Status.SHAPE_ONLY
        }
        normed: set[Node] = set()  # whose values a layer_norm reads, added to others or moved about at most
        for node in reversed(module.graph.nodes):
            if any(self._is_norm(user) or (user in normed and self._passes_on(user, moving)) for user in node.users):
                normed.add(node)
        sums = {node for node in normed if self.ops.op_of(node) is ADD}
        factors = {
            node
            for node in module.graph.nodes
            if self.ops.op_of(node) is MUL and node.users and all(user in sums for user in node.users)
        }
        joins = {node for node in normed if self.ops.op_of(node) is CAT}
        made = plan.make_float_at({node.name for node in sums | factors}, RESIDUAL)
        return made + plan.make_float_at({node.name for node in joins}, JOINED)

    def _is_norm(self, node: Node) -> bool:
        return self.ops.op_of(node) is LAYER_NORM

    def _passes_on(self, node: Node, moving: set[str]) -> bool:
        return node.name in moving or self.ops.op_of(node) in (ADD, CAT)
