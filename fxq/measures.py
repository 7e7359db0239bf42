"""What models are judged by: SQNR and cosine, summed up over batches, or a metric of the user's."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fxq.calibration import ForwardFn, forward_parameters, iterate, run_batch
from fxq.errors import CalibrationError, ConfigError, InputError

Metric = Callable[[nn.Module], float]


@dataclass
class Noise:
    """Squared sums of what was expected, of what came instead, and of the difference; in float64."""

    signal: float = 0.0
    actual: float = 0.0
    product: float = 0.0
    noise: float = 0.0

    def add(self, expected: torch.Tensor, actual: torch.Tensor) -> None:
        """Count one batch: two float tensors of one shape."""
        self.signal += _square(expected)
        self.actual += _square(actual)
        self.product += (expected * actual).sum(dtype=torch.float64).item()
        self.noise += _square(expected - actual)

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise ratio in dB, as :func:`fxq.numerics.sqnr`; ``inf`` without noise."""
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two; 1 if neither has a signal, 0 if one of them has none."""
        if self.signal == 0 or self.actual == 0:
            return float(self.signal == self.actual)
        return self.product / math.sqrt(self.signal * self.actual)


def _square(x: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def keep_batches(data: Iterable[Any], num_batches: int | None) -> list[Any]:
    """The first batches of data that is read more than once.

    Raises:
        CalibrationError: if there are none, or ``num_batches`` asks for none.
    """
    if num_batches is not None and num_batches < 1:
        raise CalibrationError(f"num_batches={num_batches}: at least one batch is needed")
    batches = list(itertools.islice(iterate(data), num_batches))
    if not batches:
        raise CalibrationError("the data is empty: give at least one batch (a generator can be read only once)")
    return batches


def model_outputs(model: nn.Module, batches: Iterable[Any], forward_fn: ForwardFn | None) -> list[list[torch.Tensor]]:
    """The float tensors of a model's output, however nested, for each batch.

    Raises:
        ConfigError: if there is none.
    """
    parameters = forward_parameters(model)
    outputs = []
    with torch.no_grad():
        for batch in batches:
            output = run_batch(model, batch, parameters, forward_fn)
            outputs.append([x for x in tree_leaves(output) if isinstance(x, torch.Tensor) and x.is_floating_point()])
            if not outputs[-1]:
                what = "forward_fn returned" if forward_fn is not None else "the model returns"
                raise ConfigError(f"{what} no float tensor (but a {type(output).__name__}): no error can be measured")
    return outputs


def output_noise(expected: list[list[torch.Tensor]], actual: list[list[torch.Tensor]]) -> Noise:
    """How far the outputs of two models on the same batches are apart, all tensors taken together.

    Raises:
        InputError: if they differ in number or shape, as the boxes of a detector do.
    """
    noise = Noise()
    for ours, theirs in zip(expected, actual, strict=True):
        shapes = [[list(x.shape) for x in outputs] for outputs in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"the outputs of the float and the quantized model differ in number or shape "
                f"({_shortened(shapes[0])} and {_shortened(shapes[1])}), so that they have no SQNR"
            )
        for x, y in zip(ours, theirs, strict=True):
            noise.add(x, y)
    return noise


class OutputSqnr:
    """The SQNR of the output of models to that of one model, in dB, on some batches.

    Raises:
        ConfigError, InputError: when called, as :func:`model_outputs` and :func:`output_noise`.

    Example:
        >>> OutputSqnr(model, images)(qmodel)                                         # doctest: +SKIP
        31.4
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any], forward_fn: ForwardFn | None = None) -> None:
        self.model, self.batches, self.forward_fn = model, batches, forward_fn

    @cached_property
    def _expected(self) -> list[list[torch.Tensor]]:
        return model_outputs(self.model, self.batches, self.forward_fn)

    def __call__(self, other: nn.Module) -> float:
        return output_noise(self._expected, model_outputs(other, self.batches, self.forward_fn)).sqnr


def _shortened(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def evaluate(metric: Metric, model: nn.Module) -> float:
    """What the user's metric says of a model.

    Raises:
        ConfigError: if that is no finite number.
    """
    value: Any = metric(model)
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ConfigError(f"metric(model) returned a {type(value).__name__}; it must return a number, higher is better")
    if not math.isfinite(value):
        raise ConfigError(f"metric(model) returned {value}; it must return a finite number, higher is better")
    return float(value)
