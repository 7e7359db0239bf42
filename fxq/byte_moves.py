"""What only moves integers: joins and shuffles of images in channels_last, done on their bytes.

They are called like a :class:`~fxq.onednn_primitives.Primitive`, on memory that was chosen beforehand.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence

import torch

from fxq.onednn_primitives import integer_view


class Move(abc.ABC):
    """A move of bytes between tensors of given shapes.

    Attributes:
        scratchpad: bytes that a call needs beside its output.
    """

    scratchpad = 0

    def call(
        self,
        out: torch.Tensor,
        stream: object,
        fixed: Sequence[torch.Tensor | None] = (),
        scratchpad: torch.Tensor | None = None,
    ) -> Callable[..., torch.Tensor]:
        """What writes to ``out``; the arguments are those of :class:`~fxq.onednn_primitives.PrimitiveCall`."""
        scratchpad = torch.empty(self.scratchpad, dtype=torch.uint8) if scratchpad is None else scratchpad
        return self._made(out, fixed, scratchpad)

    @abc.abstractmethod
    def _made(
        self, out: torch.Tensor, fixed: Sequence[torch.Tensor | None], scratchpad: torch.Tensor
    ) -> Callable[..., torch.Tensor]: ...


class Join(Move):
    """Images ``[N, C_i, H, W]`` one behind the other along the channels; for integers of one scale and zero_point."""

    def _made(self, out: torch.Tensor, fixed: Sequence[torch.Tensor | None], scratchpad: torch.Tensor) -> _Join:
        return _Join(out, fixed)


class Shuffle(Move):
    """Two images ``[N, C, H, W]`` as one ``[N, 2 C, H, W]`` whose channels come from them by turns.

    A pair of bytes is one int16, the first byte the lower one, so it takes three passes over dense memory.

    Args:
        shape: of each input.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.scratchpad = 2 * torch.Size(shape).numel()

    def _made(self, out: torch.Tensor, fixed: Sequence[torch.Tensor | None], scratchpad: torch.Tensor) -> _Shuffle:
        return _Shuffle(out, fixed, scratchpad)


class _Join:
    __name__ = "join"

    def __init__(self, out: torch.Tensor, fixed: Sequence[torch.Tensor | None]) -> None:
        self._out, self._bytes = out, integer_view(out)
        self._fixed = _known(fixed)

    def __call__(self, *sources: torch.Tensor) -> torch.Tensor:
        torch.cat(self._fixed or [integer_view(x) for x in sources], 1, out=self._bytes)
        return self._out


class _Shuffle:
    __name__ = "shuffle"

    def __init__(self, out: torch.Tensor, fixed: Sequence[torch.Tensor | None], scratchpad: torch.Tensor) -> None:
        self._out = out
        n, channels, height, width = out.shape
        shape = n, height, width, channels // 2
        self._pairs = integer_view(out).permute(0, 2, 3, 1).view(-1).view(torch.int16).view(shape)
        self._low = scratchpad[: out.numel()].view(torch.int16).view(shape)
        self._fixed = [x.permute(0, 2, 3, 1) for x in _known(fixed)]

    def __call__(self, *sources: torch.Tensor) -> torch.Tensor:
        first, second = self._fixed or [integer_view(x).permute(0, 2, 3, 1) for x in sources]
        self._low.copy_(first)
        self._pairs.copy_(second).mul_(256).add_(self._low)
        return self._out


def _known(fixed: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """Integers of the sources if all of them are the same each time, else nothing."""
    known = [integer_view(x) for x in fixed if x is not None]
    return known if len(known) == len(fixed) else []
