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
    constant,
    constant_response,
    count_readers,
    is_padded,
    scale_inputs,
    scale_outputs,
    set_parameters,
    static_tensor,
)
from fxq.plan import ChannelStatistics, Fusion, QuantPlan
from fxq.scaled_weight import ScaledWeight


class FoldBatchNorm(Pass):
    """BatchNorm nodes next to a layer with weights disappear into it.

    Args:
        keep_sources: weights stay what they were before, and are scaled whenever they are read.
    """

    requires = frozenset({"canonical", "facts"})

    def __init__(self, ops: Dictionary, keep_sources: bool = False) -> None:
        self.ops, self.keep_sources = ops, keep_sources
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
        weight, bias = constant(op.get(layer, "weight"), module), static_tensor(op.get(layer, "bias"), module)
        if weight is None or not _has_channels(layer, op, weight, bias, plan):
            return False
        new_weight = self._scaled(weight, scale, op, layer)
        set_parameters(layer, op, new_weight, scale * (0 if bias is None else bias) + shift, module, self._readers)
        plan.statistics[layer.name] = _statistics(node, scale, shift, module)
        _log(node, layer, plan, "BatchNorm into the layer before")
        node.replace_all_uses_with(layer)
        _erase(node, plan)
        return True

    def _scaled(self, weight: torch.Tensor, scale: torch.Tensor, op: Op, layer: Node) -> torch.Tensor:
        if op in CONV_TRANSPOSES or weight.dtype != torch.float32:
            return scale_outputs(weight.double(), scale, op, layer)
        scaled = ScaledWeight(weight, scale)
        return scaled if self.keep_sources else scaled.value()

    def _fold_into_consumer(
        self, node: Node, scale: torch.Tensor, shift: torch.Tensor, module: QuantModule, plan: QuantPlan
    ) -> bool:
        layer = next(iter(node.users), None)
        op = None if layer is None else self.ops.op_of(layer)
        if layer is None or op not in CONVS or len(node.users) != 1 or op.get(layer, "input") is not node:
            return False
        if is_padded(layer, op) and bool(shift.any()):
            return False
        weight, bias = (static_tensor(op.get(layer, name), module) for name in ("weight", "bias"))
        if weight is None or not _has_channels(layer, op, weight, bias, plan):
            return False
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
    return ChannelStatistics.of(scale * mean + shift, scale.abs() * var.sqrt())


def _has_channels(layer: Node, op: Op, weight: torch.Tensor, bias: torch.Tensor | None, plan: QuantPlan) -> bool:
    """Whether a layer's bias is constant and BatchNorm fits the layer."""
    return (bias is not None or op.get(layer, "bias") is None) and axis_one_is_channels(layer, weight, plan)


def _log(node: Node, layer: Node, plan: QuantPlan, detail: str) -> None:
    batch_norm, into = plan.origin(node.name).module_path, plan.origin(layer.name).module_path
    plan.fusions.append(Fusion("fold", batch_norm or node.name, into or layer.name, detail))


def _erase(node: Node, plan: QuantPlan) -> None:
    plan.forget(node.name)
    node.graph.erase_node(node)
