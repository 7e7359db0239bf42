"""Train a layer and its BatchNorm as one quantized op (:mod:`fxq.conv_bn`).

BatchNorm leaves the graph before nodes are annotated, so that a layer is matched and observed as it will run in int8:
conv, relu. When all is observed it comes back, around the fake-quantized weight.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from fxq.conv_bn import channel_factor, layer_bias, layer_weight, normalize, scale_channels
from fxq.graph_module import QuantModule, get_attribute
from fxq.ops import BATCH_NORM, CONV_TRANSPOSES, CONVS, LINEAR, Dictionary, Op
from fxq.pass_base import Pass
from fxq.plan import Decision, Fusion, QuantPlan, Status
from fxq.training_mode import weight_of_batch


@dataclass(frozen=True)
class Detached:
    """A BatchNorm that is out of the graph.

    Attributes:
        name: of its node.
        tensors: paths of running_mean, running_var, weight and bias; ``None`` where it has none.
        mode: path of the module that tells its mode, or a constant.
        momentum: ``None`` for the average of all batches.
    """

    name: str
    tensors: tuple[str | None, ...]
    mode: str | bool
    momentum: float | None
    eps: float


Records = dict[str, Detached]  # by the name of the layer's node


class DetachBatchNorm(Pass):
    """BatchNorms after a layer with weights are written down and leave the graph."""

    requires = frozenset({"canonical", "facts"})

    def __init__(self, records: Records, ops: Dictionary) -> None:
        self.records, self.ops = records, ops

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        found = {node: self._layer(node, plan) for node in module.graph.nodes if self.ops.op_of(node) is BATCH_NORM}
        layers = {node: layer for node, layer in found.items() if layer is not None}
        detached = {node: _record(node) for node in layers}
        by_weight: dict[int, set[tuple[str | None, ...]]] = defaultdict(set)
        for node, layer in layers.items():
            by_weight[id(self._weight(layer, module))].add(detached[node].tensors)
        for node in module.graph.nodes:  # a reader that no BatchNorm follows
            op = self.ops.op_of(node)
            if op is not None and op.weight is not None and node not in layers.values():
                by_weight[id(self._weight(node, module))].add(())
        for node, layer in layers.items():
            if len(by_weight[id(self._weight(layer, module))]) == 1:
                self.records[layer.name] = detached[node]
                _detach(node, layer, plan)
        return len(self.records)

    def _layer(self, node: Node, plan: QuantPlan) -> Node | None:
        """The layer that a BatchNorm can be folded into."""
        layer, mode = node.args[0], BATCH_NORM.get(node, "training")
        op = self.ops.op_of(layer) if isinstance(layer, Node) else None
        if op not in (*CONVS, *CONV_TRANSPOSES, LINEAR) or not isinstance(layer, Node) or len(layer.users) != 1:
            return None
        if mode is True or not all(isinstance(node.args[index], Node) for index in (1, 2)):
            return None
        tensors = [*node.args[1:5], op.get(layer, "weight"), op.get(layer, "bias")]
        if any(isinstance(tensor, Node) and tensor.op != "get_attr" for tensor in tensors):
            return None
        fact = plan.facts.get(layer.name)  # axis 1 must be the channels
        weight = plan.facts.get(op.get(layer, "weight").name)
        return layer if fact is not None and weight is not None and len(fact.shape) == len(weight.shape) else None

    def _weight(self, layer: Node, module: QuantModule) -> Any:
        op = self.ops.op_of(layer)
        weight = op.get(layer, str(op.weight)) if op is not None else None
        if not isinstance(weight, Node) or weight.op != "get_attr":
            return None
        return get_attribute(module, str(weight.target))


def _record(node: Node) -> Detached:
    tensors = tuple(str(value.target) if isinstance(value, Node) else None for value in node.args[1:5])
    mode, momentum = BATCH_NORM.get(node, "training"), BATCH_NORM.get(node, "momentum")
    return Detached(
        node.name,
        tensors,
        str(mode.target) if isinstance(mode, Node) else bool(mode),
        None if isinstance(momentum, Node) else momentum,
        BATCH_NORM.get(node, "eps"),
    )


def _detach(node: Node, layer: Node, plan: QuantPlan) -> None:
    batch_norm, into = plan.origin(node.name).module_path, plan.origin(layer.name).module_path
    plan.fusions.append(Fusion("fold", batch_norm or node.name, into or layer.name, "BatchNorm trained in the layer"))
    inputs = [source for source in node.all_input_nodes if source is not layer]
    node.replace_all_uses_with(layer)
    for gone in (node, *reversed(inputs)):
        if not gone.users:
            plan.forget(gone.name)
            gone.graph.erase_node(gone)


class AttachBatchNorm(Pass):
    """The BatchNorms that were detached, around the fake-quantized weights of their layers."""

    requires = frozenset({"observed"})

    def __init__(self, records: Records, ops: Dictionary) -> None:
        self.records, self.ops = records, ops

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        nodes = {node.name: node for node in module.graph.nodes}
        attached = len(self.records)
        for name in list(self.records):
            _Attachment(nodes[name], self.records.pop(name), self.ops, plan).run()
        module.graph.eliminate_dead_code()
        return attached


class _Attachment:
    """Writes the nodes of one layer."""

    def __init__(self, layer: Node, record: Detached, ops: Dictionary, plan: QuantPlan) -> None:
        op = ops.op_of(layer)
        assert op is not None
        self.layer, self.record, self.plan = layer, record, plan
        self.op: Op = op
        self.graph = layer.graph

    def run(self) -> None:
        weight = self.op.get(self.layer, "weight")
        with self.graph.inserting_before(self.layer):
            mean, var, gamma, beta = (None if p is None else self.graph.get_attr(p) for p in self.record.tensors)
            mode = self._mode()
            momentum = self._momentum()
        norm = (mean, var, gamma, beta, mode, momentum, self.record.eps)
        if weight.op == "get_attr":  # the layer stays float
            self._after(BATCH_NORM.target, norm)
            return
        transposed = self.op in CONV_TRANSPOSES
        groups = 1 if self.op is LINEAR else self.op.get(self.layer, "groups")
        factor = self._call("factor", channel_factor, var, gamma, self.record.eps, mode)
        scaled = self._call("scaled", scale_channels, weight.args[0], factor, transposed, groups)
        with self.graph.inserting_before(self.layer):
            rounded = self.graph.create_node("call_module", weight.target, (scaled,), name=weight.name)
        args = list(self.layer.args)
        args[self.op.index("weight")] = self._call("weight", layer_weight, rounded, factor, mode, transposed, groups)
        args[self.op.index("bias")] = self._call(
            "bias", layer_bias, self.op.get(self.layer, "bias"), factor, mean, beta, mode
        )
        self.layer.args = tuple(args)
        self._after(normalize, norm)

    def _mode(self) -> Node | bool:
        if isinstance(self.record.mode, bool):
            return self.record.mode
        node = self.graph.create_node("call_module", self.record.mode, name=f"{self.record.name}_mode")
        self.plan.decisions[node.name] = Decision(Status.SHAPE_ONLY)
        return node

    def _momentum(self) -> Node | float:
        if self.record.momentum is not None:
            return self.record.momentum
        counter = self.graph.get_attr(f"{self.record.mode}.num_batches_tracked")
        return self._call("momentum", weight_of_batch, counter)

    def _call(self, suffix: str, function: Any, *args: Any) -> Node:
        with self.graph.inserting_before(self.layer):
            node = self.graph.create_node("call_function", function, args, name=f"{self.record.name}_{suffix}")
        self.plan.decisions[node.name] = Decision(Status.SHAPE_ONLY)
        return node

    def _after(self, function: Any, norm: tuple[Any, ...]) -> None:
        with self.graph.inserting_after(self.layer):
            node = self.graph.create_node("call_function", function, (self.layer, *norm), name=self.record.name)
        self.layer.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
        self.plan.decisions[node.name] = self.plan.decisions[self.layer.name]
        self.plan.facts[node.name] = self.plan.facts[self.layer.name]
