"""Attention inside shifted windows in ONNX: all sizes but the batch are numbers, so the windows are plain reshapes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch

from fxq.attention import shift_mask, window_attention
from fxq.batch_sizes import Size
from fxq.onnx_writer import OnnxWriter


def write_window_attention(w: OnnxWriter) -> str:
    """:func:`fxq.attention.window_attention`."""
    bound = inspect.signature(window_attention).bind(*w.node.args, **w.node.kwargs)
    bound.apply_defaults()
    a = bound.arguments
    batch = w.shape(a["qkv"])[0]
    *sizes, width = (w.fixed(a["qkv"], axis) for axis in range(1, len(w.shape(a["qkv"]))))
    heads, width = a["num_heads"], width // 3
    window: Sequence[int] = a["window_size"]
    padded = [math.ceil(size / part) * part for size, part in zip(sizes, window, strict=True)]
    shift = [0 if part >= size else s for s, part, size in zip(a["shift_size"], window, padded, strict=True)]
    counts = [size // part for size, part in zip(padded, window, strict=True)]
    x = _filled_up(w, w.name(a["qkv"]), sizes, padded, a["pad_values"])
    x = _rolled(w, x, shift, padded)
    q, k, v = _windows(w, x, batch, counts, window, heads, width)
    scores = _scores(w, q, k, width // heads, a["logit_scale"])
    scores = w.add("Add", scores, w.name(a["relative_position_bias"]))
    if any(shift):
        mask = shift_mask(padded, window, shift, torch.empty(0))[:, None]
        scores = w.add("Add", scores, w.graph.tensor(mask, "shift_mask"))
    context = w.add("MatMul", w.add("Softmax", scores, axis=-1), v)
    x = _from_windows(w, context, batch, counts, window, width)
    x = _rolled(w, x, [(size - s) % size for s, size in zip(shift, padded, strict=True)], padded)
    if padded == sizes:
        return x
    axes = list(range(1, len(sizes) + 1))
    return str(w.add("Slice", x, w.ints([0] * len(sizes)), w.ints(sizes), w.ints(axes)))


def _filled_up(w: OnnxWriter, x: str, sizes: Sequence[int], padded: list[int], fill: Any) -> str:
    """Whole windows: what is missing at the ends is ``fill``."""
    if padded == [*sizes]:
        return x
    missing = [size - had for size, had in zip(padded, sizes, strict=True)]
    x = str(w.add("Pad", x, w.ints([0] * (len(sizes) + 2) + [0, *missing, 0]), w.graph.constant(0.0, torch.float32)))
    if fill is None:
        return x
    there = (torch.arange(size) < had for size, had in zip(padded, sizes, strict=True))
    inside = torch.stack(torch.meshgrid(*there, indexing="ij")).all(0)[None, ..., None]
    return str(w.add("Where", w.graph.tensor(inside, "inside"), x, w.name(fill)))


def _rolled(w: OnnxWriter, x: str, shift: Sequence[int], sizes: Sequence[int]) -> str:
    """``torch.roll`` by ``-shift``."""
    for axis, (by, size) in enumerate(zip(shift, sizes, strict=True), start=1):
        if by:
            parts = [
                w.add("Slice", x, w.ints([start]), w.ints([end]), w.ints([axis]))
                for start, end in ((by, size), (0, by))
            ]  # fmt: skip
            x = str(w.add("Concat", *parts, axis=axis))
    return x


def _windows(
    w: OnnxWriter, x: str, batch: Size, counts: list[int], window: Sequence[int], heads: int, width: int
) -> list[str]:
    """Query, key and value: ``[N, windows, heads, positions, width / heads]`` each."""
    n = len(counts)
    split = [part for pair in zip(counts, window, strict=True) for part in pair]
    x = w.reshape(x, [batch, *split, 3, heads, width // heads])
    order = [2 * n + 1, 0, *range(1, 2 * n, 2), 2 * n + 2, *range(2, 2 * n + 1, 2), 2 * n + 3]
    x = str(w.add("Transpose", x, perm=order))
    shape: list[Size] = [batch, math.prod(counts), heads, math.prod(window), width // heads]
    return [w.reshape(part, shape) for part in w.add("Split", x, w.ints([1, 1, 1]), outputs=3, axis=0)]


def _from_windows(
    w: OnnxWriter, context: str, batch: Size, counts: list[int], window: Sequence[int], width: int
) -> str:
    """``[N, *sizes, width]`` of ``[N, windows, heads, positions, width / heads]``."""
    n = len(counts)
    x = w.add("Transpose", context, perm=[0, 1, 3, 2, 4])
    x = w.reshape(x, [batch, *counts, *window, width])
    order = [place for axis in range(n) for place in (1 + axis, 1 + n + axis)]
    x = str(w.add("Transpose", x, perm=[0, *order, 2 * n + 1]))
    return w.reshape(x, [batch, *(count * part for count, part in zip(counts, window, strict=True)), width])


def _scores(w: OnnxWriter, q: str, k: str, width: int, logit_scale: Any) -> str:
    """Scaled products, or with ``logit_scale`` scaled cosines, of queries and keys."""
    if logit_scale is None:
        scaled = w.add("Mul", q, w.graph.constant(width**-0.5, torch.float32))
        return str(w.add("MatMul", scaled, w.add("Transpose", k, perm=[0, 1, 2, 4, 3])))
    q, k = (_normalized(w, x) for x in (q, k))
    cosines = w.add("MatMul", q, w.add("Transpose", k, perm=[0, 1, 2, 4, 3]))
    most = w.graph.constant(math.log(100.0), torch.float32)
    return str(w.add("Mul", cosines, w.add("Exp", w.add("Min", w.name(logit_scale), most))))


def _normalized(w: OnnxWriter, x: str) -> str:
    norm = w.add("ReduceL2", x, w.ints([-1]), keepdims=1)
    return str(w.add("Div", x, w.add("Max", norm, w.graph.constant(1e-12, torch.float32))))
