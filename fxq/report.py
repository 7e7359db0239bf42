"""The printed tables. Each is readable at 120 columns and comes from the records and the plan alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from tabulate import tabulate
from torch import nn

from fxq.backends import BACKENDS, get_backend
from fxq.engine import available_engines
from fxq.graph_module import QuantModule
from fxq.op_table import Backend, Fixed, OpRow, Weights
from fxq.partition import Partition, left_in, partition_of, regions_of
from fxq.plan import SENSITIVE, Stage
from fxq.records import graph_records, observer_records

_WHOLE = "(the model)"
_HEAVY = ("conv", "linear")
_KEPT = f"{SENSITIVE.text}: "


def table(rows: list[list[Any]], headers: list[str], widths: list[int | None]) -> str:
    """Rows as text; ``widths`` are the most columns of each cell, ``None`` for any."""
    if not rows:
        return tabulate([["(none)"]], headers[:1])
    return tabulate(rows, headers, tablefmt="simple", maxcolwidths=widths, disable_numparse=True)


def summary(model: nn.Module) -> str:
    """The whole result at a glance: what is int8, what is float and why, and the choices made.

    Args:
        model: prepared, reference or lowered.

    Example:
        >>> print(fxq.summary(qmodel))                                                # doctest: +SKIP
    """
    regions = regions_of(model)
    plan = next(iter(regions.values())).plan
    partition = partition_of(model)
    records = graph_records(model)
    conversions = Counter(record["kernel"] for record in records)
    operations = [r for r in records if r["op"] not in ("quantize", "dequantize") and r["type"] != "shape"]
    heavy = [r for r in operations if _is_heavy(r)]
    rows: list[list[Any]] = [
        ["model", type(model).__name__ if partition else plan.model],
        ["stage", plan.stage.value],
        ["backend", plan.backend],
        ["operations in int8", _share(operations)],
        ["convs and linears in int8", _share(heavy)],
        ["multiply-accumulates in int8", _share_of_macs(records, partition.left_macs if partition else 0)],
    ]
    if plan.stage is Stage.LOWERED:
        quantizes = sum(count for name, count in conversions.items() if name.startswith("quantize_per_tensor"))
        rows.append(["quantize / dequantize nodes", f"{quantizes} / {conversions['dequantize']}"])
    if partition is not None:
        rows.insert(1, ["regions", f"{len(regions)}: the model cannot be traced as a whole, these parts of it can"])
    elif len(regions) > 1:
        rows.insert(1, ["regions", f"{len(regions)}: the model, and parts of the modules in it that cannot be traced"])
    before, after = (sum(region.plan.weight_bytes[i] for region in regions.values()) for i in (0, 1))
    if before:
        rows.append(["quantized weights", f"{_size(before)} float -> {_size(after)} int8"])
    rows += [["note", note] for note in plan.notes]
    text = tabulate(rows, tablefmt="plain", maxcolwidths=[None, 85])
    reasons = Counter(r["reason"].partition(":")[0] for r in operations if r["type"] == "float")
    if reasons:
        text += "\n\n" + table([[n, why] for why, n in reasons.most_common()], ["float nodes", "reason"], [None, 90])
    kept = [[r["node"], r["op"], r["reason"].removeprefix(_KEPT)] for r in records if r["reason"].startswith(_KEPT)]
    if kept:
        text += "\n\n" + table(kept, [SENSITIVE.text, "op", "what it costs"], [36, 18, 60])
    if partition is not None or len(regions) > 1:
        text += "\n\n" + _partition_table(model, regions, partition)
    return text


def _partition_table(model: nn.Module, regions: Mapping[str, QuantModule], partition: Partition | None) -> str:
    rows = [[path or _WHOLE, region.plan.model, "int8 region", ""] for path, region in regions.items()]
    rows += [[path, "", "float", why] for path, why in left_in(model).items()]
    if partition is not None:
        rows.append([_WHOLE, "", "as it was", partition.reason])
    return table(rows, ["module", "type", "became", "because"], [30, 24, None, 50])


def _is_heavy(record: dict[str, Any]) -> bool:
    return str(record["op"]).lower().startswith(_HEAVY)


def _share(records: list[dict[str, Any]]) -> str:
    int8 = sum(record["type"] == "int8" for record in records)
    return f"{int8} of {len(records)}"


def _size(count: float) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.2f} KiB"


def _share_of_macs(records: list[dict[str, Any]], left: int) -> str:
    total = left + sum(record["macs"] for record in records)
    int8 = sum(record["macs"] for record in records if record["type"] == "int8")
    count = f"{total / 1e6:,.1f} million" if total >= 1e5 else f"{total:,}"
    return f"{100 * int8 / total:.1f}% of {count} with the example inputs" if total else "none"


def graph_table(model: nn.Module) -> str:
    """Every call node in order: op, int8 or float, kernel or the reason for float, scale, zero_point, shape.

    Args:
        model: prepared, reference or lowered.
    """
    return _by_region(graph_records(model), _graph_table)


def _by_region(records: list[dict[str, Any]], table: Callable[[list[dict[str, Any]]], str]) -> str:
    """One table; for a model of several regions one a region, under its path."""
    regions: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        regions.setdefault(record["region"], []).append(record)
    if len(regions) < 2 and "" in regions:
        return table(records)
    return "\n\n".join(f"region {path or _WHOLE}\n\n{table(part)}" for path, part in regions.items())


def _graph_table(records: list[dict[str, Any]]) -> str:
    rows = [
        [
            record["node"],
            record["op"],
            record["type"],
            record["reason"] or record["kernel"],
            _number(record["scale"]),
            "" if record["zero_point"] is None else record["zero_point"],
            "x".join(map(str, record["shape"])) if record["shape"] else "",
        ]
        for record in records
    ]
    headers = ["node", "op", "type", "kernel, or why float", "scale", "zp", "shape"]
    return table(rows, headers, [24, 18, None, 31, None, None, 17])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def observer_table(prepared: nn.Module) -> str:
    """What each observer of a prepared model saw, the qparams that follow, and which nodes share them.

    Raises:
        StageError: if the model is not prepared.
    """
    return _by_region(observer_records(prepared), _observer_table)


def _observer_table(records: list[dict[str, Any]]) -> str:
    rows = [
        [
            ", ".join(record["watches"]),
            record["spec"],
            record["batches"],
            _span(record["min"], min),
            _span(record["max"], max),
            _range(record["scale"]),
            _range(record["zero_point"]),
            _some(record["shared_by"]),
        ]
        for record in records
    ]
    headers = ["watches", "spec", "batches", "min", "max", "scale", "zp", "shared by"]
    return table(rows, headers, [21, 18, None, None, None, None, None, 21])


def _span(values: list[float] | None, extreme: Any) -> str:
    return "" if values is None else f"{extreme(values):.4g}"


def _range(values: list[float] | None) -> str:
    if values is None:
        return "no data"
    low, high = min(values), max(values)
    return f"{low:.3g}" if low == high else f"{low:.1g}..{high:.1g}"


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def fusion_table(model: nn.Module) -> str:
    """What was folded, fused and dropped, and into what.

    Args:
        model: prepared, reference or lowered.
    """
    rows = [[f.action, f.what, f.into, f.detail] for region in regions_of(model).values() for f in region.plan.fusions]
    return table(rows, ["action", "what", "into", "how"], [None, 36, 36, 36])


def backends() -> str:
    """The backends, their engine, whether this torch has it, and the bit widths chosen for this CPU."""
    rows = []
    for name in BACKENDS:
        backend = get_backend(name)
        available = "yes" if backend.engine in available_engines() else "no: not in this torch"
        bits = f"{backend.activation.bits} / {backend.weight.bits}"
        rows.append([name, backend.engine, available, bits, len(backend.rows), "; ".join(backend.notes)])
    headers = ["backend", "engine", "available", "act / weight bits", "rows", "why"]
    return table(rows, headers, [None, None, 12, 14, None, 52])


def backend_table(backend: str | Backend) -> str:
    """What a backend can run: one line a row, then what it cannot and why.

    Args:
        backend: a name or a table.

    Raises:
        BackendError: for an unknown backend.
    """
    backend = get_backend(backend) if isinstance(backend, str) else backend
    rows = [
        [row.name, row.op.name, _tail(row), _output(row), _weights(row), row.emit.kernel] for row in backend.rows
    ]
    headers = ["row", "op", "fused after it", "output qparams", "weight", "kernel"]
    text = table(rows, headers, [18, 18, 14, 17, 12, 29])
    absent = [[op.name, reason.text] for op, reason in backend.absent.items()]
    return text + "\n\n" + table(absent, ["not in int8", "why"], [None, 90])


def _tail(row: OpRow) -> str:
    return " ".join(
        f"[{'|'.join(op.name for op in step.ops)}]" if step.optional else "|".join(op.name for op in step.ops)
        for step in row.steps
    )


def _output(row: OpRow) -> str:
    if isinstance(row.out, Fixed):
        return f"fixed {row.out.scale:.4g}, {row.out.zero_point}"
    return {"own": "own", "share": "its input's"}[row.out.value]


def _weights(row: OpRow) -> str:
    names = {Weights.TENSOR: "per tensor", Weights.CHANNEL: "per channel"}
    return ", ".join(name for flag, name in names.items() if row.weight & flag)
