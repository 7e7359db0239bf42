"""Factors that even out the channels of a layer's output, chosen from the first batch while it is calibrated.

The batch is run anyway, so that looking at it costs next to nothing: :class:`fxq.passes.smooth.Smooth` says what for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_OUTLIER = 4.0  # times the median of the channels; below, there is nothing to even out
_LIMIT = 100.0  # of the factors and their inverses


class Smoothing(nn.Module):
    """Divides the channels of a tensor once, and from then on lets the layers around it do that.

    Called with the first layer's output, weight and bias and with the weights of the layers that read it. If a few
    channels of the first tensor with values are far larger than the others, each channel is divided by its factor; the
    layers' parameters get values by which the next output comes divided, and the readers make up for it.

    Attributes:
        enabled: when False, ``forward`` does nothing.
        decided: whether it has seen values.
        scale: what the channels are divided by, float64 ``[C]`` of float32 numbers; ``None`` while they are not.

    Example:
        >>> smoothing = Smoothing()
        >>> norm, reader = nn.LayerNorm(2), nn.Linear(2, 1)
        >>> _ = norm.weight.data.copy_(torch.tensor([1.0, 100.0])), reader.weight.data.fill_(1.0)
        >>> x = norm(torch.tensor([[1.0, -1.0]]))
        >>> smoothing(x, norm.weight, norm.bias, reader.weight).tolist()
        [[10.0, -10.0]]
        >>> norm.weight.tolist(), reader.weight.tolist()
        ([10.0, 10.0], [[0.1..., 10.0]])
    """

    def __init__(self) -> None:
        super().__init__()
        self.enabled, self.decided = True, False
        self.scale: Tensor | None = None

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, *readers: Tensor) -> Tensor:
        """``x``, float ``[*, C]``; divided by ``scale`` where the parameters were not yet when it was computed."""
        if self.decided or not self.enabled or not x.numel():
            return x
        with torch.inference_mode(False), torch.no_grad():  # the parameters outlive what calls this
            largest = _by_channel(x.detach().reshape(-1, x.shape[-1]))
            if not bool(largest.any()) or not bool(largest.isfinite().all()):  # which an observer complains of
                return x
            self.decided = True
            if not _has_outliers(largest):
                return x
            scale = _scales(largest, torch.stack([_by_channel(reader) for reader in readers]).amax(0))
            self.scale = scale.float().double()  # so that a product is rounded once
            _store(weight, weight.double() / _rows(self.scale, weight))
            if bias is not None:
                _store(bias, bias.double() / self.scale)
            for reader in readers:
                _store(reader, reader * scale.float())
        return x / scale.to(x.dtype)

    def get_extra_state(self) -> dict[str, Any]:
        """The decision, for ``state_dict``."""
        return {"decided": self.decided, "scale": self.scale}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`get_extra_state`'s result."""
        self.decided, self.scale = state["decided"], state["scale"]

    def extra_repr(self) -> str:
        if not self.decided:
            return "undecided"
        return "none" if self.scale is None else f"by {self.scale.min():.2g} to {self.scale.max():.2g}"


def _store(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter other memory: what it has may be the user's."""
    parameter.data = value.to(parameter.dtype)


def _rows(scale: Tensor, weight: Tensor) -> Tensor:
    return scale.reshape(-1, *[1] * (weight.dim() - 1))


def _by_channel(x: Tensor) -> Tensor:
    """The largest absolute value of each column, float64."""
    low, high = torch.aminmax(x, dim=0)
    return torch.maximum(high, -low).double()


def _has_outliers(largest: Tensor) -> bool:
    alive = largest[largest > 0]
    return bool(alive.max() >= _OUTLIER * alive.median())


def _scales(activations: Tensor, weights: Tensor) -> Tensor:
    """``sqrt(activations / weights)`` within limits, geometric mean 1; 1 for channels that are zero in either."""
    alive = (activations > 0) & (weights > 0)
    logarithm = torch.where(alive, (activations / weights.clamp(min=1e-300)).clamp(min=1e-300).log() / 2, 0.0)
    logarithm = torch.where(alive, logarithm - logarithm[alive].mean(), 0.0) if bool(alive.any()) else logarithm
    return logarithm.exp().clamp(1 / _LIMIT, _LIMIT)
