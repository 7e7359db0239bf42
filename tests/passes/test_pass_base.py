"""The contract of a pass, as the pipeline enforces it."""

from __future__ import annotations

import gc

import pytest
import torch
from models_for_tests import Lambda, canonical
from torch import fx

from fxq.errors import PlanError
from fxq.pass_base import Pass, Pipeline
from fxq.plan import Slot
from fxq.spec import QuantSpec

X = torch.randn(2, 3)
SPEC = QuantSpec(dtype=torch.uint8, quant_min=0, quant_max=255, symmetric=False)


class Sign(Pass):
    """A pass is one class: here, every relu becomes a sign."""

    requires = frozenset({"canonical"})
    ensures = frozenset({"signed"})

    def run(self, module, plan):
        found = module.graph.find_nodes(op="call_function", target=torch.relu)
        for node in found:
            node.target = torch.sign
        return len(found)


class Needs(Sign):
    requires = frozenset({"signed"})


class Breaks(Pass):
    def run(self, module, plan):
        plan.specs[Slot("nowhere")] = SPEC
        return 1


class Drops(Pass):
    def run(self, module, plan):
        (node,) = module.graph.find_nodes(op="call_function", target=torch.relu)
        node.replace_all_uses_with(node.args[0])
        module.graph.erase_node(node)
        plan.forget(node.name)
        return 1


class Tangles(Pass):
    def run(self, module, plan):
        next(iter(module.graph.nodes)).append(list(module.graph.nodes)[-1])
        return 1


@pytest.fixture
def module():
    return canonical(Lambda(lambda m, x: torch.relu(x)), X)


def test_runs_counts_and_recompiles(module):
    assert Pipeline([Sign()])(module) == {"Sign": 1}
    assert torch.equal(module(X), X.sign())
    assert "signed" in module.plan.properties


def test_order_is_checked(module):
    with pytest.raises(PlanError, match=r"Needs requires \['signed'\]"):
        Pipeline([Needs()])(module)
    Pipeline([Sign(), Needs()])(module)


def test_a_plan_that_does_not_fit_is_found_at_once(module):
    with pytest.raises(PlanError, match="nowhere"):
        Pipeline([Breaks(), Sign()])(module)
    assert "signed" not in module.plan.properties


def test_a_broken_graph_is_found_at_once(module):
    with pytest.raises(RuntimeError):
        Pipeline([Tangles(), Sign()])(module)


def test_prints_as_one_line():
    assert str(Pipeline([Sign(), Needs()])) == "Sign -> Needs"


def test_erased_nodes_are_released_and_their_names_stay_taken(module):
    Pipeline([Drops()])(module)
    gc.collect()
    assert not [n for n in gc.get_objects() if type(n) is fx.Node and n.graph is module.graph and n._erased]
    assert torch.equal(module(X), X)
    assert module.graph.call_function(torch.relu, (), name="relu").name == "relu_1"
