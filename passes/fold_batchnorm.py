"""Fold BatchNorm into the conv, linear or conv_transpose before it, or into the conv after it.

In eval mode BatchNorm is an affine map of each channel, ``y = a * x + b`` with ``a = gamma / sqrt(var + eps)``
and ``b = beta - mean * a``. After a layer: ``W' = a * W`` (output channels), ``bias' = a * bias + b``.
Before a conv: ``W' = W * a`` (input channels), ``bias' = bias + sum(W * b)``; exact only where the conv does not
pad, because padding adds zeros after the BatchNorm, or where ``b`` is zero.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn
from torch.fx import Node

from fxq.graph_module import QuantModule, free_path, get_attribute, set_tensor
from fxq.ops import BATCH_NORM, CONV_TRANSPOSES, CONVS, LINEAR, Dictionary, Op
from fxq.pass_base import Pass
from fxq.plan import Fusion, QuantPlan


class FoldBatchNorm(Pass):
    """BatchNorm nodes next to a layer with weights disappear into it."""

    requires = frozenset({"canonical", "facts"})

    def __init__(self, ops: Dictionary) -> None:
        self.ops = ops
        self._readers: Counter[int] = Counter()

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        folded = 0
        self._readers = _count_readers(module)
        for node in list(module.graph.nodes):
            if self.ops.op_of(node) is not BATCH_NORM:
                continue
            affine = _affine(node, module)
            if affine is None:
                continue
            folded += self._fold_into_producer(node, *affine, module, plan) or self._fold_into_consumer(
                node, *affine, module, plan
            )
        module.graph.eliminate_dead_code()
        _drop_unread_tensors(module)
        return folded

    def _fold_into_producer(
        self, node: Node, scale: torch.Tensor, shift: torch.Tensor, module: QuantModule, plan: QuantPlan
    ) -> bool:
        layer = node.args[0]
        op = self.ops.op_of(layer) if isinstance(layer, Node) else None
        if not isinstance(layer, Node) or op is None or len(layer.users) != 1:
            return False
        if op not in (*CONVS, *CONV_TRANSPOSES, LINEAR):
            return False
        parameters = _foldable_parameters(layer, op, module, plan)
        if parameters is None:
            return False
        weight, bias = parameters
        new_weight = _scale_output_channels(weight, scale, op, layer)
        _set_weights(layer, op, new_weight, scale * (0 if bias is None else bias) + shift, module, self._readers)
        _log(node, layer, plan, "BatchNorm into the layer before")
        node.replace_all_uses_with(layer)
        _erase(node, plan)
        return True

    def _fold_into_consumer(
        self, node: Node, scale: torch.Tensor, shift: torch.Tensor, module: QuantModule, plan: QuantPlan
    ) -> bool:
        layer = next(iter(node.users), None)
        op = None if layer is None else self.ops.op_of(layer)
        if layer is None or op not in CONVS or len(node.users) != 1 or op.get(layer, "input") is not node:
            return False
        padding = op.get(layer, "padding")
        padded = any(padding) if isinstance(padding, (tuple, list)) else padding != 0
        if padded and bool(shift.any()):
            return False
        parameters = _foldable_parameters(layer, op, module, plan)
        if parameters is None:
            return False
        weight, bias = parameters
        groups = op.get(layer, "groups")
        per_output = weight.shape[0] // groups

        def of_inputs(values: torch.Tensor) -> torch.Tensor:  # [out, in / groups, 1, ...]
            rows = values.reshape(groups, 1, -1).expand(-1, per_output, -1).reshape(weight.shape[0], -1)
            return rows.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))

        extra = (weight * of_inputs(shift)).flatten(1).sum(1)
        bias = extra if bias is None else bias + extra
        _set_weights(layer, op, weight * of_inputs(scale), bias, module, self._readers)
        _log(node, layer, plan, "BatchNorm into the conv after")
        node.replace_all_uses_with(node.args[0])
        _erase(node, plan)
        return True


def _affine(node: Node, module: QuantModule) -> tuple[torch.Tensor, torch.Tensor] | None:
    """``(a, b)`` of an eval-mode BatchNorm in float64; ``None`` if it uses batch statistics."""
    if BATCH_NORM.get(node, "training"):
        return None
    mean = _static(BATCH_NORM.get(node, "running_mean"), module)
    var = _static(BATCH_NORM.get(node, "running_var"), module)
    if mean is None or var is None:
        return None
    gamma, beta = (_static(BATCH_NORM.get(node, name), module) for name in ("weight", "bias"))
    scale = torch.rsqrt(var + BATCH_NORM.get(node, "eps"))
    if gamma is not None:
        scale = scale * gamma
    shift = -mean * scale
    return scale, shift if beta is None else shift + beta


def _foldable_parameters(
    layer: Node, op: Op, module: QuantModule, plan: QuantPlan
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Weight and bias of a layer in float64; ``None`` if they are not constant or BatchNorm does not fit the layer."""
    weight, bias = (_static(op.get(layer, name), module) for name in ("weight", "bias"))
    if weight is None or (bias is None and op.get(layer, "bias") is not None):
        return None
    return (weight, bias) if _axis_one_is_channels(layer, weight, plan) else None


def _axis_one_is_channels(layer: Node, weight: torch.Tensor, plan: QuantPlan) -> bool:
    """Whether axis 1, which BatchNorm normalises, is the layer's channels.

    It is not for a linear layer on (N, L, features), nor for a conv without a batch dimension.
    """
    fact = plan.facts.get(layer.name)
    return fact is not None and len(fact.shape) == weight.dim()


def _static(value: object, module: QuantModule) -> torch.Tensor | None:
    """The tensor of a ``get_attr`` argument in float64: folding then rounds once."""
    if not isinstance(value, Node) or value.op != "get_attr":
        return None
    tensor = get_attribute(module, str(value.target))
    return tensor.detach().double() if isinstance(tensor, torch.Tensor) else None


def _scale_output_channels(weight: torch.Tensor, scale: torch.Tensor, op: Op, layer: Node) -> torch.Tensor:
    if op not in CONV_TRANSPOSES:
        return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    # A transposed conv's weight is [in, out / groups, ...], and output channels are numbered group by group.
    groups = op.get(layer, "groups")
    by_group = scale.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))
    return (weight.reshape(groups, -1, *weight.shape[1:]) * by_group).reshape(weight.shape)


def _set_weights(
    layer: Node, op: Op, weight: torch.Tensor, bias: torch.Tensor, module: QuantModule, readers: Counter[int]
) -> None:
    weight_node, bias_node = op.get(layer, "weight"), op.get(layer, "bias")
    weight_path = _own_path(weight_node, module, readers)
    bias_path = weight_path.rpartition(".")[0] + ".bias" if bias_node is None else _own_path(bias_node, module, readers)
    if bias_node is None:
        bias_path = free_path(module, bias_path.removeprefix("."))
    set_tensor(module, weight_path, nn.Parameter(weight.float()))
    set_tensor(module, bias_path, nn.Parameter(bias.float()))
    with layer.graph.inserting_before(layer):
        args = list(layer.args)
        args[op.index("weight")] = layer.graph.get_attr(weight_path)
        args[op.index("bias")] = layer.graph.get_attr(bias_path)
    layer.args = tuple(args)


def _own_path(node: Node, module: QuantModule, readers: Counter[int]) -> str:
    """The path of a tensor that only this layer reads; a new path if others read it too."""
    path = str(node.target)
    return path if readers[id(get_attribute(module, path))] <= 1 else free_path(module, path)


def _count_readers(module: QuantModule) -> Counter[int]:
    """How many nodes read each tensor, by its identity: one tensor may be known under several paths."""
    readers: Counter[int] = Counter()
    for node in module.graph.nodes:
        if node.op == "get_attr":
            readers[id(get_attribute(module, str(node.target)))] += len(node.users)
    return readers


def _log(node: Node, layer: Node, plan: QuantPlan, detail: str) -> None:
    batch_norm, into = plan.origin(node.name).module_path, plan.origin(layer.name).module_path
    plan.fusions.append(Fusion("fold", batch_norm or node.name, into or layer.name, detail))


def _erase(node: Node, plan: QuantPlan) -> None:
    plan.forget(node.name)
    node.graph.erase_node(node)


def _drop_unread_tensors(module: QuantModule) -> None:
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    called = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    for path, _ in [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]:
        parent, _, name = path.rpartition(".")
        parts = parent.split(".")
        if path not in read and not any(".".join(parts[:end]) in called for end in range(1, len(parts) + 1)):
            delattr(module.get_submodule(parent), name)
