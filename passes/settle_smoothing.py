"""What was decided about smoothing while calibrating becomes part of the plan; the calls that decided go."""

from __future__ import annotations

import torch
from torch.fx import Node

from fxq.graph_module import QuantModule, get_attribute
from fxq.observers import Observer, make_observer
from fxq.ops import Dictionary
from fxq.pass_base import Pass
from fxq.plan import Equalized, Fusion, QuantPlan, Slot
from fxq.smoothing import Smoothing


class SettleSmoothing(Pass):
    """Pairs that were smoothed get into the tables, and their weights are observed again."""

    requires = frozenset({"observed"})

    def __init__(self, ops: Dictionary) -> None:
        self.ops = ops

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        nodes = {node.name: node for node in module.graph.nodes}
        calls = {node.target: node for node in nodes.values() if node.op == "call_module"}
        smoothed = 0
        for first, (path, readers) in plan.smoothings.items():
            smoothing = module.get_submodule(path)
            assert isinstance(smoothing, Smoothing)
            if smoothing.scale is not None:
                self._record(nodes[first], [nodes[name] for name in readers], smoothing.scale, module, plan)
                smoothed += 1
            _drop(calls[path], module)
        plan.smoothings.clear()
        return smoothed

    def _record(
        self, first: Node, readers: list[Node], scale: torch.Tensor, module: QuantModule, plan: QuantPlan
    ) -> None:
        where = [plan.origin(node.name).module_path or node.name for node in (first, *readers)]
        detail = f"channels divided by {scale.min():.2g} to {scale.max():.2g}"
        for reader, its_place in zip(readers, where[1:], strict=True):
            plan.equalized.append(Equalized(first.name, reader.name, tuple(scale.tolist())))
            plan.fusions.append(Fusion("smooth", where[0], its_place, detail))
        for layer in (first, *readers):
            self._observe_weight(layer, module, plan)

    def _observe_weight(self, layer: Node, module: QuantModule, plan: QuantPlan) -> None:
        """Observe the weight anew, with another observer: the one there may be that of other copies too."""
        op = self.ops.op_of(layer)
        assert op is not None
        slot = Slot(layer.name, (op.index("weight"),))
        path = plan.observers.get(plan.groups.get(slot, -1))
        if path is None:
            return
        old = module.get_submodule(path)
        assert isinstance(old, Observer)
        made = make_observer(old.spec, old.bounds)
        made.where = old.where
        made(get_attribute(module, str(op.get(layer, "weight").args[0].target)).detach())
        made.enabled = False
        module.set_submodule(path, made)


def _drop(call: Node, module: QuantModule) -> None:
    first, *parameters = call.args
    call.replace_all_uses_with(first)  # type: ignore[arg-type]
    module.graph.erase_node(call)
    for node in parameters:
        if isinstance(node, Node):
            module.graph.erase_node(node)
    module.delete_submodule(str(call.target))
