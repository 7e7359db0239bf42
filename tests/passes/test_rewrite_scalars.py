"""Arithmetic with scalars: float32 tensors only, values unchanged."""

from __future__ import annotations

import operator

import pytest
import torch
from models_for_tests import Lambda, before, graph_text, op_names, run, same

from fxq.passes.rewrite_scalars import RewriteScalars

X = torch.randn(2, 4, 6, 6)


def rewrite(forward, count, x=X, tolerance=1e-6):
    model = Lambda(forward)
    module, step = before(RewriteScalars, model, x)
    assert run(step, module) == count
    same(module(x), model(x), tolerance)
    text = graph_text(module)
    assert run(step, module) == 0 and graph_text(module) == text
    return module


@pytest.mark.parametrize(
    ("forward", "ops"),
    [(lambda m, x: 3 + x, ["add"]), (lambda m, x: 0.5 * x, ["mul"]), (lambda m, x: x - 3, ["add"]),
     (lambda m, x: x / 7, ["mul"]), (lambda m, x: torch.sub(x, 2.5), ["add"]),
     (lambda m, x: torch.div(x, -3), ["mul"])],
    ids=["radd", "rmul", "sub", "div", "torch.sub", "torch.div"],
)  # fmt: skip
def test_rewritten(forward, ops):
    module = rewrite(forward, 1)
    assert op_names(module) == ops
    node = next(n for n in module.graph.nodes if n.op == "call_function")
    assert node.args[0].op == "placeholder" and isinstance(node.args[1], (int, float))


@pytest.mark.parametrize(
    "forward",
    [lambda m, x: x + 1, lambda m, x: 1 - x, lambda m, x: 2 / x, lambda m, x: x - x.mean(), lambda m, x: x / 0.0,
     lambda m, x: torch.relu(x)],
    ids=["add", "rsub", "rdiv", "tensor", "zero", "other"],
)  # fmt: skip
def test_left_alone(forward):
    model = Lambda(forward)
    module, step = before(RewriteScalars, model, X)
    text = graph_text(module)
    assert run(step, module) == 0 and graph_text(module) == text


def test_shape_arithmetic_stays_exact():
    module = rewrite(lambda m, x: x.reshape(x.size(0), (x.size(1) - 2) * 2, -1), 0)
    assert operator.sub in {n.target for n in module.graph.nodes}


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.uint8])
def test_other_dtypes_stay_exact(dtype):
    x = torch.arange(200).to(dtype)
    rewrite(lambda m, x: (x / 49, x - 1), 0, x, tolerance=0)


def test_a_number_known_at_run_time_is_no_scalar():
    rewrite(lambda m, x: x.size(1) * x, 0)
