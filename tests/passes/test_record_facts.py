"""Shapes and dtypes from the example inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import OPS, Lambda, before, canonical, conv, graph_text, run
from torch import nn
from torch.overrides import TorchFunctionMode

from fxq.errors import InputError
from fxq.passes.record_facts import RecordFacts

X = torch.randn(2, 3, 8, 8)


def test_facts_of_tensors_and_containers():
    def forward(m, x):
        a, b = m.c(x).chunk(2, 1)
        return {"long": a.long(), "size": x.shape[0], "b": b}

    module, step = before(RecordFacts, Lambda(forward, c=conv(3, 4)), X)
    text = graph_text(module)
    assert run(step, module) > 0
    facts, containers = module.plan.facts, module.plan.containers
    assert facts["c"].shape == (2, 4, 8, 8) and facts["c"].is_float32
    assert facts["long"].dtype == torch.int64 and not facts["long"].is_float32
    assert containers == {"chunk", "output"} or containers == {"chunk"}
    assert "getattr_1" not in facts and facts["c_weight"].shape == (4, 3, 3, 3)
    before_again = dict(facts)
    run(step, module)
    assert facts == before_again and graph_text(module) == text


def test_inputs_by_keyword_and_left_out():
    class Model(nn.Module):
        def forward(self, x, y=None, *, z=2.0):
            return x * z if y is None else x + y

    module = canonical(Model().eval(), X, y=X)
    run(RecordFacts((X,), {"y": X}, OPS), module)
    assert module.plan.facts["y"].shape == (2, 3, 8, 8)
    module = canonical(Model().eval(), X)
    run(RecordFacts((X,), {}, OPS), module)
    assert module.plan.facts["mul" if "mul" in module.plan.facts else "x"].shape == (2, 3, 8, 8)


def test_a_model_that_fails_on_the_example_names_the_node():
    module = canonical(Lambda(lambda m, x: m.block(x), block=nn.Sequential(conv(4, 4))), X)
    with pytest.raises(InputError, match=r"example inputs at node 'block_0' \(module 'block\.0'\)"):
        run(RecordFacts((X,), {}, OPS), module)


def test_no_gradients_are_recorded():
    module, step = before(RecordFacts, Lambda(lambda m, x: m.c(x), c=conv(3, 4)), X)
    torch.set_grad_enabled(True)
    run(step, module)
    assert torch.is_grad_enabled()


def shrink_in_place(window):
    window[0] = 1
    return window


torch.fx.wrap("shrink_in_place")


def test_functions_may_change_the_lists_they_are_given():
    class Model(nn.Module):
        def forward(self, x):
            return x[:, : shrink_in_place([2, 3])[0]]

    module, step = before(RecordFacts, Model().eval(), X)
    run(step, module)
    output = next(iter(module.graph.find_nodes(op="output")))
    assert module.plan.facts[output.args[0].name].shape == (2, 1, 8, 8)


class Weights(TorchFunctionMode):
    """Notes how many output channels convs and linears have computed."""

    def __init__(self):
        super().__init__()
        self.channels = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.conv2d, F.conv2d, F.linear):
            self.channels.append(len(args[1]))
        return func(*args, **(kwargs or {}))


def shapes_of(model, x):
    module, step = before(RecordFacts, model, x)
    with Weights() as weights:
        run(step, module)
    return {name: fact.shape for name, fact in module.plan.facts.items()}, module.plan.macs, weights.channels


def test_one_channel_of_each_group_stands_for_all():
    def forward(m, x):
        return m.fc(m.grouped(m.c(x)).transpose(1, 3))

    model = Lambda(forward, c=conv(3, 8), grouped=conv(8, 12, groups=4), fc=nn.Linear(12, 5))
    shapes, macs, channels = shapes_of(model, X)
    assert channels == [1, 4, 1]
    assert (shapes["c"], shapes["grouped"], shapes["fc"]) == ((2, 8, 8, 8), (2, 12, 8, 8), (2, 8, 8, 5))
    assert macs == {"c": 2 * 64 * 8 * 27, "grouped": 2 * 64 * 12 * 18, "fc": 2 * 64 * 12 * 5}


def test_layers_are_computed_in_full_where_values_may_matter():
    class Counts(nn.Module):
        def forward(self, x):
            return x[:, : int((x[0, :, 0, 0] > -9).sum())]

    shapes, _, channels = shapes_of(Lambda(lambda m, x: m.n(m.c(x)), c=conv(3, 8), n=Counts()), X)
    assert channels == [8] and shapes["c"] == (2, 8, 8, 8)


def test_an_error_of_the_shortcut_is_none_of_the_model():
    def forward(m, x):
        y = m.c(x)
        torch._assert((y.mean((0, 2, 3)) - m.mean).abs().max() < 1e-4, "other values")
        return y

    c = conv(3, 8)
    shapes, _, channels = shapes_of(Lambda(forward, c=c, mean=nn.Parameter(c(X).detach().mean((0, 2, 3)))), X)
    assert channels in ([1, 8], [8]) and shapes["c"] == (2, 8, 8, 8)
