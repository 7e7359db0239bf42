"""oneDNN's C API; :mod:`fxq.onednn_primitives` has what is computed with it.

torch has oneDNN inside, but a call through ``quantized::conv2d`` takes 9 to 20 us longer than the kernel, and torch
does not export oneDNN's functions. Where its library was not stripped, as in the wheels for Linux, they are called at
the addresses that its symbol table gives; ``pip install "fxq[onednn]"`` brings an older oneDNN that exports them.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib.metadata
import os
import platform
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxq.elf_symbols import function_addresses
from fxq.errors import BackendError, MissingDependencyError

PACKAGE = "onednn-cpu-gomp"  # shares its threads with torch
_MAJOR = 3  # of the C API below

_CPU, _IN_ORDER, _ANY_LAYOUT = 1, 1, 1
DTYPES = {torch.float32: 3, torch.int32: 4, torch.int8: 5, torch.uint8: 6, torch.quint8: 6}

Pointer, Int, Dims = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64 * 12
_Float, _New = ctypes.c_float, ctypes.POINTER(Pointer)


class Argument(ctypes.Structure):
    """A memory and which of a primitive's arguments it is."""

    _fields_ = (("argument", Int), ("memory", Pointer))


class _Version(ctypes.Structure):
    _fields_ = (("major", Int), ("minor", Int), ("patch", Int))


_STATUS_OF: dict[str, tuple[Any, ...]] = {
    "engine_create": (_New, Int, ctypes.c_size_t),
    "stream_create": (_New, Pointer, Int),
    "stream_wait": (Pointer,),
    "memory_desc_create_with_strides": (_New, Int, Dims, Int, Dims),
    "memory_desc_create_with_tag": (_New, Int, Dims, Int, Int),
    "memory_create": (_New, Pointer, Pointer, Pointer),
    "memory_set_data_handle": (Pointer, Pointer),
    "primitive_attr_create": (_New,),
    "primitive_attr_set_scales_mask": (Pointer, Int, Int),
    "primitive_attr_set_zero_points_mask": (Pointer, Int, Int),
    "primitive_attr_set_scratchpad_mode": (Pointer, Int),
    "primitive_attr_set_post_ops": (Pointer, Pointer),
    "post_ops_create": (_New,),
    "post_ops_append_eltwise": (Pointer, Int, _Float, _Float),
    "post_ops_append_sum": (Pointer, _Float, ctypes.c_int32, Int),
    "post_ops_append_binary": (Pointer, Int, Pointer),
    "convolution_forward_primitive_desc_create": (
        _New, Pointer, Int, Int, Pointer, Pointer, Pointer, Pointer, Dims, Dims, Dims, Dims, Pointer,
    ),
    "pooling_forward_primitive_desc_create": (
        _New, Pointer, Int, Int, Pointer, Pointer, Dims, Dims, Dims, Dims, Dims, Pointer,
    ),
    "binary_primitive_desc_create": (_New, Pointer, Int, Pointer, Pointer, Pointer, Pointer),
    "reorder_primitive_desc_create": (_New, Pointer, Pointer, Pointer, Pointer, Pointer),
    "primitive_create": (_New, Pointer),
    "primitive_execute": (Pointer, Pointer, Int, Pointer),  # an array of Argument
    **{
        f"{kind}_destroy": (Pointer,)
        for kind in ("stream", "memory_desc", "memory", "primitive_attr", "post_ops", "primitive_desc", "primitive")
    },
}  # fmt: skip
_FUNCTIONS = {  # what each returns, and its arguments
    **{name: (Int, *arguments) for name, arguments in _STATUS_OF.items()},
    "memory_desc_get_size": (ctypes.c_size_t, Pointer),
    "primitive_desc_query_md": (Pointer, Pointer, Int, Int),
}


def _function(address: int, result: Any, *arguments: Any) -> Any:
    return ctypes.CFUNCTYPE(result, *arguments)(address)


class Handle:
    """An object of oneDNN's, destroyed with this one."""

    def __init__(self, pointer: Any, destroy: Callable[[Any], Any] | None) -> None:
        self.pointer = self._as_parameter_ = pointer
        if destroy is not None:
            weakref.finalize(self, destroy, pointer)


class Library:
    """oneDNN; see :func:`library`.

    Args:
        addresses: of its functions, by name.
    """

    def __init__(self, addresses: Mapping[str, int]) -> None:
        missing = [name for name in ("version", *_FUNCTIONS) if f"dnnl_{name}" not in addresses]
        if missing:
            raise BackendError(f"this oneDNN has no dnnl_{missing[0]}: pip install 'fxq[onednn]'")
        version = _function(addresses["dnnl_version"], ctypes.POINTER(_Version))().contents
        self.version = f"{version.major}.{version.minor}.{version.patch}"
        if version.major != _MAJOR:
            raise BackendError(f"this is oneDNN {self.version}, not {_MAJOR}: pip install 'fxq[onednn]'")
        self._functions = {
            name: _function(addresses[f"dnnl_{name}"], result, *arguments)
            for name, (result, *arguments) in _FUNCTIONS.items()
        }
        self.execute = self._functions["primitive_execute"]
        self.set_data = self._functions["memory_set_data_handle"]
        self._size, self._query = self._functions["memory_desc_get_size"], self._functions["primitive_desc_query_md"]
        self.engine = self.make("engine_create", None, _CPU, 0)

    def call(self, name: str, *arguments: Any) -> None:
        """Run ``dnnl_<name>``; BackendError if it fails."""
        status = self._functions[name](*arguments)
        if status:
            raise BackendError(f"oneDNN {self.version}: {name} failed with status {status}")

    def make(self, name: str, kind: str | None, *arguments: Any) -> Handle:
        """What ``dnnl_<name>`` makes; ``dnnl_<kind>_destroy`` will destroy it."""
        pointer = Pointer()
        self.call(name, ctypes.byref(pointer), *arguments)
        return Handle(pointer, None if kind is None else self._functions[f"{kind}_destroy"])

    def stream(self) -> Handle:
        """A queue that runs what it is given in order; for one thread."""
        return self.make("stream_create", "stream", self.engine, _IN_ORDER)

    def described(self, shape: Sequence[int], dtype: torch.dtype, strides: Sequence[int] | None) -> Handle:
        """A memory descriptor; without strides oneDNN chooses the layout."""
        dims = Dims(*shape)
        if strides is None:
            tag = _ANY_LAYOUT
            return self.make("memory_desc_create_with_tag", "memory_desc", len(shape), dims, DTYPES[dtype], tag)
        given = len(shape), dims, DTYPES[dtype], Dims(*strides)
        return self.make("memory_desc_create_with_strides", "memory_desc", *given)

    def description(self, of: Handle, what: int) -> Any:
        """The memory descriptor that a primitive descriptor asks for, ``None`` if none; it lives as long as that."""
        found = self._query(of, what, 0)
        return Pointer(found) if found and self._size(found) else None

    def size(self, description: Any) -> int:
        """Bytes that what is described takes."""
        return int(self._size(description))

    def memory(self, x: torch.Tensor, description: Any = None) -> Handle:
        """A tensor's memory, which must outlive it."""
        if description is None:
            description = self.described(x.shape, x.dtype, x.stride())
        return self.make("memory_create", "memory", description, self.engine, Pointer(x.data_ptr()))


@functools.cache
def library() -> Library:
    """torch's oneDNN, or else that of the ``onednn`` extra or the system's.

    Raises:
        MissingDependencyError: if there is none.
        BackendError: if it is not version 3.
    """
    try:
        return Library(_inside_torch())
    except (OSError, LookupError, BackendError):
        return Library(_installed())


def is_available() -> bool:
    """Whether :func:`library` will find one that works."""
    try:
        library()
    except (MissingDependencyError, BackendError, OSError):
        return False
    return True


def _inside_torch() -> dict[str, int]:
    if platform.machine() != "x86_64":
        raise LookupError("oneDNN has int8 kernels for x86")
    path = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so")
    return function_addresses(path, "dnnl_", exported="aoti_torch_device_type_cpu")


def _installed() -> dict[str, int]:
    path = _path()
    if path is None:
        raise MissingDependencyError("this needs oneDNN's C API: pip install 'fxq[onednn]'")
    found = ctypes.CDLL(path)
    names = [f"dnnl_{name}" for name in ("version", *_FUNCTIONS)]
    return {name: ctypes.cast(found[name], Pointer).value or 0 for name in names if hasattr(found, name)}


def _path() -> str | None:
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return ctypes.util.find_library("dnnl")
    names = [file for file in files if file.name.startswith(("libdnnl.so", "dnnl.dll"))]
    return os.path.realpath(names[0].locate()) if names else None
