"""A layer and its BatchNorm trained as the one layer they will be in int8.

After folding, the layer's weight is ``w * factor`` with ``factor = gamma / sqrt(var + eps)``, so this is what is
rounded in training too, with the running variance (Krishnamoorthi, arXiv:1806.08342, section 3.2.2). While BatchNorm
uses the batch's statistics, the factor is divided out again and BatchNorm follows::

    y = batch_norm(conv(x, fake_quantize(w * factor) / factor, bias))

With the running statistics (eval mode, or frozen) this is the folded layer::

    y = conv(x, fake_quantize(w * factor), bias * factor + beta - mean * factor)

Dividing the weight instead of the layer's output is the same to rounding, and costs no pass over activations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def channel_factor(var: Tensor, gamma: Tensor | None, eps: float, batch: bool) -> Tensor:
    """What folding multiplies each output channel with, ``[C]``.

    Where gamma is zero and will be divided out, it counts as one: the weights behind it stay trainable.

    Args:
        batch: BatchNorm uses the batch's statistics.
    """
    inverse = torch.rsqrt(var + eps)
    if gamma is None:
        return inverse
    return inverse * (torch.where(gamma == 0, torch.ones_like(gamma), gamma) if batch else gamma)


def scale_channels(weight: Tensor, factor: Tensor, transposed: bool, groups: int) -> Tensor:
    """A weight with each output channel multiplied by its factor ``[C]``.

    A transposed conv's weight is ``[in, out / groups, ...]``, its output channels numbered group by group.
    """
    if not transposed:
        return weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
    by_group = factor.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))
    return (weight.reshape(groups, -1, *weight.shape[1:]) * by_group).reshape(weight.shape)


def layer_weight(weight: Tensor, factor: Tensor, batch: bool, transposed: bool, groups: int) -> Tensor:
    """The weight that the layer runs with, from the rounded scaled one."""
    return scale_channels(weight, factor.reciprocal(), transposed, groups) if batch else weight


def layer_bias(bias: Tensor | None, factor: Tensor, mean: Tensor, beta: Tensor | None, batch: bool) -> Tensor | None:
    """The bias that the layer runs with, ``[C]``."""
    if batch:
        return bias
    shift = -mean * factor if bias is None else (bias - mean) * factor
    return shift if beta is None else shift + beta


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    batch: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """BatchNorm of the layer's output with the batch's statistics; without them it is in the layer already."""
    return F.batch_norm(x, mean, var, gamma, beta, True, momentum, eps) if batch else x
