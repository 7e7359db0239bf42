"""How one tensor is quantized (:class:`QuantSpec`) and the numbers that follow from it (:class:`QParams`)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from fxq.errors import ConfigError

_DTYPE_RANGES = {torch.uint8: (0, 255), torch.int8: (-128, 127)}


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantSpec:
    """How one tensor is quantized. Immutable, hashable, comparable.

    Args:
        dtype: ``torch.uint8`` or ``torch.int8``, the integers that hold the values.
        quant_min, quant_max: smallest and largest integer used (inclusive). A narrower range than the
            dtype's is a lower bit width: ``quant_min=-8, quant_max=7`` is 4 bits on the int8 kernels.
        symmetric: the range is symmetric around zero, so ``zero_point`` is the middle of the integers
            (0 for signed ranges).
        ch_axis: axis of the channels for one scale a channel, ``None`` for one scale a tensor.
        pow2_scale: scales are rounded up to a power of two.
        observer: name of the range estimator, see :data:`fxq.observers.OBSERVERS`; some take a number
            after a colon (``"percentile:99.99"``).

    Raises:
        ConfigError: if the integers do not fit the dtype or the range is empty.

    Example:
        >>> QuantSpec(dtype=torch.int8, quant_min=-127, quant_max=127, symmetric=True, ch_axis=0,
        ...           observer="minmax").bits
        8
    """

    dtype: torch.dtype
    quant_min: int
    quant_max: int
    symmetric: bool
    ch_axis: int | None = None
    pow2_scale: bool = False
    observer: str = "histogram"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPE_RANGES:
            raise ConfigError(f"QuantSpec: dtype {self.dtype} is not supported; use torch.uint8 or torch.int8")
        low, high = _DTYPE_RANGES[self.dtype]
        if not low <= self.quant_min < self.quant_max <= high:
            raise ConfigError(
                f"QuantSpec: [{self.quant_min}, {self.quant_max}] is not a range of integers inside "
                f"{self.dtype}'s [{low}, {high}]; set quant_min < quant_max inside it"
            )

    @property
    def bits(self) -> int:
        """Bit width: the smallest number of bits that counts the integers of the range."""
        return (self.quant_max - self.quant_min).bit_length()

    @property
    def per_channel(self) -> bool:
        """Whether there is one scale a channel."""
        return self.ch_axis is not None

    @property
    def saturates_with_dtype(self) -> bool:
        """Whether the range is the dtype's own, so that a kernel's saturation does the clamping."""
        return (self.quant_min, self.quant_max) == _DTYPE_RANGES[self.dtype]

    def replace(self, **changes: object) -> QuantSpec:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def as_unsigned(self) -> QuantSpec:
        """The same grid on uint8: integers shifted by 128.

        Every int8 convolution of torch takes unsigned activations only, so signed activations are shifted;
        the real values represented stay the same.
        """
        if self.dtype == torch.uint8:
            return self
        return self.replace(dtype=torch.uint8, quant_min=self.quant_min + 128, quant_max=self.quant_max + 128)

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        if not self.saturates_with_dtype:
            name += f"[{self.quant_min}, {self.quant_max}]"
        kind = "symmetric" if self.symmetric else "affine"
        where = "per-tensor" if self.ch_axis is None else f"per-channel({self.ch_axis})"
        return f"{name} {kind} {where}" + (" pow2" if self.pow2_scale else "") + f" {self.observer}"


@dataclass(frozen=True, slots=True, eq=False)
class QParams:
    """``scale`` (float32) and ``zero_point`` (int32) of one tensor, shape ``[C]`` per channel or ``[1]``.

    ``real = scale * (integer - zero_point)``.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor

    def equals(self, other: QParams) -> bool:
        """Exact equality of both tensors."""
        return torch.equal(self.scale, other.scale) and torch.equal(self.zero_point, other.zero_point)

    def item(self) -> tuple[float, int]:
        """``(scale, zero_point)`` of a per-tensor pair as Python numbers."""
        return self.scale.item(), int(self.zero_point.item())
