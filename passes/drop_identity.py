"""Remove what does nothing in eval mode: dropout, identity, stochastic depth."""

from __future__ import annotations

from torch import nn
from torch.fx import Node

from fxq.config import qualified_name
from fxq.graph_module import QuantModule
from fxq.ops import DROPOUT, Dictionary
from fxq.pass_base import Pass
from fxq.plan import Fusion, QuantPlan

# Known by its name, so that torchvision need not be installed: (input, p, mode, training).
_STOCHASTIC_DEPTH = "torchvision.ops.stochastic_depth.stochastic_depth"


class DropIdentity(Pass):
    """Readers of a node that returns its input unchanged read the input instead."""

    requires = frozenset({"canonical"})

    def __init__(self, ops: Dictionary) -> None:
        self.ops = ops

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        dropped = [node for node in module.graph.nodes if self._does_nothing(node, module)]
        for node in dropped:
            node.replace_all_uses_with(node.args[0])
            origin = plan.origin(node.name)
            plan.fusions.append(Fusion("drop", origin.kind.rpartition(".")[2], origin.module_path, "eval mode"))
            plan.forget(node.name)
            module.graph.erase_node(node)
        module.release_unused()
        return len(dropped)

    def _does_nothing(self, node: Node, module: QuantModule) -> bool:
        if not node.args or not isinstance(node.args[0], Node):
            return False
        if node.op == "call_module":
            return type(module.get_submodule(str(node.target))) is nn.Identity
        op = self.ops.op_of(node)
        if op is DROPOUT:
            return bool(op.get(node, "training") is False or op.get(node, "p") == 0)
        if node.op == "call_function" and qualified_name(node.target) == _STOCHASTIC_DEPTH:
            values = dict(zip(("input", "p", "mode", "training"), node.args, strict=False)) | node.kwargs
            return bool(values.get("training", True) is False or values.get("p") == 0)
        return False
