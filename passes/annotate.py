"""Decide for every call node what becomes of it, and give each quantized tensor use its QuantSpec.

A decision is made once, here, with its reason; later passes only carry it out (or take a whole region back
to float, again with a reason).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch.fx import Node

from fxq.config import QConfig, ResolvedConfig
from fxq.containers import makes_container
from fxq.graph_module import QuantModule
from fxq.matcher import Match, best_match
from fxq.op_table import Backend, Fixed, OpRow, Out, Weights
from fxq.ops import Dictionary
from fxq.pass_base import Pass
from fxq.plan import (
    ATTENTION,
    DYNAMIC_WEIGHT,
    EXCLUDED,
    NOT_FLOAT32,
    UNBOUNDED,
    UNKNOWN_OP,
    WEIGHT_AFFINE,
    Decision,
    Fusion,
    QuantPlan,
    Reason,
    Region,
    Slot,
    Status,
    float_decision,
)
from fxq.spec import QuantSpec


class Annotate(Pass):
    """Regions, decisions and specs from the backend's rows and the user's configuration."""

    requires = frozenset({"canonical", "facts"})
    ensures = frozenset({"annotated"})

    def __init__(self, backend: Backend, config: ResolvedConfig, ops: Dictionary) -> None:
        self.backend, self.config, self.ops = backend, config, ops

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        claimed: set[str] = {name for region in plan.regions for name in region.nodes}
        before = len(plan.regions)
        for node in module.graph.nodes:
            if node.op.startswith("call_") and node.name not in claimed and node.name not in plan.decisions:
                claimed.update(self._decide(node, plan))
        return len(plan.regions) - before

    def _decide(self, node: Node, plan: QuantPlan) -> tuple[str, ...]:
        """Decide for a node and the chain it starts; returns the names covered."""
        found = self._match(node, plan)
        if isinstance(found, Decision):
            plan.decisions[node.name] = found
            return (node.name,)
        match, qconfig = found
        names = tuple(n.name for n in match.nodes)
        plan.regions.append(Region(match.row.name, names))
        self._set_specs(match, qconfig, plan)
        shares = match.row.out is Out.SHARE
        plan.decisions[node.name] = Decision(Status.SHARED if shares else Status.QUANTIZED, match.row.name)
        for tail in match.nodes[1:]:
            plan.decisions[tail.name] = Decision(Status.QUANTIZED, match.row.name, detail=f"fused into {node.name}")
            self._log_fusion(tail, node, plan)
        return names

    def _match(self, node: Node, plan: QuantPlan) -> tuple[Match, QConfig] | Decision:
        op = self.ops.op_of(node)
        if op is None:
            return _decide_unknown(node, plan)
        inputs = op.tensor_arguments(node)
        if node.name not in plan.facts and node.name not in plan.containers:
            return Decision(Status.SHAPE_ONLY)
        for _, producer in inputs:
            decision = plan.decisions.get(producer.name)
            if producer.name in plan.containers and decision is not None and decision.reason is not None:
                return float_decision(decision.reason, f"part of {producer.name}")
        if not inputs or not all(self._is_float32(producer, plan) for _, producer in inputs):
            return float_decision(NOT_FLOAT32)
        if op.weight is None and plan.unbounded.intersection((node.name, *(producer.name for _, producer in inputs))):
            return float_decision(UNBOUNDED)
        qconfig = self._qconfig(node, plan)
        if qconfig is None:
            return float_decision(EXCLUDED)
        if op.weight is not None and not _is_static(op.get(node, op.weight)):
            return float_decision(DYNAMIC_WEIGHT)

        def joins(tail: Node) -> bool:
            return tail.name not in plan.decisions and self._qconfig(tail, plan) == qconfig

        def takes(row: OpRow) -> Reason | None:
            affine = bool(row.weight) and not qconfig.weight.symmetric
            return WEIGHT_AFFINE if affine and not row.weight & Weights.AFFINE else None

        found = best_match(self.backend, node, self.ops, plan.facts, joins, takes)
        return float_decision(found) if isinstance(found, Reason) else (found, qconfig)

    def _qconfig(self, node: Node, plan: QuantPlan) -> QConfig | None:
        op = self.ops.op_of(node)
        return self.config.lookup(plan.origin(node.name), op.name if op else "")

    def _is_float32(self, node: Node, plan: QuantPlan) -> bool:
        fact = plan.facts.get(node.name)
        if fact is not None:
            return fact.is_float32
        # A tuple of tensors, as chunk and split make it, counts as what it was split from.
        decision = plan.decisions.get(node.name)
        return decision is not None and decision.status is Status.SHARED

    def _set_specs(self, match: Match, qconfig: QConfig, plan: QuantPlan) -> None:
        row = match.row
        activation = qconfig.activation.as_unsigned()
        inside = set(match.nodes)
        for node in match.nodes:
            op = self.ops.op_of(node)
            assert op is not None
            for path, producer in op.tensor_arguments(node):
                if producer not in inside:
                    plan.specs[Slot(node.name, path)] = self._input_spec(producer, row.out, activation, plan)
        op = row.op
        if op.weight is not None:
            path = (op.index(op.weight),)
            plan.specs[Slot(match.root.name, path)] = _weight_spec(qconfig.weight, op.weight_axis, row.weight)
        if match.end.name in plan.facts:  # a tuple has no qparams of its own
            plan.specs[Slot(match.end.name)] = self._output_spec(match, activation, plan)

    def _input_spec(self, producer: Node, out: Out | Fixed, activation: QuantSpec, plan: QuantPlan) -> QuantSpec:
        """Ops that share qparams take their input as its producer made it."""
        source = Slot(producer.name)
        if producer.name in plan.containers:
            source = Slot(producer.name, self.ops.op_of(producer).tensor_arguments(producer)[0][0])  # type: ignore
        own = plan.specs.get(source)
        return own if own is not None and out is Out.SHARE else activation

    def _output_spec(self, match: Match, activation: QuantSpec, plan: QuantPlan) -> QuantSpec:
        if isinstance(match.row.out, Fixed):
            return activation.replace(quant_min=0, quant_max=255, symmetric=False, pow2_scale=False)
        if match.row.out is Out.SHARE:
            path, _ = match.row.op.tensor_arguments(match.root)[0]
            return plan.specs[Slot(match.root.name, path)]
        return activation

    def _log_fusion(self, tail: Node, root: Node, plan: QuantPlan) -> None:
        op = self.ops.op_of(tail)
        what, into = plan.origin(tail.name).module_path, plan.origin(root.name).module_path
        plan.fusions.append(Fusion("fuse", f"{op.name if op else ''} {what}".strip(), into or root.name))


def _is_static(weight: object) -> bool:
    return isinstance(weight, Node) and weight.op == "get_attr"


def _weight_spec(spec: QuantSpec, axis: int, supported: Weights) -> QuantSpec:
    if spec.ch_axis is None or not supported & Weights.CHANNEL:
        return spec.replace(ch_axis=None)
    return spec.replace(ch_axis=axis)


def _decide_unknown(node: Node, plan: QuantPlan) -> Decision:
    if makes_container(node):
        return Decision(Status.SHAPE_ONLY)
    fact = plan.facts.get(node.name)
    reads_float = any(plan.facts[n.name].is_float32 for n in node.all_input_nodes if n.name in plan.facts)
    makes_tensors = fact is not None or node.name in plan.containers
    if makes_tensors and (reads_float or (fact is not None and fact.is_float32)):
        if node.target is F.scaled_dot_product_attention:
            return float_decision(ATTENTION)
        return float_decision(UNKNOWN_OP, plan.origin(node.name).kind)
    return Decision(Status.SHAPE_ONLY)
