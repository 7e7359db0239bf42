"""A graph node by node: what is stored, what is made again, and that both are what the graph itself computes."""

from __future__ import annotations

import inspect

import pytest
import torch
from models_for_tests import Lambda, batches, conv, interpreted
from torch import nn

import fxq
from fxq import walk as walk_module
from fxq.graph_module import QuantModule
from fxq.lockstep import observers_off
from fxq.qdq import is_quantize
from fxq.walk import Walk, bound_arguments


def net() -> nn.Module:
    def forward(m, x):
        y = torch.relu(m.bn(m.a(x)))
        z = m.b(y) + y  # read twice
        u, v = z.chunk(2, 1)
        return {"scores": m.fc(torch.cat([v, u], 1).flatten(1)), "map": torch.sigmoid(z)}

    return Lambda(forward, a=conv(), bn=nn.BatchNorm2d(4), b=conv(4, 4), fc=nn.Linear(256, 5))


def reference_of_net(qconfig: str = "per_channel") -> QuantModule:
    prepared = fxq.prepare(net(), batches()[0], qconfig=qconfig)
    fxq.calibrate(prepared, batches())
    reference = fxq.convert_to_reference(prepared)
    assert isinstance(reference, QuantModule)
    return reference


@pytest.mark.parametrize("frugal", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("qconfig", ["per_channel", "per_tensor"])
def test_values_are_those_of_the_graph(qconfig, channels_last, frugal, monkeypatch):
    monkeypatch.setattr(walk_module, "_PART", 300)  # of 256 numbers to an output of the last layer
    reference = reference_of_net(qconfig)
    data = [*batches(), torch.randn(1, 3, 8, 8)]
    if channels_last:
        data = [x.to(memory_format=torch.channels_last) for x in data]
    expected = [interpreted(reference, x) for x in data]
    walk = Walk(reference, [((x,), {}) for x in data], frugal=frugal)
    quantized = 0
    with torch.no_grad():
        for node in reference.graph.nodes:
            if node.op == "output":
                continue
            walk.run(node)
            for batch, value in enumerate(walk.values(node)):
                torch.testing.assert_close(value, expected[batch][node.name], rtol=1e-6, atol=1e-6)
            quantized += is_quantize(node)
            walk.release(node)
    assert quantized >= 5


def write_to_parts(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = m.a(x)
    first, second = y[:, :2], y[:, 2:]
    y.mul_(-3.0)
    return m.b(torch.cat([first, second.exp()], 1))


def write_to_items(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = m.a(x)
    z = y.clone()
    z[:, 0] = y[:, 1].exp()
    y[:, 1] = 0
    return m.b(z) + y


def write_to_input(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    first = x[:, :1]
    x.mul_(3.0)
    return m.b(m.a(x)) + first


@pytest.mark.parametrize("frugal", [False, True])
@pytest.mark.parametrize("forward", [write_to_parts, write_to_items, write_to_input])
def test_what_is_written_in_place_is_read_by_all(forward, frugal):
    data = batches()
    model = Lambda(forward, a=conv(), b=conv(4, 4))
    prepared = fxq.prepare(model, data[0].clone())
    fxq.calibrate(prepared, [x.clone() for x in data])
    for graph in (prepared, fxq.convert_to_reference(prepared)):
        inputs = [x.clone() for x in data]
        walk, result = Walk(graph, [((x,), {}) for x in inputs], frugal=frugal), graph.graph.output_node()
        with torch.no_grad(), observers_off(prepared):
            for node in graph.graph.nodes:
                if node is not result:
                    walk.run(node)
                    walk.release(node)
            found = walk.arguments(result, 0)[0], walk.arguments(result, 1)[0]
            assert all(map(torch.equal, inputs, data))
            assert all(torch.equal(value, graph(x)) for value, x in zip(found, inputs, strict=False))


@pytest.mark.parametrize("frugal", [False, True])
def test_values_are_dropped_after_their_last_reader(frugal):
    reference = reference_of_net()
    walk = Walk(reference, [((x,), {}) for x in batches()], frugal=frugal)
    most, floats = 0, 0
    with torch.no_grad():
        for node in reference.graph.nodes:
            walk.run(node)
            most = max(most, len(walk._values))
            stored = walk._values.get(node, [])
            floats += any(isinstance(v, torch.Tensor) and v.is_floating_point() for v in stored)
            walk.release(node)
    assert not walk._values
    assert most <= 4 < sum(node.op == "call_function" for node in reference.graph.nodes)
    assert floats == 1 if frugal else floats > 4  # the placeholder: every layer here leads to one quantize


def test_a_changed_constant_is_seen_when_a_value_is_made_again():
    reference = reference_of_net()
    walk = Walk(reference, [((batches()[0],), {})], frugal=True)
    with torch.no_grad():
        for node in reference.graph.nodes:
            walk.run(node)
            if node.name == "fc":
                before = walk.value(node, 0)
                reference.fc.bias.data += 0.5
                walk.run(node)
                torch.testing.assert_close(walk.value(node, 0), before + 0.5)
                return
    pytest.fail("the last layer was not reached")


def test_arguments_are_those_of_the_graphs_own_function():
    def options(x, y=3, *more, **others):
        return x * y + more[0] + others["shift"]

    module = torch.fx.symbolic_trace(options)
    for args, kwargs in (((1, 2, 3), {"shift": 4}), ((1,), {"shift": 0}), ((), {"x": 1, "y": 2}), ((), {})):
        try:
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
        except TypeError:
            with pytest.raises(TypeError):
                bound_arguments(module, args, kwargs)
            continue
        bound.apply_defaults()
        assert bound_arguments(module, args, kwargs) == bound.arguments


def first_taken(sizes: list[int]) -> int:
    return sizes.pop(0)


torch.fx.wrap("first_taken")


def test_functions_may_change_the_lists_they_are_given() -> None:
    model = Lambda(lambda m, x: m.a(x[:, : first_taken([3, 1])]), a=conv()).eval()
    prepared = fxq.prepare(model, batches()[0])
    (x,) = batches()[:1]
    walk = Walk(prepared, [((x,), {})])
    for node in prepared.graph.nodes:
        if node.op == "output":
            assert torch.equal(walk.values(node.args[0])[0], model(x))
        else:
            walk.run(node)
