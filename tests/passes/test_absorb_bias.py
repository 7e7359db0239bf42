"""Bias absorption leaves the float model as it is, narrows what is between, and refuses what would not be exact."""

from __future__ import annotations

import pytest
import torch
from models_for_tests import Lambda, before, conv, run, run_exactly
from torch import nn

import fxq
from fxq.backends import get_backend
from fxq.config import QConfigMapping
from fxq.graph_module import get_attribute
from fxq.numerics import sqnr
from fxq.partition import reference_of
from fxq.passes.absorb_bias import AbsorbBias
from fxq.passes.rewrite_scalars import RewriteScalars

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(5))
V = torch.randn(64, 3, generator=torch.Generator().manual_seed(6))


def high(*parts: nn.Module, channel: int = 1) -> nn.Module:
    """Layers in sequence, of which the first has one channel far above zero."""
    model = Lambda(lambda m, x: m.seq(x), seq=nn.Sequential(*parts)).requires_grad_(False)
    if isinstance(parts[1], nn.BatchNorm2d):
        parts[1].bias[channel] = 50.0
    else:
        parts[0].bias[channel] = 50.0
    return model


def point(inputs: int, outputs: int, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, **options)


def absorb(model, x, qconfig="per_tensor", exclude=()):
    """The module and how many pairs the pass changed; its output stays equal, and a second run changes nothing."""
    module, _ = before(RewriteScalars, model, x)
    config = QConfigMapping().set_global(qconfig).resolved(get_backend("x86"), exclude)
    step = AbsorbBias(config, ((x,), {}), get_backend("x86").dictionary)
    return module, run_exactly(step, module, x)


def bias(module, name):
    node = next(node for node in module.graph.nodes if node.name == name)
    return get_attribute(module, node.args[2].target).detach()


ABSORBED = {
    "conv-relu-conv": (lambda: high(conv(3, 6), nn.ReLU(), point(6, 4)), X),
    "conv-conv": (lambda: high(conv(3, 6), point(6, 4)), X),
    "no bias after": (lambda: high(conv(3, 6), nn.ReLU(), point(6, 4, bias=False)), X),
    "batch norm": (lambda: high(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), point(6, 4)), X),
    "grouped": (lambda: high(conv(3, 6), nn.ReLU(), point(6, 4, groups=2)), X),
    "depthwise": (lambda: high(conv(3, 6), nn.LeakyReLU(), nn.Conv2d(6, 12, 3, groups=6)), X),
    "pools": (
        lambda: high(
            conv(3, 6), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), point(6, 4)
        ),
        X,
    ),
    "transposed first": (lambda: high(nn.ConvTranspose2d(3, 6, 2), nn.ReLU(), point(6, 4)), X),
    "linear": (lambda: high(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5)), V),
    "linear-sequence": (lambda: high(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5)), V[None]),
}  # fmt: skip


@pytest.mark.parametrize("name", ABSORBED)
def test_outputs_stay_equal_and_biases_move(name):
    make, x = ABSORBED[name]
    model = make()
    module, count = absorb(model, x)
    assert count == 1
    (line,) = [fusion for fusion in module.plan.fusions if fusion.action == "absorb bias"]
    assert line.what == "seq.0" and line.detail.startswith("1 of 6 channels lowered, by up to 4")
    (pair,) = module.plan.absorbed
    assert 40 < pair.shift[1] < 50 and sum(pair.shift) == pair.shift[1]
    folded, _ = before(RewriteScalars, model, x)
    torch.testing.assert_close(bias(module, "seq_0"), bias(folded, "seq_0") - torch.tensor(pair.shift).float())


def test_what_is_between_gets_narrower():
    model = high(conv(3, 6), nn.ReLU(), point(6, 4))
    largest = {}
    for calibration in ("simple", "advanced"):
        prepared = fxq.prepare(model, X, qconfig="per_tensor", calibration=calibration)
        fxq.calibrate(prepared, [X])
        largest[calibration] = prepared.get_submodule("seq_1_observer").range()[1].item()
    assert largest["simple"] > 50 and largest["advanced"] < 10


def test_int8_gets_better():
    model = high(conv(3, 8), nn.ReLU(), point(8, 8), nn.ReLU(), point(8, 4))
    expected = model(X)
    found = {}
    for calibration in ("default", "advanced"):
        qmodel = fxq.quantize(model, [X], qconfig="per_tensor", calibration=calibration)
        found[calibration] = sqnr(expected - expected.mean((0, 2, 3), keepdim=True),
                                  qmodel(X) - expected.mean((0, 2, 3), keepdim=True))  # fmt: skip
    assert found["advanced"] > found["default"] + 10


def test_the_statistics_of_a_batch_norm_are_respected_and_lowered():
    model = high(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), point(6, 4))
    folded, _ = before(RewriteScalars, model, X)
    mean, std = (torch.tensor(values) for values in folded.plan.statistics["seq_0"])
    module, _ = absorb(model, X)
    (pair,) = module.plan.absorbed
    shift = torch.tensor(pair.shift)
    lowest = model.seq[1](model.seq[0](X)).amin((0, 2, 3))
    torch.testing.assert_close(shift, torch.minimum(mean - 3 * std, lowest).clamp(min=0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.tensor(module.plan.statistics["seq_0"].mean), mean - shift)
    assert module.plan.statistics["seq_0"].std == folded.plan.statistics["seq_0"].std


def shared(m, x):
    y = torch.relu(m.a(x))
    return m.b(y), m.b(y)


REFUSED = {
    "padded": lambda: high(conv(3, 6), nn.ReLU(), conv(6, 4)),
    "padded and same": lambda: high(conv(3, 6), nn.ReLU(), nn.Conv2d(6, 4, 3, padding="same")),
    "transposed second": lambda: high(conv(3, 6), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3)),
    "padded average": lambda: high(conv(3, 6), nn.ReLU(), nn.AvgPool2d(3, 2, 1), point(6, 4)),
    "other divisor": lambda: high(conv(3, 6), nn.ReLU(), nn.AvgPool2d(2, divisor_override=3), point(6, 4)),
    "sigmoid": lambda: high(conv(3, 6), nn.Sigmoid(), point(6, 4)),
    "cut off by relu6": lambda: high(conv(3, 6), nn.ReLU6(), point(6, 4)),
    "read twice": lambda: Lambda(shared, a=conv(3, 6), b=point(6, 4)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_be_exact_is_left_alone(name):
    module, count = absorb(REFUSED[name](), X)
    assert count == 0 and not module.plan.absorbed
    assert not [fusion for fusion in module.plan.fusions if fusion.action == "absorb bias"]


def test_layers_that_stay_float_are_left_alone():
    assert absorb(high(conv(3, 6), nn.ReLU(), point(6, 4)), X, exclude=["seq"])[1] == 0


def test_too_few_values_tell_no_range():
    model = high(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5))
    assert absorb(model, V[:8])[1] == 0
    assert absorb(model, V)[1] == 1


def test_relu6_that_cuts_nothing_off():
    model = high(conv(3, 6), nn.ReLU6(), point(6, 4))
    model.seq[0].weight *= 0.1
    model.seq[0].bias[1] = 4.0
    module, count = absorb(model, X)
    assert count == 1 and 2 < module.plan.absorbed[0].shift[1] < 4
    model.seq[0].bias[1] = 6.0  # at the bound
    assert absorb(model, X)[1] == 0


def test_values_that_are_not_finite_absorb_nothing():
    x = X.clone()
    x[0] = torch.inf
    module, _ = before(RewriteScalars, high(conv(3, 6), nn.ReLU(), point(6, 4)), x)
    config = QConfigMapping().set_global("per_tensor").resolved(get_backend("x86"))
    assert run(AbsorbBias(config, ((x,), {}), get_backend("x86").dictionary), module) == 0
    assert bool(bias(module, "seq_0").isfinite().all())


def test_the_users_model_is_left_alone():
    model = high(conv(3, 6), nn.ReLU(), point(6, 4))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    prepared = fxq.prepare(model, X, qconfig="per_tensor", calibration="advanced")
    assert prepared.plan.absorbed
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_saved_files_and_comparison_know_it(tmp_path):
    model = high(conv(3, 8), nn.ReLU(), point(8, 8), nn.ReLU(), point(8, 4))
    qmodel = fxq.quantize(model, [X], backend="qnnpack", qconfig="per_tensor", calibration="advanced")
    fxq.save(qmodel, tmp_path / "net.fxq")
    loaded = fxq.load(tmp_path / "net.fxq")
    assert reference_of(loaded).plan.absorbed == reference_of(qmodel).plan.absorbed != []
    records = {r["node"]: r for r in fxq.compare_records(model, loaded, [X])}
    assert min(r["own_sqnr"] for r in records.values()) > 25


@pytest.mark.parametrize("from_data", [True, False])
def test_biases_are_corrected_after_it(from_data):
    model = high(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), point(6, 4))
    prepared = fxq.prepare(model, X, qconfig="per_tensor", calibration="advanced")
    assert prepared.plan.absorbed
    fxq.calibrate(prepared, [X])
    reference = fxq.convert_to_reference(prepared)
    corrected = fxq.correct_bias(reference, prepared, [X] if from_data else None)
    expected = model(X)
    errors = [(qmodel(X) - expected).mean((0, 2, 3)).abs().max() for qmodel in (reference, corrected)]
    assert errors[1] <= errors[0] * 1.05
