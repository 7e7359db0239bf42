"""Multiply-accumulates against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from models_for_tests import Lambda, quiet
from torch import nn

import fxq
from fxq.macs import count_macs, counting

# layer, input shape, outputs times the products in each (for transposed convs: inputs times outputs each adds to)
LAYERS = {
    "conv1d": (nn.Conv1d(3, 4, 5), (2, 3, 10), (2 * 4 * 6) * (3 * 5)),
    "conv2d": (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 8, 8), (2 * 4 * 8 * 8) * (3 * 3 * 3)),
    "stride": (nn.Conv2d(3, 4, 3, stride=2, padding=1), (1, 3, 8, 8), (4 * 4 * 4) * (3 * 3 * 3)),
    "groups": (nn.Conv2d(6, 4, 3, padding=1, groups=2), (1, 6, 8, 8), (4 * 8 * 8) * (3 * 3 * 3)),
    "depthwise": (nn.Conv2d(6, 6, 3, padding=1, groups=6), (1, 6, 8, 8), (6 * 8 * 8) * (3 * 3)),
    "dilation": (nn.Conv2d(3, 4, 3, dilation=2), (1, 3, 8, 8), (4 * 4 * 4) * (3 * 3 * 3)),
    "conv3d": (nn.Conv3d(2, 4, (1, 3, 3)), (1, 2, 4, 5, 6), (4 * 4 * 3 * 4) * (2 * 9)),
    "transposed": (nn.ConvTranspose2d(3, 4, 2, stride=2), (1, 3, 5, 5), (3 * 5 * 5) * (4 * 2 * 2)),
    "transposed groups": (nn.ConvTranspose2d(6, 4, 3, groups=2), (1, 6, 5, 5), (6 * 5 * 5) * (2 * 3 * 3)),
    "transposed 1d": (nn.ConvTranspose1d(3, 4, 3), (2, 3, 7), (2 * 3 * 7) * (4 * 3)),
    "linear": (nn.Linear(6, 5), (2, 6), (2 * 5) * 6),
    "linear of tokens": (nn.Linear(6, 5, bias=False), (2, 7, 6), (2 * 7 * 5) * 6),
}


def outside(layer):
    """In a module that cannot be traced, and so stays a float leaf."""

    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x) if x.sum() > -1e9 else x

    return Untraceable()


@pytest.mark.parametrize("name", LAYERS)
def test_by_hand(name):
    layer, shape, expected = LAYERS[name]
    x = torch.randn(shape)
    out = layer(x)
    assert count_macs(layer.weight, x, out, "transposed" in name) == expected
    with counting(layer) as found:
        layer(x)
        layer(x)
    assert found == {"": 2 * expected}
    layer(x)
    assert found == {"": 2 * expected} and not layer._forward_hooks


@pytest.mark.parametrize("name", LAYERS)
def test_of_a_node_and_of_a_float_leaf_module(name):
    layer, shape, expected = LAYERS[name]
    x = torch.randn(shape)
    prepared = fxq.prepare(Lambda(lambda m, x: m.a(x), a=layer), x)
    assert {r["node"]: r["macs"] for r in fxq.graph_records(prepared)}["a"] == expected
    model = Lambda(lambda m, x: m.same(x) + 1, same=outside(layer))
    with counting(model) as found:
        model(x)
    assert found == {"same.layer": expected}
    prepared = fxq.prepare(model, x)
    assert [(r["region"], r["macs"]) for r in fxq.graph_records(prepared) if r["macs"]] == [("same.layer", expected)]
    prepared = fxq.prepare(model, x, exclude="same")  # a float leaf as a whole
    assert {r["node"]: r["macs"] for r in fxq.graph_records(prepared)}["same"] == expected


def test_of_a_recurrent_leaf():
    """A recurrent layer is not counted, a linear beside it is."""
    model = Lambda(lambda m, x: m.a(m.l(x)[0]), l=nn.LSTM(6, 5), a=nn.Linear(5, 3))
    prepared = fxq.prepare(model, torch.randn(4, 2, 6))
    assert {r["node"]: r["macs"] for r in fxq.graph_records(prepared) if r["macs"]} == {"a": 4 * 2 * 3 * 5}


def test_a_layer_called_twice_counts_twice():
    model = Lambda(lambda m, x: m.a(m.a(x)), a=nn.Linear(6, 6))
    quantized = quiet(fxq.quantize, model, [torch.randn(2, 6)])
    assert [record["macs"] for record in fxq.graph_records(quantized) if record["macs"]] == [72, 72]
    assert "100.0% of" in fxq.summary(quantized)


def test_the_share_in_the_summary():
    model = Lambda(lambda m, x: m.b(m.a(x)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 12, 1))
    quantized = quiet(fxq.quantize, model, [torch.randn(1, 3, 5, 10)], exclude="b")
    assert "20.0% of" in fxq.summary(quantized)  # 50 pixels times 12 and 48
