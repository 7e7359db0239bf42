"""QuantizeLinear and DequantizeLinear, or their trace in a float graph: clips to the calibrated ranges."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fxq.numerics import dequantize
from fxq.onnx_writer import OnnxWriter
from fxq.qdq import DEQUANTIZE_CHANNEL, activation_qparams, is_dequantize, is_quantize
from fxq.spec import QParams

_LIMITS = {torch.uint8: (0, 255), torch.int8: (-128, 127)}


def write_quantize(w: OnnxWriter) -> str:
    """QuantizeLinear, and a Clip of the integers where their range is narrower than their type's."""
    x, scale, zero_point, quant_min, quant_max, dtype = w.node.args
    assert isinstance(dtype, torch.dtype)
    if not w.qdq:
        low, high = ((bound - zero_point) * scale for bound in (quant_min, quant_max))  # type: ignore[operator]
        bounds = (w.graph.constant(bound, torch.float32) for bound in (low, high))
        return str(w.add("Clip", w.name(x), *bounds))
    zero = w.graph.constant(zero_point, dtype)
    result = str(w.add("QuantizeLinear", w.name(x), w.graph.constant(scale, torch.float32), zero))
    if (quant_min, quant_max) == _LIMITS[dtype]:
        return result
    return str(w.add("Clip", result, w.graph.constant(quant_min, dtype), w.graph.constant(quant_max, dtype)))


def write_dequantize(w: OnnxWriter) -> str:
    """DequantizeLinear of an activation or a weight; in a float graph the activation, or the weight's real values."""
    source, scale, zero_point = w.node.args[:3]
    assert isinstance(source, Node)
    if not is_quantize(source):
        return weight_values(w, w.node)
    if not w.qdq:
        return w.name(source)
    dtype = w.shaped(source).dtype
    qparams = w.graph.constant(scale, torch.float32), w.graph.constant(zero_point, dtype)
    return str(w.add("DequantizeLinear", w.name(source), *qparams))


def weight_values(w: OnnxWriter, node: Node, transposed: bool = False) -> str:
    """The real values of a constant, which ``node`` dequantizes or reads; a matrix may be stored transposed."""
    if not is_dequantize(node):
        values = w.constant_tensor(node)
        assert values is not None
        return w.graph.tensor(values.t() if transposed else values, str(node.target))
    integers, scale, zero_point = (w.constant_tensor(value) for value in node.args[:3])
    assert integers is not None and isinstance(node.args[0], Node)
    axis: Any = None
    if node.target is DEQUANTIZE_CHANNEL:
        axis = node.args[3]
    else:
        scale, zero_point = torch.tensor(node.args[1]), torch.tensor(node.args[2])
    assert scale is not None and zero_point is not None
    name = str(node.args[0].target)
    if not w.qdq:
        values = dequantize(integers, QParams(scale, zero_point), axis)
        return w.graph.tensor(values.t() if transposed else values, name)
    stored = w.graph.tensor(integers.t() if transposed else integers, name)
    qparams = w.graph.tensor(scale, f"{name}_scale"), w.graph.tensor(zero_point.to(integers.dtype), f"{name}_zero")
    if axis is None:
        return str(w.add("DequantizeLinear", stored, *qparams))
    return str(w.add("DequantizeLinear", stored, *qparams, axis=1 - axis if transposed else axis))


def bias_values(w: OnnxWriter, layer_input: Any, weight: Any, bias: Any) -> str:
    """A bias on the accumulator's grid, int32 with scale ``input_scale * weight_scale``, as int8 runtimes add it.

    It stays float where input or weight are float, or the integers would not fit; ``""`` if there is none.
    """
    values, qparams = w.constant_tensor(bias), activation_qparams(layer_input)
    if values is None or qparams is None or not is_dequantize(weight) or not w.qdq:
        return w.parameter(bias)
    scale = w.constant_tensor(weight.args[1]) if isinstance(weight.args[1], Node) else torch.tensor(weight.args[1])
    assert scale is not None
    grid = scale * torch.tensor(qparams[0], dtype=torch.float32)
    integers = torch.round(values.double() / grid.double())
    if not integers.isfinite().all() or integers.abs().max() >= 2**31:
        return w.parameter(bias)
    stored = w.graph.tensor(integers.to(torch.int32), f"{bias.target}_int32")
    axis = {"axis": 0} if grid.dim() else {}
    return str(w.add("DequantizeLinear", stored, w.graph.tensor(grid, f"{bias.target}_scale"), name=bias.name, **axis))
