"""Where values enter the groups of a plan, and how to read and write the argument of a slot."""

from __future__ import annotations

from collections import defaultdict

from torch.fx import Node

from fxq.plan import QuantPlan, Slot


def entry_points(nodes: dict[str, Node], plan: QuantPlan, sharing: set[str]) -> dict[int, dict[str, list[Slot]]]:
    """For each group, the producers whose values enter it and the slots they enter at.

    Args:
        nodes: the graph's nodes by name.
        sharing: ends of regions whose output shares its input's qparams; they are entries only where some of
            their inputs are not in the group.

    Returns:
        ``{group: {producer: slots}}``. A slot list of just the producer's own output slot means the whole
        output; otherwise these readers only.
    """
    inputs: dict[str, set[int]] = defaultdict(set)
    for slot, group in plan.groups.items():
        if slot.path:
            inputs[slot.node].add(group)
    entries: dict[int, dict[str, list[Slot]]] = defaultdict(lambda: defaultdict(list))
    for slot, group in plan.groups.items():
        if not slot.path and (slot.node not in sharing or inputs[slot.node] != {group}):
            entries[group][slot.node] = [slot]
    for slot, group in plan.groups.items():
        if slot.path:
            producer = argument(nodes[slot.node], slot.path)
            if producer.name not in plan.containers and plan.groups.get(Slot(producer.name)) != group:
                entries[group][producer.name].append(slot)
    return entries


def argument(node: Node, path: tuple[int, ...]) -> Node:
    """The argument at a slot's path."""
    value = node.args[path[0]]
    found = value if len(path) == 1 else value[path[1]]  # type: ignore[index]
    assert isinstance(found, Node)
    return found


def replace_argument(node: Node, path: tuple[int, ...], value: Node) -> None:
    """Set the argument at a slot's path."""
    args = list(node.args)
    if len(path) == 1:
        args[path[0]] = value
    else:
        items = list(args[path[0]])  # type: ignore[arg-type]
        items[path[1]] = value
        args[path[0]] = items
    node.args = tuple(args)
