"""Take attention apart, so that its projections become int8 linears.

``nn.MultiheadAttention``, ``F.multi_head_attention_forward`` and torchvision's shifted window attention hold their
projections inside one module or function. Each becomes linears, the attention proper (:mod:`fxq.attention`, in float),
and a linear.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from fxq.attention import multihead_attention, window_attention
from fxq.config import ResolvedConfig, qualified_name
from fxq.graph_module import QuantModule, free_path, get_attribute, set_tensor
from fxq.ops import CHUNK, GETITEM, LINEAR, Signature
from fxq.pass_base import Pass
from fxq.plan import ATTENTION, EXCLUDED, WHOLE_ATTENTION, Fusion, Origin, QuantPlan, float_decision

_MULTIHEAD = Signature(
    "query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None, average_attn_weights=True, "
    "is_causal=False"
)
_FUNCTIONAL = Signature(
    "query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v, add_zero_attn, "
    "dropout_p, out_proj_weight, out_proj_bias, training=True, key_padding_mask=None, need_weights=True, "
    "attn_mask=None, use_separate_proj_weight=False, q_proj_weight=None, k_proj_weight=None, v_proj_weight=None, "
    "static_k=None, static_v=None, average_attn_weights=True, is_causal=False"
)
_INPUTS = ("query", "key", "value")
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
            expose = _exposure(node, module, plan)
            if expose is None:
                continue
            if self.config.lookup(plan.origin(node.name), "") is None:
                plan.decisions[node.name] = float_decision(EXCLUDED)
                continue
            refusal = expose()
            exposed += refusal is None
            if refusal is not None:
                plan.decisions[node.name] = float_decision(WHOLE_ATTENTION, refusal)
        module.graph.eliminate_dead_code()
        module.release_unused()
        return exposed


def _exposure(node: Node, module: QuantModule, plan: QuantPlan) -> Callable[[], str | None] | None:
    """What takes a node apart and returns why it cannot, or ``None`` for a node that is no attention."""
    if node.op == "call_module" and _is_multihead(module.get_submodule(str(node.target))):
        return _Exposure(node, module, plan).module_call
    if node.op == "call_function" and node.target is F.multi_head_attention_forward:
        return _Exposure(node, module, plan).function_call
    windows = _WINDOW_FUNCTIONS.get(qualified_name(node.target)) if node.op == "call_function" else None
    return None if windows is None else lambda: _Exposure(node, module, plan).windows(windows)


def _is_multihead(leaf: nn.Module) -> bool:
    return type(leaf) is nn.MultiheadAttention


def _refusal(bias_k: Any, add_zero_attn: Any) -> str | None:
    if bias_k is not None:
        return "bias_k and bias_v add a key and a value of their own"
    return None if add_zero_attn is False else "add_zero_attn adds a key and a value of zeros"


class _Exposure:
    """Writes the nodes that replace one attention node."""

    def __init__(self, node: Node, module: QuantModule, plan: QuantPlan) -> None:
        self.node, self.module, self.plan = node, module, plan
        self.origin = plan.origin(node.name)

    def module_call(self) -> str | None:
        path = str(self.node.target)
        leaf: Any = self.module.get_submodule(path)
        values = _MULTIHEAD.bind(self.node.args, self.node.kwargs)
        if values is None:
            return "its arguments are not those of torch's"
        values |= {"num_heads": leaf.num_heads, "batch_first": leaf.batch_first}
        refusal = _refusal(leaf.bias_k, leaf.add_zero_attn) or self._kept_whole()
        if refusal is not None:
            return refusal
        self._multihead(
            values,
            lambda: [self._projection(leaf, path, number, name) for number, name in enumerate(_INPUTS)],
            lambda: self._attributes(f"{path}.out_proj", leaf.out_proj.bias is not None),
        )
        return None

    def function_call(self) -> str | None:
        values = _FUNCTIONAL.bind(self.node.args, self.node.kwargs)
        if values is None:
            return "its arguments are not those of torch's"
        refusal = _refusal(values["bias_k"], values["add_zero_attn"])
        if values["static_k"] is not None or values["static_v"] is not None:
            refusal = "it is given projected keys or values"
        if values["training"] is not False and values["dropout_p"] != 0.0:
            refusal = "it drops out at random: give training=False"
        if not isinstance(values["num_heads"], int):
            refusal = "its number of heads is computed"
        refusal = refusal or self._kept_whole()
        if refusal is not None:
            return refusal
        self._multihead(
            values | {"batch_first": False},
            lambda: self._given_projections(values),
            lambda: (values["out_proj_weight"], values["out_proj_bias"]),
        )
        return None

    def _kept_whole(self) -> str | None:
        parts = [user.args[1] if user.target is operator.getitem else None for user in self.node.users]
        return None if all(isinstance(part, int) for part in parts) else "its results are passed on as one tuple"

    def _multihead(
        self,
        values: Mapping[str, Any],
        projections: Callable[[], list[tuple[Node, Node | None]]],
        out_projection: Callable[[], tuple[Node, Node | None]],
    ) -> None:
        """Write the parts; projections are asked for where their nodes go."""
        parts = {user: int(str(user.args[1])) % 2 for user in self.node.users}
        needs_weights = 1 in parts.values() and values["need_weights"]
        with self.node.graph.inserting_before(self.node):
            projected = [
                self._linear(f"{self.node.name}_{name[0]}", values[name], *projection)
                for name, projection in zip(_INPUTS, projections(), strict=True)
            ]
            attention = self._call(
                "attention", multihead_attention, *projected, values["num_heads"], values["batch_first"],
                values["key_padding_mask"], needs_weights, values["attn_mask"], values["average_attn_weights"],
            )  # fmt: skip
            context = self._call("context", GETITEM.target, attention, 0, known=True)
            out = self._linear(self.node.name + "_out", context, *out_projection())
            weights = self._call("weights", GETITEM.target, attention, 1, known=True) if needs_weights else None
        for user, part in parts.items():
            user.replace_all_uses_with(out if part == 0 else weights)  # type: ignore[arg-type]
            self._erase(user)
        self._finish()

    def _given_projections(self, values: Mapping[str, Any]) -> list[tuple[Node, Node | None]]:
        """Weights and biases of the input projections of a function call; parts of constants are folded later."""
        biases = self._thirds(values["in_proj_bias"], "bias")
        if values["use_separate_proj_weight"]:
            weights = [values[f"{name[0]}_proj_weight"] for name in _INPUTS]
        else:
            weights = self._thirds(values["in_proj_weight"], "weight")
        return list(zip(weights, biases, strict=True))

    def _thirds(self, packed: Node | None, suffix: str) -> list[Any]:
        if packed is None:
            return [None] * 3
        thirds = self._call(f"packed_{suffix}", CHUNK.target, packed, 3, 0, known=True)
        return [self._call(f"{name}_{suffix}", GETITEM.target, thirds, i, known=True) for i, name in enumerate(_INPUTS)]

    def _projection(self, leaf: Any, path: str, number: int, name: str) -> tuple[Node, Node | None]:
        """Weight and bias of one of the three input projections, each under a path of its own; views of the packed."""
        weight_path, bias_path = f"{path}.{name}_proj.weight", f"{path}.{name}_proj.bias"
        size = leaf.embed_dim
        if leaf._qkv_same_embed_dim:
            weight = leaf.in_proj_weight[number * size : (number + 1) * size]
        else:
            weight = getattr(leaf, f"{name[0]}_proj_weight")
        set_tensor(self.module, weight_path, nn.Parameter(weight.detach()))
        if leaf.in_proj_bias is None:
            return self._attribute(weight_path), None
        bias = leaf.in_proj_bias[number * size : (number + 1) * size]
        set_tensor(self.module, bias_path, nn.Parameter(bias.detach()))
        return self._attribute(weight_path), self._attribute(bias_path)

    def windows(self, signature: Signature) -> str | None:
        values = signature.bind(self.node.args, self.node.kwargs)
        if values is None or values["training"] is not False:
            return "it drops out at random: give training=False"
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
        self._finish()
        return None

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

    def _finish(self) -> None:
        kind = self.origin.kind.rpartition(".")[2]
        path = self.origin.module_path or self.node.name
        self.plan.fusions.append(Fusion("split", f"{kind} {path}", f"linears of {path}", "int8 projections"))
        self._erase(self.node)

    def _erase(self, node: Node) -> None:
        self.plan.forget(node.name)
        self.node.graph.erase_node(node)
