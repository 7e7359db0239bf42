"""Compute once what depends on parameters and buffers alone.

Examples are a weight scaled by a mask, BatchNorm written out as arithmetic on its buffers, and the position
tables that some transformers compute from coordinates in each forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.fx import Node
from torch.nn.utils.parametrize import ParametrizationList

from fxq.aliases import overwrites
from fxq.graph_module import QuantModule, free_path, get_attribute, set_tensor
from fxq.ops import Dictionary
from fxq.pass_base import Pass
from fxq.plan import QuantPlan

_PURE_MODULES = ("torch", "torchvision", "_operator", "operator")


class FoldConstants(Pass):
    """Tensor nodes whose inputs are all constant become constants.

    Args:
        parameters: whether parameters are constant.
    """

    requires = frozenset({"canonical"})

    def __init__(self, ops: Dictionary, parameters: bool = True) -> None:
        self.ops, self.parameters = ops, parameters

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        values: dict[Node, Any] = {}
        for node in module.graph.nodes:
            if node.op == "get_attr":
                value = get_attribute(module, str(node.target))
                if self.parameters or not isinstance(value, nn.Parameter):
                    values[node] = value
            elif self._is_pure(node) and all(source in values for source in node.all_input_nodes):
                before = torch.get_rng_state()
                value = _evaluate(node, values)
                if torch.equal(before, torch.get_rng_state()):
                    values[node] = value
                else:  # random, and so no constant
                    torch.set_rng_state(before)
            elif self.parameters and _computes_a_parameter(node, module):
                with torch.no_grad():
                    values[node] = module.get_submodule(str(node.target))()
        _remove_written(values, module)
        folded = [node for node in values if node.op != "get_attr" and _leaves(node, values)]
        for node in folded:
            self._replace(node, values[node], module, plan)
        module.graph.eliminate_dead_code()
        for name in plan.origins.keys() - {node.name for node in module.graph.nodes}:
            plan.forget(name)
        return len(folded)

    def _is_pure(self, node: Node) -> bool:
        if not node.all_input_nodes:
            return False
        if self.ops.op_of(node) is not None or node.target is getattr:
            return True
        name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
        if overwrites(node, None) or "out" in node.kwargs or name.startswith(("empty", "new_")):
            return False
        if node.op == "call_function":
            module = getattr(node.target, "__module__", None) or "torch"
            return module.partition(".")[0] in _PURE_MODULES
        return node.op == "call_method"

    @staticmethod
    def _replace(node: Node, value: torch.Tensor, module: QuantModule, plan: QuantPlan) -> None:
        path = free_path(module, f"{node.name}_constant")
        set_tensor(module, path, value)
        with module.graph.inserting_before(node):
            constant = module.graph.get_attr(path)
        node.replace_all_uses_with(constant)


def _computes_a_parameter(node: Node, module: QuantModule) -> bool:
    """Whether a node calls what ``torch.nn.utils.parametrize`` puts in a parameter's place, such as a weight norm."""
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), ParametrizationList)


def _evaluate(node: Node, values: dict[Node, Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    with torch.no_grad():
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _remove_written(values: dict[Node, Any], module: QuantModule) -> None:
    """Take out the tensors whose memory some node of the graph overwrites, and what is computed from them."""
    written = set()
    for node in module.graph.nodes:
        leaf = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if node.op.startswith("call_") and (overwrites(node, leaf) or "out" in node.kwargs):
            written |= {memory for source in node.all_input_nodes for memory in _memory(values.get(source))}
    for node in list(values):
        if written & _memory(values[node]) or any(source not in values for source in node.all_input_nodes):
            del values[node]


def _memory(value: Any) -> set[int]:
    """Addresses of the tensors in a value."""
    if isinstance(value, torch.Tensor):
        return {value.untyped_storage().data_ptr()}
    items = value if isinstance(value, (tuple, list)) else value.values() if isinstance(value, dict) else ()
    return {address for item in items for address in _memory(item)}


def _leaves(node: Node, values: dict[Node, Any]) -> bool:
    """Whether a constant tensor has a reader that is not constant itself."""
    return isinstance(values[node], torch.Tensor) and any(user not in values for user in node.users)
