"""Arguments that follow the mode of the module they came from."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import Lambda
from torch import nn

import fxq
from fxq.training_mode import Mode, ModeFlag, NormMode

X = torch.randn(4, 3, 8, 8)


class Own(nn.Module):
    """A module with children that calls functions with its own mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x):
        x = F.batch_norm(self.conv(x), self.mean, self.var, None, None, self.training, 0.5)
        return F.dropout(F.relu(x), 0.5, self.training)


def modes(prepared: nn.Module) -> dict[str, type]:
    return {path: type(module) for path, module in prepared.named_modules() if isinstance(module, Mode)}


def test_modules_and_functions_follow():
    model = Lambda(lambda m, x: m.drop(m.own(x)), own=Own(), drop=nn.Dropout(0.5)).train()
    prepared = fxq.prepare_qat(model, X)
    found = modes(prepared)
    assert found["drop"] is Mode and sorted(found.values(), key=str) == sorted([Mode, Mode, NormMode], key=str)
    assert set(model.state_dict()) <= set(prepared.state_dict())
    fxq.disable_fake_quant(prepared)
    for mode in (True, False):
        model.train(mode)
        prepared.train(mode)
        torch.manual_seed(0)
        expected = model(X)
        torch.manual_seed(0)
        torch.testing.assert_close(prepared(X), expected)
    torch.testing.assert_close(prepared.get_buffer("own.mean"), model.own.mean)


def test_preparing_counts_no_batch():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    prepared = fxq.prepare_qat(model, X)
    assert int(prepared.get_buffer("1.num_batches_tracked")) == 0
    assert prepared.get_buffer("1.running_mean").tolist() == [0.0] * 4
    prepared(X)
    assert int(prepared.get_buffer("1.num_batches_tracked")) == 1
    prepared.eval()(X)
    assert int(prepared.get_buffer("1.num_batches_tracked")) == 1


def test_dropout_of_channels_stays_in_training_and_goes():
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Dropout2d(0.5), nn.Conv2d(16, 4, 1)).train()
    prepared = fxq.prepare_qat(model, X)
    assert not torch.equal(prepared(X), prepared(X))
    prepared.eval()
    assert torch.equal(prepared(X), prepared(X))
    torch.testing.assert_close(fxq.convert_to_reference(prepared)(X), prepared(X))


def test_a_flag_is_false_equals_nothing_and_tells_who_asked():
    asked: list[str] = []
    flag = ModeFlag("a.b", asked)
    assert flag != False and not flag == False  # noqa: E712, SIM201
    assert not flag
    assert len(asked) == 1 and asked[0].endswith("assert not flag")


def test_the_float_model_keeps_its_modes():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    model[1].eval()
    fxq.prepare_qat(model, X)
    assert [type(module.training) for module in model.modules()] == [bool] * 3
    assert [module.training for module in model.modules()] == [True, True, False]
    with pytest.raises(fxq.FxqError):
        fxq.prepare(model, X)
