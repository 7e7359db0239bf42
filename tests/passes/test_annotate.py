"""One decision for each call node, with its reason; a spec for each use of a quantized tensor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import Lambda, Two, before, conv, graph_text, reason, run
from torch import nn

from fxq.backends import get_backend
from fxq.config import QConfig, QConfigMapping, named_qconfig
from fxq.passes.annotate import Annotate
from fxq.plan import DYNAMIC_WEIGHT, EXCLUDED, INPLACE, NOT_FLOAT32, UNKNOWN_OP, Slot, Status

X = torch.randn(2, 3, 8, 8)


def annotate(model, *inputs, **options):
    module, step = before(Annotate, model, *(inputs or (X,)), **options)
    text = graph_text(module)
    run(step, module)
    regions, decisions = list(module.plan.regions), dict(module.plan.decisions)
    assert run(step, module) == 0
    assert (regions, decisions) == (module.plan.regions, module.plan.decisions) and graph_text(module) == text
    calls = {n.name for n in module.graph.nodes if n.op.startswith("call_")}
    assert decisions.keys() == calls
    return module


def rows(module):
    return {region.nodes: region.row for region in module.plan.regions}


def test_a_chain_is_one_region():
    module = annotate(Lambda(lambda m, x: F.relu(m.c(x)), c=conv()))
    assert rows(module) == {("c", "relu"): "conv2d"}
    assert module.plan.decisions["relu"].detail == "fused into c"
    assert module.plan.specs.keys() == {Slot("c", (0,)), Slot("c", (1,)), Slot("relu")}
    assert module.plan.specs[Slot("c", (1,))].ch_axis == 0
    assert [(f.action, f.what, f.into) for f in module.plan.fusions] == [("fuse", "relu", "c")]


def test_y_plus_y_has_a_slot_for_each_use():
    module = annotate(Lambda(lambda m, x: _double(m.c(x)), c=conv()))
    assert {Slot("add", (0,)), Slot("add", (1,)), Slot("add")} <= module.plan.specs.keys()


def _double(y):
    return y + y


def test_cat_of_one_tensor_twice():
    module = annotate(Lambda(lambda m, x: _cat(m.c(x)), c=conv()))
    assert {Slot("cat", (0, 0)), Slot("cat", (0, 1))} <= module.plan.specs.keys()


def _cat(y):
    return torch.cat([y, y], 1)


def test_two_convs_do_not_claim_one_add():
    module = annotate(Lambda(lambda m, x: F.relu(m.a(x) + m.b(x)), a=conv(), b=conv()), backend="onednn")
    assert rows(module) == {("a", "add", "relu"): "conv2d_add", ("b",): "conv2d"}


def test_an_excluded_add_is_not_claimed():
    model = Lambda(lambda m, x: m.b(m.a(x) + m.d(x)), a=conv(), b=conv(4), d=conv())
    module = annotate(model, backend="onednn", exclude=["add"])
    assert rows(module) == {("a",): "conv2d", ("b",): "conv2d", ("d",): "conv2d"}
    assert reason(module, "add") is EXCLUDED


def test_an_excluded_relu_is_cut_off():
    module = annotate(Lambda(lambda m, x: m.r(m.c(x)), c=conv(), r=nn.ReLU()), exclude=[nn.ReLU])
    assert rows(module) == {("c",): "conv2d"} and reason(module, "r") is EXCLUDED


def test_a_relu_of_another_qconfig_is_cut_off():
    per_tensor = named_qconfig("per_tensor", get_backend("x86"))
    mapping = QConfigMapping().set_module_name("r", per_tensor)
    module = annotate(Lambda(lambda m, x: m.r(m.c(x)), c=conv(), r=nn.ReLU()), qconfig=mapping)
    assert ("c",) in rows(module) and ("r",) in rows(module)
    assert module.plan.specs[Slot("c")].observer == "histogram"


def test_specs_follow_the_qconfig():
    table = get_backend("x86")
    narrow = QConfig(activation=table.activation.replace(quant_max=15), weight=table.weight.replace(ch_axis=None))
    mapping = QConfigMapping().set_object_type(nn.Conv2d, narrow)
    specs = annotate(Lambda(lambda m, x: m.c(x), c=conv()), qconfig=mapping).plan.specs
    assert specs[Slot("c")].bits == 4 and specs[Slot("c", (1,))].ch_axis is None


def test_transposed_convs_have_channels_on_axis_1_where_the_engine_can():
    model = Lambda(lambda m, x: m.c(x), c=nn.ConvTranspose2d(3, 4, 2))
    assert annotate(model, backend="qnnpack").plan.specs[Slot("c", (1,))].ch_axis == 1
    assert annotate(model, backend="fbgemm").plan.specs[Slot("c", (1,))].ch_axis is None


def test_fixed_outputs_use_the_whole_range():
    table = get_backend("x86")
    narrow = QConfig(activation=table.activation.replace(quant_max=15), weight=table.weight)
    module = annotate(Lambda(lambda m, x: torch.sigmoid(m.c(x)), c=conv()), qconfig=QConfigMapping().set_global(narrow))
    assert module.plan.specs[Slot("sigmoid")].bits == 8 and module.plan.specs[Slot("c")].bits == 4


@pytest.mark.parametrize(
    ("forward", "node", "expected"),
    [
        (lambda m, x: F.selu(m.c(x)), "selu", UNKNOWN_OP),
        (lambda m, x: F.relu(x.double()), "relu", NOT_FLOAT32),
        (lambda m, x: F.relu(x.long()), "relu", NOT_FLOAT32),
        (lambda m, x: F.conv2d(x, m.c.weight * x.mean()), "conv2d", DYNAMIC_WEIGHT),
        (lambda m, x: torch.unbind(m.c(x))[0], "getitem", UNKNOWN_OP),
    ],
    ids=["unknown", "double", "integers", "weight", "container"],
)
def test_refusals(forward, node, expected):
    assert reason(annotate(Lambda(forward, c=conv())), node) is expected


@pytest.mark.parametrize(
    ("forward", "node", "code"),
    [
        (lambda m, x: F.silu(m.c(x).relu()), "silu", "no-kernel"),
        (lambda m, x: 1 - m.c(x), "sub", "no-kernel"),
        (lambda m, x: F.pad(m.c(x), [1, 1], value=1.0), "pad", "options"),
        (lambda m, x: torch.cat(m.c(x).chunk(2)), "cat", "options"),
    ],
)
def test_refusals_by_the_backend(forward, node, code):
    assert reason(annotate(Lambda(forward, c=conv())), node).code == code


def test_shapes_are_no_floats():
    module = annotate(Lambda(lambda m, x: m.c(x).view(x.size(0), x.shape[1] * 2 - 2, -1), c=conv()))
    kinds = {name: d.status for name, d in module.plan.decisions.items()}
    assert {kinds["size"], kinds["getattr_1"], kinds["mul"], kinds["sub"]} == {Status.SHAPE_ONLY}


def test_a_live_view_that_is_overwritten_stays_float():
    def forward(m, x):
        y = m.c(x)
        y[:, :1].relu_()
        return m.d(y)

    module = annotate(Lambda(forward, c=conv(), d=conv(4)))
    assert reason(module, "getitem") is INPLACE and reason(module, "relu_") is INPLACE
    assert reason(module, "c") is None and reason(module, "d") is None


def test_a_clamp_with_bounds_of_run_time_is_no_tail():
    module = annotate(Two(lambda m, x, y: m.c(x).clamp(max=y.size(0)), c=conv()), X, X)
    assert ("c",) in rows(module)
