"""The vocabulary: signatures, canonical nodes, spellings."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
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
