"""Which nodes overwrite a tensor in place, and which nodes are other names of the same memory."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.fx import Node

from fxq.ops import (
    CHUNK,
    CONTIGUOUS,
    DROPOUT,
    FLATTEN,
    GETITEM,
    PERMUTE,
    RESHAPE,
    SPLIT,
    SQUEEZE,
    TRANSPOSE,
    UNSQUEEZE,
    Dictionary,
)

SHAPE_METHODS = frozenset({"size", "dim", "numel", "nelement", "ndimension"})
SHAPE_ATTRIBUTES = frozenset({"shape", "ndim"})
_VALUE_METHODS = frozenset({"item", "tolist"})

_VIEWS = (CHUNK, CONTIGUOUS, DROPOUT, FLATTEN, GETITEM, PERMUTE, RESHAPE, SPLIT, SQUEEZE, TRANSPOSE, UNSQUEEZE)
_VIEW_METHODS = frozenset({
    "detach", "diagonal", "expand", "expand_as", "float", "movedim", "narrow", "select", "swapaxes", "swapdims", "t",
    "tensor_split", "to", "unbind", "unflatten", "unfold", "view_as",
})  # fmt: skip
_FREE_OF_EFFECTS = frozenset({"torch", "operator", "_operator", "builtins", "math", "fxq"})
_AUGMENTED = frozenset(
    getattr(operator, name)
    for name in dir(operator)
    if name.startswith("i") and (hasattr(operator, name[1:]) or hasattr(operator, f"{name[1:]}_"))
)


def after(value: Any, overwritten_by: Any) -> Any:
    """``value``, read after another node has overwritten its memory; makes that order a dependency of the graph."""
    return value


def reads_shape(node: Node) -> bool:
    """Whether a node only reads the sizes of its input."""
    if node.op == "call_method":
        return node.target in SHAPE_METHODS
    return node.op == "call_function" and node.target is getattr and node.args[1] in SHAPE_ATTRIBUTES


def reads_values(node: Node) -> bool:
    """Whether a node takes numbers from the values of a tensor; in a recorded run they would be constants."""
    return node.op == "call_method" and node.target in _VALUE_METHODS


def shape_values(graph: fx.Graph) -> set[Node]:
    """Nodes whose values are numbers or sizes computed from shapes alone, never tensors."""
    found: set[Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        computed = node.op == "call_function" and bool(inputs) and all(source in found for source in inputs)
        if computed or reads_shape(node):
            found.add(node)
    return found


def overwrites(node: Node, leaf: nn.Module | None) -> bool:
    """Whether a node overwrites its first argument.

    torch's functions and arguments say so by their names; a function of the user's own (``torch.fx.wrap``) is taken to
    do so where it is called as a statement, its result unread.
    """
    if leaf is not None:
        return getattr(leaf, "inplace", False) is True
    if node.kwargs.get("inplace") is True or node.target is operator.setitem or node.target in _AUGMENTED:
        return True
    if _is_statement_of_users_function(node):
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.endswith("_") and not name.endswith("__") and node.target not in vars(operator).values()


def _is_statement_of_users_function(node: Node) -> bool:
    return not node.users and bool(node.args) and isinstance(node.args[0], Node) and is_users_function(node)


def is_users_function(node: Node) -> bool:
    """Whether a node calls a function that is neither of torch nor of Python, or a TorchScript one."""
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch.jit.ScriptFunction):
        return True
    package = (getattr(node.target, "__module__", None) or "torch").partition(".")[0]
    return package not in _FREE_OF_EFFECTS


def aliases(source: Node, ops: Dictionary) -> list[Node]:
    """All nodes that may share the memory of ``source``, as views, eval-mode dropouts and identities do; its maker
    first.
    """
    base = source
    while _is_alias(base, ops) and isinstance(base.args[0], Node):
        base = base.args[0]
    found = {base: None}
    for node in _walk(base, ops):
        found.setdefault(node)
    return list(found)


def _walk(base: Node, ops: Dictionary) -> Iterator[Node]:
    waiting = [base]
    while waiting:
        for user in waiting.pop().users:
            if _is_alias(user, ops) and user.args[0] in user.all_input_nodes[:1]:
                yield user
                waiting.append(user)


def _is_alias(node: Node, ops: Dictionary) -> bool:
    if not node.args or not node.op.startswith("call_"):
        return False
    if node.op == "call_module":
        leaf = _leaf(node)
        found = None if leaf is None else ops.spelled(type(leaf))
        return isinstance(leaf, nn.Identity) or overwrites(node, leaf) or (found is not None and found[0] in _VIEWS)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.target is after or name in _VIEW_METHODS or overwrites(node, None):
        return True
    found = ops.spelled(node.target)
    return found is not None and found[0] in _VIEWS


def _leaf(node: Node) -> nn.Module | None:
    owner = node.graph.owning_module
    return None if owner is None or node.op != "call_module" else owner.get_submodule(str(node.target))
