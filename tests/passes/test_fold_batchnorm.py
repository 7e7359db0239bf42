"""BatchNorm folds into the layer before or after it, only where that is exact."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import Lambda, Two, before, canonical, conv, graph_text, op_names, run, same
from torch import nn

from fxq.errors import PlanError
from fxq.pass_base import Pipeline
from fxq.passes.fold_batchnorm import FoldBatchNorm

X1, X2, X3 = torch.randn(3, 4, 9), torch.randn(3, 4, 6, 6), torch.randn(3, 4, 4, 4, 4)
EXAMPLES = {1: X1, 2: X2, 3: X3}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def sequence(*parts):
    return Lambda(lambda m, x: m.seq(x), seq=nn.Sequential(*parts))


def fold(model, x, count):
    """Run the pass; outputs stay equal, a second run changes nothing."""
    module, step = before(FoldBatchNorm, model, x)
    expected = module(x)
    same(expected, model(x))
    assert run(step, module) == count
    same(module(x), expected)
    text = graph_text(module)
    assert run(step, module) == 0
    assert graph_text(module) == text
    return module


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("layers", [CONVS, TRANSPOSED], ids=["conv", "transposed"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_into_the_layer_before(dims, layers, groups, bias, affine):
    layer = layers[dims](4, 6, 3, padding=1, groups=groups, bias=bias)
    module = fold(sequence(layer, NORMS[dims](6, affine=affine)), EXAMPLES[dims], 1)
    assert "batch_norm" not in op_names(module)
    assert sorted(module.state_dict()) == ["seq.0.bias", "seq.0.weight"]
    (fusion,) = module.plan.fusions
    assert (fusion.action, fusion.what, fusion.into) == ("fold", "seq.1", "seq.0")


@pytest.mark.parametrize("bias", [True, False])
def test_into_linear(bias):
    module = fold(sequence(nn.Linear(9, 5, bias=bias), nn.BatchNorm1d(5)), X1[:, 0], 1)
    assert op_names(module) == ["linear"]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_into_the_conv_after(dims, groups):
    model = sequence(NORMS[dims](4), CONVS[dims](4, 6, 3, groups=groups))
    module = fold(model, EXAMPLES[dims], 1)
    assert op_names(module) == [f"conv{dims}d"]


def test_into_the_conv_after_without_bias():
    fold(sequence(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1, bias=False)), X2, 1)


@pytest.mark.parametrize("affine", [True, False])
def test_statistics_of_the_layer_it_is_folded_into(affine):
    """What the layer gives for data with the running statistics as its own: a batch normalised by itself."""
    norm = nn.BatchNorm2d(6, affine=affine)
    model = sequence(nn.Conv2d(4, 6, 1), norm)
    before = model.seq[0](X2).detach()
    norm.running_mean.copy_(before.mean((0, 2, 3)))
    norm.running_var.copy_(before.var((0, 2, 3), correction=0))
    module = fold(model, X2, 1)
    mean, std = map(torch.tensor, module.plan.statistics["seq_0"])
    after = model(X2).detach()
    same(mean, after.mean((0, 2, 3)))
    same(std, after.std((0, 2, 3), correction=0))


def test_padding_forbids_the_conv_after():
    module = fold(sequence(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)), X2, 0)
    assert op_names(module) == ["batch_norm", "conv2d"]


def test_padding_does_no_harm_where_the_shift_is_zero():
    model = sequence(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1))
    model.seq[0].running_mean.zero_()
    model.seq[0].bias.data.zero_()
    fold(model, X2, 1)


def test_through_dropout_and_identity():
    fold(sequence(nn.Conv2d(4, 6, 1), nn.Dropout2d(), nn.Identity(), nn.BatchNorm2d(6)), X2, 1)


def test_a_conv_that_is_read_twice_is_refused():
    def forward(m, x):
        y = m.c(x)
        return m.n(y) + y

    module = fold(Lambda(forward, c=conv(4, 6), n=nn.BatchNorm2d(6)), X2, 0)
    assert "batch_norm" in op_names(module)


def test_a_norm_that_is_read_twice_does_not_fold_into_one_reader():
    def forward(m, x):
        y = m.n(x)
        return m.c(y) + y.mean()

    fold(Lambda(forward, c=nn.Conv2d(4, 6, 1), n=nn.BatchNorm2d(4)), X2, 0)


@pytest.mark.parametrize("norm", [lambda: nn.BatchNorm2d(6, track_running_stats=False)])
def test_batch_statistics_are_refused(norm):
    fold(sequence(nn.Conv2d(4, 6, 1), norm()), X2, 0)


def test_other_ops_between_are_refused():
    fold(sequence(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)), X2, 0)


def test_features_last_linear_is_refused():
    """On (N, L, features) BatchNorm1d normalises L, also where L happens to equal the features."""
    fold(sequence(nn.Linear(9, 4), nn.BatchNorm1d(4)), X1, 0)


def test_an_unbatched_conv_is_refused():
    """(C, L) is read by BatchNorm1d as (N, C)."""
    fold(sequence(nn.Conv1d(4, 9, 1), nn.BatchNorm1d(9)), X1[0], 0)


def test_a_weight_computed_at_run_time_is_refused():
    model = Two(lambda m, x, w: m.n(F.conv2d(x, w)), n=nn.BatchNorm2d(5))
    w = torch.randn(5, 4, 1, 1)
    module, step = before(FoldBatchNorm, model, X2, w)
    assert run(step, module) == 0
    same(module(X2, w), model(X2, w))


def test_shared_conv_with_two_norms():
    model = Lambda(lambda m, x: m.n2(m.c(m.n1(m.c(x)))), c=conv(4, 4), n1=nn.BatchNorm2d(4), n2=nn.BatchNorm2d(4))
    fold(model, X2, 2)


def test_shared_norm_after_two_convs():
    model = Lambda(lambda m, x: m.n(m.a(x)) + m.n(m.b(x)), a=conv(4, 6), b=conv(4, 6), n=nn.BatchNorm2d(6))
    fold(model, X2, 2)


@pytest.mark.parametrize("shared", ["weight", "bias"])
def test_shared_weights_of_two_convs(shared):
    a, b = conv(4, 4), conv(4, 4)
    setattr(b, shared, getattr(a, shared))
    fold(Lambda(lambda m, x: m.b(m.n(m.a(x))), a=a, b=b, n=nn.BatchNorm2d(4)), X2, 1)


def test_one_parameter_read_by_two_calls():
    w = nn.Parameter(torch.randn(4, 4, 1, 1))
    model = Lambda(lambda m, x: m.n(F.conv2d(x, m.w)) + F.conv2d(x, m.w), w=w, n=nn.BatchNorm2d(4))
    fold(model, X2, 1)


def test_conv_norm_conv_folds_backward():
    model = sequence(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4))
    module = fold(model, X2, 2)
    assert op_names(module) == ["conv2d", "conv2d"]


def test_needs_facts():
    module = canonical(sequence(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)), X2)
    with pytest.raises(PlanError, match=r"requires.*facts"):
        Pipeline([FoldBatchNorm(None)])(module)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("keep_sources", [False, True])
@pytest.mark.parametrize("layer", [CONVS[2], TRANSPOSED[2]])
def test_a_layer_of_another_dtype_keeps_it(layer, keep_sources, dtype):
    model = sequence(layer(4, 6, 3, bias=False), nn.BatchNorm2d(6)).to(dtype)
    module, step = before(FoldBatchNorm, model, X2.to(dtype))
    step.keep_sources = keep_sources
    assert run(step, module) == 1
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    torch.testing.assert_close(module(X2.to(dtype)), model(X2.to(dtype)), rtol=0.05, atol=0.05)
