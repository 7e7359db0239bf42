"""Cross-layer equalization: bring the channels between two layers to ranges of about one size.

A weight with one scale for all its channels loses those whose values are much smaller than the largest. Where two
layers with weights ``W1``, ``W2`` follow each other with nothing between them but what commutes with positive factors,
``f(x / s) = f(x) / s``, channel ``i`` between them can be divided by any ``s_i > 0``::

    W1' = W1 / s     bias1' = bias1 / s     W2' = s * W2 (input channels)

which leaves the float model as it is. With ``s_i = sqrt(r1_i / r2_i)``, where ``r1_i`` and ``r2_i`` are the largest
absolute weights of the channel in the two layers, both get the range ``sqrt(r1_i r2_i)``. In chains each pair changes
its neighbours, so rounds over all pairs are repeated. This is section 4.1 of Nagel et al., "Data-Free Quantization
Through Weight Equalization and Bias Correction" (arXiv:1906.04721).

Which layers follow each other so is said in :mod:`fxq.passes.layer_pairs`.

A clamp such as relu6 would need an upper bound for each channel, ``6 / s_i``, which no kernel has. The paper replaces
it with relu, which costs a network that makes use of the bound most of its accuracy. Here the clamp stays, and the
factors respect it: with ``m_i`` the largest value of channel ``i`` before the clamp when the example inputs run, and
some room above it, the clamp does nothing to the channel as long as ``m_i / s_i <= 6``. So ``s_i >= m_i / 6``, and
channels with ``m_i > 6`` are left alone. Where no value is above the measured ``m_i`` by more than the room, this is
exact; the example inputs must therefore be real ones, a batch of some dozens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fxq.config import ResolvedConfig
from fxq.graph_module import QuantModule
from fxq.ops import CONV_TRANSPOSES, LINEAR, Dictionary
from fxq.partition import Inputs
from fxq.pass_base import Pass
from fxq.passes.layer_pairs import POOLS, Layer, Pair, find_pairs, store_layers, upper_bound, values_of
from fxq.passes.layer_weights import count_readers, scale_inputs, scale_outputs
from fxq.plan import ChannelStatistics, Equalized, Fusion, QuantPlan

_ROUNDS = 40
_CLOSE = 1.01  # factors between 1 / 1.01 and 1.01 end the rounds
_ROOM = 1.5  # the largest value measured before a clamp, times this, has to stay below the clamp's bound
_SILENT = 0.01  # a channel that was silent is taken to reach this part of the loudest one


@dataclass
class _Scaling:
    """How the channels of a pair are scaled.

    Attributes:
        pair: the layers, whose weights change with ``scale``.
        scale: what each channel between them was divided by, float64 ``[channels]``.
        lowest, highest: its bounds.
        dropped: silent channels whose weights were zeroed.
    """

    pair: Pair
    scale: torch.Tensor = field(init=False)
    lowest: torch.Tensor = field(init=False)
    highest: torch.Tensor = field(init=False)
    dropped: int = 0

    def __post_init__(self) -> None:
        self.scale = torch.ones(_input_ranges(self.pair.second).numel(), dtype=torch.float64)
        self.lowest, self.highest = torch.zeros_like(self.scale), torch.full_like(self.scale, torch.inf)

    @property
    def changed(self) -> bool:
        return self.dropped > 0 or bool((self.scale != 1).any())


class Equalize(Pass):
    """Weights of layers that follow each other are scaled against each other, channel by channel."""

    requires = frozenset({"canonical", "facts"})
    ensures = frozenset({"equalized"})

    def __init__(self, config: ResolvedConfig, inputs: Inputs, ops: Dictionary) -> None:
        self.config, self.inputs, self.ops = config, inputs, ops

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        if "equalized" in plan.properties:
            return 0
        readers = count_readers(module)
        pairs = find_pairs(module, plan, self.ops, readers)
        pairs = [pair for pair in pairs if any(self._per_tensor(layer, plan) for layer in (pair.first, pair.second))]
        scalings = [_Scaling(pair) for pair in pairs]
        for scaling in scalings:
            scaling.dropped = _drop_silent(scaling, self.ops)
        self._measure(scalings, module)
        for _ in range(_ROUNDS):
            if max((_equalize(scaling) for scaling in scalings), default=1.0) < _CLOSE:
                break
        changed = [scaling for scaling in scalings if scaling.changed]
        for scaling in changed:
            _record(scaling, plan)
        store_layers((layer for s in changed for layer in (s.pair.first, s.pair.second)), module, readers)
        return len(changed)

    def _per_tensor(self, layer: Layer, plan: QuantPlan) -> bool:
        """Whether a layer's weight will have one scale; with one a channel there is nothing to gain."""
        qconfig = self.config.lookup(plan.origin(layer.node.name), layer.op.name)
        return qconfig is not None and not qconfig.weight.per_channel

    def _measure(self, scalings: list[_Scaling], module: QuantModule) -> None:
        """Bound the factors of channels before a clamp by what the example inputs leave below it."""
        clamps = {
            node.all_input_nodes[0]: (scaling, bound)
            for scaling in scalings
            for node in scaling.pair.between
            if (bound := upper_bound(node, self.ops)) is not None
        }
        for node, x in values_of(clamps.keys(), module, self.inputs):
            scaling, bound = clamps[node]
            _bound_factors(scaling, x, bound)


def _bound_factors(scaling: _Scaling, x: torch.Tensor, bound: float) -> None:
    """Bounds for the factors of the channels of ``x``, which a clamp at ``bound`` follows."""
    share = scaling.pair.by_channel(x).amax(1).double() * _ROOM / bound
    share = torch.maximum(share, share.max().clamp(max=1.0) * _SILENT)
    free = share <= 1
    scaling.lowest = torch.maximum(scaling.lowest, torch.where(free, share, 1.0))
    scaling.highest = torch.minimum(scaling.highest, torch.where(free, torch.inf, 1.0))


def _equalize(scaling: _Scaling) -> float:
    """Scale the weights of a pair's layers against each other; the largest factor used, or its inverse if larger."""
    first, second = scaling.pair.first, scaling.pair.second
    ideal = scaling.scale * _scales(_output_ranges(first), _input_ranges(second))
    total = torch.maximum(torch.minimum(ideal, scaling.highest), scaling.lowest)
    factor = total / scaling.scale
    scaling.scale = total
    first.weight = scale_outputs(first.weight, 1 / factor, first.op, first.node)
    if first.bias is not None:
        first.bias = first.bias / factor
    second.weight = scale_inputs(second.weight, factor, second.op, second.node)
    return max(float(factor.max()), float(1 / factor.min()))


def _scales(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """``sqrt(r1 / r2)``; channels that are dead on one side are brought to the others' typical range on the other."""
    alive = (first > 0) & (second > 0)
    if not bool(alive.any()):
        return torch.ones_like(first)
    typical = (first * second)[alive].sqrt().median()
    scale = torch.where(second > 0, typical / second.clamp(min=1e-300), 1.0)
    scale = torch.where(first > 0, first / typical, scale)
    scale = torch.where(alive, (first / second.clamp(min=1e-300)).sqrt(), scale)
    return torch.where((first > 0) | (second > 0), scale, 1.0)


def _drop_silent(scaling: _Scaling, ops: Dictionary) -> int:
    """Zero the weights that only ever meet zeros: of channels that are constant, and zero after relu; returns how many.

    Pruned networks have them; they count nothing, but may be the largest weights and then set everyone's scale.
    """
    pair = scaling.pair
    constant = _output_ranges(pair.first) == 0
    value = torch.zeros_like(scaling.scale) if pair.first.bias is None else pair.first.bias
    for node in pair.between:
        if ops.op_of(node) not in POOLS:
            value = node.target(value, *node.args[1:])  # type: ignore[operator]
    silent = constant & (value == 0) & (_input_ranges(pair.second) > 0)
    pair.second.weight = scale_inputs(pair.second.weight, (~silent).double(), pair.second.op, pair.second.node)
    return int(silent.sum())


def _output_ranges(layer: Layer) -> torch.Tensor:
    """Largest absolute weight of each output channel, ``[out]``."""
    weight = layer.weight
    if layer.op in CONV_TRANSPOSES:  # [in, out / groups, ...]
        groups = layer.op.get(layer.node, "groups")
        by_group = weight.abs().reshape(groups, -1, weight.shape[1], weight[0, 0].numel())
        return by_group.amax((1, 3)).flatten()
    return weight.abs().flatten(1).amax(1)


def _input_ranges(layer: Layer) -> torch.Tensor:
    """Largest absolute weight of each input channel, ``[in]``."""
    weight = layer.weight
    if layer.op in CONV_TRANSPOSES:
        return weight.abs().flatten(1).amax(1)
    groups = 1 if layer.op is LINEAR else layer.op.get(layer.node, "groups")
    by_group = weight.abs().reshape(groups, -1, weight.shape[1], weight[0, 0].numel())
    return by_group.amax((1, 3)).flatten()


def _record(scaling: _Scaling, plan: QuantPlan) -> None:
    first, second, scale = scaling.pair.first, scaling.pair.second, scaling.scale
    name = first.node.name
    if name in plan.statistics:
        mean, std = (torch.tensor(values, dtype=torch.float64) / scale for values in plan.statistics[name])
        plan.statistics[name] = ChannelStatistics.of(mean, std)
    plan.equalized.append(Equalized(name, second.node.name, tuple(scale.tolist())))
    detail = f"channels divided by {scale.min():.2g} to {scale.max():.2g}"
    if scaling.dropped:
        detail += f", {scaling.dropped} silent ones zeroed"
    plan.fusions.append(Fusion("equalize", first.where, second.where, detail))
