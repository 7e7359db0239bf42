"""Small models, one for each way of writing a model that quantizers stumble over.

Each quantizes, runs at the example's and at another batch size, stays close to the float model, and says why what
is float is float.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import checked, conv, quiet, randomize
from torch import nn
from torch.nn.utils import parametrizations

import fxq
from fxq.numerics import sqnr
from fxq.partition import partition_of, regions_of
from fxq.plan import Status

LOWEST_SQNR = 15.0
torch.manual_seed(0)  # the layers below are the same whatever was imported before


class Case(NamedTuple):
    """A forward, its parts, how many of its convs and linears run in int8 and in float, and its input's shape."""

    forward: Callable[..., Any]
    parts: dict[str, Any]
    int8: int
    floats: int = 0
    shape: tuple[int, ...] = (2, 3, 8, 8)


class Model(nn.Module):
    """A case's model; whatever its parts are, the function is its forward."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        for name, part in case.parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.function = case.forward
        randomize(self)
        self.eval()

    def forward(self, x):
        return self.function(self, x)


class Starred(Model):
    def forward(self, *inputs):
        return self.function(self, inputs)


class WithOptional(Model):
    def forward(self, x, y=None):
        return self.function(self, x, y)


class OddConv(nn.Conv2d):
    """A subclass with nothing of its own but a constructor."""

    def __init__(self, cin, cout):
        super().__init__(cin, cout, 3, stride=1, padding=1, bias=False)


def two_convs(function, **parts):
    """conv, a function of its output, conv."""
    return Case(lambda m, x: m.b(function(m, m.a(x))), {"a": conv(3, 4), "b": conv(4, 4), **parts}, 2)


def on_tokens(function, *, int8, floats=0, **parts):
    """A function of an image's pixels as a sequence of tokens."""
    return Case(lambda m, x: function(m, x.flatten(2).transpose(1, 2)), parts, int8, floats, (2, 16, 4, 4))


def linears(*names, size=16):
    return {name: nn.Linear(size, size) for name in names}


def optional_input(m, x, y=None):
    z = m.a(x)
    return m.b(z if y is None else z + y)


def loop_over_shape(m, x):
    y = m.a(x)
    rows = [y[i].flip(0) for i in range(y.shape[0])]
    return m.b(torch.stack(rows))


def data_dependent(m, x):
    y = m.a(x)
    return m.b(y) if y.mean() > 0 else m.b(-y)


def shape_dependent(m, x):
    y = m.a(x)
    return m.b(y) if y.shape[-1] > 4 else m.b(y * 2)


def resized(m, x):
    y = m.a(x)
    return m.b(F.interpolate(y, size=(y.shape[2] * 2, y.shape[3] * 2)))


def in_place_add(m, x):
    y = m.a(x)
    y += m.b(x)
    return m.c(y)


def unpooled(m, x):
    y, indices = F.max_pool2d(m.a(x), 2, return_indices=True)
    return m.b(F.max_unpool2d(y, indices, 2))


def shuffled(m, x):
    n, c, h, w = x.size()
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def chunked(m, x):
    left, right = m.a(x).chunk(2, 1)
    return torch.cat([left, m.b(right)], 1)


def squeeze_excite(m, x):
    y = m.a(x)
    return m.d(y * torch.sigmoid(m.c(F.relu(m.b(F.adaptive_avg_pool2d(y, 1))))))


def own_attention(m, x):
    q, k, v = m.q(x), m.k(x), m.v(x)
    return m.o(torch.softmax(torch.bmm(q, k.transpose(1, 2)) / 4, -1) @ v)


def sdpa(m, x):
    q, k, v = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (m.q, m.k, m.v))
    return m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def zeros_appended(m, x):
    y = m.a(x)
    zeros = y.new_zeros(y.shape[0], 2, y.shape[2], y.shape[3])
    return m.b(torch.cat([y, zeros, torch.zeros_like(y)], 1))


CASES = {
    "shared conv": Case(lambda m, x: m.b(m.b(m.a(x)) * 0.3), {"a": conv(3, 4), "b": conv(4, 4)}, 3),
    "shared relu module": Case(
        lambda m, x: m.relu(m.b(m.relu(m.a(x)))), {"a": conv(3, 4), "b": conv(4, 4), "relu": nn.ReLU()}, 2
    ),
    "shared batch norm": Case(
        lambda m, x: m.bn(m.a(x)) + m.bn(m.b(x)), {"a": conv(3, 4), "b": conv(3, 4), "bn": nn.BatchNorm2d(4)}, 2
    ),
    "attribute of a layer": Case(
        lambda m, x: m.lin(x.flatten(1)) + m.lin.bias.reshape(1, -1) * m.lin.out_features,
        {"lin": nn.Linear(192, 6)}, 1,
    ),
    "dict output": Case(lambda m, x: {"a": m.a(x), "b": m.b(x)}, {"a": conv(3, 4), "b": conv(3, 4)}, 2),
    "tuple and list output": Case(lambda m, x: (m.a(x), [m.b(x)]), {"a": conv(3, 4), "b": conv(3, 4)}, 2),
    "starred forward": Case(lambda m, xs: m.a(xs[0]), {"a": conv(3, 4)}, 1),
    "optional keyword": Case(optional_input, {"a": conv(3, 4), "b": conv(4, 4)}, 2),
    "data-dependent if": Case(data_dependent, {"a": conv(3, 4), "b": conv(4, 4)}, 2),
    "shape-dependent if": Case(shape_dependent, {"a": conv(3, 4), "b": conv(4, 4)}, 2),
    "loop over shape": Case(loop_over_shape, {"a": conv(3, 4), "b": conv(4, 4)}, 2),
    "scalar add and mul": two_convs(lambda m, y: (y + 0.5) * 2),
    "one minus": two_convs(lambda m, y: 1 - y),
    "difference": Case(lambda m, x: m.c(m.a(x) - m.b(x)), {"a": conv(3, 4), "b": conv(3, 4), "c": conv(4, 4)}, 3),
    "divided by six": two_convs(lambda m, y: y / 6),
    "hswish by hand": two_convs(lambda m, y: y * F.relu6(y + 3) / 6),
    "add in place": Case(in_place_add, {"a": conv(3, 4), "b": conv(3, 4), "c": conv(4, 4)}, 3),
    "interpolate to a computed size": Case(resized, {"a": conv(3, 4), "b": conv(4, 4)}, 2),
    "functional conv": Case(
        lambda m, x: F.conv2d(x, m.w, None, 1, 1), {"w": nn.Parameter(torch.randn(4, 3, 3, 3))}, 1
    ),
    "SiLU": two_convs(lambda m, y: m.f(y), f=nn.SiLU()),
    "Mish": two_convs(lambda m, y: m.f(y), f=nn.Mish()),
    "GELU": two_convs(lambda m, y: m.f(y), f=nn.GELU()),
    "PReLU": two_convs(lambda m, y: m.f(y), f=nn.PReLU(4)),
    "LeakyReLU": two_convs(lambda m, y: m.f(y), f=nn.LeakyReLU(0.1)),
    "Hardswish": two_convs(lambda m, y: m.f(y), f=nn.Hardswish()),
    "GroupNorm": two_convs(lambda m, y: m.f(y), f=nn.GroupNorm(2, 4)),
    "InstanceNorm": two_convs(lambda m, y: m.f(y), f=nn.InstanceNorm2d(4, affine=True)),
    "ConvTranspose2d": Case(
        lambda m, x: m.b(m.a(x)), {"a": nn.ConvTranspose2d(3, 4, 4, 2, 1), "b": conv(4, 4)}, 2
    ),
    "grouped ConvTranspose2d": Case(
        lambda m, x: m.b(m.a(x)), {"a": conv(3, 4), "b": nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2)}, 2
    ),
    "ConvTranspose2d, BatchNorm, ReLU": Case(
        lambda m, x: F.relu(m.bn(m.a(x))), {"a": nn.ConvTranspose2d(3, 4, 2, 2), "bn": nn.BatchNorm2d(4)}, 1
    ),
    "conv, dropout, BatchNorm": Case(
        lambda m, x: m.bn(m.drop(m.a(x))), {"a": conv(3, 4), "drop": nn.Dropout2d(), "bn": nn.BatchNorm2d(4)}, 1
    ),
    "conv, Identity, BatchNorm, ReLU": Case(
        lambda m, x: F.relu(m.bn(m.same(m.a(x)))), {"a": conv(3, 4), "same": nn.Identity(), "bn": nn.BatchNorm2d(4)}, 1
    ),
    "BatchNorm before conv": Case(lambda m, x: m.a(m.bn(x)), {"a": conv(3, 4), "bn": nn.BatchNorm2d(3)}, 1),
    "ReLU6": two_convs(lambda m, y: m.f(y), f=nn.ReLU6()),
    "reflected padding": Case(lambda m, x: m.a(x), {"a": conv(3, 4, padding_mode="reflect")}, 1),
    "padding same": Case(lambda m, x: m.a(x), {"a": nn.Conv2d(3, 4, 3, padding="same")}, 1),
    "adaptive max pool": two_convs(lambda m, y: F.adaptive_max_pool2d(y, 4)),
    "max unpool": Case(unpooled, {"a": conv(3, 4), "b": conv(4, 4)}, 2),
    "mean over one pixel": Case(
        lambda m, x: m.fc(m.a(x).mean((2, 3))), {"a": conv(3, 4), "fc": nn.Linear(4, 5)}, 2, shape=(2, 3, 1, 1)
    ),
    "mean of one channel": Case(lambda m, x: m.fc(m.a(x).mean((2, 3))), {"a": conv(3, 1), "fc": nn.Linear(1, 5)}, 2),
    "mean over pixels": Case(lambda m, x: m.fc(m.a(x).mean((2, 3))), {"a": conv(3, 4), "fc": nn.Linear(4, 5)}, 2),
    "channel shuffle": two_convs(shuffled),
    "chunk and cat": Case(chunked, {"a": conv(3, 4), "b": conv(2, 2)}, 2),
    "F.pad": two_convs(lambda m, y: F.pad(y, (1, 2, 0, 1))),
    "PixelShuffle": Case(
        lambda m, x: m.b(m.f(m.a(x))), {"a": conv(3, 8), "f": nn.PixelShuffle(2), "b": conv(2, 4)}, 2
    ),
    "squeeze and excitation": Case(
        squeeze_excite, {"a": conv(3, 8), "b": conv(8, 2, 1), "c": conv(2, 8, 1), "d": conv(8, 4)}, 4
    ),
    "roll": two_convs(lambda m, y: torch.roll(y, (1, 2), (2, 3))),
    "softmax and bmm": on_tokens(own_attention, int8=4, **linears(*"qkvo")),
    "scaled_dot_product_attention": on_tokens(sdpa, int8=4, **linears(*"qkvo")),
    "MultiheadAttention": on_tokens(
        lambda m, x: m.a(x, x, x)[0], int8=4, a=nn.MultiheadAttention(16, 2, batch_first=True)
    ),
    "LayerNorm, Linear": on_tokens(lambda m, x: m.a(m.n(x)), int8=1, n=nn.LayerNorm(16), **linears("a")),
    "LSTM": on_tokens(lambda m, x: m.a(m.l(x)[0]), int8=1, l=nn.LSTM(16, 16, batch_first=True), **linears("a")),
    "Conv1d, BatchNorm1d": on_tokens(
        lambda m, x: m.bn(m.a(x)), int8=1, a=nn.Conv1d(16, 8, 3, padding=1), bn=nn.BatchNorm1d(8)
    ),
    "Linear, BatchNorm1d": Case(
        lambda m, x: m.bn(m.a(x.mean((2, 3)))), {"a": nn.Linear(16, 16), "bn": nn.BatchNorm1d(16)}, 1,
        shape=(8, 16, 4, 4),
    ),
    "weight_norm": Case(lambda m, x: m.a(x), {"a": parametrizations.weight_norm(conv(3, 4))}, 1),
    "spectral_norm": Case(lambda m, x: m.a(x), {"a": parametrizations.spectral_norm(conv(3, 4))}, 1),
    "conv subclass": Case(lambda m, x: m.a(x), {"a": OddConv(3, 4)}, 1),
    "constant added": two_convs(lambda m, y: y + m.c, c=torch.randn(1, 4, 1, 1)),
    "to(dtype) and float()": two_convs(lambda m, y: y.float().to(torch.float32)),
    "new_zeros and zeros_like": Case(zeros_appended, {"a": conv(3, 4), "b": conv(10, 4)}, 2),
    "assert and print": Case(checked, {"a": conv(3, 4)}, 1),
}  # fmt: skip


def test_there_are_sixty_one():
    assert len(CASES) == 61


def model_of(name: str) -> nn.Module:
    torch.manual_seed(1)
    case = CASES[name]
    return {"starred forward": Starred, "optional keyword": WithOptional}.get(name, Model)(case)


def tensors(output: Any) -> list[torch.Tensor]:
    """The tensors of an output, however nested."""
    if isinstance(output, torch.Tensor):
        return [output]
    items = output.values() if isinstance(output, dict) else output
    return [tensor for item in items for tensor in tensors(item)]


def layers(model: nn.Module) -> dict[str, list[str]]:
    """Nodes with multiply-accumulates, in int8 and in float."""
    records = [record for record in fxq.graph_records(model) if record["macs"]]
    return {kind: [r["node"] for r in records if r["type"] == kind] for kind in ("int8", "float")}


@pytest.mark.parametrize("name", CASES)
def test_small_case(name, capsys):
    model, case = model_of(name), CASES[name]
    other_batch = torch.randn(5, *case.shape[1:])
    data = [*(torch.randn(case.shape) for _ in range(4)), other_batch]  # judged inside the calibrated ranges
    quantized = quiet(fxq.quantize, model, data, example_inputs=data[0])
    for x in (data[0], other_batch):
        with torch.no_grad():
            expected, actual = model(x), quantized(x)
        assert type(actual) is type(expected)
        for before, after in zip(tensors(expected), tensors(actual), strict=True):
            assert before.shape == after.shape and before.dtype == after.dtype
            assert after.isfinite().all()
            assert sqnr(before, after) >= LOWEST_SQNR
    for region in regions_of(quantized).values():
        for node, decision in region.plan.decisions.items():
            assert decision.status is not Status.FLOAT or decision.reason, node
    found = layers(quantized)
    assert (len(found["int8"]), len(found["float"])) == (case.int8, case.floats), found


UNTRACEABLE_ROOTS = {"data-dependent if", "shape-dependent if", "loop over shape"}


@pytest.mark.parametrize("name", CASES)
def test_traced_as_a_whole(name):
    prepared = quiet(fxq.prepare, model_of(name), torch.randn(CASES[name].shape))
    partition = partition_of(prepared)
    assert (partition is not None) == (name in UNTRACEABLE_ROOTS)
    assert partition is None or "Error" in partition.reason
