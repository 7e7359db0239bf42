"""Fake quantization: rounding to the int8 grid in float, with gradients that pass straight through.

The forward pass computes ``dequantize(quantize(x))``. The backward pass takes it for the identity inside the range and
for a constant outside: the straight-through estimator of Jacob et al. (arXiv:1712.05877).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxq.errors import CalibrationError, ConfigError
from fxq.learned_scale import fake_quantize_learned, initial_step, scale_of_step
from fxq.numerics import choose_qparams
from fxq.observers import Observer
from fxq.ranges import Range
from fxq.spec import QParams, QuantSpec
from fxq.statistics import MinMaxStatistics, MovingAverageStatistics, Statistics, extremes

LEARNED = "lsq"
TRAINING_OBSERVERS = ("moving_average", "minmax", LEARNED)


class FakeQuantize(Observer):
    """Observes a tensor while training and rounds it to the grid of the range observed.

    It observes in training mode only (and during :func:`fxq.calibrate`), so that an evaluation in between changes
    nothing. All it knows is in float buffers that are updated in place, and in no other: ``state_dict``, copies,
    moving averages of a model and ``DistributedDataParallel`` treat it like a BatchNorm.

    Args:
        spec: what the tensor is rounded to. ``spec.observer`` is ``"moving_average"`` (of each batch's extremes),
            ``"minmax"`` (of all batches) or ``"lsq"`` (a learned scale, :mod:`fxq.learned_scale`).
        channels: how many scales: 1 per tensor.
        weight: the tensor is a parameter; its range is that of its present values.
        fixed: ``(scale, zero_point)`` that a kernel dictates; then nothing is observed or learned.

    Attributes:
        observing: the range follows the data.
        quantizing: ``forward`` rounds; when False it returns its input.
        low, high: buffers, float32 ``[channels]``, the observed range.
        scale, zero_point: buffers, float32 ``[channels]``.
        seen: buffer, float32 ``[]``, batches observed.
        step: parameter, float32 ``[channels]``, of a learned scale only.

    Raises:
        ConfigError: for an observer that cannot be used in training.
        CalibrationError: in ``forward``, if a tensor that is observed is not finite.

    Example:
        >>> spec = QuantSpec(dtype=torch.uint8, quant_min=0, quant_max=255, symmetric=False, observer="minmax")
        >>> FakeQuantize(spec)(torch.tensor([0.0, 0.3, 255.0])).tolist()
        [0.0, 0.0, 255.0]
    """

    low: Tensor
    high: Tensor
    scale: Tensor
    zero_point: Tensor
    seen: Tensor
    step: Tensor

    def __init__(
        self, spec: QuantSpec, channels: int = 1, *, weight: bool = False, fixed: tuple[float, int] | None = None
    ) -> None:
        nn.Module.__init__(self)
        if spec.observer not in TRAINING_OBSERVERS:
            raise ConfigError(
                f"observer {spec.observer!r} cannot follow a model in training; use one of "
                f"{', '.join(TRAINING_OBSERVERS)} in the QuantSpecs given to prepare_qat"
            )
        self.spec = spec
        self.bounds = (None, None)
        self.where = "a tensor"
        self.enabled = True
        self.weight, self.fixed = weight, fixed is not None
        self.observing, self.quantizing, self.calibrating = True, True, False
        self._ready = False
        for name in ("low", "high", "scale", "zero_point"):
            self.register_buffer(name, torch.zeros(channels))
        self.register_buffer("seen", torch.zeros(()))
        self.register_parameter("step", nn.Parameter(torch.zeros(channels)) if self.learns else None)
        if fixed is not None:
            self._set_fixed(*fixed)

    @property
    def learns(self) -> bool:
        """Whether the scale is a parameter."""
        return self.spec.observer == LEARNED and not self.fixed

    @property
    def batches(self) -> int:  # type: ignore[override]
        """Batches observed."""
        return int(self.seen)

    @property
    def has_data(self) -> bool:
        """Whether there is a scale."""
        self._ready = self._ready or bool(self.seen > 0)
        return self._ready

    @property
    def statistics(self) -> Statistics:  # type: ignore[override]
        """The range as plain statistics."""
        stats = MinMaxStatistics(self.spec.ch_axis)
        stats.count, stats.low, stats.high = int(self.seen), self.low.detach().clone(), self.high.detach().clone()
        return stats

    def reset(self) -> None:
        """Forget everything observed; a fixed scale stays."""
        if not self.fixed:
            self.seen.zero_()
            self._ready = False

    def _set_fixed(self, scale: float, zero_point: int) -> None:
        self.scale.fill_(scale)
        self.zero_point.fill_(zero_point)
        self.low.fill_((self.spec.quant_min - zero_point) * scale)
        self.high.fill_((self.spec.quant_max - zero_point) * scale)
        self.seen.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (floating, any shape) rounded to the grid, after observing it."""
        if not self.fixed and (self.calibrating or (self.training and self.observing)):
            self.observe(x)
        return self.quantize(x) if self.quantizing and self.has_data else x

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Let the range follow ``x``; of a learned scale, only its first value comes from there."""
        if (self.learns and self.has_data and not self.calibrating) or x.numel() == 0:
            return
        try:
            low, high = extremes(x, self.spec.ch_axis)
        except CalibrationError as error:
            raise CalibrationError(f"{self.where}: {error}") from error
        if self.learns:
            low, high = _over_processes(low, high)
        if self.weight or not self.has_data:
            self.low.copy_(low)
            self.high.copy_(high)
        elif self.spec.observer == "minmax":
            torch.minimum(self.low, low, out=self.low)
            torch.maximum(self.high, high, out=self.high)
        else:
            self.low.lerp_(low.to(self.low.dtype), MovingAverageStatistics.CONSTANT)
            self.high.lerp_(high.to(self.high.dtype), MovingAverageStatistics.CONSTANT)
        self.seen += 1
        self._ready = True
        qparams = choose_qparams(self.low, self.high, self.spec)
        self.scale.copy_(qparams.scale)
        self.zero_point.copy_(qparams.zero_point)
        if self.learns:
            self.step.copy_(initial_step(qparams.scale, self.spec))

    def quantize(self, x: Tensor) -> Tensor:
        """``x`` rounded to the present grid, observing nothing."""
        spec = self.spec
        if self.learns:
            return fake_quantize_learned(x, self.learned_scale(), self.zero_point, spec, frozen=not self.observing)
        scale, zero_point = self.scale.float(), self.zero_point.to(torch.int32)
        if spec.ch_axis is None:
            return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, spec.quant_min, spec.quant_max)
        return torch.fake_quantize_per_channel_affine(
            x, scale, zero_point, spec.ch_axis, spec.quant_min, spec.quant_max
        )

    def learned_scale(self) -> Tensor:
        """The scale as a function of :attr:`step`, with gradient."""
        return scale_of_step(self.step, self.spec)

    def range(self) -> Range:
        """The real values of the smallest and largest integer, or the observed range: float32 each."""
        if not self.has_data:
            raise CalibrationError(f"{self.where} has seen no data; train or calibrate with at least one batch")
        if not self.learns:
            return self.low.float().clamp(max=0.0), self.high.float().clamp(min=0.0)
        qparams = self.qparams()
        ends = (self.spec.quant_min, self.spec.quant_max)
        low, high = ((end - qparams.zero_point) * qparams.scale for end in ends)
        return low, high

    def qparams(self) -> QParams:
        """Scale and zero point that ``forward`` rounds with."""
        if not self.has_data:
            raise CalibrationError(f"{self.where} has seen no data; train or calibrate with at least one batch")
        scale = self.learned_scale().detach() if self.learns else self.scale
        return QParams(scale.float().clone(), self.zero_point.round().to(torch.int32))

    def merge(self, other: Observer) -> None:
        """Ranges in training are averages over time; there is no merging them."""
        raise CalibrationError("fake-quantize modules cannot be merged; calibrate a QAT model in one process")

    def get_extra_state(self) -> Tensor:  # type: ignore[override]
        """The switches, as a tensor like all else in a ``state_dict``."""
        return torch.tensor([float(self.observing), float(self.quantizing)])

    def set_extra_state(self, state: Tensor) -> None:  # type: ignore[override]
        """Restore :meth:`get_extra_state`'s result."""
        self.observing, self.quantizing = (bool(value > 0.5) for value in state)
        self._ready = False


def fake_quantize(x: Tensor, by: FakeQuantize) -> Tensor:
    """``x`` rounded to the grid of a module that observes another tensor of the same group."""
    return by.quantize(x) if by.quantizing and by.has_data else x


def fake_quantizes(model: nn.Module) -> list[FakeQuantize]:
    """The fake-quantize modules inside a model."""
    return [module for module in model.modules() if isinstance(module, FakeQuantize)]


@contextlib.contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """While open, a model prepared for training behaves like one prepared for calibration: eval mode, no rounding."""
    modules = fake_quantizes(model)
    before: list[tuple[Any, bool]] = [(module, module.training) for module in model.modules()] if modules else []
    switches = [(module, module.quantizing) for module in modules]
    for module, _ in before:
        module.training = False
    for fake in modules:
        fake.calibrating, fake.quantizing = True, False
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
        for fake, quantizing in switches:
            fake.calibrating, fake.quantizing = False, quantizing


def _over_processes(low: Tensor, high: Tensor) -> Range:
    """The extremes over all processes: parameters that start alike stay alike."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(low, torch.distributed.ReduceOp.MIN)
        torch.distributed.all_reduce(high, torch.distributed.ReduceOp.MAX)
    return low, high
