"""Where the error is: against arithmetic done by hand with torch's own fake quantization, and planted faults."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from faulty_models import chain, images, outlier_weight, two_bits, wrecked_range
from models_for_tests import Lambda, Two, conv
from torch import nn

import fxq
from fxq.errors import CalibrationError, InputError, StageError
from fxq.numerics import sqnr
from fxq.plan import Equalized
from fxq.qdq import is_quantize


def by_node(records):
    return {record["node"]: record for record in records}


def worst(records):
    return min(records[:-1], key=lambda record: record["own_sqnr"])


def test_numbers_are_those_of_fake_quantization():
    """One conv: everything recomputed with torch.fake_quantize."""
    torch.manual_seed(0)
    net = Lambda(lambda m, x: torch.relu(m.a(x)), a=conv())
    x = torch.randn(4, 3, 8, 8)
    reference = fxq.convert_to_reference(calibrated(net, [x]))
    found = by_node(fxq.compare_records(net, reference, x.split(1)))
    q_in, q_out = (n for n in reference.graph.nodes if is_quantize(n))
    scale, zero_point = reference.get_buffer("a.weight_scale"), reference.get_buffer("a.weight_zero_point")
    weight = torch.fake_quantize_per_channel_affine(net.a.weight, scale, zero_point, 0, -127, 127)

    def fake(value, q):
        return torch.fake_quantize_per_tensor_affine(value, *q.args[1:5])

    def layer(value, w, bias):
        return torch.relu(F.conv2d(value, w, bias, padding=1))

    with torch.no_grad():
        expected = net(x)
        so_far = fake(layer(fake(x, q_in), weight, reference.get_parameter("a.bias")), q_out)
        rough, rounded = layer(x, weight, reference.get_parameter("a.bias")), fake(expected, q_out)
        own = fake(rough, q_out)
    assert found["x"]["sqnr"] == pytest.approx(sqnr(x, fake(x, q_in)), abs=1e-3)
    record = found["relu"]
    assert record["sqnr"] == pytest.approx(sqnr(expected, so_far), abs=0.01)
    assert record["own_sqnr"] == pytest.approx(sqnr(expected, own), abs=0.01)
    cosine = F.cosine_similarity(expected.double().flatten(), so_far.double().flatten(), 0).item()
    assert record["cosine"] == pytest.approx(cosine, abs=1e-6)
    power = [(t - expected).double().square().sum().item() for t in (rough, rounded)]
    assert record["weights_share"] == pytest.approx(power[0] / sum(power), abs=1e-3)
    assert record["weights_share"] + record["activations_share"] == pytest.approx(1)


def calibrated(net, data, **options):
    prepared = fxq.prepare(net, data[0], backend="qnnpack", **options)
    fxq.calibrate(prepared, data)
    return prepared


def test_the_last_line_is_the_model_as_it_runs():
    net, data = chain(), images()
    qmodel = fxq.quantize(net, data, backend="qnnpack")
    last = fxq.compare_records(net, qmodel, data)[-1]
    whole = torch.cat(data)
    assert last["node"] == "output"
    assert last["sqnr"] == pytest.approx(sqnr(net(whole), qmodel(whole)), abs=0.01)


def test_an_outlier_among_the_weights_is_found():
    net = outlier_weight()
    qmodel = fxq.quantize(net, images(), backend="qnnpack", qconfig="per_tensor")
    record = worst(fxq.compare_records(net, qmodel, images()))
    assert (record["node"], record["module"], record["op"]) == ("relu_1", "b", "conv2d + relu")
    assert record["own_sqnr"] < 6 and record["weights_share"] > 0.99


def test_two_bit_weights_are_found_among_the_weights():
    net = chain()
    qmodel = fxq.quantize(net, images(), backend="qnnpack", qconfig=two_bits())
    record = worst(fxq.compare_records(net, qmodel, images()))
    assert (record["node"], record["module"], record["op"]) == ("b", "b", "conv2d")
    assert record["own_sqnr"] < 12 and record["weights_share"] > 0.99


def test_a_wrecked_range_is_found_among_the_activations():
    net = chain()
    records = fxq.compare_records(net, fxq.convert(wrecked_range(net)), images())
    record = worst(records)
    assert record["node"] == "relu_1" and record["own_sqnr"] < 6 and record["activations_share"] > 0.99
    later = by_node(records)["c"]
    assert later["sqnr"] < 6 < 20 < later["own_sqnr"]  # the error has got there, but is not its own


@pytest.mark.parametrize("backend", ["x86", "onednn", "qnnpack"])
def test_reference_and_lowered_are_the_same_but_for_the_output(backend):
    net, data = Lambda(lambda m, x: torch.relu(m.a(x) + m.b(x)).flatten(1), a=conv(), b=conv(kernel=1)), images()
    prepared = fxq.prepare(net, data[0], backend=backend)
    fxq.calibrate(prepared, data)
    first = fxq.compare_records(net, fxq.convert_to_reference(prepared), data)
    second = fxq.compare_records(net, fxq.convert(prepared), data)
    assert first[:-1] == second[:-1]


def test_layers_that_stay_float_only_round_what_leaves_them():
    net, data = chain(), images()
    found = by_node(fxq.compare_records(net, fxq.quantize(net, data, exclude="b", backend="qnnpack"), data))
    assert found["b"]["op"] == "quantize"  # on its way into int8
    assert found["relu"]["weights_share"] > 0 == found["b"]["weights_share"]


def test_attention_that_stays_whole():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            x = self.first(x)
            return self.attention(x, x, x)[0]

    net, data = Net().eval(), [torch.randn(2, 5, 8)]
    for exclude in ((), ("attention",)):
        records = fxq.compare_records(net, fxq.quantize(net, data, exclude=exclude, backend="qnnpack"), data)
        assert records[-1]["sqnr"] > 25


def test_layers_that_were_scaled_against_each_other():
    """What an equalized copy of the model is compared with is what the model itself is compared with."""
    net, scaled, data = chain(), chain(), images()
    factors = [torch.logspace(-0.5, 0.5, 8), torch.logspace(0.5, -0.5, 8)]
    for first, second, s in ((scaled.a, scaled.b, factors[0]), (scaled.b, scaled.c, factors[1])):
        first.weight /= s.view(-1, 1, 1, 1)
        first.bias /= s
        second.weight *= s.view(1, -1, 1, 1)
    reference = fxq.convert_to_reference(calibrated(scaled, data))
    expected = fxq.compare_records(scaled, fxq.lower(reference, "qnnpack"), data)
    assert by_node(fxq.compare_records(net, reference, data))["relu"]["sqnr"] < 20  # they differ by the factors
    pairs = zip((("a", "b"), ("b", "c")), factors, strict=True)
    reference.plan.equalized += [Equalized(*names, tuple(s.tolist())) for names, s in pairs]
    for ours, theirs in zip(fxq.compare_records(net, fxq.lower(reference, "qnnpack"), data), expected, strict=True):
        assert ours["node"] == theirs["node"]
        for key in ("sqnr", "own_sqnr", "weights_share"):
            assert ours[key] == pytest.approx(theirs[key], abs=0.05)


def test_batches_of_different_sizes_count_by_their_elements():
    net, x = chain(), torch.cat(images())
    qmodel = fxq.quantize(net, [x], backend="qnnpack")
    whole, parts = (fxq.compare_records(net, qmodel, data) for data in ([x], [x[:1], x[1:]]))
    for one, other in zip(whole, parts, strict=True):
        assert one["node"] == other["node"]
        assert one["sqnr"] == pytest.approx(other["sqnr"], abs=0.05)


def test_a_model_of_several_regions_and_inputs():
    class Loops(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Sequential(conv(), nn.ReLU()), nn.Linear(4, 3)

        def forward(self, x, *, twice):
            y = self.body(x).mean((2, 3))
            return {"y": self.head(y), "z": (self.head(2 * y), 1)} if float(y.sum()) < 1e9 and twice else y

    net, data = Loops().eval(), [{"x": x, "twice": True} for x in images()]
    qmodel = fxq.quantize(net, data, backend="qnnpack")
    records = fxq.compare_records(net, qmodel, data)
    assert {record["region"] for record in records} == {"body", "head", ""}
    assert all(record["own_sqnr"] > 25 for record in records)
    assert "body: input_1" in fxq.compare(net, qmodel, data)


def test_two_inputs_and_forward_fn():
    net = Two(lambda m, x, y: m.a(x) + m.a(y), a=conv())
    data = [{"left": x, "right": -x} for x in images()]
    call = {"forward_fn": lambda m, batch: m(batch["left"], batch["right"]), "example_inputs": (images()[0],) * 2}
    qmodel = fxq.quantize(net, data, backend="qnnpack", **call)
    records = fxq.compare_records(net, qmodel, data, **call)
    assert [r["node"] for r in records] == ["x", "y", "a", "a_1", "add", "output"]
    with pytest.raises(CalibrationError, match="example_inputs"):
        fxq.compare_records(net, qmodel, data, forward_fn=call["forward_fn"])


def test_constant_zero_activations():
    net = chain()
    nn.init.zeros_(net.a.weight)
    nn.init.constant_(net.a.bias, -1.0)
    qmodel = fxq.quantize(net, images(), backend="qnnpack")
    record = by_node(fxq.compare_records(net, qmodel, images()))["relu"]
    assert (record["sqnr"], record["cosine"], record["weights_share"]) == (math.inf, 1.0, None)
    assert "inf" in fxq.compare(net, qmodel, images())


def test_data_are_read_once_and_counted():
    net = chain()
    qmodel = fxq.quantize(net, images(), backend="qnnpack")
    endless = itertools.cycle(images())
    assert fxq.compare_records(net, qmodel, endless, num_batches=2)
    for data, count in (([], None), (images(), 0), (3, None)):
        with pytest.raises(CalibrationError):
            fxq.compare_records(net, qmodel, data, num_batches=count)


def test_neither_model_is_changed():
    net, data = chain(), images()
    prepared = calibrated(net, data)
    reference = fxq.convert_to_reference(prepared)
    before = {k: v.clone() for model in (net, reference) for k, v in model.state_dict().items()}
    text = str(reference.graph)
    fxq.compare_records(net, reference, data)
    after = {k: v for model in (net, reference) for k, v in model.state_dict().items()}
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert str(reference.graph) == text


def test_refuses_models_that_do_not_belong_together():
    net, data = chain(), images()
    qmodel = fxq.quantize(net, data, backend="qnnpack")
    with pytest.raises(InputError, match="not in the float model"):
        fxq.compare(Lambda(lambda m, x: m.first(x), first=conv()), qmodel, data)
    with pytest.raises(StageError, match="reference or lowered"):
        fxq.compare(net, calibrated(net, data), data)
    with pytest.raises(StageError, match="not made by fxq"):
        fxq.compare(net, net, data)


def test_the_table_fits():
    net = chain()
    text = fxq.compare(net, fxq.quantize(net, images(), backend="qnnpack"), images())
    assert max(map(len, text.splitlines())) <= 120
    assert text.splitlines()[0].split()[:3] == ["node", "op", "SQNR"] and text.splitlines()[-1].startswith("output")
