"""Fake-quantize modules where observers would be, and again where values are computed anew."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from models_for_tests import Lambda, conv
from torch import nn

import fxq
from fxq.fake_quantize import FakeQuantize, fake_quantize

X = torch.randn(2, 3, 8, 8)


def prepared_and_observed(forward, **parts):
    model = Lambda(forward, **(parts or {"a": conv(), "b": conv(4, 4)}))
    return fxq.prepare_qat(model, X), fxq.prepare(model, X)


def watched(module):
    paths = set(module.plan.observers.values())
    calls = [n.name for n in module.graph.nodes if n.op == "call_module" and n.target in paths]
    return {name for name in calls if "weight" not in name}


def test_they_are_where_observers_are():
    training, calibration = prepared_and_observed(lambda m, x: m.b(F.max_pool2d(F.relu(m.a(x)), 2)) + 1.0)
    assert watched(training) == watched(calibration)
    assert training.plan.groups == calibration.plan.groups
    weights = [module for module in training.modules() if isinstance(module, FakeQuantize) and module.weight]
    assert [fake.scale.numel() for fake in weights] == [4, 4]


def test_averages_and_clamps_are_rounded_to_their_inputs_grid():
    training, _ = prepared_and_observed(lambda m, x: m.b(F.avg_pool2d(F.relu6(F.max_pool2d(m.a(x), 2)), 2)))
    again = [node for node in training.graph.nodes if node.target is fake_quantize]
    assert [node.args[0].name for node in again] == ["relu6", "avg_pool2d"]
    fake = training.get_submodule(again[0].args[1].target)
    before = fake.batches
    training.train()(X)
    assert fake.batches == before + 1  # observed once, rounded three times


def test_grids_that_kernels_dictate_are_used_in_training():
    training, calibration = prepared_and_observed(lambda m, x: m.b(torch.sigmoid(m.a(x))))
    (fixed,) = [module for module in training.modules() if isinstance(module, FakeQuantize) and module.fixed]
    assert fixed.qparams().item() == (1 / 256, 0)
    assert len(training.plan.observers) == len(calibration.plan.observers) + 1


def test_excluded_layers_are_not_rounded():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    training = fxq.prepare_qat(model, X, exclude="1")
    assert not [name for name, _ in training.named_modules() if name.startswith("_1_weight")]
