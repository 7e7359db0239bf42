"""Recorders of input means: beside which layers they stand, and that they change nothing."""

from __future__ import annotations

import torch
from models_for_tests import Lambda, before, conv, graph_text, run
from torch import nn

import fxq
from fxq.input_means import InputMeans
from fxq.passes.record_input_means import RecordInputMeans

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def recorded(model, *inputs, **options):
    module, step = before(RecordInputMeans, model, *inputs, **options)
    expected = module(*inputs)
    count = run(step, module)
    assert torch.equal(module(*inputs), expected)
    text = graph_text(module)
    assert run(step, module) == 0 and graph_text(module) == text
    return module, count


def recorders(module):
    return [name for name, child in module.named_modules() if isinstance(child, InputMeans)]


def test_convs_and_linears_of_every_rank():
    for rank, kind in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)):
        x = torch.randn(2, 4, *[5] * rank)
        module, count = recorded(Lambda(lambda m, x: m.a(x), a=kind(4, 8, 3, groups=2)), x)
        assert count == 1
        module(x)
        expected = x.double().flatten(2).mean(2).mean(0)
        torch.testing.assert_close(module.get_submodule(recorders(module)[0]).total / 4, expected)
    x = torch.randn(2, 7, 4)
    module, count = recorded(Lambda(lambda m, x: m.a(x), a=nn.Linear(4, 8)), x)
    assert count == 1
    torch.testing.assert_close(module.get_submodule(recorders(module)[0]).total / 2, x.double().mean((0, 1)))


def test_layers_that_read_one_tensor_share_a_recorder():
    module, count = recorded(Lambda(lambda m, x: m.a(x) + m.b(x), a=conv(3, 4), b=conv(3, 4)), X)
    assert count == 2 and len(recorders(module)) == 1
    assert int(module.get_submodule(recorders(module)[0]).samples) == len(X)  # counted once, not for each layer


def test_float_and_transposed_layers_have_none():
    model = Lambda(lambda m, x: m.b(m.a(x)), a=conv(3, 4), b=nn.ConvTranspose2d(4, 4, 2, stride=2))
    module, count = recorded(model, X, exclude=("a",), backend="qnnpack")
    assert count == 0 and not recorders(module)


def test_presets():
    model = conv(3, 4).eval()
    for preset, present in (("simple", False), ("default", True), ("advanced", True), ("max", True)):
        prepared = fxq.prepare(model, X, calibration=preset)
        assert bool(recorders(prepared)) is present


def test_the_tables_do_not_show_them():
    prepared = fxq.prepare(conv(3, 4).eval(), X)
    prepared(X)
    for text in (fxq.graph_table(prepared), fxq.observer_table(prepared), fxq.summary(prepared)):
        assert "means" not in text
