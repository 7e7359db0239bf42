"""Cross-layer equalization: bring the channels between two layers to ranges of about one size.

A weight with one scale for all its channels loses those whose values are much smaller than the largest. Where two
layers with weights ``W1``, ``W2`` follow each other with nothing between them but what commutes with positive factors,
``f(x / s) = f(x) / s``, channel ``i`` between them can be divided by any ``s_i > 0``::

    W1' = W1 / s     bias1' = bias1 / s     W2' = s * W2 (input channels)

which leaves the float model as it is. With ``s_i = sqrt(r1_i / r2_i)``, where ``r1_i`` and ``r2_i`` are the largest
absolute weights of the channel in the two layers, both get the range ``sqrt(r1_i r2_i)``. In chains each pair changes
its neighbours, so rounds over all pairs are repeated. This is section 4.1 of Nagel et al., "Data-Free Quantization
Through Weight Equalization and Bias Correction" (arXiv:1906.04721).

Nothing but relu, leaky_relu, pooling and clamps at zero may stand between, and nothing else may read what is between:
not a residual add, a second branch, another layer that shares a weight.

A clamp such as relu6 would need an upper bound for each channel, ``6 / s_i``, which no kernel has. The paper replaces
it with relu, which costs a network that makes use of the bound most of its accuracy. Here the clamp stays, and the
factors respect it: with ``m_i`` the largest value of channel ``i`` before the clamp when the example inputs run, and
some room above it, the clamp does nothing to the channel as long as ``m_i / s_i <= 6``. So ``s_i >= m_i / 6``, and
channels with ``m_i > 6`` are left alone. Where no value is above the measured ``m_i`` by more than the room, this is
exact; the example inputs must therefore be real ones, a batch of some dozens.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from fxq.config import ResolvedConfig
from fxq.graph_module import QuantModule
from fxq.lockstep import Walk
from fxq.ops import (
    ADAPTIVE_AVG_POOL2D,
    AVG_POOL2D,
    CLAMP,
    CONV_TRANSPOSES,
    CONVS,
    LEAKY_RELU,
    LINEAR,
    MAX_POOL2D,
    RELU,
    Dictionary,
    Op,
)
from fxq.partition import Inputs
from fxq.pass_base import Pass
from fxq.passes.layer_weights import (
    axis_one_is_channels,
    count_readers,
    is_shared,
    scale_inputs,
    scale_outputs,
    set_parameters,
    static_parameters,
)
from fxq.plan import ChannelStatistics, Equalized, Fusion, QuantPlan

_BETWEEN = (RELU, LEAKY_RELU)
_POOLS = (MAX_POOL2D, AVG_POOL2D, ADAPTIVE_AVG_POOL2D)  # between convs, where they go over places, not channels
_ROUNDS = 40
_CLOSE = 1.01  # factors between 1 / 1.01 and 1.01 end the rounds
_ROOM = 1.5  # the largest value measured before a clamp, times this, has to stay below the clamp's bound
_SILENT = 0.01  # a channel that was silent is taken to reach this part of the loudest one


@dataclass
class Layer:
    """A layer with constant weights, in float64 while the pass runs."""

    node: Node
    op: Op
    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass
class Pair:
    """Two layers and what is between them.

    Attributes:
        scale: what each channel between them was divided by, float64 ``[channels]``.
        lowest, highest: its bounds.
    """

    first: Layer
    second: Layer
    between: tuple[Node, ...]
    scale: torch.Tensor = field(init=False)
    lowest: torch.Tensor = field(init=False)
    highest: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.scale = torch.ones(_input_ranges(self.second).numel(), dtype=torch.float64)
        self.lowest, self.highest = torch.zeros_like(self.scale), torch.full_like(self.scale, torch.inf)


class Equalize(Pass):
    """Weights of layers that follow each other are scaled against each other, channel by channel."""

    requires = frozenset({"canonical", "facts"})
    ensures = frozenset({"equalized"})

    def __init__(self, config: ResolvedConfig, inputs: Inputs, ops: Dictionary) -> None:
        self.config, self.inputs, self.ops = config, inputs, ops
        self._readers: Counter[int] = Counter()

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        if "equalized" in plan.properties:
            return 0
        self._readers = count_readers(module)
        layers = self._layers(module, plan)
        pairs = [pair for layer in layers.values() if (pair := self._pair(layer, layers)) is not None]
        pairs = [pair for pair in pairs if any(self._per_tensor(layer, plan) for layer in (pair.first, pair.second))]
        dropped = {pair.first.node: _drop_silent(pair, self.ops) for pair in pairs}
        self._measure(pairs, module)
        for _ in range(_ROUNDS):
            if max((_equalize(pair) for pair in pairs), default=1.0) < _CLOSE:
                break
        changed = [pair for pair in pairs if dropped[pair.first.node] or bool((pair.scale != 1).any())]
        for pair in changed:
            _record(pair, dropped[pair.first.node], plan)
        for layer in {layer.node: layer for pair in changed for layer in (pair.first, pair.second)}.values():
            set_parameters(layer.node, layer.op, layer.weight, layer.bias, module, self._readers)
        module.graph.eliminate_dead_code()
        module.release_unused()
        return len(changed)

    def _layers(self, module: QuantModule, plan: QuantPlan) -> dict[Node, Layer]:
        """The layers whose weights may be changed: constant, and read by nobody else."""
        found = {}
        for node in module.graph.nodes:
            op = self.ops.op_of(node)
            if op is None or op not in (*CONVS, *CONV_TRANSPOSES, LINEAR):
                continue
            parameters = static_parameters(node, op, module)
            given = [op.get(node, name) for name in ("weight", "bias") if op.get(node, name) is not None]
            if parameters is None or any(is_shared(tensor, module, self._readers) for tensor in given):
                continue
            if op is LINEAR or axis_one_is_channels(node, parameters[0], plan):
                found[node] = Layer(node, op, *parameters)
        return found

    def _per_tensor(self, layer: Layer, plan: QuantPlan) -> bool:
        """Whether a layer's weight will have one scale; with one a channel there is nothing to gain."""
        qconfig = self.config.lookup(plan.origin(layer.node.name), layer.op.name)
        return qconfig is not None and not qconfig.weight.per_channel

    def _pair(self, first: Layer, layers: dict[Node, Layer]) -> Pair | None:
        """The pair that ``first`` begins, if all between it and the next layer can be scaled."""
        between: list[Node] = []
        node = first.node
        while len(node.users) == 1:
            user = next(iter(node.users))
            op = self.ops.op_of(user)
            if op is None or op.get(user, next(iter(op.signature.defaults))) is not node:
                return None
            if user in layers:
                same_axis = (first.op is LINEAR) == (op is LINEAR)
                return Pair(first, layers[user], tuple(between)) if same_axis else None
            passes = op in _BETWEEN or (op in _POOLS and first.op is not LINEAR)
            if not passes and _upper_bound(user, self.ops) is None:
                return None
            between.append(user)
            node = user
        return None

    def _measure(self, pairs: list[Pair], module: QuantModule) -> None:
        """Bound the factors of channels before a clamp by what the example inputs leave below it."""
        clamps = {node: pair for pair in pairs for node in pair.between if _upper_bound(node, self.ops) is not None}
        if not clamps:
            return
        walk = Walk(module, [self.inputs])
        with torch.no_grad():
            for node in module.graph.nodes:
                walk.run(node)
                if node in clamps:
                    x = walk.arguments(node, 0)[0]
                    _bound_factors(clamps[node], x, _upper_bound(node, self.ops) or 0.0)
                walk.release(node)


def _upper_bound(node: Node, ops: Dictionary) -> float | None:
    """The upper bound of a clamp at zero and a positive number; ``None`` for anything else."""
    if ops.op_of(node) is not CLAMP:
        return None
    low, high = node.args[1:]
    numbers = isinstance(low, (int, float)) and isinstance(high, (int, float))
    return float(high) if numbers and low == 0 and high > 0 else None  # type: ignore[arg-type, operator]


def _bound_factors(pair: Pair, x: torch.Tensor, bound: float) -> None:
    """Bounds for the factors of the channels of ``x``, which a clamp at ``bound`` follows."""
    channels = x.movedim(-1 if pair.first.op is LINEAR else 1, 0).flatten(1)
    share = channels.amax(1).double() * _ROOM / bound
    share = torch.maximum(share, share.max().clamp(max=1.0) * _SILENT)
    free = share <= 1
    pair.lowest = torch.maximum(pair.lowest, torch.where(free, share, 1.0))
    pair.highest = torch.minimum(pair.highest, torch.where(free, torch.inf, 1.0))


def _equalize(pair: Pair) -> float:
    """Scale the weights of a pair's layers against each other; the largest factor used, or its inverse if larger."""
    ideal = pair.scale * _scales(_output_ranges(pair.first), _input_ranges(pair.second))
    total = torch.maximum(torch.minimum(ideal, pair.highest), pair.lowest)
    factor = total / pair.scale
    pair.scale = total
    first, second = pair.first, pair.second
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


def _drop_silent(pair: Pair, ops: Dictionary) -> int:
    """Zero the weights that only ever meet zeros: of channels that are constant, and zero after relu; returns how many.

    Pruned networks have them; they count nothing, but may be the largest weights and then set everyone's scale.
    """
    constant = _output_ranges(pair.first) == 0
    value = torch.zeros_like(pair.scale) if pair.first.bias is None else pair.first.bias
    for node in pair.between:
        if ops.op_of(node) not in _POOLS:
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


def _record(pair: Pair, dropped: int, plan: QuantPlan) -> None:
    name, scale = pair.first.node.name, pair.scale
    if name in plan.statistics:
        mean, std = (torch.tensor(values, dtype=torch.float64) / scale for values in plan.statistics[name])
        plan.statistics[name] = ChannelStatistics(tuple(mean.tolist()), tuple(std.tolist()))
    plan.equalized.append(Equalized(name, pair.second.node.name, tuple(scale.tolist())))
    detail = f"channels divided by {scale.min():.2g} to {scale.max():.2g}"
    if dropped:
        detail += f", {dropped} silent ones zeroed"
    plan.fusions.append(Fusion("equalize", _where(pair.first, plan), _where(pair.second, plan), detail))


def _where(layer: Layer, plan: QuantPlan) -> str:
    return plan.origin(layer.node.name).module_path or layer.node.name
