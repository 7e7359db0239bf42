"""Move scales by a few hundredths of a percent, so that no int8 result is next to a tie (:mod:`fxq.odd_fractions`).

=============  =================================================================  ===================================
what           computes, of integers ``i`` and ``j``                              moves
=============  =================================================================  ===================================
add            ``scale / output scale * i + other scale / output scale * j``      one operand's scale and the output's
mul, matmul    ``scale * other scale / output scale * (sum of) i * j``            the output's
conv, linear   ``input scale * weight scale / output scale * sum``                the weight's, channel by channel
=============  =================================================================  ===================================

In this order: a scale that an earlier one needs stays, as do those that a kernel dictates and powers of two. A channel
without weights gets a fine scale, so that its bias, which is all it has, is a whole number of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch.fx import Node

from fxq.graph_module import QuantModule, get_attribute
from fxq.odd_fractions import LARGEST, odd_fractions
from fxq.ops import ADD, CLAMP, CONV_TRANSPOSES, MATMUL, MUL, RELU, Dictionary
from fxq.plan import QuantPlan, Region, Slot
from fxq.slots import argument
from fxq.spec import QParams

_MOST = 1.5e-3  # by which an activation's may move: less than half a step at the far end, where relu6 and others clamp
_COARSEST = 0.5  # of a step: a unit of the sums beyond has few values on a step, and few ties

Groups = dict[int, QParams]


def align_scales(
    module: QuantModule, plan: QuantPlan, ops: Dictionary, fixed: Collection[int], qparams: Groups
) -> None:
    """Change the scales of the plan's groups in ``qparams``, but for the ``fixed`` ones, before they are used."""
    nodes = {node.name: node for node in module.graph.nodes}
    settled = {*fixed, *plan.fixed} | {group for slot, group in plan.groups.items() if plan.specs[slot].pow2_scale}
    for kinds, align in (((ADD,), _align_sum), ((MUL, MATMUL), _align_product)):
        for region in plan.regions:
            if ops.op_of(nodes[region.nodes[0]]) in kinds:
                groups = _groups(Slot(region.nodes[0], (0,)), Slot(region.nodes[0], (1,)), region, plan)
                if groups is not None and groups[2] not in (*settled, *groups[:2]):
                    align(*groups, settled, qparams)
                    settled.update(groups)
    for slot, (given, weight, output) in _layers(nodes, plan, ops):
        if weight not in settled:
            _align_weight(argument(nodes[slot.node], slot.path), given, weight, output, module, qparams)
            settled.add(weight)


def _groups(one: Slot, other: Slot, region: Region, plan: QuantPlan) -> tuple[int, int, int] | None:
    """Of two arguments of a region's first node and of the output; ``None`` if one of them is not quantized."""
    slots = (one, other, Slot(region.end))
    if any(slot not in plan.groups for slot in slots):
        return None
    first, second, output = (plan.groups[slot] for slot in slots)
    return first, second, output


def _layers(nodes: dict[str, Node], plan: QuantPlan, ops: Dictionary) -> Iterator[tuple[Slot, tuple[int, int, int]]]:
    """The weight's slot and the groups of layers that round their sums at once, a relu or clamp aside."""
    for region in plan.regions:
        root, *tail = (ops.op_of(nodes[name]) for name in region.nodes)
        if root is not None and root.weight and root not in CONV_TRANSPOSES and {*tail} <= {RELU, CLAMP}:
            slot = Slot(region.nodes[0], (root.index(root.weight),))
            groups = _groups(Slot(region.nodes[0], (root.index("input"),)), slot, region, plan)
            if groups is not None:
                yield slot, groups


def _align_sum(one: int, other: int, output: int, settled: set[int], qparams: Groups) -> None:
    kept, moved = (other, one) if other in settled else (one, other)
    if kept != moved and moved in settled:
        return
    before = [_scale(qparams[group]) for group in dict.fromkeys((kept, moved, output))]
    ratios = odd_fractions(torch.tensor([before[:-1]], dtype=torch.float64) / before[-1])[0].tolist()
    after = before[0] / ratios[0]
    _move({output: after} | ({moved: after * ratios[1]} if kept != moved else {}), qparams)


def _align_product(one: int, other: int, output: int, settled: set[int], qparams: Groups) -> None:
    product = _scale(qparams[one]) * _scale(qparams[other])
    ratio = odd_fractions(torch.tensor([[product / _scale(qparams[output])]], dtype=torch.float64)).item()
    _move({output: product / ratio}, qparams)


def _scale(qparams: QParams) -> float:
    return qparams.item()[0]


def _move(wanted: dict[int, float], qparams: Groups) -> None:
    if all(abs(scale / _scale(qparams[group]) - 1) <= _MOST for group, scale in wanted.items()):
        for group, scale in wanted.items():
            qparams[group] = QParams(torch.tensor([scale]), qparams[group].zero_point)


def _align_weight(source: Node, given: int, weight: int, output: int, module: QuantModule, qparams: Groups) -> None:
    factor = _scale(qparams[given]) / _scale(qparams[output])
    before = qparams[weight]
    ratios = torch.where(_dead(source, before, module), 1 / LARGEST, before.scale.double() * factor)
    inverse = 2 * torch.floor(1 / ratios / 2) + 1
    near = torch.where(ratios < 2 / LARGEST, 1 / inverse, odd_fractions(ratios[:, None])[:, 0])
    after = torch.where(ratios > _COARSEST, before.scale.double(), near / factor).float()
    qparams[weight] = QParams(after, before.zero_point)


def _dead(source: Node, qparams: QParams, module: QuantModule) -> torch.Tensor:
    """Which channels have no weight but zero, of one scale each or all together; layers' are the first dimension."""
    unit = qparams.scale == 1  # the scale of nothing; few others are that
    if not unit.any():
        return unit
    weight: torch.Tensor = get_attribute(module, str(source.target)).detach()
    return unit & (weight.reshape(len(unit), -1).count_nonzero(1) == 0)
