"""The mean of each input channel of a layer, recorded while calibrating.

It tells what rounding a layer's weight adds to the mean of its output: :class:`fxq.passes.correct_bias.CorrectBias`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

PLACES = 256  # of an image or a sequence that a mean is taken over, evenly spaced
_CHUNK = 1 << 20  # means added up at a time: float64 of the crops that a detector classifies would be much memory


class InputMeans(nn.Module):
    """Records the mean of each channel of a tensor; returns nothing.

    Args:
        channels: how many there are.
        places: dimensions after the channels': 0 for a linear layer, whose channels are the last axis, 2 for a conv2d,
            whose are the third from the end.

    Attributes:
        enabled: when False, ``forward`` does nothing.

    Example:
        >>> means = InputMeans(channels=2, places=2)
        >>> means(torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1).expand(4, 2, 8, 8))
        >>> means.shrunken().tolist()
        [1.0, 3.0]
    """

    _is_impure = True  # torch.fx: nothing reads the result, the call stays all the same

    total: Tensor
    squares: Tensor
    samples: Tensor

    def __init__(self, channels: int, places: int) -> None:
        super().__init__()
        self.places = places
        self.enabled = True
        self.register_buffer("total", torch.zeros(channels, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros((), dtype=torch.float64))
        self.register_buffer("samples", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> None:
        """Record ``x``: float ``[N, C, *places]``, or without ``N``; for a linear layer ``[N, *, C]``."""
        fits = x.dim() - self.places in (1, 2) or not self.places  # or the layer will say what is wrong
        if not self.enabled or not fits or not x.numel():
            return
        means = _sample_means(x.detach(), self.places)
        for part in means.split(max(1, _CHUNK // means.shape[1])):
            values = part.double()
            # Past nn.Module.__setattr__, which costs as much as the sums.
            self.total.add_(values.sum(0))
            self.squares.add_(values.square_().sum())
        self.samples.add_(means.shape[0])

    def shrunken(self) -> Tensor:
        """The mean, float64 ``[C]``, times the part of its square that the samples' scatter does not explain.

        One sample tells nothing of how far the next will be from it: its mean is taken as zero.
        """
        count = int(self.samples)
        if count < 2:
            return torch.zeros_like(self.total)
        mean = self.total / count
        power = mean.square().sum()
        scatter = (self.squares / count - power) / (count - 1)
        return mean * (1 - scatter / power.clamp(min=torch.finfo(power.dtype).tiny)).clamp(0, 1)

    def extra_repr(self) -> str:
        return f"channels={self.total.numel()}, samples={int(self.samples)}"


def _sample_means(x: Tensor, places: int) -> Tensor:
    """Means over the places of each sample, ``[N, C]``."""
    if not places:
        rows = x.reshape(1, -1) if x.dim() == 1 else x.flatten(1, -2) if x.dim() > 2 else x
        return rows if rows.dim() == 2 else rows[:, :: -(-rows.shape[1] // PLACES)].mean(1)
    batched = x if x.dim() == places + 2 else x[None]
    most = max(1, int(PLACES ** (1 / places)))
    every = [slice(None, None, max(1, -(-size // most))) for size in batched.shape[2:]]
    index = (slice(None), slice(None), *every)
    return batched[index].mean(tuple(range(2, places + 2)))
