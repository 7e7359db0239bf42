"""How each operation is written in ONNX: one row an op of the vocabulary, a few for functions and modules
beside it.

A row gets an :class:`~fxq.onnx_writer.OnnxWriter` and returns the name of the value that the node computes, or a list
of names where it is several tensors.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from fxq import ops
from fxq.attention import multihead_attention, window_attention
from fxq.batch_sizes import Batch
from fxq.onnx_attention import write_multihead_attention, write_scaled_dot_product_attention
from fxq.onnx_qdq import bias_values, weight_values, write_dequantize, write_quantize
from fxq.onnx_recurrent import write_gru, write_lstm
from fxq.onnx_windows import write_window_attention
from fxq.onnx_writer import OnnxWriter, pairs
from fxq.qdq import DEQUANTIZE, DEQUANTIZE_CHANNEL, QUANTIZE, QUANTIZE_AVERAGE, is_dequantize

Row = Callable[[OnnxWriter], Any]

# -- layers with weights


def _same_padding(kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return [total // 2 for total in totals] + [total - total // 2 for total in totals]


def _conv(dims: int) -> Row:
    def write(w: OnnxWriter) -> str:
        kernel = [w.fixed(w.get("weight"), 2 + axis) for axis in range(dims)]
        dilation, padding = pairs(w.get("dilation"), dims), w.get("padding")
        if padding == "same":
            pads = _same_padding(kernel, dilation)
        else:
            pads = pairs(0 if padding == "valid" else padding, dims) * 2
        x, weight, bias = w.batched("input", dims), w.get("weight"), w.get("bias")
        inputs = [w.name(x), w.name(weight), bias_values(w, x, weight, bias)]
        return str(
            w.add(
                "Conv", *filter(None, inputs), kernel_shape=kernel, strides=pairs(w.get("stride"), dims), pads=pads,
                dilations=dilation, group=w.get("groups"),
            )
        )  # fmt: skip

    return write


def _conv_transpose(dims: int) -> Row:
    def write(w: OnnxWriter) -> str:
        x, weight, bias = w.batched("input", dims), w.get("weight"), w.get("bias")
        inputs = [w.name(x), w.name(weight), w.parameter(bias)]
        return str(
            w.add(
                "ConvTranspose", *filter(None, inputs),
                kernel_shape=[w.fixed(weight, 2 + axis) for axis in range(dims)],
                strides=pairs(w.get("stride"), dims), pads=pairs(w.get("padding"), dims) * 2,
                output_padding=pairs(w.get("output_padding"), dims), dilations=pairs(w.get("dilation"), dims),
                group=w.get("groups"),
            )
        )  # fmt: skip

    return write


def _linear(w: OnnxWriter) -> str:
    x, weight, bias = w.get("input"), w.get("weight"), w.get("bias")
    if len(w.shape(x)) == 2:
        inputs = [w.name(x), w.name(weight), bias_values(w, x, weight, bias)]
        return str(w.add("Gemm", *filter(None, inputs), transB=1))
    stored = weight if not is_dequantize(weight) else weight.args[0]
    if w.constant_tensor(stored) is None:
        matrix = str(w.add("Transpose", w.name(weight), perm=[1, 0]))
    else:  # stored as MatMul takes it, so that nothing is left to do at run time
        matrix = weight_values(w, weight, transposed=True)
    result = str(w.add("MatMul", w.name(x), matrix))
    return result if bias is None else str(w.add("Add", result, w.name(bias)))


def _matmul(w: OnnxWriter) -> str:
    return str(w.add("MatMul", w.name(w.get("input")), w.name(w.get("other"))))


# -- norms


def _batch_norm(w: OnnxWriter) -> str:
    if w.get("training"):
        raise w.refusal("it normalizes with the statistics of the batch")
    channels = w.fixed(w.get("input"), 1)
    return str(
        w.add(
            "BatchNormalization", w.name(w.get("input")), w.parameter(w.get("weight"), 1.0, channels),
            w.parameter(w.get("bias"), 0.0, channels), w.name(w.get("running_mean")), w.name(w.get("running_var")),
            epsilon=w.get("eps"),
        )
    )  # fmt: skip


def _layer_norm(w: OnnxWriter) -> str:
    x, axes = w.get("input"), len(w.get("normalized_shape"))
    weight = w.get("weight")
    shape = list(w.get("normalized_shape"))
    scale = w.graph.tensor(torch.ones(shape), "ones") if weight is None else w.name(weight)
    inputs = [w.name(x), scale, w.parameter(w.get("bias"))]
    return str(w.add("LayerNormalization", *filter(None, inputs), axis=-axes, epsilon=w.get("eps")))


def _group_norm(w: OnnxWriter) -> str:
    """Each group is an instance; then the affine map of the channels."""
    x, groups = w.get("input"), w.get("num_groups")
    shape = w.shape(x)
    inside = math.prod(w.fixed(x, axis) for axis in range(1, len(shape))) // groups
    flat = w.reshape(w.name(x), (shape[0], groups, inside))
    ones, zeros = w.parameter(None, 1.0, groups), w.parameter(None, 0.0, groups)
    normal = w.add("InstanceNormalization", flat, ones, zeros, epsilon=w.get("eps"))
    result = w.reshape(normal, shape)
    for op, parameter in (("Mul", "weight"), ("Add", "bias")):
        if w.get(parameter) is not None:
            result = str(w.add(op, result, _per_channel(w, w.get(parameter), len(shape))))
    return result


def _per_channel(w: OnnxWriter, value: Node, dims: int) -> str:
    return w.reshape(w.name(value), (w.fixed(value, 0), *[1] * (dims - 2)))


def _instance_norm(w: OnnxWriter) -> str:
    if not w.get("use_input_stats"):
        raise w.refusal("it normalizes with running statistics")
    channels = w.fixed(w.get("input"), 1)
    scale, bias = w.parameter(w.get("weight"), 1.0, channels), w.parameter(w.get("bias"), 0.0, channels)
    return str(w.add("InstanceNormalization", w.name(w.get("input")), scale, bias, epsilon=w.get("eps")))


# -- elementwise


def _unary(op: str, **attributes: str | float) -> Row:
    """An op of one input; attributes of type str name parameters."""

    def write(w: OnnxWriter) -> str:
        values: dict[str, Any] = {k: w.get(v) if isinstance(v, str) else v for k, v in attributes.items()}
        return str(w.add(op, w.name(w.get("input")), **values))

    return write


def _binary(op: str) -> Row:
    def write(w: OnnxWriter) -> str:
        return str(w.add(op, *(_cast(w, w.get(parameter)) for parameter in ("input", "other"))))

    return write


def _cast(w: OnnxWriter, value: Any) -> str:
    """An operand in the dtype of the result, which ONNX does not convert by itself."""
    dtype = w.shaped().dtype
    if not isinstance(value, Node) or w.shaped(value).dtype == dtype:
        return w.name(value)
    return str(w.add("Cast", w.name(value), to=w.graph.kind(dtype)))


def _clamp(w: OnnxWriter) -> str:
    low, high = ("" if w.get(p) is None else w.name(w.get(p)) for p in ("min", "max"))
    return str(w.add("Clip", w.name(w.get("input")), low, high))


def _prelu(w: OnnxWriter) -> str:
    x, slope = w.get("input"), w.get("weight")
    name = w.name(slope) if w.fixed(slope, 0) == 1 else _per_channel(w, slope, len(w.shape(x)))
    return str(w.add("PRelu", w.name(x), name))


def _silu(w: OnnxWriter) -> str:
    x = w.name(w.get("input"))
    return str(w.add("Mul", x, w.add("Sigmoid", x)))


def _gelu(w: OnnxWriter) -> str:
    x = w.name(w.get("input"))

    def number(value: float) -> str:
        return w.graph.constant(value, torch.float32)

    if w.get("approximate") == "tanh":
        cubed = w.add("Mul", w.add("Mul", x, x), x)
        inner = w.add("Add", x, w.add("Mul", cubed, number(0.044715)))
        curve = w.add("Tanh", w.add("Mul", inner, number(math.sqrt(2 / math.pi))))
    else:
        curve = w.add("Erf", w.add("Div", x, number(math.sqrt(2))))
    return str(w.add("Mul", w.add("Mul", x, w.add("Add", curve, number(1.0))), number(0.5)))


# -- pools and resizing


def _pads(w: OnnxWriter, kernel: list[int], stride: list[int], dilation: list[int]) -> list[int]:
    """Padding at both ends that gives the result's sizes without ``ceil_mode``, which runtimes read differently."""
    x, dims = w.batched("input", len(kernel)), len(kernel)
    before = pairs(w.get("padding"), dims)
    after = []
    for axis in range(dims):
        out, size = w.fixed(w.node, axis - dims), w.fixed(x, axis - dims)
        needed = (out - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1 - size - before[axis]
        after.append(max(needed, before[axis]) if w.get("ceil_mode") else before[axis])
    return before + after


def _max_pool(dims: int) -> Row:
    def write(w: OnnxWriter) -> str:
        kernel, dilation = pairs(w.get("kernel_size"), dims), pairs(w.get("dilation"), dims)
        stride = pairs(w.get("stride") or kernel, dims)
        pads = _pads(w, kernel, stride, dilation)
        x = w.name(w.get("input"))
        return str(w.add("MaxPool", x, kernel_shape=kernel, strides=stride, pads=pads, dilations=dilation))

    return write


def _avg_pool(dims: int) -> Row:
    def write(w: OnnxWriter) -> str:
        kernel = pairs(w.get("kernel_size"), dims)
        stride = pairs(w.get("stride") or kernel, dims)
        pads = _pads(w, kernel, stride, [1] * dims)
        counts = bool(w.get("count_include_pad")) and any(pads[:dims])
        if dims > 1 and w.get("divisor_override") is not None:
            raise w.refusal("it has a divisor of its own")
        if counts and pads[:dims] != pads[dims:]:
            raise w.refusal("ceil_mode with padding that counts")
        x = w.name(w.get("input"))
        return str(
            w.add("AveragePool", x, kernel_shape=kernel, strides=stride, pads=pads, count_include_pad=int(counts))
        )

    return write


def _adaptive_avg_pool(dims: int) -> Row:
    def write(w: OnnxWriter) -> str:
        x = w.batched("input", dims)
        sizes = [w.fixed(x, axis - dims) for axis in range(dims)]
        outs = [w.fixed(w.node, axis - dims) for axis in range(dims)]
        if outs == [1] * dims:
            return str(w.add("GlobalAveragePool", w.name(x)))
        if all(size % out == 0 for size, out in zip(sizes, outs, strict=True)):
            steps = [size // out for size, out in zip(sizes, outs, strict=True)]
            return str(w.add("AveragePool", w.name(x), kernel_shape=steps, strides=steps))
        if dims > 2:
            raise w.refusal("its windows are of unequal sizes")
        result = str(w.add("MatMul", w.name(x), w.graph.tensor(_averaging(sizes[-1], outs[-1]).t(), "windows")))
        if dims == 2:
            result = str(w.add("MatMul", w.graph.tensor(_averaging(sizes[0], outs[0]), "windows"), result))
        return result

    return write


def _averaging(size: int, out: int) -> torch.Tensor:
    """``[out, size]``: the weights of each window of an adaptive pool."""
    return F.adaptive_avg_pool1d(torch.eye(size), out).t().contiguous()


def _mean(w: OnnxWriter) -> str:
    dim, rank = w.get("dim"), len(w.shape(w.get("input")))
    if rank > 2 and dim is not None and _sorted_axes(dim, rank) == [*range(2, rank)]:
        pooled = str(w.add("GlobalAveragePool", w.name(w.get("input"))))  # runtimes have it for integers
        return pooled if w.get("keepdim") else w.reshape(pooled, w.shape())
    axes = [] if dim is None else [w.ints([dim] if isinstance(dim, int) else dim)]
    return str(w.add("ReduceMean", w.name(w.get("input")), *axes, keepdims=int(bool(w.get("keepdim")))))


def _sorted_axes(dim: int | Sequence[int], rank: int) -> list[int]:
    return sorted(axis % rank for axis in ([dim] if isinstance(dim, int) else dim))


_MODES = {"nearest": "nearest", "nearest-exact": "nearest", "bicubic": "cubic"}


def _interpolate(w: OnnxWriter) -> str:
    x, mode = w.get("input"), w.get("mode")
    if mode == "area":
        return str(_adaptive_avg_pool(len(w.shape(x)) - 2)(w))
    dims = len(w.shape(x)) - 2
    attributes: dict[str, Any] = {"mode": _MODES.get(mode, "linear")}
    attributes["antialias"] = int(w.get("antialias"))
    if mode == "nearest":
        attributes |= {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    elif mode == "nearest-exact":
        attributes |= {"coordinate_transformation_mode": "half_pixel", "nearest_mode": "round_prefer_ceil"}
    else:
        attributes["coordinate_transformation_mode"] = "align_corners" if w.get("align_corners") else "half_pixel"
    if mode == "bicubic":
        attributes["cubic_coeff_a"] = -0.75
    scale = w.get("scale_factor")
    if scale is not None and not w.get("recompute_scale_factor"):
        scales = [float(s) for s in ([scale] * dims if isinstance(scale, (int, float)) else scale)]
        return str(w.add("Resize", w.name(x), "", w.graph.constant([1.0, 1.0, *scales], torch.float32), **attributes))
    # sizes of all dimensions, because onnxruntime's rewriting to channels last forgets the attribute "axes"
    return str(w.add("Resize", w.name(x), "", "", w.shape_tensor(w.shape()), **attributes))


_PAD_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}


def _pad(w: OnnxWriter) -> str:
    x, pad, mode = w.get("input"), list(w.get("pad")), w.get("mode")
    if mode not in _PAD_MODES:
        raise w.refusal(f"padding of mode '{mode}'")
    dims, given = len(w.shape(x)), len(pad) // 2
    before = [0] * (dims - given) + pad[0::2][::-1]
    after = [0] * (dims - given) + pad[1::2][::-1]
    value = w.graph.constant(w.get("value") or 0.0, w.shaped(x).dtype)
    return str(w.add("Pad", w.name(x), w.ints(before + after), value, mode=_PAD_MODES[mode]))


def _pixel_shuffle(w: OnnxWriter) -> str:
    if len(w.shape(w.get("input"))) != 4:
        raise w.refusal("its input is no batch of images")
    return str(w.add("DepthToSpace", w.name(w.get("input")), blocksize=w.get("upscale_factor"), mode="CRD"))


# -- shapes


def _reshape(w: OnnxWriter) -> str:
    return w.reshape(w.name(w.get("input")), w.shape())


def _permute(w: OnnxWriter) -> str:
    dims = w.get("dims")
    order = dims[0] if len(dims) == 1 and isinstance(dims[0], (list, tuple)) else dims
    return str(w.add("Transpose", w.name(w.get("input")), perm=[dim % len(order) for dim in order]))


def _transpose(w: OnnxWriter) -> str:
    order = list(range(len(w.shape())))
    one, two = (w.get(p) % len(order) for p in ("dim0", "dim1"))
    order[one], order[two] = order[two], order[one]
    return str(w.add("Transpose", w.name(w.get("input")), perm=order))


def _cat(w: OnnxWriter) -> str:
    return str(w.add("Concat", *(_cast(w, tensor) for tensor in w.get("tensors")), axis=w.get("dim")))


def _split(parameter: str) -> Row:
    def write(w: OnnxWriter) -> list[str]:
        x, axis = w.get(parameter), w.get("dim")
        parts = [part.shape[axis] for part in w.sizes[w.node]]
        if any(isinstance(part, Batch) for part in parts):
            raise w.refusal("it takes the batch apart")
        made = w.add("Split", w.name(x), w.ints(parts), outputs=len(parts), axis=axis)
        return [made] if len(parts) == 1 else made

    return write


def _getitem(w: OnnxWriter) -> Any:
    x, index = w.get("input"), w.get("index")
    written = w.values[x]
    if isinstance(written, (list, dict)):
        return written[index]
    items = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(item, (Node, bool, list)) for item in items):
        raise w.refusal("it is indexed by a tensor")
    taken = sum(item is not None and item is not Ellipsis for item in items)
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (len(w.shape(x)) - taken)
    cuts, axis = [], 0
    for item in items:
        if item is None:
            continue
        if item != slice(None):
            cuts.append((axis, *_bounds(w, item)))
        axis += 1
    result = w.name(x)
    if cuts:
        axes, starts, ends, steps = (w.ints(column) for column in zip(*cuts, strict=True))
        result = str(w.add("Slice", result, starts, ends, axes, steps))
    kept = [item for item in items if not isinstance(item, int)]
    return result if len(kept) == len(items) and None not in items else w.reshape(result, w.shape())


def _bounds(w: OnnxWriter, item: Any) -> tuple[int, int, int]:
    if isinstance(item, int):
        return item, sys.maxsize if item == -1 else item + 1, 1
    parts = (item.start, item.stop, item.step)
    if any(isinstance(part, Batch) for part in parts):
        raise w.refusal("it is cut at a size that follows the batch")
    start, stop, step = parts
    return start or 0, sys.maxsize if stop is None else stop, 1 if step is None else step


def _same(parameter: str = "input") -> Row:
    return lambda w: w.values[w.get(parameter)]


def _dropout(w: OnnxWriter) -> Any:
    if w.get("training"):
        raise w.refusal("dropout that is active")
    return w.values[w.get("input")]


ROWS: dict[ops.Op, Row] = {
    ops.CONV1D: _conv(1), ops.CONV2D: _conv(2), ops.CONV3D: _conv(3),
    ops.CONV_TRANSPOSE1D: _conv_transpose(1), ops.CONV_TRANSPOSE2D: _conv_transpose(2),
    ops.CONV_TRANSPOSE3D: _conv_transpose(3), ops.LINEAR: _linear, ops.MATMUL: _matmul,
    ops.BATCH_NORM: _batch_norm, ops.LAYER_NORM: _layer_norm, ops.GROUP_NORM: _group_norm,
    ops.INSTANCE_NORM: _instance_norm,
    ops.RELU: _unary("Relu"), ops.CLAMP: _clamp, ops.LEAKY_RELU: _unary("LeakyRelu", alpha="negative_slope"),
    ops.ELU: _unary("Elu", alpha="alpha"), ops.PRELU: _prelu, ops.SIGMOID: _unary("Sigmoid"),
    ops.HARDSIGMOID: _unary("HardSigmoid", alpha=1 / 6, beta=0.5), ops.TANH: _unary("Tanh"),
    ops.HARDSWISH: _unary("HardSwish"), ops.SILU: _silu, ops.MISH: _unary("Mish"), ops.GELU: _gelu,
    ops.SOFTMAX: _unary("Softmax", axis="dim"),
    ops.ADD: _binary("Add"), ops.SUB: _binary("Sub"), ops.MUL: _binary("Mul"), ops.DIV: _binary("Div"),
    ops.CAT: _cat, ops.MAX_POOL1D: _max_pool(1), ops.MAX_POOL2D: _max_pool(2), ops.MAX_POOL3D: _max_pool(3),
    ops.AVG_POOL1D: _avg_pool(1), ops.AVG_POOL2D: _avg_pool(2), ops.AVG_POOL3D: _avg_pool(3),
    ops.ADAPTIVE_AVG_POOL1D: _adaptive_avg_pool(1), ops.ADAPTIVE_AVG_POOL2D: _adaptive_avg_pool(2),
    ops.ADAPTIVE_AVG_POOL3D: _adaptive_avg_pool(3), ops.MEAN: _mean, ops.INTERPOLATE: _interpolate, ops.PAD: _pad,
    ops.PIXEL_SHUFFLE: _pixel_shuffle, ops.FLATTEN: _reshape, ops.RESHAPE: _reshape, ops.PERMUTE: _permute,
    ops.TRANSPOSE: _transpose, ops.SQUEEZE: _reshape, ops.UNSQUEEZE: _reshape, ops.CHUNK: _split("input"),
    ops.SPLIT: _split("tensor"), ops.GETITEM: _getitem, ops.CONTIGUOUS: _same(), ops.DROPOUT: _dropout,
}  # fmt: skip


def _expand(w: OnnxWriter) -> str:
    return str(w.add("Expand", w.name(w.node.args[0]), w.shape_tensor(w.shape())))


def _einsum(w: OnnxWriter) -> str:
    equation, *operands = w.node.args
    given = operands[0] if isinstance(operands[0], (list, tuple)) else operands
    return str(w.add("Einsum", *map(w.name, given), equation=str(equation).replace(" ", "")))


FUNCTIONS: dict[Callable[..., Any], Row] = {
    QUANTIZE: write_quantize,
    QUANTIZE_AVERAGE: write_quantize,
    DEQUANTIZE: write_dequantize,
    DEQUANTIZE_CHANNEL: write_dequantize,
    multihead_attention: write_multihead_attention,
    window_attention: write_window_attention,
    F.scaled_dot_product_attention: write_scaled_dot_product_attention,
    torch.einsum: _einsum,
}
METHODS: dict[str, Row] = {"expand": _expand}
MODULES: dict[type[nn.Module], Row] = {nn.LSTM: write_lstm, nn.GRU: write_gru}
