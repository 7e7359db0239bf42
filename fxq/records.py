"""What is known of a quantized model as plain records, one a node: the source of every table and export."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Node

from fxq.graph_module import QuantModule
from fxq.observers import Observer
from fxq.partition import regions_of
from fxq.plan import Decision, QuantPlan, Region, Slot, Stage, Status

_TYPES = {Status.QUANTIZED: "int8", Status.SHARED: "int8", Status.SHAPE_ONLY: "shape", Status.FLOAT: "float"}


def graph_records(model: nn.Module) -> list[dict[str, Any]]:
    """One record for each call node of a prepared, reference or lowered model, in order of execution.

    Returns:
        Dicts with the keys ``node``, ``op``, ``type`` (``"int8"``, ``"float"``, ``"shape"``), ``kernel``, ``scale``,
        ``zero_point``, ``shape``, ``macs`` (multiply-accumulates), ``reason`` (why it is float), ``module`` (path in
        the model), ``inputs`` and ``region`` (path of the traced part, ``""`` for a model traced as a whole).

    Raises:
        StageError: if the model was not made by fxq.

    Example:
        >>> [r["node"] for r in fxq.graph_records(qmodel) if r["type"] == "float"]    # doctest: +SKIP
    """
    return [record for path, region in regions_of(model).items() for record in _region_records(path, region)]


def _region_records(path: str, model: QuantModule) -> list[dict[str, Any]]:
    plan = model.plan
    hidden = set(plan.observer_nodes(model.graph))
    regions = {region.nodes[0]: region for region in plan.regions}
    return [
        {"region": path} | _record(node, model, plan, regions.get(node.name))
        for node in model.graph.nodes
        if node.op.startswith("call_") and node.name not in hidden
    ]


def _record(node: Node, model: QuantModule, plan: QuantPlan, region: Region | None) -> dict[str, Any]:
    decision = plan.decisions.get(node.name)
    kernel = plan.kernels.get(node.name)
    scale, zero_point = _qparams(node, region, model, plan)
    fact = plan.facts.get(node.name)
    reason = ""
    if decision is not None and decision.reason is not None:
        reason = decision.reason.text + (f": {decision.detail}" if decision.detail else "")
    return {
        "node": node.name,
        "op": _op_name(node, plan, region),
        "type": _TYPES[decision.status] if decision else "int8",
        "kernel": kernel.name if kernel else _planned_kernel(decision),
        "scale": scale,
        "zero_point": zero_point,
        "shape": fact.shape if fact else None,
        "macs": plan.macs.get(node.name, 0),
        "reason": reason,
        "module": plan.origin(node.name).module_path,
        "inputs": [producer.name for producer in node.all_input_nodes if producer.op != "get_attr"],
    }


def _planned_kernel(decision: Decision | None) -> str:
    """Before lowering, the row that a node will become, or what it will be fused into."""
    return "" if decision is None or decision.row is None else decision.detail or decision.row


def _op_name(node: Node, plan: QuantPlan, region: Region | None) -> str:
    kernel = plan.kernels.get(node.name)
    decision = plan.decisions.get(node.name)
    if kernel is not None and decision is not None:
        return " + ".join((decision.row or "", *kernel.fused))
    if region is not None:
        tail = (*region.nodes[1:], *region.absorbed)
        return " + ".join((region.row, *(plan.origin(name).kind.rpartition(".")[2] for name in tail)))
    return plan.origin(node.name).kind.rpartition(".")[2] or str(getattr(node.target, "__name__", node.target))


def _qparams(
    node: Node, region: Region | None, model: QuantModule, plan: QuantPlan
) -> tuple[float | None, int | None]:
    kernel = plan.kernels.get(node.name)
    if kernel is not None:
        return kernel.scale, kernel.zero_point
    group = plan.groups.get(Slot(region.end if region else node.name))
    if group in plan.fixed:
        return plan.fixed[group]
    if plan.stage is Stage.PREPARED and group in plan.observers:
        observer = model.get_submodule(plan.observers[group])
        if isinstance(observer, Observer) and observer.has_data:
            return observer.qparams().item()
    if plan.stage is Stage.REFERENCE:
        quantize = next((user for user in node.users if user.name == f"{node.name}_q"), None)
        if quantize is not None:
            return quantize.args[1], quantize.args[2]  # type: ignore[return-value]
    return None, None


def observer_records(prepared: nn.Module) -> list[dict[str, Any]]:
    """One record for each observer of a prepared model.

    Returns:
        Dicts with the keys ``observer``, ``watches`` (nodes whose values it sees), ``spec``, ``batches``, ``min``,
        ``max``, ``scale``, ``zero_point`` (lists for per-channel weights, ``None`` before any data), ``shared_by``
        (other nodes that will have its scale and zero_point) and ``region``.

    Raises:
        StageError: if the model is not prepared.
    """
    regions = regions_of(prepared, Stage.PREPARED)
    return [record for path, region in regions.items() for record in _region_observer_records(path, region)]


def _region_observer_records(region: str, prepared: QuantModule) -> list[dict[str, Any]]:
    plan = prepared.plan
    watched: dict[str, list[str]] = {}
    for node in prepared.graph.nodes:
        if node.op == "call_module" and node.target in plan.observers.values():
            watched.setdefault(str(node.target), []).append(node.args[0].name)
    members: dict[int, list[str]] = {}
    for slot, group in plan.groups.items():
        members.setdefault(group, []).append(slot.node)
    return [
        {"region": region} | _observer_record(prepared, path, watched.get(path, []), members.get(group, []))
        for group, path in plan.observers.items()
    ]


def _observer_record(prepared: QuantModule, path: str, watches: list[str], members: list[str]) -> dict[str, Any]:
    observer = prepared.get_submodule(path)
    assert isinstance(observer, Observer)
    record: dict[str, Any] = {
        "observer": path,
        "watches": watches,
        "spec": str(observer.spec),
        "batches": observer.batches,
        "min": None,
        "max": None,
        "scale": None,
        "zero_point": None,
        "shared_by": [name for name in dict.fromkeys(members) if name not in watches],
    }
    if observer.has_data:
        qparams = observer.qparams()
        record |= {
            "min": observer.statistics.low.tolist(),
            "max": observer.statistics.high.tolist(),
            "scale": qparams.scale.tolist(),
            "zero_point": qparams.zero_point.tolist(),
        }
    return record
