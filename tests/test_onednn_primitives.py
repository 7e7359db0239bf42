"""oneDNN's primitives, called directly, beside the same arithmetic in float64."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fxq import onednn, onednn_primitives
from fxq.errors import BackendError, MissingDependencyError
from fxq.onednn import Library
from fxq.onednn_primitives import (
    Convolution,
    ConvSpec,
    Gate,
    GateSpec,
    Pool,
    PoolSpec,
    Primitive,
    PrimitiveCall,
    dense,
)

pytestmark = pytest.mark.skipif(not onednn.is_available(), reason="pip install 'fxq[onednn]' for oneDNN's C API")


@functools.cache
def onednn_of(source: str) -> Library | None:
    """torch's own, or the extra's; ``None`` where it is not there."""
    try:
        return Library(onednn._inside_torch() if source == "torch" else onednn._installed())
    except (OSError, LookupError, MissingDependencyError):
        return None


@pytest.fixture(params=["torch", "extra"], autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Library:
    found = onednn_of(request.param)
    if found is None:
        pytest.skip(f"no oneDNN of {request.param} here")
    monkeypatch.setattr(onednn_primitives, "library", lambda: found)
    return found


ACTIVATIONS = {
    None: lambda y: y, "relu": torch.relu, "swish": F.silu, "hardswish": F.hardswish, "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
}  # fmt: skip


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


def integers(*shape: int, seed: int = 1) -> torch.Tensor:
    return dense(torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8))


def quantized(y: torch.Tensor, output: tuple[float, int]) -> torch.Tensor:
    return (y / output[0]).round().add(output[1]).clamp(0, 255)


def real(x: torch.Tensor, qparams: tuple[float, int]) -> torch.Tensor:
    return (x.double() - qparams[1]) * qparams[0]


def expected(conv: ConvSpec, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    weight = conv.weight.double() * conv.scales.double().reshape(-1, 1, 1, 1)
    bias = None if conv.bias is None else conv.bias.double()
    y = F.conv2d(real(x, conv.input), weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    if conv.residual is not None and residual is not None:
        y = y + real(residual, conv.residual)
    return quantized(ACTIVATIONS[conv.activation](y), conv.output)


def call(primitive: Primitive, out: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
    return primitive.call(out, onednn_primitives.library().stream())(*sources)


def run(conv: ConvSpec, x: torch.Tensor) -> torch.Tensor:
    shape = expected(conv, x).shape
    return call(Convolution(conv, x.shape, shape), dense(torch.empty(shape, dtype=torch.uint8)), x)


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
        {"activation": "sigmoid", "output": (1 / 256, 0)},
        {"activation": "hardsigmoid", "output": (1 / 256, 0)},
    ],
    ids=str,
)
def test_integers_are_those_of_the_float_arithmetic(changes: dict[str, Any]) -> None:
    conv, x = spec(**changes), integers(2, 8, 9, 7)
    difference = (run(conv, x).double() - expected(conv, x)).abs()
    assert difference.max() <= 1
    assert (difference > 0).double().mean() < 0.01  # sums next to a tie
    assert expected(conv, x).unique().numel() > 50


@pytest.mark.parametrize(
    "changes", [{}, {"activation": "relu"}, {"groups": 8}, {"kernel": 1, "padding": (0, 0)}], ids=str
)
def test_a_residual_is_added_before_the_activation_and_rounding(changes: dict[str, Any]) -> None:
    conv, x, residual = spec(residual=(0.03, 77), **changes), integers(2, 8, 9, 7), integers(2, 16, 9, 7, seed=2)
    found = call(Convolution(conv, x.shape, residual.shape), residual.clone(), x)
    wanted = expected(conv, x, residual)
    difference = (found.double() - wanted).abs()
    assert difference.max() <= 1
    assert (difference > 0).double().mean() < 0.01
    assert (wanted - expected(conv, x)).abs().double().mean() > 5  # the residual matters


def test_a_linear_is_a_convolution_of_one_pixel() -> None:
    conv = spec(kernel=1, padding=(0, 0))
    x = integers(5, 8)
    wanted = expected(conv, x.reshape(5, 8, 1, 1)).reshape(5, 16)
    found = call(Convolution(conv, x.shape, wanted.shape), torch.empty(wanted.shape, dtype=torch.uint8), x.clone())
    assert (found.double() - wanted).abs().max() <= 1
    columns = x.t().contiguous().t()
    assert torch.equal(call(Convolution(conv, x.shape, wanted.shape), found.clone(), columns), found)


@pytest.mark.parametrize(
    "pool",
    [
        PoolSpec(False, (3, 3), (2, 2), (1, 1)),
        PoolSpec(False, (2, 3), (2, 1), (0, 1)),
        PoolSpec(True, (9, 8), (9, 8), (0, 0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("channels", [3, 24, 64])
def test_pools(pool: PoolSpec, channels: int) -> None:
    x = integers(2, channels, 9, 8)
    if pool.average:
        wanted = F.avg_pool2d(x.double(), pool.size, pool.stride).round()
    else:
        wanted = F.max_pool2d(x.double(), pool.size, pool.stride, pool.padding)
    found = call(Pool(pool, x.shape, wanted.shape), dense(torch.empty(wanted.shape, dtype=torch.uint8)), x)
    assert torch.equal(found.double(), wanted)


def test_a_pool_that_rounds_its_size_up_pads_behind() -> None:
    x = integers(1, 16, 8, 8)
    wanted = F.max_pool2d(x.double(), 3, 2, 0, ceil_mode=True)
    found = call(Pool(PoolSpec(False, (3, 3), (2, 2), (0, 0)), x.shape, wanted.shape), dense(wanted.to(torch.uint8)), x)
    assert torch.equal(found.double(), wanted)


@pytest.mark.parametrize("channels", [5, 64, 72])
def test_gates(channels: int) -> None:
    gate = GateSpec((0.05, 9), (1 / 256, 0), (0.04, 3))
    x, factor = integers(2, channels, 6, 5), integers(2, channels, 1, 1, seed=3)
    wanted = quantized(real(x, gate.input) * real(factor, gate.factor), gate.output)
    found = call(Gate(gate, x.shape), torch.empty_like(x), x, factor)
    difference = (found.double() - wanted).abs()
    assert difference.max() <= 1
    assert (difference > 0).double().mean() < 0.01
    assert torch.equal(call(Gate(gate, x.shape), torch.empty_like(x), x.contiguous(), factor.contiguous()), found)


def test_inputs_may_come_in_any_layout_and_from_anywhere() -> None:
    conv, x = spec(), integers(2, 8, 9, 7)
    out = dense(torch.empty(2, 16, 9, 7, dtype=torch.uint8))
    convolution = PrimitiveCall(Convolution(conv, x.shape, out.shape), out, onednn_primitives.library().stream())
    first = convolution(x).clone()
    twice = dense(torch.cat([x, x.flip(0)], 1))
    for same in (x.contiguous(), x.clone(), twice[:, :8]):
        out.zero_()
        assert torch.equal(convolution(same), first)
    assert not torch.equal(convolution(x.flip(0)), first)


def test_a_fixed_input_that_is_part_of_another_is_copied_at_each_call() -> None:
    conv, both = spec(), dense(integers(2, 16, 5, 5))
    part, out = both[:, 8:], dense(torch.empty(2, 16, 5, 5, dtype=torch.uint8))
    primitive = Convolution(conv, part.shape, out.shape)
    fixed = PrimitiveCall(primitive, out, onednn_primitives.library().stream(), [part])
    for _ in range(2):
        found = fixed().clone()
        assert torch.equal(found, call(primitive, out, part))
        both.copy_(both.flip(1))
    quantized_part = torch._make_per_tensor_quantized_tensor(both, 0.1, 3)[:, 8:]
    fixed = PrimitiveCall(primitive, out, onednn_primitives.library().stream(), [quantized_part])
    assert torch.equal(fixed().clone(), call(primitive, out, part))


def test_a_fixed_input_is_read_at_each_call() -> None:
    conv, x = spec(), integers(1, 8, 5, 5)
    out = dense(torch.empty(1, 16, 5, 5, dtype=torch.uint8))
    convolution = PrimitiveCall(Convolution(conv, x.shape, out.shape), out, onednn_primitives.library().stream(), [x])
    before = convolution(x).clone()
    x.copy_(x.flip(1))
    assert not torch.equal(convolution(x), before)


def test_what_onednn_refuses_is_an_error() -> None:
    with pytest.raises(BackendError, match=r"oneDNN 3\.\d+\.\d+: convolution_forward_primitive_desc_create failed"):
        Convolution(spec(padding=(0, 0)), (1, 8, 9, 7), (1, 16, 9, 7))  # the output is too large
