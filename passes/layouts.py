"""Where a lowered graph has to give a tensor in the order of its dimensions.

Int8 kernels leave images in channels_last, where float ones leave them as they found them. Code that fxq does not know,
which is around the graph, in float modules and in functions of the user's own, may ask for a view that only a
contiguous tensor has, as ``y.view(len(y), -1)`` does. It gets one, unless the model or its example inputs are in
channels_last themselves.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch.fx import Node

from fxq.aliases import after, is_users_function, overwrites
from fxq.containers import makes_container
from fxq.graph_module import QuantModule
from fxq.ops import CONTIGUOUS, LAYER_NORM, LINEAR, MATMUL, Dictionary
from fxq.plan import CHANNELS_LAST

# Beside the user's own functions, what reads or depends on strides.
_READ_STRIDES = frozenset({
    torch.as_strided, torch.view_as_complex, "as_strided", "data_ptr", "is_contiguous", "storage_offset", "stride",
    "view", "view_as",
})  # fmt: skip
_MAKE_CONTIGUOUS = (CONTIGUOUS, LAYER_NORM, LINEAR, MATMUL)


def reads_layout(node: Node) -> bool:
    """Whether it matters to a node of a reference graph how its arguments lie in memory."""
    if node.op in ("output", "call_module"):
        return True
    if overwrites(node, None) or any(user.target is after for user in node.users):
        return False  # what it writes is to reach those that read the tensor later, and would not from a copy
    return node.target in _READ_STRIDES or makes_container(node) or is_users_function(node)


def permuted_values(reference: QuantModule, covered: Container[Node], ops: Dictionary) -> set[Node]:
    """The nodes of a reference graph whose values may lie in another order once it is lowered.

    Args:
        covered: the nodes that become part of kernels.
    """
    found: set[Node] = set()
    plan = reference.plan
    if CHANNELS_LAST in plan.properties:
        return found
    for node in reference.graph.nodes:
        fact = plan.facts.get(node.name)
        rank = 3 if fact is None else len(fact.shape)  # of a tuple of tensors it is not known
        if rank < 3 or reads_layout(node) or ops.op_of(node) in _MAKE_CONTIGUOUS:
            continue
        if (node in covered and rank > 3) or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found
