"""What cannot be traced as a whole: its largest traceable submodules are quantized in place.

A detection model loops over images and boxes, but its backbone and heads are plain networks. Each of these
becomes a *region*, a :class:`~fxq.graph_module.QuantModule` in the place of the submodule, in a copy of the model
that is called like the original. Regions are prepared with the inputs they really get when the whole model runs.

The same happens to a submodule that cannot be traced inside a model that can: it stays a float leaf of the graph, and
what is traceable in it becomes regions of their own.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fxq.compiled import SCRIPTED, python_modules
from fxq.copying import borrowed, copy_inputs, copy_structure, give_back, only_read, only_reads, replace_listed
from fxq.errors import ConfigError, FxqError, InputError, StageError, TraceError
from fxq.graph_module import REFERENCE, STANDS_FOR, QuantModule, get_attribute, list_descriptions
from fxq.macs import counting
from fxq.outside_reads import Reads, is_plain, watching_reads
from fxq.plan import EXCLUDED, Stage, TensorFact
from fxq.tracing import SWITCHES, seems_traceable
from fxq.write_guard import WriteGuard, WriteRefused

Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]
Calls = dict[Any, Inputs]  # by the way a module is called


@dataclass(frozen=True)
class Recording:
    """What a run on the example inputs tells of the submodules, by path.

    Attributes:
        seen: inputs of the first call of each way in which each submodule with weights is called (:func:`_way`); of
            those inside a submodule that seems to become a region as a whole, only where they are called from outside.
        macs: multiply-accumulates of convs and linears.
        optional: the parameters of a class's forward that were a tensor in some calls, of any module of the class.
        reads: what code outside submodules reads of them.
    """

    seen: dict[str, Calls] = field(default_factory=dict)
    macs: Mapping[str, int] = field(default_factory=dict)
    optional: dict[type[nn.Module], set[str]] = field(default_factory=dict)
    reads: Reads = field(default_factory=Reads)


PrepareRegion = Callable[[nn.Module, Inputs, str], QuantModule]

_ATTRIBUTE = "_fxq_partition"
# Modules that do not call the layers inside as Python modules: nothing inside can become a region.
_WITHOUT_CALLS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, torch.jit.ScriptModule)


@dataclass(frozen=True)
class Partition:
    """What is known of a partitioned model.

    Attributes:
        reason: why it cannot be traced as a whole.
        left: why other submodules with weights stay float.
        left_macs: their multiply-accumulates with the example inputs.
        takes_list: the example inputs were one list of tensors.
    """

    reason: str
    left: dict[str, str] = field(default_factory=dict)
    left_macs: int = 0
    takes_list: bool = False


def is_one_list(inputs: Inputs) -> bool:
    """Whether inputs are a single list of tensors."""
    args, kwargs = inputs
    one = args[0] if len(args) == 1 and not kwargs else None
    return type(one) is list and bool(one) and all(isinstance(item, torch.Tensor) for item in one)


def partition_of(model: nn.Module) -> Partition | None:
    """The partition of a model that was quantized in regions, else ``None``."""
    return model.__dict__.get(_ATTRIBUTE)


def regions_of(model: nn.Module, *stages: Stage) -> dict[str, QuantModule]:
    """The regions of a model by module path; a model that was traced as a whole is at path ``""``.

    Raises:
        StageError: if the model was not made by fxq or is at none of ``stages``.
    """
    if isinstance(model, QuantModule) or partition_of(model) is not None:
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


def left_in(model: nn.Module) -> dict[str, str]:
    """Why modules of a model were not traced, by path: those outside of regions, and float leaves inside."""
    partition = partition_of(model)
    left = dict(partition.left) if partition else {}
    for path, region in regions_of(model).items():
        left |= {join(path, leaf): why for leaf, why in region.plan.untraceable.items()}
    return left


def join(path: str, inner: str) -> str:
    """``a.b`` for ``a`` and ``b``, either of which may be empty."""
    return f"{path}.{inner}" if path and inner else path or inner


def map_regions(model: nn.Module, transform: Callable[[QuantModule], nn.Module]) -> nn.Module:
    """A copy of a model with each region replaced by what ``transform`` makes of it; the model itself if each becomes
    itself.
    """
    if not isinstance(model, QuantModule):
        regions_of(model)
        return _map_inside(model, model, transform)
    made = transform(model)
    if not isinstance(made, QuantModule):
        return made
    for path in {str(node.target) for node in made.graph.nodes if node.op == "call_module"}:
        leaf = made.get_submodule(path)
        mapped = _map_inside(leaf, model.get_submodule(path), transform) if _outermost_regions(leaf) else leaf
        if mapped is not leaf:
            parent, _, name = path.rpartition(".")
            setattr(made.get_submodule(parent), name, mapped)
    return made


def _map_inside(model: nn.Module, source: nn.Module, transform: Callable[[QuantModule], nn.Module]) -> nn.Module:
    """A copy of a float module with what ``source`` has as regions mapped; the module itself where nothing changes."""
    mapped: dict[int, nn.Module] = {}
    replaced: dict[int, Any] = {}
    for path, region in _outermost_regions(source).items():
        if id(region) not in mapped:  # a region of two names stays one
            mapped[id(region)] = map_regions(region, transform)
        replaced[id(model.get_submodule(path))] = mapped[id(region)]
    if all(id(made) == before for before, made in replaced.items()):
        return model
    made = copy_structure(model, replaced)
    list_descriptions(made)
    return made


def _outermost_regions(model: nn.Module, path: str = "") -> dict[str, QuantModule]:
    found: dict[str, QuantModule] = {}
    for name, child in model.named_children():
        inner = join(path, name)
        found |= {inner: child} if isinstance(child, QuantModule) else _outermost_regions(child, inner)
    return found


def region_inputs(model: nn.Module, inputs: Inputs) -> dict[int, Inputs]:
    """What each region is called with first when the whole model runs on ``inputs``, by the region's id."""
    if isinstance(model, QuantModule) and len(regions_of(model)) == 1:
        return {id(model): inputs}
    seen: dict[int, Inputs] = {}

    def record(region: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.setdefault(id(region), copy_inputs((args, kwargs)))

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
    """The part of a module's state dict that is not that of regions inside."""
    inside = tuple(f"{p}." for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, QuantModule))
    return {name: value for name, value in model.state_dict().items() if not name.startswith(inside)}


def replace_regions(
    model: nn.Module, regions: Mapping[str, QuantModule], outside: Mapping[str, torch.Tensor]
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
        region.meta[STANDS_FOR] = type(module)
        replaced[id(module)] = region
    clone = copy_structure(model, replaced).eval()
    state = state_outside(clone)
    shapes, wanted = ({name: (t.shape, t.dtype) for name, t in tensors.items()} for tensors in (state, outside))
    if shapes != wanted:
        name = next(name for name in shapes | wanted if shapes.get(name) != wanted.get(name))
        raise ConfigError(f"the given model's '{name}' is not the one of the model that was quantized")
    for name, tensor in state.items():
        tensor.copy_(outside[name])
    list_descriptions(clone)
    return clone


def set_partition(model: nn.Module, partition: Partition) -> None:
    """Mark a model as one that was quantized in regions."""
    model.__dict__[_ATTRIBUTE] = partition


def prepare_partition(
    model: nn.Module, inputs: Inputs, reason: TraceError, prepare_region: PrepareRegion, *, borrow: bool = False
) -> nn.Module:
    """Prepare the largest traceable submodules of a model.

    Args:
        model: left as it is; what is prepared is its eval mode.
        inputs: example inputs of the whole model.
        reason: why the whole cannot be traced.
        prepare_region: prepares one submodule from its inputs and path; TraceError sends the search inside it.
        borrow: regions may read weights of the model, until :func:`fxq.copying.give_back`.

    Raises:
        TraceError: ``reason``, if no submodule with weights can be traced either.
        InputError: if the model fails on the example inputs.
    """
    found = _recorded(model, inputs)
    clone = copy_structure(model, _lent(model) if borrow else {}).eval()
    left: dict[str, str] = {}
    search = _Search(clone, found, left, prepare_region)
    search.inside(clone, "")
    search.replace_listed_in(clone)
    list_descriptions(clone)
    regions = [path for path, module in clone.named_modules() if isinstance(module, QuantModule)]
    if not regions:
        raise reason
    inside = tuple(f"{path}." for path in regions)
    if borrow:  # what the user's code may write to must be the copy's own before it runs
        give_back((part for path, part in clone.named_modules() if not f"{path}.".startswith(inside)), model)
    left_macs = sum(count for path, count in found.macs.items() if not f"{path}.".startswith(inside))
    set_partition(clone, Partition(reason.statement, left, left_macs, is_one_list(inputs)))
    return clone


def _lent(model: nn.Module) -> dict[int, Any]:
    """The weights of torch's own layers, for a copy to read."""
    known: list[nn.Module] = []
    others: list[nn.Module] = []
    for module in model.modules():
        (known if only_reads(module) else others).append(module)
    return borrowed(only_read(known, others))


def _recorded(model: nn.Module, inputs: Inputs) -> Recording:
    """What :func:`_record` finds. It runs the user's code, so a copy does.

    Reading the model's own weights saves memory; should the code write to one, it runs again on a full copy.
    """
    lent = _lent(model)
    copied = copy_structure(model, dict(lent)).eval()
    with contextlib.suppress(WriteRefused), WriteGuard(lent.values()) as guard:
        found = _record(copied, inputs)
    return _record(copy_structure(model, {}).eval(), inputs) if guard.refused else found


def _record(model: nn.Module, inputs: Inputs) -> Recording:
    """What the submodules do when the model runs on its example inputs."""
    try:
        args, kwargs = copy_inputs(inputs, own=True)
        with torch.no_grad(), recording(model) as found:
            model(*args, **kwargs)
    except (FxqError, WriteRefused):
        raise
    except Exception as error:
        raise InputError(f"the model fails on the example inputs: {type(error).__name__}: {error}") from error
    return found


def runs(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a float model takes some inputs; a copy of it is asked."""
    args, kwargs = copy_inputs(inputs, own=True)
    try:
        with torch.no_grad():
            copy_structure(model, {}).eval()(*args, **kwargs)
    except Exception:
        return False
    return True


@contextmanager
def recording(model: nn.Module, untraceable: Iterable[nn.Module] = ()) -> Iterator[Recording]:
    """While open, records what the submodules do; of some it is known that they cannot be traced as a whole."""
    seen: dict[str, Calls] = {}
    optional: dict[type[nn.Module], set[str]] = {}
    handles = []
    whole = _seem_whole(model, {id(module) for module in untraceable})
    running: list[set[int]] = []  # the parts of those that seem to become regions, of which nothing is recorded
    for path, module in python_modules(model):
        if not _has_weights(module):
            continue

        def record(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
            way = _way(called, (args, kwargs))
            if way not in seen.get(path, ()) and not any(id(called) in parts for parts in running):
                seen.setdefault(path, {})[way] = copy_inputs((args, kwargs))
                optional.setdefault(type(called), set()).update(_optional(called, (args, kwargs), torch.Tensor))
            if id(called) in whole:
                running.append(whole[id(called)])

        def leave(called: nn.Module, _: Any, __: Any) -> None:
            if id(called) in whole:
                running.pop()

        handles.append(module.register_forward_pre_hook(record, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with counting(model) as macs, watching_reads(model) as reads:
            yield Recording(seen, macs, optional, reads)
    finally:
        for handle in handles:
            handle.remove()


def _way(module: nn.Module, inputs: Inputs) -> Any:
    """What a graph fixes when it is traced: which inputs are given, and the values of switches among them."""
    try:
        bound = inspect.signature(module.forward).bind(*inputs[0], **inputs[1])
    except (TypeError, ValueError):  # the call fails, or the signature is unknown
        return _fixed(inputs)
    bound.apply_defaults()
    return _fixed(tuple(bound.arguments.values()))


def _fixed(value: Any) -> Any:
    if isinstance(value, SWITCHES):
        return value
    if isinstance(value, tuple):
        return tuple(map(_fixed, value))
    if isinstance(value, Mapping):
        return frozenset((str(name), _fixed(item)) for name, item in value.items())
    return type(value)


def _optional(module: nn.Module, inputs: Inputs, kind: type) -> set[str]:
    """The parameters of a module's forward that may be ``None`` and that a call gives a value of a kind."""
    if isinstance(module, torch.jit.ScriptModule):  # its forward has no signature
        return set()
    parameters = inspect.signature(module.forward).parameters
    given = dict(zip(parameters, inputs[0], strict=False)) | dict(inputs[1])
    values = {name: given.get(name) for name, parameter in parameters.items() if parameter.default is None}
    return {name for name, value in values.items() if isinstance(value, kind)}


def _seem_whole(model: nn.Module, untraceable: Set[int]) -> dict[int, set[int]]:
    """The ``id`` of each outermost submodule that can be traced, as far as is seen without its inputs, with its parts'.

    What its parts get is not looked at, as it would keep all activations of the model; what other modules get is, which
    it may be given as arguments.
    """
    found: dict[int, set[int]] = {}
    for child in model.children():
        if _has_weights(child):
            whole = id(child) not in untraceable and seems_traceable(child)
            parts = {id(part) for part in child.modules()} if whole else set()
            found |= {id(child): parts} if whole else _seem_whole(child, untraceable)
    return found


def leaves_to_search(module: QuantModule) -> dict[str, nn.Module]:
    """The float modules that a graph calls and that have modules with weights inside, by path."""
    found = {str(node.target): module.get_submodule(str(node.target)) for node in module.graph.nodes
             if node.op == "call_module"}  # fmt: skip
    return {
        path: leaf
        for path, leaf in found.items()
        if not isinstance(leaf, _WITHOUT_CALLS) and any(map(_has_weights, leaf.children()))
    }


def prepare_leaves(
    module: QuantModule, found: Recording, prepare_region: PrepareRegion
) -> None:
    """Prepare the largest traceable submodules of the float modules that a prepared graph calls.

    Args:
        module: changed in place.
        found: recorded while it ran on its example inputs.
        prepare_region: as for :func:`prepare_partition`; gets paths as seen from ``module``.
    """
    plan = module.plan
    left: dict[str, str] = {}
    search = _Search(module, found, left, prepare_region)
    for path, leaf in leaves_to_search(module).items():
        nodes = [node.name for node in module.graph.nodes if node.op == "call_module" and node.target == path]
        if any(plan.decisions[name].reason == EXCLUDED for name in nodes) or not search.inside(leaf, path):
            continue
        done = tuple(f"{region}." for region, part in leaf.named_modules(prefix=path) if isinstance(part, QuantModule))
        inside = {part: count for part, count in found.macs.items() if f"{part}.".startswith(f"{path}.")}
        remain = sum(count for part, count in inside.items() if not f"{part}.".startswith(done))
        for name in nodes:
            plan.macs[name] = plan.macs[name] * remain // max(sum(inside.values()), 1)
        search.replace_listed_in(leaf)
        list_descriptions(leaf)
    plan.untraceable.update(left)


class _Search:
    """Looks for the largest submodules that can be prepared, and puts what they become in their places.

    Args:
        root: the copy of the model that is changed.
        found: of a run of the model.
        left: gets the reason for each submodule that stays.
    """

    def __init__(
        self, root: nn.Module, found: Recording, left: dict[str, str], prepare_region: PrepareRegion
    ) -> None:
        self.seen, self.optional, self.reads = found.seen, found.optional, found.reads
        self.left, self.prepare_region = left, prepare_region
        self.reached = set(found.seen)
        self.first_path = {id(module): path for path, module in root.named_modules()}
        self.done: dict[int, tuple[nn.Module, QuantModule | None]] = {}  # with the module, which keeps its id taken

    def inside(self, module: nn.Module, path: str) -> bool:
        """Search the children of a module; whether any became a region or has one inside."""
        found = False
        for name, child in module._modules.items():
            if child is None or isinstance(child, QuantModule) or not _has_weights(child):
                continue
            child_path = join(path, name)
            if id(child) not in self.done:  # a module of two names is one region
                found |= self._child(child, child_path)
            region = self.done[id(child)][1]
            if region is not None:
                setattr(module, name, region)
        return found

    def replace_listed_in(self, module: nn.Module) -> None:
        """Let lists of a module and of those inside hold the regions too, as modules may be called from there."""
        replaced = {key: region for key, (_, region) in self.done.items() if region is not None}
        for part in module.modules():
            if not isinstance(part, QuantModule):
                replace_listed(part, replaced)

    def _child(self, child: nn.Module, path: str) -> bool:
        self.done[id(child)] = child, None
        calls = self.seen.pop(self.first_path[id(child)], {})  # which are many activations: no longer than needed
        inputs = next(iter(calls.values()), None)
        if isinstance(child, torch.jit.ScriptModule):
            self.left[path] = SCRIPTED
            return False
        if self.first_path[id(child)] in self.reads.parts:
            self.left[path] = "code outside it reads its tensors or submodules"
        elif inputs is None and not self._runs_in_part(child):
            self.left[path] = "the example inputs do not reach it"
            return False
        elif len(calls) > 1:
            self.left[path] = "it is called in several ways (with other switches, or inputs left out), a graph in one"
        elif inputs is not None:
            if self._is_called_otherwise(child, inputs):
                self._look_inside(child, calls)
                if self.inside(child, path):
                    return True
            if self._becomes_region(child, path, inputs):
                return True
            if isinstance(child, _WITHOUT_CALLS):
                return False
        self._look_inside(child, calls)
        del inputs, calls
        found = self.inside(child, path)
        if found:
            self.left.pop(path, None)  # its parts are regions
        return found

    def _is_called_otherwise(self, module: nn.Module, inputs: Inputs) -> bool:
        """Whether others of its class get a tensor where it gets ``None``, as shifted windows do a mask: with inputs of
        other sizes it may get one too, which a region that was traced without could not take.
        """
        if isinstance(module, _WITHOUT_CALLS):
            return False
        return bool(self.optional.get(type(module), set()) & _optional(module, inputs, type(None)))

    def _becomes_region(self, child: nn.Module, path: str, inputs: Inputs) -> bool:
        try:
            region = self.prepare_region(child, inputs, path)
        except TraceError as error:
            self.left[path] = error.statement
            return False
        region.meta[STANDS_FOR] = type(child)
        region.plan.attributes.update(_plain_attributes(child) | self._asked(child))
        region.plan.described.update(self._described(child))
        region.offer_descriptions()
        self.done[id(child)] = child, region
        return True

    def _asked(self, module: nn.Module) -> dict[str, Any]:
        """The plain attributes of the parts of a module that code outside reads, by their path in it."""
        prefix = f"{self.first_path[id(module)]}."
        asked = self.reads.attributes.items()
        inside = {path.removeprefix(prefix): value for path, value in asked if path.startswith(prefix)}
        return {path: value for path, value in inside.items() if "." in path}

    def _described(self, module: nn.Module) -> dict[str, TensorFact]:
        """The tensors of a module of which code outside asks for descriptions, by their path in it."""
        prefix = f"{self.first_path[id(module)]}."
        inside = [path.removeprefix(prefix) for path in self.reads.described if path.startswith(prefix)]
        tensors = {path: get_attribute(module, path) for path in inside}
        return {path: TensorFact(tuple(t.shape), t.dtype) for path, t in tensors.items()}

    def _runs_in_part(self, *modules: nn.Module) -> bool:
        return any(self.first_path.get(id(part)) in self.reached for module in modules for part in module.modules())

    def _look_inside(self, module: nn.Module, calls: Calls) -> None:
        """Record what the parts of a module get, if it seemed to become a region, for then it was not recorded."""
        if all(map(self._runs_in_part, filter(_has_weights, module.children()))):
            return
        for inputs in calls.values():
            with suppress(InputError):
                for path, given in _recorded(module, inputs).seen.items():
                    known = self.seen.setdefault(self.first_path.get(id(module.get_submodule(path)), path), {})
                    known.update({way: one for way, one in given.items() if way not in known})
        self.reached |= self.seen.keys()


def _has_weights(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Numbers and names that the code around the submodule may read, such as ``out_channels``: its own, its class's,
    and what its properties return.
    """
    values: dict[str, Any] = {}
    for cls in reversed([cls for cls in type(module).__mro__ if cls not in nn.Module.__mro__]):
        for name, value in vars(cls).items():
            if isinstance(value, property):
                with suppress(Exception), warnings.catch_warnings():  # one that fails or warns is not asked for here
                    warnings.simplefilter("ignore")
                    value = getattr(module, name)
            values[name] = value
    return {
        name: value
        for name, value in (values | vars(module)).items()
        if not name.startswith("_") and name != "training" and is_plain(value)
    }

