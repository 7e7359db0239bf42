"""A quantize that reproduces the integers it came from goes; any other stays."""

from __future__ import annotations

import pytest
import torch
from models_for_tests import graph_text, quantizes, run
from torch import fx, nn

from fxq.graph_module import QuantModule
from fxq.passes.simplify_qdq import SimplifyQDQ
from fxq.plan import QuantPlan
from fxq.qdq import DEQUANTIZE, QUANTIZE

X = torch.randn(64) * 3
FIRST = (0.05, 100, 0, 255, torch.uint8)


def chain(second, back=(0.05, 100)):
    graph = fx.Graph()
    x = graph.placeholder("x")
    q = graph.call_function(QUANTIZE, (x, *FIRST))
    dq = graph.call_function(DEQUANTIZE, (q, *back))
    again = graph.call_function(QUANTIZE, (dq, *second))
    graph.output(graph.call_function(DEQUANTIZE, (again, *second[:2])))
    module = QuantModule(nn.Module(), graph)
    module.meta["fxq"] = QuantPlan("x86", properties={"reference"})
    return module


def simplify(module):
    expected = module(X)
    changed = run(SimplifyQDQ(), module)
    assert torch.equal(module(X), expected)
    text = graph_text(module)
    assert run(SimplifyQDQ(), module) == 0 and graph_text(module) == text
    return changed


def test_fires():
    module = chain(FIRST)
    assert simplify(module) == 1 and quantizes(module) == 1


@pytest.mark.parametrize(
    "second",
    [(0.06, 100, 0, 255, torch.uint8), (0.05, 101, 0, 255, torch.uint8), (0.05, 100, 10, 255, torch.uint8),
     (0.05, 100, 0, 200, torch.uint8), (0.05, 100, -128, 127, torch.int8)],
    ids=["scale", "zero_point", "min", "max", "dtype"],
)  # fmt: skip
def test_refuses(second):
    module = chain(second)
    assert simplify(module) == 0 and quantizes(module) == 2


def test_a_dequantize_of_other_qparams_is_no_round_trip():
    assert simplify(chain(FIRST, back=(0.07, 100))) == 0
