"""Training with fake quantization: the model before, the int8 model after, and all that a training needs."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import Lambda, Two, same
from torch import nn

import fxq
from fxq.agreement import kernel_agreement
from fxq.backends import get_backend
from fxq.errors import CalibrationError, ConfigError, FxqWarning, StageError
from fxq.fake_quantize import fake_quantizes
from fxq.partition import regions_of
from fxq.pass_base import Pipeline
from fxq.passes import to_reference
from fxq.passes.round_biases import RoundBiases
from fxq.plan import Stage
from fxq.torchvision_ops import import_torchvision

X = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """conv-bn-relu6, a residual block, dropout, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(self.norm(self.conv(x)) + x)
        x = F.dropout(F.adaptive_avg_pool2d(x, 1).flatten(1), 0.2, self.training)
        return self.fc(self.drop(x))


def trained(model: nn.Module, *inputs: torch.Tensor, steps: int = 3, **options: object) -> fxq.graph_module.QuantModule:
    prepared = fxq.prepare_qat(model.train(), inputs, **options)
    optimizer = torch.optim.SGD(prepared.parameters(), 0.05)
    for _ in range(steps):
        step(prepared, optimizer, *inputs)
    return prepared


def step(model: nn.Module, optimizer: torch.optim.Optimizer, *inputs: torch.Tensor) -> None:
    optimizer.zero_grad()
    out = model(*inputs)
    for part in ((out,) if isinstance(out, torch.Tensor) else out.values()):
        (part - 0.2).square().mean().backward(retain_graph=True)
    optimizer.step()


def in_steps(difference: torch.Tensor, fake: object) -> torch.Tensor:
    return difference.abs() / fake.qparams().scale.max()


# --- the prepared model ---------------------------------------------------------------------------------------------


def test_it_is_a_copy_with_the_models_names_and_mode():
    model = Net().train()
    before = copy.deepcopy(model.state_dict())
    prepared = fxq.prepare_qat(model, X)
    assert [name for name, _ in prepared.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert set(before) <= set(prepared.state_dict())
    prepared(X).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules()) and prepared.training
    assert all(parameter.grad is not None for parameter in prepared.parameters())


def test_without_rounding_it_is_the_model_in_both_modes():
    model = Net()
    prepared = fxq.prepare_qat(model, X)
    fxq.disable_fake_quant(prepared)
    for mode in (True, False):
        torch.manual_seed(0)
        expected = model.train(mode)(X)
        torch.manual_seed(0)
        same(prepared.train(mode)(X), expected, 1e-4)


def test_dropout_and_stochastic_depth_follow_the_mode_and_go():
    import_torchvision()
    from torchvision.ops import StochasticDepth

    model = Lambda(
        lambda m, x: m.conv(x) + m.depth(m.conv(m.drop(x))),
        conv=nn.Conv2d(3, 3, 1), drop=nn.Dropout(0.5), depth=StochasticDepth(0.5, "row"),
    ).train()  # fmt: skip
    prepared = trained(model, X)
    assert not torch.equal(prepared(X), prepared(X))
    prepared.eval()
    assert torch.equal(prepared(X), prepared(X))
    reference = fxq.convert_to_reference(prepared)
    same(reference(X), prepared(X), 1e-5)
    names = [str(node.target) for node in reference.graph.nodes]
    assert not [name for name in names if "dropout" in name or "stochastic" in name]
    assert not [line for line in fxq.graph_records(fxq.convert(prepared)) if line["type"] == "float"]


def test_a_branch_on_the_mode_is_said():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            y = self.conv(x)
            return (y, x) if self.training else y

    model = Branching().train()
    with pytest.warns(FxqWarning, match=r"test_qat.py:\d+: return \(y, x\) if self.training.*not trained"):
        prepared = fxq.prepare_qat(model, X)
    assert isinstance(prepared(X), torch.Tensor) and isinstance(model(X), tuple)


@pytest.mark.parametrize("backend", ["x86", "qnnpack"])
def test_the_int8_model_computes_what_was_trained(backend):
    prepared = trained(Net(), X, backend=backend)
    expected = prepared.eval()(X)
    reference = fxq.convert_to_reference(prepared)
    output = fake_quantizes(prepared)[-1]
    assert in_steps(reference(X) - expected, output).max() < 1.01
    lines = kernel_agreement(reference, get_backend(backend), X)
    assert max(line.max_lsb for line in lines) <= 1
    qmodel = fxq.convert(prepared)
    assert not [line for line in fxq.graph_records(qmodel) if line["type"] == "float"]
    assert in_steps(qmodel(X) - expected, output).max() <= 2.01


def test_ops_with_grids_of_their_own():
    """Grids that kernels dictate, shared grids, and values computed anew inside a grid."""
    model = Lambda(
        lambda m, x: torch.cat([torch.sigmoid(m.a(x)), F.avg_pool2d(F.hardswish(m.b(x)), 3, 1, 1), m.a(x)], 1) * 0.5,
        a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1),
    )  # fmt: skip
    prepared = trained(model, X)
    assert [fake.qparams().item() for fake in fake_quantizes(prepared) if fake.fixed] == [(1 / 256, 0)]
    expected = prepared.eval()(X)
    same(fxq.convert_to_reference(prepared)(X), expected, 1e-5)
    assert in_steps(fxq.convert(prepared)(X) - expected, fake_quantizes(prepared)[-1]).max() <= 2.01


def test_converting_does_not_disturb_training():
    torch.manual_seed(0)
    model = Net()
    results = []
    for convert in (False, True):
        torch.manual_seed(1)
        prepared = fxq.prepare_qat(model.train(), X)
        optimizer = torch.optim.SGD(prepared.parameters(), 0.05, momentum=0.9)
        for _ in range(3):
            step(prepared, optimizer, X)
            if convert:
                fxq.convert(prepared)(X)
                assert prepared.training
        results.append(prepared.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_containers_keywords_and_two_inputs():
    model = Two(lambda m, x, y: {"sum": m.a(x) + m.b(y), "first": m.a(x)}, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1))
    prepared = trained(model, X, X.flip(3))
    out = fxq.convert(prepared)(x=X, y=X)
    assert set(out) == {"sum", "first"}
    same(fxq.convert_to_reference(prepared)(X, X)["sum"], prepared.eval()(X, X)["sum"], 1e-5)


def test_parameters_as_operands_are_trained():
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.shift = nn.Parameter(torch.rand(1, 4, 1, 1))
            self.mask = nn.Parameter(torch.rand(4, 3, 1, 1))

        def forward(self, x):
            return self.conv(x) + self.shift + F.conv2d(x, self.conv.weight * self.mask)

    prepared = trained(Shifted(), X)
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in prepared.parameters())
    same(fxq.convert_to_reference(prepared)(X), prepared.eval()(X), 1e-5)


# --- what a training needs ------------------------------------------------------------------------------------------


def test_training_resumes_from_a_checkpoint():
    torch.manual_seed(0)
    model = Net()
    model.drop.p = 0.0
    prepared = trained(model, X, steps=2)
    fxq.freeze_batchnorm(prepared)
    fxq.freeze_observers(prepared)
    optimizer = torch.optim.Adam(prepared.parameters(), 0.01)
    step(prepared, optimizer, X)
    file = io.BytesIO()
    torch.save({"model": prepared.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = fxq.prepare_qat(model, X)
    resumed.load_state_dict(state["model"])
    again = torch.optim.Adam(resumed.parameters(), 0.01)
    again.load_state_dict(state["optimizer"])
    for seed in range(2):
        for one, its in ((prepared, optimizer), (resumed, again)):
            torch.manual_seed(seed)
            step(one, its, 2 * X)
    expected = prepared.state_dict()
    for key, value in resumed.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_a_float_checkpoint_goes_in():
    model, other = Net(), Net()
    prepared = fxq.prepare_qat(model, X)
    missing, unexpected = prepared.load_state_dict(other.state_dict(), strict=False)
    assert not unexpected and all("observer" in name or "_extra_state" in name for name in missing)
    fxq.disable_fake_quant(prepared)
    same(prepared.eval()(X), other.eval()(X), 1e-5)


def test_copies_and_averages():
    prepared = trained(Net(), X)
    average = torch.optim.swa_utils.AveragedModel(
        prepared, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    optimizer = torch.optim.SGD(prepared.parameters(), 0.05)
    for _ in range(3):
        step(prepared, optimizer, X)
        average.update_parameters(prepared)
    ema = average.module
    assert ema.get_parameter("fc.weight") is not prepared.get_parameter("fc.weight")
    same(fxq.convert_to_reference(ema)(X), ema.eval()(X), 1e-5)
    assert copy.deepcopy(prepared).training


def test_other_precisions_and_autocast():
    prepared = fxq.prepare_qat(Net().train(), X)
    double = copy.deepcopy(prepared).double()
    assert double(X.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        out = prepared(X)
    out.float().sum().backward()
    assert bool(prepared.get_parameter("stem.0.weight").grad.isfinite().all())
    assert bool(fxq.convert(double)(X).isfinite().all()) and double(X.double()).dtype == torch.float64


def test_parameter_groups_and_frozen_parameters():
    model = Net()
    model.stem.requires_grad_(False)
    prepared = fxq.prepare_qat(model.train(), X)
    trainable = [name for name, parameter in prepared.named_parameters() if parameter.requires_grad]
    assert trainable == [name for name, _ in model.named_parameters() if not name.startswith("stem")]


# --- switches -------------------------------------------------------------------------------------------------------


def test_fake_quantization_of_weights_and_activations_apart():
    model = Lambda(lambda m, x: m.fc(x), fc=nn.Linear(3, 4))
    x = torch.randn(5, 3)
    coarse = get_backend("x86").weight.replace(quant_min=-2, quant_max=1, ch_axis=None)
    config = fxq.QConfig(activation=get_backend("x86").activation.replace(observer="minmax"), weight=coarse)
    prepared = trained(model, x, steps=1, qconfig=config)

    def error(one: nn.Module) -> float:
        with torch.no_grad():
            return F.mse_loss(one(x), F.linear(x, one.get_parameter("fc.weight"), one.get_parameter("fc.bias"))).item()

    effects = fxq.fake_quant_effects(prepared, error)
    assert list(effects) == ["float", "weights", "activations", "weights and activations"]
    assert effects["float"] == 0 < effects["activations"] < effects["weights"] / 10
    assert prepared.training and all(fake.quantizing for fake in fake_quantizes(prepared))
    fxq.disable_fake_quant(prepared, activations=False)
    assert error(prepared.eval()) == pytest.approx(effects["activations"])
    fxq.enable_fake_quant(prepared)
    fxq.disable_fake_quant(prepared, weights=False)
    assert error(prepared) == pytest.approx(effects["weights"])


def test_observers_apart():
    prepared = trained(Net(), X)
    fxq.disable_observers(prepared, weights=False)
    counts = {fake.where: fake.batches for fake in fake_quantizes(prepared)}
    prepared(X)
    moved = {fake.where: fake.batches - counts[fake.where] for fake in fake_quantizes(prepared)}
    assert {fake.weight for fake in fake_quantizes(prepared) if moved[fake.where]} == {True}
    fxq.freeze_observers(prepared)
    assert not any(fake.observing for fake in fake_quantizes(prepared))
    fxq.enable_observers(prepared, weights=False)
    assert {fake.weight for fake in fake_quantizes(prepared) if fake.observing} == {False}


def test_calibrating_it_is_post_training_quantization(monkeypatch):
    """The same ranges from the same observers, so the same int8 model; without corrections, which training makes."""
    torch.manual_seed(0)
    model = Net().eval()
    batches = [torch.randn(4, 3, 16, 16) for _ in range(3)]
    activation, weight = get_backend("x86").activation, get_backend("x86").weight
    config = fxq.QConfig(activation=activation.replace(observer="minmax"), weight=weight)
    prepared = fxq.prepare_qat(model, X, qconfig=config)
    before = {name: value.clone() for name, value in prepared.named_buffers() if "running" in name}
    fxq.calibrate(prepared.train(), batches)
    assert prepared.training
    assert all(torch.equal(prepared.get_buffer(name), value) for name, value in before.items())
    monkeypatch.setattr(to_reference, "align_scales", lambda *_: None)  # training's scales stay as trained
    expected = fxq.quantize(model, batches, qconfig=config, calibration="simple")
    reference = fxq.convert_to_reference(prepared)
    Pipeline([RoundBiases()])(reference)  # training's biases stay as trained
    same(fxq.lower(reference, "x86")(X), expected(X), 1e-6)


def test_a_schedule_freezes_by_step():
    prepared = fxq.prepare_qat(Net().train(), X)
    schedule = fxq.QATSchedule(freeze_observers_at=2, freeze_batchnorm_at=3)

    def state() -> tuple[bool, bool]:
        return fake_quantizes(prepared)[0].observing, prepared.get_submodule("norm").frozen

    seen = []
    for _ in range(2):
        schedule.step(prepared)
        seen.append(state())
    resumed = fxq.QATSchedule(freeze_observers_at=2, freeze_batchnorm_at=3)
    resumed.load_state_dict(schedule.state_dict())
    resumed.step(nn.Sequential(prepared))  # a wrapper will do
    assert [*seen, state()] == [(True, False), (False, False), (False, True)]
    with pytest.raises(ConfigError, match="freeze_batchnorm_at=0"):
        fxq.QATSchedule(freeze_batchnorm_at=0)


def test_learned_scales_train_with_the_weights():
    prepared = trained(Net(), X, learn_scales=True)
    steps = {name: parameter for name, parameter in prepared.named_parameters() if name.endswith(".step")}
    assert len(steps) == len([fake for fake in fake_quantizes(prepared) if fake.learns])
    assert all(bool((parameter.grad != 0).any()) for parameter in steps.values())
    fresh = fxq.prepare_qat(Net().train(), X, learn_scales=True)
    fresh.load_state_dict(prepared.state_dict())
    expected = prepared.eval()(X)
    same(fresh.eval()(X), expected, 1e-6)
    same(fxq.convert_to_reference(prepared)(X), expected, 1e-5)


def test_power_of_two_scales_are_trained():
    specs = get_backend("x86")
    config = fxq.QConfig(
        activation=specs.activation.replace(pow2_scale=True, observer="lsq"),
        weight=specs.weight.replace(pow2_scale=True, observer="lsq"),
    )
    prepared = trained(Net(), X, qconfig=config)
    learned = [fake for fake in fake_quantizes(prepared) if fake.learns]
    assert learned and all(bool((fake.qparams().scale.log2().frac() == 0).all()) for fake in learned)
    assert all(bool((fake.step.grad != 0).any()) for fake in learned)
    same(fxq.convert_to_reference(prepared)(X), prepared.eval()(X), 1e-5)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_trained_is_refused():
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))
    with pytest.raises(ConfigError, match=r"weight of '0' is computed by a parametrization.*remove"):
        fxq.prepare_qat(nn.Sequential(normed), X)
    with pytest.raises(ConfigError, match=r"'1' is a SyncBatchNorm"):
        fxq.prepare_qat(nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4)), X)
    with pytest.raises(ConfigError, match="'histogram' cannot follow a model in training"):
        activation, weight = get_backend("x86").activation, get_backend("x86").weight
        fxq.prepare_qat(Net(), X, qconfig=fxq.QConfig(activation=activation, weight=weight))
    with pytest.raises(ConfigError, match="'nothing' matches nothing"):
        fxq.prepare_qat(Net(), X, exclude="nothing")
    with pytest.raises(StageError, match="takes the float model"):
        fxq.prepare_qat(fxq.prepare_qat(Net(), X), X)


def test_switches_of_other_models_are_refused():
    for switch in (fxq.freeze_batchnorm, fxq.freeze_observers, fxq.enable_observers, fxq.disable_fake_quant):
        with pytest.raises(StageError, match="prepared for training"):
            switch(Net())
    with pytest.raises(CalibrationError, match="no observer saw any data"):
        fxq.convert(fxq.prepare_qat(Net(), X))


# --- models in regions ----------------------------------------------------------------------------------------------


class Looping(nn.Module):
    """Cannot be traced as a whole; its head is untouched, its mode matters outside of the region."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Net()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        out = [self.backbone(image[None].repeat(2, 1, 1, 1)) for image in x if image.sum() > -1e9]
        return self.drop(torch.cat(out))


def test_a_model_in_regions():
    model = Looping().train()
    model.backbone.norm.eval()
    prepared = fxq.prepare_qat(model, X)
    (region,) = regions_of(prepared, Stage.PREPARED).values()
    assert prepared.training and region.training and prepared.drop.training
    assert not region.get_submodule("norm").training
    optimizer = torch.optim.SGD(prepared.parameters(), 0.05)
    for _ in range(2):
        step(prepared, optimizer, X)
    fxq.freeze_batchnorm(prepared)
    expected = prepared.eval()(X)
    same(fxq.convert_to_reference(prepared)(X), expected, 1e-5)
    qmodel = fxq.convert(prepared)
    assert regions_of(qmodel, Stage.LOWERED)
    assert in_steps(qmodel(X) - expected, fake_quantizes(prepared)[-1]).max() <= 3.01


# --- models that post-training quantization handles -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "lraspp_mobilenet_v3_large"])
def test_torchvision_models(name):
    """Ten steps, then the int8 output is close to the fake-quantized one; and each kernel is within one integer."""
    torch.manual_seed(0)
    import_torchvision()
    from torchvision.models import get_model

    options = {"num_classes": 10} | ({"weights_backbone": None} if "lraspp" in name else {})
    model = get_model(name, weights=None, **options)
    x = torch.randn(4, 3, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxqWarning)
        prepared = trained(model, x, steps=10)
    fxq.freeze_batchnorm(prepared)
    reference, qmodel = fxq.convert_to_reference(prepared), fxq.convert(prepared)
    with torch.no_grad():
        expected, simulated, actual = (_tensor(one(x)) for one in (prepared.eval(), reference, qmodel))
    assert fxq.numerics.sqnr(expected, simulated) > 25
    assert fxq.numerics.sqnr(expected, actual) > 20
    assert max(line.max_lsb for line in kernel_agreement(reference, get_backend("x86"), x)) <= 1


def _tensor(out: torch.Tensor | dict[str, torch.Tensor]) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out["out"]


def test_a_pickle_trains_on():
    prepared = trained(Net(), X)
    file = io.BytesIO()
    torch.save(prepared, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    same(again.eval()(X), prepared.eval()(X), 0)
    again.train()(X).sum().backward()
    same(fxq.convert(again)(X), fxq.convert_to_reference(again)(X), 0.05)
