"""Attention without its projections, against torch's and torchvision's whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import same
from torch import nn

from fxq.attention import multihead_attention, window_attention
from fxq.torchvision_ops import import_torchvision

import_torchvision()
from torchvision.models import swin_transformer  # noqa: E402
from torchvision.models.video.swin_transformer import shifted_window_attention_3d  # noqa: E402

HEADS, SIZE, BATCH, QUERIES, KEYS = 2, 8, 3, 5, 7


def split(leaf, query, key, value, **options):
    """A whole ``nn.MultiheadAttention`` as linears around :func:`multihead_attention`."""
    if leaf._qkv_same_embed_dim:
        weights = leaf.in_proj_weight.chunk(3)
    else:
        weights = (leaf.q_proj_weight, leaf.k_proj_weight, leaf.v_proj_weight)
    biases = (None,) * 3 if leaf.in_proj_bias is None else leaf.in_proj_bias.chunk(3)
    projected = [F.linear(*parts) for parts in zip((query, key, value), weights, biases, strict=True)]
    context, found = multihead_attention(*projected, leaf.num_heads, leaf.batch_first, **options)
    return leaf.out_proj(context), found


def module(**options):
    leaf = nn.MultiheadAttention(SIZE, HEADS, **options).eval()
    for parameter in leaf.parameters():
        nn.init.normal_(parameter, std=0.7)  # biases begin as zeros
    return leaf


def inputs(batch_first=True, queries=QUERIES, keys=KEYS, kdim=SIZE, vdim=SIZE):
    found = [torch.randn(BATCH, n, size) for n, size in ((queries, SIZE), (keys, kdim), (keys, vdim))]
    return found if batch_first else [x.transpose(0, 1) for x in found]


def boolean(*shape):
    """A random mask with something to attend to in each row."""
    mask = torch.rand(*shape) < 0.5
    mask[..., 0] = False
    return mask


MASKS = {
    "none": lambda: {},
    "bool 2d": lambda: {"attn_mask": boolean(QUERIES, KEYS)},
    "float 2d": lambda: {"attn_mask": torch.randn(QUERIES, KEYS)},
    "bool 3d": lambda: {"attn_mask": boolean(BATCH * HEADS, QUERIES, KEYS)},
    "float 3d": lambda: {"attn_mask": torch.randn(BATCH * HEADS, QUERIES, KEYS)},
    "bool padding": lambda: {"key_padding_mask": boolean(BATCH, KEYS)},
    "float padding": lambda: {"key_padding_mask": torch.randn(BATCH, KEYS)},
    "bool both": lambda: {"attn_mask": boolean(QUERIES, KEYS), "key_padding_mask": boolean(BATCH, KEYS)},
    "float both": lambda: {"attn_mask": torch.randn(QUERIES, KEYS), "key_padding_mask": torch.randn(BATCH, KEYS)},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("weights", ["averaged", "by head", "none"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_masks_and_weights(mask, weights, batch_first):
    leaf = module(batch_first=batch_first)
    options = MASKS[mask]() | {"need_weights": weights != "none", "average_attn_weights": weights == "averaged"}
    if mask == "bool both":  # together they may hide everything
        options["attn_mask"][:, 0] = options["key_padding_mask"][:, 0] = False
    query, key, value = inputs(batch_first)
    with torch.no_grad():
        actual, expected = split(leaf, query, key, value, **options), leaf(query, key, value, **options)
    same(actual, expected)


@pytest.mark.parametrize("mask", [None, "attn", "padding"])
@pytest.mark.parametrize("average", [True, False])
def test_unbatched(mask, average):
    leaf = module()
    query, key, value = (x[0] for x in inputs())
    options = {
        "attn": {"attn_mask": boolean(QUERIES, KEYS)}, "padding": {"key_padding_mask": boolean(KEYS)}, None: {},
    }[mask] | {"average_attn_weights": average}  # fmt: skip
    with torch.no_grad():
        same(split(leaf, query, key, value, **options), leaf(query, key, value, **options))


@pytest.mark.parametrize("options", [{"bias": False}, {"kdim": 6, "vdim": 10}, {"kdim": 6, "bias": False}])
def test_projections_of_every_kind(options):
    leaf = module(batch_first=True, **options)
    sizes = {name: options[name] for name in ("kdim", "vdim") if name in options}
    query, key, value = inputs(**sizes)
    with torch.no_grad():
        same(split(leaf, query, key, value), leaf(query, key, value))


def test_causal_is_a_hint_beside_the_mask():
    leaf = module(batch_first=True)
    query, key, value = inputs(keys=QUERIES)
    options = {"attn_mask": nn.Transformer.generate_square_subsequent_mask(QUERIES), "is_causal": True}
    for need_weights in (True, False):
        with torch.no_grad():
            actual = split(leaf, query, key, value, need_weights=need_weights, **options)
            expected = leaf(query, key, value, need_weights=need_weights, **options)
        same(actual, expected)


def windows(whole, x, window, shift, *, has_bias=True, logit_scale=False):
    """Assert that the whole and linears around :func:`window_attention` agree on ``x``."""
    size, count = x.shape[-1], torch.Size(window).numel()
    qkv_weight, proj_weight = torch.randn(3 * size, size), torch.randn(size, size)
    qkv_bias, proj_bias = (torch.randn(3 * size), torch.randn(size)) if has_bias else (None, None)
    position_bias = torch.randn(1, HEADS, count, count)
    options = {"logit_scale": torch.randn(HEADS, 1, 1) * 3} if logit_scale else {}
    expected = whole(
        x, qkv_weight, proj_weight, position_bias, list(window), HEADS, shift_size=list(shift), qkv_bias=qkv_bias,
        proj_bias=proj_bias, training=False, **options,
    )  # fmt: skip
    if logit_scale and qkv_bias is not None:  # there is no key bias
        qkv_bias = torch.cat([qkv_bias[:size], torch.zeros(size), qkv_bias[2 * size :]])
    qkv = F.linear(x, qkv_weight, qkv_bias)
    before = qkv.clone()
    context = window_attention(qkv, qkv_bias, position_bias, window, HEADS, shift, **options)
    assert torch.equal(qkv, before)
    same(F.linear(context, proj_weight, proj_bias), expected, 1e-4)


# sizes that the windows divide, do not divide, and exceed
SIZES_2D = [
    ((8, 8), (4, 4)), ((8, 12), (4, 3)), ((7, 9), (4, 4)), ((5, 10), (4, 7)), ((3, 3), (4, 4)), ((3, 9), (7, 2)),
]  # fmt: skip


@pytest.mark.parametrize(("image", "window"), SIZES_2D)
@pytest.mark.parametrize("shift", ["none", "half", "one axis"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("has_bias", [True, False])
def test_windows_2d(image, window, shift, version, has_bias):
    halves = [w // 2 for w in window]
    shifts = {"none": [0, 0], "half": halves, "one axis": [0, halves[1]]}[shift]
    whole = swin_transformer.shifted_window_attention
    x = torch.randn(BATCH, *image, SIZE)
    windows(whole, x, window, shifts, has_bias=has_bias, logit_scale=version == 2)


@pytest.mark.parametrize("volume", [(4, 6, 6), (3, 5, 7), (1, 2, 9)])
@pytest.mark.parametrize("window", [(2, 3, 3), (4, 4, 4)])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("has_bias", [True, False])
def test_windows_3d(volume, window, shifted, has_bias):
    # torchvision gets its windows after its own check that none exceeds the (unpadded) volume
    window = [min(w, size) for w, size in zip(window, volume, strict=True)]
    shift = [w // 2 if shifted and w < size else 0 for w, size in zip(window, volume, strict=True)]
    windows(shifted_window_attention_3d, torch.randn(2, *volume, SIZE), window, shift, has_bias=has_bias)
