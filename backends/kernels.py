"""How rows emit torch's int8 kernels.

The only module that names the ``quantized::*`` and ``onednn::*`` operators and (beside the lowering) the quantized
dtypes, so that it can be exchanged when torch removes them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from fxq.op_table import Emission, IntWeight
from fxq.ops import Op

_QNNPACK = "qnnpack"  # whose kernels do not look whether an input has the channels that they read

EngineChoice = Callable[[IntWeight, int], tuple[str, ...]]


def _operator(name: str) -> Any:
    return getattr(torch.ops.quantized, name)


def quantized_weight(weight: IntWeight) -> torch.Tensor:
    """A qint8 tensor, as torch's prepacking functions take it, on the memory of the weight's integers.

    Some packed weights keep it, beside what they make of it; of a copy that would be a quarter of the float model.
    """
    values = weight.values
    assert values.dtype == torch.int8
    if weight.ch_axis is None:
        scale, zero_point = weight.qparams.item()
        made = torch._empty_affine_quantized((0,), scale=scale, zero_point=zero_point, dtype=torch.qint8)
    else:
        scales, zero_points = weight.qparams.scale.double(), weight.qparams.zero_point.long()
        made = torch._empty_per_channel_affine_quantized(
            (0,) * values.dim(), scales=scales, zero_points=zero_points, axis=weight.ch_axis, dtype=torch.qint8
        )
    return made.set_(values.untyped_storage(), values.storage_offset(), values.size(), values.stride())


def expand(value: Any, dims: int) -> list[int]:
    """One integer for each spatial dimension."""
    return list(value) if isinstance(value, (tuple, list)) else [value] * dims


@dataclass(frozen=True)
class PackedConv:
    """``quantized::convNd`` and ``quantized::conv_transposeNd``, bias included, relu if it is not free.

    ``engines`` tells from the weight and the number of groups which engines may run it, the best guess first; without
    it the backend's own does.
    """

    dims: int
    transposed: bool = False
    engines: EngineChoice | None = None

    @property
    def kernel(self) -> str:
        return f"quantized::conv{'_transpose' if self.transposed else ''}{self.dims}d"

    def __call__(self, e: Emission) -> Node:
        name = self.kernel.removeprefix("quantized::")
        geometry = [expand(e.get("stride"), self.dims), expand(e.get("padding"), self.dims)]
        if self.transposed:
            geometry.append(expand(e.get("output_padding"), self.dims))
        geometry.append(expand(e.get("dilation"), self.dims))
        weight, groups = e.weight(), e.get("groups")
        arguments = quantized_weight(weight), e.tensor("bias"), *geometry, groups
        engines = self.engines(weight, groups) if self.engines else ()
        if _QNNPACK in engines:
            e.unchecked(larger=True)
        elif not (self.transposed or _fits_anywhere(weight, *geometry[1:])):
            e.unchecked()
        packed = e.pack(_operator(f"{name}_prepack"), *arguments, engines=engines)
        target = _operator(f"{name}_relu" if e.relu else name)
        return e.call(target, e.input("input"), e.constant("packed", packed), e.out.scale, e.out.zero_point)


def _fits_anywhere(weight: IntWeight, padding: list[int], dilation: list[int]) -> bool:
    """Whether the window of a convolution fits into a padded image of one pixel."""
    spans = (d * (size - 1) + 1 for d, size in zip(dilation, weight.values.shape[2:], strict=True))
    return all(span <= 1 + 2 * more for span, more in zip(spans, padding, strict=True))


@dataclass(frozen=True)
class PackedConvAdd:
    """``quantized::conv2d_add``: the conv is added to the second operand, in that operand's own memory."""

    kernel: str = "quantized::conv2d_add"

    def __call__(self, e: Emission) -> Node:
        geometry = [expand(e.get(name), 2) for name in ("stride", "padding", "dilation")]
        weight = e.weight()
        e.unchecked(larger=True)  # it takes operands of other sizes than its output's
        arguments = quantized_weight(weight), e.tensor("bias"), *geometry, e.get("groups")
        packed = e.pack(torch.ops.quantized.conv2d_prepack, *arguments)
        target = torch.ops.quantized.conv2d_add_relu if e.relu else torch.ops.quantized.conv2d_add
        accumulated = e.tail_input(1)
        e.overwrites(accumulated)
        return e.call(
            target, e.input("input"), accumulated, e.constant("packed", packed), e.out.scale, e.out.zero_point
        )


@dataclass(frozen=True)
class PackedLinear:
    """``quantized::linear``, bias included, relu if it is not free."""

    kernel: str = "quantized::linear"
    engines: EngineChoice | None = None

    def __call__(self, e: Emission) -> Node:
        weight = e.weight()
        engines = self.engines(weight, 1) if self.engines else ()
        if _QNNPACK in engines:
            e.unchecked(larger=True)
        packed = e.pack(
            torch.ops.quantized.linear_prepack, quantized_weight(weight), e.tensor("bias"), engines=engines
        )
        target = torch.ops.quantized.linear_relu if e.relu else torch.ops.quantized.linear
        return e.call(target, e.input("input"), e.constant("packed", packed), e.out.scale, e.out.zero_point)


@dataclass(frozen=True)
class PlainConv:
    """``onednn::qconv_pointwise`` with an activation in its output loop, on plain uint8 tensors; symmetric weights.

    A call takes 8 to 15 us longer than one of ``quantized::conv2d``, which keeps its primitive.
    """

    post_op: str
    kernel: str = "onednn::qconv_pointwise"

    def __call__(self, e: Emission) -> Node:
        x, *qparams = e.plain_input("input")
        weight, bias, groups = e.weight(), e.tensor("bias"), e.get("groups")
        geometry = [expand(e.get(name), weight.values.dim() - 2) for name in ("stride", "padding", "dilation")]
        if not _fits_anywhere(weight, *geometry[1:]):
            e.unchecked()
        scales = weight.qparams.scale.float()
        # packed for the shape of the example inputs; with others oneDNN may have to reorder it at each call
        packed = e.pack(
            torch.ops.onednn.qconv_prepack, weight.values, scales, *qparams, *geometry, groups, e.shape("input"),
            engines=("onednn",),
        )  # fmt: skip
        return e.plain_call(
            conv_pointwise, x, *qparams, e.constant("packed", packed), e.constant("scales", scales),
            e.constant("zero_points", torch.zeros_like(scales, dtype=torch.int32)),
            None if bias is None else e.constant("bias", bias), *geometry, groups, *e.out.pair, self.post_op,
        )  # fmt: skip


def conv_pointwise(*arguments: Any) -> torch.Tensor:
    """``onednn::qconv_pointwise`` to uint8; ``arguments`` without the output's dtype and the activation's parameters.

    torch.jit.trace does not record a call with an empty list of optional numbers, but that of a script function.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return _scripted_conv_pointwise()(*arguments)  # type: ignore[no-any-return]
    *rest, post_op = arguments
    run = torch.ops.onednn.qconv_pointwise.default
    return run(*rest, torch.uint8, post_op, [], "")  # type: ignore[no-any-return]


@functools.cache
def _scripted_conv_pointwise() -> Any:
    uint8 = 0  # torch.uint8 as TorchScript writes it
    unit = torch.jit.CompilationUnit(f"""
        def run(
            x, x_scale: float, x_zero_point: int, weight, scales, zero_points, bias: Optional[Tensor],
            stride: List[int], padding: List[int], dilation: List[int], groups: int, scale: float, zero_point: int,
            post_op: str,
        ):
            return torch.ops.onednn.qconv_pointwise(
                x, x_scale, x_zero_point, weight, scales, zero_points, bias, stride, padding, dilation, groups, scale,
                zero_point, {uint8}, post_op, [], "",
            )
    """)
    return unit.run


@dataclass(frozen=True)
class Binary:
    """``quantized::add`` and ``quantized::mul``; a scalar becomes a one-element int8 tensor that holds it exactly."""

    name: str

    @property
    def kernel(self) -> str:
        return f"quantized::{self.name}"

    def __call__(self, e: Emission) -> Node:
        x, other = e.input("input"), e.input("other")
        if not isinstance(other, Node):
            other = e.constant("scalar", _one_element(float(other)))
        else:
            if math.prod(e.shape("input")) < math.prod(e.shape("other")):
                x, other = other, x  # the kernels make room for an output of the first one's shape
            if self.name == "mul" and not e.relu and e.shape("input") != e.shape("other"):
                return e.call(multiply, x, other, e.out.scale, e.out.zero_point)
        target = _operator(f"{self.name}_relu" if e.relu else self.name)
        return e.call(target, x, other, e.out.scale, e.out.zero_point)


def multiply(x: torch.Tensor, other: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    """``quantized::mul`` of images and one factor a channel, as squeeze-and-excitation has them, a row at a time.

    torch's kernel vectorizes over the axis that is densest in memory. In channels_last images that are the channels;
    32 or 120 of them are no multiple of a vector, which costs up to ten times the time. Here the factors are repeated
    for each pixel of a row, and rows are long.
    """
    if x.dim() == 4 and x.shape[2:] == (1, 1):
        x, other = other, x
    by_rows = (
        x.dim() == 4
        and other.shape == (*x.shape[:2], 1, 1)
        and x.shape[2] * x.shape[3] >= _ROWS_PAY
        and x.is_contiguous(memory_format=torch.channels_last)
    )
    if not by_rows:
        return torch.ops.quantized.mul(x, other, scale, zero_point)  # type: ignore[no-any-return]
    n, channels, height, width = x.shape
    factors = other.permute(0, 2, 3, 1).expand(n, 1, width, channels).reshape(n, 1, width * channels)
    rows = x.permute(0, 2, 3, 1).reshape(n, height, width * channels)
    product = torch.ops.quantized.mul(rows, factors, scale, zero_point)
    return product.view(n, height, width, channels).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


_ROWS_PAY = 100  # pixels from which on reshaping takes less time than it saves, measured


def _one_element(value: float) -> torch.Tensor:
    scale = abs(value) / 255 or 1.0
    zero_point = 255 if value < 0 else 0
    return torch.quantize_per_tensor(torch.tensor([value]), scale, zero_point, torch.quint8)


@dataclass(frozen=True)
class WithOutput:
    """A ``quantized::*`` operator called as ``op(input, *parameters, scale, zero_point)``.

    ``tensors`` names parameters that are constant float tensors; ``inputs`` the activations. ``unchecked`` operators
    take sizes that the float op refuses.
    """

    name: str
    parameters: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ("input",)
    qparams_after: int | None = None
    unchecked: bool = False

    @property
    def kernel(self) -> str:
        return f"quantized::{self.name}"

    def __call__(self, e: Emission) -> Node:
        if self.unchecked:
            e.unchecked()
        arguments: list[Any] = []
        for name in self.parameters:
            if name in self.tensors:
                tensor = e.tensor(name)
                arguments.append(None if tensor is None else e.constant(name, tensor))
            else:
                arguments.append(e.get(name))
        at = len(arguments) if self.qparams_after is None else self.qparams_after
        arguments[at:at] = [e.out.scale, e.out.zero_point]
        return e.call(_operator(self.name), *(e.input(name) for name in self.inputs), *arguments)


@dataclass(frozen=True)
class BatchNorm:
    """``quantized::batch_norm``, which insists on a weight and a bias."""

    kernel: str = "quantized::batch_norm"

    def __call__(self, e: Emission) -> Node:
        mean, var = e.tensor("running_mean"), e.tensor("running_var")
        assert mean is not None and var is not None
        weight, bias = e.tensor("weight"), e.tensor("bias")
        values = {
            "weight": torch.ones_like(mean) if weight is None else weight,
            "bias": torch.zeros_like(mean) if bias is None else bias,
            "mean": mean,
            "var": var,
        }
        constants = [e.constant(name, value) for name, value in values.items()]
        return e.call(
            torch.ops.quantized.batch_norm, e.input("input"), *constants, e.get("eps"), e.out.scale, e.out.zero_point
        )


@dataclass(frozen=True)
class Keep:
    """The op's own function on the int8 tensor, which keeps or dictates the qparams itself.

    ``unchecked`` functions take sizes of int8 tensors that they refuse of float ones.
    """

    op: Op
    unchecked: bool = False

    @property
    def kernel(self) -> str:
        return f"aten::{self.op.name}"

    def __call__(self, e: Emission) -> Node:
        if self.unchecked:
            e.unchecked()
        values = {name: e.input(name) if name in self.op.tensors else e.get(name) for name in self._parameters()}
        args, kwargs = self.op.arguments(values)
        return e.call(self.op.target, *args, **kwargs)

    def _parameters(self) -> list[str]:
        rest = self.op.signature.rest
        return [*self.op.signature.defaults, *([rest] if rest else [])]


@dataclass(frozen=True)
class Mean:
    """``aten::mean``, where torch's kernel works; of whole images an average pool.

    The pool adds up integers of channels_last images, in less than half the time.
    """

    kernel: str = "aten::mean"

    def __call__(self, e: Emission) -> Node:
        x, dim, keepdim = e.input("input"), e.get("dim"), e.get("keepdim")
        axes = [dim] if isinstance(dim, int) else dim
        if len(e.shape("input")) != 4 or sorted(axis % 4 for axis in axes) != [2, 3]:
            return e.call(mean, x, dim, keepdim)
        return e.call(F.adaptive_avg_pool2d, x, 1) if keepdim else e.call(pixel_mean, x)


def mean(x: torch.Tensor, dim: Any, keepdim: bool) -> torch.Tensor:
    """``torch.mean``, which fails on channels_last images of one pixel or channel unless it keeps the dimensions."""
    if keepdim or x.dim() < 4 or not x.is_contiguous():
        return torch.mean(x, dim, keepdim)
    return torch.mean(x, dim, True).squeeze(dim)


def pixel_mean(x: torch.Tensor) -> torch.Tensor:
    """The mean of each channel of images, ``[N, C]``."""
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


@dataclass(frozen=True)
class MaxPool2d:
    """``aten::max_pool2d``; in two steps for images of few channels."""

    kernel: str = "aten::max_pool2d"

    def __call__(self, e: Emission) -> Node:
        shape, size = e.shape("input"), expand(e.get("kernel_size"), 2)
        rest = [expand(e.get(name), 2) for name in ("stride", "padding", "dilation")]
        narrow = len(shape) == 4 and shape[1] < _VECTOR and min(size) > 1
        target = narrow_max_pool2d if narrow else torch.max_pool2d
        return e.call(target, e.input("input"), size, rest[0] or size, *rest[1:], e.get("ceil_mode"))


def narrow_max_pool2d(
    x: torch.Tensor, size: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> torch.Tensor:
    """``max_pool2d`` of channels_last images with few channels: first of columns, then of rows.

    torch's kernel vectorizes over the channels, and does one at a time what does not fill a vector. For the columns
    whole rows can be its channels.
    """
    if not x.numel() or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.max_pool2d(x, size, stride, padding, dilation, ceil_mode)
    n, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(n, height, 1, width * channels).permute(0, 3, 1, 2)
    (size_h, size_w), (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w) = size, stride, padding, dilation
    rows = torch.max_pool2d(rows, (size_h, 1), (stride_h, 1), (pad_h, 0), (dilation_h, 1), ceil_mode)
    columns = rows.permute(0, 2, 3, 1).reshape(n, -1, width, channels).permute(0, 3, 1, 2)
    return torch.max_pool2d(columns, (1, size_w), (1, stride_w), (0, pad_w), (1, dilation_w), ceil_mode)


_VECTOR = 64  # bytes, with AVX-512


@dataclass(frozen=True)
class Concatenate:
    """``quantized::cat``, which requantizes inputs whose qparams differ from the output's."""

    kernel: str = "quantized::cat"

    def __call__(self, e: Emission) -> Node:
        return e.call(torch.ops.quantized.cat, e.input("tensors"), e.get("dim"), e.out.scale, e.out.zero_point)


@dataclass(frozen=True)
class Prelu:
    """One slope for all channels is ``quantized::leaky_relu``.

    ``quantized::prelu`` is of no use: it rounds the slopes to 8 bits, which puts small ones several integers off,
    and multiplies positive values by a quantized 1.0, so it is wrong where the slopes' range has no 1.0.
    """

    kernel: str = "quantized::leaky_relu"

    def __call__(self, e: Emission) -> Node:
        slope = e.tensor("weight")
        assert slope is not None
        target = torch.ops.quantized.leaky_relu
        return e.call(target, e.input("input"), slope.item(), False, e.out.scale, e.out.zero_point)
