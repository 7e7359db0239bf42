"""The layers of a prepared model, each alone in int8, or some of them back in float.

Both are copies of the calibrated model in which layers were taken out of the plan. Converted, they show the other
layers as they will be: their inputs, weights and outputs on the integers they will have, at the scales that were
calibrated. So one calibration is enough for any number of such models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import nn
from tqdm import tqdm

from fxq.graph_module import BACKEND, QuantModule, copy_module
from fxq.observers import Observer
from fxq.op_table import Backend, Out
from fxq.partition import map_regions, regions_of
from fxq.pass_base import Pipeline
from fxq.passes.drop_islands import DropIslands
from fxq.plan import SENSITIVE, Region, Stage, float_decision


class Layer(NamedTuple):
    """One int8 kernel of a prepared model that computes new values: a conv, a linear, an add, ...

    Kernels that keep their input's scale (pools, reshapes, ...) are none: they go with what is around them.
    """

    path: str  # of the traced part it is in
    region: Region
    module: str  # path in the user's model

    @property
    def name(self) -> str:
        """The node of the graph that it starts with."""
        return self.region.nodes[0]


def layers_of(prepared: nn.Module) -> list[Layer]:
    """The layers of a prepared model, in order of execution."""
    found = []
    for path, module in regions_of(prepared, Stage.PREPARED).items():
        backend: Backend = module.meta[BACKEND]
        order = {node.name: at for at, node in enumerate(module.graph.nodes)}
        regions = [region for region in module.plan.regions if backend.row(region.row).out is not Out.SHARE]
        regions.sort(key=lambda region: order[region.nodes[0]])
        found += [Layer(path, region, module.plan.origin(region.nodes[0]).module_path) for region in regions]
    return found


def with_float(prepared: nn.Module, details: Mapping[Layer, str]) -> nn.Module:
    """A copy of a prepared model in which some layers stay float.

    Light ops that are left alone among float ones go with them.

    Args:
        prepared: with observers that have seen data, which the copy keeps.
        details: the layers, each with what the tables say of it.
    """

    def edit(path: str, clone: QuantModule) -> None:
        for layer, detail in details.items():
            if layer.path == path:
                clone.plan.make_float([layer.region], SENSITIVE)
                clone.plan.decisions[layer.name] = float_decision(SENSITIVE, detail)
        if details:
            Pipeline([DropIslands(clone.meta[BACKEND])])(clone)

    return _edited(prepared, edit)


def alone(prepared: nn.Module, layer: Layer) -> nn.Module:
    """A copy of a prepared model in which everything but one layer stays float."""

    def edit(path: str, clone: QuantModule) -> None:
        others = [r for r in clone.plan.regions if (path, r) != (layer.path, layer.region)]
        clone.plan.make_float(others, SENSITIVE)

    return _edited(prepared, edit)


def each_alone(
    prepared: nn.Module, measure: Callable[[nn.Module], float], *, show: bool
) -> list[tuple[Layer, float]]:
    """What ``measure`` says of the model with each layer alone in int8, in order of execution.

    Args:
        prepared: calibrated.
        measure: is given a prepared model, in which only the layer is left to be converted.
        show: show a progress bar.
    """
    bar = tqdm(layers_of(prepared), "layer by layer", disable=not show)
    return [(layer, measure(alone(prepared, layer))) for layer in bar]


def _edited(prepared: nn.Module, edit: Callable[[str, QuantModule], None]) -> nn.Module:
    paths = {id(module): path for path, module in regions_of(prepared, Stage.PREPARED).items()}

    def transform(module: QuantModule) -> QuantModule:
        _choose_ranges(module)
        clone = copy_module(module)
        edit(paths[id(module)], clone)
        return clone

    return map_regions(prepared, transform)


def _choose_ranges(module: QuantModule) -> None:
    """Let the observers search their ranges now: copies keep what was found."""
    for path in module.plan.observers.values():
        observer = module.get_submodule(path)
        if isinstance(observer, Observer) and observer.has_data:
            observer.range()
