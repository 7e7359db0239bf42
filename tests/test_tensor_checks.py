"""Tensors that a file may not give to kernels, which do not look at types and numbers."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models_for_tests import Lambda, conv, quiet
from test_graph_json import closed, node, opened
from torch import nn

import fxq
from fxq.errors import FileFormatError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Change = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def honest() -> bytes:
    torch.manual_seed(0)
    net = Lambda(
        lambda m, x: m.fc(m.norm(m.d(m.t(m.a(x))).relu()).mean((2, 3))),
        a=conv(3, 8), t=nn.ConvTranspose2d(8, 8, 3), d=conv(8, 8, groups=8), norm=nn.BatchNorm2d(8), fc=nn.Linear(8, 4),
    )  # fmt: skip
    buffer = io.BytesIO()
    fxq.save(quiet(fxq.quantize, net, [X]), buffer)
    fxq.load(io.BytesIO(buffer.getvalue()))
    return buffer.getvalue()


def refused(data: bytes, name: str, change: Change, message: str) -> None:
    content, tensors = opened(data)
    tensors["tensors "][name] = change(tensors["tensors "][name])
    for backend in ("x86", "qnnpack"):
        with pytest.raises(FileFormatError, match=message):
            fxq.load(io.BytesIO(closed(content, tensors)), backend)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float16, torch.float64, torch.int64, torch.uint8])
@pytest.mark.parametrize("name", ["a.bias", "d.bias", "t.bias", "fc.bias"])
def test_biases_of_another_type(name: str, dtype: torch.dtype, honest: bytes) -> None:
    refused(honest, name, lambda bias: bias.to(dtype), "the bias of node .* is not of finite float32 numbers")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_biases_that_are_no_numbers(number: float, honest: bytes) -> None:
    refused(honest, "a.bias", lambda bias: bias * number, "the bias of node 'a' is not of finite float32 numbers")


SCALES: dict[str, Change] = {
    "nan": lambda scale: scale * float("nan"),
    "inf": lambda scale: scale * float("inf"),
    "zero": lambda scale: scale * 0,
    "negative": lambda scale: -scale,
    "denormal": lambda scale: torch.full_like(scale, 1e-40),
    "integers": lambda scale: scale.long() + 1,
    "double": lambda scale: scale.double(),
    "one": lambda scale: scale[:1].clone(),
    "more": lambda scale: torch.cat([scale, scale]),
    "2d": lambda scale: scale[None],
}


@pytest.mark.parametrize("change", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("layer", ["a", "fc"])
def test_scales(layer: str, change: Change, honest: bytes) -> None:
    refused(honest, f"{layer}.weight_scale", change, "has no valid scale for each channel")


@pytest.mark.parametrize("change", [lambda z: z + 999, lambda z: z - 129, lambda z: z.float(), lambda z: z[:1].clone()])
def test_zero_points(change: Change, honest: bytes) -> None:
    refused(honest, "a.weight_zero_point", change, "has no valid zero point for each channel")


@pytest.mark.parametrize("change", [lambda w: w.to(torch.uint8), lambda w: w.float(), lambda w: w.to(torch.int32)])
def test_weights_of_another_type(change: Change, honest: bytes) -> None:
    refused(honest, "a.weight", change, "reads a weight that is not of int8")


@pytest.mark.parametrize("axis", [64, -1, 4, None, True])
def test_axes(axis: Any, honest: bytes) -> None:
    content, tensors = opened(honest)
    node(content["regions"][""], "call_function", "fxq:dequantize_channel")["args"]["tuple"][3] = axis
    with pytest.raises(FileFormatError, match="dequantize_channel"):
        fxq.load(io.BytesIO(closed(content, tensors)))


def test_a_tensor_that_another_node_computes(honest: bytes) -> None:
    content, tensors = opened(honest)
    args = node(content["regions"][""], "call_function", "fxq:dequantize_channel")["args"]["tuple"]
    args[1] = {"node": content["regions"][""]["nodes"][0]["name"]}
    with pytest.raises(FileFormatError, match="stands where a tensor of the file is due"):
        fxq.load(io.BytesIO(closed(content, tensors)))


def test_what_a_kernel_reads_beside_its_weight() -> None:
    """BatchNorm on its own: its numbers are no weight of a layer, but the kernel takes them on trust, too."""
    net = Lambda(lambda m, x: m.norm(torch.relu(m.a(x)) + x[:, :1]), a=conv(), norm=nn.BatchNorm2d(4))
    buffer = io.BytesIO()
    fxq.save(quiet(fxq.quantize, net, [X], backend="fbgemm"), buffer)
    assert "batch_norm" in fxq.graph_table(fxq.load(io.BytesIO(buffer.getvalue())))
    content, tensors = opened(buffer.getvalue())
    tensors["tensors "]["norm.running_mean"] = tensors["tensors "]["norm.running_mean"].to(torch.int8)
    with pytest.raises(FileFormatError, match="cannot be lowered"):
        fxq.load(io.BytesIO(closed(content, tensors)))
