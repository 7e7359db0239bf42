"""Light ops without a heavy one among their int8 neighbours go back to float."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import Lambda, before, conv, reason, run

from fxq.passes.drop_islands import DropIslands
from fxq.plan import ISLAND, Status

X = torch.randn(2, 3, 8, 8)


def islands(forward):
    module, step = before(DropIslands, Lambda(forward, c=conv(), d=conv(4)), X)
    changed = run(step, module)
    assert run(step, module) == 0
    return module, changed


@pytest.mark.parametrize(
    ("forward", "names"),
    [(lambda m, x: F.max_pool2d(x, 2), {"max_pool2d"}), (lambda m, x: F.relu(x + 1), {"add", "relu"}),
     (lambda m, x: F.selu(F.max_pool2d(F.selu(m.c(x)), 2)), {"max_pool2d"}),
     (lambda m, x: torch.cat([a + 1 for a in (x, x)], 1), {"add", "add_1", "cat"})],
    ids=["alone", "chain", "between-floats", "branches"],
)  # fmt: skip
def test_fires(forward, names):
    module, changed = islands(forward)
    assert changed > 0
    assert {name for name, d in module.plan.decisions.items() if d.reason is ISLAND} == names
    assert not any(slot.node in names for slot in module.plan.specs)


@pytest.mark.parametrize(
    "forward",
    [lambda m, x: F.max_pool2d(m.c(x), 2), lambda m, x: m.c(F.max_pool2d(x, 2)), lambda m, x: m.d(m.c(x) + 1) * 2,
     lambda m, x: F.relu(F.max_pool2d(m.c(x), 2).flatten(1).transpose(0, 1))],
    ids=["after", "before", "between", "chain"],
)  # fmt: skip
def test_refuses(forward):
    module, changed = islands(forward)
    assert changed == 0
    assert all(d.status in (Status.QUANTIZED, Status.SHARED) for d in module.plan.decisions.values())


def test_sides_are_told_apart():
    def forward(m, x):
        return m.c(F.max_pool2d(x, 2)), F.selu(F.avg_pool2d(x, 2) + 1)

    module, _ = islands(forward)
    assert reason(module, "max_pool2d") is None and reason(module, "add") is ISLAND
