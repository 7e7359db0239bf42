"""Biases make up for what rounding the weights adds to the mean."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import Lambda, before, conv, graph_text, op_names, run
from torch import nn

import fxq
from fxq.config import QConfigMapping
from fxq.input_means import InputMeans
from fxq.ops import LINEAR
from fxq.passes import correct_bias, to_reference
from fxq.passes.correct_bias import CorrectBias
from fxq.passes.record_input_means import RecordInputMeans

X = torch.rand(6, 4, 8, 8, generator=torch.Generator().manual_seed(1))
PER_TENSOR = QConfigMapping().set_global("per_tensor")  # rounds more coarsely: more to correct


def calibrated(model, x, **options):
    module, step = before(RecordInputMeans, model, x, qconfig=PER_TENSOR, **options)
    run(step, module)
    with torch.no_grad():
        module(x)
    return module, CorrectBias(step.ops)


def corrected(model, x, **options):
    module, step = calibrated(model, x, **options)
    count = run(step, module)
    text = graph_text(module)
    assert run(step, module) == 0 and graph_text(module) == text
    assert not any(isinstance(child, InputMeans) for child in module.modules())
    return module, count


def mean_errors(model, x, preset):
    """Mean over samples and places of each output channel's error, only the weight being quantized."""
    prepared = fxq.prepare(model, x, qconfig="per_tensor", calibration=preset)
    with torch.no_grad():
        prepared(x)
        reference = fxq.convert_to_reference(prepared)
        weight_only = copy.deepcopy(model)
        layer = weight_only.a
        node = next(node for node in reference.graph.nodes if node.name == "a")
        scale, zero_point = node.args[1].args[1:3]
        layer.weight.copy_((reference.a.weight.float() - zero_point) * scale)
        layer.bias = nn.Parameter(reference.a.bias)
        error = weight_only(x) - model(x)
    channels = 1 if layer.weight.dim() > 2 else -1
    return error.movedim(channels, 0).flatten(1).mean(1)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 8, 3), (6, 4, 8, 8)),
        (nn.Conv2d(4, 8, 3, groups=4), (6, 4, 8, 8)),
        (nn.Conv1d(4, 8, 1), (6, 4, 9)),
        (nn.Conv3d(4, 8, 1), (6, 4, 4, 4, 4)),
        (nn.Linear(4, 8), (6, 4)),
        (nn.Linear(4, 8), (6, 9, 4)),
    ],
    ids=str,
)
def test_the_mean_error_is_gone(layer, shape, monkeypatch):
    monkeypatch.setattr(to_reference, "align_scales", lambda *args: None)  # biases are corrected for scales before that
    x = torch.rand(*shape, generator=torch.Generator().manual_seed(2))
    layer.weight.data[0] *= 30  # one channel sets the scale: the others are rounded to few integers
    model = Lambda(lambda m, x: m.a(x), a=layer)
    before_, after = mean_errors(model, x, "simple"), mean_errors(model, x, "default")
    assert after.norm() < 0.1 * before_.norm()


def test_a_layer_without_bias_gets_one():
    _, count = corrected(Lambda(lambda m, x: m.a(x), a=nn.Conv2d(4, 8, 1, bias=False)), X)
    module, _ = corrected(Lambda(lambda m, x: m.a(x), a=nn.Conv2d(4, 8, 1, bias=False)), X)
    assert count == 1 and module.a.bias.shape == (8,) and module.a.bias.any()


def test_the_models_own_bias_is_not_written_to():
    model = Lambda(lambda m, x: m.a(x), a=nn.Conv2d(4, 8, 1))
    kept = model.a.bias.detach().clone()
    qmodel = fxq.quantize(model, [X], qconfig="per_tensor")
    assert torch.equal(model.a.bias, kept)
    assert "biases corrected: 1 layer, for the rounding of their weights" in qmodel.plan.notes


def test_a_bias_read_by_two_layers_becomes_two():
    bias = nn.Parameter(torch.randn(8))
    a, b = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 1)
    a.bias = b.bias = bias
    module, count = corrected(Lambda(lambda m, x: m.a(x) + m.b(x), a=a, b=b), X)
    convs = [node for node in module.graph.nodes if node.target is F.conv2d]
    assert count == 2 and convs[0].args[2].target != convs[1].args[2].target


def test_a_layer_called_twice_is_corrected_for_each_call():
    layer = nn.Linear(4, 4)
    x = torch.rand(6, 4, generator=torch.Generator().manual_seed(2))
    module, count = corrected(Lambda(lambda m, x: m.a(m.a(x)), a=layer), x)
    first, second = (n for n in module.graph.nodes if n.target is LINEAR.target)
    assert count == 2 and first.args[2].target != second.args[2].target


def test_refused_and_the_recorders_go_all_the_same():
    one_sample = X[:1]
    computed = Lambda(lambda m, x: F.linear(x, m.a.weight, m.a.bias * 2.0 + x.mean()), a=nn.Linear(4, 4))
    for model, x in ((conv(4, 4), one_sample), (computed, X[..., 0, 0])):
        wrapped = model if isinstance(model, Lambda) else Lambda(lambda m, x: m.a(x), a=model)
        module, count = corrected(wrapped, x)
        assert count == 0 and not module.plan.input_means and not module.plan.notes
        assert "means" not in " ".join(op_names(module))


def test_converting_leaves_the_prepared_model_as_it_is():
    prepared = fxq.prepare(Lambda(lambda m, x: m.a(x), a=nn.Conv2d(4, 8, 1)), X, qconfig="per_tensor")
    prepared(X)
    first, second = fxq.convert_to_reference(prepared), fxq.convert_to_reference(prepared)
    assert torch.equal(first.a.bias, second.a.bias) and prepared.plan.input_means
    assert not torch.equal(first.a.bias, prepared.a.bias)


@pytest.mark.parametrize("qconfig", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_weight_corrected_in_parts_is_corrected_alike(qconfig, groups, monkeypatch):
    model = Lambda(lambda m, x: m.c(x), c=conv(4, 6, groups=groups))
    found = []
    for chunk in (1 << 17, 40):
        monkeypatch.setattr(correct_bias, "_CHUNK", chunk)
        prepared = fxq.prepare(model, X, qconfig=qconfig)
        with torch.no_grad():
            prepared(X)
        found.append(fxq.convert_to_reference(prepared).get_parameter("c.bias"))
    assert not torch.equal(found[0], model.c.bias)
    torch.testing.assert_close(found[1], found[0])
