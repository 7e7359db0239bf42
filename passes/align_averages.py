"""Qparams with which averages that are half way between two integers become the same one everywhere.

Averages of a few integers often are, and scales that move cannot help: they cancel. The reference graph and kernels
round them to the even integer (:mod:`fxq.qdq`), some before they add the zero_point and some after it, which is the
same with an even one. Runtimes that average in float meet the half exactly where the integers times the scale, and the
sums of a few of these, have no more digits than float32: where the scale has a short mantissa.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch

from fxq.graph_module import QuantModule
from fxq.ops import ADD, MATMUL, MUL, Dictionary
from fxq.plan import QuantPlan, Slot
from fxq.spec import QParams, QuantSpec

_DIGITS = 12  # of a mantissa: 8 for an integer and 4 for a sum of 16 fill float32's 24
_FEWEST = 128  # integers, of which one is not missed


def align_averages(
    module: QuantModule, plan: QuantPlan, ops: Dictionary, averages: Collection[str], qparams: dict[int, QParams]
) -> set[int]:
    """Change the qparams of averages, by name of the nodes that compute them, before tensors are quantized with them.

    Returns:
        The groups whose scale has a short mantissa now. Scales of sums and products keep theirs, because
        :mod:`fxq.passes.align_scales` moves them.
    """
    nodes = {node.name: node for node in module.graph.nodes}
    computed = {
        plan.groups.get(Slot(region.end))
        for region in plan.regions
        if ops.op_of(nodes[region.nodes[0]]) in (ADD, MUL, MATMUL)
    }
    short = set()
    for name in sorted(averages):
        group = plan.groups.get(Slot(name))
        if group is None or group in plan.fixed:
            continue
        spec = plan.specs[Slot(name)]
        scale, zero_point = qparams[group].item()
        scale, zero_point = _even(scale, zero_point, spec)
        if group not in computed and not spec.pow2_scale:
            scale = _short(scale)
            short.add(group)
        qparams[group] = QParams(torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32))
    return short


def _even(scale: float, zero_point: int, spec: QuantSpec) -> tuple[float, int]:
    """An even zero_point, and a scale with which the range is covered all the same."""
    steps = spec.quant_max - spec.quant_min
    if zero_point % 2 == 0 or steps < _FEWEST or spec.symmetric:
        return scale, zero_point
    middle = (spec.quant_min + spec.quant_max) / 2
    return scale if spec.pow2_scale else scale * steps / (steps - 1), zero_point + (1 if zero_point < middle else -1)


def _short(scale: float) -> float:
    mantissa, exponent = math.frexp(scale)
    return math.ldexp(round(math.ldexp(mantissa, _DIGITS)), exponent - _DIGITS)
