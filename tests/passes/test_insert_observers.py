"""One observer for each group, where values enter it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from models_for_tests import Lambda, before, conv, graph_text, run, same
from torch import nn

from fxq.observers import Observer
from fxq.passes.insert_observers import InsertObservers
from fxq.plan import Slot

X = torch.randn(2, 3, 8, 8)


def observe(forward, **parts):
    model = Lambda(forward, **(parts or {"a": conv(), "b": conv(4, 4)}))
    module, step = before(InsertObservers, model, X)
    expected = module(X)
    run(step, module)
    same(module(X), expected)
    text = graph_text(module)
    assert run(step, module) == 0 and graph_text(module) == text
    return module


def watched(module):
    """Node names that are observed, weights apart."""
    paths = module.plan.observers.values()
    calls = [n for n in module.graph.nodes if n.op == "call_module" and n.target in paths]
    return sorted(n.args[0].name for n in calls if n.args[0].op != "get_attr")


def test_edges_are_observed_once():
    module = observe(lambda m, x: m.b(F.max_pool2d(F.relu(m.a(x)), 2)))
    assert watched(module) == ["b", "relu", "x"]
    assert all(module.get_submodule(path).has_data for path in module.plan.observers.values())


def test_all_producers_of_a_group_feed_one_observer():
    module = observe(lambda m, x: m.b(torch.cat([m.a(x), m.c(x)], 1)), a=conv(3, 2), c=conv(3, 2), b=conv(4, 4))
    assert watched(module) == ["a", "b", "c", "x"]
    path = module.plan.observers[module.plan.groups[Slot("cat")]]
    assert module.get_submodule(path).batches == 2
    expected = torch.cat([module.get_parameter("a.bias"), module.get_parameter("c.bias")])
    assert expected.numel() == 4


def test_dictated_groups_are_not_observed():
    module = observe(lambda m, x: m.b(torch.sigmoid(m.a(x))))
    assert watched(module) == ["a", "b", "x"]


def test_weights_are_observed_at_once_and_not_again():
    module, step = before(InsertObservers, Lambda(lambda m, x: m.a(x), a=conv()), X)
    run(step, module)
    observer = module.get_submodule(module.plan.observers[module.plan.groups[Slot("a", (1,))]])
    assert observer.has_data and not observer.enabled
    before_calls = observer.batches
    module(X)
    assert observer.batches == before_calls == 1


def test_float_readers_read_the_same_values():
    def forward(m, x):
        y = m.a(x)
        return m.b(y) + F.selu(y)

    assert watched(observe(forward)) == ["a", "add", "b", "selu", "x"]


def test_nothing_to_observe():
    module = observe(lambda m, x: F.selu(x), s=nn.SELU())
    assert watched(module) == [] and not any(isinstance(m, Observer) for m in module.modules())
