"""The arithmetic of affine quantization, on plain tensors.

The scheme and the rule that zero is exactly representable are those of Jacob et al., "Quantization and
Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference" (arXiv:1712.05877).
Rounding is to nearest even after a multiplication with the float32 reciprocal of the scale, as in
``torch.fake_quantize_per_tensor_affine`` and ONNX QuantizeLinear. torch's packed quantize adds the zero_point before
it rounds, so an exact tie may come out one integer apart there.
"""

from __future__ import annotations

import torch

from fxq.spec import QParams, QuantSpec

# Smallest scale handed to a kernel. Far below any real activation, far enough above the smallest normal
# float32 that products of two scales and the reciprocal of one stay finite and normal.
MIN_SCALE = 2.0**-60
_CHUNK = 1 << 17  # elements quantized at a time, whose temporaries stay in cache


def choose_qparams(low: torch.Tensor, high: torch.Tensor, spec: QuantSpec) -> QParams:
    """Scale and zero_point that cover the real range ``[low, high]``, extended to contain zero.

    Args:
        low, high: float32 ``[C]`` (per channel) or ``[1]``/scalar (per tensor), finite, ``low <= high``.
        spec: the integers to map to, symmetric or affine, power-of-two or not.

    Returns:
        :class:`QParams` of the same length. Zero is exactly representable; a range that is all zero gets
        scale 1.

    Example:
        >>> spec = QuantSpec(dtype=torch.uint8, quant_min=0, quant_max=255, symmetric=False)
        >>> choose_qparams(torch.tensor([0.0]), torch.tensor([6.0]), spec).zero_point.tolist()
        [0]
    """
    low = low.reshape(-1).double().clamp(max=0.0)
    high = high.reshape(-1).double().clamp(min=0.0)
    if spec.symmetric:
        # The middle of the integers represents zero; the shorter side decides, so that no value saturates.
        middle = (spec.quant_min + spec.quant_max + 1) // 2
        scale = torch.maximum(-low, high) / min(middle - spec.quant_min, spec.quant_max - middle)
        zero_point = torch.full_like(scale, middle)
        scale = _valid_scale(scale, spec)
    else:
        scale = _valid_scale((high - low) / (spec.quant_max - spec.quant_min), spec)
        zero_point = (spec.quant_min - torch.round(low / scale)).clamp(spec.quant_min, spec.quant_max)
    return QParams(scale.float(), zero_point.to(torch.int32))


def _valid_scale(scale: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    scale = torch.where(scale == 0, torch.ones_like(scale), scale.clamp(min=MIN_SCALE))
    if spec.pow2_scale:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    return scale.float().double()  # kernels take float32: choose zero_point with the scale they will use


def _broadcast(values: torch.Tensor, like: torch.Tensor, axis: int | None) -> torch.Tensor:
    if axis is None:
        return values.reshape(())
    shape = [1] * like.dim()
    shape[axis] = -1
    return values.reshape(shape)


def quantize(x: torch.Tensor, qparams: QParams, spec: QuantSpec) -> torch.Tensor:
    """Integers ``clamp(round(x / scale) + zero_point, quant_min, quant_max)`` of ``spec.dtype``.

    Args:
        x: float32, any shape; channels on ``spec.ch_axis`` if per channel.
    """
    inverse = _broadcast(1.0 / qparams.scale, x, spec.ch_axis)
    zero_point = _broadcast(qparams.zero_point, x, spec.ch_axis)
    if x.numel() <= _CHUNK:
        return _rounded(x, inverse, zero_point, spec)
    q = torch.empty_like(x, dtype=spec.dtype)
    rows = max(1, _CHUNK * x.shape[0] // x.numel())
    for start in range(0, x.shape[0], rows):  # part by part: temporaries of a large weight would double the memory
        part = slice(start, start + rows)
        own, at = (v[part] if v.dim() and v.shape[0] > 1 else v for v in (inverse, zero_point))
        q[part] = _rounded(x[part], own, at, spec)
    return q


def _rounded(x: torch.Tensor, inverse: torch.Tensor, zero_point: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    return (x * inverse).round_().add_(zero_point).clamp_(spec.quant_min, spec.quant_max).to(spec.dtype)


def dequantize(q: torch.Tensor, qparams: QParams, ch_axis: int | None = None) -> torch.Tensor:
    """Real float32 values ``scale * (q - zero_point)`` of the integers ``q``."""
    real = q.to(torch.float32)  # in place from here: a large weight's temporaries would double the memory
    real -= _broadcast(qparams.zero_point, q, ch_axis)
    real *= _broadcast(qparams.scale, q, ch_axis)
    return real


def sqnr(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Signal to quantization noise ratio in dB: ``20 log10(|expected| / |expected - actual|)``.

    ``inf`` for identical tensors, ``-inf`` for noise on a signal that is all zero.

    Args:
        expected, actual: float tensors of one shape.
    """
    signal = torch.linalg.vector_norm(expected.double())
    noise = torch.linalg.vector_norm(expected.double() - actual.double())
    if noise == 0:
        return float("inf")
    return float(20 * torch.log10(signal / noise))
