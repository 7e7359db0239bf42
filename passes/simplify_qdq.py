"""Remove quantize nodes that would reproduce the integers they were dequantized from."""

from __future__ import annotations

from torch.fx import Node

from fxq.graph_module import QuantModule
from fxq.pass_base import Pass
from fxq.plan import QuantPlan
from fxq.qdq import DEQUANTIZE, is_quantize


class SimplifyQDQ(Pass):
    """``quantize(dequantize(q))`` with one scale, zero_point and range is ``q``."""

    requires = frozenset({"reference"})

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        removed = 0
        for node in list(module.graph.nodes):
            if is_quantize(node) and _round_trip(node):
                node.replace_all_uses_with(node.args[0].args[0])
                removed += 1
        module.graph.eliminate_dead_code()
        return removed


def _round_trip(node: Node) -> bool:
    source, scale, zero_point, quant_min, quant_max, dtype = node.args
    if not isinstance(source, Node) or source.target is not DEQUANTIZE:
        return False
    origin = source.args[0]
    return bool(
        isinstance(origin, Node)
        and is_quantize(origin)
        and source.args[1:] == (scale, zero_point)
        and origin.args[3] >= quant_min  # type: ignore[operator]
        and origin.args[4] <= quant_max  # type: ignore[operator]
        and origin.args[5] == dtype
    )
