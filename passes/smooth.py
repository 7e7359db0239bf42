"""Smoothing: even out the channels that int8 linears read, where a few of them are far larger than the others.

What a LayerNorm of a transformer writes has channels that are tens of times larger than the rest. One scale for the
whole tensor then leaves the rest a few steps. Weights have a scale for each output channel and are spread over the
input channels more evenly, so that part of the spread can go there: channel ``j`` is divided in the LayerNorm's weight
and bias, and multiplied in the columns of the linears that read it::

    gamma' = gamma / s     beta' = beta / s     W' = W * s (columns)

which leaves the float model as it is. With ``s_j = sqrt(max|X_j| / max|W_j|)``, over all linears that read it, both
get the range ``sqrt(max|X_j| max|W_j|)``: section 4 of Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training
Quantization for Large Language Models" (arXiv:2211.10438), with a migration strength of one half. ``max|X_j|`` is
measured on the first batch, by a call (:class:`fxq.smoothing.Smoothing`) that divides this batch and changes the
layers for the others, before any observer has seen it; the result is exact for any.

The projection of the values and that of the output of an attention are such a pair too: the weighted sum between them
works on each channel by itself.

Left alone:

* pairs without outliers, where the graph stays as it is;
* what is not only read by int8 linears, as by a residual add after the LayerNorm, or through ops that mix the channels;
* linears and LayerNorms whose tensors others read too, or whose weights are not constant.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.fx import Node

from fxq.aliases import reads_shape
from fxq.attention import multihead_attention
from fxq.config import ResolvedConfig
from fxq.graph_module import QuantModule, free_path, get_attribute, set_tensor
from fxq.ops import CONTIGUOUS, FLATTEN, GETITEM, LAYER_NORM, LINEAR, RESHAPE, TRANSPOSE, Dictionary
from fxq.pass_base import Pass
from fxq.passes.layer_weights import constant, count_readers, is_shared
from fxq.plan import PendingSmoothing, QuantPlan
from fxq.scaled_weight import ScaledWeight
from fxq.smoothing import Smoothing

_VALUE = 2  # position of the values among the arguments of attention


class Smooth(Pass):
    """A call behind each LayerNorm whose channels may be evened out, and behind each such projection of values."""

    requires = frozenset({"observed"})

    def __init__(self, config: ResolvedConfig, ops: Dictionary) -> None:
        self.config, self.ops = config, ops

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        if plan.smoothings:
            return 0
        self._watching = set(plan.observer_nodes(module.graph))
        readers = count_readers(module)
        for first, linears in list(self._sites(module, plan)):
            weights, biases = zip(*(self._parameters(node) for node in (first, *linears)), strict=True)
            dims = [1 if self.ops.op_of(first) is LAYER_NORM else 2, *[2] * len(linears)]
            changed = [*weights, *filter(None, biases)]
            if all(_may_change(node, module, readers) for node in changed) and dims == _dims(weights, module):
                self._insert(first, linears, (weights[0], biases[0], *weights[1:]), module, plan)
        return len(plan.smoothings)

    def _sites(self, module: QuantModule, plan: QuantPlan) -> Iterator[tuple[Node, list[Node]]]:
        """Layers whose output channels can be divided, each with the linears that read these."""
        for node in module.graph.nodes:
            read = self._first_read(node)
            fact = plan.facts.get(node.name)
            if read is None or fact is None or not fact.is_float32 or not fact.shape:
                continue
            linears = self._readers(read, plan)
            if linears:
                yield node, linears

    def _first_read(self, node: Node) -> Node | None:
        """The node whose readers read a layer's channels: a LayerNorm itself, or the context of the attention that
        gets the values that a linear projects.
        """
        if self.ops.op_of(node) is LAYER_NORM:
            return node
        attention = self._only_reader(node) if self.ops.op_of(node) is LINEAR else None
        if attention is None or attention.target is not multihead_attention:
            return None
        given = attention.args[_VALUE]
        if attention.args.count(given) > 1 or given not in (node, *node.users):
            return None
        contexts = [user for user in attention.users if user.args[1] == 0]  # the other part is the weights
        return contexts[0] if len(contexts) == 1 else None

    def _only_reader(self, node: Node) -> Node | None:
        found = list(self._users(node))
        return found[0] if len(found) == 1 else None

    def _users(self, node: Node) -> Iterator[Node]:
        """Who reads a node, through observers, which are no readers."""
        for user in node.users:
            if user.name in self._watching:
                yield from self._users(user)
            else:
                yield user

    def _readers(self, node: Node, plan: QuantPlan) -> list[Node] | None:
        """The linears that read the channels of ``node``; ``None`` if anything else does."""
        found: list[Node] = []
        for user in self._users(node):
            op = self.ops.op_of(user)
            if op is LINEAR and self._source(user.args[0]) is node:
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

    def _source(self, value: object) -> object:
        """What an argument is, behind observers."""
        while isinstance(value, Node) and value.name in self._watching:
            value = value.args[0]
        return value

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

    def _parameters(self, layer: Node) -> tuple[object, object]:
        """Weight and bias of a layer: ``get_attr`` nodes, anything else where they are not constant."""
        op = self.ops.op_of(layer)
        assert op is not None
        return self._source(op.get(layer, "weight")), self._source(op.get(layer, "bias"))

    def _insert(
        self, first: Node, linears: list[Node], parameters: tuple[Any, ...], module: QuantModule, plan: QuantPlan
    ) -> None:
        path = free_path(module, f"{first.name}_smoothing")
        module.add_submodule(path, Smoothing())
        with module.graph.inserting_after(first):
            call = module.graph.create_node("call_module", path, name=f"{first.name}_smoothing")
        for node in filter(None, parameters):
            _detach(str(node.target), module)
        with module.graph.inserting_before(call):  # reads of its own: those of the layers come later
            own = [None if node is None else module.graph.get_attr(str(node.target)) for node in parameters]
        first.replace_all_uses_with(call, delete_user_cb=partial(operator.is_not, call))
        call.args = (first, *own)
        plan.smoothings[first.name] = PendingSmoothing(path, tuple(linear.name for linear in linears))


def _may_change(node: object, module: QuantModule, readers: Counter[int]) -> bool:
    """Whether a weight or bias is constant, has memory, and is read by nobody else."""
    tensor = constant(node, module)
    if tensor is None or isinstance(tensor, ScaledWeight):
        return False
    assert isinstance(node, Node)
    return not is_shared(node, module, readers)


def _detach(path: str, module: QuantModule) -> None:
    """Let a parameter be an object of its own, on the same memory: code around its region may read it, too."""
    tensor = get_attribute(module, path)
    made = tensor.detach()
    set_tensor(module, path, nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made)


def _dims(weights: tuple[Any, ...], module: QuantModule) -> list[int]:
    return [get_attribute(module, str(weight.target)).dim() for weight in weights]


def _is_other_axis(dim: object, rank: int) -> bool:
    """Whether a number names another axis than the last."""
    return type(dim) is int and dim not in (-1, rank - 1)
