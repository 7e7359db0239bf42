"""Smoothing leaves the float model as it is, evens out channels, and keeps away from what it cannot scale."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import Lambda, batches, before, graph_text, run, run_exactly
from torch import nn

import fxq
from fxq import presets
from fxq.config import QConfigMapping
from fxq.errors import CalibrationError
from fxq.numerics import sqnr
from fxq.passes.settle_smoothing import SettleSmoothing
from fxq.passes.smooth import Smooth
from fxq.plan import Fusion
from fxq.torchvision_ops import import_torchvision

C = 8
X = torch.randn(3, 5, C, generator=torch.Generator().manual_seed(5))
OUTLIERS = [1, 6]
UNEVEN = torch.tensor([1000.0, *[1.0] * (C - 1)])


def norm(**options) -> nn.LayerNorm:
    return nn.LayerNorm(C, **options)


def outlying(forward, **parts) -> nn.Module:
    """A model whose LayerNorms have two channels 40 times larger than the others."""
    model = Lambda(forward, **parts)
    for part in model.modules():
        if isinstance(part, nn.LayerNorm) and part.weight is not None:
            part.weight.data[..., OUTLIERS] *= 40
    return model


def smooth(model, x=X, **options):
    """The module after its first batch, and how many places were smoothed; outputs stay equal all the way."""
    module, step = before(Smooth, model, x, **options)
    run_exactly(step, module, x)
    return module, run_exactly(SettleSmoothing(step.ops), module, x)


def largest(module, name, x=X):
    """The largest absolute value of each channel of a node."""
    seen = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n):
            seen[n.name] = super().run_node(n)
            return seen[n.name]

    Watch(module).run(x)
    return seen[name].detach().abs().flatten(0, -2).amax(0)


def columns(module, *names):
    observers = [node.args[1] for node in module.graph.nodes if node.name in names]
    weights = [module.get_parameter(str(observer.args[0].target)) for observer in observers]
    return torch.stack([weight.detach().abs().amax(0) for weight in weights]).amax(0)


def several(m, x):
    x = m.n(x)
    return m.a(x) + m.b(x)


def shaped(m, x):
    x = m.n(x)
    return m.a(x), x.shape[1]


FIRES = {
    "one linear": (lambda m, x: m.a(m.n(x)), lambda: {"n": norm(), "a": nn.Linear(C, 4)}, ["a"]),
    "several": (several, lambda: {"n": norm(), "a": nn.Linear(C, 4), "b": nn.Linear(C, 4, bias=False)}, ["a", "b"]),
    "no bias": (lambda m, x: m.a(m.n(x)), lambda: {"n": norm(bias=False), "a": nn.Linear(C, 4)}, ["a"]),
    "first token": (lambda m, x: m.a(m.n(x)[:, 0]), lambda: {"n": norm(), "a": nn.Linear(C, 4)}, ["a"]),
    "flatten": (lambda m, x: m.a(m.n(x).flatten(0, 1)), lambda: {"n": norm(), "a": nn.Linear(C, 4)}, ["a"]),
    "reshape": (lambda m, x: m.a(m.n(x).reshape(x.size(0), -1, C)), lambda: {"n": norm(), "a": nn.Linear(C, 4)}, ["a"]),
    "view": (lambda m, x: m.a(m.n(x).contiguous().view(-1, C)), lambda: {"n": norm(), "a": nn.Linear(C, 4)}, ["a"]),
    "transpose": (lambda m, x: m.a(m.n(x).transpose(0, 1)), lambda: {"n": norm(), "a": nn.Linear(C, 4)}, ["a"]),
    "its shape": (shaped, lambda: {"n": norm(), "a": nn.Linear(C, 4)}, ["a"]),
    "dropout": (lambda m, x: m.a(m.d(m.n(x))), lambda: {"n": norm(), "d": nn.Dropout(), "a": nn.Linear(C, 4)}, ["a"]),
}


@pytest.mark.parametrize("name", FIRES)
def test_the_float_model_stays_what_it_is(name):
    forward, parts, linears = FIRES[name]
    module, count = smooth(outlying(forward, **parts()))
    assert count == 1
    assert [fusion.into for fusion in module.plan.fusions if fusion.action == "smooth"] == linears


def test_channels_and_columns_get_the_same_ranges():
    """``sqrt(max|X| max|W|)`` of both, but for one factor that all channels have in common."""
    forward, parts, linears = FIRES["several"]
    model = outlying(forward, **parts())
    unchanged, _ = before(Smooth, model, X)
    module, _ = smooth(model)
    x, w = largest(unchanged, "n"), columns(unchanged, *linears)
    assert x.max() > 10 * x.median() and w.max() < 2 * w.median()
    for found in (largest(module, "n"), columns(module, *linears)):
        ratio = found / (x * w).sqrt()
        torch.testing.assert_close(ratio, ratio[:1].expand(C), rtol=1e-4, atol=0)
    scale = torch.tensor(module.plan.equalized[0].scale)
    assert float(scale.log().mean()) == pytest.approx(0, abs=1e-6)
    assert module.plan.fusions[-1] == Fusion("smooth", "n", "b", f"channels divided by {scale.min():.2g} to "
                                                                f"{scale.max():.2g}")  # fmt: skip


def tied(m, x):
    return F.linear(m.n(m.e(x[..., 0].long().clamp(0, 3))), m.e.weight)


def residual(m, x):
    x = m.n(x)
    return m.a(x) + x


def both(m, x):
    return m.a(m.n(x)) + m.b(m.n(torch.relu(x)))


REFUSED = {
    "no weight": (
        lambda m, x: m.a(m.n(x * m.k)),
        lambda: {"n": norm(elementwise_affine=False), "k": UNEVEN, "a": nn.Linear(C, 4)},
    ),
    "residual": (residual, lambda: {"n": norm(), "a": nn.Linear(C, C)}),
    "another op": (lambda m, x: m.a(torch.relu(m.n(x))), lambda: {"n": norm(), "a": nn.Linear(C, 4)}),
    "output": (lambda m, x: (m.n(x), m.a(x)), lambda: {"n": norm(), "a": nn.Linear(C, 4)}),
    "nothing reads it": (lambda m, x: m.a(x) + m.n(x).shape[0], lambda: {"n": norm(), "a": nn.Linear(C, 4)}),
    "flattened": (lambda m, x: m.a(m.n(x).flatten(1)), lambda: {"n": norm(), "a": nn.Linear(5 * C, 4)}),
    "transposed": (lambda m, x: m.a(m.n(x).transpose(1, 2)), lambda: {"n": norm(), "a": nn.Linear(5, 4)}),
    "split": (lambda m, x: m.a(m.n(x).reshape(3, 10, C // 2)), lambda: {"n": norm(), "a": nn.Linear(C // 2, 4)}),
    "picked": (lambda m, x: m.a(m.n(x)[..., [1, 0]]), lambda: {"n": norm(), "a": nn.Linear(2, 4)}),
    "part of the channels": (lambda m, x: m.a(m.n(x)[:, :, 4:]), lambda: {"n": norm(), "a": nn.Linear(4, 4)}),
    "two axes": (lambda m, x: m.a(m.n(x)), lambda: {"n": nn.LayerNorm((5, C)), "a": nn.Linear(C, 4)}),
    "weight at run time": (lambda m, x: F.linear(m.n(x), m.a(x[0])), lambda: {"n": norm(), "a": nn.Linear(C, C)}),
    "norm called twice": (both, lambda: {"n": norm(), "a": nn.Linear(C, 4), "b": nn.Linear(C, 4)}),
    "linear called twice": (lambda m, x: m.a(m.n(x)) + m.a(x), lambda: {"n": norm(), "a": nn.Linear(C, 4)}),
    "tied to an embedding": (tied, lambda: {"n": norm(), "e": nn.Embedding(4, C)}),
    "read as a weight too": (lambda m, x: F.linear(m.n(x[0]), m.n(x[0])), lambda: {"n": norm()}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_scaled_is_left_alone(name):
    forward, parts = REFUSED[name]
    module, step = before(Smooth, outlying(forward, **parts()), X)
    text, weights = graph_text(module), {path: value.clone() for path, value in module.named_parameters()}
    assert run(step, module) == 0
    assert graph_text(module) == text
    assert all(torch.equal(value, weights[path]) for path, value in module.named_parameters())
    assert not module.plan.smoothings and not module.plan.equalized
    assert not [fusion for fusion in module.plan.fusions if fusion.action == "smooth"]


def test_channels_that_differ_little_are_left_alone():
    forward, parts, _ = FIRES["one linear"]
    assert smooth(Lambda(forward, **parts()))[1] == 0


@pytest.mark.parametrize("excluded", ["a", "b"])
def test_readers_that_stay_float_are_left_alone(excluded):
    forward, parts, _ = FIRES["several"]
    assert smooth(outlying(forward, **parts()), exclude=[excluded])[1] == 0
    mapping = QConfigMapping().set_module_name(excluded, None)
    assert smooth(outlying(forward, **parts()), qconfig=mapping)[1] == 0


def test_a_first_batch_that_tells_nothing_is_passed_by():
    model = outlying(lambda m, x: m.a(m.n(x)), n=norm(bias=False), a=nn.Linear(C, 4))
    module, step = before(Smooth, model, X)
    run(step, module)
    smoothing = module.get_submodule(module.plan.smoothings["n"].path)
    for silent in (torch.zeros(2, 3, C), torch.zeros(0, 3, C)):
        module(silent)
        assert not smoothing.decided
    with pytest.raises(CalibrationError, match="NaN"):
        module(torch.full((2, 3, C), float("nan")))
    assert not smoothing.decided
    module(X)
    assert smoothing.decided and run(SettleSmoothing(step.ops), module) == 1


def test_observers_see_the_first_batch_smoothed():
    """All that is observed is what a model sees that was smoothed before: its example inputs are the same."""
    forward, parts, _ = FIRES["several"]
    for model in (outlying(forward, **parts()).eval(), Attention().eval()):
        prepared = fxq.prepare(model, X)
        fxq.calibrate(prepared, [X], progress=False)
        smoothed = copy.deepcopy(prepared)
        names = [name for name in prepared.plan.observers.values() if prepared.get_submodule(name).enabled]
        for name in names:
            smoothed.get_submodule(name).reset()
        fxq.calibrate(smoothed, [X], progress=False)  # decided already
        for name in names:
            once, again = (module.get_submodule(name).range() for module in (prepared, smoothed))
            torch.testing.assert_close(once, again, rtol=1e-4, atol=1e-5)


def test_weights_are_observed_as_they_are_smoothed():
    model = outlying(lambda m, x: m.a(m.n(x)), n=norm(), a=nn.Linear(C, 4)).eval()
    weight = model.a.weight.detach().clone()
    prepared = fxq.prepare(model, X)
    fxq.calibrate(prepared, [X], progress=False)
    reference = fxq.convert_to_reference(prepared)
    scale = torch.tensor(reference.plan.equalized[0].scale)
    expected = (weight * scale).abs().amax(1) / 127
    torch.testing.assert_close(reference.get_buffer("a.weight_scale"), expected, rtol=1e-2, atol=0)
    assert torch.equal(fxq.convert_to_reference(prepared)(X), reference(X)), "converting changes nothing"


def test_a_prepared_model_keeps_what_was_decided():
    model = outlying(lambda m, x: m.a(m.n(x)), n=norm(), a=nn.Linear(C, 4)).eval()
    prepared, other = fxq.prepare(model, X), fxq.prepare(model, X)
    fxq.calibrate(prepared, [X], progress=False)
    other.load_state_dict(prepared.state_dict())
    for again in (other, copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        converted = fxq.convert(again)
        assert torch.equal(converted(X), fxq.convert(prepared)(X))
        assert "smooth" in str(fxq.fusion_table(converted))
    assert torch.equal(model.a.weight, prepared.get_parameter("a.weight")) is False


class Tied(nn.Module):
    """Reads one weight in two parts and beside them, and cannot be traced as a whole."""

    class Part(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.norm_weight, self.weight = nn.Parameter(UNEVEN.clone()), weight

        def forward(self, x):
            return F.linear(F.layer_norm(x, (C,), self.norm_weight), self.weight)

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(C, C, generator=torch.Generator().manual_seed(6)))
        self.first, self.second = self.Part(self.weight), self.Part(self.weight)

    def forward(self, x):
        x = self.first(x)
        return self.second(x @ self.weight if x.sum() < 1e9 else x)


def test_a_weight_that_others_read_stays_theirs():
    model = Tied().eval()
    expected = model(X)
    prepared = fxq.prepare(model, X)
    fxq.calibrate(prepared, [X], progress=False)
    reference = fxq.convert_to_reference(prepared)
    assert all(region.plan.equalized for region in (reference.first, reference.second))
    torch.testing.assert_close(prepared(X), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_zero_channels_get_no_factor():
    model = outlying(lambda m, x: m.a(m.n(x)), n=norm(bias=False), a=nn.Linear(C, 4))
    model.n.weight.data[2] = 0
    model.a.weight.data[:, 3] = 0
    module, count = smooth(model)
    scale = torch.tensor(module.plan.equalized[0].scale)
    assert count == 1 and scale.isfinite().all()
    assert scale[[2, 3]].tolist() == [1, 1] and not (scale == 1)[[0, 1, 4, 5, 6, 7]].any()


def test_factors_are_bounded():
    model = outlying(lambda m, x: m.a(m.n(x)), n=norm(bias=False), a=nn.Linear(C, 4))
    model.a.weight.data[:, 0] *= 1e-9
    module, _ = smooth(model)
    assert max(module.plan.equalized[0].scale) == pytest.approx(100)


class Attention(nn.Module):
    """Self-attention whose projection of the values has two channels far larger than the others."""

    def __init__(self, need_weights=False, **options):
        super().__init__()
        self.need_weights = need_weights
        self.attention = nn.MultiheadAttention(C, 2, batch_first=True, **options)
        self.attention.in_proj_weight.data[2 * C :][OUTLIERS] *= 40
        self.attention.in_proj_bias.data[2 * C :].normal_() if self.attention.in_proj_bias is not None else None

    def forward(self, x):
        out, weights = self.attention(x, x, x, need_weights=self.need_weights)
        return (out, weights) if self.need_weights else out


@pytest.mark.parametrize("options", [{}, {"need_weights": True}, {"bias": False}], ids=str)
def test_the_projections_of_values_and_output_of_an_attention(options):
    module, count = smooth(Attention(**options).eval())
    assert count == 1
    assert [pair[:2] for pair in module.plan.equalized] == [("attention_v", "attention_out")]
    values = largest(module, "attention_v")
    assert values.max() < 8 * values.median()


def test_the_users_model_is_not_modified():
    for make in (Attention, lambda: outlying(several, **FIRES["several"][1]())):
        model = make().eval()
        before_ = {name: value.clone() for name, value in model.state_dict().items()}
        qmodel = fxq.quantize(model, [X], progress=False)
        assert "smooth" in str(fxq.fusion_table(qmodel))
        assert all(torch.equal(value, before_[name]) for name, value in model.state_dict().items())


@cache
def vision_transformer() -> nn.Module:
    """One of ordinary function, but with outlier channels: what LayerNorms gain, the linears after them lose."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    model = import_torchvision().models.VisionTransformer(32, 8, 6, 4, 64, 256).eval()
    nn.init.normal_(model.heads.head.weight, std=0.1)
    for block in model.encoder.layers:
        for norm_, weight in ((block.ln_1, block.self_attention.in_proj_weight), (block.ln_2, block.mlp[0].weight)):
            channels = torch.randperm(64, generator=generator)[:4]
            factors = 20 + 40 * torch.rand(4, generator=generator)
            norm_.weight.data[channels] *= factors
            norm_.bias.data[channels] *= factors
            weight.data[:, channels] /= factors
    return model


@pytest.mark.parametrize("backend", ["x86", "qnnpack"])
def test_a_vision_transformer_with_outlier_channels(backend, monkeypatch):
    model, data = vision_transformer(), batches((8, 3, 32, 32), 2)
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    found = {}
    for on in (False, True):
        preset = dataclasses.replace(presets.PRESETS["default"], smooth=on)
        monkeypatch.setattr(presets, "PRESETS", {"default": preset})
        qmodel = fxq.quantize(model, data, backend=backend, progress=False)
        found[on] = sqnr(model(x).detach(), qmodel(x))
        assert str(fxq.fusion_table(qmodel)).count("smooth") == on * 6 * 4
    assert found[True] > found[False] + 10


def test_comparison_and_files(tmp_path):
    model, data = vision_transformer(), batches((4, 3, 32, 32), 1)
    qmodel = fxq.quantize(model, data, progress=False)
    records = fxq.compare_records(model, qmodel, data)
    assert min(record["own_sqnr"] for record in records[:-1]) > 20
    fxq.save(qmodel, tmp_path / "net.fxq")
    loaded = fxq.load(tmp_path / "net.fxq")
    assert torch.equal(loaded(data[0]), qmodel(data[0]))
    assert fxq.compare_records(model, loaded, data) == records
