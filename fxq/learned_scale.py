"""Scales that are trained with the weights.

LSQ (Esser et al., arXiv:1902.08153) trains the scale ``s`` itself. With ``u = x / s + z`` and the integers from ``qn``
to ``qp``, the gradient of the rounded value with respect to ``s`` is::

    round(u) - u    where qn <= round(u) <= qp
    qn - z          below
    qp - z          above

summed over the elements of a scale, times ``1 / sqrt(elements * qp)``, which keeps the steps of scale and weights in
proportion. For power-of-two scales ``s = 2 ** ceil(t)``, and ``t`` is trained, with ``ceil`` passed straight through:
TQT (Jain et al., arXiv:1903.08066).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxq.numerics import MIN_SCALE
from fxq.spec import QuantSpec


def initial_step(scale: Tensor, spec: QuantSpec) -> Tensor:
    """The parameter whose scale is ``scale``."""
    return torch.log2(scale) if spec.pow2_scale else scale


def scale_of_step(step: Tensor, spec: QuantSpec) -> Tensor:
    """The scale of a parameter: positive, with gradient."""
    step = step.float()
    if not spec.pow2_scale:
        return step.abs().clamp(min=MIN_SCALE)
    raised: Tensor = torch.exp2(step + (torch.ceil(step) - step).detach())
    return raised


def fake_quantize_learned(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, *, frozen: bool) -> Tensor:
    """``x`` rounded to a grid whose scale gets LSQ's gradient.

    Args:
        x: floating, any shape.
        scale, zero_point: float32 ``[C]``, channels on ``spec.ch_axis``; ``[1]`` per tensor.
        frozen: the scale's gradient is zero.
    """
    elements = x.numel() / scale.numel() if spec.per_channel else x[:1].numel() if x.dim() > 1 else x.numel()
    factor = 0.0 if frozen else (max(elements, 1) * spec.quant_max) ** -0.5
    shape = [1] * x.dim()
    if spec.ch_axis is not None:
        shape[spec.ch_axis] = -1
    bounds = (spec.quant_min, spec.quant_max)
    rounded: Tensor = _LearnedScale.apply(x, scale.reshape(shape), zero_point.reshape(shape), bounds, factor)
    return rounded


class _LearnedScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, bounds: tuple[int, int], factor: float) -> Any:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.bounds, ctx.factor = bounds, factor
        integers = torch.round(x * (1.0 / scale)).add_(zero_point).clamp_(*bounds)
        return integers.sub_(zero_point).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, scale, zero_point = ctx.saved_tensors
        u = x * (1.0 / scale)
        rounded = torch.round(u)
        clamped = (rounded + zero_point).clamp_(*ctx.bounds).sub_(zero_point)
        inside = clamped == rounded
        by_scale = torch.where(inside, rounded - u, clamped) * gradient
        others = [axis for axis in range(x.dim()) if scale.shape[axis] == 1]
        return gradient * inside, by_scale.sum(others, keepdim=True) * ctx.factor, None, None, None
