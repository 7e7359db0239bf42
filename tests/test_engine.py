"""Engines: which one packs, which one runs, and that neither the global setting nor other threads matter."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import fxq
from fxq import engine
from fxq.backends import BACKENDS, common, get_backend
from fxq.backends.common import right_engines
from fxq.errors import BackendError
from fxq.graph_module import QuantModule
from fxq.op_table import IntWeight
from fxq.spec import QParams

ENGINES = ("fbgemm", "x86", "onednn", "qnnpack")


@pytest.fixture(autouse=True)
def global_engine() -> Iterator[None]:
    before = torch.backends.quantized.engine
    yield
    torch.backends.quantized.engine = before


class Net(nn.Module):
    """A conv, a residual (conv2d_add on onednn) and kernels without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x).relu()
        y = nn.functional.avg_pool2d(self.b(x) + x, 3, 2, 1)
        return self.c(y * nn.functional.adaptive_avg_pool2d(y, 1).sigmoid())


def quantized(backend: str) -> QuantModule:
    torch.manual_seed(0)
    return fxq.quantize(Net().eval(), [torch.randn(2, 3, 16, 16)], backend=backend, progress=False)


@pytest.mark.parametrize("name", ENGINES)
def test_packing_sets_and_restores(name: str) -> None:
    torch.backends.quantized.engine = "fbgemm"
    with engine.packing(name):
        assert torch.backends.quantized.engine == name
    assert torch.backends.quantized.engine == "fbgemm"


def test_packing_restores_after_an_error() -> None:
    torch.backends.quantized.engine = "fbgemm"
    with pytest.raises(ZeroDivisionError), engine.packing("qnnpack"):
        raise ZeroDivisionError
    assert torch.backends.quantized.engine == "fbgemm"
    with engine.packing("x86"):  # and gave up its turn
        pass


def test_running_restores_after_an_error() -> None:
    torch.backends.quantized.engine = "qnnpack"
    with pytest.raises(ZeroDivisionError), engine.running():
        assert torch.backends.quantized.engine != "qnnpack"
        raise ZeroDivisionError
    assert torch.backends.quantized.engine == "qnnpack"


def test_running_nests() -> None:
    torch.backends.quantized.engine = "qnnpack"
    with engine.running():
        with engine.running():
            pass
        assert torch.backends.quantized.engine == engine.running_engine()
        with engine.packing("fbgemm"):  # does not wait for the model it is inside of
            assert torch.backends.quantized.engine == "fbgemm"
        assert torch.backends.quantized.engine == engine.running_engine()
    assert torch.backends.quantized.engine == "qnnpack"


def test_a_model_that_fails_gives_the_engine_back() -> None:
    model = quantized("x86")
    torch.backends.quantized.engine = "qnnpack"
    with pytest.raises(fxq.errors.InputError):
        model(torch.randn(2, 5, 16, 16))
    assert torch.backends.quantized.engine == "qnnpack"


def test_packing_waits_for_running_models() -> None:
    order: list[str] = []

    def pack() -> None:
        with engine.packing("qnnpack"):
            order.append("packed")

    with engine.running():
        thread = threading.Thread(target=pack)
        thread.start()
        thread.join(timeout=0.2)
        assert thread.is_alive()
        order.append("ran")
    thread.join(timeout=10)
    assert order == ["ran", "packed"]


@pytest.mark.parametrize("setting", ENGINES)
def test_results_do_not_depend_on_the_global_engine(setting: str) -> None:
    torch.backends.quantized.engine = "x86"
    models = {backend: quantized(backend) for backend in BACKENDS}
    x = torch.randn(3, 3, 16, 16)
    expected = {backend: model(x) for backend, model in models.items()}
    torch.backends.quantized.engine = setting
    for backend, model in models.items():
        assert torch.equal(model(x), expected[backend]), backend
        assert torch.equal(quantized(backend)(x), expected[backend]), backend
    assert torch.backends.quantized.engine == setting


@pytest.mark.parametrize("setting", ["x86", "qnnpack"])
def test_models_of_two_backends_from_four_threads(setting: str) -> None:
    models = [quantized("onednn"), quantized("qnnpack")]
    inputs = [torch.randn(2, 3, 16, 16) for _ in range(8)]
    expected = [[model(x) for x in inputs] for model in models]
    torch.backends.quantized.engine = setting
    barrier = threading.Barrier(4)

    def work(number: int) -> list[torch.Tensor]:
        barrier.wait()
        if number == 3:
            quantized("fbgemm")  # somebody packs meanwhile
        return [models[number % 2](x) for _ in range(10) for x in inputs]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, range(4)))
    for number, outputs in enumerate(results):
        for position, output in enumerate(outputs):
            assert torch.equal(output, expected[number % 2][position % len(inputs)])
    assert torch.backends.quantized.engine == setting


def test_unknown_backend() -> None:
    with pytest.raises(BackendError, match="unknown backend 'tpu'; the backends are x86, fbgemm, onednn, qnnpack"):
        fxq.prepare(Net().eval(), torch.randn(1, 3, 16, 16), backend="tpu")


def only(*names: str) -> object:
    class Quantized:
        supported_engines = names
        engine = names[0]

    return Quantized()


def test_engine_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = fxq.prepare(Net().eval(), torch.randn(1, 3, 16, 16), backend="x86")
    prepared(torch.randn(1, 3, 16, 16))
    reference = fxq.convert_to_reference(prepared)
    monkeypatch.setattr(torch.backends, "quantized", only("qnnpack"))
    with pytest.raises(BackendError, match=r"has no 'x86' engine \(it has: qnnpack\)"):
        fxq.prepare(Net().eval(), torch.randn(1, 3, 16, 16), backend="x86")
    with pytest.raises(BackendError, match="no 'x86' engine"):
        fxq.lower(reference, "x86")
    with pytest.raises(BackendError, match="no 'x86' engine"), engine.packing("x86"):
        pass


def test_the_engine_models_run_under(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.running_engine() == "onednn"
    monkeypatch.setattr(engine, "available_engines", lambda: ("qnnpack", "fbgemm"))
    assert engine.running_engine() == "fbgemm"
    monkeypatch.setattr(engine, "available_engines", lambda: ("qnnpack",))
    assert engine.running_engine() == "qnnpack"


@pytest.fixture
def fresh_tables() -> Iterator[None]:
    get_backend.cache_clear()
    yield
    get_backend.cache_clear()


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_have_7_bits_without_vnni(
    backend: str, monkeypatch: pytest.MonkeyPatch, fresh_tables: None
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    model = quantized(backend)
    weight, activation = get_backend(backend).weight, get_backend(backend).activation
    assert (activation.quant_min, activation.quant_max) == (0, 255)
    if backend == "qnnpack":
        assert (weight.quant_min, weight.quant_max) == (-127, 127)
        assert any("widens to 16 bits" in note for note in model.plan.notes)
    else:
        assert (weight.quant_min, weight.quant_max) == (-63, 63)
        assert any("7-bit weights (reduce_range): this CPU has no VNNI" in note for note in model.plan.notes)
        packed = next(value for name, value in vars(model).items() if name == "a_packed")
        assert packed.unpack()[0].int_repr().abs().max() <= 63


@pytest.mark.parametrize("backend", ["x86", "fbgemm", "onednn"])
def test_weights_have_8_bits_with_vnni(backend: str, monkeypatch: pytest.MonkeyPatch, fresh_tables: None) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    assert get_backend(backend).weight.quant_max == 127
    assert any("this CPU has VNNI" in note for note in get_backend(backend).notes)


def int_weight(channels: int, per_group: int, largest: int = 127, zero_point: int = 0) -> IntWeight:
    values = torch.full((channels, per_group, 3, 3), largest, dtype=torch.int8)
    return IntWeight(values, QParams(torch.ones(1), torch.tensor([zero_point])), None)


@pytest.mark.parametrize(
    ("own", "vnni", "weight", "groups", "expected"),
    [
        ("x86", True, int_weight(8, 8), 1, "x86 onednn fbgemm"),
        ("x86", True, int_weight(8, 2), 4, "x86 onednn fbgemm"),
        ("x86", True, int_weight(8, 1), 8, "onednn"),
        ("x86", True, int_weight(128, 2), 104, "onednn"),
        ("x86", True, int_weight(8, 8, zero_point=3), 1, "x86 fbgemm"),
        ("x86", True, int_weight(8, 1, zero_point=3), 8, "qnnpack"),
        ("x86", True, int_weight(8, 1, 63, zero_point=3), 8, "x86"),
        ("fbgemm", True, int_weight(8, 1), 8, "onednn"),
        ("fbgemm", False, int_weight(8, 1, 63), 8, "fbgemm"),
        ("fbgemm", False, int_weight(8, 1), 8, "qnnpack"),
        ("fbgemm", True, int_weight(8, 8), 1, "fbgemm"),
        ("onednn", False, int_weight(8, 8), 1, "onednn fbgemm"),
        ("onednn", True, int_weight(8, 8, zero_point=3), 1, "fbgemm"),
        ("onednn", True, int_weight(8, 1, zero_point=3), 8, "qnnpack"),
    ],
)
def test_the_engines_of_a_convolution(
    own: str, vnni: bool, weight: IntWeight, groups: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "cpu_has_vnni", lambda: vnni)
    assert right_engines(own)(weight, groups) == tuple(expected.split())
