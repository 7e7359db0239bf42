"""Turn a calibrated graph into a reference graph: quantize/dequantize pairs on plain integers, float ops between.

Each weight becomes an int8 tensor under its original path with ``_scale`` and ``_zero_point`` beside it.
The reference graph defines the model's numbers; every lowering is judged against it.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch.fx import Node

from fxq.graph_module import QuantModule, free_path, get_attribute, set_tensor
from fxq.numerics import quantize
from fxq.observers import Observer, settle_ranges
from fxq.op_table import Backend, averaging_ends, sharing_ends
from fxq.ops import Dictionary
from fxq.pass_base import Pass
from fxq.passes.align_averages import align_averages
from fxq.passes.align_scales import align_scales
from fxq.plan import NEVER_OBSERVED, QuantPlan, Slot, counted
from fxq.qdq import DEQUANTIZE, DEQUANTIZE_CHANNEL, QUANTIZE, QUANTIZE_AVERAGE, is_quantize
from fxq.slots import entry_points, replace_argument
from fxq.spec import QParams

_NEARLY_ALL = 0.999  # of the values, as no sparse activation of models has


class ToReference(Pass):
    """Observers go, quantize and dequantize nodes come.

    Args:
        align: whether scales may move a little (:mod:`fxq.passes.align_scales`).
    """

    requires = frozenset({"observed"})
    ensures = frozenset({"reference"})

    def __init__(self, backend: Backend, ops: Dictionary, align: bool = True) -> None:
        self.backend, self.ops, self.align = backend, ops, align

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        if "reference" in plan.properties:
            return 0
        qparams = self._collect(module, plan)
        _remove_observers(module, plan)
        averages = averaging_ends(plan, self.backend)
        if self.align:
            short = align_averages(module, plan, self.ops, averages, qparams)
            align_scales(module, plan, self.ops, short, qparams)
        _drop_observer_modules(module, plan)  # what they counted makes room for the integers
        nodes = {node.name: node for node in module.graph.nodes}
        weights = {slot for region in plan.regions for slot in self._weight_slots(region.nodes[0], nodes)}
        same_tensor = _get_attr_nodes(nodes)
        quantized = 0
        shared = sharing_ends(plan, self.backend)
        for group, points in entry_points(nodes, plan, shared).items():
            if next(iter(points.values()))[0] in weights:
                _quantize_weight(points, qparams[group], module, plan, nodes, same_tensor)
            else:
                for name, slots in points.items():
                    _quantize_activation(nodes[name], slots, qparams[group], plan, nodes, averages)
            quantized += len(points)
        for name in shared:
            slot = Slot(name)
            if slot in plan.groups and not _is_quantized(nodes[name]):
                _quantize_activation(nodes[name], [slot], qparams[plan.groups[slot]], plan, nodes, averages)
                quantized += 1
        module.graph.eliminate_dead_code()
        return quantized

    def _weight_slots(self, name: str, nodes: dict[str, Node]) -> list[Slot]:
        op = self.ops.op_of(nodes[name])
        return [] if op is None or op.weight is None else [Slot(name, (op.index(op.weight),))]

    def _collect(self, module: QuantModule, plan: QuantPlan) -> dict[int, QParams]:
        """Qparams of every group; regions whose observers saw nothing go back to float."""
        observers = {group: module.get_submodule(path) for group, path in plan.observers.items()}
        silent = {group for group, observer in observers.items() if observer.enabled and not observer.has_data}
        names = {slot.node for slot, group in plan.groups.items() if group in silent}
        plan.make_float([region for region in plan.regions if names & set(region.nodes)], NEVER_OBSERVED)
        settle_ranges(observer for observer in observers.values() if type(observer) is Observer)
        _note_outliers([observer for observer in observers.values() if type(observer) is Observer], plan)
        qparams = {
            group: observer.qparams()  # type: ignore[operator]
            for group, observer in observers.items()
            if group not in silent
        }
        for group, (scale, zero_point) in plan.fixed.items():
            qparams[group] = QParams(torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32))
        return qparams


def _note_outliers(observers: list[Observer], plan: QuantPlan) -> None:
    """Say where a few values are so much larger than the others that a scale for all rounds the others to zero."""
    found = [observer.where for observer in observers if observer.enabled and observer.vanishing() > _NEARLY_ALL]
    found.sort(key=lambda where: not where.startswith("input"))  # where what the user can do something about begins
    if found:
        where = f"{found[0]} and {counted(len(found) - 1, 'other')}" if len(found) > 1 else found[0]
        note = (
            f"{where}: all but 1 in {round(1 / (1 - _NEARLY_ALL)):,} values round to zero, as few are far larger; "
            f"look for outliers in the data, or choose observer='percentile:99.99'"
        )
        plan.notes = [*plan.notes, note]


def _remove_observers(module: QuantModule, plan: QuantPlan) -> None:
    names = set(plan.observer_nodes(module.graph))
    for node in list(module.graph.nodes):
        if node.name in names:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)


def _drop_observer_modules(module: QuantModule, plan: QuantPlan) -> None:
    for path in set(plan.observers.values()):
        module.delete_submodule(path)
    plan.observers.clear()


def _is_quantized(node: Node) -> bool:
    return len(node.users) == 1 and is_quantize(next(iter(node.users)))


def _quantize_activation(
    producer: Node,
    slots: list[Slot],
    qparams: QParams,
    plan: QuantPlan,
    nodes: dict[str, Node],
    averages: set[str],
) -> None:
    spec = plan.specs[slots[0]]
    scale, zero_point = qparams.item()
    graph = producer.graph
    with graph.inserting_after(producer):
        args = (producer, scale, zero_point, spec.quant_min, spec.quant_max, spec.dtype)
        target = QUANTIZE_AVERAGE if producer.name in averages else QUANTIZE
        q = graph.create_node("call_function", target, args, name=f"{producer.name}_q")
    with graph.inserting_after(q):
        dq = graph.create_node("call_function", DEQUANTIZE, (q, scale, zero_point), name=f"{producer.name}_dq")
    if producer.name in plan.facts:
        plan.facts[dq.name] = plan.facts[producer.name]
    if slots == [Slot(producer.name)]:
        producer.replace_all_uses_with(dq, delete_user_cb=lambda user: user is not q)
    else:
        for slot in slots:
            replace_argument(nodes[slot.node], slot.path, dq)


def _quantize_weight(
    points: dict[str, list[Slot]],
    qparams: QParams,
    module: QuantModule,
    plan: QuantPlan,
    nodes: dict[str, Node],
    same_tensor: dict[str, list[Node]],
) -> None:
    """Store a weight's integers and let its layers read them; ``points`` are the nodes that read the tensor."""
    spec = plan.specs[next(iter(points.values()))[0]]
    first = nodes[next(iter(points))]
    path = str(first.target)
    values = quantize(get_attribute(module, path).detach(), qparams, spec)
    if (
        path in plan.described
        or any(len(nodes[name].users) > len(slots) for name, slots in points.items())
        or _read_elsewhere(first, points, same_tensor)
    ):
        path = free_path(module, f"{path}_int8")  # something else still reads the float tensor, or its description
    set_tensor(module, path, values)
    before, after = plan.weight_bytes
    plan.weight_bytes = (before + 4 * values.numel(), after + values.numel() + 8 * qparams.scale.numel())
    if spec.ch_axis is not None:
        set_tensor(module, f"{path}_scale", qparams.scale)
        set_tensor(module, f"{path}_zero_point", qparams.zero_point)
    for name, slots in points.items():
        graph = nodes[name].graph
        with graph.inserting_before(nodes[name]):
            weight = graph.get_attr(path)
            if spec.ch_axis is None:
                dq = graph.call_function(DEQUANTIZE, (weight, *qparams.item()))
            else:
                scale, zero_point = graph.get_attr(f"{path}_scale"), graph.get_attr(f"{path}_zero_point")
                dq = graph.call_function(DEQUANTIZE_CHANNEL, (weight, scale, zero_point, spec.ch_axis))
        for slot in slots:
            replace_argument(nodes[slot.node], slot.path, dq)


def _get_attr_nodes(nodes: dict[str, Node]) -> dict[str, list[Node]]:
    """The nodes that read each path; collected once, because a look-up in the graph is a search."""
    found: dict[str, list[Node]] = defaultdict(list)
    for node in nodes.values():
        if node.op == "get_attr":
            found[str(node.target)].append(node)
    return found


def _read_elsewhere(weight: Node, points: dict[str, list[Slot]], same_tensor: dict[str, list[Node]]) -> bool:
    return any(node.name not in points and node.users for node in same_tensor[str(weight.target)])
