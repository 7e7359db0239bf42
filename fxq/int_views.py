"""The same integers as a plain uint8 tensor and as one of torch's quantized tensors.

``quantized::*`` kernels take and return quantized tensors, ``onednn::*`` kernels plain ones.
"""

from __future__ import annotations

import torch


def as_uint8(x: torch.Tensor) -> torch.Tensor:
    """The integers of a quint8 tensor, in memory of their own: one call, cheaper than a view for small tensors."""
    return x.int_repr()


def as_quantized(x: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    """A quint8 tensor of the memory of a plain uint8 one.

    Args:
        x: uint8, dense in the order of its dimensions or channels_last.
    """
    view = torch._empty_affine_quantized([0], scale=scale, zero_point=zero_point, dtype=torch.quint8)
    memory = x if x.is_contiguous() else x.movedim(1, -1)
    return view.set_(memory, 0, x.shape, x.stride())  # type: ignore[call-overload,no-any-return]
