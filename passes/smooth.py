"""Smoothing: even out the channels that int8 linears read, where a few of them are far larger than the others.

What a LayerNorm of a transformer writes has channels that are tens of times larger than the rest. One scale for the
whole tensor then leaves the rest a few steps. Weights have a scale for each output channel and are spread over the
input channels more evenly, so that part of the spread can go there: channel ``j`` is divided in the LayerNorm's weight
and bias, and multiplied in the columns of the linears that read it::

    gamma' = gamma / s     beta' = beta / s     W' = W * s (columns)

which leaves the float model as it is. With ``s_j = sqrt(max|X_j| / max|W_j|)``, over all linears that read it, both
get the range ``sqrt(max|X_j| max|W_j|)``: section 4 of Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training
Quantization for Large Language Models" (arXiv:2211.10438), with a migration strength of one half. ``max|X_j|`` is
measured on the example inputs, which must therefore be real ones; the result is exact for any.

The projection of the values and that of the output of an attention are such a pair too: the weighted sum between them
works on each channel by itself.

Left alone:

* pairs without outliers, where the graph stays as it is;
* what is not only read by int8 linears, as by a residual add after the LayerNorm, or through ops that mix the channels;
* linears and LayerNorms whose tensors others read too, or whose weights are not constant.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxq.aliases import reads_shape
from fxq.attention import multihead_attention
from fxq.config import ResolvedConfig
from fxq.graph_module import QuantModule
from fxq.ops import CONTIGUOUS, FLATTEN, GETITEM, LAYER_NORM, LINEAR, RESHAPE, TRANSPOSE, Dictionary
from fxq.partition import Inputs
from fxq.pass_base import Pass
from fxq.passes.layer_pairs import Layer, layer_at, store_layers, values_of
from fxq.passes.layer_weights import count_readers, scale_inputs, scale_outputs
from fxq.plan import Equalized, Fusion, QuantPlan

_OUTLIER = 4.0  # times the median of the channels; below, there is nothing to even out
_LIMIT = 100.0  # of the factors and their inverses
_VALUE = 2  # position of the values among the arguments of attention


@dataclass(frozen=True, eq=False)
class _Site:
    """A layer whose output channels can be divided, the node with the channels, and the linears that read these."""

    first: Node
    channels: Node
    readers: tuple[Node, ...]


class Smooth(Pass):
    """Outlier channels between a LayerNorm and its linears move into the linears' weights."""

    requires = frozenset({"canonical", "facts"})
    ensures = frozenset({"smoothed"})

    def __init__(self, config: ResolvedConfig, inputs: Inputs, ops: Dictionary) -> None:
        self.config, self.inputs, self.ops = config, inputs, ops

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        if "smoothed" in plan.properties:
            return 0
        sites = {site.channels: site for site in self._sites(module, plan)}
        largest = {node: _largest(x) for node, x in values_of(sites.keys(), module, self.inputs)}
        outlying = [sites[node] for node, values in largest.items() if _has_outliers(values)]
        readers = count_readers(module)
        return sum(self._smooth(site, largest[site.channels], module, plan, readers) for site in outlying)

    def _sites(self, module: QuantModule, plan: QuantPlan) -> Iterator[_Site]:
        for node in module.graph.nodes:
            found = self._first_layer(node)
            fact = plan.facts.get(found[1].name) if found else None
            if found is None or fact is None or not fact.is_float32 or not fact.shape:
                continue
            readers = self._readers(found[1], plan)
            if readers:
                yield _Site(*found, tuple(readers))

    def _first_layer(self, node: Node) -> tuple[Node, Node] | None:
        """A LayerNorm, twice, or the projection of the values and the context of an attention."""
        if self.ops.op_of(node) is LAYER_NORM:
            return node, node
        if node.target is not multihead_attention:
            return None
        value = node.args[_VALUE]
        contexts = [user for user in node.users if user.args[1] == 0]  # the other part is the weights
        if not isinstance(value, Node) or node.args.count(value) > 1 or len(value.users) > 1:
            return None
        return (value, contexts[0]) if self.ops.op_of(value) is LINEAR and len(contexts) == 1 else None

    def _readers(self, node: Node, plan: QuantPlan) -> list[Node] | None:
        """The linears that read the channels of ``node``; ``None`` if anything else does."""
        found: list[Node] = []
        for user in node.users:
            op = self.ops.op_of(user)
            if op is LINEAR and user.args[0] is node:
                if self.config.lookup(plan.origin(user.name), LINEAR.name) is None:
                    return None
                found.append(user)
            elif self._keeps_channels(user, node, plan):
                further = self._readers(user, plan)
                if further is None:
                    return None
                found += further
            elif not reads_shape(user):
                return None
        return found

    def _keeps_channels(self, user: Node, node: Node, plan: QuantPlan) -> bool:
        """Whether an op leaves the last axis as it is, for inputs of any other sizes too."""
        op, fact = self.ops.op_of(user), plan.facts.get(node.name)
        if op is None or fact is None or user.name not in plan.facts:
            return False
        rank = len(fact.shape)
        if op is RESHAPE:
            return bool(RESHAPE.get(user, "shape")[-1:] == fact.shape[-1:])
        if op is FLATTEN:
            return _is_other_axis(FLATTEN.get(user, "end_dim"), rank)
        if op is TRANSPOSE:
            return all(_is_other_axis(dim, rank) for dim in user.args[1:])
        if op is GETITEM:
            index = user.args[1] if isinstance(user.args[1], tuple) else (user.args[1],)
            return len(index) < rank and all(type(part) in (int, slice) for part in index)
        return op is CONTIGUOUS

    def _smooth(
        self, site: _Site, largest: torch.Tensor, module: QuantModule, plan: QuantPlan, readers: Counter[int]
    ) -> bool:
        """Scale the layers of one place, if they may be changed."""
        op = self.ops.op_of(site.first)
        assert op is not None
        first = layer_at(site.first, op, module, plan, readers)
        found = [layer_at(reader, LINEAR, module, plan, readers) for reader in site.readers]
        linears = [layer for layer in found if layer is not None and layer.weight.dim() == 2]
        if first is None or len(linears) < len(found) or first.weight.dim() != (1 if op is LAYER_NORM else 2):
            return False
        scale = _scales(largest, torch.stack([layer.weight.abs().amax(0) for layer in linears]).amax(0))
        first.weight = scale_outputs(first.weight, 1 / scale, first.op, first.node)
        first.bias = None if first.bias is None else first.bias / scale
        for linear in linears:
            linear.weight = scale_inputs(linear.weight, scale, linear.op, linear.node)
            _record(first, linear, scale, plan)
        store_layers((first, *linears), module, readers)
        return True


def _is_other_axis(dim: object, rank: int) -> bool:
    """Whether a number names another axis than the last."""
    return type(dim) is int and dim not in (-1, rank - 1)


def _largest(x: torch.Tensor) -> torch.Tensor:
    """The largest absolute value of each channel, float64 ``[channels]``; empty without any value."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, 0)
    return rows.abs().amax(0).double() if rows.numel() else rows.new_empty(0).double()


def _has_outliers(largest: torch.Tensor) -> bool:
    alive = largest[largest > 0]
    return alive.numel() > 0 and bool(largest.isfinite().all()) and bool(alive.max() >= _OUTLIER * alive.median())


def _scales(activations: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``sqrt(activations / weights)`` within limits, geometric mean 1; 1 for channels that are zero in either."""
    alive = (activations > 0) & (weights > 0)
    logarithm = torch.where(alive, (activations / weights.clamp(min=1e-300)).clamp(min=1e-300).log() / 2, 0.0)
    logarithm = torch.where(alive, logarithm - logarithm[alive].mean(), 0.0) if bool(alive.any()) else logarithm
    return logarithm.exp().clamp(1 / _LIMIT, _LIMIT)


def _record(first: Layer, linear: Layer, scale: torch.Tensor, plan: QuantPlan) -> None:
    plan.equalized.append(Equalized(first.node.name, linear.node.name, tuple(scale.tolist())))
    detail = f"channels divided by {scale.min():.2g} to {scale.max():.2g}"
    plan.fusions.append(Fusion("smooth", first.where, linear.where, detail))
