"""Feeding calibration data to a prepared model."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fxq.errors import CalibrationError
from fxq.fake_quantize import calibrating
from fxq.graph_module import QuantModule
from fxq.input_checks import input_facts
from fxq.partition import regions_of
from fxq.plan import Stage

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
            forward does not take is dropped.
        num_batches: stop after this many batches; all by default.
        forward_fn: ``forward_fn(model, batch)`` calls the model itself, where the batch alone does not tell how.
        progress: show a progress bar; by default only on a terminal.

    Raises:
        CalibrationError: if there is no data, or an activation is NaN or infinite; names the node.
        StageError: if the model was not prepared.

    Example:
        >>> fxq.calibrate(prepared, [torch.rand(8, 3, 224, 224) for _ in range(4)])   # doctest: +SKIP
    """
    regions_of(prepared, Stage.PREPARED)
    if num_batches is not None and num_batches < 1:
        raise CalibrationError(f"num_batches={num_batches}: calibration needs at least one batch")
    parameters = forward_parameters(prepared)
    chosen = itertools.islice(iterate(data), num_batches)
    batches = tqdm(chosen, "calibrate", _length(data, num_batches), disable=not shows_progress(progress))
    seen = 0
    with torch.no_grad(), calibrating(prepared):
        for batch in batches:
            if forward_fn is not None:
                forward_fn(prepared, batch)
            else:
                _run(prepared, *model_inputs(batch, parameters), [p.name for p in parameters], seen)
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
    args, kwargs = model_inputs(batch, parameters)
    return model(*args, **kwargs)


def forward_parameters(model: nn.Module) -> list[inspect.Parameter]:
    """Parameters of a model's forward; for a traced one, those of its placeholders, of which those are required that a
    tensor was given for.
    """
    facts = input_facts(model.graph, model.plan) if isinstance(model, QuantModule) else {}
    return [
        parameter if facts.get(parameter.name) is None else parameter.replace(default=parameter.empty)
        for parameter in inspect.signature(model.forward).parameters.values()
    ]


def model_inputs(batch: Any, parameters: list[inspect.Parameter]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` that a batch means for a forward with these parameters.

    A tuple longer than the forward's parameters is ``(inputs..., labels...)``: what is too much is dropped. A dict
    is keyword inputs; keys the forward does not know are dropped, unless it takes any (``**kwargs``).

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
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return tuple(batch), {}
    required = sum(p.default is p.empty for p in parameters if p.name in names)
    if len(batch) < required:
        raise CalibrationError(
            f"a batch has {len(batch)} members, but the model's forward needs {required} inputs "
            f"({', '.join(names[:required])}); pass forward_fn=lambda model, batch: ..."
        )
    if required < len(batch) <= len(names):
        raise CalibrationError(
            f"cannot tell whether member {required + 1} of a batch is a label or the optional input "
            f"'{names[required]}'; pass forward_fn=lambda model, batch: model(...), or example_inputs"
        )
    return tuple(batch[: len(names)]), {}


def example_inputs_of(
    model: nn.Module, batch: Any, forward_fn: ForwardFn | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` of a batch, to trace a model with.

    Raises:
        CalibrationError: with ``forward_fn``, which alone knows how a batch becomes inputs.
    """
    if forward_fn is not None:
        raise CalibrationError("forward_fn needs example_inputs: a batch does not tell how the model is called")
    return model_inputs(batch, forward_parameters(model))


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
