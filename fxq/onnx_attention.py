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
    if a["key_padding_mask"] is not None:
        raise w.refusal("it has a key_padding_mask")
    heads = a["num_heads"]
    shape = w.shape(a["query"])
    if len(shape) != 3:
        raise w.refusal("its input has no batch")
    q, k, v = (_heads(w, a[name], heads, a["batch_first"]) for name in ("query", "key", "value"))
    mask = _additive(w, a["attn_mask"])
    context, weights = _attend(w, q, k, v, mask, int(shape[2]) // heads)  # type: ignore[arg-type]
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
    mask = _additive(w, a.get("attn_mask"))
    if a.get("is_causal"):
        shape = (length, w.shape(a["key"])[-2])
        if any(isinstance(size, Batch) for size in shape):
            raise w.refusal("its sequence is as long as the batch")
        mask = w.graph.tensor(torch.full(shape, -math.inf).triu(1), "causal_mask")  # type: ignore[arg-type]
    q, k, v = (w.name(a[name]) for name in _SDPA[:3])
    return _attend(w, q, k, v, mask, int(width), a.get("scale"), len(w.shape(a["key"])))[0]  # type: ignore[arg-type]


def _attend(
    w: OnnxWriter, q: str, k: str, v: str, mask: str | None, width: int, scale: float | None = None, dims: int = 4
) -> tuple[str, str]:
    """Context and weights of heads in the last but two dimensions."""
    factor = w.graph.constant(1 / math.sqrt(width) if scale is None else scale, torch.float32)
    order = [*range(dims - 2), dims - 1, dims - 2]
    scores = w.add("MatMul", w.add("Mul", q, factor), w.add("Transpose", k, perm=order))
    if mask is not None:
        scores = w.add("Add", scores, mask)
    weights = w.add("Softmax", scores, axis=-1)
    return str(w.add("MatMul", weights, v)), str(weights)


def _additive(w: OnnxWriter, mask: Any) -> str | None:
    """A mask that is added to the scores; a boolean one becomes 0 and minus infinity."""
    if mask is None:
        return None
    if w.shaped(mask).dtype != torch.bool:
        return w.name(mask)
    raise w.refusal("its mask is boolean; pass a float mask")
