"""The part of attention between its projections: scores, softmax and the weighted sum, in float.

Modules and functions that hide their projections inside (``nn.MultiheadAttention``, torchvision's shifted windows)
are taken apart into linears, which become int8, and one of these functions, which does not. Sizes are read when
they run, so nothing is fixed at the example's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def multihead_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    batch_first: bool,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``nn.MultiheadAttention`` without its projections.

    Args:
        query, key, value: projected, float32 ``[N, L, E]`` with ``batch_first``, ``[L, N, E]`` without, ``[L, E]``
            unbatched.
        key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal: as of the module;
            ``is_causal`` is a hint beside ``attn_mask`` and changes nothing.

    Returns:
        The context in query's layout, and the weights ``[N, L, S]`` (``[N, heads, L, S]`` not averaged) or ``None``.
    """
    batched = query.dim() == 3
    if not batched:
        query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    elif not batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    mask = _additive_mask(attn_mask, key_padding_mask, q, num_heads)
    weights = None
    if need_weights:
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
        weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        context = weights @ v
        weights = weights.mean(dim=1) if average_attn_weights else weights
    else:
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    context = context.transpose(1, 2).flatten(2)
    if not batched:
        return context.squeeze(0), None if weights is None else weights.squeeze(0)
    return context if batch_first else context.transpose(0, 1), weights


def _additive_mask(attn: Tensor | None, padding: Tensor | None, q: Tensor, num_heads: int) -> Tensor | None:
    """Both masks as one float tensor that broadcasts to ``[N, heads, L, S]``."""
    parts = []
    if attn is not None:
        parts.append(_to_float(attn if attn.dim() == 2 else attn.unflatten(0, (-1, num_heads)), q))
    if padding is not None:
        parts.append(_to_float(padding, q)[:, None, None, :])
    return sum(parts[1:], parts[0]) if parts else None


def _to_float(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)


def window_attention(
    qkv: Tensor,
    pad_values: Tensor | None,
    relative_position_bias: Tensor,
    window_size: Sequence[int],
    num_heads: int,
    shift_size: Sequence[int],
    logit_scale: Tensor | None = None,
) -> Tensor:
    """Attention inside (shifted) windows of any number of dimensions, without its projections.

    The scheme is that of Liu et al., "Swin Transformer" (arXiv:2103.14030); with ``logit_scale`` the cosine attention
    of "Swin Transformer V2" (arXiv:2111.09883).

    Args:
        qkv: projected query, key and value side by side, float32 ``[N, *sizes, 3 C]``.
        pad_values: ``[3 C]``, the projection of a zero (its bias), which fills up incomplete windows.
        relative_position_bias: added to the scores, ``[1, heads, window, window]``.
        window_size, shift_size: one integer a dimension.

    Returns:
        The context, ``[N, *sizes, C]``.
    """
    sizes = qkv.shape[1:-1]
    padded = [math.ceil(size / window) * window for size, window in zip(sizes, window_size, strict=True)]
    shift = [0 if w >= size else s for s, w, size in zip(shift_size, window_size, padded, strict=True)]
    dims = tuple(range(1, len(padded) + 1))
    inside = (slice(None), *(slice(size) for size in sizes))
    if padded != list(sizes):
        fill = qkv.new_zeros(qkv.shape[-1]) if pad_values is None else pad_values
        filled = fill.repeat(qkv.shape[0], *padded, 1)
        filled[inside] = qkv
        qkv = filled
    if any(shift):
        qkv = torch.roll(qkv, [-s for s in shift], dims)
    windows = _to_windows(qkv, window_size)  # [N, windows, positions, 3 C]
    q, k, v = windows.unflatten(-1, (3, num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
    if logit_scale is None:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    else:
        scale = logit_scale.clamp(max=math.log(100.0)).exp()
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * scale
    scores = scores + relative_position_bias
    if any(shift):
        scores = scores + shift_mask(padded, window_size, shift, qkv)[:, None]
    context = (torch.softmax(scores, dim=-1) @ v).transpose(2, 3).flatten(3)
    context = _from_windows(context, padded, window_size)
    return (torch.roll(context, shift, dims) if any(shift) else context)[inside].contiguous()


def _to_windows(x: Tensor, window_size: Sequence[int]) -> Tensor:
    """``[N, *sizes, C]`` to ``[N, windows, positions in a window, C]``."""
    n = len(window_size)
    split = [part for size, w in zip(x.shape[1:-1], window_size, strict=True) for part in (size // w, w)]
    x = x.reshape(x.shape[0], *split, x.shape[-1])
    x = x.permute(0, *range(1, 2 * n, 2), *range(2, 2 * n + 1, 2), 2 * n + 1)
    return x.flatten(n + 1, 2 * n).flatten(1, n)


def _from_windows(x: Tensor, sizes: Sequence[int], window_size: Sequence[int]) -> Tensor:
    """The inverse of :func:`_to_windows`."""
    n = len(window_size)
    counts = [size // w for size, w in zip(sizes, window_size, strict=True)]
    x = x.reshape(x.shape[0], *counts, *window_size, x.shape[-1])
    order = itertools.chain.from_iterable((1 + i, 1 + n + i) for i in range(n))
    return x.permute(0, *order, 2 * n + 1).reshape(x.shape[0], *sizes, x.shape[-1])


def shift_mask(sizes: Sequence[int], window_size: Sequence[int], shift: Sequence[int], like: Tensor) -> Tensor:
    """-100 between positions that only the cyclic shift brought together: ``[windows, positions, positions]``."""
    label = like.new_zeros(1, *sizes, 1)
    for axis, (size, window, s) in enumerate(zip(sizes, window_size, shift, strict=True), start=1):
        if s:
            part = torch.zeros(size, dtype=like.dtype, device=like.device)
            part[size - window :] += 1
            part[size - s :] += 1
            label = 3 * label + part.reshape([-1 if d == axis else 1 for d in range(label.dim())])
    positions = _to_windows(label, window_size)[0, :, :, 0]
    return torch.where(positions[:, :, None] == positions[:, None, :], 0.0, -100.0)
