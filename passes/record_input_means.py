"""Record the mean of what each int8 conv and linear layer reads, for :class:`fxq.passes.correct_bias.CorrectBias`."""

from __future__ import annotations

import torch
from torch.fx import Node

from fxq.graph_module import QuantModule, free_path, get_attribute
from fxq.input_means import InputMeans
from fxq.ops import CONV_TRANSPOSES, LINEAR, Dictionary, Op
from fxq.pass_base import Pass
from fxq.plan import QuantPlan, Slot


class RecordInputMeans(Pass):
    """A call that returns nothing beside each layer; layers that read the same tensor share it.

    Transposed convs have none: with a stride, places differ in how many weights reach them.
    """

    requires = frozenset({"observed"})

    def __init__(self, ops: Dictionary) -> None:
        self.ops = ops

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        if plan.input_means:
            return 0
        recorders: dict[tuple[Node, int], str] = {}
        for node in list(module.graph.nodes):
            op = self.ops.op_of(node)
            if op is None or op.weight != "weight" or op in CONV_TRANSPOSES:
                continue
            if Slot(node.name, (op.index("weight"),)) in plan.groups and isinstance(node.args[0], Node):
                plan.input_means[node.name] = self._recorder(node, op, module, recorders)
        return len(plan.input_means)

    def _recorder(self, layer: Node, op: Op, module: QuantModule, known: dict[tuple[Node, int], str]) -> str:
        source, weight = layer.args[0], _weight(layer, op, module)
        places = weight.dim() - 2
        assert isinstance(source, Node)
        if (source, places) not in known:
            path = free_path(module, f"{source.name}_means")
            groups = 1 if op is LINEAR else op.get(layer, "groups")
            module.add_submodule(path, InputMeans(weight.shape[1] * groups, places))
            with module.graph.inserting_before(layer):
                module.graph.create_node("call_module", path, (source,), name=f"{source.name}_means")
            known[source, places] = path
        return known[source, places]


def _weight(layer: Node, op: Op, module: QuantModule) -> torch.Tensor:
    observer = op.get(layer, "weight")
    weight: torch.Tensor = get_attribute(module, str(observer.args[0].target))
    return weight
