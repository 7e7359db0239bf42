"""Small models end to end: the packed model agrees with the reference graph, the reference with the float model."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import Lambda, batches, conv, quiet
from torch import nn

import fxq
from fxq.backends import get_backend
from fxq.config import named_qconfig
from fxq.errors import CalibrationError, ConfigError, FxqWarning
from fxq.numerics import sqnr
from fxq.plan import NEVER_OBSERVED, Status

X = torch.randn(2, 3, 8, 8)


def stages(model, data=None, **options):
    """``(prepared, reference, lowered)`` after calibration with the example and other data."""
    prepared = fxq.prepare(model, X, **options)
    fxq.calibrate(prepared, data or [X, *batches()])
    return prepared, fxq.convert_to_reference(prepared), quiet(fxq.convert, prepared)


def agree(model, lsb=2.0, lowest_sqnr=15.0, x=X, **options):
    """Packed within some LSB of the reference, and the reference close to the float model."""
    _, reference, lowered = stages(model, **options)
    with torch.no_grad():
        expected, middle, actual = model(x), reference(x), lowered(x)
    step = max(k.scale or 0.0 for k in lowered.plan.kernels.values()) if lowered.plan.kernels else 0.0
    assert (middle - actual).abs().max() <= lsb * step + 1e-5
    assert sqnr(expected, middle) > lowest_sqnr
    return lowered


def y_plus_y(m, x):
    y = m.a(x)
    return m.b(y + y)


def cat_same(m, x):
    y = m.a(x)
    return m.c(torch.cat([y, y], 1))


def two_kinds_of_readers(m, x):
    y = m.a(x)
    return m.b(y) + F.selu(y)


def chunked(m, x):
    a, b = m.a(x).chunk(2, 1)
    return m.c(torch.cat([b, a, a * 2, b], 1)[:, :8])


def split_getitem(m, x):
    parts = torch.split(m.a(x), [1, 3], 1)
    return m.b(torch.cat([parts[1], parts[0]], 1)[:, :, 1:])


def shuffled(m, x):
    y = m.a(x)
    n, c, h, w = y.size()
    return m.b(y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w))


def fixed_member(m, x):
    y = m.a(x)
    return m.c(torch.cat([torch.sigmoid(y), y * 3], 1))


def only_fixed(m, x):
    y = m.a(x)
    return m.c(torch.cat([torch.sigmoid(y), torch.sigmoid(-y.flip(0))], 1))


def resized(m, x):
    return F.interpolate(m.b(m.a(x)), size=x.shape[-2:])


def shared_conv(m, x):
    return m.b(m.b(m.a(x)) * 0.5)


def overwritten(m, x):
    y = m.a(x)
    z = y.relu_()
    y += 1
    return m.b(z * y)


def overwritten_view(m, x):
    y = m.a(x)
    y[:, :2] = 0.5
    half = y[:, 2:]
    half.mul_(0.25)
    return m.b(y)


def pooled(m, x):
    return m.b(F.max_pool2d(F.relu6(m.a(x) * 4), 2))


FORWARDS = [y_plus_y, cat_same, two_kinds_of_readers, chunked, split_getitem, shuffled, fixed_member, only_fixed,
            resized, shared_conv, overwritten, overwritten_view, pooled]  # fmt: skip


def model_of(forward):
    return Lambda(forward, a=conv(3, 4), b=conv(4, 4), c=conv(8, 4))


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("backend", ["x86", "onednn", "qnnpack"])
def test_small_model(forward, backend):
    lowered = agree(model_of(forward), backend=backend)
    assert all(d.reason is not None for d in lowered.plan.decisions.values() if d.status is Status.FLOAT)


@pytest.mark.parametrize("forward", [shuffled, resized, pooled, chunked], ids=lambda f: f.__name__)
def test_other_batch_and_image_size(forward):
    agree(model_of(forward), x=torch.randn(3, 3, 12, 10), lowest_sqnr=10)


def bits(count, backend="x86"):
    table = named_qconfig("per_channel", get_backend(backend))
    return fxq.QConfig(activation=table.activation.replace(quant_max=2**count - 1), weight=table.weight)


@pytest.mark.parametrize("join", ["add", "cat", "pool", "requantize"])
@pytest.mark.parametrize("backend", ["x86", "onednn"])
def test_bit_widths_meet(join, backend):
    def forward(m, x):
        y, z = m.a(x), m.b(x)
        w = m.d(y)  # reads at another width what others read too
        joined = {
            "add": lambda: y + z,
            "cat": lambda: torch.cat([y, z], 1)[:, 2:6],
            "pool": lambda: F.max_pool2d(y, 2) + F.avg_pool2d(z, 2),
            "requantize": lambda: w + y + z,
        }[join]()
        return m.c(joined)

    model = Lambda(forward, a=conv(3, 4), b=conv(3, 4), c=conv(4, 4), d=conv(4, 4))
    mapping = fxq.QConfigMapping().set_module_name("b", bits(5)).set_module_name("c", bits(6))
    mapping.set_module_name("a", bits(7))
    if join == "requantize":
        mapping.set_module_name("d", bits(4))
    agree(model, qconfig=mapping, backend=backend, lowest_sqnr=8)


@pytest.mark.parametrize("what", ["s", "sigmoid", nn.Sigmoid, "h", "r", "m"])
def test_an_excluded_op_runs_in_float(what):
    model = Lambda(
        lambda m, x: m.b(m.m(m.r(m.h(m.s(m.a(x)))))), a=conv(3, 4), s=nn.Sigmoid(), h=nn.Hardswish(), r=nn.ReLU(),
        m=nn.MaxPool2d(2), b=conv(4, 4),
    )  # fmt: skip
    lowered = agree(model, exclude=[what])
    excluded = {name for name, d in lowered.plan.decisions.items() if d.reason and d.reason.code == "excluded"}
    assert excluded, lowered.graph
    assert not excluded & lowered.plan.kernels.keys()


def test_excluding_a_class_of_ones_own():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv(4, 4)

        def forward(self, x):
            return F.relu(self.conv(x)) + 1

    model = Lambda(lambda m, x: m.b(m.block(m.a(x))), a=conv(3, 4), block=Block(), b=conv(4, 4))
    lowered = agree(model, exclude=[Block])
    floats = {n for n, d in lowered.plan.decisions.items() if d.status is Status.FLOAT}
    assert floats == {"block_conv", "relu", "add"}


@pytest.mark.parametrize("what", ["nothing", "a.*", nn.Linear, "softmax"])
def test_exclusions_that_match_nothing(what):
    with pytest.raises(ConfigError, match="matches nothing"):
        fxq.prepare(model_of(pooled), X, exclude=[what])


def test_converting_uncalibrated():
    with pytest.raises(CalibrationError, match="no observer saw any data"):
        fxq.convert(fxq.prepare(model_of(pooled), X))


def test_a_branch_that_saw_no_data_stays_float_with_one_warning():
    def forward(m, x):
        y = m.a(x)
        return m.b(y) + m.c(torch.cat([y, y], 1))

    model = Lambda(forward, a=conv(3, 4), b=conv(4, 4), c=conv(8, 4))
    prepared = fxq.prepare(model, X)
    prepared(X)
    group = next(g for slot, g in prepared.plan.groups.items() if slot.node == "b" and not slot.path)
    prepared.get_submodule(prepared.plan.observers[group]).reset()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reference = fxq.convert_to_reference(prepared)
    assert [w.category for w in caught] == [FxqWarning] and "'b'" in str(caught[0].message)
    assert reference.plan.decisions["b"].reason is NEVER_OBSERVED
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lowered = fxq.convert(prepared)
    with torch.no_grad():
        assert sqnr(model(X), reference(X)) > 15 and sqnr(reference(X), lowered(X)) > 30
    assert "b" not in lowered.plan.kernels


@st.composite
def programs(draw):
    """Steps of a random graph on four-channel tensors: (kind, operand, operand)."""
    kinds = st.sampled_from(
        ["conv", "conv_relu", "conv_bn", "shared", "add", "add_relu", "mul", "cat", "max_pool", "avg_pool", "reshape",
         "sigmoid", "hardswish", "scalar", "relu", "chunk", "selu", "twice", "update"]
    )  # fmt: skip
    return draw(st.lists(st.tuples(kinds, st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=9))


class Random(nn.Module):
    def __init__(self, program):
        super().__init__()
        self.program = program
        self.stem, self.shared, self.head = conv(3, 4), conv(4, 4), conv(4, 2)
        self.convs = nn.ModuleList(conv(4, 4) for _ in program)
        self.wide = nn.ModuleList(conv(8, 4, 1) for _ in program)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in program)

    def forward(self, x):
        values = [self.stem(x)]
        for i, (kind, left, right) in enumerate(self.program):
            a, b = values[left % len(values)], values[right % len(values)]
            values.append(self.step(kind, a, b, i))
        return self.head(values[-1]) + values[len(values) // 2].mean()

    def step(self, kind, a, b, i):
        if kind == "update":
            c = a * 0.5
            c += b
            return c
        return {
            "conv": lambda: self.convs[i](a), "conv_relu": lambda: F.relu(self.convs[i](a)),
            "conv_bn": lambda: self.norms[i](self.convs[i](a)), "shared": lambda: self.shared(a),
            "add": lambda: a + b, "add_relu": lambda: F.relu(a + b), "mul": lambda: a * torch.sigmoid(b),
            "cat": lambda: self.wide[i](torch.cat([a, b], 1)), "max_pool": lambda: F.max_pool2d(a, 3, 1, 1),
            "avg_pool": lambda: F.avg_pool2d(a, 3, 1, 1),
            "reshape": lambda: a.flatten(2).transpose(1, 2).transpose(1, 2).reshape(a.shape),
            "sigmoid": lambda: torch.sigmoid(a), "hardswish": lambda: F.hardswish(a), "scalar": lambda: 1 - a / 2,
            "relu": lambda: F.relu(a),
            "chunk": lambda: torch.cat([a.chunk(2, 1)[1], b.chunk(2, 1)[0]], 1),
            "selu": lambda: F.selu(a), "twice": lambda: a + a,
        }[kind]()  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(program=programs(), backend=st.sampled_from(["x86", "onednn", "qnnpack", "fbgemm"]))
def test_random_graphs(program, backend):
    torch.manual_seed(0)
    model = Random(program).eval()
    for norm in model.norms:
        norm.running_mean.uniform_(-0.5, 0.5)
        norm.running_var.uniform_(0.5, 1.5)
    x = torch.randn(2, 3, 8, 8)
    prepared = fxq.prepare(model, x, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(prepared(x), model(x), rtol=1e-4, atol=1e-4)
        reference, lowered = fxq.convert_to_reference(prepared), quiet(fxq.convert, prepared)
        expected, actual = reference(x), lowered(x)
    # An integer that rounds the other way early on moves what follows: a few LSB of the widest tensor in the end.
    step = max(k.scale or 0.0 for k in lowered.plan.kernels.values())
    assert (expected - actual).abs().max() <= 6 * step
