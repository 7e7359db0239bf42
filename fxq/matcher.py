"""Finding the chains of nodes that a row describes.

Thinks in nodes, never in modules: one module may be called often.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch.fx import Node

from fxq.op_table import Backend, OpRow
from fxq.ops import CLAMP, Dictionary
from fxq.plan import NO_KERNEL, Reason, TensorFact


@dataclass(frozen=True)
class Match:
    """A row and the nodes it covers, root first."""

    row: OpRow
    nodes: tuple[Node, ...]

    @property
    def root(self) -> Node:
        return self.nodes[0]

    @property
    def end(self) -> Node:
        return self.nodes[-1]


Joins = Callable[[Node], bool]
Takes = Callable[[OpRow], Reason | None]


def any_node(node: Node) -> bool:
    """Every node may join a chain."""
    return True


def any_row(row: OpRow) -> Reason | None:
    """Every row may take the root."""
    return None


def match_row(row: OpRow, root: Node, ops: Dictionary, joins: Joins = any_node) -> Match | None:
    """The longest chain of ``row`` that starts at ``root``; every inner node has exactly one user.

    ``joins`` may keep nodes out of the tail.
    """
    nodes = [root]
    for step in row.steps:
        user = _only_user(nodes[-1])
        if user is not None and ops.op_of(user) in step.ops and _continues(nodes[-1], user, ops) and joins(user):
            nodes.append(user)
        elif not step.optional:
            return None
    return Match(row, tuple(nodes))


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _continues(node: Node, user: Node, ops: Dictionary) -> bool:
    op = ops.op_of(user)
    assert op is not None
    if op is CLAMP and any(isinstance(bound, Node) for bound in user.args[1:]):
        return False  # bounds known only at run time cannot become a saturation
    uses = [producer for _, producer in op.tensor_arguments(user)]
    # `x + x` reads the chain twice, and `x + 1` has no second tensor to accumulate into.
    return uses.count(node) == 1 and len(uses) == len(op.tensors)


def best_match(
    backend: Backend, root: Node, ops: Dictionary, facts: Mapping[str, TensorFact], joins: Joins = any_node,
    takes: Takes = any_row,
) -> Match | Reason:  # fmt: skip
    """The first row of ``backend`` that takes ``root``, with the longest chain; else the reason why none does.

    ``takes`` may say of a row why it does not take the root, e.g. its weight.
    """
    op = ops.op_of(root)
    assert op is not None
    refusal: Reason | None = None
    for row in backend.rows_of(op):
        match = match_row(row, root, ops, joins)
        if match is None:
            continue
        reason = takes(row) or row.check(root, facts)
        if reason is None:
            return match
        refusal = refusal or reason
    return refusal or backend.absent.get(op, NO_KERNEL)


def other_operand(nodes: tuple[Node, ...], position: int, ops: Dictionary) -> tuple[tuple[int, ...], Node]:
    """``(path, producer)`` of the operand that a binary tail node takes from outside the chain."""
    op = ops.op_of(nodes[position])
    assert op is not None
    return next(use for use in op.tensor_arguments(nodes[position]) if use[1] is not nodes[position - 1])
