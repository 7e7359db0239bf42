"""Whether a value is of an annotated type, for values read from a file."""

from __future__ import annotations

import dataclasses
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

_NUMBERS: dict[Any, Any] = {int: int, float: (int, float)}


def conforms(value: Any, kind: Any) -> bool:
    """Whether ``value`` is what the annotation ``kind`` says, and every field and member of it too.

    Understands classes, dataclasses and named tuples with annotations, unions, ``list``, ``set``, ``dict`` and
    ``tuple``. An integer is a float as well; a bool is neither.

    Example:
        >>> conforms([1, 2], list[int]), conforms([1, "2"], list[int])
        (True, False)
    """
    if kind is Any:
        return True
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(conforms(value, argument) for argument in arguments)
    if kind in _NUMBERS:
        return isinstance(value, _NUMBERS[kind]) and not isinstance(value, bool)
    if not isinstance(value, origin or kind):
        return False
    if origin is tuple:
        return _tuple_conforms(value, arguments)
    if origin in (list, set):
        return all(conforms(item, arguments[0]) for item in value)
    if origin is dict:
        return all(conforms(k, arguments[0]) and conforms(v, arguments[1]) for k, v in value.items())
    return wrong_field(value) is None


def wrong_field(value: Any) -> str | None:
    """Name of the first annotated field that is not of its type; ``None`` if there is none."""
    if not dataclasses.is_dataclass(value) and not hasattr(value, "_fields"):
        return None
    hints = get_type_hints(type(value))
    return next((name for name, kind in hints.items() if not conforms(getattr(value, name), kind)), None)


def _tuple_conforms(value: tuple[Any, ...], kinds: tuple[Any, ...]) -> bool:
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return all(conforms(item, kinds[0]) for item in value)
    return len(value) == len(kinds) and all(map(conforms, value, kinds))
