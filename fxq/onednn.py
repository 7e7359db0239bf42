"""oneDNN's C API: int8 convolutions that are made once, and then cost one call each.

torch has oneDNN inside, but a call through ``quantized::conv2d`` takes 9 to 20 us longer than the kernel, and torch
lets nobody else call it. ``pip install "fxq[onednn]"`` brings the same library with its C API.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib.metadata
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fxq.errors import BackendError, MissingDependencyError

PACKAGE = "onednn-cpu-gomp"  # shares its threads with torch
_MAJOR = 3  # of the C API below

_CPU, _IN_ORDER, _FORWARD_INFERENCE, _DIRECT, _ANY_LAYOUT, _USER_SCRATCHPAD = 1, 1, 96, 1, 1, 1
_QUERY_WEIGHTS, _QUERY_SCRATCHPAD = 131, 136
_SRC, _DST, _WEIGHTS, _BIAS, _SCRATCHPAD, _SCALES, _ZERO_POINTS = 1, 17, 33, 41, 80, 4096, 8192
_DTYPES = {torch.float32: 3, torch.int32: 4, torch.int8: 5, torch.uint8: 6, torch.quint8: 6}
# algorithm, alpha, beta
_ACTIVATIONS = {"relu": (0x20, 0.0, 0.0), "swish": (0x2C, 1.0, 0.0), "hardswish": (0x34, 1 / 6, 0.5)}

_Pointer, _Int, _Float, _Dims = ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_int64 * 12
_New = ctypes.POINTER(_Pointer)


class _Argument(ctypes.Structure):
    _fields_ = (("argument", _Int), ("memory", _Pointer))


class _Version(ctypes.Structure):
    _fields_ = (("major", _Int), ("minor", _Int), ("patch", _Int))


_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "engine_create": (_New, _Int, ctypes.c_size_t),
    "stream_create": (_New, _Pointer, _Int),
    "stream_wait": (_Pointer,),
    "memory_desc_create_with_strides": (_New, _Int, _Dims, _Int, _Dims),
    "memory_desc_create_with_tag": (_New, _Int, _Dims, _Int, _Int),
    "memory_create": (_New, _Pointer, _Pointer, _Pointer),
    "memory_set_data_handle": (_Pointer, _Pointer),
    "primitive_attr_create": (_New,),
    "primitive_attr_set_scales_mask": (_Pointer, _Int, _Int),
    "primitive_attr_set_zero_points_mask": (_Pointer, _Int, _Int),
    "primitive_attr_set_scratchpad_mode": (_Pointer, _Int),
    "primitive_attr_set_post_ops": (_Pointer, _Pointer),
    "post_ops_create": (_New,),
    "post_ops_append_eltwise": (_Pointer, _Int, _Float, _Float),
    "convolution_forward_primitive_desc_create": (
        _New, _Pointer, _Int, _Int, _Pointer, _Pointer, _Pointer, _Pointer, _Dims, _Dims, _Dims, _Dims, _Pointer,
    ),
    "reorder_primitive_desc_create": (_New, _Pointer, _Pointer, _Pointer, _Pointer, _Pointer),
    "primitive_create": (_New, _Pointer),
    "primitive_execute": (_Pointer, _Pointer, _Int, _Pointer),  # an array of _Argument
    **{
        f"{kind}_destroy": (_Pointer,)
        for kind in ("stream", "memory_desc", "memory", "primitive_attr", "post_ops", "primitive_desc", "primitive")
    },
}  # fmt: skip


class _Handle:
    """An object of oneDNN's, destroyed with this one."""

    def __init__(self, pointer: Any, destroy: Callable[[Any], Any] | None) -> None:
        self.pointer = self._as_parameter_ = pointer
        if destroy is not None:
            weakref.finalize(self, destroy, pointer)


class Library:
    """libdnnl; see :func:`library`."""

    def __init__(self, path: str) -> None:
        found = ctypes.CDLL(path)
        found.dnnl_version.restype = ctypes.POINTER(_Version)
        version = found.dnnl_version().contents
        self.version = f"{version.major}.{version.minor}.{version.patch}"
        if version.major != _MAJOR:
            raise BackendError(f"{path} is oneDNN {self.version}, not {_MAJOR}: pip install 'fxq[onednn]'")
        self._functions = {}
        for name, arguments in _FUNCTIONS.items():
            self._functions[name] = function = getattr(found, f"dnnl_{name}")
            function.argtypes = arguments
        self.execute = self._functions["primitive_execute"]
        self.set_data = self._functions["memory_set_data_handle"]
        self._size, self._query = found.dnnl_memory_desc_get_size, found.dnnl_primitive_desc_query_md
        self._size.argtypes, self._size.restype = (_Pointer,), ctypes.c_size_t
        self._query.argtypes, self._query.restype = (_Pointer, _Int, _Int), _Pointer
        self.engine = self.make("engine_create", None, _CPU, 0)

    def call(self, name: str, *arguments: Any) -> None:
        """Run ``dnnl_<name>``; BackendError if it fails."""
        status = self._functions[name](*arguments)
        if status:
            raise BackendError(f"oneDNN {self.version}: {name} failed with status {status}")

    def make(self, name: str, kind: str | None, *arguments: Any) -> _Handle:
        """What ``dnnl_<name>`` makes; ``dnnl_<kind>_destroy`` will destroy it."""
        pointer = _Pointer()
        self.call(name, ctypes.byref(pointer), *arguments)
        return _Handle(pointer, None if kind is None else self._functions[f"{kind}_destroy"])

    def stream(self) -> _Handle:
        """A queue that runs what it is given in order; for one thread."""
        return self.make("stream_create", "stream", self.engine, _IN_ORDER)

    def described(self, shape: Sequence[int], dtype: torch.dtype, strides: Sequence[int] | None) -> _Handle:
        """A memory descriptor; without strides oneDNN chooses the layout."""
        dims = _Dims(*shape)
        if strides is None:
            tag = _ANY_LAYOUT
            return self.make("memory_desc_create_with_tag", "memory_desc", len(shape), dims, _DTYPES[dtype], tag)
        given = len(shape), dims, _DTYPES[dtype], _Dims(*strides)
        return self.make("memory_desc_create_with_strides", "memory_desc", *given)

    def description(self, of: _Handle, what: int) -> Any:
        """The memory descriptor that a primitive descriptor asks for, ``None`` if none; it lives as long as that."""
        found = self._query(of, what, 0)
        return _Pointer(found) if found and self._size(found) else None

    def buffer(self, description: Any) -> torch.Tensor:
        """Memory for what is described."""
        return torch.empty(self._size(description), dtype=torch.uint8)

    def memory(self, x: torch.Tensor, description: Any = None) -> _Handle:
        """A tensor's memory, which must outlive it."""
        if description is None:
            description = self.described(x.shape, x.dtype, x.stride())
        return self.make("memory_create", "memory", description, self.engine, _Pointer(x.data_ptr()))


@functools.cache
def library() -> Library:
    """The oneDNN of the ``onednn`` extra, or the system's.

    Raises:
        MissingDependencyError: if there is none.
        BackendError: if it is not version 3.
    """
    path = _path()
    if path is None:
        raise MissingDependencyError("this needs oneDNN's C API: pip install 'fxq[onednn]'")
    return Library(path)


def is_available() -> bool:
    """Whether :func:`library` will find one that works."""
    try:
        library()
    except (MissingDependencyError, BackendError, OSError):
        return False
    return True


def _path() -> str | None:
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return ctypes.util.find_library("dnnl")
    names = [file for file in files if file.name.startswith(("libdnnl.so", "dnnl.dll"))]
    return os.path.realpath(names[0].locate()) if names else None


class ConvSpec(NamedTuple):
    """An int8 convolution: uint8 in, int8 symmetric weight, float bias, uint8 out.

    Attributes:
        weight: int8 ``[out, in / groups, *kernel]``.
        scales: float32, of the weight, ``[out]`` or ``[1]``.
        bias: float32 ``[out]``, or ``None``.
        stride, padding, dilation: one number a dimension.
        input, output: scale and zero_point.
        activation: ``"relu"``, ``"swish"``, ``"hardswish"`` or ``None``; a relu that saturation does is none.
    """

    weight: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    input: tuple[float, int]
    output: tuple[float, int]
    activation: str | None = None


class Convolution:
    """A primitive with its weight in the layout oneDNN wants, for images of one shape in channels_last.

    It never changes: any number of :class:`ConvolutionCall` may run it at the same time.

    Args:
        spec: the convolution.
        shapes: of the input and of the output, ``[N, C, H, W]``.
    """

    def __init__(self, spec: ConvSpec, shapes: tuple[Sequence[int], Sequence[int]]) -> None:
        lib = library()
        weight = spec.weight.contiguous()
        if spec.groups > 1:
            weight = weight.unflatten(0, (spec.groups, -1))
        self.strides = tuple(channels_last_strides(shape) for shape in shapes)
        self.input, result = (
            lib.described(shape, torch.uint8, strides) for shape, strides in zip(shapes, self.strides, strict=True)
        )
        wanted = lib.described(weight.shape, weight.dtype, None)
        bias = None if spec.bias is None else lib.described(spec.bias.shape, torch.float32, (1,))
        padding = _Dims(*spec.padding)
        description = lib.make(
            "convolution_forward_primitive_desc_create", "primitive_desc", lib.engine, _FORWARD_INFERENCE, _DIRECT,
            self.input, wanted, bias, result, _Dims(*spec.stride), _Dims(*(d - 1 for d in spec.dilation)), padding,
            padding, _attributes(lib, spec),
        )  # fmt: skip
        self.primitive = lib.make("primitive_create", "primitive", description)
        self.scratchpad = lib.description(description, _QUERY_SCRATCHPAD)
        constants = _constants(spec) | {_WEIGHTS: weight}
        layouts = {_WEIGHTS: lib.description(description, _QUERY_WEIGHTS)}
        constants[_WEIGHTS] = _reordered(lib, weight, layouts[_WEIGHTS])
        self.constants = {which: lib.memory(t, layouts.get(which)) for which, t in constants.items()}
        self.output = result
        self._alive = description, constants


class ConvolutionCall:
    """``call(x)`` writes a convolution of ``x`` to its own memory and returns that, the same tensor each time.

    Args:
        convolution: the primitive.
        out: what it writes to, dense in channels_last.
        stream: of the thread.
        x: the input, if it is the same tensor each time; then ``call`` does not look at what it is given.
    """

    def __init__(
        self, convolution: Convolution, out: torch.Tensor, stream: _Handle, x: torch.Tensor | None = None
    ) -> None:
        lib = library()
        self.__name__ = "convolution"  # as the target of a torch.fx node
        self.out = out
        self._strides = convolution.strides[0]
        self._pointer = 0
        own = out if x is None else x  # any address will do for an input that is set later
        memories = {_SRC: lib.memory(own, convolution.input), _DST: lib.memory(out, convolution.output)}
        memories |= convolution.constants
        if convolution.scratchpad is not None:
            scratchpad = lib.buffer(convolution.scratchpad)
            memories[_SCRATCHPAD] = lib.memory(scratchpad, convolution.scratchpad)
            self._scratchpad = scratchpad
        pointers = [_Argument(which, memory.pointer) for which, memory in memories.items()]
        arguments = (_Argument * len(pointers))(*pointers)
        address = _Pointer(ctypes.addressof(arguments))
        self._run = convolution.primitive.pointer, stream.pointer, _Int(len(pointers)), address
        self._input, self._fixed = memories[_SRC].pointer, x is not None
        self._execute, self._set_data = lib.execute, lib.set_data
        self._alive = convolution, stream, memories, arguments, x

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self._fixed:
            if x.stride() != self._strides:
                x = x.contiguous(memory_format=torch.channels_last)
            pointer = x.data_ptr()
            if pointer != self._pointer:
                self._set_data(self._input, pointer)
                self._pointer = pointer
        if self._execute(*self._run):
            raise BackendError("oneDNN failed to run a convolution")
        return self.out


def channels_last_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a dense tensor ``[N, C, H, W]`` in channels_last."""
    _, channels, height, width = shape
    return channels * height * width, 1, width * channels, channels


def _constants(spec: ConvSpec) -> dict[int, torch.Tensor]:
    found = {
        _SCALES | _SRC: torch.tensor([spec.input[0]]),
        _SCALES | _WEIGHTS: spec.scales.float().contiguous(),
        _SCALES | _DST: torch.tensor([spec.output[0]]),
        _ZERO_POINTS | _SRC: torch.tensor([spec.input[1]], dtype=torch.int32),
        _ZERO_POINTS | _DST: torch.tensor([spec.output[1]], dtype=torch.int32),
    }
    if spec.bias is not None:
        found[_BIAS] = spec.bias.detach().float().contiguous()
    return found


def _attributes(lib: Library, spec: ConvSpec) -> _Handle:
    attributes = lib.make("primitive_attr_create", "primitive_attr")
    per_channel = 3 if spec.groups > 1 else 1  # bits of the weight's axes that have scales of their own
    masks = {_SRC: 0, _WEIGHTS: per_channel if spec.scales.numel() > 1 else 0, _DST: 0}
    for which, mask in masks.items():
        lib.call("primitive_attr_set_scales_mask", attributes, which, mask)
    for which in (_SRC, _DST):
        lib.call("primitive_attr_set_zero_points_mask", attributes, which, 0)
    lib.call("primitive_attr_set_scratchpad_mode", attributes, _USER_SCRATCHPAD)
    if spec.activation is not None:
        after = lib.make("post_ops_create", "post_ops")
        lib.call("post_ops_append_eltwise", after, *_ACTIVATIONS[spec.activation])
        lib.call("primitive_attr_set_post_ops", attributes, after)
    return attributes


def _reordered(lib: Library, weight: torch.Tensor, layout: Any) -> torch.Tensor:
    """A weight's memory in another layout."""
    found = lib.buffer(layout)
    given = lib.described(weight.shape, weight.dtype, weight.stride())
    description = lib.make(
        "reorder_primitive_desc_create", "primitive_desc", given, lib.engine, layout, lib.engine, None
    )
    reorder, stream = lib.make("primitive_create", "primitive", description), lib.stream()
    memories = {_SRC: lib.memory(weight), _DST: lib.memory(found, layout)}
    arguments = (_Argument * 2)(*(_Argument(which, memory.pointer) for which, memory in memories.items()))
    lib.call("primitive_execute", reorder, stream, 2, ctypes.addressof(arguments))
    lib.call("stream_wait", stream)
    return found
