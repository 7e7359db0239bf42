"""What only training needs is gone, and what is left is what the model computed in eval mode."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from models_for_tests import Lambda, same
from torch import nn

import fxq
from fxq.fake_quantize import FakeQuantize, fake_quantize
from fxq.pass_base import Pipeline
from fxq.passes.finish_training import TRAINABLE, FinishTraining
from fxq.training_mode import Mode
from fxq.training_table import training_rows

X = torch.randn(4, 3, 8, 8)


def finished(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    prepared = fxq.prepare_qat(model.train(), X)
    for _ in range(2):
        prepared(X)
    result = copy.deepcopy(prepared).eval()
    step = FinishTraining(training_rows())
    assert Pipeline([step])(result)["FinishTraining"] == 1
    assert TRAINABLE not in result.plan.properties and TRAINABLE in prepared.plan.properties
    assert Pipeline([step])(result)["FinishTraining"] == 0
    return prepared.eval(), result


def test_only_layers_and_grids_are_left():
    model = Lambda(
        lambda m, x: m.fc(m.drop(F.avg_pool2d(F.relu(m.norm(m.conv(x))), 8).flatten(1))),
        conv=nn.Conv2d(3, 4, 3, padding=1), norm=nn.BatchNorm2d(4), drop=nn.Dropout(0.5), fc=nn.Linear(4, 2),
    )  # fmt: skip
    prepared, result = finished(model)
    calls = [node for node in result.graph.nodes if node.op.startswith("call_")]
    called = [result.get_submodule(node.target) for node in calls if node.op == "call_module"]
    assert all(isinstance(module, FakeQuantize) for module in called)
    assert not [node for node in calls if node.target is fake_quantize]
    functions = [node.name for node in calls if node.op == "call_function"]
    assert functions == ["conv", "relu", "avg_pool2d", "flatten", "fc"]
    assert not [region for region in result.plan.regions if region.row in training_rows()]
    fxq.disable_fake_quant(prepared)
    fxq.disable_fake_quant(result)
    same(result(X), prepared(X), 0)


def test_a_batchnorm_of_its_own_is_fixed_in_eval_mode():
    model = Lambda(
        lambda m, x: F.relu(m.norm(F.max_pool2d(m.conv(x), 2))), conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)
    )
    prepared, result = finished(model)
    (node,) = [node for node in result.graph.nodes if node.target is F.batch_norm]
    called = [result.get_submodule(node.target) for node in result.graph.nodes if node.op == "call_module"]
    assert node.args[5] is False and not any(isinstance(module, Mode) for module in called)
    same(result(X), prepared(X), 0)
    assert not [record for record in fxq.graph_records(fxq.convert(prepared)) if record["type"] == "float"]


def test_a_weight_that_others_read_is_folded_beside_it():
    model = Lambda(
        lambda m, x: F.relu(m.norm(m.conv(x))) * m.conv.weight.mean(), conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)
    )
    prepared, result = finished(model)
    same(result(X), prepared(X), 1e-6)
    same(result.get_parameter("conv.weight"), prepared.get_parameter("conv.weight"), 0)
