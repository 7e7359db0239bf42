"""Bias correction takes the mean error out, layer by layer, from data or from BatchNorm statistics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import Lambda, conv
from torch import nn

import fxq
from fxq.bias_correction import shrunken_mean
from fxq.bias_statistics import clipped_normal_mean
from fxq.errors import CalibrationError, StageError
from fxq.graph_module import REFERENCE
from fxq.lockstep import lockstep, region_inputs

DATA = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def net(**options) -> nn.Module:
    """Few weights a channel and very different channels: a case that shifts means."""
    first, depthwise = conv(3, 8, **options), conv(8, 8, groups=8, **options)
    depthwise.weight.data *= torch.logspace(-1.5, 0, 8).reshape(-1, 1, 1, 1)
    depthwise.weight.data += 0.003
    return Lambda(
        lambda m, x: m.c(torch.relu(m.b(torch.relu(m.n(m.a(x)))))),
        a=first, n=nn.BatchNorm2d(8), b=depthwise, c=conv(8, 4, 1, **options),
    )  # fmt: skip


def both(model, data=DATA, qconfig="per_tensor") -> tuple[nn.Module, nn.Module]:
    prepared = fxq.prepare(model, data[0], qconfig=qconfig, calibration="simple")  # which corrects nothing
    fxq.calibrate(prepared, data)
    return prepared, fxq.convert_to_reference(prepared)


def mean_errors(reference, prepared, data) -> dict[str, torch.Tensor]:
    """Mean error of each channel of each conv, with the errors of the layers before it."""
    steps = lockstep(reference, prepared, region_inputs(prepared, data, samples=1000)[""])
    return {
        step.node.name: (torch.cat(step.actual) - torch.cat(step.expected)).mean((0, 2, 3))
        for step in steps
        if step.node.target is F.conv2d
    }


@pytest.mark.parametrize("bias", [True, False])
def test_no_channel_has_a_mean_error_left(bias):
    prepared, reference = both(net(bias=bias))
    before = mean_errors(reference, prepared, DATA)
    corrected = fxq.correct_bias(reference, prepared, DATA, samples=1000)
    after = mean_errors(corrected, prepared, DATA)
    for name in ("b", "c"):
        assert after[name].abs().max() < 0.1 * before[name].abs().max()
    assert mean_errors(reference, prepared, DATA)["c"].equal(before["c"])  # given ones stay as they are


def test_the_output_is_nearer_on_other_data_and_lowers():
    model = net()
    prepared, reference = both(model)
    corrected = fxq.correct_bias(reference, prepared, DATA)
    x = torch.randn(16, 3, 8, 8)
    with torch.no_grad():
        errors = [F.mse_loss(m(x), model(x)) for m in (corrected, reference)]
        assert errors[0] < 0.9 * errors[1]
        torch.testing.assert_close(fxq.lower(corrected, "x86")(x), corrected(x), atol=0.1, rtol=0)
    assert "biases corrected: 3 layers" in str(fxq.summary(corrected))


def test_a_bias_read_by_two_layers_becomes_two():
    a, b = conv(3, 4), conv(3, 4)
    b.bias = a.bias
    prepared, reference = both(Lambda(lambda m, x: m.a(x) + m.b(x), a=a, b=b))
    corrected = fxq.correct_bias(reference, prepared, DATA)
    paths = [node.args[2].target for node in corrected.graph.nodes if node.target is F.conv2d]
    assert len(set(paths)) == 2
    after = mean_errors(corrected, prepared, DATA[:2])
    assert max(error.abs().max() for error in after.values()) < 1e-3


def test_linear_and_transposed_layers():
    model = Lambda(
        lambda m, x: m.fc(torch.relu(m.t(x)).flatten(2)), t=nn.ConvTranspose2d(3, 4, 2, groups=1), fc=nn.Linear(81, 5)
    )
    prepared, reference = both(model)
    corrected = fxq.correct_bias(reference, prepared, DATA)
    for module, largest in ((reference, False), (corrected, True)):
        steps = lockstep(module, prepared, region_inputs(prepared, DATA, samples=64)[""])
        shift = [
            (torch.cat(s.actual) - torch.cat(s.expected)).mean((0, 1)).abs().max()
            for s in steps
            if s.node.target is F.linear
        ]
        assert (shift[0] < 2e-4) == largest


def test_one_sample_corrects_nothing():
    prepared, reference = both(net())
    corrected = fxq.correct_bias(reference, prepared, [DATA[0][:1]])
    assert torch.equal(corrected(DATA[1]), reference(DATA[1]))
    assert "biases are not corrected from data, because one sample tells no mean error from chance" in notes(corrected)


@pytest.mark.parametrize("calibration", ["default", "advanced", "max"])
@pytest.mark.parametrize(
    ("shape", "where"),
    [
        ((16, 8), lambda y: y[:, 0] > y[:, 0].mean()),  # rows more or less in int8
        ((16, 8), lambda y: y[:, 0] > 9),  # none but in one batch
        ((4, 6, 8), lambda y: y[0, :, 0] > 9),
    ],
)
def test_rows_chosen_by_their_values(calibration, shape, where):
    def routed(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        return y.sum(-2) + m.b(y.index_select(-2, where(y).nonzero()[:, 0])).sum(-2)

    generator = torch.Generator().manual_seed(3)
    model = Lambda(routed, a=nn.Linear(8, 8), b=nn.Linear(8, 8)).requires_grad_(False)
    model.a.weight.normal_(generator=generator)
    data = [torch.randn(shape, generator=generator) for _ in range(20)]
    data[1] += 30 * model.a.weight[0]
    qmodel = fxq.quantize(model, data, calibration=calibration, progress=False)
    assert all(value.isfinite().all() for value in qmodel.meta[REFERENCE].state_dict().values())
    said = "biases corrected" if calibration == "max" else "for what else shifts their outputs"
    assert any(said in note and "rounding of their weights" not in note for note in notes(qmodel))


def notes(model: nn.Module) -> list[str]:
    return model.meta["fxq"].notes


def test_uncertain_means_are_shrunk():
    noise = torch.randn(50, 200, dtype=torch.float64)
    assert shrunken_mean(noise).norm() < 0.4 * noise.mean(0).norm()
    shifted = noise + 3
    torch.testing.assert_close(shrunken_mean(shifted), shifted.mean(0), rtol=0.01, atol=0)
    assert torch.equal(shrunken_mean(torch.zeros(4, 2)), torch.zeros(2))


def test_regions_and_forward_fn():
    class Loops(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, x, double):
            return [self.body(part) for part in x] if bool(x.mean() > -9) and double else None

    model = Loops().eval()
    data = [torch.stack([batch, batch + 0.1]) for batch in DATA]

    def forward_fn(m, batch):
        return m(batch, True)

    prepared = fxq.prepare(model, (data[0], True), qconfig="per_tensor")
    fxq.calibrate(prepared, data, forward_fn=forward_fn)
    reference = fxq.convert_to_reference(prepared)
    corrected = fxq.correct_bias(reference, prepared, data, forward_fn=forward_fn)
    assert not torch.equal(corrected.body.b.bias, reference.body.b.bias)


def test_wrong_stages_and_no_data():
    prepared, reference = both(net())
    with pytest.raises(StageError, match="prepared one is needed"):
        fxq.correct_bias(reference, reference, DATA)
    with pytest.raises(StageError, match="reference one is needed"):
        fxq.correct_bias(prepared, prepared, DATA)
    with pytest.raises(CalibrationError, match="empty"):
        fxq.correct_bias(reference, prepared, [])


@pytest.mark.parametrize("bounds", [(0.0, float("inf")), (0.0, 6.0), (-1.0, 0.5), (float("-inf"), 1.0)])
def test_mean_of_a_clipped_normal(bounds):
    mean, std = torch.tensor([-2.0, 0.0, 0.5, 5.0]).double(), torch.tensor([1.0, 0.5, 2.0, 3.0]).double()
    x = mean + std * torch.randn(400_000, 4, dtype=torch.float64)
    expected = x.clamp(*(None if abs(bound) == float("inf") else bound for bound in bounds)).mean(0)
    torch.testing.assert_close(clipped_normal_mean(mean, std, *bounds), expected, atol=0.02, rtol=0)


def test_a_normal_without_spread():
    means = clipped_normal_mean(torch.tensor([-1.0, 2.0]), torch.zeros(2), 0.0, 1.5)
    torch.testing.assert_close(means, torch.tensor([0.0, 1.5]))


def reference_scale(reference: nn.Module) -> float:
    """The scale of the weight of conv b, which has one for the tensor."""
    node = next(node for node in reference.graph.nodes if node.name == "b")
    return node.args[1].args[1]


@pytest.mark.parametrize("between", [nn.ReLU(), nn.ReLU6(), nn.Identity()])
def test_from_statistics_alone(between):
    """The statistics are made those of the data, so the analytic correction must nearly be the empirical one."""
    first, norm, second = conv(3, 8, 1), nn.BatchNorm2d(8), conv(8, 8, 1)
    second.weight.data += 0.01
    model = Lambda(lambda m, x: m.b(m.r(m.n(m.a(x)))), a=first, n=norm, r=between, b=second)
    y = torch.cat([first(x) for x in DATA]).detach()
    norm.running_mean.copy_(y.mean((0, 2, 3)))
    norm.running_var.copy_(y.var((0, 2, 3)))
    prepared, reference = both(model)
    corrected = fxq.correct_bias(reference, prepared)
    rounding = second.weight - reference.b.weight * reference_scale(reference)
    with torch.no_grad():
        shift = F.conv2d(between(norm(torch.cat([first(x) for x in DATA]))), rounding).mean((0, 2, 3))
    added = corrected.b.bias - reference.b.bias
    assert (added - shift).norm() < 0.25 * shift.norm()
    assert torch.equal(corrected.a.bias, reference.a.bias)  # its input's mean is not known


def test_without_statistics_nothing_changes():
    prepared, reference = both(Lambda(lambda m, x: m.b(torch.relu(m.a(x))), a=conv(3, 8), b=conv(8, 4)))
    corrected = fxq.correct_bias(reference, prepared)
    assert torch.equal(corrected(DATA[0]), reference(DATA[0]))


def test_statistics_do_not_correct_again_what_conversion_has():
    model = net()
    prepared = fxq.prepare(model, DATA[0], qconfig="per_tensor")
    fxq.calibrate(prepared, DATA)
    reference = fxq.convert_to_reference(prepared)
    again = fxq.correct_bias(reference, prepared)
    for name in "abc":
        assert torch.equal(getattr(again, name).bias, getattr(reference, name).bias)
