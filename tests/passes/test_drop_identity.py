"""What does nothing in eval mode goes; what does something stays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import Lambda, before, graph_text, op_names, run, same
from torch import nn

from fxq.passes.drop_identity import DropIdentity
from fxq.torchvision_ops import import_torchvision

X = torch.randn(2, 4, 6, 6)


def drop(model, count):
    module, step = before(DropIdentity, model, X)
    assert run(step, module) == count
    same(module(X), model(X))
    text = graph_text(module)
    assert run(step, module) == 0 and graph_text(module) == text
    return module


@pytest.mark.parametrize(
    "part", [nn.Identity(), nn.Dropout(0.3), nn.Dropout2d(), nn.AlphaDropout(), nn.Dropout(inplace=True)], ids=str
)
def test_modules(part):
    module = drop(Lambda(lambda m, x: m.part(x * 2) + 1, part=part), 1)
    assert op_names(module) == ["mul", "add"]
    (fusion,) = module.plan.fusions
    assert (fusion.action, fusion.what, fusion.into) == ("drop", type(part).__name__, "part")


@pytest.mark.parametrize("function", [F.dropout, F.dropout2d, F.alpha_dropout])
def test_functions(function):
    assert op_names(drop(Lambda(lambda m, x: function(x * 2, 0.5, False)), 1)) == ["mul"]


def test_stochastic_depth():
    import_torchvision()
    from torchvision.ops import StochasticDepth

    assert op_names(drop(Lambda(lambda m, x: m.s(x) + 1, s=StochasticDepth(0.5, "row")), 1)) == ["add"]


def test_dropout_that_is_active_in_eval_stays():
    module, step = before(DropIdentity, Lambda(lambda m, x: F.dropout(x, 0.5, True)), X)
    assert run(step, module) == 0
    assert op_names(module) == ["dropout"]


def test_a_subclass_of_identity_stays():
    class Doubles(nn.Identity):
        def forward(self, x):
            return x * 2

    Doubles.__module__ = "torch.nn.modules.linear"  # as a leaf of torch.fx
    module = drop(Lambda(lambda m, x: m.part(x), part=Doubles()), 0)
    assert op_names(module) == ["part"]


def test_an_identity_that_is_the_output():
    assert op_names(drop(Lambda(lambda m, x: (m.part(x), m.part(m.part(x))), part=nn.Identity()), 3)) == []
