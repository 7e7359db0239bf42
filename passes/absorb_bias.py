"""Bias absorption: what a channel between two layers never falls below is moved into the biases of the second one.

A channel whose values are all far above zero widens the range of the whole tensor, and the other channels lose steps.
Where two layers follow each other, ``h = f(W1 x + b1)`` and ``y = W2 h + b2``, and ``W1 x + b1`` stays above ``c >= 0``
channel by channel, ``f(z - c) = f(z) - c`` holds for ``f`` = relu, and::

    b1' = b1 - c     b2' = b2 + W2 c

leaves the float model as it is, while what is between is lower by ``c``. This is section 4.1.3 ("absorbing high
biases") of Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction"
(arXiv:1906.04721); equalization makes such channels.

After a BatchNorm with ``beta`` and ``gamma``, the paper takes ``c = max(0, beta - 3 |gamma|)``, which one value in 740
is below. Here the example inputs have a say as well: ``c`` is never above the smallest value that they make. Without a
BatchNorm it is that value less a quarter of the range they make. So these must be real ones, a batch of some dozens.

Refused, because it would not be exact:

* a second layer that pads with zeros: they would have to become ``-c``, which no kernel pads with. So too a
  transposed conv, whose outputs are not all made from the same number of inputs, and average pooling with padding;
* channels that a clamp such as relu6 may cut off: ``min(z - c, 6)`` is not ``min(z, 6) - c`` where ``z > 6``. A channel
  is lowered only if the example inputs, and a quarter of their range more, stay below the bound.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from fxq.config import ResolvedConfig
from fxq.graph_module import QuantModule
from fxq.ops import AVG_POOL2D, CONV_TRANSPOSES, CONVS, Dictionary
from fxq.partition import Inputs
from fxq.pass_base import Pass
from fxq.passes.layer_pairs import Layer, Pair, find_pairs, store_layers, upper_bound, values_of
from fxq.passes.layer_weights import constant_response, count_readers, is_padded
from fxq.plan import Absorbed, ChannelStatistics, Fusion, QuantPlan

_ROOM = 0.25  # of the measured range, on both sides of it
_ENOUGH = 16  # values of a channel; the range of fewer says little
_DEVIATIONS = 3  # below the mean of a BatchNorm


class AbsorbBias(Pass):
    """Biases that keep a channel far above zero move into the layer after it."""

    requires = frozenset({"canonical", "facts"})
    ensures = frozenset({"biases absorbed"})

    def __init__(self, config: ResolvedConfig, inputs: Inputs, ops: Dictionary) -> None:
        self.config, self.inputs, self.ops = config, inputs, ops

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        if "biases absorbed" in plan.properties:
            return 0
        readers = count_readers(module)
        pairs = {
            pair.first.node: pair
            for pair in find_pairs(module, plan, self.ops, readers)
            if self._is_quantized(pair, plan) and _passes_shifts(pair, self.ops)
        }
        changed = []
        for node, x in values_of(pairs.keys(), module, self.inputs):
            pair = pairs[node]
            shift = _shift(pair, x, plan, self.ops)
            if bool(shift.any()):
                _absorb(pair, shift)
                _record(pair, shift, plan)
                changed += [pair.first, pair.second]
        store_layers(changed, module, readers)
        return len(changed) // 2

    def _is_quantized(self, pair: Pair, plan: QuantPlan) -> bool:
        return any(
            self.config.lookup(plan.origin(layer.node.name), layer.op.name) is not None
            for layer in (pair.first, pair.second)
        )


def _passes_shifts(pair: Pair, ops: Dictionary) -> bool:
    """Whether lowering all values of a channel before the second layer changes its output by the same everywhere."""
    second: Layer = pair.second
    if second.op in CONV_TRANSPOSES or (second.op in CONVS and is_padded(second.node, second.op)):
        return False
    return not any(_averages_padding(node, ops) for node in pair.between)


def _averages_padding(node: Node, ops: Dictionary) -> bool:
    if ops.op_of(node) is not AVG_POOL2D:
        return False
    return is_padded(node, AVG_POOL2D) or AVG_POOL2D.get(node, "divisor_override") is not None


def _shift(pair: Pair, x: torch.Tensor, plan: QuantPlan, ops: Dictionary) -> torch.Tensor:
    """What each channel can be lowered by, float64 ``[channels]``; ``x`` is the first layer's output."""
    values = pair.by_channel(x).double()
    lowest, highest = values.aminmax(dim=1)
    room = (highest - lowest) * _ROOM if values.shape[1] >= _ENOUGH else torch.full_like(lowest, torch.inf)
    shift = lowest - room
    if pair.first.node.name in plan.statistics:
        mean, std = (torch.tensor(s, dtype=torch.float64) for s in plan.statistics[pair.first.node.name])
        shift = torch.minimum(lowest, mean - _DEVIATIONS * std)
    bounds = [bound for node in pair.between if (bound := upper_bound(node, ops)) is not None]
    safe = (shift > 0) & (highest + room <= min(bounds)) if bounds else shift > 0
    return torch.where(safe & shift.isfinite(), shift, 0.0)


def _absorb(pair: Pair, shift: torch.Tensor) -> None:
    first, second = pair.first, pair.second
    response = constant_response(second.weight, shift, second.op, second.node)
    first.bias = -shift if first.bias is None else first.bias - shift
    second.bias = response if second.bias is None else second.bias + response


def _record(pair: Pair, shift: torch.Tensor, plan: QuantPlan) -> None:
    name = pair.first.node.name
    if name in plan.statistics:
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in plan.statistics[name])
        plan.statistics[name] = ChannelStatistics.of(mean - shift, std)
    plan.absorbed.append(Absorbed(name, pair.second.node.name, tuple(shift.tolist())))
    detail = f"{int((shift > 0).sum())} of {shift.numel()} channels lowered, by up to {shift.max():.2g}"
    plan.fusions.append(Fusion("absorb bias", pair.first.where, pair.second.where, detail))
