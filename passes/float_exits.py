"""Let averages at the exit run in float.

A pool, mean or bilinear interpolation computes new values and rounds them to its input's integers. Where its
output leaves int8 anyway, averaging after the dequantize keeps that precision at no cost: the scores of a
classifier that ends in a global average would otherwise tie.
"""

from __future__ import annotations

from fxq.graph_module import QuantModule
from fxq.op_table import Backend, averaging_ends, sharing_ends
from fxq.pass_base import Pass
from fxq.plan import AT_EXIT, QuantPlan


class FloatExits(Pass):
    """Averaging regions none of whose results is read by an int8 kernel become float."""

    requires = frozenset({"annotated"})

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        region_of = {name: region for region in plan.regions for name in region.nodes}
        sharing, averaging = sharing_ends(plan, self.backend), averaging_ends(plan, self.backend)
        leaves: set[str] = set()  # nodes whose values are moved about at most, and then leave int8
        for node in reversed(module.graph.nodes):
            if node.name in sharing and all(u.name in leaves or u.name not in region_of for u in node.users):
                leaves.add(node.name)
        dropped = [region for region in plan.regions if region.end in averaging & leaves]
        plan.make_float(dropped, AT_EXIT)
        return len(dropped)
