"""Take light ops that stand alone back to float.

A pool, an add or a reshape between float ops gains nothing from int8: it would only add a quantize before
and a dequantize after, and their rounding. So a connected set of int8 regions without a single heavy one
(conv, linear, ...) stays float.
"""

from __future__ import annotations

import networkx as nx

from fxq.graph_module import QuantModule
from fxq.op_table import Backend
from fxq.pass_base import Pass
from fxq.plan import ISLAND, QuantPlan


class DropIslands(Pass):
    """Connected int8 regions without a heavy op become float."""

    requires = frozenset({"annotated"})

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        heavy = {row.name for row in self.backend.rows if row.heavy}
        region_of = {name: number for number, region in enumerate(plan.regions) for name in region.nodes}
        graph: nx.Graph[int] = nx.Graph()
        graph.add_nodes_from(range(len(plan.regions)))
        observers = set(plan.observer_nodes(module.graph))
        for node in module.graph.nodes:
            readers = [r for user in node.users for r in (user.users if user.name in observers else (user,))]
            for reader in readers:
                if node.name in region_of and reader.name in region_of:
                    graph.add_edge(region_of[node.name], region_of[reader.name])
        regions = list(plan.regions)
        dropped = [
            regions[number]
            for component in nx.connected_components(graph)
            if not any(regions[number].row in heavy for number in component)
            for number in component
        ]
        plan.make_float(dropped, ISLAND)
        return len(dropped)
