"""Which modules have their tensors or submodules read by code outside them, and what it reads of the tensors.

``self.head.weight @ x`` in the forward of a model needs the modules that it names: none of them can become a graph
module, which has other parts, while the code around it stays as it is. ``self.embeddings.projection.weight.dtype`` and
``next(self.parameters()).device`` need a description of a weight alone, which a graph module can go on giving.
``self.blocks[0].weight`` and ``len(self.blocks)`` need the Sequential that they ask, whatever is read of its parts.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fxq.compiled import python_modules

_ATEN = torch.ops.aten
_SAME = {_ATEN.detach, _ATEN.alias}
_MAKING = {
    _ATEN.new_empty, _ATEN.new_empty_strided, _ATEN.new_full, _ATEN.new_ones, _ATEN.new_zeros, _ATEN.empty_like,
    _ATEN.full_like, _ATEN.ones_like, _ATEN.rand_like, _ATEN.randn_like, _ATEN.zeros_like,
}  # fmt: skip
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_TORCH = os.path.dirname(torch.__file__) + os.sep
_MISSING = object()
_OF_CONTAINERS = ("__getitem__", "__iter__", "__len__")
_TAKING_TYPE = {_ATEN.to, _ATEN.type_as}  # of their second argument; only in inference mode do they get here


class Described(torch.Tensor):
    """Stands for a tensor that became part of a kernel: all that may be asked of it beside its values."""

    path: str

    @staticmethod
    def __new__(cls, path: str, shape: tuple[int, ...], dtype: torch.dtype) -> Described:
        """``path`` is for messages."""
        made: Described = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)  # on the CPU, as all kernels
        made.path = path
        return made

    def __init__(self, path: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        operation = func.overloadpacket
        if operation in _SAME:
            return copy.copy(args[0])
        asks_type = operation in _TAKING_TYPE and not isinstance(args[0], Described)
        if operation not in _MAKING and not asks_type:
            described = next(value for value in tree_leaves((args, kwargs)) if isinstance(value, Described))
            raise AttributeError(
                f"'{described.path}' is part of an int8 kernel: its shape, dtype and device can be read, but no "
                f"values, which '{operation.__name__}' takes; exclude its module"
            )
        args, kwargs = tree_map_only(Described, _without_values, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __copy__(self) -> Described:
        return Described(self.path, tuple(self.shape), self.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Described:
        return copy.copy(self)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return Described, (self.path, tuple(self.shape), self.dtype)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.path!r}, {tuple(self.shape)}, {self.dtype})"


def _without_values(described: Described) -> torch.Tensor:
    return torch.empty((), dtype=described.dtype).expand(described.shape)


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a name or the like, or some of them."""
    if isinstance(value, (list, tuple)):
        return all(is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))


@dataclass
class Reads:
    """What code outside reads while the modules do not run.

    Attributes:
        parts: paths of the modules whose parts it takes.
        described: paths of tensors of which it only asks what :class:`Described` can say, in the order of reading.
        attributes: numbers and names that it reads, such as ``kernel_size``, by path.
    """

    parts: set[str] = field(default_factory=set)
    described: dict[str, None] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)


class _Watched(torch.Tensor):
    """A tensor that tells when more than a description is taken from it."""

    used: Callable[[], None]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = args, kwargs or {}
        watched = [value for value in tree_leaves(given) if isinstance(value, _Watched)]
        with torch._C.DisableTorchFunctionSubclass():
            described = tree_map_only(_Watched, lambda tensor: Described("", tuple(tensor.shape), tensor.dtype), given)
            tried, enough = None, func != _SET_DATA  # a description would take it, and the layer never see it
            try:
                if enough:
                    tried = func(*described[0], **described[1])
            except Exception:  # of whatever kind
                enough = False
            if not enough:
                for value in watched:
                    value.used()
            result = func(*given[0], **given[1])
        return _watched(result, watched[0].used) if isinstance(tried, Described) else result


def _watched(tensor: torch.Tensor, used: Callable[[], None]) -> torch.Tensor:
    result = tensor.detach().as_subclass(_Watched)
    result.used = used
    return result


class _Chains:
    """Follows reads such as ``self.a.b.weight`` from module to module to their end."""

    def __init__(self, reads: Reads) -> None:
        self.reads = reads
        self.reached: nn.Module | None = None
        self.through: tuple[str, ...] = ()
        self.asked: dict[int, tuple[str, ...]] = {}  # through what the modules were reached that were asked for numbers

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
            return self.describe(value, f"{path}.{name}", through)
        else:
            self.reads.parts.update(through)
        return value

    def take_apart(self, module: nn.Module, path: str) -> None:
        """Note that the parts of a container are counted, indexed or gone through."""
        self.reads.parts.update((*(self.through if module is self.reached else ()), path))

    def reaching(self, module: nn.Module) -> tuple[str, ...]:
        """Through what a module was read whose parameters are listed now."""
        through = self.through if module is self.reached else ()
        if module is not self.reached:
            self.end()
        self.reached = None
        return through

    def describe(self, tensor: torch.Tensor, path: str, through: Iterable[str]) -> torch.Tensor:
        """Note that the tensor at a path is read through the modules at some paths; returns what the reader gets."""
        self.reads.described[path] = None
        return _watched(tensor, lambda: self.reads.parts.update(through))

    def ask(self, module: nn.Module, path: str, name: str, value: Any, running: Collection[str]) -> None:
        """Note what is got from a module that was reached: numbers and names leave it free to become part of a region.

        Args:
            running: the paths of modules that run; of those that the module was reached through, they run it.
        """
        if name.startswith("_"):
            return
        if module is self.reached and is_plain(value):
            self.asked[id(module)] = self.through
            self.reached = None
        through = self.asked.get(id(module), ())
        if is_plain(value):
            self.reads.attributes[f"{path}.{name}"] = value
        elif not any(around in running for around in through):
            self.reads.parts.update(through)

    def keep(self, path: str, value: Any, before: Any) -> None:
        """Note that an attribute was read that a module keeps: a number or name that stays the same leaves it free to
        become part of a region, which offers it, too.
        """
        if not is_plain(value) or not is_plain(before) or value != before:
            self.reads.parts.add(path)

    def end(self) -> None:
        """What a chain ends with, other than with a tensor or a number, may be used in any way."""
        if self.reached is not None:
            self.reads.parts.update(self.through)
        self.reached = None


@contextmanager
def watching_reads(model: nn.Module) -> Iterator[Reads]:
    """While open, collects what is read of modules while they do not run."""
    paths = {id(module): path for path, module in python_modules(model)}
    before = {id(module): dict(vars(module)) for module in model.modules()}
    found = Reads()
    chains = _Chains(found)
    running: list[int] = []
    original, original_set = nn.Module.__getattr__, nn.Module.__setattr__
    original_list, original_modules = nn.Module.named_parameters, nn.Module.named_modules

    def is_outside(module: nn.Module) -> bool:
        return bool(running) and id(module) in paths and id(module) not in running

    def read(module: nn.Module, name: str) -> Any:
        value = original(module, name)
        if is_outside(module):
            return chains.read(module, paths[id(module)], name, value)
        return value

    def get(module: nn.Module, name: str) -> Any:
        value = object.__getattribute__(module, name)
        if module is chains.reached or id(module) in chains.asked:
            chains.ask(module, paths[id(module)], name, value, {paths[part] for part in running})
        elif name[0] != "_" and is_outside(module) and name in object.__getattribute__(module, "__dict__"):
            chains.keep(paths[id(module)], value, before[id(module)].get(name, _MISSING))
        return value

    def put(module: nn.Module, name: str, value: Any) -> None:
        if is_outside(module):
            found.parts.add(paths[id(module)])
        original_set(module, name, value)

    def named_parameters(
        module: nn.Module, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Any]]:
        before = chains.reaching(module)
        for name, parameter in original_list(module, prefix, recurse, remove_duplicate):
            *through, own = name[len(prefix) + bool(prefix) :].split(".")
            around = [module]
            for child in through:
                around.append(vars(around[-1])["_modules"][child])
            if not running or id(around[-1]) not in paths or id(around[-1]) in running:
                yield name, parameter
                continue
            read = [*before, *(paths[id(part)] for part in around if id(part) not in running)]
            yield name, chains.describe(parameter, f"{read[-1]}.{own}", read)

    def watched(original: Callable[..., Any]) -> Callable[..., Any]:
        def take_apart(module: nn.Sequential, *args: Any) -> Any:
            if is_outside(module):
                chains.take_apart(module, paths[id(module)])
            return original(module, *args)

        return take_apart

    def listing(original: Callable[..., Any], deep: bool) -> Callable[..., Any]:
        def list_parts(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if running and id(module) in paths and not sys._getframe(1).f_code.co_filename.startswith(_TORCH):
                listed = [part for _, part in original_modules(module)] if deep else [module]
                found.parts.update(paths[id(part)] for part in listed if part._modules and is_outside(part))
            return original(module, *args, **kwargs)

        return list_parts

    def enter(module: nn.Module, _: Any) -> None:
        if module is chains.reached:
            chains.end()
        running.append(id(module))

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        running.remove(id(module))

    handles = []
    for _, module in python_modules(model):
        handles.append(module.register_forward_pre_hook(enter, prepend=True))  # before those that compute weights
        handles.append(module.register_forward_hook(leave, always_call=True))
    patches: list[tuple[type[nn.Module], str, Callable[..., Any]]] = [
        (nn.Module, "__getattr__", read),
        (nn.Module, "__getattribute__", get),
        (nn.Module, "__setattr__", put),
        (nn.Module, "named_modules", listing(original_modules, deep=True)),
        (nn.Module, "modules", listing(nn.Module.modules, deep=True)),
        (nn.Module, "named_children", listing(nn.Module.named_children, deep=False)),
        (nn.Module, "children", listing(nn.Module.children, deep=False)),
        (nn.Module, "named_parameters", named_parameters),
        *((nn.Sequential, name, watched(getattr(nn.Sequential, name))) for name in _OF_CONTAINERS),
    ]
    try:
        with ExitStack() as stack:
            for owner, name, replacement in patches:
                stack.enter_context(mock.patch.object(owner, name, replacement))
            yield found
    finally:
        chains.end()
        for handle in handles:
            handle.remove()
