"""The reference graph: quantize/dequantize pairs on plain integers, float ops between."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import Lambda, conv, dequantizes, graph_text, quantizes, run
from torch import nn

import fxq
from fxq.backends import get_backend
from fxq.errors import PlanError
from fxq.graph_module import get_attribute
from fxq.observers import Observer
from fxq.pass_base import Pipeline
from fxq.passes.to_reference import ToReference
from fxq.plan import NEVER_OBSERVED, Slot
from fxq.qdq import is_quantize

X = torch.randn(2, 3, 8, 8)
TABLE = get_backend("x86")


def step(align=True):
    return ToReference(TABLE, TABLE.dictionary, align)


def referenced(forward, calibrated=True, align=True, **parts):
    model = Lambda(forward, **(parts or {"a": conv(), "b": conv(4, 4)}))
    prepared = fxq.prepare(model, X)
    if calibrated:
        prepared(X)
    module = copy.deepcopy(prepared)
    qparams = {g: module.get_submodule(p).qparams() for g, p in module.plan.observers.items()} if calibrated else {}
    run(step(align), module)
    return module, qparams


def test_weights_are_integers_under_their_path():
    module, qparams = referenced(lambda m, x: m.b(m.a(x)), align=False)
    weight = get_attribute(module, "a.weight")
    assert weight.dtype == torch.int8
    expected = qparams[module.plan.groups[Slot("a", (1,))]]
    assert torch.equal(get_attribute(module, "a.weight_scale"), expected.scale)
    assert not any(isinstance(m, Observer) for m in module.modules()) and not module.plan.observers


def test_scales_are_the_observers():
    module, qparams = referenced(lambda m, x: m.b(m.a(x)), align=False)
    node = next(n for n in module.graph.nodes if n.name == "a_q")
    assert is_quantize(node) and node.args[1:3] == qparams[module.plan.groups[Slot("a")]].item()
    assert quantizes(module) == 3 and dequantizes(module) == 5


def test_dictated_scales():
    module, _ = referenced(lambda m, x: m.b(torch.sigmoid(m.a(x))))
    node = next(n for n in module.graph.nodes if n.name == "sigmoid_q")
    assert node.args[1:3] == (1 / 256, 0)


def test_a_shared_weight_is_stored_once():
    module, _ = referenced(lambda m, x: m.b(m.b(m.a(x))))
    reads = [n.target for n in module.graph.nodes if n.op == "get_attr" and n.target.startswith("b.weight")]
    assert set(reads) == {"b.weight", "b.weight_scale", "b.weight_zero_point"}


def test_a_weight_that_is_read_in_float_too():
    module, _ = referenced(lambda m, x: m.a(x) + (m.a.weight * x.mean()).sum())
    assert get_attribute(module, "a.weight").dtype == torch.float32
    assert get_attribute(module, "a.weight_int8").dtype == torch.int8


def test_shared_outputs_are_quantized_like_their_input():
    module, _ = referenced(lambda m, x: m.b(F.max_pool2d(m.a(x), 2)))
    by_name = {n.name: n for n in module.graph.nodes}
    assert by_name["max_pool2d_q"].args[1:] == by_name["a_q"].args[1:]


def test_uncalibrated():
    module, *_ = referenced(lambda m, x: m.b(m.a(x)), calibrated=False)
    assert quantizes(module) == 0 and not module.plan.regions
    assert {decision.reason for decision in module.plan.decisions.values()} == {NEVER_OBSERVED}


def test_regions_that_saw_nothing_become_float():
    prepared = fxq.prepare(Lambda(lambda m, x: m.b(m.a(x)), a=conv(), b=conv(4, 4)), X)
    prepared(X)
    prepared.get_submodule(prepared.plan.observers[prepared.plan.groups[Slot("b")]]).reset()
    run(step(), prepared)
    assert prepared.plan.decisions["b"].reason is NEVER_OBSERVED
    assert get_attribute(prepared, "b.weight").dtype == torch.float32
    assert prepared.plan.decisions["a"].reason is None


def test_twice_is_once():
    module, _ = referenced(lambda m, x: m.b(m.a(x)))
    text = graph_text(module)
    assert run(step(), module) == 0
    assert graph_text(module) == text


def test_needs_observers():
    prepared = fxq.prepare(Lambda(lambda m, x: m.s(x), s=nn.SELU()), X)
    prepared.plan.properties.discard("observed")
    with pytest.raises(PlanError, match="observed"):
        Pipeline([step()])(prepared)


def test_a_range_that_a_few_values_decide_is_said():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    data = [torch.randn(4, 3, 16, 16) for _ in range(2)]
    assert not any("round to zero" in note for note in fxq.quantize(model, data, progress=False).plan.notes)
    data[1][0, 0, 0, 0] = 1e4
    (note,) = [note for note in fxq.quantize(model, data, progress=False).plan.notes if "round to zero" in note]
    assert "input 'input'" in note and "percentile" in note
