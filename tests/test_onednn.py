"""oneDNN's convolutions, called directly, beside the same arithmetic in float64."""

from __future__ import annotations

import ctypes
import importlib.metadata
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fxq import onednn
from fxq.errors import BackendError, MissingDependencyError
from fxq.onednn import Convolution, ConvolutionCall, ConvSpec, Library, library

pytestmark = pytest.mark.skipif(not onednn.is_available(), reason="pip install 'fxq[onednn]' for oneDNN's C API")

ACTIVATIONS = {None: lambda y: y, "relu": torch.relu, "swish": F.silu, "hardswish": F.hardswish}


def spec(**changes: Any) -> ConvSpec:
    generator = torch.Generator().manual_seed(0)
    channels, groups, kernel = 16, changes.get("groups", 1), changes.pop("kernel", 3)
    weight = torch.randint(-127, 128, (channels, 8 // groups, kernel, kernel), generator=generator, dtype=torch.int8)
    scales = torch.rand(channels, generator=generator) * 1e-3 + 1e-4
    bias = torch.randn(channels, generator=generator)
    given: dict[str, Any] = {
        "weight": weight, "scales": scales, "bias": bias, "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1),
        "groups": 1, "input": (0.02, 10), "output": (0.07, 130),
    }  # fmt: skip
    return ConvSpec(**given | changes)


def image(*shape: int) -> torch.Tensor:
    x = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return x.contiguous(memory_format=torch.channels_last)


def expected(conv: ConvSpec, x: torch.Tensor) -> torch.Tensor:
    real = (x.double() - conv.input[1]) * conv.input[0]
    weight = conv.weight.double() * conv.scales.double().reshape(-1, 1, 1, 1)
    bias = None if conv.bias is None else conv.bias.double()
    y = F.conv2d(real, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    scale, zero_point = conv.output
    return (ACTIVATIONS[conv.activation](y) / scale).round().add(zero_point).clamp(0, 255)


def run(conv: ConvSpec, x: torch.Tensor) -> torch.Tensor:
    shape = expected(conv, x).shape
    out = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
    return ConvolutionCall(Convolution(conv, (x.shape, shape)), out, library().stream())(x)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"groups": 8},
        {"groups": 2},
        {"kernel": 1, "padding": (0, 0)},
        {"stride": (2, 1), "padding": (0, 2)},
        {"dilation": (2, 2)},
        {"bias": None},
        {"scales": torch.tensor([5e-4])},
        {"scales": torch.tensor([2e-3]), "groups": 8},
        {"input": (0.02, 0), "output": (0.02, 0)},
        {"activation": "relu"},
        {"activation": "swish"},
        {"activation": "hardswish"},
    ],
    ids=str,
)
def test_integers_are_those_of_the_float_arithmetic(changes: dict[str, Any]) -> None:
    conv, x = spec(**changes), image(2, 8, 9, 7)
    difference = (run(conv, x).double() - expected(conv, x)).abs()
    assert difference.max() <= 1
    assert (difference > 0).double().mean() < 0.01  # sums next to a tie
    assert expected(conv, x).unique().numel() > 50


def test_inputs_may_come_in_any_layout_and_from_anywhere() -> None:
    conv, x = spec(), image(2, 8, 9, 7)
    out = torch.empty(2, 16, 9, 7, dtype=torch.uint8, memory_format=torch.channels_last)
    call = ConvolutionCall(Convolution(conv, (x.shape, out.shape)), out, library().stream())
    first = call(x).clone()
    twice = torch.cat([x, x.flip(0)], 1).contiguous(memory_format=torch.channels_last)
    for same in (x.contiguous(), x.clone(), twice[:, :8]):
        out.zero_()
        assert torch.equal(call(same), first)
    assert not torch.equal(call(x.flip(0)), first)


def test_a_fixed_input_is_read_at_each_call() -> None:
    conv, x = spec(), image(1, 8, 5, 5)
    out = torch.empty(1, 16, 5, 5, dtype=torch.uint8, memory_format=torch.channels_last)
    call = ConvolutionCall(Convolution(conv, (x.shape, out.shape)), out, library().stream(), x)
    before = call(x).clone()
    x.copy_(x.flip(1))
    assert not torch.equal(call(x), before)


def test_what_onednn_refuses_is_an_error() -> None:
    with pytest.raises(BackendError, match=r"oneDNN 3\.\d+\.\d+: convolution_forward_primitive_desc_create failed"):
        Convolution(spec(padding=(0, 0)), ((1, 8, 9, 7), (1, 16, 9, 7)))  # the output is too large


def test_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_found(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", not_found)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'fxq\[onednn\]'"):
        library.__wrapped__()


def test_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        def __init__(self, path: str) -> None:
            self.dnnl_version = lambda: ctypes.pointer(onednn._Version(2, 6, 0))

    monkeypatch.setattr(ctypes, "CDLL", Old)
    with pytest.raises(BackendError, match=r"libdnnl.so is oneDNN 2\.6\.0, not 3"):
        Library("libdnnl.so")
