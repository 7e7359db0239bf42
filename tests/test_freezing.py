"""Frozen models give the numbers of the model they were made from, for all inputs and from several threads."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import Lambda
from torch import nn

import fxq
from fxq import direct_kernels, freezing, onednn
from fxq.errors import BackendError, ConfigError, MissingDependencyError, StageError
from fxq.freezing import Frozen
from fxq.timing import Timing


class Net(nn.Module):
    """Conv with silu, squeeze-and-excitation, a narrow max pool, a residual and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())
        self.body = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.entry(x)
        x = F.max_pool2d(x * self.gate(x), 3, 2, 1)
        x = F.relu(x + self.body(x))
        return self.head(x.mean((2, 3)))


class Structured(nn.Module):
    """Two inputs, one by keyword, and a result of tuples, dicts and plain values."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 6), nn.Linear(4, 6)

    def forward(self, x: torch.Tensor, *, other: torch.Tensor) -> dict[str, Any]:
        left, right = self.left(x), self.right(other)
        return {"both": (left, right), "sum": left + right, "kind": "scores", "none": None}


def quantized(model: nn.Module, *shape: int, backend: str = "x86") -> nn.Module:
    torch.manual_seed(0)
    data = [torch.randn(shape) for _ in range(2)]
    return fxq.quantize(model.eval(), data, backend=backend, progress=False)


needs_onednn = pytest.mark.skipif(not onednn.is_available(), reason="pip install 'fxq[onednn]' for oneDNN's C API")


@pytest.mark.parametrize("backend", ["x86", "onednn", "fbgemm", "qnnpack"])
def test_same_numbers_bit_for_bit(backend: str) -> None:
    qmodel = quantized(Net(), 2, 3, 24, 24, backend=backend)
    frozen = fxq.freeze(qmodel, torch.randn(2, 3, 24, 24), form="torchscript")
    for _ in range(4):
        x = torch.randn(2, 3, 24, 24) * 2
        assert torch.equal(frozen(x), qmodel(x))


FORMS = ["torchscript", pytest.param("onednn", marks=needs_onednn)]


@pytest.mark.parametrize("form", FORMS)
def test_float_modules_that_a_graph_calls(form: str) -> None:
    qmodel = quantized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Softplus(), nn.Conv2d(8, 8, 3), nn.Softplus()), 2, 3, 8, 8)
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(fxq.freeze(qmodel, x, form=form)(x), qmodel(x), atol=0.05)


@pytest.mark.parametrize("form", FORMS)
def test_other_layouts_and_shapes(form: str) -> None:
    qmodel = quantized(Net(), 2, 3, 24, 24)
    frozen = fxq.freeze(qmodel, torch.randn(2, 3, 24, 24).to(memory_format=torch.channels_last), form=form)
    assert frozen.shapes == [(2, 3, 24, 24)]
    for x in (
        torch.randn(2, 3, 24, 24),
        torch.randn(2, 3, 24, 24).transpose(2, 3),
        torch.randn(2, 3, 24, 1).expand(2, 3, 24, 24),
    ):
        found = frozen(x)
        assert torch.equal(found, frozen(x.contiguous(memory_format=torch.channels_last)))
        assert (found - qmodel(x)).abs().max() <= (0 if form == "torchscript" else 3 * step(qmodel))
    for x in (torch.randn(1, 3, 24, 24), torch.randn(2, 3, 17, 40)):
        assert torch.equal(frozen(x), qmodel(x))


def step(qmodel: nn.Module) -> float:
    """Of the integers that the output was."""
    return float(next(k.scale for name, k in reversed(qmodel.plan.kernels.items()) if k.name.startswith("quantized")))


@pytest.mark.parametrize("form", FORMS)
def test_results_of_earlier_calls_stay(form: str) -> None:
    frozen = fxq.freeze(quantized(Net(), 1, 3, 16, 16), torch.randn(1, 3, 16, 16), form=form)
    first, second = torch.randn(1, 3, 16, 16), torch.randn(1, 3, 16, 16)
    result = frozen(first)
    copy = result.clone()
    frozen(second)
    assert torch.equal(result, copy)


@pytest.mark.parametrize("form", FORMS)
def test_copies_give_the_same_numbers(form: str) -> None:
    x = torch.randn(1, 3, 16, 16)
    frozen = fxq.freeze(quantized(Net(), 1, 3, 16, 16), x, form=form)
    assert torch.equal(copy.deepcopy(frozen)(x), frozen(x))


@pytest.mark.parametrize("form", FORMS)
def test_results_are_ordinary_tensors(form: str) -> None:
    x = torch.randn(1, 3, 16, 16)
    result = fxq.freeze(quantized(Net(), 1, 3, 16, 16), x, form=form)(x)
    result += 1
    weight = torch.ones(5, requires_grad=True)
    (result * weight).sum().backward()
    assert weight.grad is not None and not result.is_inference()


@pytest.mark.parametrize("form", FORMS)
def test_structured_inputs_and_results(form: str) -> None:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(3, 4), "other": torch.randn(3, 4)}
    qmodel = fxq.quantize(Structured().eval(), [inputs], progress=False)
    frozen = fxq.freeze(qmodel, inputs, form=form)
    other = {"x": torch.randn(3, 4), "other": torch.randn(3, 4)}
    for found, expected in ((frozen(**other), qmodel(**other)), (frozen(**inputs), qmodel(**inputs))):
        assert found["kind"] == "scores" and found["none"] is None and isinstance(found["both"], tuple)
        assert torch.equal(found["sum"], expected["sum"])
        assert all(map(torch.equal, found["both"], expected["both"]))


@pytest.mark.parametrize("form", FORMS)
def test_several_threads_at_once(form: str) -> None:
    frozen = fxq.freeze(quantized(Net(), 1, 3, 24, 24), torch.randn(1, 3, 24, 24), form=form)
    images = [torch.randn(1, 3, 24, 24) for _ in range(8)]
    expected = [frozen(x) for x in images]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(10):
            if not torch.equal(frozen(images[number]), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("form", FORMS)
def test_the_global_engine_does_not_matter(form: str) -> None:
    x = torch.randn(1, 3, 16, 16)
    frozen = fxq.freeze(quantized(Net(), 1, 3, 16, 16), x, form=form)
    expected = frozen(x)
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "qnnpack"  # whose kernels without weights round differently
    try:
        assert torch.equal(frozen(x), expected)
        assert torch.backends.quantized.engine == "qnnpack"
    finally:
        torch.backends.quantized.engine = before


def test_frozen_in_regions() -> None:
    class Loops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, images: list[torch.Tensor]) -> list[torch.Tensor]:
            return [self.net(image[None]) for image in images if image.sum() != 0]

    torch.manual_seed(0)
    images = [torch.randn(3, 16, 16), torch.randn(3, 24, 24)]
    qmodel = fxq.quantize(Loops().eval(), [(images,)], example_inputs=(images,), progress=False)
    frozen = fxq.freeze(qmodel, (images,), form="torchscript")
    assert isinstance(frozen.get_submodule("net"), Frozen)
    assert all(map(torch.equal, frozen(images), qmodel(images)))


def test_refuses_what_is_not_lowered() -> None:
    x = torch.randn(1, 3, 16, 16)
    with pytest.raises(StageError, match="not made by fxq"):
        fxq.freeze(Net(), x)
    with pytest.raises(StageError, match="lowered"):
        fxq.freeze(fxq.prepare(Net().eval(), x), x)


def test_refuses_a_module_that_decides_by_values() -> None:
    class Decides(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.sum() > 0 else x

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Decides(), nn.Conv2d(4, 4, 1))
    qmodel = quantized(model, 1, 3, 8, 8)
    with pytest.raises(StageError, match="'1' decides by the values"):
        fxq.freeze(qmodel, torch.randn(1, 3, 8, 8))


def test_refuses_numbers_taken_from_values() -> None:
    class Normalizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x / x.abs().max().item())

    qmodel = quantized(Normalizes(), 1, 3, 8, 8)
    with pytest.raises(StageError, match="'item' takes numbers from the values"):
        fxq.freeze(qmodel, torch.randn(1, 3, 8, 8))


@needs_onednn
def test_the_faster_form_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    qmodel, x = quantized(Net(), 1, 3, 16, 16), torch.randn(1, 3, 16, 16)
    for fast in freezing.FORMS:
        times = {name: Timing(1.0 if name == fast else 2.0, 2.0, 9) for name in freezing.FORMS}
        monkeypatch.setattr(freezing, "measure", lambda calls, *_, times=times: {name: times[name] for name in calls})
        assert fxq.freeze(qmodel, x).form == fast


def test_torchscript_is_the_form_where_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = quantized(nn.Linear(4, 4), 2, 3, 4), torch.randn(2, 3, 4)
    assert fxq.freeze(linear, x).form == "torchscript"  # no primitive computes a linear of three dimensions
    qmodel, x = quantized(Net(), 1, 3, 16, 16), torch.randn(1, 3, 16, 16)
    monkeypatch.setattr(onednn, "library", missing)
    monkeypatch.setattr(direct_kernels, "library", missing)
    assert fxq.freeze(qmodel, x).form == "torchscript"
    with pytest.raises(MissingDependencyError, match=r"fxq\[onednn\]"):
        fxq.freeze(qmodel, x, form="onednn")
    with pytest.raises(ConfigError, match="'fast'; the forms are torchscript, onednn"):
        fxq.freeze(qmodel, x, form="fast")


def missing() -> None:
    raise MissingDependencyError("this needs oneDNN's C API: pip install 'fxq[onednn]'")


def shuffled(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = torch.cat([torch.relu(m.a(x)), torch.relu(m.b(x))], 1)
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


@needs_onednn
def test_results_lie_in_memory_as_the_models_do() -> None:
    net = Lambda(lambda m, x: (y := shuffled(m, x), y.mean((2, 3))), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(3, 8, 1))
    qmodel, x = quantized(net, 2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    frozen = fxq.freeze(qmodel, x, form="onednn")
    assert "_Shuffle" in " ".join(str(node.target) for node in frozen._run.__self__.model._idle[0].__self__.graph.nodes)
    for found, expected in zip(frozen(x), qmodel(x), strict=True):
        assert found.stride() == expected.stride()


@needs_onednn
def test_models_that_read_strides_run_as_they_are() -> None:
    net = Lambda(
        lambda m, x: torch.as_strided(m.c(shuffled(m, x)), (2, 8), (64, 1)),
        a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(3, 8, 1), c=nn.Conv2d(16, 8, 1),
    )  # fmt: skip
    qmodel, x = quantized(net, 2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    with pytest.raises(BackendError, match="how tensors lie in memory"):
        fxq.freeze(qmodel, x, form="onednn")
    assert torch.equal(fxq.freeze(qmodel, x)(x), qmodel(x))


@pytest.mark.parametrize("asks", ["parameters", "weight", "number"])
def test_code_around_may_ask_a_frozen_region(asks: str) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Lambda(lambda m, x: torch.relu(m.c(x)), c=nn.Conv2d(3, 8, 1))
            self.head = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() > 1e9:
                x = x * 2
            if asks == "parameters":
                x = x.to(next(self.inner.parameters()).dtype)
            elif asks == "weight":
                x = x.to(self.inner.c.weight.dtype)
            else:
                x = x * self.inner.c.stride[0]
            return self.head(self.inner(x).mean((2, 3)))

    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    qmodel = fxq.quantize(Around().eval(), [x, x.flip(2)], progress=False)
    frozen = fxq.freeze(qmodel, x)
    torch.testing.assert_close(frozen(x), qmodel(x), rtol=0.05, atol=0.05)
    assert torch.equal(frozen(x[:1]), qmodel(x[:1]))
