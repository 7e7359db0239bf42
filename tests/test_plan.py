"""The plan: checks against the graph, and regions that go back to float."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx

from fxq.errors import PlanError
from fxq.plan import EXCLUDED, UNKNOWN_OP, Decision, Origin, QuantPlan, Region, Slot, Status, TensorFact, float_decision
from fxq.spec import QuantSpec

SPEC = QuantSpec(dtype=torch.uint8, quant_min=0, quant_max=255, symmetric=False)


def graph():
    g = fx.Graph()
    x = g.placeholder("x")
    g.output(g.create_node("call_function", torch.relu, (x,), name="relu"))
    return g


def annotated():
    return QuantPlan("x86", properties={"annotated"}, decisions={"relu": Decision(Status.QUANTIZED, "relu")})


def test_a_plan_that_fits():
    plan = annotated()
    plan.specs[Slot("relu")] = SPEC
    plan.groups[Slot("relu")] = 0
    plan.check(graph())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.specs.update({Slot("gone"): SPEC}), "'gone', which is not in the graph"),
        (lambda p: p.groups.update({Slot("relu"): 1}), "no QuantSpec"),
        (lambda p: p.decisions.clear(), "no decision for.*relu"),
        (lambda p: p.decisions.update({"x": Decision(Status.SHAPE_ONLY)}), "'x', which is not a call node"),
        (lambda p: p.decisions.update({"gone": float_decision(EXCLUDED)}), "'gone', which is not a call node"),
        (lambda p: p.decisions.update({"relu": Decision(Status.FLOAT)}), "without a reason"),
    ],
)
def test_a_plan_that_does_not(change, message):
    plan = annotated()
    change(plan)
    with pytest.raises(PlanError, match=message):
        plan.check(graph())


def test_undecided_nodes_are_fine_before_annotate():
    QuantPlan("x86").check(graph())


def test_make_float_takes_slots_and_decides():
    a, b = Region("conv2d", ("a", "relu")), Region("conv2d", ("b",))
    plan = QuantPlan("x86", regions=[a, b])
    for name in ("a", "relu", "b"):
        plan.specs[Slot(name)] = SPEC
        plan.groups[Slot(name)] = 0
    plan.make_float([a], UNKNOWN_OP, "why")
    assert plan.regions == [b] and plan.specs.keys() == plan.groups.keys() == {Slot("b")}
    assert plan.decisions == dict.fromkeys(("a", "relu"), float_decision(UNKNOWN_OP, "why"))
    assert a.end == "relu" and plan.members(0) == [Slot("b")]


def test_where_names_node_and_module():
    plan = QuantPlan("x86", origins={"conv": Origin("features.0", "Conv2d"), "add": Origin("", "add")})
    assert plan.where("conv") == "node 'conv' (module 'features.0')"
    assert plan.where("add") == "node 'add'" and plan.where("other") == "node 'other'"


def test_forget():
    plan = QuantPlan("x86", origins={"a": Origin("", "")}, facts={"a": TensorFact((1,), torch.float32)})
    plan.forget("a")
    assert not plan.origins and not plan.facts


def test_a_copy_has_containers_of_its_own():
    plan = annotated()
    plan.attributes["sizes"] = [1, 2]
    clone = copy.deepcopy(plan)
    assert clone == plan
    clone.decisions["relu"] = float_decision(EXCLUDED)
    clone.notes.append("changed")
    clone.properties.add("grouped")
    clone.attributes["sizes"].append(3)
    assert plan == QuantPlan("x86", properties={"annotated"}, decisions=annotated().decisions,
                             attributes={"sizes": [1, 2]})  # fmt: skip
