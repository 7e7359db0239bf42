"""The fastest right kernel of each layer, found by trying."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fxq.api import as_inputs
from fxq.engine import available_engines
from fxq.graph_module import BACKEND, REFERENCE, QuantModule
from fxq.node_times import NodeTime, node_times
from fxq.partition import Inputs, map_regions, region_inputs, regions_of
from fxq.passes.lower import lower
from fxq.plan import Stage

_WORTH = 0.95  # of the first choice's time; what differs less is noise


def tune(qmodel: nn.Module, example_inputs: Any, *, runs: int = 30) -> nn.Module:
    """The same model with each conv and linear packed for the engine that runs it fastest on this machine.

    Engines differ by shape: one's depthwise kernel, another's small matrix products. Only those are tried that the
    backend's row says are right for the layer's weight, so the numbers stay within one integer of the reference graph;
    they are not those of ``qmodel`` bit for bit. Copies and pickles keep the choice, files of ``fxq.save`` do not:
    another machine may want another.

    Args:
        qmodel: lowered; in one piece or in regions; unchanged.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs, of the sizes that matter.
        runs: of the whole model with each engine; the shortest time of each layer counts.

    Raises:
        StageError: if the model is not lowered.

    Example:
        >>> qmodel = fxq.tune(qmodel, torch.rand(1, 3, 224, 224))                     # doctest: +SKIP
        >>> print(fxq.profile(qmodel, torch.rand(1, 3, 224, 224)))                    # doctest: +SKIP
    """
    regions_of(qmodel, Stage.LOWERED)
    seen = region_inputs(qmodel, as_inputs(example_inputs, qmodel))
    return map_regions(qmodel, lambda region: _tuned(region, seen[id(region)], runs) if id(region) in seen else region)


def _tuned(region: QuantModule, inputs: Inputs, runs: int) -> QuantModule:
    reference, table = region.meta[REFERENCE], region.meta[BACKEND]
    names = [node.name for node in reference.graph.nodes]
    variants = {"": lower(reference, table)}
    for engine in available_engines():
        variant = lower(reference, table, dict.fromkeys(names, engine))
        if all(kernels_of(variant) != kernels_of(other) for other in variants.values()):
            variants[engine] = variant
    times = dict(zip(variants, node_times(list(variants.values()), inputs, runs), strict=True))
    return lower(reference, table, fastest(variants, times))


def kernels_of(module: QuantModule) -> dict[str, str]:
    """The kernel of each node, with its engine."""
    return {name: kernel.name for name, kernel in module.plan.kernels.items()}


def fastest(
    variants: Mapping[str, QuantModule], times: Mapping[str, Mapping[str, NodeTime]]
) -> dict[str, str]:
    """For each node that an engine runs clearly faster than the first choice ``""``, that engine."""
    chosen: dict[str, str] = {}
    kernels = {engine: kernels_of(module) for engine, module in variants.items()}
    for name, first in times[""].items():
        best = first.seconds * _WORTH
        for engine, kernel_of in kernels.items():
            another = name in kernel_of and kernel_of[name] != kernels[""][name]
            if another and times[engine][name].seconds < best:
                chosen[name], best = engine, times[engine][name].seconds
    return chosen


