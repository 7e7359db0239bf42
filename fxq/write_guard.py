"""A guard of tensors' memory while code runs that is not known not to write to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxq.copying import memory_of


class WriteRefused(Exception):
    """Code tried to write to memory that is guarded."""


class WriteGuard(TorchDispatchMode):
    """While open, operations that would write to the memory of some tensors raise :class:`WriteRefused` instead.

    Attributes:
        refused: whether one was, also if the code caught the exception.

    Example:
        >>> x = torch.ones(2)
        >>> with WriteGuard([x]) as guard:
        ...     try: _ = x.add_(1)
        ...     except WriteRefused: pass
        >>> x, guard.refused
        (tensor([1., 1.]), True)
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.refused = False
        self._guarded = {memory_of(tensor) for tensor in tensors} - {None}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable:  # type: ignore[attr-defined]
            for value in _written(func, args, kwargs or {}):
                if memory_of(value) in self._guarded:
                    self.refused = True
                    raise WriteRefused(f"{func} on guarded memory")
        return func(*args, **(kwargs or {}))


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
