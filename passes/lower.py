"""Translate a reference graph into one of packed int8 kernels.

:mod:`fxq.passes.find_kernels` says which chains of nodes become kernels. Here a new graph is built, in which each
such chain is one kernel, a quantize of a float tensor and a dequantize for a float reader are the only conversions
left, and everything else is copied.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from fxq.aliases import reads_shape
from fxq.engine import require_engine
from fxq.graph_module import BACKEND, ENGINES, REFERENCE, STANDS_FOR, QuantModule, get_attribute, set_tensor
from fxq.int_views import as_quantized, as_uint8
from fxq.matcher import Match
from fxq.numerics import dequantize
from fxq.op_table import Backend, Out, OutQuant
from fxq.ops import Dictionary
from fxq.passes.emission import KernelEmission
from fxq.passes.find_kernels import KernelFinder, int_weight, output_quant
from fxq.passes.layouts import permuted_values, reads_layout
from fxq.plan import Decision, Kernel, QuantPlan, Stage, Status, float_decision
from fxq.qdq import is_dequantize, is_quantize


def lower(reference: QuantModule, backend: Backend, engines: Mapping[str, str] | None = None) -> QuantModule:
    """A new module that runs ``reference`` with the packed kernels of ``backend``.

    Args:
        reference: a reference graph with its plan; unchanged.
        backend: its engine must be in this torch.
        engines: by name of the kernel's first node, an engine to run it if the kernel's row says that it may.

    Raises:
        BackendError: if this torch lacks the backend's engine.
    """
    require_engine(backend.engine)
    return Lowering(reference, backend, engines or {}).run()


@dataclass
class Lowering:
    """One lowering; afterwards ``ints`` tells which lowered node holds the integers of each quantize node."""

    reference: QuantModule
    backend: Backend
    engines: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ops: Dictionary = self.backend.dictionary
        self.old: QuantPlan = self.reference.plan
        self.graph = fx.Graph()
        self.module = QuantModule(torch.nn.Module(), fx.Graph())
        self.plan = QuantPlan(self.backend.name, Stage.LOWERED, {"canonical", "facts", "annotated"})
        self.regions = {region.nodes[0]: region for region in self.old.regions}
        self.finder = KernelFinder(self.reference, self.backend)
        self.permuted = permuted_values(self.reference, self.finder.covered, self.ops)
        self.floats: dict[Node, Any] = {}
        self.ordered: dict[Node, Any] = {}  # the same in the order of their dimensions, for code that fxq does not know
        self.ints: dict[Node, Node] = {}
        self.qparams: dict[Node, tuple[float, int]] = {}
        self.plain: dict[Node, Node | None] = {}  # nodes of plain uint8 tensors, each with its quint8 view if made
        self.copies: dict[Node, Node] = {}  # quint8 nodes and their integers as a plain tensor
        self.overwritten: list[tuple[Node, Node]] = []  # kernels and the operands they write over

    def run(self) -> QuantModule:
        with warnings.catch_warnings():
            # torch announces the removal of its quantized dtypes once a process; a user of fxq need not act on it.
            warnings.filterwarnings("ignore", message=".*deprecated.*")
            self._build()
            return self._finish()

    def _build(self) -> None:
        covered = self.finder.covered
        for node in self.reference.graph.nodes:
            if is_quantize(node):
                self._quantized(node)
            elif not (node in covered or is_dequantize(node) or node.op == "get_attr"):
                self.float_value(node)

    def _quantized(self, quantize: Node) -> None:
        match = self.finder.matches.get(quantize)
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
        emission = KernelEmission(self, match, out)
        end = match.row.emit(emission)
        self.qparams[end] = out.pair
        self.overwritten += [(end, operand) for operand in emission.overwritten]
        for node in emission.calls:
            self._record(node, match, match.row.emit.kernel, out, emission.engine)
        self.ints[match.root] = node = self._clamped(self.quantized(end), out) if emission.needs_clamp else end
        return node

    def quantized(self, node: Node) -> Node:
        """An int8 node as a quint8 tensor."""
        if node not in self.plain:
            return node
        made = self.plain[node]
        if made is None:
            made = self.plain[node] = self.call(f"{node.name}_quint8", as_quantized, (node, *self.qparams[node]))
            self._describe_like(node, made, "view", Status.SHARED)
        return made

    def uint8(self, node: Node) -> Node:
        """An int8 node as a plain uint8 tensor."""
        if node in self.plain:
            return node
        if node not in self.copies:
            self.copies[node] = made = self.call(f"{node.name}_uint8", as_uint8, (node,))
            self._describe_like(node, made, "aten::int_repr", Status.SHARED)
        return self.copies[node]

    def _clamped(self, node: Node, out: OutQuant) -> Node:
        """Int8 values, clamped where the kernel's own saturation is wider than the quantize node's range."""
        made = self.call(f"{node.name}_clamp", torch.clamp, (node, *out.real_bounds))
        self._describe_like(node, made, "aten::clamp")
        return made

    def int_value(self, node: Node, out: OutQuant) -> Node:
        """The int8 node that carries a value of the reference graph."""
        if is_dequantize(node):
            return self.ints[node.args[0]]  # type: ignore[index]
        found = self.finder.best_match(node)
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
        kernel = Kernel("quantize_per_tensor", *out.pair)
        self._describe(node, source.name, Decision(Status.QUANTIZED, "quantize"), kernel)
        return node if out.saturates else self._clamped(node, out)

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
            made = self.graph.node_copy(node, self._source_for(node))
            self._copy_record(node, made)
        self.floats[node] = made
        return made

    def _source_for(self, node: Node) -> Callable[[Node], Any]:
        if reads_shape(node):
            return self._shape_source
        return self._ordered if reads_layout(node) else self.float_value

    def _ordered(self, node: Node) -> Any:
        """The float node that carries a value, in the order of its dimensions."""
        if node not in self.permuted or node.name not in self.old.facts:
            return self.float_value(node)
        if node not in self.ordered:
            made = self._dequantize(node, ordered=True) if is_dequantize(node) else self._contiguous(node)
            self.ordered[node] = made
        return self.ordered[node]

    def _contiguous(self, node: Node) -> Node:
        made = self.call(f"{node.name}_contiguous", torch.Tensor.contiguous, (self.float_value(node),))
        self._describe(made, node.name, Decision(Status.SHAPE_ONLY, "contiguous"), Kernel("aten::contiguous"))
        return made

    def _shape_source(self, node: Node) -> Any:
        """Sizes can be read from integers, so that no dequantize is kept just for them."""
        is_activation = is_dequantize(node) and is_quantize(node.args[0])  # type: ignore[arg-type]
        return self.ints[node.args[0]] if is_activation else self.float_value(node)  # type: ignore[index]

    def _dequantize(self, node: Node, ordered: bool = False) -> Node:
        source = node.args[0]
        assert isinstance(source, Node)
        if not is_quantize(source):
            weight = int_weight(self.reference, node)
            return self.constant(f"{source.name}_float", dequantize(weight.values, weight.qparams, weight.ch_axis))
        quantized = self.quantized(self.ints[source])
        if ordered:  # the integers are a quarter of the memory
            dense = self.call(f"{quantized.name}_contiguous", torch.Tensor.contiguous, (quantized,))
            self._describe_like(self.ints[source], dense, "aten::contiguous", Status.SHARED)
            self.plan.decisions[dense.name] = Decision(Status.SHAPE_ONLY, "contiguous")
            quantized = dense
        made = self.call(f"{source.args[0].name}_dequantize", torch.Tensor.dequantize, (quantized,))  # type: ignore
        scale, zero_point = self.qparams[self.ints[source]]
        kernel = Kernel("dequantize", scale, zero_point)
        self._describe(made, source.args[0].name, Decision(Status.QUANTIZED, "dequantize"), kernel)  # type: ignore
        return made

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
        self._describe(node, match.root.name, Decision(status, match.row.name), Kernel(name, *out.pair, fused))
        if match.end.name in self.old.facts:
            self.plan.facts[node.name] = self.old.facts[match.end.name]

    def _describe(self, node: Node, source: str, decision: Decision, kernel: Kernel) -> None:
        self.plan.decisions[node.name] = decision
        self.plan.kernels[node.name] = kernel
        self.plan.origins[node.name] = self.old.origin(source)
        if source in self.old.facts:
            self.plan.facts[node.name] = self.old.facts[source]
        if source in self.old.macs and decision.row not in ("quantize", "dequantize", "contiguous"):
            self.plan.macs[node.name] = self.old.macs[source]

    def _describe_like(self, node: Node, made: Node, kernel: str, status: Status = Status.QUANTIZED) -> None:
        """Record a node that holds the values of ``node`` again; constants have no kernel of their own."""
        like = self.plan.kernels.get(node.name)
        decision = self.plan.decisions.get(node.name, Decision(status))
        self.plan.decisions[made.name] = decision if status is Status.QUANTIZED else decision._replace(status=status)
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
                decision = float_decision(self.finder.why_float(old))
            self.plan.decisions[new.name] = decision

    def _protect(self, kernel: Node, operand: Node, order: dict[Node, int]) -> None:
        """Give a kernel that writes over its operand a copy of it, unless nobody else reads that memory later."""
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
        order[copy] = order[kernel]
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
        order = {node: position for position, node in enumerate(self.graph.nodes)}
        for kernel, operand in self.overwritten:
            self._protect(kernel, operand, order)
        lowered = QuantModule(self.module, self.graph, type(self.reference).__name__)
        self.plan.fusions = list(self.old.fusions)
        self.plan.notes = list(self.old.notes)
        self.plan.model, self.plan.weight_bytes = self.old.model, self.old.weight_bytes
        self.plan.attributes = dict(self.old.attributes)
        self.plan.described = dict(self.old.described)
        self.plan.untraceable = dict(self.old.untraceable)
        self.plan.containers = set(self.old.containers)
        lowered.meta["fxq"] = self.plan
        lowered.meta[REFERENCE], lowered.meta[BACKEND] = self.reference, self.backend
        lowered.meta[ENGINES] = dict(self.engines)
        if STANDS_FOR in self.reference.meta:
            lowered.meta[STANDS_FOR] = self.reference.meta[STANDS_FOR]
        lowered.release_unused()
        lowered.graph.lint()
        self.plan.check(lowered.graph)
        return lowered
