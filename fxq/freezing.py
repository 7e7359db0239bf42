"""The deployed form of a quantized model: one callable that repeats the same work as fast as torch lets it."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.jit._trace import TracerWarning
from torch.utils import _pytree as pytree

from fxq.aliases import reads_values
from fxq.api import as_inputs
from fxq.direct_kernels import DirectModel
from fxq.engine import running
from fxq.errors import BackendError, ConfigError, MissingDependencyError, StageError
from fxq.graph_module import STANDS_FOR, QuantModule, offer_descriptions, parameters_and_descriptions
from fxq.partition import Inputs, map_regions, region_inputs, regions_of
from fxq.plan import Stage
from fxq.timing import measure

_SECONDS = 0.5  # to time each form
_WARM_UP = 3  # calls until TorchScript's executor has specialized the graph


class Frozen(nn.Module):
    """A frozen model, called like the model it was made from; see :func:`freeze`.

    Attributes:
        form: a name of :data:`FORMS`.
        shapes: of the tensors it is frozen for, in the order of the inputs. Inputs of other shapes run in the
            original model: the same numbers at its speed.
    """

    def __init__(self, model: QuantModule, inputs: Inputs, form: str | None = None) -> None:
        super().__init__()
        leaves, self._spec = _flattened(inputs[0], dict(inputs[1]))
        leaves = [leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self._known = [_signature(leaf) for leaf in leaves]
        self._strides = [leaf.stride() for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self.shapes = [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self._model = (model,)  # not a submodule: what is frozen has no parameters any more
        self.form, (self._run, self._result) = _fastest(model, leaves, self._spec, form)
        offer_descriptions(self, model.plan)
        self.eval()

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return self._model[0].__class__ if "_model" in vars(self) and STANDS_FOR in self._model[0].meta else type(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = _flattened(args, kwargs)
        if (spec is not self._spec and spec != self._spec) or [_signature(leaf) for leaf in leaves] != self._known:
            return self._model[0](*args, **kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        laid_out = [_with_strides(x, strides) for x, strides in zip(tensors, self._strides, strict=True)]
        with torch.inference_mode(), running():
            found = self._run(*laid_out)
        return self._result.restore(found)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            attributes = self._model[0].plan.attributes if "_model" in self.__dict__ else {}
            if name not in attributes:
                raise
            return attributes[name]

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """What stands for parameters that code around the model asks about: it has none any more."""
        return parameters_and_descriptions(self, prefix, recurse, remove_duplicate)


def freeze(qmodel: nn.Module, example_inputs: Any, *, form: str | None = None) -> nn.Module:
    """The fastest callable for running a quantized model again and again on inputs of one shape.

    There are two forms (docs/performance.md has what else was measured). Both may be called from several threads at
    once, and both are verified on the example inputs:

    ``"torchscript"``: the graph of kernels is recorded once, with every shape, scale and packed weight a constant in
    it, and runs without Python. The numbers are those of ``qmodel`` bit for bit.

    ``"onednn"``: convolutions, linears, pools and gates become primitives that are called without torch, joins and
    shuffles of channels become moves of bytes, and all write to one block of memory, whose parts are used again
    (:mod:`fxq.direct_kernels`). Where torch's library is stripped of its symbols: ``pip install "fxq[onednn]"``.
    Each of them gives the same integers as torch's kernel but for ties, where it may be one more or less. A residual
    sum or activation is computed in the accumulator of the convolution before it, which is more exact: the rounding
    between them, by half a step of that convolution's output, and the clipping to its calibrated range are gone.
    Everything else is the same.

    Args:
        qmodel: lowered, from :func:`fxq.quantize`, ``convert``, ``lower`` or ``load``; unchanged.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs, of the shapes, dtypes and
            memory formats that it will be called with. channels_last images save a conversion.
        form: one of the two; by default the one that takes less time with the example inputs on this machine, of
            those that there are.

    Returns:
        A module that is called like ``qmodel`` and takes inputs of other shapes, too: these run in ``qmodel`` itself.
        Where ``qmodel`` was quantized in regions, a copy of it with each region frozen for the first inputs it gets.

    Raises:
        StageError: if ``qmodel`` is not lowered; for ``"torchscript"``, which is always made but for another ``form``,
            if it calls a module that decides by the values it is given, or takes numbers from values (``item``).
        BackendError: if torch's frozen graph gives other numbers, or if no layer can be called directly.
        ConfigError: for an unknown form.
        MissingDependencyError: for ``"onednn"`` if there is none that can be called.

    Example:
        >>> frozen = fxq.freeze(qmodel, torch.rand(1, 3, 224, 224))                   # doctest: +SKIP
        >>> scores = frozen(image)                                                    # doctest: +SKIP
    """
    if form is not None and form not in FORMS:
        raise ConfigError(f"unknown form {form!r}; the forms are {', '.join(FORMS)}")
    regions_of(qmodel, Stage.LOWERED)
    seen = region_inputs(qmodel, as_inputs(example_inputs, qmodel))
    return map_regions(qmodel, lambda region: Frozen(region, seen[id(region)], form) if id(region) in seen else region)


def _flattened(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Sequence[Any], pytree.TreeSpec]:
    """As pytree does it; for tensors alone, as most calls have, at no cost."""
    if not kwargs and all(type(arg) is torch.Tensor for arg in args):
        return args, _of_leaves(len(args))
    return pytree.tree_flatten((args, kwargs))


@functools.cache
def _of_leaves(count: int) -> pytree.TreeSpec:
    """The structure of so many positional inputs."""
    return pytree.tree_flatten(((0,) * count, {}))[1]


def _signature(leaf: Any) -> Any:
    """What must be the same for the recorded graph to be valid, beside the order in memory."""
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else leaf


def _with_strides(x: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def _laid_out(x: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """A copy; of what was expanded, as of any, one without overlap."""
    return x.clone() if x.stride() == strides or 0 in strides else _with_strides(x, strides)


class _Result:
    """How the tensors of a recorded graph become the model's result again."""

    def __init__(self, result: Any) -> None:
        self.leaves, self.spec = pytree.tree_flatten(result)
        self.is_tensor = [isinstance(leaf, torch.Tensor) for leaf in self.leaves]
        self.tensors = [leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor)]
        self.strides = [tensor.stride() for tensor in self.tensors]

    def restore(self, tensors: Any) -> Any:
        """The result with other values, in ordinary tensors of their own that lie in memory as the model's do."""
        found = (_laid_out(x, strides) for x, strides in zip(tensors, self.strides, strict=True))
        pairs = zip(self.leaves, self.is_tensor, strict=True)
        leaves = [next(found) if is_tensor else leaf for leaf, is_tensor in pairs]
        return pytree.tree_unflatten(leaves, self.spec)


class _Flat(nn.Module):
    """A model as a function of tensors that returns a tuple of tensors."""

    def __init__(self, model: Callable[..., Any], leaves: list[Any], spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.model = model
        self.leaves, self.spec = leaves, spec
        self.are_arguments = spec is _of_leaves(len(leaves))

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.model(*tensors) if self.are_arguments else self._unflattened(tensors)
        return (result,) if isinstance(result, torch.Tensor) else tuple(_Result(result).tensors)

    def _unflattened(self, tensors: tuple[torch.Tensor, ...]) -> Any:
        found = iter(tensors)
        leaves = [next(found) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.model(*args, **kwargs)


_Form = tuple[Callable[..., Any], _Result]  # of tensors, a tuple of tensors; and what that stands for


def _fastest(
    model: QuantModule, leaves: list[Any], spec: pytree.TreeSpec, form: str | None
) -> tuple[str, _Form]:
    """The form asked for, else the one that takes less time."""
    if form is not None:
        return form, FORMS[form](model, leaves, spec)
    made = {"torchscript": FORMS["torchscript"](model, leaves, spec)}
    with contextlib.suppress(BackendError, MissingDependencyError):
        made["onednn"] = FORMS["onednn"](model, leaves, spec)
    if len(made) == 1:
        return next(iter(made.items()))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    with torch.inference_mode(), running():
        times = measure({name: functools.partial(run, *tensors) for name, (run, _) in made.items()}, _SECONDS, 0.02)
    best = min(made, key=lambda name: times[name].minimum)
    return best, made[best]


def _direct(model: QuantModule, leaves: list[Any], spec: pytree.TreeSpec) -> _Form:
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    with torch.inference_mode():
        direct = DirectModel(model, args, kwargs)
        expected = _Result(model(*args, **kwargs))
    flat = _Flat(direct, leaves, spec).eval()
    return flat.forward, expected


def _trace(model: QuantModule, leaves: list[Any], spec: pytree.TreeSpec) -> _Form:
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    flat = _Flat(model, leaves, spec).eval()
    with torch.no_grad(), running(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        expected = _Result(model(*args, **kwargs))
        run = torch.jit.freeze(torch.jit.trace(flat, tensors, check_trace=False))
        for _ in range(_WARM_UP):
            with torch.inference_mode():
                found = run(*tensors)
    _require_no_decisions(model, caught)
    if not all(map(_same, found, expected.tensors)):
        raise BackendError("torch's frozen graph of this model gives other numbers; use the model as it is")
    return run, expected


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found.nan_to_num(), expected.nan_to_num())


def _require_no_decisions(model: nn.Module, caught: list[warnings.WarningMessage]) -> None:
    """Raise StageError where a recorded run does not stand for all: if the graph takes numbers from values, or a module
    inside that torch.fx could not trace decides by them.
    """
    nodes = [node for region in regions_of(model).values() for node in region.graph.nodes]
    takes = [node.name for node in nodes if reads_values(node)]
    if takes:
        raise StageError(
            f"'{takes[0]}' takes numbers from the values of a tensor, which would be constants in one recorded run; "
            f"use form='onednn', or the model as it is"
        )
    leaves = [str(node.target) for node in nodes if node.op == "call_module"]
    decides = [entry for entry in caught if issubclass(entry.category, TracerWarning)]
    if leaves and decides:
        raise StageError(
            f"'{leaves[0]}' decides by the values it is given ({str(decides[0].message).splitlines()[0]}), so one "
            f"recorded run does not stand for all; use the model as it is"
        )


FORMS: Mapping[str, Callable[[QuantModule, list[Any], pytree.TreeSpec], _Form]] = {
    "torchscript": _trace,
    "onednn": _direct,
}
