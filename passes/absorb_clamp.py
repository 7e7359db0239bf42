"""Let the saturation of a quantize do the work of the relu or clamp before it.

Quantization is monotone, so ``quantize(clamp(x, lo, hi)) == clamp(quantize(x), quantize(lo), quantize(hi))``
exactly, and the right-hand side is a quantize with a narrower ``[quant_min, quant_max]``. Where the clamp's
bounds are the ends of the range anyway, as after relu6, nothing is left of it.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from fxq.graph_module import QuantModule
from fxq.ops import CLAMP, RELU, Dictionary
from fxq.pass_base import Pass
from fxq.plan import QuantPlan, Region, Slot
from fxq.qdq import QUANTIZE, is_dequantize, is_quantize


class AbsorbClamp(Pass):
    """Relu and clamp between an op and its quantize move into the quantize's integer bounds."""

    requires = frozenset({"reference"})

    def __init__(self, ops: Dictionary) -> None:
        self.ops = ops
        self._regions: dict[str, int] = {}

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        absorbed = 0
        self._regions = {region.end: number for number, region in enumerate(plan.regions)}
        for node in list(module.graph.nodes):
            while is_quantize(node) and self._absorb(node, plan):
                absorbed += 1
        module.graph.eliminate_dead_code()
        return absorbed

    def _absorb(self, quantize: Node, plan: QuantPlan) -> bool:
        clamp, scale, zero_point, quant_min, quant_max, dtype = quantize.args
        if not isinstance(clamp, Node) or len(clamp.users) != 1:
            return False
        bounds = self._bounds(clamp)
        if bounds is None or is_dequantize(clamp.args[0]):
            return False  # on int8 values a clamp is a kernel of its own

        low, high = (_integer(bound, quantize) for bound in bounds)
        low, high = quant_min if low is None else low, quant_max if high is None else high  # type: ignore[assignment]
        quantize.args = (clamp.args[0], scale, zero_point, low, high, dtype)
        self._move_records(clamp, plan)
        return True

    def _move_records(self, clamp: Node, plan: QuantPlan) -> None:
        """The node before the clamp takes over its place in the plan."""
        before = clamp.args[0]
        assert isinstance(before, Node)
        plan.decisions.pop(clamp.name, None)
        if Slot(clamp.name) in plan.specs:
            plan.specs[Slot(before.name)] = plan.specs.pop(Slot(clamp.name))
            plan.groups[Slot(before.name)] = plan.groups.pop(Slot(clamp.name))
        number = self._regions.pop(clamp.name, None)
        if number is not None:
            region = plan.regions[number]
            self._regions[before.name] = number
            plan.regions[number] = Region(region.row, region.nodes[:-1], (clamp.name, *region.absorbed))

    def _bounds(self, node: Node) -> tuple[float | None, float | None] | None:
        op = self.ops.op_of(node)
        if op is RELU:
            return 0.0, None
        if op is CLAMP and not any(isinstance(bound, Node) for bound in node.args[1:]):
            return node.args[1], node.args[2]  # type: ignore[return-value]
        return None


def _integer(bound: float | None, quantize: Node) -> int | None:
    """The integer of a bound, computed by the op itself: a tie must not be rounded another way."""
    if bound is None:
        return None
    return int(QUANTIZE(torch.tensor(float(bound)), *quantize.args[1:]).item())
