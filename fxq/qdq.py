"""The quantize and dequantize ops of reference graphs, on plain ``uint8``/``int8`` tensors.

They are registered with torch under the namespace ``fxq`` so that they survive tracing, export and
serialization, and run on any device. The deprecated quantized dtypes appear nowhere here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

_TIE = 4096.0  # of a step: what is nearer than half of it to a half is one

_LIBRARY = torch.library.Library("fxq", "DEF")
_LIBRARY.define(
    "quantize(Tensor x, float scale, int zero_point, int quant_min, int quant_max, ScalarType dtype) -> Tensor"
)
_LIBRARY.define(
    "quantize_average(Tensor x, float scale, int zero_point, int quant_min, int quant_max, ScalarType dtype) -> Tensor"
)
_LIBRARY.define("dequantize(Tensor q, float scale, int zero_point) -> Tensor")
_LIBRARY.define("dequantize_channel(Tensor q, Tensor scale, Tensor zero_point, int axis) -> Tensor")


def _quantize(
    x: torch.Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: torch.dtype
) -> torch.Tensor:
    # As ONNX defines it, so that runtimes agree to the last bit: kernels of torch add the zero_point before they round,
    # which rounds one value in 200,000 the other way. In place on a tensor of its own: for large activations, fresh
    # memory costs more than the arithmetic.
    return (x / scale).round_().add_(zero_point).clamp_(quant_min, quant_max).to(dtype)


def _quantize_average(
    x: torch.Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: torch.dtype
) -> torch.Tensor:
    # Averages of integers are often half way between two. Kernels sum integers and round these to the even one; what
    # float arithmetic makes of them is next to the half, on either side.
    x = (x / scale).mul_(_TIE).round_().div_(_TIE)
    return x.round_().add_(zero_point).clamp_(quant_min, quant_max).to(dtype)


def _dequantize(q: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    return q.to(torch.float32, copy=True).sub_(zero_point).mul_(scale)


def _dequantize_channel(q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int) -> torch.Tensor:
    shape = [1] * q.dim()
    shape[axis] = -1
    return q.to(torch.float32, copy=True).sub_(zero_point.reshape(shape)).mul_(scale.reshape(shape))


_LIBRARY.impl("quantize", _quantize, "CompositeImplicitAutograd")
_LIBRARY.impl("quantize_average", _quantize_average, "CompositeImplicitAutograd")
_LIBRARY.impl("dequantize", _dequantize, "CompositeImplicitAutograd")
_LIBRARY.impl("dequantize_channel", _dequantize_channel, "CompositeImplicitAutograd")

QUANTIZE = torch.ops.fxq.quantize.default
QUANTIZE_AVERAGE = torch.ops.fxq.quantize_average.default
DEQUANTIZE = torch.ops.fxq.dequantize.default
DEQUANTIZE_CHANNEL = torch.ops.fxq.dequantize_channel.default


def is_quantize(node: Node) -> bool:
    """Whether a node quantizes an activation."""
    return node.op == "call_function" and (node.target is QUANTIZE or node.target is QUANTIZE_AVERAGE)


def is_dequantize(node: object) -> bool:
    """Whether a node dequantizes an activation or a weight."""
    return (
        isinstance(node, Node)
        and node.op == "call_function"
        and (node.target is DEQUANTIZE or node.target is DEQUANTIZE_CHANNEL)
    )


def activation_qparams(value: Any) -> tuple[float, int] | None:
    """``(scale, zero_point)`` of a node that dequantizes an activation."""
    if is_dequantize(value) and is_quantize(value.args[0]):
        return value.args[1], value.args[2]
    return None
