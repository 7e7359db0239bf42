"""Ranks become numbers, so that what is read for an assertion can still be folded and fused."""

from __future__ import annotations

import operator

import pytest
import torch
from models_for_tests import Lambda, before, conv, graph_text, op_names, run
from torch import nn

import fxq
from fxq.numerics import sqnr
from fxq.passes.fold_ranks import FoldRanks

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def checked_norm(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = m.c(x)
    torch._assert(x.ndim == 4, f"expected an image, got {x.ndim} dimensions")
    return torch.relu(m.n(x))


def folded(forward, **parts):
    module, step = before(FoldRanks, Lambda(forward, **parts), X)
    expected = module(X)
    count = run(step, module)
    assert torch.equal(module(X), expected)
    text = graph_text(module)
    assert run(step, module) == 0 and graph_text(module) == text
    return module, count


@pytest.mark.parametrize(
    "rank", [lambda x: x.ndim, lambda x: x.dim(), lambda x: x.ndimension()], ids=["ndim", "dim", "ndimension"]
)
def test_every_spelling(rank):
    def forward(m, x):
        y = m.c(x)
        torch._assert(rank(y) == 4, "not an image")
        return y.sum(rank(y) - 1)

    module, count = folded(forward, c=conv())
    assert count == 4  # two reads, the comparison, the assertion
    assert "_assert" not in op_names(module) and operator.eq not in [node.target for node in module.graph.nodes]


def test_assertions_about_inputs_stay():
    def forward(m, x):
        torch._assert(x.ndim == 4, "not an image")
        return m.c(x)

    module, count = folded(forward, c=conv())
    assert count == 0
    with pytest.raises(AssertionError, match="not an image"):
        module(X[0])


def test_sizes_stay():
    _, count = folded(lambda m, x: m.c(x).reshape(x.shape[0], -1) * m.c(x).shape[2], c=conv())
    assert count == 0


def test_a_norm_behind_an_assertion_is_folded():
    model = Lambda(checked_norm, c=conv(), n=nn.BatchNorm2d(4)).eval()
    model.n.running_var.uniform_(1e-3, 1)
    model.n.running_mean.uniform_(-1, 1)
    qmodel = fxq.quantize(model, [X])
    ops = [record["op"] for record in fxq.graph_records(qmodel) if record["type"] == "int8"]
    assert "conv2d + relu" in ops and not any("batch_norm" in op for op in ops)
    assert sqnr(model(X).detach(), qmodel(X)) > 30
