"""Learned rounding: nearer outputs on data it has not seen, from the same integers plus or minus one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import Lambda, conv
from torch import nn

import fxq
from fxq.config import QConfig
from fxq.errors import CalibrationError, StageError
from fxq.learned_rounding import _columns, _output_range
from fxq.lockstep import lockstep, region_inputs
from fxq.quant_layers import quant_layers

GENERATOR = torch.Generator().manual_seed(3)
MIX = torch.randn(3, 3, 1, 1, generator=GENERATOR)
# Channels and neighbours depend on each other, as in images: this is what roundings can be adapted to.
DATA = [F.avg_pool2d(F.conv2d(torch.randn(16, 3, 14, 14, generator=GENERATOR), MIX), 3, 1) for _ in range(5)]
FOUR_BITS = QConfig(
    activation=fxq.QuantSpec(dtype=torch.uint8, quant_min=0, quant_max=255, symmetric=False),
    weight=fxq.QuantSpec(
        dtype=torch.int8, quant_min=-8, quant_max=7, symmetric=True, ch_axis=0, observer="minmax"
    ),
)  # fmt: skip


def both(model, data=DATA[:4], qconfig=FOUR_BITS) -> tuple[nn.Module, nn.Module]:
    prepared = fxq.prepare(model, data[0], qconfig=qconfig)
    fxq.calibrate(prepared, data)
    return prepared, fxq.convert_to_reference(prepared)


def net() -> nn.Module:
    return Lambda(
        lambda m, x: m.fc(F.relu6(m.b(torch.relu(m.a(x)))).mean((2, 3))),
        a=conv(3, 16), b=conv(16, 16, groups=4, bias=False), fc=nn.Linear(16, 8),
    )  # fmt: skip


def test_four_bits_get_nearer_than_corrected_biases_alone():
    model = Lambda(lambda m, x: m.b(torch.relu(m.a(x))), a=conv(3, 16), b=conv(16, 8, groups=2, bias=False))
    prepared, reference = both(model)
    learned = fxq.learn_rounding(reference, prepared, DATA[:4])
    corrected = fxq.correct_bias(reference, prepared, DATA[:4])
    with torch.no_grad():
        errors = [F.mse_loss(m(DATA[4]), model(DATA[4])) for m in (learned, corrected, reference)]
    assert errors[0] < 0.8 * errors[1]
    assert errors[0] < 0.8 * errors[2]


def test_integers_move_by_one_at_most_and_stay_in_their_range():
    prepared, reference = both(net())
    learned = fxq.learn_rounding(reference, prepared, DATA[:4], iterations=50)
    old, new = (torch.cat([m.a.weight.flatten(), m.b.weight.flatten()]).int() for m in (reference, learned))
    assert (old - new).abs().max() == 1
    assert new.min() >= -8
    assert new.max() <= 7
    assert torch.equal(learned.a.weight_scale, reference.a.weight_scale)
    assert "weights are not rounded to nearest" in str(fxq.summary(learned))


def test_deterministic_and_without_side_effects():
    prepared, reference = both(net())
    state = {name: value.clone() for name, value in reference.state_dict().items() if isinstance(value, torch.Tensor)}
    first, second = (fxq.learn_rounding(reference, prepared, DATA[:2], iterations=20) for _ in range(2))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    for name, value in state.items():
        assert torch.equal(value, reference.state_dict()[name])


def test_what_is_not_better_on_held_out_samples_is_not_kept():
    """Three samples leave none to check with."""
    prepared, reference = both(net())
    learned = fxq.learn_rounding(reference, prepared, [DATA[0][:3]], iterations=20)
    assert torch.equal(learned.a.weight, reference.a.weight)


def test_transposed_convs_and_shared_weights_keep_nearest_rounding():
    a = conv(3, 3)
    model = Lambda(lambda m, x: m.t(torch.relu(m.a(torch.relu(m.a(x))))), a=a, t=nn.ConvTranspose2d(3, 4, 2))
    prepared, reference = both(model, qconfig="per_channel")
    learned = fxq.learn_rounding(reference, prepared, DATA[:2], iterations=20)
    assert torch.equal(learned.a.weight, reference.a.weight)
    assert torch.equal(learned.t.weight, reference.t.weight)


LAYERS = {
    "conv2d": (conv(4, 6), torch.randn(4, 4, 9, 7)),
    "strided": (conv(4, 6, stride=2, dilation=2), torch.randn(4, 4, 9, 7)),
    "valid": (nn.Conv2d(4, 6, (3, 2), padding="valid", groups=2), torch.randn(4, 4, 9, 7)),
    "depthwise": (conv(4, 8, groups=4), torch.randn(4, 4, 9, 7)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=2, stride=2), torch.randn(4, 4, 9)),
    "conv3d": (nn.Conv3d(4, 6, (1, 2, 3), padding=(0, 1, 1)), torch.randn(4, 4, 5, 6, 7)),
    "linear": (nn.Linear(4, 6), torch.randn(4, 4)),
    "linear sequence": (nn.Linear(4, 6), torch.randn(4, 5, 3, 4)),
}


@pytest.mark.parametrize("held_out", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_columns_times_weight_is_the_layer(name, held_out):
    """With unquantized inputs, the sampled columns and targets are those of torch's own kernels."""
    layer, x = LAYERS[name]
    model = Lambda(lambda m, x: m.f(x), f=layer)
    prepared, reference = both(model, [x], "per_channel")
    (quant,) = quant_layers(reference)
    for step in lockstep(reference, prepared, region_inputs(prepared, [x], samples=10)[""]):
        if step.node is quant.node:
            step.arguments = lambda batch: (x,)
            columns = _columns(quant, step, torch.Generator().manual_seed(1), held_out=held_out)
    weight = layer.weight.detach()
    groups = columns.inputs.shape[0]
    output = torch.bmm(weight.reshape(groups, -1, columns.inputs.shape[1]), columns.inputs).flatten(0, 1)
    torch.testing.assert_close(output + layer.bias.detach()[:, None], columns.targets, atol=1e-5, rtol=1e-5)


def test_the_output_range_is_what_the_quantize_keeps():
    _, reference = both(net())
    a, b, fc = (layer.node for layer in quant_layers(reference))
    low, high = _output_range(a)
    assert low == 0.0
    assert high > 0
    assert _output_range(b)[1] <= 6.1
    assert _output_range(fc)[0] < 0


def test_wrong_stages_and_no_data():
    prepared, reference = both(net())
    with pytest.raises(StageError, match="prepared one is needed"):
        fxq.learn_rounding(reference, reference, DATA)
    with pytest.raises(CalibrationError, match="empty"):
        fxq.learn_rounding(reference, prepared, [])
