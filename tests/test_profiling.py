"""The profile names every node, with the work it did on the inputs it was given."""

from __future__ import annotations

import pytest
import torch
from models_for_tests import conv
from torch import nn

import fxq
from fxq.errors import StageError
from fxq.partition import reference_of

X = torch.randn(1, 3, 10, 10)


def quantized() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 4), nn.SiLU(), nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(5))
    model(X)
    return fxq.quantize(model.eval(), [X], progress=False)


def test_every_call_node_is_timed() -> None:
    qmodel = quantized()
    records = fxq.profile_records(qmodel, X, runs=2)
    calls = [node.name for node in qmodel.graph.nodes if node.op.startswith("call_")]  # type: ignore[union-attr]
    assert [record["node"] for record in records] == calls
    assert all(record["milliseconds"] > 0 for record in records)
    assert sum(record["share"] for record in records) == pytest.approx(1)


def test_work_follows_the_inputs() -> None:
    convolution, linear = 4 * 3 * 9 * 100, 5 * 4 * 25
    for batch in (1, 3):
        records = fxq.profile_records(quantized(), torch.randn(batch, 3, 10, 10), runs=1)
        assert sorted(record["macs"] for record in records if record["macs"]) == [batch * linear, batch * convolution]


def test_the_tables() -> None:
    text = fxq.profile(quantized(), X, runs=2, rows=3)
    kernels, nodes = text.split("\n\n")
    assert "quantized::linear [x86]" in kernels and kernels.splitlines()[-1].startswith("all ")
    assert len(nodes.splitlines()) == 5
    assert all(len(line) <= 120 for line in text.splitlines())


def test_keyword_inputs_and_regions() -> None:
    class Loops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(conv(3, 4), conv(4, 4))

        def forward(self, x: torch.Tensor, *, times: int = 1) -> torch.Tensor:
            return self.net(x) if x.sum() != 0 else x

    qmodel = fxq.quantize(Loops().eval(), [X], progress=False)
    assert {record["region"] for record in fxq.profile_records(qmodel, {"x": X, "times": 2}, runs=1)} == {"net"}


def test_refuses_what_is_not_lowered() -> None:
    with pytest.raises(StageError, match="lowered"):
        fxq.profile(reference_of(quantized()), X)
