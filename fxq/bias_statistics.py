"""Bias correction without data: the mean input of a layer from the statistics of the BatchNorm before it.

Section 4.2 and appendix C of Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction"
(arXiv:1906.04721).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from fxq.graph_module import QuantModule
from fxq.ops import CLAMP, CONV_TRANSPOSES, RELU
from fxq.partition import Inputs
from fxq.passes.layer_weights import constant_response
from fxq.quant_layers import QuantLayer, quant_layers


def correct_from_statistics(reference: QuantModule, prepared: QuantModule, inputs: Sequence[Inputs]) -> None:
    twins = {node.name: node for node in prepared.graph.nodes}
    corrected = 0
    for layer in quant_layers(reference):
        if layer.node.name in prepared.plan.input_means:
            continue  # corrected when it was converted
        mean = _input_mean(twins[layer.node.name], prepared, layer)
        if mean is None:
            continue
        rounding = layer.float_weight(prepared).double() - layer.dequantized(reference).double()
        shift = constant_response(rounding, mean, layer.op, layer.node)
        layer.set_bias(layer.bias(reference) + shift.float(), reference)
        corrected += 1
    note = f"biases corrected: {corrected} layers, from BatchNorm statistics"
    reference.plan.notes = [*reference.plan.notes, note]


def _input_mean(twin: Node, prepared: QuantModule, layer: QuantLayer) -> torch.Tensor | None:
    """Mean of each input channel of a layer by the BatchNorm before it, float64 ``[in]``; ``None`` if unknown."""
    if layer.op in CONV_TRANSPOSES:
        return None  # with a stride, places differ in how many weights reach them
    plan = prepared.plan
    observers = set(plan.observer_nodes(prepared.graph))
    low, high = float("-inf"), float("inf")
    node = twin.args[0]
    while isinstance(node, Node) and node.name not in plan.statistics:
        bounds = _bounds(node) if node.name not in observers else (None, None)
        if bounds is None:
            return None
        # this op comes before those seen so far: its bounds are clamped by theirs
        low, high = (max(low, min(high, default if bound is None else bound))
                     for bound, default in zip(bounds, (low, high), strict=True))  # fmt: skip
        node = node.args[0]
    if not isinstance(node, Node):
        return None
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in plan.statistics[node.name])
    return clipped_normal_mean(mean, std, low, high)


def _bounds(node: Node) -> tuple[float | None, float | None] | None:
    """The bounds of a relu or of a clamp between numbers; ``None`` for any other node."""
    if node.target is RELU.target:
        return 0.0, None
    if node.target is CLAMP.target and not any(isinstance(bound, Node) for bound in node.args[1:]):
        return node.args[1], node.args[2]  # type: ignore[return-value]
    return None


def clipped_normal_mean(mean: torch.Tensor, std: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Mean of ``clamp(x, low, high)`` for normal ``x``; appendix C of arXiv:1906.04721.

    Example:
        >>> clipped_normal_mean(torch.zeros(1), torch.ones(1), 0.0, float("inf"))  # of a relu: 1 / sqrt(2 pi)
        tensor([0.3989])
    """
    normal = torch.distributions.Normal(0.0, 1.0)
    width = std.clamp(min=1e-30)
    total = mean.clone()
    if low != float("-inf"):
        a = (low - mean) / width
        total = total + (low - mean) * normal.cdf(a) + width * normal.log_prob(a).exp()
    if high != float("inf"):
        b = (high - mean) / width
        total = total + (high - mean) * normal.cdf(-b) - width * normal.log_prob(b).exp()
    return total
