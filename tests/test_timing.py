"""Timing: every function is measured, and the float graph is the float model."""

from __future__ import annotations

import time

import torch
from models_for_tests import Lambda, conv, quantizes
from torch import nn

import fxq
from fxq.timing import float_graph, measure, slower

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_all_are_measured() -> None:
    counts = {"a": 0, "b": 0}

    def count(name: str) -> None:
        counts[name] += 1

    times = measure({name: lambda name=name: count(name) for name in counts}, seconds=0.02, turn=0.005)
    assert {name: t.calls + 2 for name, t in times.items()} == counts
    assert all(0 < t.minimum <= t.median for t in times.values())


def test_the_float_graph_is_the_float_model() -> None:
    net = Lambda(
        lambda m, x: m.fc(torch.relu(m.norm(m.a(x))).mean((2, 3))) + m.lstm(m.a(x).flatten(2))[0].mean(1),
        a=conv(), norm=nn.BatchNorm2d(4), fc=nn.Linear(4, 5), lstm=nn.LSTM(64, 5, batch_first=True),
    )  # fmt: skip
    prepared = fxq.prepare(net, X)
    prepared(X)
    reference = fxq.convert_to_reference(prepared)
    plain = float_graph(reference)
    assert quantizes(plain) == 0 and quantizes(reference) > 0
    with torch.no_grad():
        torch.testing.assert_close(plain(X), net(X), rtol=0, atol=0.05)
    assert sum(node.target is torch.relu for node in plain.graph.nodes) == 1


def test_which_function_is_slower() -> None:
    assert slower(lambda: time.sleep(0.002), lambda: None)
    assert not slower(lambda: None, lambda: time.sleep(0.002))
