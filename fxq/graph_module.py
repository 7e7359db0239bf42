"""The module class of every stage: a ``torch.fx.GraphModule`` that carries a plan."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from fxq.engine import running
from fxq.errors import ConfigError, InputError, StageError
from fxq.input_checks import FIXED, REMEDY, explain_inputs, require_float32
from fxq.keyword_paths import allow_keywords
from fxq.lazy_code import TEXTS, Uncompiled
from fxq.outside_reads import Described
from fxq.pickling import Record, graph_of, records_of
from fxq.plan import QuantPlan, Stage
from fxq.size_checks import KnownSizes, are_unchecked
from fxq.state import graph_qparams, misfit, misfit_qparams, set_state, split_state

# Keys of a module's meta beside "fxq", its plan:
BACKEND = "fxq_backend"  # the table it was prepared or lowered for
REFERENCE = "fxq_reference"  # of a lowered module: the reference graph it was lowered from
ENGINES = "fxq_engines"  # of a lowered module: the engines chosen for single kernels, see fxq.tune
STANDS_FOR = "fxq_stands_for"  # of a region: the class of the module in whose place it is


class QuantModule(fx.GraphModule):
    """A traced model with its :class:`~fxq.plan.QuantPlan` in ``meta["fxq"]``; called like the model."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """For code around a region that asks with ``isinstance`` what it is: the class of the module it stands for."""
        found: type = vars(self).get("meta", {}).get(STANDS_FOR, type(self))
        return found

    @property
    def plan(self) -> QuantPlan:
        plan = self.meta.get("fxq")
        if not isinstance(plan, QuantPlan):
            raise StageError("this graph module has no quantization plan; make one with fxq.prepare")
        return plan

    def __getattr__(self, name: str) -> Any:
        if name in TEXTS:
            self.write_code()
            return vars(self)[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            plan = self.__dict__.get("meta", {}).get("fxq")
            if plan is None or name not in plan.attributes:
                raise
            return plan.attributes[name]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        lowered = "fxq" in self.meta and self.plan.stage is Stage.LOWERED
        try:
            if not lowered:  # a quantize of torch refuses other dtypes itself
                if "fxq" in self.meta:
                    require_float32(self.graph, self.plan, args, kwargs)
                return super().__call__(*args, **kwargs)
            self._require_sizes(args, kwargs)
            with running():
                return super().__call__(*args, **kwargs)
        except AssertionError as error:
            if FIXED not in str(error):
                raise
            raise InputError(f"{error}; {REMEDY}") from error
        except (RuntimeError, TypeError, AttributeError) as error:
            explanation = explain_inputs(self.graph, self.plan, args, kwargs) if "fxq" in self.meta else None
            if explanation is None:
                raise
            raise InputError(explanation) from error

    def _require_sizes(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise what the reference graph raises of inputs that the kernels of this lowered one might take."""
        if are_unchecked(self.plan):
            if "_known_sizes" not in vars(self):
                self._known_sizes = KnownSizes(self.meta[REFERENCE], self.plan)
            self._known_sizes.require(args, kwargs)

    def recompile(self) -> None:  # type: ignore[override]
        """Forget the code of an earlier graph; that of this one is written when something runs or reads it."""
        allow_keywords(self.graph)
        for name in TEXTS:
            vars(self).pop(name, None)
        type(self).forward = Uncompiled(self)  # type: ignore[assignment]

    def write_code(self) -> None:
        """Write and compile the code of this module's graph."""
        fx.GraphModule.recompile(self)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As of ``nn.Module``, with what stands for parameters that code around the module asks about."""
        return parameters_and_descriptions(self, prefix, recurse, remove_duplicate)

    def release_unused(self) -> None:
        """Drop modules that no node calls and tensors that no node reads; linear in the size of the graph."""
        called = {str(node.target) for node in self.graph.nodes if node.op == "call_module"}
        read = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        around = {path[:end] for path in called | read for end, letter in enumerate(path) if letter == "."}
        _release(self, "", called, read, around)
        self.offer_descriptions()

    def offer_descriptions(self) -> None:
        """Let code around it ask for what the plan describes, where the tensor itself is not there."""
        if "fxq" in self.meta:
            offer_descriptions(self, self.plan)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantModule:
        # Packed weights never change, and copying one would pack it again under whatever engine is set.
        for value in vars(self).values():
            if isinstance(value, torch.ScriptObject):
                memo[id(value)] = value
        buffers = [buffer for buffer in self._buffers.values() if buffer is not None]
        memo.update({id(buffer): buffer for buffer in buffers if buffer.is_mkldnn})
        clone = super().__deepcopy__(memo)
        assert isinstance(clone, QuantModule)
        clone.offer_descriptions()  # torch.fx copies no attributes that it does not know
        return clone

    def __reduce__(self) -> tuple[Any, ...]:
        """Its graph node by node, because torch.fx would trace its code again and name the nodes anew; a lowered
        module as its reference graph, because packed weights cannot be pickled."""
        if REFERENCE in self.meta:
            return _relowered, (self.meta[REFERENCE], self.meta[BACKEND], self.meta[ENGINES])
        state = {name: vars(self)[name] for name in ("training", "_parameters", "_buffers", "_modules", "meta")}
        return _restored, (type(self).__name__, records_of(self.graph), state)

    def __reduce_package__(self, exporter: Any) -> Any:
        raise StageError("torch.package would store this model as Python code; write it with fxq.save, or pickle it")

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of ``nn.Module``, but all or nothing; a lowered module is packed again from what is loaded.

        Raises:
            ConfigError: for keys, shapes or dtypes that are not those of :meth:`state_dict`.
        """
        before = copy.deepcopy(dict(self.state_dict()))
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            super().load_state_dict(before)
            raise ConfigError(f"the state dict does not fit this {self.plan.stage.value} model: {error}") from error

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if REFERENCE in self.meta:  # packed weights have no tensors of their own
            self.meta[REFERENCE].state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
            return
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({f"{prefix}{name}": value for name, value in graph_qparams(self.graph).items()})

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Load the whole of this module; the :class:`Tensors` inside leave it to it."""
        own, inside = split_state(self.meta.get(REFERENCE, self))
        given = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        missing_keys += [prefix + key for key in own if key not in given]
        unexpected_keys += [prefix + key for key in given if key not in own and not key.startswith(inside)]
        fitting = {key: value for key, value in given.items() if key in own}
        wrong = [f"'{prefix}{key}' {why}" for key, value in fitting.items() if (why := misfit(own[key], value))]
        if not wrong:
            graph = self.meta.get(REFERENCE, self).graph
            wrong = [f"'{prefix}{key}' {why}" for key, why in misfit_qparams(graph, fitting).items()]
        if wrong:
            error_msgs += wrong
        elif REFERENCE not in self.meta:
            set_state(self, fitting, replace=self.plan.stage is Stage.REFERENCE)
        else:
            reference = copy_module(self.meta[REFERENCE])
            set_state(reference, fitting)
            self._become(_relowered(reference, self.meta[BACKEND], self.meta[ENGINES]))

    def _become(self, other: QuantModule) -> None:
        """Take over another module's graph and all that it uses."""
        training, graph = self.training, other.graph
        self.__dict__ = {name: value for name, value in vars(other).items() if name not in ("_graph", "training")}
        self.training, self.graph = training, graph


def _release(owner: nn.Module, prefix: str, called: set[str], read: set[str], around: set[str]) -> None:
    for table in (owner._parameters, owner._buffers):
        for name in [name for name in table if prefix + name not in read]:
            del table[name]
    for name, child in list(owner._modules.items()):
        path = prefix + name
        if path in called:
            continue
        if child is not None and path in around:
            _release(child, f"{path}.", called, read, around)
            child.__class__ = Tensors  # of a class that can be called, it would load its own state dict
        else:
            del owner._modules[name]


class Tensors(nn.Module):
    """Holds the tensors that stood at a module's path; prints their names and shapes."""

    def _load_from_state_dict(self, *args: Any) -> None:
        """Nothing: the :class:`QuantModule` around it loads them."""

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As of the module it stands for, as far as code around asks about them."""
        return parameters_and_descriptions(self, prefix, recurse, remove_duplicate)

    def extra_repr(self) -> str:
        tensors = [*self._parameters.items(), *self._buffers.items()]
        return ", ".join(f"{name}{list(tensor.shape)}" for name, tensor in tensors if tensor is not None)


def parameters_and_descriptions(
    module: nn.Module, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
) -> Iterator[tuple[str, Any]]:
    """``module.named_parameters``, with what stands for those that became part of kernels, in the order of modules."""
    seen: set[int] = set()
    for path, part in module.named_modules(prefix=prefix, remove_duplicate=remove_duplicate):
        described = {name: value for name, value in vars(part).items() if isinstance(value, Described)}
        for name, value in (described | dict(part._parameters.items())).items():  # as weights are before biases
            if value is not None and id(value) not in seen:
                yield f"{path}.{name}" if path else name, value
            if remove_duplicate:
                seen.add(id(value))
        if not recurse:
            return


def offer_descriptions(module: nn.Module, plan: QuantPlan) -> None:
    """Let code around a module that stands for a part of the model ask for what the plan describes."""
    offered = {path: value for path, value in plan.attributes.items() if "." in path}
    offered |= {path: Described(path, fact.shape, fact.dtype) for path, fact in plan.described.items()}
    for path, value in offered.items():
        if not _taken(module, path):
            parent, _, name = path.rpartition(".")
            holder_at(module, parent).__dict__[name] = value


class _Listing(functools.partial[Iterator[tuple[str, Any]]]):
    """A method of one module, which pickles; as of any other method, torch.compile asks for its function."""

    @property
    def __func__(self) -> Callable[..., Any]:
        return self.func


def list_descriptions(module: nn.Module) -> None:
    """Let code around regions that lists the parameters of modules meet what stands for those of regions, too."""
    for part in module.modules() if _describes(module) else ():
        listing = getattr(type(part).named_parameters, "__code__", None)
        if listing is nn.Module.named_parameters.__code__ and _describes(part):
            part.__dict__["named_parameters"] = _Listing(parameters_and_descriptions, part)


def _describes(module: nn.Module) -> bool:
    return any(isinstance(value, Described) for part in module.modules() for value in vars(part).values())


def get_attribute(module: nn.Module, path: str) -> Any:
    """The parameter, buffer or other attribute at a dotted path."""
    parent, _, name = path.rpartition(".")
    return getattr(module.get_submodule(parent), name)


def set_tensor(module: nn.Module, path: str, value: torch.Tensor) -> None:
    """Put a tensor at a dotted path, as a parameter if it is one, else as a buffer; makes what modules lack."""
    parent, _, name = path.rpartition(".")
    owner = holder_at(module, parent)
    if isinstance(value, nn.Parameter) and name in owner._parameters:
        owner._parameters[name] = value  # in its old place, as code asks the first parameter for its dtype
        return
    if name in owner.__dict__ or name in owner._parameters or name in owner._buffers:
        delattr(owner, name)
    if isinstance(value, nn.Parameter):
        owner.register_parameter(name, value)
    else:
        owner.register_buffer(name, value)


def holder_at(module: nn.Module, path: str) -> nn.Module:
    """The submodule at a dotted path, made if there is none."""
    for part in filter(None, path.split(".")):
        if part not in module._modules:
            module.add_module(part, Tensors())
        module = module.get_submodule(part)
    return module


def free_path(module: nn.Module, path: str) -> str:
    """``path``, or ``path_1``, ``path_2``, ... where that is taken."""
    candidate, number = path, 0
    while _taken(module, candidate):
        number += 1
        candidate = f"{path}_{number}"
    return candidate


def _taken(module: nn.Module, path: str) -> bool:
    try:
        get_attribute(module, path)
    except AttributeError:
        return False
    return True


def make_module(name: str, graph: fx.Graph, parts: Mapping[str, Any]) -> QuantModule:
    """A module that runs ``graph``.

    Args:
        name: of its class.
        parts: the tensors and modules that the graph uses, by path.
    """
    module = QuantModule(nn.Module(), fx.Graph(), name)
    for path, part in sorted(parts.items()):  # a module before what is inside it
        if isinstance(part, nn.Module):
            parent, _, child = path.rpartition(".")
            holder_at(module, parent).add_module(child, part)
        else:
            set_tensor(module, path, part)
    module.graph = graph
    return module


def copy_module(module: QuantModule) -> QuantModule:
    """An independent copy of a module and its plan."""
    return copy.deepcopy(module)


def transformed_copy(
    module: QuantModule, transform: Callable[[QuantModule], object], lent: Iterable[nn.Module] = ()
) -> QuantModule:
    """What ``transform`` makes of a copy of a module; only the tensors that remain afterwards are copied.

    Args:
        transform: changes the copy in place; may replace tensors, but not write to them.
        lent: submodules that it only reads and drops; they are not copied.
    """
    tensors = [*(tensor for _, tensor in nn.Module.named_parameters(module)), *module.buffers()]
    made = copy.deepcopy(module, {id(part): part for part in (*tensors, *lent)})
    transform(made)
    memo: dict[int, Any] = {}
    shared = {id(tensor) for tensor in tensors}
    parameters = nn.Module.named_parameters(made, remove_duplicate=False)
    for path, tensor in [*parameters, *made.named_buffers(remove_duplicate=False)]:
        if id(tensor) in shared:
            set_tensor(made, path, copy.deepcopy(tensor, memo))
    return made


def _restored(name: str, records: list[Record], state: dict[str, Any]) -> QuantModule:
    """The inverse of :meth:`QuantModule.__reduce__`."""
    module = QuantModule(nn.Module(), fx.Graph(), name)
    module.__dict__.update(state)
    module.graph = graph_of(records)
    module.offer_descriptions()
    return module


def _relowered(reference: QuantModule, table: Any, engines: Mapping[str, str]) -> QuantModule:
    from fxq.partition import map_regions  # which are written in terms of this module
    from fxq.passes.lower import lower

    lowered = map_regions(reference, lambda region: lower(region, table, engines if region is reference else {}))
    assert isinstance(lowered, QuantModule)
    return lowered
