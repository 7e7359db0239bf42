"""Chains of nodes: what a row takes, and what it must not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import OPS, Lambda, Two, canonical, conv

from fxq.backends import get_backend
from fxq.matcher import best_match, match_row, other_operand
from fxq.plan import Reason, TensorFact

X = torch.randn(2, 3, 8, 8)
ONEDNN, X86 = get_backend("onednn"), get_backend("x86")


def root_of(forward, kind=Lambda, inputs=(X,)):
    module = canonical(kind(forward, a=conv(), b=conv()), *inputs)
    return next(node for node in module.graph.nodes if node.name == "a"), module


def names(match):
    return [node.name for node in match.nodes]


@pytest.mark.parametrize(
    ("row", "forward", "chain"),
    [
        ("conv2d", lambda m, x: F.relu(m.a(x)), ["a", "relu"]),
        ("conv2d", lambda m, x: m.a(x).clamp(0, 3), ["a", "clamp"]),
        ("conv2d", lambda m, x: F.selu(m.a(x)), ["a"]),
        ("conv2d", lambda m, x: F.relu(F.relu(m.a(x))), ["a", "relu"]),
        ("conv2d_add", lambda m, x: m.a(x) + x.sum(1, True), ["a", "add"]),
        ("conv2d_add", lambda m, x: F.relu(x.sum(1, True) + m.a(x)), ["a", "add", "relu"]),
    ],
)
def test_fires(row, forward, chain):
    root, _ = root_of(forward)
    assert names(match_row(ONEDNN.row(row), root, OPS)) == chain


def twice(m, x):
    y = m.a(x)
    return F.relu(y) + y


def doubled(m, x):
    y = m.a(x)
    return y + y


@pytest.mark.parametrize(
    ("row", "forward", "chain"),
    [
        ("conv2d", twice, ["a"]),
        ("conv2d_add", twice, None),
        ("conv2d_add", doubled, None),
        ("conv2d_add", lambda m, x: m.a(x) + 1, None),
        ("conv2d_add", lambda m, x: F.relu(m.a(x)), None),
    ],
    ids=["read-twice", "add-of-two-readers", "y+y", "scalar", "no-add"],
)
def test_refuses(row, forward, chain):
    root, _ = root_of(forward)
    match = match_row(ONEDNN.row(row), root, OPS)
    assert match is None if chain is None else names(match) == chain


def test_bounds_of_run_time_end_a_chain():
    root, _ = root_of(lambda m, x, y: m.a(x).clamp(max=y.size(0)), Two, (X, X))
    assert names(match_row(X86.row("conv2d"), root, OPS)) == ["a"]


def test_joins_keeps_nodes_out():
    root, _ = root_of(lambda m, x: F.relu(m.a(x)))
    assert names(match_row(X86.row("conv2d"), root, OPS, lambda node: node.name != "relu")) == ["a"]
    root, _ = root_of(lambda m, x: m.a(x) + m.b(x))
    assert match_row(ONEDNN.row("conv2d_add"), root, OPS, lambda node: False) is None


def facts(module, shape):
    return {node.name: TensorFact(shape, torch.float32) for node in module.graph.nodes}


def test_the_longest_row_wins_unless_it_refuses():
    root, module = root_of(lambda m, x: m.a(x) + m.b(x))
    assert best_match(ONEDNN, root, OPS, facts(module, (2, 4, 8, 8))).row.name == "conv2d_add"
    different = {**facts(module, (2, 4, 8, 8)), "b": TensorFact((1, 4, 1, 1), torch.float32)}
    assert best_match(ONEDNN, root, OPS, different).row.name == "conv2d"


def test_no_row_gives_a_reason():
    module = canonical(Lambda(lambda m, x: F.silu(x)), X)
    node = next(n for n in module.graph.nodes if n.op == "call_function")
    found = best_match(X86, node, OPS, facts(module, (2, 3, 8, 8)))
    assert isinstance(found, Reason) and "silu" in found.text


def test_other_operand():
    root, _ = root_of(lambda m, x: m.b(x) + m.a(x))
    match = match_row(ONEDNN.row("conv2d_add"), root, OPS)
    path, producer = other_operand(match.nodes, 1, OPS)
    assert path == (0,) and producer.name == "b"
