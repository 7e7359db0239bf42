"""Mixed precision by budget: the culprit alone stays float, the budget holds, and what cannot be done is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from faulty_models import chain, images, outlier_weight, two_bits
from models_for_tests import Lambda, conv
from torch import nn

import fxq
from fxq.errors import ConfigError
from fxq.mixed_precision import Budget
from fxq.numerics import sqnr
from fxq.plan import SENSITIVE

X = torch.cat(images(16))


def agreement(net):
    labels = net(X).argmax(1)

    def metric(model):
        metric.calls += 1
        return 100 * (model(X).argmax(1) == labels).float().mean().item()

    metric.calls = 0
    return metric


def kept_float(model):
    return [
        name
        for name, decision in model.plan.decisions.items()
        if decision.reason is not None and decision.reason.code == SENSITIVE.code and decision.detail
    ]


def test_only_the_faulty_layer_stays_float():
    net = outlier_weight()
    metric = agreement(net)
    plain = fxq.quantize(net, images(), backend="qnnpack", qconfig="per_tensor")
    assert metric(plain) < 95
    qmodel = fxq.quantize(net, images(), backend="qnnpack", qconfig="per_tensor", metric=metric, max_drop=5)
    assert kept_float(qmodel) == ["b"] and metric(qmodel) >= 95
    detail = qmodel.plan.decisions["b"].detail
    assert "alone in int8 SQNR" in detail and f"int8 here too metric {metric(plain):.4g}" in detail
    assert qmodel.plan.decisions["a"].reason is None


@pytest.mark.parametrize("decibels", [20, 42])
def test_a_target_holds_for_the_model_that_comes_out(decibels):
    net, data = chain(), images()
    options = {"backend": "qnnpack", "qconfig": two_bits()}
    qmodel = fxq.quantize(net, data, target=f"sqnr:{decibels}", **options)
    whole = torch.cat(data)
    assert sqnr(net(whole), fxq.quantize(net, data, **options)(whole)) < decibels <= sqnr(net(whole), qmodel(whole))


def test_no_smaller_set_would_do():
    """Against every set of layers, excluded by name."""
    net, data = chain(), images()
    options = {"backend": "qnnpack", "qconfig": two_bits()}
    whole = torch.cat(data)
    qmodel = fxq.quantize(net, data, target="sqnr:40", **options)
    count = len(kept_float(qmodel))

    def good(names):
        return sqnr(net(whole), fxq.quantize(net, data, exclude=names, **options)(whole)) >= 40

    assert count and not any(good(names) for k in range(count) for names in itertools.combinations("abc", k))


def test_a_budget_that_is_met_at_once():
    net = chain()
    metric = agreement(net)
    options = {"backend": "qnnpack", "calibration": "simple"}
    qmodel = fxq.quantize(net, images(), metric=metric, max_drop=50, **options)
    assert kept_float(qmodel) == [] and metric.calls == 2  # the float model and the int8 one
    assert "no layer had to stay float" in fxq.summary(qmodel)
    assert torch.equal(qmodel(X), fxq.quantize(net, images(), **options)(X))


def test_a_budget_that_cannot_be_met():
    calls = itertools.count()
    with pytest.raises(ConfigError, match=r"all 3 layers float.*the same each time"):
        fxq.quantize(chain(), images(), backend="qnnpack", metric=lambda model: -next(calls), max_drop=0.5)
    net = Lambda(lambda m, x: m.bn(m.a(x)), a=conv(), bn=nn.BatchNorm2d(4))  # folding is exact to rounding only
    with pytest.raises(ConfigError, match=r"all 1 layers float.*lower it"):
        fxq.quantize(net, images(), backend="qnnpack", target="sqnr:300")


def test_summary_and_graph_table_say_which_and_why():
    net = outlier_weight()
    qmodel = fxq.quantize(net, images(), backend="qnnpack", qconfig="per_tensor", target="sqnr:30")
    summary = fxq.summary(qmodel)
    assert "1 of 3 layers float: the target is 30 dB" in " ".join(summary.split())
    assert "what it costs" in summary and max(map(len, summary.splitlines())) <= 120
    assert SENSITIVE.text in " ".join(fxq.graph_table(qmodel).split())
    record = next(r for r in fxq.graph_records(qmodel) if r["node"] == "b")
    assert record["type"] == "float" and "alone in int8" in record["reason"]


def test_search_is_logarithmic():
    """16 layers of which the first alone is at fault: judged are 0, 1 and then 0 again at most."""
    torch.manual_seed(0)
    net = Lambda(lambda m, x: m.body(x).mean((2, 3)), body=nn.Sequential(*(conv(4 if i else 3) for i in range(16))))
    net.requires_grad_(False)
    net.body[0].weight[:, 0] *= 1000
    net.body[0].weight[1:, 0] = 0
    metric = agreement(net)
    fxq.quantize(net, images(), backend="qnnpack", qconfig="per_tensor", metric=metric, max_drop=0)
    assert metric.calls <= 1 + 2 * 4 + 16


def test_light_layers_between_float_ones_go_with_them():
    torch.manual_seed(0)
    net = Lambda(lambda m, x: m.a(x) + m.b(x), a=conv(), b=conv())
    qmodel = fxq.quantize(net, images(), backend="qnnpack", target="sqnr:100")
    assert not qmodel.plan.kernels


def test_regions():
    class Loops(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = outlier_weight(), nn.Linear(4, 3)

        def forward(self, x):
            y = self.body(x)
            return {"y": self.head(y), "boxes": y[y > y.mean()]} if float(y.sum()) < 1e9 else y

    net = Loops().eval()
    expected = net(X)["y"].detach()

    def metric(model):
        return -(model(X)["y"] - expected).abs().max().detach()

    plain = fxq.quantize(net, images(), backend="qnnpack", qconfig="per_tensor")
    limit = -metric(plain).item() / 2
    qmodel = fxq.quantize(net, images(), backend="qnnpack", qconfig="per_tensor", metric=metric, max_drop=limit)
    assert metric(qmodel) >= -limit
    kept = [r["module"] for r in fxq.graph_records(qmodel) if r["reason"].startswith(f"{SENSITIVE.text}: ")]
    assert kept == ["body.b"]


def test_generators_are_read_once():
    net = outlier_weight()
    data = (x for x in images(20))
    qmodel = fxq.quantize(net, data, backend="qnnpack", qconfig="per_tensor", target="sqnr:30")
    assert kept_float(qmodel) == ["b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_drop": 1}, "max_drop= needs metric="),
        ({"metric": len}, "metric= needs max_drop="),
        ({"metric": len, "max_drop": 1, "target": "sqnr:30"}, "not both"),
        ({"max_drop": 1, "target": "sqnr:30"}, "not both"),
        ({"metric": 5, "max_drop": 1}, "metric is a int"),
        ({"metric": len, "max_drop": -1}, "max_drop=-1"),
        ({"metric": len, "max_drop": float("nan")}, "max_drop=nan"),
        ({"metric": len, "max_drop": "1"}, "max_drop='1'"),
        ({"target": "sqnr"}, "sqnr:30"),
        ({"target": "sqnr:"}, "sqnr:30"),
        ({"target": "sqnr:loud"}, "sqnr:30"),
        ({"target": "sqnr:nan"}, "sqnr:30"),
        ({"target": "psnr:30"}, "sqnr:30"),
        ({"target": 30}, "sqnr:30"),
    ],
)
def test_malformed_budgets_are_refused_before_calibrating(options, message):
    def no_data():
        raise AssertionError("the data were read")
        yield

    with pytest.raises(ConfigError, match=message):
        fxq.quantize(chain(), no_data(), **options)


def test_a_metric_that_returns_no_number():
    with pytest.raises(ConfigError, match="finite number"):
        fxq.quantize(chain(), images(), backend="qnnpack", metric=lambda model: float("nan"), max_drop=1)


def test_parse():
    assert Budget.parse(None, None, None) is None
    assert Budget.parse(None, None, "sqnr:-3.5") == Budget(sqnr=-3.5)
    assert Budget.parse(len, 0, None) == Budget(metric=len, max_drop=0.0)  # type: ignore[arg-type]
