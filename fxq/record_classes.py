"""Classes of what a model returns, such as named tuples and ``ModelOutput``: files name them, the float model has them.

A graph calls such a class to make its result. A file cannot bring code, so it holds the name alone, and the class is
looked up where the code of the float model comes from. Nothing is imported for it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from fxq.errors import ConfigError, StageError

Classes = Callable[[str], Any]  # from the name in a file to the class


def is_record(value: Any) -> bool:
    """Whether a value is a class that only holds what it is given: a named tuple, a dict or a dataclass.

    A dataclass that does more (``__post_init__``) is none, unless it is a dict: transformers and diffusers have those.
    """
    if not isinstance(value, type) or value.__module__ == "builtins":
        return False
    named_tuple = issubclass(value, tuple) and hasattr(value, "_fields")
    return named_tuple or issubclass(value, dict) or (dataclasses.is_dataclass(value) and not _does_more(value))


def _does_more(cls: type) -> bool:
    return hasattr(cls, "__post_init__")


def record_name(value: Any) -> str | None:
    """What a file calls a class; ``None`` for what is none, or cannot be found by its name.

    Example:
        >>> import collections
        >>> record_name(collections.Counter), record_name(print)
        ('collections:Counter', None)
    """
    if not is_record(value):
        return None
    name = f"{value.__module__}:{value.__qualname__}"
    return name if _found(name) is value else None


def _found(name: str) -> Any:
    """What stands at a name, read without running anything, as ``getattr`` of a module may."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, "__dict__", {}).get(part)
    return found


def classes_of(model: nn.Module | None) -> Classes:
    """Looks up classes for a file, in the packages that the modules of a model are from; not in torch.

    Args:
        model: the float model, if one is given.
    """
    modules = [] if model is None else [model, *model.modules()]
    packages = {type(module).__module__.partition(".")[0] for module in modules} - {"torch"}

    def find(name: str) -> Any:
        if model is None:
            raise ConfigError(
                f"the file's model returns a '{name}', whose code it cannot hold; load it with model= the float model"
            )
        found = _found(name) if name.partition(":")[0].partition(".")[0] in packages else None
        if record_name(found) != name:
            raise ConfigError(
                f"the file's model returns a '{name}', and the code of the given model (in "
                f"{', '.join(sorted(packages)) or 'torch'}) has no such dataclass, named tuple or dict"
            )
        return found

    return find


def class_without_code(name: str) -> Any:
    """A class of that name, for tables: it cannot be called."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise StageError(f"the code of '{name}' is missing: fxq.load the file with model= the float model")

    module, _, path = name.partition(":")
    return type(path.rpartition(".")[2], (), {"__new__": refuse, "__module__": module, "__qualname__": path})
