"""Group the slots that must have one scale and zero_point.

A tensor and its readers share qparams unless a reader asks for another spec. Ops that only select, move or
average values (pools, cat, reshape, ...) share their input's with their output's. Groups are the connected
components of these two relations. Kernels that dictate their output's qparams (sigmoid, softmax, ...) fix
their group; an op that would unite such a group with others keeps its inputs apart if its kernel can
requantize them, and goes back to float otherwise.

What cat joins must have one scale behind it, but not before it, where its kernel can requantize. A tensor that a
convolution reads, too, as the blocks of a YOLO or the skips of a U-Net, keeps a scale of its own: in the scale of the
join it could be left with a few integers. Unless it comes from another join (ShuffleNet): to share is then cheaper,
and both hold the same kind of values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import networkx as nx
from torch.fx import Node

from fxq.graph_module import QuantModule
from fxq.op_table import Backend, Fixed, OpRow, Out
from fxq.ops import Dictionary
from fxq.pass_base import Pass
from fxq.plan import MIXED_QPARAMS, QuantPlan, Region, Slot


class ShareQParams(Pass):
    """Fill ``plan.groups`` and ``plan.fixed``."""

    requires = frozenset({"annotated"})
    ensures = frozenset({"grouped"})

    def __init__(self, backend: Backend, ops: Dictionary) -> None:
        self.backend, self.ops = backend, ops

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        nodes = {node.name: node for node in module.graph.nodes}
        while True:
            links, refused = self._links(nodes, plan)
            if not refused:
                return self._number(links, plan)
            plan.make_float(refused, MIXED_QPARAMS)

    def _links(self, nodes: dict[str, Node], plan: QuantPlan) -> tuple[nx.Graph[Any], list[Region]]:
        """Which slots share, and the regions that cannot be part of it."""
        links: nx.Graph[Any] = nx.Graph()
        links.add_nodes_from(plan.specs)
        for region in plan.regions:
            for slot, producer in self._inputs(region, nodes):
                self._link_to_producer(slot, producer, links, plan)
            self._link_weight(region, nodes, links, plan)
        many: list[tuple[Region, OpRow]] = []
        for region in plan.regions:
            row = self.backend.row(region.row)
            if row.out is Out.SHARE:
                inputs = [slot for slot, _ in self._inputs(region, nodes)]
                if len(inputs) == 1:
                    self._link_output(region, inputs, links, plan)
                else:
                    many.append((region, row))
        return links, self._link_many(many, nodes, links, plan)

    def _inputs(self, region: Region, nodes: dict[str, Node]) -> Iterator[tuple[Slot, Node]]:
        for name in region.nodes:
            op = self.ops.op_of(nodes[name])
            assert op is not None
            for path, producer in op.tensor_arguments(nodes[name]):
                if producer.name not in region.nodes:
                    yield Slot(name, path), producer

    def _link_to_producer(self, slot: Slot, producer: Node, links: nx.Graph[Any], plan: QuantPlan) -> None:
        source = Slot(producer.name)
        if producer.name in plan.containers and producer.name in plan.decisions:
            op = self.ops.op_of(producer)
            assert op is not None
            source = Slot(producer.name, op.tensor_arguments(producer)[0][0])
        if source in plan.specs:
            if plan.specs[source] == plan.specs[slot]:
                links.add_edge(source, slot)
        else:  # a float tensor: readers with one spec read one quantized version of it
            links.add_edge((producer.name, plan.specs[slot]), slot)

    def _link_weight(self, region: Region, nodes: dict[str, Node], links: nx.Graph[Any], plan: QuantPlan) -> None:
        root = nodes[region.nodes[0]]
        op = self.ops.op_of(root)
        if op is not None and op.weight is not None:
            slot = Slot(root.name, (op.index(op.weight),))
            links.add_edge((op.get(root, op.weight).target, plan.specs[slot]), slot)

    @staticmethod
    def _link_output(region: Region, inputs: list[Slot], links: nx.Graph[Any], plan: QuantPlan) -> None:
        output = Slot(region.end)
        for slot in inputs:
            if output in plan.specs and plan.specs[slot] == plan.specs[output]:
                links.add_edge(slot, output)

    def _link_many(
        self, many: list[tuple[Region, OpRow]], nodes: dict[str, Node], links: nx.Graph[Any], plan: QuantPlan
    ) -> list[Region]:
        """Unite the inputs of ops like cat, except those whose qparams a kernel dictates; returns who cannot."""
        refused = []
        fixed = {slot for _, component in self._fixed_components(links, plan) for slot in component}
        own = self._read_by_layers(many, nodes, links, plan)
        for region, row in many:
            inputs = [slot for slot, _ in self._inputs(region, nodes)]
            free = [slot for slot in inputs if slot not in fixed]
            if len(free) < len(inputs) and not row.mixed_inputs:
                refused.append(region)
            else:
                apart = own if row.mixed_inputs else set()
                self._link_output(region, [slot for slot in free if slot not in apart], links, plan)
        return refused

    def _read_by_layers(
        self, many: list[tuple[Region, OpRow]], nodes: dict[str, Node], links: nx.Graph[Any], plan: QuantPlan
    ) -> set[Slot]:
        """Slots of tensors that a conv or linear reads and that do not come from a join."""
        layers = [region for region in plan.regions if self.backend.row(region.row).heavy]
        read = {slot for region in layers for slot, _ in self._inputs(region, nodes)}
        joined = {Slot(region.end) for region, _ in many}
        found: set[Slot] = set()
        for component in nx.connected_components(links):
            if component & read and not component & joined:
                found |= component
        return found

    def _fixed_components(self, links: nx.Graph[Any], plan: QuantPlan) -> Iterator[tuple[Fixed, set[Slot]]]:
        for region in plan.regions:
            out = self.backend.row(region.row).out
            if isinstance(out, Fixed):
                yield out, nx.node_connected_component(links, Slot(region.end))

    def _number(self, links: nx.Graph[Any], plan: QuantPlan) -> int:
        plan.groups.clear()
        plan.fixed.clear()
        number_of = {slot: n for n, component in enumerate(nx.connected_components(links)) for slot in component}
        for slot in plan.specs:  # components are sets: their own order differs from run to run
            plan.groups[slot] = number_of[slot]
        for region in plan.regions:
            out = self.backend.row(region.row).out
            if isinstance(out, Fixed):
                plan.fixed[plan.groups[Slot(region.end)]] = (out.scale, out.zero_point)
        return len(set(plan.groups.values()))
