"""Presets on the one call and in steps: observers, corrections, powers of two, data that can be read once."""

from __future__ import annotations

import math

import pytest
import torch
from models_for_tests import Lambda, conv
from torch import nn

import fxq
from fxq.backends import get_backend
from fxq.config import QConfigMapping, named_qconfig
from fxq.errors import ConfigError
from fxq.numerics import sqnr
from fxq.partition import reference_of, regions_of
from fxq.plan import Slot
from fxq.presets import PRESETS, get_preset

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(7))
DATA = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def net() -> nn.Module:
    return Lambda(
        lambda m, x: m.fc(torch.relu(m.b(torch.relu(m.n(m.a(x))))).mean((2, 3))),
        a=conv(3, 8), n=nn.BatchNorm2d(8), b=conv(8, 8, groups=8), fc=nn.Linear(8, 5),
    )  # fmt: skip


@pytest.mark.parametrize("qconfig", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_quantizes_what_can_be_read_once(name, qconfig):
    model = net()
    qmodel = fxq.quantize(model, iter(DATA), calibration=name, qconfig=qconfig)
    assert sqnr(model(X).detach(), qmodel(X)) > 20
    notes = str(fxq.summary(qmodel))
    assert ("for the rounding of their weights" in notes) == (name != "simple")
    assert ("what else shifts" in notes) == (name in ("default", "advanced"))
    assert ("roundings learned" in notes) == (name == "max")
    assert ("equalize" in str(fxq.fusion_table(qmodel))) == (name in ("advanced", "max") and qconfig == "per_tensor")


@pytest.mark.parametrize(("name", "observers"), [("simple", {"minmax"}), ("advanced", {"histogram", "mse"})])
def test_observers_of_named_qconfigs(name, observers):
    prepared = fxq.prepare(net(), X, calibration=name)
    assert {spec.observer for spec in prepared.plan.specs.values()} == observers
    prepared = fxq.prepare(net(), X, calibration=name, qconfig="per_tensor")
    assert prepared.plan.specs[Slot("fc", (1,))].observer == "minmax"  # clipping for all channels at once does harm
    assert prepared.plan.specs[Slot("fc")].observer == PRESETS[name].activation


def test_default_is_what_the_backend_recommends():
    for name in ("per_channel", "per_tensor"):
        backend = get_backend("x86")
        assert get_preset("default").qconfig(name, backend) == named_qconfig(name, backend)
    model = net()
    same = [fxq.quantize(model, DATA, **options)(X) for options in ({}, {"calibration": "default"})]
    assert torch.equal(*same)


def test_a_qconfig_of_the_users_own_keeps_its_observers():
    own = named_qconfig("per_channel", get_backend("x86"))
    own = fxq.QConfig(activation=own.activation.replace(observer="percentile:99.9"), weight=own.weight)
    prepared = fxq.prepare(net(), X, calibration="advanced", qconfig=own)
    assert {spec.observer for spec in prepared.plan.specs.values()} == {"percentile:99.9", "minmax"}
    mapping = QConfigMapping().set_global(own).set_module_name("fc", "per_channel")
    prepared = fxq.prepare(net(), X, calibration="advanced", qconfig=mapping)
    assert prepared.plan.specs[Slot("fc", (1,))].observer == "mse"


@pytest.mark.parametrize("name", PRESETS)
def test_scales_that_are_powers_of_two(name):
    qmodel = fxq.quantize(net(), DATA, calibration=name, pow2_scales=True)
    reference = reference_of(qmodel)
    scales = [value for name, value in reference.state_dict().items() if name.endswith("_scale")]
    numbers = [node.args[1] for node in reference.graph.nodes if "quantize" in str(node.target)]
    found = torch.cat([*scales, torch.tensor([n for n in numbers if isinstance(n, float)])])
    assert len(found) > 20
    assert all(math.frexp(scale)[0] == 0.5 for scale in found.tolist())


@pytest.mark.parametrize("name", ["default", "advanced"])
def test_steps_give_what_the_one_call_gives(name):
    model, data = net(), [batch[:4] for batch in DATA]
    once = fxq.quantize(model, data, calibration=name, qconfig="per_tensor")
    prepared = fxq.prepare(model, data[0], calibration=name, qconfig="per_tensor")
    fxq.calibrate(prepared, data)
    samples = 4 if name == "default" else 64  # one batch: a quarter of this model's bytes is not much
    reference = fxq.correct_bias(fxq.convert_to_reference(prepared), prepared, data, samples=samples)
    assert torch.equal(fxq.lower(reference, "x86")(X), once(X))


def test_models_in_regions():
    model = Loops().eval()
    qmodel = fxq.quantize(model, DATA, calibration="max", qconfig="per_tensor")
    assert sqnr(model(X)[0].detach(), qmodel(X)[0]) > 20
    assert "roundings learned" in regions_of(qmodel)["body"].plan.notes[-1]


def test_saved_and_loaded(tmp_path):
    qmodel = fxq.quantize(net(), DATA, calibration="max", qconfig="per_tensor")
    fxq.save(qmodel, tmp_path / "net.fxq")
    assert torch.equal(fxq.load(tmp_path / "net.fxq")(X), qmodel(X))


def test_with_a_budget():
    qmodel = fxq.quantize(net(), DATA, calibration="advanced", target="sqnr:10")
    assert "biases corrected" in str(fxq.summary(qmodel))


def test_a_budget_is_judged_with_corrected_biases():
    """The biases repair the model, so that no layer has to stay float; what is noted is what comes out."""
    model, seen = net(), []
    expected = model(X).detach()

    def metric(candidate):
        seen.append(-(candidate(X) - expected).mean(0).abs().max().item())
        return seen[-1]

    weight = get_backend("qnnpack").weight.replace(quant_min=-3, quant_max=3, ch_axis=None)
    qconfig = fxq.QConfig(activation=get_backend("qnnpack").activation, weight=weight)
    options = {"qconfig": qconfig, "backend": "qnnpack"}
    plain, corrected = (
        metric(fxq.quantize(model, [X], calibration=name, **options)) for name in ("simple", "advanced")
    )
    assert corrected > plain
    for name in ("advanced", "max"):
        limit = -(corrected + plain) / 2 if name == "advanced" else -corrected * 1.01
        seen.clear()
        qmodel = fxq.quantize(model, [X], calibration=name, metric=metric, max_drop=limit, **options)
        assert "no layer had to stay float" in fxq.summary(qmodel)
        if name == "advanced":
            assert seen == [0, corrected] and metric(qmodel) == corrected
        else:
            assert seen[1] == corrected and len(seen) == 3 and metric(qmodel) >= -limit
            assert "with learned roundings metric" in " ".join(fxq.summary(qmodel).split())


def test_learned_roundings_that_miss_the_budget_are_not_used(monkeypatch):
    def harmful(reference, prepared, data, **options):
        found = fxq.correct_bias(reference, prepared, data, **options)
        for name, value in found.named_parameters():
            if name.endswith("bias"):
                value.data += 1
        return found

    monkeypatch.setattr("fxq.api.learn_rounding", harmful)
    model = net()
    qmodel = fxq.quantize(model, DATA, calibration="max", target="sqnr:20")
    assert sqnr(model(X).detach(), qmodel(X)) > 20
    assert "too low, so they are not used" in " ".join(fxq.summary(qmodel).split())


class Loops(nn.Module):
    """Cannot be traced as a whole."""

    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, x):
        return [self.body(x)] if bool(x.mean() > -9) else []


class Sixteen(nn.Module):
    """Takes one image, whose channels are no samples."""

    def __init__(self):
        super().__init__()
        self.conv = conv(16, 4)

    def forward(self, x):
        return self.conv(x.view(1, 16, 8, 8))


def notes_of(qmodel: nn.Module) -> str:
    return " ".join(note for region in regions_of(qmodel).values() for note in region.plan.notes)


def test_default_corrects_models_of_one_graph_from_few_samples():
    assert "shifts their outputs, from 8 samples" in notes_of(fxq.quantize(net(), DATA))
    assert "what else shifts" not in notes_of(fxq.quantize(Loops().eval(), DATA))
    assert "what else shifts" in notes_of(fxq.quantize(Loops().eval(), DATA, calibration="advanced"))


@pytest.mark.parametrize("name", ["default", "advanced"])
def test_models_that_do_not_run_on_a_part_of_a_batch(name):
    model, x = Sixteen().eval(), torch.randn(16, 8, 8)
    qmodel = fxq.quantize(model, [x], calibration=name)
    assert "not corrected from data, because the model fails on a part of a batch" in fxq.summary(qmodel)
    assert sqnr(model(x).detach(), qmodel(x)) > 20


def test_default_with_a_budget_corrects_biases_too():
    qmodel = fxq.quantize(net(), DATA, target="sqnr:10")
    assert "what else shifts" in notes_of(qmodel)


@pytest.mark.parametrize("call", [fxq.quantize, fxq.prepare])
def test_unknown_names(call):
    with pytest.raises(ConfigError, match=r"unknown calibration 'best'.*simple, default, advanced, max"):
        call(net(), DATA if call is fxq.quantize else X, calibration="best")


def test_all_is_documented():
    assert all(preset.text for preset in PRESETS.values())
