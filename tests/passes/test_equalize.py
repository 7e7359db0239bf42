"""Equalization leaves the float model as it is, evens out ranges, and keeps away from what it cannot scale."""

from __future__ import annotations

import pytest
import torch
from models_for_tests import Lambda, before, conv, op_names, run_exactly
from torch import nn

import fxq
from fxq.backends import get_backend
from fxq.config import QConfigMapping
from fxq.graph_module import get_attribute
from fxq.numerics import sqnr
from fxq.passes.equalize import Equalize
from fxq.passes.rewrite_scalars import RewriteScalars

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5))
V = torch.randn(6, 3, generator=torch.Generator().manual_seed(6))


def unequal(*parts: nn.Module) -> nn.Module:
    """Layers in sequence whose channels differ by a factor of 1000, wide in one layer where narrow in the next."""
    for part in parts:
        weight = getattr(part, "weight", None)
        if weight is not None and weight.dim() > 1:
            factors = torch.logspace(-1.5, 1.5, weight.shape[0])[torch.randperm(weight.shape[0])]
            weight.data *= factors.reshape(-1, *[1] * (weight.dim() - 1))
    return Lambda(lambda m, x: m.seq(x), seq=nn.Sequential(*parts))


def equalize(model, x, qconfig="per_tensor"):
    """The module and how many pairs the pass changed; its output stays equal, and a second run changes nothing."""
    module, _ = before(RewriteScalars, model, x)
    config = QConfigMapping().set_global(qconfig).resolved(get_backend("x86"))
    step = Equalize(config, ((x,), {}), get_backend("x86").dictionary)
    return module, run_exactly(step, module, x)


def weight(module, name):
    node = next(node for node in module.graph.nodes if node.name == name)
    return get_attribute(module, node.args[1].target).detach()


CHAINS = {
    "conv-conv": (lambda: unequal(conv(3, 6), conv(6, 4)), X, 1),
    "conv-relu-conv": (lambda: unequal(conv(3, 6), nn.ReLU(), conv(6, 4)), X, 1),
    "no-bias": (lambda: unequal(conv(3, 6, bias=False), nn.ReLU(), conv(6, 4, bias=False)), X, 1),
    "batch-norm": (lambda: unequal(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 4)), X, 1),
    "leaky-pool": (lambda: unequal(conv(3, 6), nn.LeakyReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2), conv(6, 4)), X, 1),
    "depthwise": (lambda: unequal(conv(3, 6, 1), nn.ReLU(), conv(6, 6, groups=6), nn.ReLU(), conv(6, 4, 1)), X, 2),
    "grouped": (lambda: unequal(conv(3, 6), nn.ReLU(), conv(6, 4, groups=2), nn.ReLU(), conv(4, 6, groups=2)), X, 2),
    "transposed": (
        lambda: unequal(nn.ConvTranspose2d(3, 6, 2), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, groups=2), conv(4, 4)),
        X,
        2,
    ),
    "linear": (lambda: unequal(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.Linear(5, 2)), V, 2),
    "linear-sequence": (lambda: unequal(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5)), V[None], 1),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_stay_equal_in_float(name):
    make, x, pairs = CHAINS[name]
    module, count = equalize(make(), x)
    assert count == pairs
    assert [fusion.action for fusion in module.plan.fusions].count("equalize") == pairs


def test_both_layers_get_the_same_ranges():
    module, _ = equalize(unequal(conv(3, 6), nn.ReLU(), conv(6, 4)), X)
    first, second = weight(module, "seq_0").abs().amax((1, 2, 3)), weight(module, "seq_2").abs().amax((0, 2, 3))
    torch.testing.assert_close(first, second, rtol=0.02, atol=0)


def test_statistics_are_scaled_with_the_channels():
    model = unequal(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 4))
    module, _ = before(RewriteScalars, model, X)
    layer, statistics = weight(module, "seq_0"), module.plan.statistics["seq_0"]
    equalized, _ = equalize(model, X)
    factors = (weight(equalized, "seq_0") / layer).flatten(1).median(1).values
    for new, old in zip(equalized.plan.statistics["seq_0"], statistics, strict=True):
        torch.testing.assert_close(torch.tensor(new), torch.tensor(old) * factors, rtol=1e-4, atol=1e-6)


def residual(m, x):
    y = m.a(x)
    return m.b(torch.relu(y)) + y


def twice(m, x):
    return m.b(torch.relu(m.b(torch.relu(m.a(x)))))


REFUSED = {
    "residual": (residual, {"a": conv(3, 4), "b": conv(4, 4)}),
    "add": (lambda m, x: m.b(m.a(x) + m.c(x)), {"a": conv(3, 4), "c": conv(3, 4), "b": conv(4, 4)}),
    "sigmoid": (lambda m, x: m.b(torch.sigmoid(m.a(x))), {"a": conv(3, 4), "b": conv(4, 4)}),
    "hardtanh": (lambda m, x: m.b(m.h(m.a(x))), {"a": conv(3, 4), "h": nn.Hardtanh(), "b": conv(4, 4)}),
    "flatten": (lambda m, x: m.b(m.a(x).flatten(1)), {"a": conv(3, 4), "b": nn.Linear(256, 2)}),
    "module called twice": (twice, {"a": conv(3, 4), "b": conv(4, 4)}),
    "one layer": (lambda m, x: torch.relu(m.a(x)), {"a": conv(3, 4)}),
    "output": (lambda m, x: (m.a(x), m.b(m.a(x))), {"a": conv(3, 4), "b": conv(4, 4)}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_scaled_is_left_alone(name):
    forward, parts = REFUSED[name]
    module, count = equalize(Lambda(forward, **parts), X)
    assert count == 0
    assert not [fusion for fusion in module.plan.fusions if fusion.action == "equalize"]


def test_a_shared_weight_is_refused():
    a, b = conv(4, 4), conv(4, 4)
    b.weight = a.weight
    _, count = equalize(Lambda(lambda m, x: m.b(torch.relu(m.a(m.s(x)))), s=conv(3, 4), a=a, b=b), X)
    assert count == 0


def test_an_unbatched_conv_is_refused():
    _, count = equalize(unequal(nn.Conv1d(3, 8, 1), nn.ReLU(), nn.Conv1d(8, 4, 1)), X[0, 0, :3])
    assert count == 0


def test_weights_with_one_scale_a_channel_need_it_not():
    _, count = equalize(unequal(conv(3, 6), nn.ReLU(), conv(6, 4)), X, "per_channel")
    assert count == 0


def test_relu6_stays_and_no_channel_is_brought_to_its_bound():
    model = unequal(conv(3, 6), nn.ReLU6(), conv(6, 4))
    model.seq[0].weight.data *= 0.4 / model.seq[0].weight.abs().amax()
    model.seq[0].weight.data[0] *= 100  # reaches the bound
    model.seq[0].weight.data[1:4] *= torch.tensor([0.1, 0.01, 0.001]).reshape(3, 1, 1, 1)
    first = model.seq[0].weight.detach().clone()
    assert bool((model.seq[0](X).amax((0, 2, 3)) > 6).any())
    module, count = equalize(model, X)
    assert count == 1
    assert "clamp" in op_names(module)
    assert torch.equal(weight(module, "seq_0")[0], first[0])
    assert not torch.equal(weight(module, "seq_0")[1:], first[1:])


@pytest.mark.parametrize("bound", [nn.ReLU6, nn.ReLU])
def test_weights_that_only_meet_zeros_are_zeroed(bound):
    """A pruned channel whose weights in the next layer are large would set the scale for all."""
    model = unequal(conv(3, 6), bound(), conv(6, 6, groups=6))
    model.seq[0].weight.data[2] = 0
    model.seq[0].bias.data[2] = -0.5
    model.seq[2].weight.data[2] = 1000.0
    module, _ = equalize(model, X)
    assert weight(module, "seq_2").abs().max() < 100
    assert "1 silent" in module.plan.fusions[-1].detail


def test_constant_channels_that_are_not_zero_stay():
    model = unequal(conv(3, 6), nn.ReLU(), conv(6, 4))
    model.seq[0].weight.data[2] = 0
    model.seq[0].bias.data[2] = 0.5
    equalize(model, X)  # compares outputs


def test_int8_with_one_scale_a_tensor_recovers():
    model = unequal(conv(3, 16), nn.ReLU(), conv(16, 16, groups=16), nn.ReLU(), conv(16, 4, 1))
    data = [torch.randn(8, 3, 8, 8) for _ in range(4)]
    found = {}
    for name in ("default", "advanced"):
        qmodel = fxq.quantize(model, data, qconfig="per_tensor", calibration=name)
        found[name] = sqnr(model(X).detach(), qmodel(X))
    assert found["advanced"] > found["default"] + 6
