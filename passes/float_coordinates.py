"""Let the positions at which images are sampled be computed in float.

An optical flow is added to the position of each pixel, and ``grid_sample`` looks there. Eight bits tell the places of
256 pixels apart, to no fraction of one, and none beyond the images of the calibration.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.fx import Node

from fxq.graph_module import QuantModule
from fxq.op_table import Backend, sharing_ends
from fxq.ops import ADD, CAT, DIV, MUL, SUB, Dictionary
from fxq.pass_base import Pass
from fxq.plan import COORDINATES, QuantPlan

_SAMPLING = (F.grid_sample, torch.grid_sampler)
_ARITHMETIC = (ADD, SUB, MUL, DIV, CAT)


class FloatCoordinates(Pass):
    """Arithmetic and joins that reach the grid of a ``grid_sample``, directly or moved about."""

    requires = frozenset({"annotated"})

    def __init__(self, backend: Backend, ops: Dictionary) -> None:
        self.backend, self.ops = backend, ops

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        moving = sharing_ends(plan, self.backend) | {
            name for name, decision in plan.decisions.items() if decision.reason is not None
        }
        found: set[Node] = set()
        waiting = [grid for node in module.graph.nodes for grid in _grids(node)]
        while waiting:
            node = waiting.pop()
            if node not in found and (self.ops.op_of(node) in _ARITHMETIC or node.name in moving):
                found.add(node)
                waiting += node.all_input_nodes
        return plan.make_float_at({n.name for n in found if self.ops.op_of(n) in _ARITHMETIC}, COORDINATES)


def _grids(node: Node) -> list[Node]:
    grid = node.kwargs.get("grid", node.args[1] if len(node.args) > 1 else None)
    return [grid] if node.target in _SAMPLING and isinstance(grid, Node) else []
