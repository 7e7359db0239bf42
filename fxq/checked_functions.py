"""What a graph from a file calls where torch's own function does not check what it is given.

torch multiplies sizes and adds up counts without a look at overflows, and then reads or writes outside of its memory;
it also hands out memory that it has not cleared. A graph that was traced calls torch's functions; one from a file,
which has their names, calls these.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

LARGEST = 1 << 31  # the product of two fits into 64 bits
_LARGEST_EXPONENT = 64


def repeat_interleave(*args: Any, **kwargs: Any) -> Any:
    """``torch.repeat_interleave``, with counts that add up to what memory can hold.

    Raises:
        ValueError: for other counts.
    """
    counts = kwargs["repeats"] if "repeats" in kwargs else args[min(len(args), 2) - 1]
    if isinstance(counts, torch.Tensor) and counts.numel() and (counts.min() < 0 or counts.double().sum() > LARGEST):
        raise ValueError("repeat_interleave with counts that are negative or too large")
    return torch.repeat_interleave(*args, **kwargs)


def unfold(*args: Any, **kwargs: Any) -> torch.Tensor:
    """``F.unfold``, with sizes that can be.

    Raises:
        ValueError: for larger ones.
    """
    require_sizes((args, kwargs))
    return F.unfold(*args, **kwargs)


def fold(*args: Any, **kwargs: Any) -> torch.Tensor:
    """``F.fold``, likewise."""
    require_sizes((args, kwargs))
    return F.fold(*args, **kwargs)


def empty(*size: Any, memory_format: Any = None, **kwargs: Any) -> torch.Tensor:
    """``torch.empty``, of zeros."""
    return torch.empty(*size, memory_format=memory_format, **kwargs).zero_()


def empty_like(*args: Any, **kwargs: Any) -> torch.Tensor:
    """``torch.empty_like``, of zeros."""
    return torch.empty_like(*args, **kwargs).zero_()


def power(base: Any, exponent: Any) -> Any:
    """``base ** exponent``, of whole numbers with a result that takes no time.

    Raises:
        ValueError: for a larger exponent.
    """
    if isinstance(base, int) and isinstance(exponent, int) and abs(exponent) > _LARGEST_EXPONENT:
        raise ValueError(f"{exponent} is too large an exponent")
    return base**exponent


def require_sizes(value: Any) -> None:
    """Refuse integers among arguments that are too large to be sizes.

    Raises:
        ValueError: for such a one.
    """
    for number in _integers(value):
        if abs(number) > LARGEST:
            raise ValueError(f"{number} is no size")


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _integers(item)
    elif isinstance(value, dict):
        yield from _integers(tuple(value.values()))


_CHECKED: dict[Any, Callable[..., Any]] = {
    torch.repeat_interleave: repeat_interleave, F.unfold: unfold, F.fold: fold, torch.empty: empty,
    torch.empty_like: empty_like, operator.pow: power,
}  # fmt: skip
TORCHS: dict[Any, Any] = {checked: function for function, checked in _CHECKED.items()}  # what each stands for


def checked(op: str, target: Any) -> tuple[str, Any]:
    """The kind and the target of a node that calls what another node does, checked where torch does not."""
    if op == "call_function":
        return op, _CHECKED.get(target, target)
    if (op, target) == ("call_method", "repeat_interleave"):
        return "call_function", repeat_interleave
    if (op, target) == ("call_method", "new_empty"):
        return op, "new_zeros"
    return op, target
