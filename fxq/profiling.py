"""Where the time of an int8 model goes, node by node."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from tabulate import tabulate
from torch import nn

from fxq.api import as_inputs
from fxq.graph_module import QuantModule
from fxq.node_times import node_times
from fxq.partition import Inputs, region_inputs, regions_of
from fxq.plan import Stage, Status

_WIDEST = 36  # columns


def profile_records(qmodel: nn.Module, example_inputs: Any, *, runs: int = 30) -> list[dict[str, Any]]:
    """One record for each call node of a lowered model, in order.

    Args:
        qmodel: lowered; in one piece or in regions.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs.
        runs: of the whole model; the shortest time of each node counts.

    Returns:
        Dicts with the keys ``node``, ``region``, ``kernel``, ``shape`` (of the output at preparation),
        ``milliseconds``, ``share`` (of the sum over all nodes), ``macs`` and ``gmacs_per_second``.

    Raises:
        StageError: if the model is not lowered.
    """
    regions = regions_of(qmodel, Stage.LOWERED)
    seen = region_inputs(qmodel, as_inputs(example_inputs, qmodel))
    records = [
        record
        for path, region in regions.items()
        if id(region) in seen
        for record in _region_records(path, region, seen[id(region)], runs)
    ]
    total = sum(record["milliseconds"] for record in records)
    return [record | {"share": record["milliseconds"] / total} for record in records]


def _region_records(path: str, region: QuantModule, inputs: Inputs, runs: int) -> list[dict[str, Any]]:
    plan = region.plan
    (times,) = node_times([region], inputs, runs)
    return [
        {
            "node": name,
            "region": path,
            "kernel": plan.kernels[name].name if name in plan.kernels else _without_kernel(name, region),
            "shape": plan.facts[name].shape if name in plan.facts else None,
            "milliseconds": seconds * 1e3,
            "macs": macs,
            "gmacs_per_second": macs / seconds / 1e9,
        }
        for name, (seconds, macs) in times.items()
    ]


def _without_kernel(name: str, region: QuantModule) -> str:
    decision = region.plan.decisions.get(name)
    return "float" if decision is not None and decision.status is Status.FLOAT else "shape"


def profile(qmodel: nn.Module, example_inputs: Any, *, runs: int = 30, rows: int = 20) -> str:
    """Two tables: the time by kernel, and the slowest nodes with their share, work and rate.

    The times are of the nodes alone. The Python between them comes on top, which :func:`fxq.freeze` spares.

    Args:
        qmodel, example_inputs, runs: as for :func:`profile_records`.
        rows: how many nodes are listed, the slowest first.

    Raises:
        StageError: if the model is not lowered.

    Example:
        >>> print(fxq.profile(qmodel, torch.rand(1, 3, 224, 224)))                    # doctest: +SKIP
    """
    records = profile_records(qmodel, example_inputs, runs=runs)
    slowest = sorted(records, key=lambda record: -record["milliseconds"])[:rows]
    lines = [
        [
            f"{record['region']}.{record['node']}".lstrip("."),
            record["kernel"],
            "x".join(map(str, record["shape"] or ())),
            *_amounts(record["milliseconds"], record["share"], record["macs"]),
        ]
        for record in slowest
    ]
    headers = ["node", "kernel", "shape", "ms", "share", "MMAC", "GMAC/s"]
    return f"{_by_kernel(records)}\n\n{_table(lines, headers, 3)}"


def _by_kernel(records: list[dict[str, Any]]) -> str:
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["kernel"]].append(record)
    groups = dict(sorted(groups.items(), key=lambda item: -sum(r["milliseconds"] for r in item[1])))
    groups["all"] = records
    lines = []
    for kernel, members in groups.items():
        ms, share, macs = (sum(record[key] for record in members) for key in ("milliseconds", "share", "macs"))
        lines.append([kernel, len(members), *_amounts(ms, share, macs)])
    return _table(lines, ["kernel", "nodes", "ms", "share", "MMAC", "GMAC/s"], 1)


def _table(lines: list[list[Any]], headers: list[str], words: int) -> str:
    """Rows as text, the first ``words`` columns to the left and the numbers to the right."""
    aligned = ["left" if column < words else "right" for column in range(len(headers))]
    return tabulate(lines, headers, disable_numparse=True, maxcolwidths=[_WIDEST] * words, colalign=aligned)


def _amounts(milliseconds: float, share: float, macs: int) -> list[str]:
    work = [f"{macs / 1e6:,.1f}", f"{macs / milliseconds / 1e6:.1f}"] if macs else ["", ""]
    return [f"{milliseconds:.3f}", f"{share:.1%}", *work]
