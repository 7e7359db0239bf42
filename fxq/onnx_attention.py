"""Attention in ONNX: scores, softmax and the weighted sum as plain matrix products."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch.fx import Node

from fxq.attention import multihead_attention
from fxq.batch_sizes import Batch, Size
from fxq.onnx_writer import OnnxWriter

_SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def write_multihead_attention(w: OnnxWriter) -> list[str]:
    """:func:`fxq.attention.multihead_attention`: the context and the weights (or nothing in their place)."""
    bound = inspect.signature(multihead_attention).bind(*w.node.args, **w.node.kwargs)
    bound.apply_defaults()
    a = bound.arguments
    heads = a["num_heads"]
    shape = w.shape(a["query"])
    if len(shape) != 3:
        raise w.refusal("its input has no batch; give it one, x[None]")
    q, k, v = (_heads(w, a[name], heads, a["batch_first"]) for name in ("query", "key", "value"))
    mask = _masks(w, a["attn_mask"], a["key_padding_mask"], heads)
    safe = not a["need_weights"]  # torch's fused function, as below
    context, weights = _attend(w, q, k, v, mask, int(shape[2]) // heads, safe=safe)  # type: ignore[arg-type]
    order = [0, 2, 1, 3] if a["batch_first"] else [2, 0, 1, 3]
    context = w.reshape(w.add("Transpose", context, perm=order), shape)
    if not a["need_weights"]:
        return [context, ""]
    if a["average_attn_weights"]:
        weights = str(w.add("ReduceMean", weights, w.ints([1]), keepdims=0))
    return [context, weights]


def _heads(w: OnnxWriter, value: Node, heads: int, batch_first: bool) -> str:
    """``[N, heads, L, E / heads]``."""
    *outer, width = w.shape(value)
    if isinstance(width, Batch):
        raise w.refusal("its width follows the batch")
    split: list[Size] = [*outer, heads, width // heads]
    return str(w.add("Transpose", w.reshape(w.name(value), split), perm=[0, 2, 1, 3] if batch_first else [1, 2, 0, 3]))


def write_scaled_dot_product_attention(w: OnnxWriter) -> str:
    """``torch.nn.functional.scaled_dot_product_attention``."""
    a: dict[str, Any] = dict(zip(_SDPA, w.node.args, strict=False)) | w.node.kwargs
    if a.get("dropout_p") or a.get("enable_gqa"):
        raise w.refusal("it uses dropout or grouped queries")
    *_, length, width = w.shape(a["query"])
    given = a.get("attn_mask")
    mask = None if given is None else _additive(w, given, hides=False)
    if a.get("is_causal"):
        shape = (length, w.shape(a["key"])[-2])
        if any(isinstance(size, Batch) for size in shape):
            raise w.refusal("its sequence is as long as the batch")
        mask = w.graph.tensor(torch.full(shape, -math.inf).triu(1), "causal_mask")  # type: ignore[arg-type]
    q, k, v = (w.name(a[name]) for name in _SDPA[:3])
    dims, safe = len(w.shape(a["key"])), given is not None
    return _attend(w, q, k, v, mask, int(width), a.get("scale"), dims, safe)[0]  # type: ignore[arg-type]


def _attend(
    w: OnnxWriter,
    q: str,
    k: str,
    v: str,
    mask: str | None,
    width: int,
    scale: float | None = None,
    dims: int = 4,
    safe: bool = False,
) -> tuple[str, str]:
    """Context and weights of heads in the last but two dimensions.

    Args:
        safe: whether a row from which the mask hides everything gets nothing, as from torch's fused attention; its
            softmax is NaN.
    """
    factor = w.graph.constant(1 / math.sqrt(width) if scale is None else scale, torch.float32)
    order = [*range(dims - 2), dims - 1, dims - 2]
    scores = w.add("MatMul", w.add("Mul", q, factor), w.add("Transpose", k, perm=order))
    if mask is not None:
        scores = w.add("Add", scores, mask)
    weights = w.add("Softmax", scores, axis=-1)
    if safe and mask is not None:
        nothing = w.add("IsInf", w.add("ReduceMax", scores, w.ints([-1]), keepdims=1), detect_positive=0)
        weights = w.add("Where", nothing, w.graph.constant(0.0, torch.float32), weights)
    return str(w.add("MatMul", weights, v)), str(weights)


def _masks(w: OnnxWriter, attention: Node | None, padding: Node | None, heads: int) -> str | None:
    """Both masks of ``nn.MultiheadAttention`` as one that is added to scores ``[N, heads, L, S]``."""
    found = []
    if attention is not None:
        shape = w.shape(attention)
        mask = _additive(w, attention, hides=True)
        found.append(mask if len(shape) == 2 else w.reshape(mask, [_divided(w, shape[0], heads), heads, *shape[1:]]))
    if padding is not None:
        batch, length = w.shape(padding)
        found.append(w.reshape(_additive(w, padding, hides=True), [batch, 1, 1, length]))
    return str(w.add("Add", *found)) if len(found) == 2 else found[0] if found else None


def _divided(w: OnnxWriter, size: Size, heads: int) -> Size:
    if not isinstance(size, Batch):
        return size // heads
    if size.multiple % heads:
        raise w.refusal("its mask has no plane for each head")
    return Batch(size.multiple // heads)


def _additive(w: OnnxWriter, mask: Node, hides: bool) -> str:
    """A mask that is added to the scores; of a boolean one, what it hides becomes minus infinity and the rest 0.

    Args:
        hides: whether it is true where nothing may be looked at, as of ``nn.MultiheadAttention``, or where it may.
    """
    if w.shaped(mask).dtype != torch.bool:
        return w.name(mask)
    hidden, seen = (w.graph.constant(value, torch.float32) for value in (-math.inf, 0.0))
    return str(w.add("Where", w.name(mask), *((hidden, seen) if hides else (seen, hidden))))
