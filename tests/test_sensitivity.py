"""Ranking of layers: planted faults come first, and each number is that of one layer quantized by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from faulty_models import chain, images, outlier_weight, two_bits
from models_for_tests import Lambda, conv
from torch import nn

import fxq
from fxq.errors import CalibrationError, ConfigError, InputError
from fxq.numerics import sqnr
from fxq.qdq import is_quantize


def test_each_number_is_that_of_one_layer_quantized():
    """The middle layer by torch.fake_quantize, with the scales that the whole model's reference graph has."""
    net, data = chain(), images()
    found = {r["node"]: r for r in fxq.sensitivity_records(net, data, backend="qnnpack")}
    prepared = fxq.prepare(net, data[0], backend="qnnpack")
    fxq.calibrate(prepared, data)
    reference = fxq.convert_to_reference(prepared)
    quantizes = {n.name: n.args[1:5] for n in reference.graph.nodes if is_quantize(n)}
    scale, zero_point = reference.get_buffer("b.weight_scale"), reference.get_buffer("b.weight_zero_point")
    weight = torch.fake_quantize_per_channel_affine(net.b.weight, scale, zero_point, 0, -127, 127)
    fake = torch.fake_quantize_per_tensor_affine
    x = torch.cat(data)
    before = fake(torch.relu(net.a(x)), *quantizes["relu_q"])
    bias = reference.get_parameter("b.bias")
    after = fake(torch.relu(F.conv2d(before, weight, bias, padding=1)), *quantizes["relu_1_q"])
    expected = sqnr(net(x), net.c(after).mean((2, 3)))
    assert found["b"]["sqnr"] == pytest.approx(expected, abs=0.02)
    assert (found["b"]["module"], found["b"]["op"], found["b"]["metric"]) == ("b", "conv2d + relu", None)
    assert set(found) == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("net", "options"),
    [(outlier_weight(), {"qconfig": "per_tensor"}), (chain(), {"qconfig": two_bits()})],
    ids=["outlier", "two-bit"],
)
def test_a_planted_fault_comes_first(net, options):
    records = fxq.sensitivity_records(net, images(), backend="qnnpack", **options)
    assert records[0]["node"] == "b"
    assert records[0]["sqnr"] < 20 < records[1]["sqnr"]
    assert records == sorted(records, key=lambda r: r["sqnr"])


def test_by_the_users_metric():
    net, x = outlier_weight(), torch.cat(images(8))
    labels = net(x).argmax(1)
    seen = []

    def metric(model):
        seen.append(model)
        return 100 * (model(x).argmax(1) == labels).float().mean()

    records = fxq.sensitivity_records(net, images(), backend="qnnpack", qconfig="per_tensor", metric=metric)
    assert records[0]["node"] == "b" and records[0]["drop"] == 100 - records[0]["metric"] > 0
    assert records[0]["sqnr"] is None
    assert seen[0] is net and len(seen) == 1 + len(records)


def test_a_metric_must_be_a_number():
    for value in (float("nan"), float("inf"), None, "90 %", True, torch.zeros(2)):
        with pytest.raises(ConfigError, match="metric"):
            fxq.sensitivity_records(chain(), images(), backend="qnnpack", metric=lambda model, value=value: value)


def test_every_kernel_with_its_own_range_is_a_layer():
    net = Lambda(
        lambda m, x: F.max_pool2d(torch.sigmoid(m.a(x)) * m.b(x) + m.b(x), 2).flatten(1), a=conv(), b=conv()
    )
    records = fxq.sensitivity_records(net, images(), backend="qnnpack")
    assert {r["node"] for r in records} == {"a", "b", "b_1", "sigmoid", "mul", "add"}


def test_regions_dicts_and_tuples():
    class Loops(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Sequential(conv(), nn.ReLU()), nn.Linear(4, 3)

        def forward(self, x, *, twice):
            y = self.body(x).mean((2, 3))
            return {"y": (self.head(y), y)} if float(y.sum()) < 1e9 and twice else y

    data = [{"x": x, "twice": True} for x in images()]
    records = fxq.sensitivity_records(Loops().eval(), data, backend="qnnpack")
    assert {(r["region"], r["module"]) for r in records} == {("body", "body.0"), ("head", "head")}
    assert all(25 < r["sqnr"] < 100 for r in records)


def test_outputs_whose_shape_changes_need_a_metric():
    class Picks(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(conv(), nn.Flatten(), nn.Linear(256, 64))

        def forward(self, x):
            y = self.body(x)
            return y[y > 0.1]

    net = Picks().eval()
    torch.nn.init.normal_(net.body[2].weight)
    data = list(torch.randn(2, 64, 3, 8, 8))
    with pytest.raises(InputError, match="differ in number or shape"):
        fxq.sensitivity_records(net, data, backend="qnnpack")
    assert fxq.sensitivity_records(net, data, backend="qnnpack", metric=lambda model: len(model(data[0])))


def test_forward_fn_and_its_result():
    net, data = chain(), [{"image": x} for x in images()]
    options = {"backend": "qnnpack", "example_inputs": images()[0]}
    expected = fxq.sensitivity_records(net, images(), backend="qnnpack")
    found = fxq.sensitivity_records(net, data, forward_fn=lambda m, batch: m(batch["image"]), **options)
    assert found == expected
    with pytest.raises(ConfigError, match="forward_fn returned no float tensor"):
        fxq.sensitivity_records(net, data, forward_fn=lambda m, batch: print(m(batch["image"]), end=""), **options)
    with pytest.raises(CalibrationError, match="example_inputs"):
        fxq.sensitivity_records(net, data, backend="qnnpack", forward_fn=lambda m, batch: m(batch["image"]))


def test_the_table_and_the_model():
    net = outlier_weight()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    text = fxq.sensitivity(net, images(), backend="qnnpack", qconfig="per_tensor")
    assert text.splitlines()[0].split() == ["rank", "node", "op", "module", "SQNR", "dB"]
    assert text.splitlines()[2].split()[:2] == ["1", "b"]
    by_metric = fxq.sensitivity(net, images(), backend="qnnpack", metric=lambda model: 1.0)
    assert by_metric.splitlines()[0].split() == ["rank", "node", "op", "module", "metric", "drop"]
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_empty_data():
    with pytest.raises(CalibrationError, match="empty"):
        fxq.sensitivity(chain(), [])


def test_a_preset_equalizes():
    options = {"backend": "qnnpack", "qconfig": "per_tensor"}
    plain, advanced = (
        fxq.sensitivity_records(outlier_weight(), images(), calibration=preset, **options)
        for preset in ("default", "advanced")
    )
    assert advanced[0]["sqnr"] > plain[0]["sqnr"] + 10


def test_comparison_with_an_equalized_model():
    net = outlier_weight()
    qmodel = fxq.quantize(net, images(), backend="qnnpack", qconfig="per_tensor", calibration="advanced")
    assert fxq.compare_records(net, qmodel, images())[1]["own_sqnr"] > 25
