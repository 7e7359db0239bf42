"""Translate a reference graph into one of packed int8 kernels.

Two walks over the reference graph. The first finds what becomes a kernel: for each quantize node, the chain
that ends in it and whose inputs are all dequantized integers. The second builds a new graph, in which such a
chain is one kernel, a quantize of a float tensor and a dequantize for a float reader are the only conversions
left, and everything else is copied.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from fxq.engine import packing, require_engine
from fxq.graph_module import QuantModule, get_attribute, set_tensor
from fxq.matcher import Match, best_match, other_operand
from fxq.numerics import dequantize
from fxq.op_table import Backend, Fixed, IntWeight, Out, OutQuant, Weights
from fxq.ops import Dictionary
from fxq.plan import (
    NO_KERNEL,
    OPTIONS,
    Decision,
    Kernel,
    QuantPlan,
    Reason,
    Stage,
    Status,
    float_decision,
)
from fxq.qdq import DEQUANTIZE_CHANNEL, is_dequantize, is_quantize
from fxq.spec import QParams

WEIGHT_CHANNEL = Reason("weight-scheme", "the backend's kernel takes per-tensor weights only")
WEIGHT_AFFINE = Reason("weight-scheme", "the backend's kernel takes symmetric weights only")
MADE_FOR_OTHER = Reason("other-backend", "quantized for another backend, which fuses it with other ops than this one")
FIXED_OUTPUT = Reason("fixed-output", "its int8 kernel dictates a scale and zero_point other than the ones asked for")
READ_AS_FLOAT = Reason("read-as-float", "moves values about that only float ops read")
_LONGEST_CHAIN = 4  # nodes in one kernel: conv, add, relu, and one to spare
_SHAPE_METHODS = frozenset({"size", "dim", "numel", "nelement", "ndimension"})
_SHAPE_ATTRIBUTES = frozenset({"shape", "ndim"})


def lower(reference: QuantModule, backend: Backend) -> QuantModule:
    """A new module that runs ``reference`` with the packed kernels of ``backend``.

    Args:
        reference: a reference graph with its plan; unchanged.
        backend: its engine must be in this torch.

    Raises:
        BackendError: if this torch lacks the backend's engine.
    """
    require_engine(backend.engine)
    with warnings.catch_warnings():
        # torch announces the removal of its quantized dtypes once a process; a user of fxq need not act on it.
        warnings.filterwarnings("ignore", message=".*deprecated.*")
        return Lowering(reference, backend).run()


def output_quant(quantize: Node) -> OutQuant:
    """The output of a quantize node in uint8 terms: signed integers are shifted by 128."""
    _, scale, zero_point, quant_min, quant_max, dtype = quantize.args
    shift = 128 if dtype == torch.int8 else 0
    return OutQuant(scale, zero_point + shift, quant_min + shift, quant_max + shift)  # type: ignore


@dataclass
class Lowering:
    """One lowering; afterwards ``ints`` tells which lowered node holds the integers of each quantize node."""

    reference: QuantModule
    backend: Backend

    def __post_init__(self) -> None:
        self.ops: Dictionary = self.backend.dictionary
        self.old: QuantPlan = self.reference.plan
        self.graph = fx.Graph()
        self.module = QuantModule(torch.nn.Module(), fx.Graph())
        self.plan = QuantPlan(self.backend.name, Stage.LOWERED, {"canonical", "facts", "annotated"})
        self.regions = {region.nodes[0]: region for region in self.old.regions}
        self.matches: dict[Node, Match] = {}  # by quantize node
        self.sharing: set[Node] = set()  # ops that run on integers and keep their qparams
        self.refusals: dict[str, Reason] = {}
        self.floats: dict[Node, Any] = {}
        self.ints: dict[Node, Node] = {}
        self.qparams: dict[Node, tuple[float, int]] = {}
        self.overwritten: list[tuple[Node, Node]] = []  # kernels and the operands they write over

    def run(self) -> QuantModule:
        for node in self.reference.graph.nodes:
            if is_quantize(node):
                self._find(node)
        covered = self.sharing | {node for match in self.matches.values() for node in match.nodes}
        for node in self.reference.graph.nodes:
            if is_quantize(node):
                self._quantized(node)
            elif not (node in covered or is_dequantize(node) or node.op == "get_attr"):
                self.float_value(node)
        return self._finish()

    # -- first walk: what becomes a kernel

    def _find(self, quantize: Node) -> None:
        end = quantize.args[0]
        assert isinstance(end, Node)
        if self._shares(end, quantize) or end.op in ("placeholder", "get_attr"):
            return
        for candidate in reversed(self._chain(end)):
            found = self._best_match(candidate)
            if isinstance(found, Reason):
                self.refusals[candidate.name] = found
            elif found.end is end and self._runs_on_integers(found) and self._reaches(found, quantize):
                self.matches[quantize] = found
                return

    def _best_match(self, node: Node) -> Match | Reason:
        """The row for a node; what was decided to stay float, by the user or for accuracy, does stay float."""
        stays = self._stays_float(node)
        return stays or best_match(
            self.backend, node, self.ops, self.old.facts, lambda tail: self._stays_float(tail) is None
        )

    def _stays_float(self, node: Node) -> Reason | None:
        decision = self.old.decisions.get(node.name)
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
        if op.weight is None:
            return True
        weight = op.get(match.root, op.weight)
        if not is_dequantize(weight):
            return False
        refusal = self._weight_refusal(match.row.weight, self.int_weight(weight))
        if refusal is not None:
            self.refusals[match.root.name] = refusal
        return refusal is None

    def _reaches(self, match: Match, quantize: Node) -> bool:
        """Whether the kernel can give the output the qparams asked for."""
        fixed, out = match.row.out, output_quant(quantize)
        if not isinstance(fixed, Fixed) or (saturates(out) and _pair(out) == (fixed.scale, fixed.zero_point)):
            return True
        self.refusals[match.root.name] = FIXED_OUTPUT
        return False

    @staticmethod
    def _weight_refusal(supported: Weights, weight: IntWeight) -> Reason | None:
        if weight.ch_axis is not None and not supported & Weights.CHANNEL:
            return WEIGHT_CHANNEL
        if weight.qparams.zero_point.any() and not supported & Weights.AFFINE:
            return WEIGHT_AFFINE
        return None

    def _is_int(self, node: Node) -> bool:
        return is_dequantize(node) or node in self.sharing

    def _shares(self, node: Node, quantize: Node) -> bool:
        """Whether ``node`` runs on integers and its output has the qparams of its inputs."""
        op = self.ops.op_of(node)
        if op is None or is_dequantize(node):
            return False
        found = self._best_match(node)
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
                same = is_quantize(source) and self._same_qparams(output_quant(source), out)  # type: ignore
                if not same and not found.row.mixed_inputs:
                    return False
            elif producer.name not in self.old.containers or not self._shares(producer, quantize):
                return False
        self.sharing.add(node)
        self.matches[quantize] = found
        return True

    @staticmethod
    def _same_qparams(a: OutQuant, b: OutQuant) -> bool:
        return (a.scale, a.zero_point) == (b.scale, b.zero_point)

    # -- second walk: the new graph

    def _quantized(self, quantize: Node) -> None:
        match = self.matches.get(quantize)
        out = output_quant(quantize)
        if match is None:
            self.ints[quantize] = self._entry(quantize, out)
        else:
            self.ints[quantize] = self.emit(match, out)
        self.qparams[self.ints[quantize]] = (out.scale, out.zero_point)

    def emit(self, match: Match, out: OutQuant) -> Node:
        """The kernel of a match; containers (chunk, split) on the way to it are emitted first."""
        if match.root in self.ints:
            return self.ints[match.root]
        emission = _Emission(self, match, out)
        end = match.row.emit(emission)
        self.overwritten += [(end, operand) for operand in emission.overwritten]
        for node in emission.calls:
            self._record(node, match, match.row.emit.kernel, out, emission.engine)
        self.ints[match.root] = node = self._clamped(end, out) if emission.needs_clamp else end
        return node

    def _clamped(self, node: Node, out: OutQuant) -> Node:
        """Int8 values, clamped where the kernel's own saturation is wider than the quantize node's range."""
        made = self.call(f"{node.name}_clamp", torch.clamp, (node, *real_bounds(out)))
        self._describe_like(node, made, "aten::clamp")
        return made

    def int_value(self, node: Node, out: OutQuant) -> Node:
        """The int8 node that carries a value of the reference graph."""
        if is_dequantize(node):
            return self.ints[node.args[0]]  # type: ignore[index]
        found = self._best_match(node)
        assert isinstance(found, Match)
        return self.emit(found, out)

    def _entry(self, quantize: Node, out: OutQuant) -> Node:
        """Quantize a float tensor: once and for all if it is a constant."""
        source = quantize.args[0]
        assert isinstance(source, Node)
        if source.op == "get_attr":
            value = get_attribute(self.reference, str(source.target)).detach()
            value = torch.quantize_per_tensor(value, out.scale, out.zero_point, torch.quint8)
            return self.constant(f"{source.name}_int8", value)
        args = (self.float_value(source), out.scale, out.zero_point, torch.quint8)
        node = self.call(f"{source.name}_quantize", torch.quantize_per_tensor, args)
        kernel = Kernel("quantize_per_tensor", *_pair(out))
        self._describe(node, source.name, Decision(Status.QUANTIZED, "quantize"), kernel)
        return node if saturates(out) else self._clamped(node, out)

    def float_value(self, node: Node) -> Any:
        """The float node that carries a value of the reference graph, made when first needed."""
        if node in self.floats:
            return self.floats[node]
        if is_dequantize(node):
            made = self._dequantize(node)
        elif node.op == "get_attr":
            path = str(node.target)
            made = self.constant(node.name, get_attribute(self.reference, path), path)
        else:
            argument = self._shape_source if reads_shape(node) else self.float_value
            made = self.graph.node_copy(node, argument)
            self._copy_record(node, made)
        self.floats[node] = made
        return made

    def _shape_source(self, node: Node) -> Any:
        """Sizes can be read from integers, so that no dequantize is kept just for them."""
        is_activation = is_dequantize(node) and is_quantize(node.args[0])  # type: ignore[arg-type]
        return self.ints[node.args[0]] if is_activation else self.float_value(node)  # type: ignore[index]

    def _dequantize(self, node: Node) -> Node:
        source = node.args[0]
        assert isinstance(source, Node)
        if not is_quantize(source):
            weight = self.int_weight(node)
            return self.constant(f"{source.name}_float", dequantize(weight.values, weight.qparams, weight.ch_axis))
        made = self.call(f"{source.args[0].name}_dequantize", torch.Tensor.dequantize, (self.ints[source],))  # type: ignore
        scale, zero_point = self.qparams[self.ints[source]]
        kernel = Kernel("dequantize", scale, zero_point)
        self._describe(made, source.args[0].name, Decision(Status.QUANTIZED, "dequantize"), kernel)  # type: ignore
        return made

    def int_weight(self, dq: Node) -> IntWeight:
        """The weight behind a dequantize node of the reference graph."""
        values = get_attribute(self.reference, str(dq.args[0].target))  # type: ignore[union-attr]
        if dq.target is DEQUANTIZE_CHANNEL:
            scale, zero_point = (get_attribute(self.reference, str(a.target)) for a in dq.args[1:3])  # type: ignore
            return IntWeight(values, QParams(scale, zero_point), dq.args[3])  # type: ignore[arg-type]
        scale, zero_point = dq.args[1:3]
        pair = QParams(torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32))
        return IntWeight(values, pair, None)

    # -- nodes of the new graph and what the plan says of them

    def call(self, name: str, target: Callable[..., Any], args: tuple[Any, ...], kwargs: Any = None) -> Node:
        return self.graph.create_node("call_function", target, args, kwargs or {}, name=name)

    def constant(self, name: str, value: Any, path: str | None = None) -> Node:
        node = self.graph.create_node("get_attr", path or name, name=name)
        if isinstance(value, torch.Tensor) and path is not None:
            set_tensor(self.module, path, value)
        elif isinstance(value, torch.Tensor):
            node.target = node.name
            self.module.register_buffer(node.name, value)
        else:
            node.target = node.name
            setattr(self.module, node.name, value)
        return node

    def _record(self, node: Node, match: Match, kernel: str, out: OutQuant, engine: str | None) -> None:
        status = Status.SHARED if match.row.out is Out.SHARE else Status.QUANTIZED
        region = self.regions.get(match.root.name)
        tail = (*(n.name for n in match.nodes[1:]), *(region.absorbed if region else ()))
        fused = tuple(self.old.origin(name).kind.rpartition(".")[2] for name in tail)
        name = f"{kernel} [{engine}]" if engine else kernel
        self._describe(node, match.root.name, Decision(status, match.row.name), Kernel(name, *_pair(out), fused))
        if match.end.name in self.old.facts:
            self.plan.facts[node.name] = self.old.facts[match.end.name]

    def _describe(self, node: Node, source: str, decision: Decision, kernel: Kernel) -> None:
        self.plan.decisions[node.name] = decision
        self.plan.kernels[node.name] = kernel
        self.plan.origins[node.name] = self.old.origin(source)
        if source in self.old.facts:
            self.plan.facts[node.name] = self.old.facts[source]
        if source in self.old.macs and decision.row not in ("quantize", "dequantize"):
            self.plan.macs[node.name] = self.old.macs[source]

    def _describe_like(self, node: Node, made: Node, kernel: str) -> None:
        """Record a node that holds the values of ``node`` again; constants have no kernel of their own."""
        like = self.plan.kernels.get(node.name)
        self.plan.decisions[made.name] = self.plan.decisions.get(node.name, Decision(Status.QUANTIZED))
        self.plan.kernels[made.name] = Kernel(kernel, *((like.scale, like.zero_point) if like else ()))
        self.plan.origins[made.name] = self.plan.origin(node.name)
        if node.name in self.plan.facts:
            self.plan.facts[made.name] = self.plan.facts[node.name]

    def _copy_record(self, old: Node, new: Node) -> None:
        if old.name in self.old.facts:
            self.plan.facts[new.name] = self.old.facts[old.name]
        if old.name in self.old.macs:
            self.plan.macs[new.name] = self.old.macs[old.name]
        self.plan.origins[new.name] = self.old.origin(old.name)
        if new.op.startswith("call_"):
            decision = self.old.decisions.get(old.name)
            if decision is None or (decision.reason is None and decision.status is not Status.SHAPE_ONLY):
                decision = float_decision(self.refusals.get(old.name) or self._why_float(decision))
            self.plan.decisions[new.name] = decision

    def _why_float(self, decision: Decision | None) -> Reason:
        """Why a node that was to be int8 is not, where no row refused it."""
        if decision is not None and decision.status is Status.SHARED:
            return READ_AS_FLOAT
        return MADE_FOR_OTHER if self.old.backend != self.backend.name else NO_KERNEL

    def _protect(self, kernel: Node, operand: Node) -> None:
        """Give a kernel that writes over its operand a copy of it, unless nobody else reads that memory later."""
        order = {node: position for position, node in enumerate(self.graph.nodes)}
        others = [user for user in operand.users if user is not kernel]
        if (
            operand.op == "call_function"
            and list(kernel.args).count(operand) == 1
            and all(order[user] < order[kernel] for user in others)
            and not any(self._may_be_view(node) for node in (operand, *others))
        ):
            return
        with self.graph.inserting_before(kernel):
            copy = self.graph.create_node("call_function", torch.clone, (operand,), name=f"{operand.name}_copy")
        # of equal arguments the last one is the one written over: a conv's input comes first
        kernel.update_arg(max(at for at, argument in enumerate(kernel.args) if argument is operand), copy)
        self._describe_like(operand, copy, "aten::clone")

    def _may_be_view(self, node: Node) -> bool:
        decision = self.plan.decisions.get(node.name)
        return decision is not None and decision.status is Status.SHARED

    def _finish(self) -> QuantModule:
        for node in self.reference.graph.nodes:
            if node.op == "call_module":
                leaf = self.reference.get_submodule(str(node.target))
                self.module.add_submodule(str(node.target), leaf)
        for kernel, operand in self.overwritten:
            self._protect(kernel, operand)
        lowered = QuantModule(self.module, self.graph, type(self.reference).__name__)
        self.plan.fusions = list(self.old.fusions)
        self.plan.notes = list(self.old.notes)
        self.plan.model, self.plan.weight_bytes = self.old.model, self.old.weight_bytes
        self.plan.attributes = dict(self.old.attributes)
        self.plan.containers = set(self.old.containers)
        lowered.meta["fxq"] = self.plan
        lowered.graph.lint()
        self.plan.check(lowered.graph)
        return lowered


class _Emission:
    """See :class:`fxq.op_table.Emission`."""

    def __init__(self, lowering: Lowering, match: Match, out: OutQuant) -> None:
        self.lowering, self.match = lowering, match
        self.nodes, self.out = match.nodes, out
        self.engine: str | None = None
        self.calls: list[Node] = []
        self.overwritten: list[Node] = []
        ends_at_zero = (out.quant_min, out.quant_max) == (out.zero_point, 255)
        self.relu = not saturates(out) and match.row.relu_kernel and ends_at_zero
        # ops that share their input's qparams were given integers inside the range and return no others
        self.needs_clamp = not (saturates(out) or self.relu or match.row.out is Out.SHARE)

    @property
    def _op(self) -> Any:
        return self.match.row.op

    def get(self, parameter: str) -> Any:
        value = self._op.get(self.match.root, parameter)
        return fx.map_arg(value, self.lowering.float_value)

    def input(self, parameter: str) -> Any:
        return fx.map_arg(
            self._op.get(self.match.root, parameter), lambda node: self.lowering.int_value(node, self.out)
        )

    def tail_input(self, position: int) -> Node:
        _, producer = other_operand(self.nodes, position, self.lowering.ops)
        return self.lowering.int_value(producer, self.out)

    def weight(self) -> IntWeight:
        return self.lowering.int_weight(self._op.get(self.match.root, self._op.weight))

    def tensor(self, parameter: str) -> torch.Tensor | None:
        node = self._op.get(self.match.root, parameter)
        return None if node is None else get_attribute(self.lowering.reference, str(node.target)).detach()

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        self.calls.append(self.lowering.call(self.match.root.name, target, args, kwargs))
        return self.calls[-1]

    def constant(self, suffix: str, value: Any) -> Node:
        return self.lowering.constant(f"{self.match.root.name}_{suffix}", value)

    def overwrites(self, operand: Node) -> None:
        self.overwritten.append(operand)

    def pack(self, function: Callable[..., Any], *args: Any, engine: str | None = None) -> Any:
        self.engine = engine or self.lowering.backend.engine
        with packing(self.engine):
            return function(*args)


def reads_shape(node: Node) -> bool:
    """Whether a node only reads the sizes of its input."""
    if node.op == "call_method":
        return node.target in _SHAPE_METHODS
    return node.op == "call_function" and node.target is getattr and node.args[1] in _SHAPE_ATTRIBUTES


def saturates(out: OutQuant) -> bool:
    """Whether a kernel's own saturation to uint8 is all the clamping an output needs."""
    return (out.quant_min, out.quant_max) == (0, 255)


def real_bounds(out: OutQuant) -> tuple[float, float]:
    """The real values of the smallest and largest integer of an output."""
    return (out.quant_min - out.zero_point) * out.scale, (out.quant_max - out.zero_point) * out.scale


def _pair(out: OutQuant) -> tuple[float, int]:
    return out.scale, out.zero_point
