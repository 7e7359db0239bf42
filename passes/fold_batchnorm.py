"""Fold BatchNorm into the conv, linear or conv_transpose before it, or into the conv after it.

In eval mode BatchNorm is an affine map of each channel, ``y = a * x + b`` with ``a = gamma / sqrt(var + eps)``
and ``b = beta - mean * a``. After a layer: ``W' = a * W`` (output channels), ``bias' = a * bias + b``.
Before a conv: ``W' = W * a`` (input channels), ``bias' = bias + sum(W * b)``; exact only where the conv does not
pad, because padding adds zeros after the BatchNorm, or where ``b`` is zero.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch.fx import Node

from fxq.graph_module import QuantModule
from fxq.ops import BATCH_NORM, CONV_TRANSPOSES, CONVS, LINEAR, Dictionary, Op
from fxq.pass_base import Pass
from fxq.passes.layer_weights import (
    axis_one_is_channels,
    constant_response,
    count_readers,
    is_padded,
    scale_inputs,
    scale_outputs,
    set_parameters,
    static_parameters,
    static_tensor,
)
from fxq.plan import ChannelStatistics, Fusion, QuantPlan


class FoldBatchNorm(Pass):
    """BatchNorm nodes next to a layer with weights disappear into it."""

    requires = frozenset({"canonical", "facts"})

    def __init__(self, ops: Dictionary) -> None:
        self.ops = ops
        self._readers: Counter[int] = Counter()

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        folded = 0
        self._readers = count_readers(module)
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
        module.release_unused()
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
        new_weight = scale_outputs(weight, scale, op, layer)
        set_parameters(layer, op, new_weight, scale * (0 if bias is None else bias) + shift, module, self._readers)
        plan.statistics[layer.name] = _statistics(node, scale, shift, module)
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
        if is_padded(layer, op) and bool(shift.any()):
            return False
        parameters = _foldable_parameters(layer, op, module, plan)
        if parameters is None:
            return False
        weight, bias = parameters
        extra = constant_response(weight, shift, op, layer)
        bias = extra if bias is None else bias + extra
        set_parameters(layer, op, scale_inputs(weight, scale, op, layer), bias, module, self._readers)
        _log(node, layer, plan, "BatchNorm into the conv after")
        node.replace_all_uses_with(node.args[0])
        _erase(node, plan)
        return True


def _affine(node: Node, module: QuantModule) -> tuple[torch.Tensor, torch.Tensor] | None:
    """``(a, b)`` of an eval-mode BatchNorm in float64; ``None`` if it uses batch statistics."""
    if BATCH_NORM.get(node, "training"):
        return None
    mean = static_tensor(BATCH_NORM.get(node, "running_mean"), module)
    var = static_tensor(BATCH_NORM.get(node, "running_var"), module)
    if mean is None or var is None:
        return None
    gamma, beta = (static_tensor(BATCH_NORM.get(node, name), module) for name in ("weight", "bias"))
    scale = torch.rsqrt(var + BATCH_NORM.get(node, "eps"))
    if gamma is not None:
        scale = scale * gamma
    shift = -mean * scale
    return scale, shift if beta is None else shift + beta


def _statistics(
    node: Node, scale: torch.Tensor, shift: torch.Tensor, module: QuantModule
) -> ChannelStatistics:
    """Mean and standard deviation of a BatchNorm's output while training, by its running statistics."""
    mean, var = (static_tensor(BATCH_NORM.get(node, name), module) for name in ("running_mean", "running_var"))
    assert mean is not None and var is not None
    return ChannelStatistics(tuple((scale * mean + shift).tolist()), tuple((scale.abs() * var.sqrt()).tolist()))


def _foldable_parameters(
    layer: Node, op: Op, module: QuantModule, plan: QuantPlan
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Weight and bias of a layer in float64; ``None`` if they are not constant or BatchNorm does not fit the layer."""
    parameters = static_parameters(layer, op, module)
    return parameters if parameters is not None and axis_one_is_channels(layer, parameters[0], plan) else None


def _log(node: Node, layer: Node, plan: QuantPlan, detail: str) -> None:
    batch_norm, into = plan.origin(node.name).module_path, plan.origin(layer.name).module_path
    plan.fusions.append(Fusion("fold", batch_norm or node.name, into or layer.name, detail))


def _erase(node: Node, plan: QuantPlan) -> None:
    plan.forget(node.name)
    node.graph.erase_node(node)
