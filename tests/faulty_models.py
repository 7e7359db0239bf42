"""A net of three convs with a fault planted in the middle one, for the tests of what finds faults."""

from __future__ import annotations

import torch
from models_for_tests import Lambda, conv
from torch import nn

import fxq
from fxq.backends import get_backend
from fxq.observers import Observer


def chain() -> Lambda:
    """Three convs; the middle one's node is ``b``, its output leaves through ``relu_1``."""
    torch.manual_seed(0)
    net = Lambda(
        lambda m, x: m.c(torch.relu(m.b(torch.relu(m.a(x))))).mean((2, 3)),
        a=conv(3, 8), b=conv(8, 8), c=conv(8, 4),
    )  # fmt: skip
    net.requires_grad_(False)
    return net


def images(count: int = 2) -> list[torch.Tensor]:
    return list(torch.randn(count, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


def outlier_weight() -> nn.Module:
    """One weight of the middle layer is 1000 times the others, on a channel that is always 0: of no use in float, but
    with one scale a tensor the others round to nothing.
    """
    net = chain()
    net.a.bias[0] = -100.0  # type: ignore[union-attr, index, operator]
    net.b.weight[0, 0, 0, 0] = 1000 * net.b.weight.abs().max()  # type: ignore[union-attr, index, operator]
    return net


def two_bits() -> fxq.QConfigMapping:
    """Two-bit weights for the middle layer."""
    backend = get_backend("qnnpack")
    weight = backend.weight.replace(quant_min=-1, quant_max=1, ch_axis=None)
    qconfig = fxq.QConfig(activation=backend.activation, weight=weight)
    return fxq.QConfigMapping().set_module_name("b", qconfig)


def wrecked_range(net: nn.Module) -> nn.Module:
    """Calibrated, and then the range of the middle layer's output is cut to a hundredth."""
    prepared = fxq.prepare(net, images()[0], backend="qnnpack")
    fxq.calibrate(prepared, images())
    observer = prepared.get_submodule("relu_1_observer")
    assert isinstance(observer, Observer)
    observer.bounds = (0.0, observer.range()[1].item() / 100)
    observer._range = None
    return prepared
