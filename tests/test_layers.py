"""Layers alone in int8, or back in float: what is edited, what stays, and that the copy shares nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from faulty_models import chain, images
from models_for_tests import Lambda, conv, dequantizes, quantizes
from torch import nn

import fxq
from fxq.layers import alone, each_alone, layers_of, with_float
from fxq.plan import ISLAND, SENSITIVE


def calibrated(net):
    prepared = fxq.prepare(net, images()[0], backend="qnnpack")
    fxq.calibrate(prepared, images())
    return prepared


def test_layers_in_order_without_those_that_share_a_scale():
    net = Lambda(lambda m, x: F.max_pool2d(torch.relu(m.a(x)) + m.b(x), 2).flatten(1), a=conv(), b=conv())
    assert [(layer.name, layer.module) for layer in layers_of(calibrated(net))] == [("a", "a"), ("b", "b"), ("add", "")]


def test_one_layer_alone_has_its_input_weight_and_output_quantized():
    prepared = calibrated(chain())
    layer = layers_of(prepared)[1]
    reference = fxq.convert_to_reference(alone(prepared, layer))
    assert (quantizes(reference), dequantizes(reference)) == (2, 3)
    assert {name for name, d in reference.plan.decisions.items() if d.reason is None} == {"b"}
    whole = fxq.convert_to_reference(prepared)
    ours, theirs = (
        {n.name: n.args[1:] for n in model.graph.nodes if n.name.endswith("_q")} for model in (reference, whole)
    )
    assert ours == {name: theirs[name] for name in ours}  # the scales that were calibrated


def test_a_float_layer_keeps_its_exact_weight_and_says_why():
    net = chain()
    prepared = calibrated(net)
    layer = layers_of(prepared)[1]
    edited = with_float(prepared, {layer: "costs 3 dB"})
    decisions = edited.plan.decisions
    assert (decisions["b"].reason, decisions["b"].detail) == (SENSITIVE, "costs 3 dB")
    assert (decisions["relu_1"].reason, decisions["relu_1"].detail) == (SENSITIVE, "")
    reference = fxq.convert_to_reference(edited)
    assert torch.equal(reference.get_parameter("b.weight"), net.b.weight)
    assert reference.get_buffer("a.weight").dtype == torch.int8


def test_light_ops_left_alone_go_with_them():
    net = Lambda(lambda m, x: F.max_pool2d(m.a(x) + 1, 2), a=conv())
    prepared = calibrated(net)
    edited = with_float(prepared, {layers_of(prepared)[0]: ""})
    assert {name for name, d in edited.plan.decisions.items() if d.reason is ISLAND} == {"add", "max_pool2d"}


def test_the_original_stays_as_it_is():
    prepared = calibrated(chain())
    before = str(prepared.graph), dict(prepared.plan.decisions), list(prepared.plan.regions)
    for layer in layers_of(prepared):
        alone(prepared, layer)
        with_float(prepared, {layer: ""})
    assert (str(prepared.graph), prepared.plan.decisions, prepared.plan.regions) == before
    copy = with_float(prepared, {})
    copy(100 * images()[0])
    assert copy.get_submodule("x_observer").batches == prepared.get_submodule("x_observer").batches + 1


def test_a_module_called_twice_is_two_layers():
    net = Lambda(lambda m, x: m.a(torch.relu(m.a(x))), a=conv(3, 3))
    prepared = calibrated(net)
    first = layers_of(prepared)[0]
    reference = fxq.convert_to_reference(with_float(prepared, {first: ""}))
    assert {name: d.reason for name, d in reference.plan.decisions.items()}["a_1"] is None
    x = images()[0]
    torch.testing.assert_close(reference(x), net(x), rtol=0.05, atol=0.05)
    assert torch.equal(dict(reference.named_parameters())["a.weight"], net.a.weight)


def test_each_alone():
    class Loops(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Sequential(conv(), nn.ReLU(), conv(4, 4)), nn.Linear(4, 3)

        def forward(self, x):
            y = self.body(x).mean((2, 3))
            return self.head(y) if float(y.sum()) < 1e9 else y

    prepared = calibrated(Loops().eval())
    found = each_alone(prepared, lambda model: len(layers_of(model)), show=False)
    assert [(layer.path, layer.module, value) for layer, value in found] == [
        ("body", "body.0", 1), ("body", "body.2", 1), ("head", "head", 1)
    ]  # fmt: skip
