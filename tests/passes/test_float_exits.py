"""Averages that leave int8 run in float; averages that feed int8 do not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import Lambda, before, conv, reason, run
from torch import nn

from fxq.passes.float_exits import FloatExits
from fxq.plan import AT_EXIT

X = torch.randn(2, 3, 8, 8)


def exits(forward):
    module, step = before(FloatExits, Lambda(forward, c=conv(), d=conv(4), fc=nn.Linear(4, 2)), X)
    changed = run(step, module)
    assert run(step, module) == 0
    return module, changed


@pytest.mark.parametrize(
    "forward",
    [lambda m, x: F.adaptive_avg_pool2d(m.c(x), 1), lambda m, x: torch.flatten(F.adaptive_avg_pool2d(m.c(x), 1), 1),
     lambda m, x: m.c(x).mean((2, 3)), lambda m, x: F.selu(F.avg_pool2d(m.c(x), 2)),
     lambda m, x: F.interpolate(m.c(x), scale_factor=2.0, mode="bilinear")],
    ids=["pool", "flatten", "mean", "float-reader", "bilinear"],
)  # fmt: skip
def test_fires(forward):
    module, changed = exits(forward)
    assert changed == 1
    assert sum(d.reason is AT_EXIT for d in module.plan.decisions.values()) == 1


@pytest.mark.parametrize(
    "forward",
    [lambda m, x: m.d(F.avg_pool2d(m.c(x), 2)), lambda m, x: m.fc(m.c(x).mean((2, 3))),
     lambda m, x: m.fc(torch.flatten(F.adaptive_avg_pool2d(m.c(x), 1), 1)), lambda m, x: F.max_pool2d(m.c(x), 2)],
    ids=["conv", "linear", "flatten-linear", "max"],
)  # fmt: skip
def test_refuses(forward):
    assert exits(forward)[1] == 0


def test_one_int8_reader_is_enough_to_stay():
    def forward(m, x):
        y = F.avg_pool2d(m.c(x), 2)
        return m.d(y), y

    module, changed = exits(forward)
    assert changed == 0 and reason(module, "avg_pool2d") is None
