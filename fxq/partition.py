"""Models that cannot be traced as a whole: their largest traceable submodules are quantized in place.

A detection model loops over images and boxes, but its backbone and heads are plain networks. Each of these
becomes a *region*, a :class:`~fxq.graph_module.QuantModule` in the place of the submodule, in a copy of the model
that is called like the original. Regions are prepared with the inputs they really get when the whole model runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fxq.copying import copy_structure
from fxq.errors import ConfigError, FxqError, InputError, StageError, TraceError
from fxq.graph_module import REFERENCE, QuantModule
from fxq.macs import counting
from fxq.plan import Stage

Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]
PrepareRegion = Callable[[nn.Module, Inputs, str], QuantModule]

_ATTRIBUTE = "_fxq_partition"


@dataclass(frozen=True)
class Partition:
    """What is known of a partitioned model.

    Attributes:
        reason: why it cannot be traced as a whole.
        left: why other submodules with weights stay float.
        left_macs: their multiply-accumulates with the example inputs.
    """

    reason: str
    left: dict[str, str] = field(default_factory=dict)
    left_macs: int = 0


def partition_of(model: nn.Module) -> Partition | None:
    """The partition of a model that was quantized in regions, else ``None``."""
    return model.__dict__.get(_ATTRIBUTE)


def regions_of(model: nn.Module, *stages: Stage) -> dict[str, QuantModule]:
    """The regions of a model by module path; a model that is one region is at path ``""``.

    Raises:
        StageError: if the model was not made by fxq or is at none of ``stages``.
    """
    if isinstance(model, QuantModule):
        regions = {"": model}
    elif partition_of(model) is not None:
        regions = {path: module for path, module in model.named_modules() if isinstance(module, QuantModule)}
    else:
        raise StageError(
            f"{type(model).__name__} was not made by fxq; start with fxq.prepare(model, example_inputs) "
            f"or fxq.quantize(model, data)"
        )
    for region in regions.values():
        if stages and region.plan.stage not in stages:
            wanted = " or ".join(stage.value for stage in stages)
            raise StageError(f"this model is {region.plan.stage.value}, but a {wanted} one is needed here")
    return regions


def map_regions(model: nn.Module, transform: Callable[[QuantModule], nn.Module]) -> nn.Module:
    """A copy of a model with each region replaced by what ``transform`` makes of it."""
    if isinstance(model, QuantModule):
        return transform(model)
    replaced: dict[int, Any] = {id(region): transform(region) for region in regions_of(model).values()}
    return copy_structure(model, replaced)


def region_inputs(model: nn.Module, inputs: Inputs) -> dict[int, Inputs]:
    """What each region is called with first when the whole model runs on ``inputs``, by the region's id."""
    if isinstance(model, QuantModule):
        return {id(model): inputs}
    seen: dict[int, Inputs] = {}

    def record(region: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.setdefault(id(region), (args, kwargs))

    handles = [region.register_forward_pre_hook(record, with_kwargs=True) for region in regions_of(model).values()]
    try:
        with torch.no_grad():
            model(*inputs[0], **inputs[1])
    finally:
        for handle in handles:
            handle.remove()
    return seen


def reference_of(model: nn.Module) -> nn.Module:
    """The reference graph of a model: itself, or what it was lowered from.

    A lowered model keeps it (integer weights, no float ones), because packed weights cannot be read back: saving,
    exporting, comparing and lowering again start from it.

    Args:
        model: reference or lowered; one region or many.

    Raises:
        StageError: if ``model`` was not made by fxq, or is only prepared.
    """
    regions_of(model, Stage.REFERENCE, Stage.LOWERED)
    return map_regions(model, lambda region: region.meta.get(REFERENCE, region))


def state_outside(model: nn.Module) -> dict[str, Any]:
    """The part of a partitioned model's state dict that is not its regions'."""
    inside = tuple(f"{p}." for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, QuantModule))
    return {name: value for name, value in model.state_dict().items() if not name.startswith(inside)}


def replace_regions(
    model: nn.Module, regions: Mapping[str, QuantModule], partition: Partition, outside: Mapping[str, torch.Tensor]
) -> nn.Module:
    """A copy of a float model with regions in the places of submodules, and with the tensors of ``outside``.

    Raises:
        ConfigError: if the model is not the one that was partitioned.
    """
    replaced: dict[int, Any] = {}
    for path, region in regions.items():
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise ConfigError(f"the given model has no module '{path}'") from None
        if type(module).__name__ != region.plan.model:
            raise ConfigError(f"'{path}' is a {type(module).__name__} of the given model, not a {region.plan.model}")
        replaced[id(module)] = region
    clone = copy_structure(model, replaced).eval()
    clone.__dict__[_ATTRIBUTE] = partition
    state = state_outside(clone)
    shapes, wanted = ({name: (t.shape, t.dtype) for name, t in tensors.items()} for tensors in (state, outside))
    if shapes != wanted:
        name = next(name for name in shapes | wanted if shapes.get(name) != wanted.get(name))
        raise ConfigError(f"the given model's '{name}' is not the one of the model that was quantized")
    for name, tensor in state.items():
        tensor.copy_(outside[name])
    return clone


def prepare_partition(
    model: nn.Module, inputs: Inputs, reason: TraceError, prepare_region: PrepareRegion
) -> nn.Module:
    """Prepare the largest traceable submodules of a model.

    Args:
        model: left as it is; what is prepared is its eval mode.
        inputs: example inputs of the whole model.
        reason: why the whole cannot be traced.
        prepare_region: prepares one submodule from its inputs and path; TraceError sends the search inside it.

    Raises:
        TraceError: ``reason``, if no submodule with weights can be traced either.
        InputError: if the model fails on the example inputs.
    """
    clone = copy_structure(model, {}).eval()
    seen, macs = _first_inputs(clone, inputs)
    left: dict[str, str] = {}
    _Search(clone, seen, left, prepare_region).inside(clone, "")
    regions = [path for path, module in clone.named_modules() if isinstance(module, QuantModule)]
    if not regions:
        raise reason
    inside = tuple(f"{path}." for path in regions)
    left_macs = sum(count for path, count in macs.items() if not f"{path}.".startswith(inside))
    clone.__dict__[_ATTRIBUTE] = Partition(reason.statement, left, left_macs)
    return clone


def _first_inputs(model: nn.Module, inputs: Inputs) -> tuple[dict[str, Inputs], dict[str, int]]:
    """The inputs of each submodule's first call when the model runs on its example inputs, and each layer's work."""
    seen: dict[str, Inputs] = {}
    handles = []
    for path, module in model.named_modules():

        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
            seen.setdefault(path, (args, kwargs))

        handles.append(module.register_forward_pre_hook(record, with_kwargs=True))
    try:
        with torch.no_grad(), counting(model) as macs:
            model(*inputs[0], **inputs[1])
    except FxqError:
        raise
    except Exception as error:
        raise InputError(f"the model fails on the example inputs: {type(error).__name__}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    return seen, macs


class _Search:
    """Looks for the largest submodules that can be prepared, and puts what they become in their places.

    Args:
        root: the copy of the model that is changed.
        seen: inputs of the submodules that run, by path.
        left: gets the reason for each submodule that stays.
    """

    def __init__(
        self, root: nn.Module, seen: Mapping[str, Inputs], left: dict[str, str], prepare_region: PrepareRegion
    ) -> None:
        self.seen, self.left, self.prepare_region = seen, left, prepare_region
        self.first_path = {id(module): path for path, module in root.named_modules()}
        self.done: dict[int, tuple[nn.Module, QuantModule | None]] = {}  # with the module, which keeps its id taken

    def inside(self, module: nn.Module, path: str) -> bool:
        """Search the children of a module; whether any became a region or has one inside."""
        found = False
        for name, child in module._modules.items():
            if child is None or isinstance(child, QuantModule) or not _has_weights(child):
                continue
            child_path = f"{path}.{name}" if path else name
            if id(child) not in self.done:  # a module of two names is one region
                found |= self._child(child, child_path)
            region = self.done[id(child)][1]
            if region is not None:
                setattr(module, name, region)
        return found

    def _child(self, child: nn.Module, path: str) -> bool:
        self.done[id(child)] = child, None
        inputs = self.seen.get(self.first_path[id(child)])
        if inputs is None and not self._runs_in_part(child):
            self.left[path] = "the example inputs do not reach it"
            return False
        if inputs is not None:
            try:
                region = self.prepare_region(child, inputs, path)
            except TraceError as error:
                self.left[path] = error.statement
            else:
                region.plan.attributes.update(_plain_attributes(child))
                self.done[id(child)] = child, region
                return True
        found = self.inside(child, path)
        if found:
            self.left.pop(path, None)  # its parts are regions
        return found

    def _runs_in_part(self, module: nn.Module) -> bool:
        return any(self.first_path.get(id(part)) in self.seen for part in module.modules())


def _has_weights(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Numbers and names that the code around the submodule may read, such as ``out_channels``."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
