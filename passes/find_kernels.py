"""Find what of a reference graph becomes an int8 kernel.

For each quantize node: the chain of ops that ends in it, whose inputs are all dequantized integers and which a row
of the backend describes; or an op that only moves integers about and keeps their qparams. What does not become a
kernel has a reason.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from fxq.graph_module import QuantModule, get_attribute
from fxq.matcher import Match, best_match
from fxq.op_table import Backend, Fixed, IntWeight, OpRow, Out, OutQuant, Weights
from fxq.ops import Dictionary
from fxq.plan import (
    NO_KERNEL,
    OPTIONS,
    WEIGHT_AFFINE,
    Decision,
    QuantPlan,
    Reason,
    Status,
)
from fxq.qdq import DEQUANTIZE_CHANNEL, is_dequantize, is_quantize
from fxq.spec import QParams

WEIGHT_CHANNEL = Reason("weight-scheme", "the backend's kernel takes per-tensor weights only")
MADE_FOR_OTHER = Reason("other-backend", "quantized for another backend, which fuses it with other ops than this one")
FIXED_OUTPUT = Reason("fixed-output", "its int8 kernel dictates a scale and zero_point other than the ones asked for")
READ_AS_FLOAT = Reason("read-as-float", "moves values about that only float ops read")
_LONGEST_CHAIN = 4  # nodes in one kernel: conv, add, relu, and one to spare


def output_quant(quantize: Node) -> OutQuant:
    """The output of a quantize node in uint8 terms: signed integers are shifted by 128."""
    _, scale, zero_point, quant_min, quant_max, dtype = quantize.args
    shift = 128 if dtype == torch.int8 else 0
    return OutQuant(scale, zero_point + shift, quant_min + shift, quant_max + shift)  # type: ignore


def int_weight(reference: QuantModule, dq: Node) -> IntWeight:
    """The weight behind a dequantize node of the reference graph."""
    values = get_attribute(reference, str(dq.args[0].target))  # type: ignore[union-attr]
    if dq.target is DEQUANTIZE_CHANNEL:
        scale, zero_point = (get_attribute(reference, str(a.target)) for a in dq.args[1:3])  # type: ignore
        return IntWeight(values, QParams(scale, zero_point), dq.args[3])  # type: ignore[arg-type]
    scale, zero_point = dq.args[1:3]
    pair = QParams(torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32))
    return IntWeight(values, pair, None)


class KernelFinder:
    """The kernels of a reference graph on a backend.

    Attributes:
        matches: the row and nodes that end in each quantize node.
        sharing: ops that run on integers and keep their qparams.
        refusals: why a node cannot be a kernel, by its name.
    """

    def __init__(self, reference: QuantModule, backend: Backend) -> None:
        self.reference, self.backend = reference, backend
        self.plan: QuantPlan = reference.plan
        self.ops: Dictionary = backend.dictionary
        self.matches: dict[Node, Match] = {}
        self.sharing: set[Node] = set()
        self.refusals: dict[str, Reason] = {}
        for node in reference.graph.nodes:
            if is_quantize(node):
                self._find(node)

    @property
    def covered(self) -> set[Node]:
        """Every node that a kernel stands for."""
        return self.sharing | {node for match in self.matches.values() for node in match.nodes}

    def _find(self, quantize: Node) -> None:
        end = quantize.args[0]
        assert isinstance(end, Node)
        if self._shares(end, quantize) or end.op in ("placeholder", "get_attr"):
            return
        for candidate in reversed(self._chain(end)):
            found = self.best_match(candidate)
            if isinstance(found, Reason):
                self.refusals[candidate.name] = found
            elif found.end is end and self._runs_on_integers(found) and self._reaches(found, quantize):
                self.matches[quantize] = found
                return

    def best_match(self, node: Node) -> Match | Reason:
        """The row for a node; what was decided to stay float, by the user or for accuracy, does stay float."""
        stays = self._stays_float(node)
        return stays or best_match(
            self.backend, node, self.ops, self.plan.facts, lambda tail: self._stays_float(tail) is None,
            lambda row: self._weight_refusal(row, node),
        )  # fmt: skip

    def _stays_float(self, node: Node) -> Reason | None:
        decision = self.plan.decisions.get(node.name)
        reason = None if decision is None else decision.reason
        # Another backend may have the kernel that was missing.
        return None if reason is None or reason.code in (NO_KERNEL.code, OPTIONS.code) else reason

    def _chain(self, end: Node) -> list[Node]:
        """``end`` and the ops before it, as far as each has one operand that is no integer: last one first."""
        chain: list[Node] = []
        node = end
        while (op := self.ops.op_of(node)) is not None and len(chain) < _LONGEST_CHAIN:
            chain.append(node)
            floats = [producer for _, producer in op.tensor_arguments(node) if not self._is_int(producer)]
            if len(floats) != 1:
                break
            node = floats[0]
        return chain

    def _runs_on_integers(self, match: Match) -> bool:
        for node in match.nodes:
            op = self.ops.op_of(node)
            assert op is not None
            if any(p not in match.nodes and not self._is_int(p) for _, p in op.tensor_arguments(node)):
                return False
        op = match.row.op
        return op.weight is None or is_dequantize(op.get(match.root, op.weight))

    def _reaches(self, match: Match, quantize: Node) -> bool:
        """Whether the kernel can give the output the qparams asked for."""
        fixed, out = match.row.out, output_quant(quantize)
        if not isinstance(fixed, Fixed) or (out.saturates and out.pair == (fixed.scale, fixed.zero_point)):
            return True
        self.refusals[match.root.name] = FIXED_OUTPUT
        return False

    def _weight_refusal(self, row: OpRow, root: Node) -> Reason | None:
        """Why a row's kernel does not take the weight of its root."""
        node = None if row.op.weight is None else row.op.get(root, row.op.weight)
        if node is None or not is_dequantize(node):
            return None
        weight = int_weight(self.reference, node)
        if weight.ch_axis is not None and not row.weight & Weights.CHANNEL:
            return WEIGHT_CHANNEL
        if weight.qparams.zero_point.any() and not row.weight & Weights.AFFINE:
            return WEIGHT_AFFINE
        return None

    def _is_int(self, node: Node) -> bool:
        return is_dequantize(node) or node in self.sharing

    def _shares(self, node: Node, quantize: Node) -> bool:
        """Whether ``node`` runs on integers and its output has the qparams of its inputs."""
        op = self.ops.op_of(node)
        if op is None or is_dequantize(node):
            return False
        found = self.best_match(node)
        if isinstance(found, Reason):
            self.refusals[node.name] = found
            return False
        if found.row.out is not Out.SHARE:
            return False
        out = output_quant(quantize)
        for _, producer in op.tensor_arguments(node):
            if producer in self.sharing:
                continue
            if is_dequantize(producer):
                source = producer.args[0]
                same = is_quantize(source) and output_quant(source).pair == out.pair  # type: ignore
                if not same and not found.row.mixed_inputs:
                    return False
            elif producer.name not in self.plan.containers or not self._shares(producer, quantize):
                return False
        self.sharing.add(node)
        self.matches[quantize] = found
        return True

    def why_float(self, node: Node) -> Reason:
        """Why a node that was to be int8 is not."""
        decision: Decision | None = self.plan.decisions.get(node.name)
        if node.name in self.refusals:
            return self.refusals[node.name]
        if decision is not None and decision.status is Status.SHARED:
            return READ_AS_FLOAT
        return MADE_FOR_OTHER if self.plan.backend != self.backend.name else NO_KERNEL
