"""How long a call of a quantized model takes, beside the same graph in float."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx

from fxq.graph_module import QuantModule, get_attribute, make_module
from fxq.numerics import dequantize
from fxq.qdq import DEQUANTIZE_CHANNEL, is_dequantize, is_quantize
from fxq.spec import QParams

_CALLS, _CLEARLY = 8, 1.03  # to compare two functions; how much longer one must take to be the slower one


class Timing(NamedTuple):
    """Milliseconds a call: the minimum, which other work on the machine disturbs least, and the median."""

    minimum: float
    median: float
    calls: int


def measure(calls: Mapping[str, Callable[[], Any]], seconds: float, turn: float = 0.1) -> dict[str, Timing]:
    """Time several functions, which take turns so that a busy moment of the machine meets all of them.

    Args:
        calls: what to time, by name; each is called twice beforehand.
        seconds: for each of them.
        turn: seconds a function runs before the next one does.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
        call()
    while any(sum(taken) < seconds for taken in samples.values()):
        for name, call in calls.items():
            until = time.perf_counter() + turn
            while (start := time.perf_counter()) < until:
                call()
                samples[name].append(time.perf_counter() - start)
    return {
        name: Timing(1e3 * min(taken), 1e3 * statistics.median(taken), len(taken)) for name, taken in samples.items()
    }


def slower(call: Callable[[], object], other: Callable[[], object]) -> bool:
    """Whether a function takes longer than another: the shortest of some calls, which take turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(_CALLS):
        for run, taken in zip((call, other), times, strict=True):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    return min(times[0]) > _CLEARLY * min(times[1])


def float_graph(reference: QuantModule) -> fx.GraphModule:
    """The float model that a reference graph stands for, with its weights' real values and without rounding.

    A relu or clamp that quantization absorbed is a relu again, because in float it takes time.
    """
    graph, new, weights = fx.Graph(), dict[fx.Node, Any](), dict[str, torch.Tensor]()
    absorbing = {region.end for region in reference.plan.regions if region.absorbed}
    for node in reference.graph.nodes:
        if is_quantize(node):
            source = new[node.args[0]]
            new[node] = graph.call_function(torch.relu, (source,)) if node.args[0].name in absorbing else source
        elif is_dequantize(node) and is_quantize(node.args[0]):
            new[node] = new[node.args[0]]
        elif is_dequantize(node):
            weights[f"{node.name}_float"] = _weight(reference, node)
            new[node] = graph.get_attr(f"{node.name}_float")
        else:
            new[node] = graph.node_copy(node, new.__getitem__)
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    used = {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")} - weights.keys()
    parts = weights | {path: get_attribute(reference, path) for path in used}
    return make_module(f"{reference.plan.model}_float", graph, parts)


def _weight(reference: QuantModule, node: fx.Node) -> torch.Tensor:
    values = get_attribute(reference, str(node.args[0].target))  # type: ignore[union-attr]
    if node.target is DEQUANTIZE_CHANNEL:
        scale, zero_point = (get_attribute(reference, str(source.target)) for source in node.args[1:3])  # type: ignore
        return dequantize(values, QParams(scale, zero_point), node.args[3])  # type: ignore[arg-type]
    return dequantize(values, QParams(torch.tensor(node.args[1]), torch.tensor(node.args[2])))
