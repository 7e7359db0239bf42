"""The saturation of a quantize does the work of the relu or clamp before it, exactly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import OPS, Lambda, Two, conv, graph_text, op_names, run

import fxq
from fxq.backends import get_backend
from fxq.passes.absorb_clamp import AbsorbClamp, _integer
from fxq.passes.to_reference import ToReference
from fxq.plan import Slot
from fxq.qdq import QUANTIZE

X = torch.randn(4, 3, 8, 8)


def reference(model, **options):
    prepared = fxq.prepare(model, X, **options)
    for _ in range(2):
        prepared(torch.randn(4, 3, 8, 8) * 3)
    run(ToReference(get_backend("x86"), OPS), prepared)
    return prepared


def absorb(forward, **options):
    module = reference(Lambda(forward, a=conv(), b=conv(4, 4)), **options)
    expected = module(X)
    changed = run(AbsorbClamp(OPS), module)
    assert torch.equal(module(X), expected)
    text = graph_text(module)
    assert run(AbsorbClamp(OPS), module) == 0 and graph_text(module) == text
    return module, changed


@pytest.mark.parametrize(
    "clamp",
    [F.relu, F.relu6, F.hardtanh, lambda y: y.clamp(-0.3, 0.4), lambda y: y.clamp(min=0.1), lambda y: y.clamp(max=0.1)],
)  # fmt: skip
def test_absorbed_exactly(clamp):
    module, changed = absorb(lambda m, x: m.b(clamp(m.a(x))))
    assert changed == 1
    assert not {"relu", "clamp"} & set(op_names(module))


def test_the_plan_moves_to_the_op_before():
    module, _ = absorb(lambda m, x: m.b(F.relu6(m.a(x))))
    region = next(r for r in module.plan.regions if r.nodes[0] == "a")
    assert region.nodes == ("a",) and region.absorbed == ("relu6",)
    assert Slot("a") in module.plan.groups and "relu6" not in module.plan.decisions


def test_a_clamp_read_twice_stays():
    def forward(m, x):
        y = F.relu(F.selu(m.a(x)))
        return m.b(y) + F.selu(y)

    module, changed = absorb(forward)
    assert "relu" in op_names(module) and changed == 0


def test_a_clamp_of_integers_stays():
    def forward(m, x):
        y = m.a(x)
        return m.b(F.relu(y)) + y

    module, changed = absorb(forward)
    assert changed == 0 and "relu" in op_names(module)


def test_bounds_of_run_time_stay():
    model = Two(lambda m, x, y: m.b(torch.clamp(m.a(x), max=y.size(0) - 3.5)), a=conv(), b=conv(4, 4))
    prepared = fxq.prepare(model, (X, X))
    prepared(X, X)
    run(ToReference(get_backend("x86"), OPS), prepared)
    assert run(AbsorbClamp(OPS), prepared) == 0


def test_ties_are_rounded_as_the_op_rounds():
    """In double precision 0.5/0.1 and the like fall on the other side of a tie."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        scale = float(torch.rand((), generator=generator) * 0.1 + 1e-3)
        bound = (int(torch.randint(0, 200, (), generator=generator)) + 0.5) * scale
        node = graph.call_function(QUANTIZE, (x, scale, 3, 0, 255, torch.uint8))
        assert _integer(bound, node) == int(QUANTIZE(torch.tensor(bound), *node.args[1:]))
    assert _integer(None, node) is None
