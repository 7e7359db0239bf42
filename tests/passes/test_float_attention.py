"""Attention that the model writes out runs in float; a softmax over a few values does not."""

from __future__ import annotations

import pytest
import torch
from models_for_tests import Lambda, before, graph_text, reason, run
from torch import nn

import fxq
from fxq.numerics import sqnr
from fxq.passes.float_attention import FloatAttention
from fxq.plan import ATTENTION

X = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0))


def model(forward):
    return Lambda(forward, **{name: nn.Linear(8, 8) for name in "qkvo"})


def dropped(forward):
    module, step = before(FloatAttention, model(forward), X)
    count = run(step, module)
    text = graph_text(module)
    assert run(step, module) == 0 and graph_text(module) == text
    found = {name for name, decision in module.plan.decisions.items() if decision.reason is ATTENTION}
    assert len(found) == count
    return found


def attention(m, x):
    q, k, v = m.q(x), m.k(x), m.v(x)
    scores = torch.matmul(q, k.transpose(1, 2)) * 0.35 + 1.0
    return m.o(torch.matmul(torch.softmax(scores, -1), v))


def separable(m, x):
    weights = torch.softmax(m.q(x)[..., :1], 1)
    return m.o(m.v(x) * (m.k(x) * weights).sum(1, keepdim=True))


def heads(m, x):
    q, k, v = (y.reshape(2, 40, 2, 4).transpose(1, 2) for y in (m.q(x), m.k(x), m.v(x)))
    scores = (q @ k.transpose(2, 3)).masked_fill(torch.eye(40, dtype=torch.bool), -1e4)
    weights = torch.softmax(scores + m.k(x)[:, :1, :1].unsqueeze(1), -1)
    return m.o((weights.flatten(1, 2).unflatten(1, (2, 40)) @ v).transpose(1, 2).reshape(2, 40, 8))


@pytest.mark.parametrize(
    ("forward", "names"),
    [
        (attention, {"matmul", "mul", "add", "softmax", "matmul_1"}),
        (separable, {"softmax", "mul"}),
        (heads, {"matmul", "add", "softmax", "matmul_1"}),
    ],
    ids=["plain", "separable", "heads"],
)
def test_fires(forward, names):
    assert dropped(forward) == names


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.o(m.v(x) * torch.softmax(m.q(x), -1)),
        lambda m, x: m.o(torch.matmul(m.q(x), m.k(x).transpose(1, 2)).matmul(m.v(x))),
    ],
    ids=["eight values", "no softmax"],
)
def test_refuses(forward):
    assert dropped(forward) == set()


def test_many_ways_to_a_softmax_are_not_walked_one_by_one():
    """Forty sums of two ways each are a million million ways."""

    def forward(m, x):
        x = m.q(x)
        for _ in range(40):
            x = x + torch.erf(x)
        return m.o(torch.softmax(x, 1))

    assert len(dropped(forward)) == 41


def test_sharp_attention_is_exact():
    """Scores from -200 to 200: in 8 bits each step would be a factor of five in the weights."""
    net = model(attention)
    for part in (net.q, net.k):
        part.weight.data *= 5
    x = [torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    qmodel = fxq.quantize(net, x[:2], progress=False)
    assert reason(qmodel, "softmax") is ATTENTION
    assert sqnr(net(x[2]).detach(), qmodel(x[2])) > 20
