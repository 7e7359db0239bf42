"""The printed tables, word for word, and that they fit a terminal.

After a wanted change: ``FXQ_UPDATE_GOLDENS=1 pytest tests/test_report.py``, and read the difference.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from models_for_tests import Lambda, conv
from torch import nn

import fxq
from fxq.backends import get_backend
from fxq.errors import StageError

GOLDENS = Path(__file__).parent / "goldens"
X = torch.linspace(-1.0, 1.0, 3 * 8 * 8).reshape(1, 3, 8, 8)


@pytest.fixture(autouse=True)
def same_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    get_backend.cache_clear()
    yield
    get_backend.cache_clear()


def prepared_net(*batches: torch.Tensor) -> nn.Module:
    """Weights and inputs on a line and min-max ranges: no printed digit hangs on the order of a sum."""
    net = Lambda(
        lambda m, x: m.fc((torch.relu(m.bn(m.a(x))) + m.skip(x)).softmax(1).mean((2, 3))),
        a=conv(), bn=nn.BatchNorm2d(4), skip=conv(kernel=1), fc=nn.Linear(4, 5),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.linspace(-0.5, 0.7, parameter.numel()).reshape(parameter.shape))
        net.bn.running_mean.zero_()
        net.bn.running_var.fill_(1.0)
    prepared = fxq.prepare(net, X, qconfig="per_tensor", exclude="fc")
    fxq.calibrate(prepared, batches)
    return prepared


def tables() -> dict[str, str]:
    prepared = prepared_net(X, X * 2)
    reference, lowered = fxq.convert_to_reference(prepared), fxq.convert(prepared)
    found = {"observers": fxq.observer_table(prepared)}
    for name, model in {"prepared": prepared, "reference": reference, "lowered": lowered}.items():
        found |= {f"summary_{name}": fxq.summary(model), f"graph_{name}": fxq.graph_table(model)}
    return found | {"fusion": fxq.fusion_table(lowered), "backend_x86": fxq.backend_table("x86")}


NAMES = ["observers", "fusion", "backend_x86"]
NAMES += [f"{kind}_{stage}" for kind in ("summary", "graph") for stage in ("prepared", "reference", "lowered")]


@pytest.mark.parametrize("name", NAMES)
def test_golden(name: str) -> None:
    path, text = GOLDENS / f"{name}.txt", tables()[name]
    lines = [line.rstrip() for line in text.splitlines()]
    if os.environ.get("FXQ_UPDATE_GOLDENS"):
        GOLDENS.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
    assert lines == path.read_text().splitlines()
    assert max(map(len, lines)) <= 120


KEYS = {"node", "op", "type", "kernel", "scale", "zero_point", "shape", "macs", "reason", "module", "inputs", "region"}


def test_records_have_the_documented_keys() -> None:
    prepared = prepared_net(X)
    for model in (prepared, fxq.convert_to_reference(prepared), fxq.convert(prepared)):
        assert {frozenset(record) for record in fxq.graph_records(model)} == {frozenset(KEYS)}
        assert {r["type"] for r in fxq.graph_records(model)} <= {"int8", "float", "shape"}
        assert all(r["reason"] for r in fxq.graph_records(model) if r["type"] == "float")


def test_observers_before_and_after_data() -> None:
    prepared = fxq.prepare(Lambda(lambda m, x: m.a(x), a=conv()), X, qconfig="per_tensor")
    assert "no data" in fxq.observer_table(prepared)
    before = {r["watches"][0]: r for r in fxq.observer_records(prepared)}["x"]
    assert (before["batches"], before["min"], before["scale"]) == (0, None, None)
    prepared(X)
    prepared(X * 2)
    after = {r["watches"][0]: r for r in fxq.observer_records(prepared)}["x"]
    assert (after["batches"], after["min"], after["max"]) == (2, [-2.0], [2.0])
    assert "no data" not in fxq.observer_table(prepared)


@pytest.mark.parametrize("table", [fxq.summary, fxq.graph_table, fxq.fusion_table, fxq.observer_table])
def test_only_models_of_fxq(table: Callable[[nn.Module], str]) -> None:
    with pytest.raises(StageError, match="not made by fxq"):
        table(nn.ReLU())


def partitioned() -> tuple[nn.Module, torch.Tensor]:
    class Loops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(conv(), nn.ReLU(), conv(4, 4))
            self.head_with_a_rather_long_name_that_must_wrap = nn.Sequential(nn.Linear(4, 3), nn.ReLU())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.backbone(x).mean((2, 3))
            return self.head_with_a_rather_long_name_that_must_wrap(y) if float(y.sum()) < 1e9 else y

    return Loops().eval(), X


def mobilenet() -> tuple[nn.Module, torch.Tensor]:
    from fxq.torchvision_ops import import_torchvision

    import_torchvision()
    from torchvision.models import mobilenet_v3_small

    return mobilenet_v3_small().eval(), torch.randn(1, 3, 32, 32)


@pytest.mark.parametrize("make", [partitioned, mobilenet])
def test_tables_fit_120_columns(make: Callable[[], tuple[nn.Module, torch.Tensor]]) -> None:
    net, x = make()
    prepared = fxq.prepare(net, x, qconfig="per_tensor")  # min-max: no search to wait for
    prepared(x)
    texts = [fxq.observer_table(prepared), fxq.backends(), *(fxq.backend_table(name) for name in ("x86", "qnnpack"))]
    for model in (prepared, fxq.convert_to_reference(prepared), fxq.convert(prepared)):
        texts += [fxq.summary(model), fxq.graph_table(model), fxq.fusion_table(model)]
    for text in texts:
        wide = [line for line in text.splitlines() if len(line) > 120]
        assert not wide, wide[0]
