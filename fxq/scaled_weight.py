"""A layer's weight with a BatchNorm folded into it, computed whenever it is read.

While one call quantizes a model, the weights that BatchNorm folds into would be a second copy of nearly all of it. As
the model's own weights stay where they are, their product with the channels' factors need not be kept: it costs a pass
over the weight, which is little beside what the layer does with it.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

_CHUNK = 1 << 17  # elements computed at a time: float64 of a large weight would be twice its memory


_LARGE = 1 << 18  # elements from which a product's memory goes back to the system at once


def _own_memory(like: Tensor) -> Tensor:
    """An empty float32 tensor.

    A large one is on pages of its own. An allocator that puts small tensors into the holes that large ones leave, as
    glibc's does, finds none for the next large one, and in the end the process holds them all.
    """
    if like.numel() < _LARGE:
        return torch.empty_like(like, dtype=torch.float32)
    pages = torch.frombuffer(mmap.mmap(-1, 4 * like.numel()), dtype=torch.float32)
    return pages.as_strided(like.shape, like.stride()) if _is_dense(like) else pages.view(like.shape)


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill its memory in some order of its axes."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.numel() == 1 + sum((size - 1) * stride for size, stride in steps)


class ScaledWeight(Tensor):
    """``weight * factor`` as a tensor without memory of its own; any operation on it computes the product.

    Args:
        weight: of any floating dtype; kept, never written.
        factor: float64, one number for each entry of the weight's first axis.

    Example:
        >>> weight = ScaledWeight(torch.ones(2, 3), torch.tensor([1.0, 2.0], dtype=torch.float64))
        >>> weight.shape, weight.sum().item()
        (torch.Size([2, 3]), 9.0)
    """

    source: Tensor
    factor: Tensor

    @staticmethod
    def __new__(cls, weight: Tensor, factor: Tensor) -> ScaledWeight:
        made: ScaledWeight = Tensor._make_wrapper_subclass(
            cls, weight.shape, dtype=torch.float32
        )
        made.source, made.factor = weight.detach(), factor.reshape(-1, *[1] * (weight.dim() - 1))
        return made

    def __init__(self, weight: Tensor, factor: Tensor) -> None:
        """All is done in :meth:`__new__`."""

    def value(self) -> Tensor:
        """The product, float32, rounded once."""
        source = self.source
        made = _own_memory(source)
        rows = max(1, _CHUNK * len(source) // max(source.numel(), 1))
        parts = (tensor.split(rows) for tensor in (source, self.factor, made))
        with torch.no_grad():
            product = torch.empty_like(source[:rows], dtype=torch.float64)
            for weight, factor, out in zip(*parts, strict=True):
                out.copy_(product[: len(weight)].copy_(weight).mul_(factor))
        return made

    def parameter(self) -> nn.Parameter:
        """The product as a parameter with memory of its own."""
        return nn.Parameter(self.value())

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = self.parameter()
        return memo[id(self)]  # type: ignore[no-any-return]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ScaledWeight({list(self.shape)})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, cls.value, (args, kwargs or {}))
        return func(*args, **kwargs)
