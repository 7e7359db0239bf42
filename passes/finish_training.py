"""From a model in training to one that is merely calibrated: what only training needs goes.

BatchNorms trained with their layers are folded exactly: weight and bias become what the layer runs with in eval mode.
Dropout and stochastic depth go; what else followed a mode is fixed in eval mode. What is left are the layers and the
modules that know their scales, as after calibration.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.fx import Node

from fxq.conv_bn import normalize, scale_channels
from fxq.fake_quantize import fake_quantize
from fxq.graph_module import QuantModule, free_path, get_attribute, set_tensor
from fxq.pass_base import Pass
from fxq.plan import QuantPlan
from fxq.slots import argument
from fxq.training_mode import Mode, weight_of_batch

TRAINABLE = "trainable"  # property of the plan of a model that is prepared for training


class FinishTraining(Pass):
    """A graph in training becomes an observed one.

    Args:
        dropped: names of the rows whose ops do nothing in eval mode.
    """

    requires = frozenset({"observed"})

    def __init__(self, dropped: frozenset[str]) -> None:
        self.dropped = dropped

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        if TRAINABLE not in plan.properties:
            return 0
        plan.properties.discard(TRAINABLE)
        nodes = list(module.graph.nodes)
        _fold_batch_norms([node for node in nodes if node.target is normalize], module, plan)
        for node in nodes:
            if node.target is fake_quantize:
                _bypass(node, plan)
            elif node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), Mode):
                _fix(node, False)
            elif node.target is weight_of_batch:
                _fix(node, 0.0)
        self._drop(nodes, plan)
        module.graph.eliminate_dead_code()
        for name in plan.decisions.keys() - {node.name for node in module.graph.nodes}:
            plan.forget(name)
        return 1

    def _drop(self, nodes: list[Node], plan: QuantPlan) -> None:
        """Regions of ops that do nothing in eval mode."""
        gone = {region.end for region in plan.regions if region.row in self.dropped}
        plan.regions = [region for region in plan.regions if region.end not in gone]
        for table in (plan.specs, plan.groups):
            for slot in [slot for slot in table if slot.node in gone]:
                del table[slot]
        for node in nodes:
            if node.name in gone:
                _bypass(node, plan)


def _fold_batch_norms(norms: list[Node], module: QuantModule, plan: QuantPlan) -> None:
    folded: dict[int, str] = {}  # paths of folded weights, by the identity of the trained ones
    with torch.no_grad():
        for norm in norms:
            layer = argument(norm, (0,))
            rounded = argument(argument(layer, (1,)), (0,))  # behind what divides the factor out again
            path = _fold_weight(argument(rounded, (0,)), module, folded)
            bias = _value(layer.args[2], module)
            bias_path = free_path(module, f"{path.rpartition('.')[0]}.bias".removeprefix("."))
            set_tensor(module, bias_path, nn.Parameter(bias))
            with layer.graph.inserting_before(rounded):
                rounded.args = (layer.graph.get_attr(path),)
            with layer.graph.inserting_before(layer):
                layer.args = (layer.args[0], rounded, layer.graph.get_attr(bias_path), *layer.args[3:])
            _bypass(norm, plan)


def _fold_weight(scaled: Node, module: QuantModule, folded: dict[int, str]) -> str:
    """Store what a trained weight is in eval mode; returns where."""
    path = str(argument(scaled, (0,)).target)
    weight = get_attribute(module, path)
    if id(weight) not in folded:
        value = nn.Parameter(_value(scaled, module))
        readers = {user for node in module.graph.nodes if node.target == path for user in node.users}
        if any(reader.target is not scale_channels for reader in readers):
            path = free_path(module, path)
        folded[id(weight)] = path
        set_tensor(module, path, value)
        folded[id(value)] = path
    return folded[id(weight)]


def _value(node: Any, module: QuantModule) -> Any:
    """What a node that depends on parameters alone is in eval mode."""
    if not isinstance(node, Node):
        return node
    if node.op == "get_attr":
        return get_attribute(module, str(node.target))
    if node.op == "call_module":
        return False
    return node.target(*(_value(argument, module) for argument in node.args))  # type: ignore[operator]


def _fix(node: Node, value: bool | float) -> None:
    """Readers of a mode read a constant."""
    for user in list(node.users):
        user.args = fx.node.map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = fx.node.map_arg(user.kwargs, lambda n: value if n is node else n)
    node.graph.erase_node(node)


def _bypass(node: Node, plan: QuantPlan) -> None:
    node.replace_all_uses_with(argument(node, (0,)))
    plan.forget(node.name)
    node.graph.erase_node(node)
