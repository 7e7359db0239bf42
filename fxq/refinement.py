"""Changing the constants of a reference graph after conversion: what bias correction and learned rounding share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from fxq.calibration import ForwardFn
from fxq.errors import StageError
from fxq.graph_module import BACKEND, QuantModule, copy_module
from fxq.lockstep import region_inputs
from fxq.partition import Inputs, map_regions, regions_of
from fxq.pass_base import Pipeline
from fxq.passes.round_biases import RoundBiases
from fxq.plan import Stage

SAMPLES = 64  # of the calibration data, for corrections

Refinement = Callable[[QuantModule, QuantModule, Sequence[Inputs]], None]


def refine(
    reference: nn.Module,
    prepared: nn.Module,
    change: Refinement,
    data: Iterable[Any] | None = None,
    *,
    samples: int = 1,
    forward_fn: ForwardFn | None = None,
) -> nn.Module:
    """A copy of a reference graph, changed region by region.

    Args:
        change: ``change(reference region, prepared region, inputs)`` writes into the first; the inputs are those of
            the float model, none without data.
        data, samples, forward_fn: as for :func:`fxq.lockstep.region_inputs`.

    Raises:
        StageError: if the two are not a reference graph and the prepared model it came from.
    """
    floats = regions_of(prepared, Stage.PREPARED)
    paths = {id(region): path for path, region in regions_of(reference, Stage.REFERENCE).items()}
    if set(paths.values()) != floats.keys() or any(BACKEND not in r.meta for r in regions_of(reference).values()):
        raise StageError("the reference graph is not of this prepared model; give fxq.convert_to_reference(prepared)")
    calls: dict[str, list[Inputs]] = {}
    if data is not None:
        calls = region_inputs(prepared, data, samples=samples, forward_fn=forward_fn)

    def changed(region: QuantModule) -> QuantModule:
        clone = copy_module(region)
        path = paths[id(region)]
        change(clone, floats[path], calls.get(path, []))
        settle(clone)
        return clone

    return map_regions(reference, changed)


def settle(reference: QuantModule) -> None:
    """Finish a graph whose constants were changed: biases go back to their grid, and those that nobody reads go."""
    reference.graph.eliminate_dead_code()
    Pipeline([RoundBiases()])(reference)
    reference.release_unused()
