"""Let code that may ask how values lie in memory get them as the float model lays them out.

Int8 kernels return images in channels_last, and the dequantize after them does, too. A ``view`` of them would fail: in
the code around a region, in a module or function that a graph calls as it is, in what a user does with the output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import fx
from torch.fx import Node

from fxq import ops
from fxq.aliases import overwrites, reads_shape
from fxq.plan import Decision, QuantPlan, Status

# Rows of matrices, which are in one order anyway, and moves: what they make of the float model's values is in no order
# of its own there, either.
_ORDERED = frozenset(
    op.name
    for op in (
        ops.CHUNK, ops.FLATTEN, ops.GETITEM, ops.LINEAR, ops.MATMUL, ops.PERMUTE, ops.RESHAPE, ops.SPLIT, ops.SQUEEZE,
        ops.TRANSPOSE, ops.UNSQUEEZE,
    )
)  # fmt: skip
_OF_MEMORY: frozenset[Callable[..., object] | str] = frozenset({
    torch.as_strided, torch.view_as_complex, torch.view_as_real, "as_strided", "view",
})  # fmt: skip
_INDIFFERENT = frozenset({"torch", "operator", "_operator", "builtins", "math", "fxq"})


def restore_layouts(module: torch.nn.Module, graph: fx.Graph, plan: QuantPlan, dictionary: ops.Dictionary) -> None:
    """Insert ``contiguous`` where values from int8 kernels reach such code in a lowered graph."""
    loose = _laid_out_by_kernels(graph, plan, dictionary)
    restored: dict[Node, Node] = {}
    for reader in [node for node in graph.nodes if _may_ask(module, node)]:
        for source in [node for node in reader.all_input_nodes if node in loose]:
            if source not in restored:
                restored[source] = _contiguous(source, graph, plan)
            reader.replace_input_with(source, restored[source])


def _laid_out_by_kernels(graph: fx.Graph, plan: QuantPlan, dictionary: ops.Dictionary) -> set[Node]:
    """Float tensors of three or more dimensions that come out of kernels, and what is computed of them elementwise."""
    found: set[Node] = set()
    for node in graph.nodes:
        decision, fact = plan.decisions.get(node.name), plan.facts.get(node.name)
        if decision is None or fact is None or len(fact.shape) < 3:
            continue
        if node.target is torch.Tensor.dequantize:
            made = plan.decisions.get(node.args[0].name)
            if made is not None and made.row not in _ORDERED:
                found.add(node)
        elif decision.status is Status.FLOAT and found.intersection(node.all_input_nodes):
            op = dictionary.op_of(node)
            if op is not None and op.name not in _ORDERED:
                found.add(node)
    return found


def _may_ask(module: torch.nn.Module, node: Node) -> bool:
    """Whether a node's code may depend on the layout of what it reads."""
    if node.op == "output":
        return True
    if node.op == "call_module":
        return not type(module.get_submodule(str(node.target))).__module__.startswith("torch.nn.")
    if not node.op.startswith("call_") or reads_shape(node) or overwrites(node, None):
        return False
    package = (getattr(node.target, "__module__", None) or "torch").partition(".")[0]
    return node.target in _OF_MEMORY or (node.op == "call_function" and package not in _INDIFFERENT)


def _contiguous(source: Node, graph: fx.Graph, plan: QuantPlan) -> Node:
    with graph.inserting_after(source):
        made = graph.create_node("call_function", ops.CONTIGUOUS.target, (source,), name=f"{source.name}_contiguous")
    plan.decisions[made.name] = Decision(Status.SHAPE_ONLY)
    plan.origins[made.name] = dataclasses.replace(plan.origin(source.name), kind=ops.CONTIGUOUS.name)
    plan.facts[made.name] = plan.facts[source.name]
    return made
