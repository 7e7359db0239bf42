"""What is computed with oneDNN directly: convolutions, pools and gates of uint8 images in channels_last, linears.

A :class:`Primitive` is made once for tensors of given shapes and never changes; a :class:`PrimitiveCall` runs it on
memory that was chosen beforehand, and costs 1.3 us beside the kernel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fxq.errors import BackendError
from fxq.onednn import DTYPES, Argument, Dims, Handle, Int, Library, Pointer, library

QParams = tuple[float, int]  # scale, zero_point
Shape = Sequence[int]

_FORWARD_INFERENCE, _DIRECT, _USER_SCRATCHPAD = 96, 1, 1
_MAX, _AVERAGE, _MULTIPLY, _SUBTRACT, _LINEAR = 0x1FF, 0x2FF, 0x1FFF1, 0x1FFF5, 0x26
_QUERY_WEIGHTS, _QUERY_SCRATCHPAD = 131, 136
_SRC, _SRC_1, _DST, _WEIGHTS, _BIAS, _SCRATCHPAD = 1, 2, 17, 33, 41, 80
_SCALES, _ZERO_POINTS, _FIRST_POST_OP = 4096, 8192, 32768
# algorithm, alpha, beta
_ACTIVATIONS = {
    "relu": (0x20, 0.0, 0.0), "swish": (0x2C, 1.0, 0.0), "hardswish": (0x34, 1 / 6, 0.5), "sigmoid": (0x29, 0.0, 0.0),
    "hardsigmoid": (0x28, 1 / 6, 0.5),
}  # fmt: skip


class Primitive:
    """A computation on tensors of one shape in channels_last; any number of calls may run it at the same time.

    Args:
        description: the primitive descriptor.
        inputs: number of the argument and shape of each.
        output: shape.
        constants: further arguments; a tensor, or a tensor and its descriptor.

    Attributes:
        images: that a run takes.
        strides: that the inputs have.
        scratchpad: bytes that a call needs beside its output.
    """

    def __init__(
        self,
        description: Handle,
        inputs: Mapping[int, Shape],
        output: Shape,
        constants: Mapping[int, tuple[torch.Tensor, Any]],
    ) -> None:
        lib = library()
        self.handle = lib.make("primitive_create", "primitive", description)
        self.inputs = {which: _image(lib, shape) for which, shape in inputs.items()}
        self.strides = [dense_strides(shape) for shape in inputs.values()]
        self.output = _image(lib, output)
        self.images = output[0]
        needed = lib.description(description, _QUERY_SCRATCHPAD)
        self.scratchpad = 0 if needed is None else lib.size(needed)
        self.constants = {which: lib.memory(*constant) for which, constant in constants.items()}
        self._needed = needed
        self._alive = description, constants

    def call(
        self,
        out: torch.Tensor,
        stream: Handle,
        fixed: Sequence[torch.Tensor | None] = (),
        scratchpad: torch.Tensor | None = None,
    ) -> Callable[..., torch.Tensor]:
        """What runs it on certain memory, image by image if it is made for one and that holds several; the arguments
        are those of :class:`PrimitiveCall`.
        """
        if len(out) == self.images:
            return PrimitiveCall(self, out, stream, fixed, scratchpad)
        images = [slice(at, at + 1) for at in range(len(out))]
        parts = [(out[image], [None if x is None else x[image] for x in fixed]) for image in images]
        return _EachImage([PrimitiveCall(self, part, stream, given, scratchpad) for part, given in parts], out)

    def memories(self, sources: Sequence[torch.Tensor], out: torch.Tensor, scratchpad: torch.Tensor) -> Any:
        """The memory of each argument, by its number."""
        lib = library()
        found = {which: lib.memory(x, self.inputs[which]) for which, x in zip(self.inputs, sources, strict=True)}
        found[_DST] = lib.memory(out, self.output)
        if self._needed is not None:
            found[_SCRATCHPAD] = lib.memory(scratchpad, self._needed)
        return found | self.constants


class PrimitiveCall:
    """``call(*sources)`` writes to memory of its own and returns that, the same tensor each time.

    Args:
        primitive: what to run.
        out: what it writes to, dense in channels_last.
        stream: of the thread.
        fixed: for each source the tensor, if it is the same each time, else ``None``; what is fixed the call does not
            look at, and copies beforehand if it is laid out otherwise.
        scratchpad: uint8, at least as many bytes as the primitive needs; calls that never run at once may share it.
    """

    def __init__(
        self,
        primitive: Primitive,
        out: torch.Tensor,
        stream: Handle,
        fixed: Sequence[torch.Tensor | None] = (),
        scratchpad: torch.Tensor | None = None,
    ) -> None:
        lib = library()
        self.__name__ = type(primitive).__name__.lower()  # as the target of a torch.fx node
        self.out = out
        given = list(fixed) or [None] * len(primitive.inputs)
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        for at, (x, strides) in enumerate(zip(given, primitive.strides, strict=True)):
            if x is not None and x.stride() != strides:
                given[at] = copy = torch.empty_strided(x.shape, strides, dtype=torch.uint8)
                self._copies.append((copy, integer_view(x)))
        scratchpad = torch.empty(primitive.scratchpad, dtype=torch.uint8) if scratchpad is None else scratchpad
        # any address will do for an input that is set later
        memories = primitive.memories([out if x is None else x for x in given], out, scratchpad)
        pointers = [Argument(which, memory.pointer) for which, memory in memories.items()]
        arguments = (Argument * len(pointers))(*pointers)
        address = Pointer(ctypes.addressof(arguments))
        self._run = primitive.handle.pointer, stream.pointer, Int(len(pointers)), address
        self._open = [
            (at, memories[which].pointer, primitive.strides[at])
            for at, (which, x) in enumerate(zip(primitive.inputs, given, strict=True))
            if x is None
        ]
        self._pointers = [0] * len(given)
        self._execute, self._set_data = lib.execute, lib.set_data
        self._alive = primitive, stream, memories, arguments, given, scratchpad

    def __call__(self, *sources: torch.Tensor) -> torch.Tensor:
        for copy, x in self._copies:
            copy.copy_(x)
        held = []  # copies live until the kernel has run
        for at, memory, strides in self._open:
            x = sources[at]
            if x.stride() != strides:
                x = dense(x)
                held.append(x)
            pointer = x.data_ptr()
            if pointer != self._pointers[at]:
                self._set_data(memory, pointer)
                self._pointers[at] = pointer
        if self._execute(*self._run):
            raise BackendError(f"oneDNN failed to run a {self.__name__}")
        return self.out


class ConvSpec(NamedTuple):
    """An int8 convolution or linear: uint8 in, int8 symmetric weight, float bias, uint8 out.

    Attributes:
        weight: int8 ``[out, in / groups, *kernel]``.
        scales: float32, of the weight, ``[out]`` or ``[1]``.
        bias: float32 ``[out]``, or ``None``.
        stride, padding, dilation: one number a dimension.
        input, output: scale and zero_point.
        activation: ``"relu"``, ``"swish"``, ``"hardswish"``, ``"sigmoid"``, ``"hardsigmoid"`` or ``None``; a relu that
            saturation does is none.
        residual: scale and zero_point of what is added before the activation; it lies where the output will.
    """

    weight: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    input: QParams
    output: QParams
    activation: str | None = None
    residual: QParams | None = None


class Convolution(Primitive):
    """An int8 convolution, with its weight in the layout oneDNN wants.

    Args:
        spec: the convolution.
        shape: of the input, ``[N, C, H, W]``, or ``[N, C]`` for a linear, whose weight is ``[out, in, 1, 1]``.
        output: shape.
    """

    def __init__(self, spec: ConvSpec, shape: Shape, output: Shape) -> None:
        lib = library()
        weight = spec.weight.contiguous()
        if spec.groups > 1:
            weight = weight.unflatten(0, (spec.groups, -1))
        wanted = lib.described(weight.shape, weight.dtype, None)
        bias = None if spec.bias is None else lib.described(spec.bias.shape, torch.float32, (1,))
        padding = Dims(*spec.padding)
        description = lib.make(
            "convolution_forward_primitive_desc_create", "primitive_desc", lib.engine, _FORWARD_INFERENCE, _DIRECT,
            _image(lib, shape), wanted, bias, _image(lib, output), Dims(*spec.stride),
            Dims(*(d - 1 for d in spec.dilation)), padding, padding, _convolution_attributes(lib, spec),
        )  # fmt: skip
        layout = lib.description(description, _QUERY_WEIGHTS)
        constants = {_WEIGHTS: (_reordered(lib, weight, layout), layout)} | _constants(spec)
        super().__init__(description, {_SRC: shape}, output, constants)


class PoolSpec(NamedTuple):
    """A pool that keeps the scale: the largest or the average of each window, padding not counted."""

    average: bool
    size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]


class Pool(Primitive):
    """A pool of uint8 images.

    Args:
        spec: the pool; an average has no padding.
        shape: of the input, ``[N, C, H, W]``.
        output: shape.
    """

    def __init__(self, spec: PoolSpec, shape: Shape, output: Shape) -> None:
        lib = library()
        windows = (out - 1 for out in output[2:])
        after = [
            max(0, at * stride + size - side - before)
            for at, stride, size, side, before in zip(
                windows, spec.stride, spec.size, shape[2:], spec.padding, strict=True
            )
        ]
        description = lib.make(
            "pooling_forward_primitive_desc_create", "primitive_desc", lib.engine, _FORWARD_INFERENCE,
            _AVERAGE if spec.average else _MAX, _image(lib, shape), _image(lib, output), Dims(*spec.stride),
            Dims(*spec.size), Dims(0, 0), Dims(*spec.padding), Dims(*after), _attributes(lib),
        )  # fmt: skip
        super().__init__(description, {_SRC: shape}, output, {})


class GateSpec(NamedTuple):
    """Images times one factor a channel, as squeeze-and-excitation has them; scale and zero_point of each."""

    input: QParams
    factor: QParams  # zero_point 0
    output: QParams


class Gate(Primitive):
    """uint8 images ``[N, C, H, W]`` times uint8 factors ``[N, C, 1, 1]``: ``(x - zero_point) * factor * scales``.

    The primitive is one image's: for several oneDNN 3.2 has only its reference implementation, 100 times slower.
    """

    def __init__(self, spec: GateSpec, shape: Shape) -> None:
        lib = library()
        shape = (1, *shape[1:])
        one = lib.described((1, 1, 1, 1), torch.float32, (1, 1, 1, 1))
        factors = (*shape[:2], 1, 1)
        scale = spec.input[0] * spec.factor[0] / spec.output[0]
        after = lib.make("post_ops_create", "post_ops")
        lib.call("post_ops_append_binary", after, _MULTIPLY, _image(lib, factors))
        lib.call("post_ops_append_eltwise", after, _LINEAR, scale, spec.output[1])
        description = lib.make(
            "binary_primitive_desc_create", "primitive_desc", lib.engine, _SUBTRACT, _image(lib, shape), one,
            _image(lib, shape), _attributes(lib, after),
        )  # fmt: skip
        constants = {_SRC_1: (torch.tensor([float(spec.input[1])]), one)}
        super().__init__(description, {_SRC: shape, _FIRST_POST_OP | _SRC_1: factors}, shape, constants)


class _EachImage:
    """One call for each image of a batch."""

    def __init__(self, calls: Sequence[PrimitiveCall], out: torch.Tensor) -> None:
        self.__name__ = calls[0].__name__
        self._calls, self._out = calls, out

    def __call__(self, *sources: torch.Tensor) -> torch.Tensor:
        for at, call in enumerate(self._calls):
            call(*(x[at : at + 1] for x in sources))
        return self._out


def integer_view(x: torch.Tensor) -> torch.Tensor:
    """The memory of a quint8 tensor as a uint8 tensor; that tensor, if it is one."""
    if not x.is_quantized:
        return x
    empty = torch.empty(0, dtype=torch.uint8)
    return empty.set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def dense(x: torch.Tensor) -> torch.Tensor:
    """A tensor in the layout that primitives read: images in channels_last, rows one after the other."""
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)


def dense_strides(shape: Shape) -> tuple[int, ...]:
    """Of such a tensor ``[N, C, H, W]`` or ``[N, C]``."""
    _, channels, *image = shape
    if not image:
        return channels, 1
    height, width = image
    return channels * height * width, 1, width * channels, channels


def _image(lib: Library, shape: Shape) -> Handle:
    """The descriptor of a uint8 tensor; rows are images of one pixel."""
    pixels = (*shape, 1, 1)[:4]
    return lib.described(pixels, torch.uint8, dense_strides(pixels))


def _constants(spec: ConvSpec) -> dict[int, tuple[torch.Tensor, Any]]:
    found = {
        _SCALES | _SRC: torch.tensor([spec.input[0]]),
        _SCALES | _WEIGHTS: spec.scales.float().contiguous(),
        _SCALES | _DST: torch.tensor([spec.output[0]]),
        _ZERO_POINTS | _SRC: torch.tensor([spec.input[1]], dtype=torch.int32),
        _ZERO_POINTS | _DST: torch.tensor([spec.output[1]], dtype=torch.int32),
    }
    if spec.bias is not None:
        found[_BIAS] = spec.bias.detach().float().contiguous()
    return {which: (constant, None) for which, constant in found.items()}


def _attributes(lib: Library, post_ops: Handle | None = None) -> Handle:
    attributes = lib.make("primitive_attr_create", "primitive_attr")
    lib.call("primitive_attr_set_scratchpad_mode", attributes, _USER_SCRATCHPAD)
    if post_ops is not None:
        lib.call("primitive_attr_set_post_ops", attributes, post_ops)
    return attributes


def _convolution_attributes(lib: Library, spec: ConvSpec) -> Handle:
    after = lib.make("post_ops_create", "post_ops")
    if spec.residual is not None:
        lib.call("post_ops_append_sum", after, *spec.residual, DTYPES[torch.uint8])
    if spec.activation is not None:
        lib.call("post_ops_append_eltwise", after, *_ACTIVATIONS[spec.activation])
    attributes = _attributes(lib, after)
    per_channel = 3 if spec.groups > 1 else 1  # bits of the weight's axes that have scales of their own
    masks = {_SRC: 0, _WEIGHTS: per_channel if spec.scales.numel() > 1 else 0, _DST: 0}
    for which, mask in masks.items():
        lib.call("primitive_attr_set_scales_mask", attributes, which, mask)
    for which in (_SRC, _DST):
        lib.call("primitive_attr_set_zero_points_mask", attributes, which, 0)
    return attributes


def _reordered(lib: Library, weight: torch.Tensor, layout: Any) -> torch.Tensor:
    """A weight's memory in another layout."""
    found = torch.empty(lib.size(layout), dtype=torch.uint8)
    given = lib.described(weight.shape, weight.dtype, weight.stride())
    description = lib.make(
        "reorder_primitive_desc_create", "primitive_desc", given, lib.engine, layout, lib.engine, None
    )
    reorder, stream = lib.make("primitive_create", "primitive", description), lib.stream()
    memories = {_SRC: lib.memory(weight), _DST: lib.memory(found, layout)}
    arguments = (Argument * 2)(*(Argument(which, memory.pointer) for which, memory in memories.items()))
    lib.call("primitive_execute", reorder, stream, 2, ctypes.addressof(arguments))
    lib.call("stream_wait", stream)
    return found
