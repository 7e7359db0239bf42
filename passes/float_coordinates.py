"""Let positions be computed in float.

An optical flow is added to the position of each pixel, and ``grid_sample`` looks there. Eight bits tell the places of
256 pixels apart, to no fraction of one, and none beyond the images of the calibration. So do they of what is added to
other numbers that are counted up to a size (``torch.arange(x.shape[1])``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx import Node

from fxq.aliases import shape_values
from fxq.graph_module import QuantModule
from fxq.op_table import Backend, sharing_or_float
from fxq.ops import ADD, CAT, DIV, MUL, SUB, Dictionary
from fxq.pass_base import Pass
from fxq.plan import COORDINATES, QuantPlan

_SAMPLING = (F.grid_sample, torch.grid_sampler)
_COUNTING = (torch.arange, torch.linspace)
_ARITHMETIC = (ADD, SUB, MUL, DIV, CAT)


class FloatCoordinates(Pass):
    """Arithmetic and joins that reach the grid of a ``grid_sample``, moved about at most, or read what is counted."""

    requires = frozenset({"annotated"})

    def __init__(self, backend: Backend, ops: Dictionary) -> None:
        self.backend, self.ops = backend, ops

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        moving = sharing_or_float(plan, self.backend)
        found: set[Node] = set()
        waiting = [grid for node in module.graph.nodes for grid in _grids(node)]
        while waiting:
            node = waiting.pop()
            if node not in found and (self.ops.op_of(node) in _ARITHMETIC or node.name in moving):
                found.add(node)
                waiting += node.all_input_nodes
        found.update(reader for node in _counted(module.graph) for reader in node.users)
        return plan.make_float_at({n.name for n in found if self.ops.op_of(n) in _ARITHMETIC}, COORDINATES)


def _counted(graph: fx.Graph) -> set[Node]:
    """Tensors that are computed of sizes alone, and of a count up to one."""
    sizes, found = shape_values(graph), set[Node]()
    for node in graph.nodes:
        sources = node.all_input_nodes
        if not node.op.startswith("call_") or not sources or not all(n in sizes or n in found for n in sources):
            continue
        if node.target in _COUNTING or not found.isdisjoint(sources):
            found.add(node)
    return found


def _grids(node: Node) -> list[Node]:
    grid = node.kwargs.get("grid", node.args[1] if len(node.args) > 1 else None)
    return [grid] if node.target in _SAMPLING and isinstance(grid, Node) else []
