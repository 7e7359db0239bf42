"""Put one observer for each group of slots on the edges where its values enter.

Values enter a group where an op with its own range produces them and where a float tensor is quantized.
Outputs of ops that share their inputs' qparams lie inside the inputs' range, so they are not observed again.
Weights are observed once, here; they do not change while calibrating.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

from torch.fx import Node

from fxq.graph_module import QuantModule, free_path, get_attribute
from fxq.observers import Bounds, Observer, make_observer
from fxq.op_table import Backend, sharing_ends
from fxq.ops import CLAMP, SOFTMAX, Op
from fxq.pass_base import Pass
from fxq.plan import QuantPlan, Slot
from fxq.slots import entry_points, replace_argument
from fxq.spec import QuantSpec


class InsertObservers(Pass):
    """Observer modules, called on the edges of the graph."""

    requires = frozenset({"grouped"})
    ensures = frozenset({"observed"})

    def __init__(self, backend: Backend, make: Callable[[QuantSpec], Observer] = make_observer) -> None:
        self.backend, self.make = backend, make

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        if plan.observers:
            return 0
        nodes = {node.name: node for node in module.graph.nodes}
        entries = entry_points(nodes, plan, sharing_ends(plan, self.backend))
        for group, points in entries.items():
            if self.observes(group, plan):
                self._observe(group, points, module, plan, nodes)
        return len(plan.observers)

    def observes(self, group: int, plan: QuantPlan) -> bool:
        """Whether a group needs an observer: not if a kernel dictates its qparams."""
        return group not in plan.fixed

    def observer(self, spec: QuantSpec, group: int, sources: list[Any], plan: QuantPlan) -> Observer:
        """The observer of a group; ``sources`` are the constants it watches, none for activations."""
        return self.make(spec)

    def settle(self, observer: Observer, tensors: list[Any]) -> None:
        """Observe constants now, and for good."""
        for tensor in tensors:
            observer(tensor)
        observer.enabled = False

    def _observe(
        self, group: int, points: dict[str, list[Slot]], module: QuantModule, plan: QuantPlan, nodes: dict[str, Node]
    ) -> None:
        spec = plan.specs[next(iter(points.values()))[0]]
        path = free_path(module, f"{next(iter(points))}_observer")
        constant = all(nodes[name].op == "get_attr" for name in points)
        sources = [get_attribute(module, str(nodes[name].target)) for name in points] if constant else []
        observer = self.observer(spec, group, sources, plan)
        observer.where = " or ".join(_where(nodes[name], plan) for name in points)
        observer.bounds = self._bounds([nodes[name] for name in points])
        module.add_submodule(path, observer)
        plan.observers[group] = path
        if sources:
            self.settle(observer, sources)
        for producer_name, slots in points.items():
            producer = nodes[producer_name]
            with module.graph.inserting_after(producer):
                call = module.graph.create_node("call_module", path, (producer,), name=f"{producer_name}_observer")
            if slots == [Slot(producer_name)]:
                producer.replace_all_uses_with(call, delete_user_cb=functools.partial(operator.is_not, call))
            else:
                for slot in slots:
                    replace_argument(nodes[slot.node], slot.path, call)


    def _bounds(self, producers: list[Node]) -> Bounds:
        """What no value of some nodes is beyond, whatever the input."""
        each = [_bounds_of(self.backend.dictionary.op_of(node), node) for node in producers]
        lows, highs = ([bounds[side] for bounds in each] for side in (0, 1))
        return (
            None if None in lows else min(low for low in lows if low is not None),
            None if None in highs else max(high for high in highs if high is not None),
        )


def _bounds_of(op: Op | None, node: Node) -> Bounds:
    if op is CLAMP:
        low, high = CLAMP.get(node, "min"), CLAMP.get(node, "max")
        return low if isinstance(low, (int, float)) else None, high if isinstance(high, (int, float)) else None
    return (0.0, 1.0) if op is SOFTMAX else (None, None)


def _where(node: Node, plan: QuantPlan) -> str:
    """A tensor in the user's terms."""
    if node.op == "get_attr":
        return f"'{node.target}'"
    return f"input '{node.target}'" if node.op == "placeholder" else plan.where(node.name)
