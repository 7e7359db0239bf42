"""A reference graph's plan as JSON, and back, with every value checked against its annotation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxq.errors import ConfigError, FileFormatError
from fxq.graph_json import DTYPES, decode_value, encode_value
from fxq.plan import (
    Absorbed,
    Decision,
    Equalized,
    Fusion,
    Origin,
    QuantPlan,
    Reason,
    Region,
    Slot,
    Stage,
    Status,
    TensorFact,
)
from fxq.qdq import DEQUANTIZE, is_quantize
from fxq.schema import wrong_field
from fxq.spec import QuantSpec


def encode_plan(plan: QuantPlan) -> dict[str, Any]:
    """A reference graph's plan as JSON values."""
    return {
        "backend": plan.backend,
        "stage": plan.stage.value,
        "model": plan.model,
        "properties": sorted(plan.properties),
        "specs": [[slot.node, list(slot.path), _encode_spec(spec)] for slot, spec in plan.specs.items()],
        "groups": [[slot.node, list(slot.path), group] for slot, group in plan.groups.items()],
        "fixed": [[group, *pair] for group, pair in plan.fixed.items()],
        "regions": [[r.row, list(r.nodes), list(r.absorbed)] for r in plan.regions],
        "decisions": {name: _encode_decision(decision) for name, decision in plan.decisions.items()},
        "origins": {name: [origin.module_path, origin.kind] for name, origin in plan.origins.items()},
        "facts": _encode_facts(plan.facts),
        "containers": sorted(plan.containers),
        "fusions": [dataclasses.astuple(fusion) for fusion in plan.fusions],
        "notes": plan.notes,
        "macs": plan.macs,
        "attributes": encode_value(plan.attributes, "(attributes)"),
        "described": _encode_facts(plan.described),
        "weight_bytes": list(plan.weight_bytes),
        "untraceable": plan.untraceable,
        "equalized": [[first, second, list(scale)] for first, second, scale in plan.equalized],
        "absorbed": [[first, second, list(shift)] for first, second, shift in plan.absorbed],
    }


def _encode_facts(facts: Mapping[str, TensorFact]) -> dict[str, Any]:
    return {name: [list(fact.shape), str(fact.dtype).removeprefix("torch.")] for name, fact in facts.items()}


def _decode_facts(record: Mapping[str, Any]) -> dict[str, TensorFact]:
    return {name: TensorFact(tuple(shape), DTYPES[dtype]) for name, (shape, dtype) in record.items()}


def _encode_spec(spec: QuantSpec) -> dict[str, Any]:
    fields = dataclasses.asdict(spec)
    return fields | {"dtype": str(spec.dtype).removeprefix("torch.")}


def _encode_decision(decision: Decision) -> list[Any]:
    reason = None if decision.reason is None else [decision.reason.code, decision.reason.text]
    return [decision.status.value, decision.row, reason, decision.detail]


def decode_plan(record: dict[str, Any]) -> QuantPlan:
    """A plan from what :func:`encode_plan` made.

    Raises:
        FileFormatError, KeyError, TypeError, ValueError: for anything else.
    """
    plan = QuantPlan(
        backend=record["backend"],
        stage=Stage(record["stage"]),
        model=record["model"],
        properties=set(_list(record["properties"])),
        specs={Slot(node, tuple(path)): _decode_spec(spec) for node, path, spec in record["specs"]},
        groups={Slot(node, tuple(path)): group for node, path, group in record["groups"]},
        fixed={group: (scale, zero_point) for group, scale, zero_point in record["fixed"]},
        regions=[Region(row, tuple(nodes), tuple(absorbed)) for row, nodes, absorbed in record["regions"]],
        decisions={name: _decode_decision(*parts) for name, parts in record["decisions"].items()},
        origins={name: Origin(*parts) for name, parts in record["origins"].items()},
        facts=_decode_facts(record["facts"]),
        containers=set(_list(record["containers"])),
        fusions=[Fusion(*parts) for parts in record["fusions"]],
        notes=_list(record["notes"]),
        macs=dict(record["macs"]),
        attributes=decode_value(record["attributes"], {}),
        described=_decode_facts(record.get("described", {})),  # files of before have none
        weight_bytes=(record["weight_bytes"][0], record["weight_bytes"][1]),
        untraceable=dict(record["untraceable"]),
        equalized=[Equalized(first, second, tuple(scale)) for first, second, scale in record["equalized"]],
        absorbed=[Absorbed(first, second, tuple(shift)) for first, second, shift in record["absorbed"]],
    )
    wrong = wrong_field(plan)
    if wrong is not None:
        raise FileFormatError(f"the plan's '{wrong}' has a value of the wrong type")
    return plan


def check_loaded(plan: QuantPlan, graph: fx.Graph) -> None:
    """Verify what is true of every reference graph's plan, beyond :meth:`QuantPlan.check`.

    Raises:
        FileFormatError: naming what is not.
    """
    if plan.stage is not Stage.REFERENCE:
        raise FileFormatError(f"the plan is of a {plan.stage.value} graph; a file holds a reference graph")
    if "annotated" not in plan.properties:
        raise FileFormatError("the plan has no decisions")
    check_conversions(graph)
    calls = {node.name for node in graph.nodes if node.op.startswith("call_")}
    for region in plan.regions:
        if not region.nodes or not calls.issuperset(region.nodes):
            raise FileFormatError(f"the plan's region '{region.row}' is of nodes that the graph does not have")


def check_conversions(graph: fx.Graph) -> None:
    """Verify the numbers of a graph's quantize and dequantize nodes, which kernels take on trust.

    Raises:
        FileFormatError: naming the node.
    """
    for node in graph.nodes:
        if is_quantize(node) and len(node.args) == 6:
            scale, zero_point, low, high, dtype = node.args[1:]
        elif node.target is DEQUANTIZE and len(node.args) == 3:
            (scale, zero_point), (low, high, dtype) = node.args[1:], (-128, 255, torch.int8)
        elif is_quantize(node) or node.target is DEQUANTIZE:
            raise FileFormatError(f"node '{node.name}' has {len(node.args)} arguments")
        else:
            continue
        limits = {torch.uint8: (0, 255), torch.int8: (-128, 127 if is_quantize(node) else 255)}.get(dtype, (1, 0))
        integers = all(type(number) is int for number in (zero_point, low, high))
        real = type(scale) is float and math.isfinite(scale) and scale > 0
        if node.kwargs or not (real and integers and limits[0] <= low <= high <= limits[1]):
            raise FileFormatError(f"node '{node.name}' has no valid scale, zero_point and bounds")
        if not limits[0] <= zero_point <= limits[1]:
            raise FileFormatError(f"the zero_point {zero_point} of node '{node.name}' is none of its integers")


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"a {type(value).__name__} where a list is due")
    return value


def _decode_spec(record: dict[str, Any]) -> QuantSpec:
    try:
        return QuantSpec(**(record | {"dtype": DTYPES[record["dtype"]]}))
    except ConfigError as error:
        raise FileFormatError(str(error)) from error


def _decode_decision(status: str, row: str | None, reason: list[str] | None, detail: str) -> Decision:
    return Decision(Status(status), row, None if reason is None else Reason(*reason), detail)
