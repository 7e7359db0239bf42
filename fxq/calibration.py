"""Feeding calibration data to a prepared model."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fxq.copying import copy_inputs
from fxq.errors import CalibrationError
from fxq.fake_quantize import calibrating
from fxq.graph_module import QuantModule
from fxq.input_checks import input_facts
from fxq.interpreter import graph_signature
from fxq.lazy_code import interpreted
from fxq.partition import Inputs, is_one_list, partition_of, regions_of, runs
from fxq.plan import Stage

# Batches for which compiling a graph, which takes memory, does not pay.
_INTERPRETED = 4

_LABELS = frozenset({"label", "labels", "target", "targets"})

ForwardFn = Callable[[nn.Module, Any], Any]


def calibrate(
    prepared: nn.Module,
    data: Iterable[Any],
    *,
    num_batches: int | None = None,
    forward_fn: ForwardFn | None = None,
    progress: bool | None = None,
) -> None:
    """Run batches through a prepared model, so that its observers see the activations.

    Args:
        prepared: from :func:`fxq.prepare`, or :func:`fxq.prepare_qat` to start training from calibrated ranges.
        data: an iterable of tensors, tuples, dicts or a DataLoader's ``(input, target)`` pairs; what the model's
            forward does not take is dropped, but a list of tensors is one input if the example inputs were one.
        num_batches: stop after this many batches; all by default.
        forward_fn: ``forward_fn(model, batch)`` calls the model itself, where the batch alone does not tell how.
        progress: show a progress bar; by default only on a terminal.

    Raises:
        CalibrationError: if there is no data, or an activation is NaN or infinite; names the node.
        StageError: if the model was not prepared.

    Example:
        >>> fxq.calibrate(prepared, [torch.rand(8, 3, 224, 224) for _ in range(4)])   # doctest: +SKIP
    """
    regions = regions_of(prepared, Stage.PREPARED)
    if num_batches is not None and num_batches < 1:
        raise CalibrationError(f"num_batches={num_batches}: calibration needs at least one batch")
    parameters = forward_parameters(prepared)
    chosen = itertools.islice(iterate(data), num_batches)
    batches = tqdm(chosen, "calibrate", _length(data, num_batches), disable=not shows_progress(progress))
    seen = 0
    with torch.no_grad(), calibrating(prepared), contextlib.ExitStack() as uncompiled:
        uncompiled.enter_context(interpreted(regions.values()))
        for batch in batches:
            if seen == _INTERPRETED:
                uncompiled.close()
            if forward_fn is not None:
                forward_fn(prepared, batch)
            else:
                args, kwargs = copy_inputs(model_inputs(batch, parameters))
                _run(prepared, args, kwargs, [p.name for p in parameters], seen)
            seen += 1
    if seen == 0:
        raise CalibrationError(
            "the calibration data is empty: give at least one batch (a generator can be read only once)"
        )


def shows_progress(progress: bool | None) -> bool:
    """Whether to show a progress bar: as asked for, by default only on a terminal."""
    return sys.stderr.isatty() if progress is None else progress


def run_batch(model: nn.Module, batch: Any, parameters: list[inspect.Parameter], forward_fn: ForwardFn | None) -> Any:
    """What a model, whose forward has these parameters, makes of a batch."""
    if forward_fn is not None:
        return forward_fn(model, batch)
    args, kwargs = copy_inputs(model_inputs(batch, parameters))  # a model may write to a list that it is given
    return model(*args, **kwargs)


def forward_parameters(model: nn.Module) -> list[inspect.Parameter]:
    """Parameters of a model's forward; for a traced one, those of its placeholders, of which those are required that a
    tensor was given for.
    """
    if isinstance(model, QuantModule):
        facts = input_facts(model.graph, model.plan)
        parameters = [
            parameter if facts.get(parameter.name) is None else parameter.replace(default=parameter.empty)
            for parameter in graph_signature(model.graph).parameters.values()
        ]
    else:
        parameters = list(inspect.signature(model.forward).parameters.values())
    return _with_list(parameters) if _took_list(model) else parameters


def most_arguments(model: nn.Module) -> float:
    """How many positional arguments a model's forward takes."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return math.inf
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def _took_list(model: nn.Module) -> bool:
    """Whether a model was prepared with one list of tensors as its example inputs."""
    if isinstance(model, QuantModule):
        first = next(iter(model.graph.find_nodes(op="placeholder")), None)
        return first is not None and first.name in model.plan.containers
    partition = partition_of(model)
    return partition is not None and partition.takes_list


def _with_list(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
    """The parameters of a forward whose first one is a list, which its annotation says."""
    return [parameters[0].replace(annotation=list), *parameters[1:]]


def model_inputs(batch: Any, parameters: list[inspect.Parameter]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` that a batch means for a forward with these parameters.

    A tuple or list longer than the forward's parameters is ``(inputs..., labels...)``: what is too much is dropped. A
    dict is keyword inputs; keys the forward does not know are dropped, unless it takes any (``**kwargs``). A list of
    tensors is a single input of a model that was prepared with one. A member in the place of an optional parameter that
    is named like a label, such as the ``targets`` of torchvision's detection models, is a label.

    Raises:
        CalibrationError: where the batch does not tell which of its members are labels.
    """
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if isinstance(batch, Mapping):
        known = {name: value for name, value in batch.items() if name in names}
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        return ((), dict(batch) if takes_all else known) if known else ((batch,), {})
    if not isinstance(batch, (tuple, list)):
        return (batch,), {}
    if parameters and parameters[0].annotation is list and is_one_list(((batch,), {})):
        return (batch,), {}
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return tuple(batch), {}
    required = sum(p.default is p.empty for p in parameters if p.name in names)
    if len(batch) < required:
        raise CalibrationError(
            f"a batch has {len(batch)} members, but the model's forward needs {required} inputs "
            f"({', '.join(names[:required])}); pass forward_fn=lambda model, batch: ..."
        )
    if required < len(batch) and names[required:] and names[required] in _LABELS:
        return tuple(batch[:required]), {}
    if required < len(batch) <= len(names):
        raise CalibrationError(
            f"cannot tell whether member {required + 1} of a batch is a label or the optional input "
            f"'{names[required]}'; pass forward_fn=lambda model, batch: model(...), or example_inputs"
        )
    return tuple(batch[: len(names)]), {}


def example_inputs_of(model: nn.Module, batch: Any, forward_fn: ForwardFn | None) -> Inputs:
    """``(args, kwargs)`` of a batch, to trace a float model with.

    Where forward needs one input, a list of float tensors may be ``[input, label]`` or that input: the model is tried.
    So it is with members for optional parameters, which are inputs if the model needs them.

    Raises:
        CalibrationError: with ``forward_fn``, which alone knows how a batch becomes inputs; for a list that the model
            takes as well as its first member.
    """
    if forward_fn is not None:
        raise CalibrationError("forward_fn needs example_inputs: a batch does not tell how the model is called")
    parameters = forward_parameters(model)
    if not (_may_be_one_input(batch, parameters) and runs(model, ((batch,), {}))):
        return _only_way(model, batch) or model_inputs(batch, parameters)
    if not runs(model, ((batch[0],), {})):
        return (batch,), {}
    if len(batch) == 1:
        return (batch[0],), {}
    raise CalibrationError(
        f"a batch is a list of {len(batch)} tensors, and the model takes the list as well as its first member; write "
        f"([...],) for a list that is one input, and a tuple (input, label) otherwise, or pass example_inputs"
    )


def _only_way(model: nn.Module, batch: Any) -> Inputs | None:
    """All members of a batch as inputs, where forward requires fewer but fails without the others, as one of CLIP does,
    whose ``image`` and ``text`` are both optional; where one of them is ``None``, it is no label either.
    """
    parameters = list(inspect.signature(model.forward).parameters.values())
    required = sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    if not isinstance(batch, (tuple, list)) or not required < len(batch) <= len(parameters):
        return None
    if parameters[required].name in _LABELS or any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return None
    every: Inputs = tuple(batch), {}
    told = any(member is None for member in batch) or not runs(model, (tuple(batch[:required]), {}))
    return every if told and runs(model, every) else None


def _may_be_one_input(batch: Any, parameters: list[inspect.Parameter]) -> bool:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = sum(p.default is p.empty for p in parameters if p.kind not in kinds)
    return required == 1 and is_one_list(((batch,), {})) and all(x.is_floating_point() and x.dim() > 1 for x in batch)


class _Understood:
    """Batches in a form that means the same to every model, whatever their example inputs were.

    A list that is one input becomes a tuple of it. Of a tuple the members that the example inputs have are kept: by
    name, where more of them are given than forward requires.
    """

    def __init__(self, data: Iterable[Any], inputs: Inputs, model: nn.Module) -> None:
        self._data, self._takes_list, self._count = data, is_one_list(inputs), 0 if inputs[1] else len(inputs[0])
        parameters = inspect.signature(model.forward).parameters.values()
        named = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        nameless = any(p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL) for p in parameters)
        self._names = [] if nameless else [p.name for p in named]
        self._required = sum(p.default is p.empty for p in named)

    def __iter__(self) -> Iterator[Any]:
        return map(self._meaning, self._data)

    def __len__(self) -> int:
        return len(self._data)  # type: ignore[arg-type]

    def _meaning(self, batch: Any) -> Any:
        if self._takes_list:
            return (batch,) if is_one_list(((batch,), {})) else batch
        if not isinstance(batch, (tuple, list)):
            return batch
        if not self._required <= self._count <= min(len(batch), len(self._names)):
            return batch
        given = batch[: self._count]
        return tuple(given) if self._count == self._required else dict(zip(self._names, given, strict=False))


def understood(data: Iterable[Any], inputs: Inputs, model: nn.Module) -> Iterable[Any]:
    """Data whose batches mean to any model what they mean to one that gets these example inputs."""
    return _Understood(data, inputs, model)


def iterate(data: Iterable[Any]) -> Iterator[Any]:
    """``iter(data)``; raises CalibrationError for what is no iterable."""
    try:
        return iter(data)
    except TypeError as error:
        raise CalibrationError(
            f"the calibration data is of type {type(data).__name__}; give an iterable of batches, e.g. a list of "
            f"tensors or a DataLoader"
        ) from error


def _run(prepared: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str], batch: int) -> None:
    """One batch; where an observer met NaN or inf that was in the inputs already, the error says so."""
    try:
        prepared(*args, **kwargs)
    except CalibrationError as error:
        given = dict(zip([*names, *range(len(names), len(args))], args, strict=False)) | kwargs
        for name, value in given.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
                raise CalibrationError(
                    f"input {name!r} of calibration batch {batch} has NaN or infinite values: clean the data ({error})"
                ) from error
        raise


def _length(data: Iterable[Any], num_batches: int | None) -> int | None:
    try:
        length = len(data)  # type: ignore[arg-type]
    except TypeError:
        return num_batches
    return length if num_batches is None else min(length, num_batches)
