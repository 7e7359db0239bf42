"""Let attention that is written out run in float: scores, softmax and the weighted sum.

The scores of a hundred tokens span a range that leaves 8 bits too coarse: a step of the exponent is a factor. Of their
softmax a few values are near 1 and most near 0, and these count, because they are many. ``nn.MultiheadAttention`` is
taken apart in the same way (:mod:`fxq.passes.expose_projections`); here it is the model itself that calls matmul,
softmax and matmul. Moves between them are left: with float on both sides they become float by themselves. A softmax
over a few values, as selects among branches, stays int8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from torch.fx import Node

from fxq.graph_module import QuantModule
from fxq.op_table import Backend, sharing_or_float
from fxq.ops import ADD, DIV, MATMUL, MUL, SOFTMAX, SUB, Dictionary
from fxq.pass_base import Pass
from fxq.plan import ATTENTION, QuantPlan

_FEW = 16  # values that a softmax may be over and stay int8
_MASKING = (ADD, SUB, MUL, DIV)  # scaled, masked, biased


class FloatAttention(Pass):
    """A softmax over many values, what makes its scores and what they weigh."""

    requires = frozenset({"annotated", "facts"})

    def __init__(self, backend: Backend, ops: Dictionary) -> None:
        self.backend, self.ops = backend, ops

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        moving = sharing_or_float(plan, self.backend)
        delicate: set[Node] = set()
        for node in module.graph.nodes:
            if self.ops.op_of(node) is SOFTMAX and self._is_over_many(node, plan):
                delicate |= {node, *self._scores(node, moving), *self._weighted(node, moving, plan)}
        return plan.make_float_at({node.name for node in delicate}, ATTENTION)

    def _is_over_many(self, softmax: Node, plan: QuantPlan) -> bool:
        fact, dim = plan.facts.get(softmax.name), SOFTMAX.get(softmax, "dim")
        return fact is not None and isinstance(dim, int) and fact.shape[dim] > _FEW

    def _scores(self, softmax: Node, moving: set[str]) -> set[Node]:
        """What computes the scores, back to the product that they are."""

        def sources(node: Node) -> Iterator[Node]:
            for source in node.all_input_nodes:
                op = self.ops.op_of(source)
                if op is MATMUL or op in _MASKING or source.name in moving:  # masked_fill, too, which is no known op
                    yield source

        reached = _reached(softmax, sources, lambda node: self.ops.op_of(node) is MATMUL)
        return {node for node in reached if self.ops.op_of(node) in (MATMUL, *_MASKING)}

    def _weighted(self, softmax: Node, moving: set[str], plan: QuantPlan) -> set[Node]:
        """The products that read the weights, as they are or moved about."""

        def readers(node: Node) -> Iterator[Node]:
            for user in node.users:
                moved = user.name in moving and _as_many(user, node, plan)
                if self.ops.op_of(user) in (MATMUL, MUL) or moved:
                    yield user

        reached = _reached(softmax, readers, lambda node: self.ops.op_of(node) in (MATMUL, MUL))
        return {node for node in reached if self.ops.op_of(node) in (MATMUL, MUL)}


def _reached(start: Node, following: Callable[[Node], Iterator[Node]], ends: Callable[[Node], bool]) -> set[Node]:
    """What is reached from a node, each visited once, not going on behind an end."""
    found: set[Node] = set()
    waiting = [start]
    while waiting:
        for node in following(waiting.pop()):
            if node not in found:
                found.add(node)
                waiting += [] if ends(node) else [node]
    return found


def _as_many(user: Node, node: Node, plan: QuantPlan) -> bool:
    """Whether two nodes have equally many values."""
    facts = plan.facts.get(user.name), plan.facts.get(node.name)
    return all(facts) and len({math.prod(fact.shape) for fact in facts if fact}) == 1
