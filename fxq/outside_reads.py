"""Which modules have their tensors or submodules read by code outside them, and what it reads of the tensors.

``self.head.weight @ x`` in the forward of a model needs the modules that it names: none of them can become a graph
module, which has other parts, while the code around it stays as it is. ``self.embeddings.projection.weight.dtype``
needs a description of the weight alone, which a graph module can go on giving.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

_PROPERTIES = ("dtype", "device", "shape", "ndim")
_METHODS = ("dim", "size", "numel", "is_floating_point")
_ASKING = {getattr(torch.Tensor, name).__get__ for name in _PROPERTIES}
_ASKING |= {getattr(torch.Tensor, name) for name in _METHODS}


@dataclass(frozen=True)
class Described:
    """Stands for a tensor that became part of a kernel: what may be asked of it beside its values."""

    path: str
    shape: torch.Size
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")  # where all int8 kernels run

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __getattr__(self, name: str) -> Any:
        given = ", ".join((*_PROPERTIES, *_METHODS))
        where = self.__dict__.get("path", "")  # empty while it is unpickled
        raise AttributeError(f"'{where}' is part of an int8 kernel, of which no '{name}' can be read, but {given}")


@dataclass
class Reads:
    """What code outside reads while the modules do not run.

    Attributes:
        parts: paths of the modules whose parts it takes.
        described: paths of tensors of which it only asks what :class:`Described` can say.
    """

    parts: set[str] = field(default_factory=set)
    described: set[str] = field(default_factory=set)


class _Watched(torch.Tensor):
    """A tensor that tells when more than a description is taken from it."""

    used: Callable[[], None]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _ASKING:
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, _Watched):
                    value.used()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class _Chains:
    """Follows reads such as ``self.a.b.weight`` from module to module to their end."""

    def __init__(self, reads: Reads) -> None:
        self.reads = reads
        self.reached: nn.Module | None = None
        self.through: tuple[str, ...] = ()

    def read(self, module: nn.Module, path: str, name: str, value: Any) -> Any:
        """Note the read of a module's part; returns what the reader gets."""
        if value is self.reached:  # asked once whether it is there, and once for it
            return value
        through = (*self.through, path) if module is self.reached else (path,)
        if module is not self.reached:
            self.end()
        self.reached = None
        if isinstance(value, nn.Module):
            self.reached, self.through = value, through
        elif isinstance(value, torch.Tensor):
            self.reads.described.add(f"{path}.{name}")
            watched = value.detach().as_subclass(_Watched)
            watched.used = lambda: self.reads.parts.update(through)
            return watched
        else:
            self.reads.parts.update(through)
        return value

    def end(self) -> None:
        """What a chain ends with, other than with a tensor, may be used in any way."""
        if self.reached is not None:
            self.reads.parts.update(self.through)
        self.reached = None


@contextmanager
def watching_reads(model: nn.Module) -> Iterator[Reads]:
    """While open, collects what is read of modules while they do not run."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = Reads()
    chains = _Chains(found)
    running: list[int] = []
    original = nn.Module.__getattr__

    def read(module: nn.Module, name: str) -> Any:
        value = original(module, name)
        if running and id(module) in paths and id(module) not in running:
            return chains.read(module, paths[id(module)], name, value)
        return value

    def enter(module: nn.Module, _: Any) -> None:
        running.append(id(module))

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        running.remove(id(module))

    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with mock.patch.object(nn.Module, "__getattr__", read):
            yield found
    finally:
        chains.end()
        for handle in handles:
            handle.remove()
