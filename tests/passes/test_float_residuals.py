"""Sums that a layer_norm reads run in float; sums of convolutional networks do not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import Lambda, before, graph_text, reason, run
from torch import nn

import fxq
from fxq.numerics import sqnr
from fxq.passes.float_residuals import FloatResiduals
from fxq.plan import JOINED, RESIDUAL

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def parts(**more):
    return {"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "ln": nn.LayerNorm(8), **more}


def dropped(forward, **more):
    module, step = before(FloatResiduals, Lambda(forward, **parts(**more)), X)
    count = run(step, module)
    text = graph_text(module)
    assert run(step, module) == 0 and graph_text(module) == text
    return module, count


@pytest.mark.parametrize(
    ("forward", "count"),
    [
        (lambda m, x: m.b(m.ln(x + m.a(x))), 1),
        (lambda m, x: m.b(m.ln(x + m.a(x) + m.b(x))), 2),
        (lambda m, x: m.b(m.ln((x + m.a(x)).reshape(10, 8))), 1),
        (lambda m, x: m.b(m.ln(x + m.a(x) * torch.sigmoid(m.b(x)))), 2),
    ],
    ids=["sum", "sums", "moved", "factor"],
)
def test_fires(forward, count):
    module, found = dropped(forward)
    assert found == count
    assert sum(d.reason is RESIDUAL for d in module.plan.decisions.values()) == count


@pytest.mark.parametrize(
    "forward",
    [lambda m, x: m.b(x + m.a(x)), lambda m, x: m.b(torch.relu(x + m.a(x))), lambda m, x: m.ln(m.b(x + m.a(x))),
     lambda m, x: m.b(m.ln(F.hardswish(x + m.a(x))))],
    ids=["linear", "relu", "linear-between", "hardswish-between"],
)  # fmt: skip
def test_refuses(forward):
    assert dropped(forward)[1] == 0


def test_joins():
    def forward(m, x):
        return m.b(m.ln(torch.cat([m.token.expand(2, 1, 8), m.a(x)], 1)))

    module, found = dropped(forward, token=torch.randn(8))
    assert found == 1
    assert [name for name, d in module.plan.decisions.items() if d.reason is JOINED] == ["cat"]
    assert dropped(lambda m, x: m.b(torch.cat([x, m.a(x)], 1)))[1] == 0


def test_a_small_class_token_is_as_exact_as_the_patches():
    def forward(m, x):
        x = torch.cat([m.token.expand(x.shape[0], 1, 8), m.a(x)], 1)
        return m.b(m.ln(x))[:, 0]

    model = Lambda(forward, **parts(token=nn.Parameter(torch.randn(1, 1, 8))))
    model.token.data *= 0.01
    x = [torch.randn(16, 5, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    qmodel = fxq.quantize(model, x[:2])
    assert sqnr(model(x[2]).detach(), qmodel(x[2])) > 35
    assert reason(qmodel, "cat") is JOINED


def test_the_stream_keeps_its_small_channels():
    """Two channels a hundred times the others, as in trained transformers: one scale for all would flatten these."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.relu(self.up(self.norm(x))))

    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(4)), nn.LayerNorm(32), nn.Linear(32, 10)).eval()
    size = torch.ones(32)
    size[:2] = 100
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.data /= size  # what follows the norms makes no difference between channels
    x = [torch.randn(16, 9, 32) * size for _ in range(3)]
    qmodel = fxq.quantize(model, x[:2])
    assert sqnr(model(x[2]).detach(), qmodel(x[2])) > 25
    assert reason(qmodel, "add") is RESIDUAL
