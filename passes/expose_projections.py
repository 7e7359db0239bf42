"""Take attention apart, so that its projections become int8 linears.

``nn.MultiheadAttention`` and torchvision's shifted window attention hold their projections inside one module or
function. Each becomes linears, the attention proper (:mod:`fxq.attention`, in float), and a linear.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Node

from fxq.attention import multihead_attention, window_attention
from fxq.config import ResolvedConfig, qualified_name
from fxq.graph_module import QuantModule, free_path, get_attribute, set_tensor
from fxq.ops import GETITEM, LINEAR, Signature
from fxq.pass_base import Pass
from fxq.plan import ATTENTION, EXCLUDED, Fusion, Origin, QuantPlan, float_decision

_MULTIHEAD = Signature(
    "query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None, average_attn_weights=True, "
    "is_causal=False"
)
_WINDOWS = (
    "input, qkv_weight, proj_weight, relative_position_bias, window_size, num_heads, shift_size, "
    "attention_dropout=0.0, dropout=0.0, qkv_bias=None, proj_bias=None, {}training=True"
)
# Known by their names, so that torchvision need not be installed.
_WINDOW_FUNCTIONS = {
    "torchvision.models.swin_transformer.shifted_window_attention": Signature(_WINDOWS.format("logit_scale=None, ")),
    "torchvision.models.video.swin_transformer.shifted_window_attention_3d": Signature(_WINDOWS.format("")),
}


class ExposeProjections(Pass):
    """Attention modules and functions become linear, attention, linear; excluded ones stay whole."""

    requires = frozenset({"canonical"})

    def __init__(self, config: ResolvedConfig) -> None:
        self.config = config

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        exposed = 0
        for node in list(module.graph.nodes):
            is_multihead = node.op == "call_module" and _is_multihead(module.get_submodule(str(node.target)))
            windows = _WINDOW_FUNCTIONS.get(qualified_name(node.target)) if node.op == "call_function" else None
            if not is_multihead and windows is None:
                continue
            if self.config.lookup(plan.origin(node.name), "") is None:
                plan.decisions[node.name] = float_decision(EXCLUDED)
            elif windows is not None:
                exposed += _Exposure(node, module, plan).windows(windows)
            else:
                exposed += _Exposure(node, module, plan).multihead()
        module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        return exposed


def _is_multihead(leaf: nn.Module) -> bool:
    return type(leaf) is nn.MultiheadAttention


class _Exposure:
    """Writes the nodes that replace one attention node."""

    def __init__(self, node: Node, module: QuantModule, plan: QuantPlan) -> None:
        self.node, self.module, self.plan = node, module, plan
        self.origin = plan.origin(node.name)

    def multihead(self) -> bool:
        path = str(self.node.target)
        leaf: Any = self.module.get_submodule(path)
        values = _MULTIHEAD.bind(self.node.args, self.node.kwargs)
        parts: dict[Node, Any] = {user: user.args[1] for user in self.node.users if user.target is operator.getitem}
        if values is None or leaf.bias_k is not None or leaf.add_zero_attn or len(parts) < len(self.node.users):
            return False
        if not all(isinstance(part, int) for part in parts.values()):
            return False
        parts = {user: part % 2 for user, part in parts.items()}
        needs_weights = 1 in parts.values() and values["need_weights"]
        with self.node.graph.inserting_before(self.node):
            projected = [
                self._linear(f"{self.node.name}_{name[0]}", values[name], *self._projection(leaf, path, number, name))
                for number, name in enumerate(("query", "key", "value"))
            ]
            attention = self._call(
                "attention", multihead_attention, *projected, leaf.num_heads, leaf.batch_first,
                values["key_padding_mask"], needs_weights, values["attn_mask"], values["average_attn_weights"],
            )  # fmt: skip
            context = self._call("context", GETITEM.target, attention, 0, known=True)
            out = self._linear(
                self.node.name + "_out", context, *self._attributes(f"{path}.out_proj", leaf.out_proj.bias is not None)
            )
            weights = self._call("weights", GETITEM.target, attention, 1, known=True) if needs_weights else None
        for user, part in parts.items():
            user.replace_all_uses_with(out if part == 0 else weights)  # type: ignore[arg-type]
            self._erase(user)
        return self._finish()

    def _projection(self, leaf: Any, path: str, number: int, name: str) -> tuple[Node, Node | None]:
        """Weight and bias of one of the three input projections, each under a path of its own."""
        weight_path, bias_path = f"{path}.{name}_proj.weight", f"{path}.{name}_proj.bias"
        size = leaf.embed_dim
        if leaf._qkv_same_embed_dim:
            weight = leaf.in_proj_weight[number * size : (number + 1) * size]
        else:
            weight = getattr(leaf, f"{name[0]}_proj_weight")
        set_tensor(self.module, weight_path, nn.Parameter(weight.detach().clone()))
        if leaf.in_proj_bias is None:
            return self._attribute(weight_path), None
        bias = leaf.in_proj_bias[number * size : (number + 1) * size]
        set_tensor(self.module, bias_path, nn.Parameter(bias.detach().clone()))
        return self._attribute(weight_path), self._attribute(bias_path)

    def windows(self, signature: Signature) -> bool:
        values = signature.bind(self.node.args, self.node.kwargs)
        if values is None or values["training"] is not False:
            return False
        logit_scale = values.get("logit_scale")
        with self.node.graph.inserting_before(self.node):
            bias = values["qkv_bias"]
            if logit_scale is not None and bias is not None:
                bias = self._without_key_bias(bias)
            qkv = self._linear(f"{self.node.name}_qkv", values["input"], values["qkv_weight"], bias)
            attention = self._call(
                "attention", window_attention, qkv, bias, values["relative_position_bias"], values["window_size"],
                values["num_heads"], values["shift_size"], logit_scale,
            )  # fmt: skip
            out = self._linear(f"{self.node.name}_out", attention, values["proj_weight"], values["proj_bias"])
        self.node.replace_all_uses_with(out)
        return self._finish()

    def _without_key_bias(self, bias: Node) -> Node:
        """Cosine attention has no key bias."""
        tensor = get_attribute(self.module, str(bias.target)).detach().clone()
        tensor[len(tensor) // 3 : 2 * len(tensor) // 3] = 0
        path = free_path(self.module, f"{bias.target}_used")
        set_tensor(self.module, path, nn.Parameter(tensor))
        return self._attribute(path)

    def _attributes(self, path: str, has_bias: bool) -> tuple[Node, Node | None]:
        return self._attribute(f"{path}.weight"), self._attribute(f"{path}.bias") if has_bias else None

    def _attribute(self, path: str) -> Node:
        return self.node.graph.create_node("get_attr", path)

    def _linear(self, name: str, x: Node, weight: Node, bias: Node | None) -> Node:
        linear = self.node.graph.create_node("call_function", LINEAR.target, (x, weight, bias), name=name)
        self.plan.origins[linear.name] = Origin(self.origin.module_path, qualified_name(LINEAR.target))
        return linear

    def _call(self, suffix: str, target: Callable[..., Any], *args: Any, known: bool = False) -> Node:
        call = self.node.graph.create_node("call_function", target, args, name=f"{self.node.name}_{suffix}")
        self.plan.origins[call.name] = Origin(self.origin.module_path, qualified_name(target))
        if not known:
            self.plan.decisions[call.name] = float_decision(ATTENTION)
        return call

    def _finish(self) -> bool:
        kind = self.origin.kind.rpartition(".")[2]
        path = self.origin.module_path or self.node.name
        self.plan.fusions.append(Fusion("split", f"{kind} {path}", f"linears of {path}", "int8 projections"))
        self._erase(self.node)
        return True

    def _erase(self, node: Node) -> None:
        self.plan.forget(node.name)
        self.node.graph.erase_node(node)
