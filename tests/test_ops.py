"""The vocabulary: signatures, canonical nodes, spellings."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import Lambda, canonical, op_names
from torch import fx, nn

from fxq.ops import ADD, CAT, CONV2D, GELU, MEAN, RESHAPE, VOCABULARY, Dictionary, Op, Signature

OPS = Dictionary(VOCABULARY)


@pytest.mark.parametrize(
    ("text", "args", "kwargs", "bound"),
    [
        ("a, b=2", (1,), {}, {"a": 1, "b": 2}),
        ("a, b=2", (1,), {"b": 3}, {"a": 1, "b": 3}),
        ("a, *rest", (1, 2, 3), {}, {"a": 1, "rest": (2, 3)}),
        ("a, *, c=1e-5", (1,), {"c": 2}, {"a": 1, "c": 2}),
        ("a, b=2", (), {}, None),
        ("a, b=2", (1, 2, 3), {}, None),
        ("a, b=2", (1,), {"a": 1}, None),
        ("a, b=2", (1,), {"z": 1}, None),
        ("a, *, c=1", (1, 2), {}, None),
    ],
)
def test_bind(text, args, kwargs, bound):
    assert Signature(text).bind(args, kwargs) == bound


def test_names_and_targets_are_unique():
    assert len({op.name for op in VOCABULARY}) == len({op.target for op in VOCABULARY}) == len(VOCABULARY)


def test_no_spelling_has_two_ops():
    seen = {}
    for op in VOCABULARY:
        for spelling in op.all_spellings():
            assert seen.setdefault(spelling.what, op) is op, spelling.what


@pytest.mark.parametrize("op", VOCABULARY, ids=lambda op: op.name)
def test_parameters_named_exist(op):
    names = {*op.signature.defaults, op.signature.rest}
    assert {*op.tensors, *filter(None, (op.weight, op.bias))} <= names
    for spelling in op.all_spellings():
        assert set(spelling.fixed) <= names
        assert set(spelling.rename.values()) <= names


def call(target, *args, **kwargs):
    graph = fx.Graph()
    x = graph.placeholder("x")
    swap = lambda value: x if value == "x" else value  # noqa: E731
    given = tuple([swap(v) for v in a] if isinstance(a, list) else swap(a) for a in args)
    return graph.call_function(target, given, kwargs)


def test_op_of_knows_canonical_nodes_only():
    assert OPS.op_of(call(torch.mean, "x", None, False)) is MEAN
    assert OPS.op_of(call(torch.mean, "x")) is None
    assert OPS.op_of(call(torch.mean, "x", 1, False, dtype=torch.float64)) is None
    assert OPS.op_of(call(torch.Tensor.reshape, "x", 2, 3)) is RESHAPE
    assert OPS.op_of(call(F.gelu, "x", approximate="none")) is GELU
    assert OPS.op_of(call(torch.exp, "x")) is None


def test_tensor_arguments_have_paths():
    node = call(CAT.target, ["x", "x"], 1)
    assert [path for path, _ in CAT.tensor_arguments(node)] == [(0, 0), (0, 1)]
    assert [path for path, _ in ADD.tensor_arguments(call(ADD.target, 1, "x"))] == [(1,)]


def test_get_and_index():
    node = call(F.conv2d, "x", "x", None, (2, 2), 0, 1, 4)
    assert CONV2D.get(node, "stride") == (2, 2) and CONV2D.index("groups") == 6
    assert RESHAPE.get(call(RESHAPE.target, "x", 2, 3), "shape") == (2, 3)
    assert GELU.get(call(F.gelu, "x", approximate="tanh"), "approximate") == "tanh"


def test_a_dictionary_takes_new_ops():
    new = Op("exp", torch.exp, "input", methods=("exp",))
    ops = Dictionary((*VOCABULARY, new))
    assert ops.spelled("exp")[0] is new and OPS.spelled("exp") is None
    assert OPS.spelled([]) is None and OPS.spelled(nn.LSTM) is None


NEW = {
    "pad": [
        nn.ZeroPad1d(1), nn.ZeroPad2d((1, 2, 0, 1)), nn.ZeroPad3d(1), nn.ConstantPad1d(2, 0.5),
        nn.ConstantPad2d(1, 0.5), nn.ConstantPad3d(1, -1.0), nn.ReflectionPad1d(2),
        nn.ReflectionPad2d(1), nn.ReflectionPad3d(1),
        nn.ReplicationPad1d(2), nn.ReplicationPad2d(1), nn.ReplicationPad3d(1), nn.CircularPad1d(2),
        nn.CircularPad2d((1, 2, 0, 1)), nn.CircularPad3d(1),
    ],
    "cat": [
        lambda x: torch.cat([x, x], axis=1), lambda x: torch.cat([x, x]), lambda x: torch.concat((x, x), dim=-1),
        lambda x: torch.concatenate([x, x], axis=-1), lambda x: torch.cat(tensors=[x, x], dim=1),
    ],
    "mean": [
        lambda x: x.mean(axis=1), lambda x: x.mean(axis=(0, 1), keepdims=True), lambda x: torch.mean(x, axis=-1),
        lambda x: x.mean(1, True), lambda x: x.mean(), lambda x: torch.mean(x, dim=1, keepdim=True),
    ],
    "matmul": [lambda x: x[0, :, :4].mm(x[0, :4, :5]), lambda x: torch.mm(x[0, :, :4], x[0, :4])],
    "batch_norm": [nn.SyncBatchNorm(4)],
    "softmax": [nn.Softmax2d(), lambda x: F.softmax(x, -1), lambda x: x.softmax(1)],
    "interpolate": [nn.UpsamplingNearest2d(scale_factor=2), nn.UpsamplingBilinear2d(size=(5, 7))],
    "mul": [lambda x: x.multiply(x), lambda x: x.clone().multiply_(2)],
    "sub": [lambda x: torch.subtract(x, 1), lambda x: x.subtract(x * 2)],
    "div": [lambda x: torch.divide(x, 3), lambda x: x.true_divide(2.5), lambda x: x.divide(other=2)],
    "transpose": [
        lambda x: torch.swapaxes(x, axis0=0, axis1=1), lambda x: x.swapdims(1, 2), lambda x: x.swapaxes(0, 2),
        lambda x: torch.swapdims(x, dim0=0, dim1=2), lambda x: x.transpose(dim0=1, dim1=0),
    ],
    "clamp": [
        lambda x: x.clone().clamp_min_(0.1), lambda x: torch.clamp_max_(x.clone(), 0.1),
        lambda x: torch.clamp_min_(x * 1, -0.2), lambda x: (x + 0).clamp_max_(0),
    ],
    "relu": [lambda x: F.relu(x * 1, inplace=True), lambda x: F.relu(input=x)],
    "sigmoid": [nn.Sigmoid()],
}  # fmt: skip


@pytest.mark.parametrize(("name", "number"), [(name, i) for name, calls in NEW.items() for i in range(len(calls))])
def test_spellings(name, number):
    spelling = NEW[name][number]
    rank = 4 if isinstance(spelling, nn.Module) and "3d" not in str(spelling) and "1d" not in str(spelling) else 3
    rank = 5 if "3d" in str(spelling) else rank
    model = Lambda(lambda m, x: m.f(x) if isinstance(spelling, nn.Module) else spelling(x), f=nn.Identity())
    if isinstance(spelling, nn.Module):
        model.f = spelling.eval()
    x = torch.randn(2, 4, 5, 6, 3)[(..., *(0,) * (5 - rank))]
    module = canonical(model, x)
    assert name in op_names(module)
    assert torch.equal(module(x), model(x))
