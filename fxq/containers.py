"""Nodes that make a container of their arguments, such as the ``OrderedDict`` that a segmentation model returns.

torch.fx writes dicts and lists into the arguments of nodes and forgets that they were of other classes. Here such a
container is a node that calls its class, so that callers and modules that are not traced get what the float model
makes.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx import Node
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.node import map_arg

_PLAIN = (dict, list, immutable_dict, immutable_list)


def is_made_of_items(value: Any) -> bool:
    """Whether a value is of a class of dicts or lists of its own that makes the like of it from what it holds."""
    if not isinstance(value, (dict, list)) or type(value) in _PLAIN:
        return False
    items = items_of(value)
    try:
        made = type(value)(items)
        again = items_of(made)
    except Exception:  # whatever the code of a class raises
        return False
    if type(made) is not type(value) or len(again) != len(items):
        return False
    if isinstance(value, dict):
        return all(key == other and held is kept for (key, held), (other, kept) in zip(items, again, strict=True))
    return all(held is kept for held, kept in zip(items, again, strict=True))


def items_of(container: dict[Any, Any] | list[Any]) -> list[Any]:
    """What makes a container again: pairs of a dict, members of a list."""
    return list(container.items()) if isinstance(container, dict) else list(container)


def makes_container(node: Node) -> bool:
    """Whether a node makes a dict or list of its arguments and computes nothing."""
    kind = node.target
    return node.op == "call_function" and isinstance(kind, type) and issubclass(kind, (dict, list))


def held_by(node: Node) -> dict[Any, Any] | list[Any]:
    """The arguments of a node that makes a container, in an ordinary one."""
    if node.kwargs:
        return dict(node.kwargs)
    items: Any = node.args[0] if node.args else ()
    return dict(items) if isinstance(node.target, type) and issubclass(node.target, dict) else list(items)


def plain_containers(graph: fx.Graph) -> None:
    """Write ordinary dicts and lists in the places of the containers that nodes make, for what knows no others."""
    for node in filter(makes_container, list(graph.nodes)):
        if node.target in (dict, list):
            continue
        held = held_by(node)
        for user in list(node.users):

            def plain(argument: Node, node: Node = node, held: Any = held) -> Any:
                return held if argument is node else argument

            user.args, user.kwargs = map_arg(user.args, plain), map_arg(user.kwargs, plain)
        graph.erase_node(node)
