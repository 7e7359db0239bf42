"""Graphs that call oneDNN directly give the lowered model's numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import Lambda, conv
from torch import nn

import fxq
from fxq import direct_kernels, direct_plan, onednn, onednn_primitives
from fxq.buffer_plan import Span
from fxq.direct_kernels import DirectModel
from fxq.engine import running
from fxq.errors import BackendError
from fxq.models import load_model


@pytest.fixture(autouse=True)
def primitives_are_never_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_plan, "slower", lambda call, other: False)


pytestmark = pytest.mark.skipif(not onednn.is_available(), reason="pip install 'fxq[onednn]' for oneDNN's C API")


def shuffling() -> nn.Module:
    """Inputs of convolutions that are views, shapes that are numbers in the graph, a residual, a silu, a gate."""

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = F.silu(m.entry(x))
        n, c, h, w = x.size()
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        left, right = x.chunk(2, 1)
        x = torch.cat([left, torch.relu(m.branch(right))], 1)
        x = x + m.depthwise(x) * torch.sigmoid(m.gate(x.mean((2, 3), keepdim=True)))
        return m.head(F.hardswish(m.exit(x)).mean((2, 3)))

    return Lambda(
        forward, entry=conv(3, 16), branch=conv(8, 8, 1), depthwise=conv(16, 16, groups=16), gate=conv(16, 16, 1),
        exit=conv(16, 24, 1), head=nn.Linear(24, 5),
    )  # fmt: skip


def residuals() -> nn.Module:
    """Sums onto a pool of torch's, onto one that is read again, twice onto one, and after a relu that was absorbed."""

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(m.entry(x), 3, 2, 1)
        x = F.leaky_relu(x, 0.5)
        x = torch.relu(x + m.a(x))
        y = x + m.b(x)
        z = y + m.c(x)
        z = z + x
        z = torch.relu(m.d(z)) + z
        return m.head(F.hardswish(m.e(z) + m.f(z)).mean((2, 3)))

    parts: dict[str, nn.Module] = {name: conv(16, 16) for name in "abcdef"}
    return Lambda(forward, entry=conv(3, 16), head=nn.Linear(16, 5), **parts)


def gates() -> nn.Module:
    """Squeeze-and-excitation of enough channels, pools of few."""

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(torch.relu(m.entry(x)), 3, 2, 1)
        x = F.hardswish(m.wide(x))
        factor = F.hardsigmoid(m.up(torch.relu(m.down(F.adaptive_avg_pool2d(x, 1)))))
        return m.head(F.adaptive_avg_pool2d(m.exit(factor * x), 1).flatten(1))

    return Lambda(
        forward, entry=conv(3, 24), wide=conv(24, 72), down=conv(72, 8, 1), up=conv(8, 72, 1), exit=conv(72, 16, 1),
        head=nn.Linear(16, 5),
    )  # fmt: skip


def joined() -> nn.Module:
    """Joins: shuffled and split, of what was joined before, and one that a sum reads."""

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(m.entry(x))
        x = torch.cat([torch.relu(m.a(x)), torch.relu(m.b(x))], 1)
        n, c, h, w = x.size()
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
        left, right = x.chunk(2, 1)
        parts = [left, torch.relu(m.c(right))]
        parts.append(torch.relu(m.d(torch.cat(parts, 1))))
        parts.append(torch.relu(m.e(torch.cat(parts, 1))))
        return m.head(torch.cat(parts, 1).mean((2, 3)))

    return Lambda(
        forward, entry=conv(3, 8), a=conv(8, 8), b=conv(8, 8), c=conv(8, 8), d=conv(16, 8), e=conv(24, 8),
        head=nn.Linear(32, 5),
    )  # fmt: skip


def both(model: nn.Module, *shape: int, backend: str = "x86") -> tuple[nn.Module, DirectModel]:
    generator = torch.Generator().manual_seed(4)
    images = [torch.randn(shape, generator=generator) for _ in range(3)]
    qmodel = fxq.quantize(model, images, backend=backend, progress=False)
    return qmodel, DirectModel(qmodel, (images[0],), {})


def call(direct: DirectModel, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(), running():
        return direct(x).clone()  # type: ignore[no-any-return]


def kinds(direct: DirectModel) -> Counter[str]:
    return Counter(type(step.kernel).__name__ for step in direct._steps.values())


@pytest.mark.parametrize("backend", ["x86", "onednn", "fbgemm", "qnnpack"])
@pytest.mark.parametrize("make", [shuffling, residuals, gates, joined])
def test_numbers_are_those_of_the_lowered_model(make: Callable[[], nn.Module], backend: str) -> None:
    qmodel, direct = both(make(), 2, 3, 16, 16, backend=backend)
    layers = [k.name for k in qmodel.plan.kernels.values() if "conv" in k.name or "linear" in k.name]
    assert direct.convolutions == len(layers) >= 5
    scale = (qmodel(torch.randn(2, 3, 16, 16)).abs().max() / 127).item()
    for seed in range(3):
        x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        assert (call(direct, x) - qmodel(x)).abs().max() <= 4 * scale


@pytest.mark.parametrize("make", [shuffling, residuals, gates, joined])
def test_memory_is_used_again_only_when_nobody_reads_it_any_more(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    def apart(spans: Sequence[Span]) -> tuple[list[int], int]:
        size = -(-max(span.size for span in spans) // 64) * 64
        return [index * size for index in range(len(spans))], len(spans) * size

    for backend in ("x86", "onednn"):
        qmodel, direct = both(make(), 2, 3, 16, 16, backend=backend)
        with monkeypatch.context() as patch:
            patch.setattr(direct_kernels, "place", apart)
            with torch.inference_mode():
                separate = DirectModel(qmodel, (torch.randn(2, 3, 16, 16),), {})
        for seed in range(3):
            x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
            assert torch.equal(call(direct, x), call(separate, x))


def test_sums_and_activations_are_taken_into_convolutions() -> None:
    _, direct = both(residuals(), 2, 3, 16, 16)
    added = {name for name, step in direct._steps.items() if step.residual is not None}
    assert len(added) == 4  # a, b, c and e or f; the sums after z have no convolution or one with a relu between
    _, direct = both(gates(), 2, 3, 16, 16)
    assert kinds(direct) == {"Convolution": 6, "Gate": 1, "Pool": 3}
    assert {"hardswish", "hardsigmoid"} <= direct._steps.keys()  # in place of the convolutions before them


def test_joins_and_shuffles_are_moves_of_bytes() -> None:
    _, direct = both(joined(), 2, 3, 16, 16)
    assert kinds(direct)["Shuffle"] == 1
    assert kinds(direct)["Join"] == 4  # the one that is shuffled, too, for whoever else reads it
    joins = {name: step.sources for name, step in direct._steps.items() if name.startswith("cat")}
    assert [len(sources) for sources in joins.values()] == [2, 2, 2, 2]
    assert joins["cat_2"][0] == "cat_1" and joins["cat_3"][0] == "cat_2"  # as they lie there
    run: Any = direct._idle[0]
    targets = [str(node.target) for node in run.__self__.graph.nodes]
    assert not [target for target in targets if "cat" in target or "transpose" in target or "chunk" in target]


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("ahead", [False, True])
def test_only_two_by_turns_are_a_shuffle(groups: int, ahead: bool) -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(m.entry(x))
        x = torch.cat([torch.relu(m.a(x)), torch.relu(m.b(x))], 1)
        n, c, h, w = x.shape
        split = (n, c // groups, groups, h, w) if ahead else (n, groups, c // groups, h, w)
        return m.c(x.view(split).transpose(1, 2).contiguous().view(n, c, h, w))

    model = Lambda(forward, entry=conv(3, 8), a=conv(8, 8), b=conv(8, 8), c=conv(16, 8))
    qmodel, direct = both(model, 2, 3, 8, 8)
    assert kinds(direct)["Shuffle"] == (groups == 2 and not ahead)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    step = (qmodel(x).max() - qmodel(x).min()) / 255
    assert (call(direct, x) - qmodel(x)).abs().max() <= 2 * step


def test_a_join_of_other_scales_stays_torchs() -> None:
    qmodel, _ = both(joined(), 1, 3, 8, 8)
    for node in qmodel.graph.nodes:
        if node.name == "cat_3":
            parts, dim, scale, zero_point = node.args
            node.args = (parts, dim, 2 * scale, zero_point)
    qmodel.recompile()
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    direct = DirectModel(qmodel, (x,), {})
    assert "cat_2" in direct._steps and "cat_3" not in direct._steps
    assert (call(direct, x) - qmodel(x)).abs().max() <= 0.05 * qmodel(x).abs().max()


def test_an_activation_between_float_nodes_is_taken_in() -> None:
    """Of images of one pixel silu runs in float, between a dequantize and a quantize."""

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = m.entry(x)
        y = m.down(F.adaptive_avg_pool2d(x, 1))
        return m.exit(x * torch.sigmoid(m.up(F.silu(y)))) + m.also(y)

    model = Lambda(
        forward, entry=conv(3, 64), down=conv(64, 8, 1), up=conv(8, 64, 1), exit=conv(64, 8, 1), also=conv(8, 8, 1)
    )
    qmodel, direct = both(model, 2, 3, 8, 8)
    names = [k.name for k in qmodel.plan.kernels.values()]
    assert any("sigmoid" in name for name in names)
    assert "sigmoid" in direct._steps and "silu_quantize" not in direct._steps  # two read what silu reads
    model.function = lambda m, x: m.exit((x := m.entry(x)) * torch.sigmoid(m.up(F.silu(m.down(x.mean((2, 3), True))))))
    qmodel, direct = both(model, 2, 3, 8, 8)
    assert {"sigmoid", "silu_quantize"} <= direct._steps.keys()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    assert (call(direct, x) - qmodel(x)).abs().max() <= 3 * qmodel(x).abs().max() / 127


def test_one_rounding_less_is_closer_to_the_float_model() -> None:
    model = load_model("resnet18")
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(2, 3, 64, 64, generator=generator) for _ in range(2)]
    qmodel = fxq.quantize(model, images, progress=False)
    direct = DirectModel(qmodel, (images[0],), {})
    assert sum(step.residual is not None for step in direct._steps.values()) == 8
    x = torch.randn(2, 3, 64, 64, generator=generator)
    with torch.no_grad():
        wanted = model(x)
    errors = [(found - wanted).pow(2).mean().item() for found in (call(direct, x), qmodel(x))]
    assert errors[0] < 1.1 * errors[1]
    step = (qmodel(x).max() - qmodel(x).min()) / 255
    assert (call(direct, x) - qmodel(x)).abs().max() <= 6 * step


def test_a_kernel_that_gives_other_numbers_stays_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Lambda(lambda m, x: m.b(torch.relu(m.a(x))), a=conv(3, 8), b=conv(8, 8))
    made = onednn_primitives._constants

    def wrong(spec: onednn_primitives.ConvSpec) -> dict[int, Any]:
        if spec.weight.shape[1] == 3 and spec.bias is not None:
            spec = spec._replace(bias=spec.bias + 3)
        return made(spec)

    monkeypatch.setattr(onednn_primitives, "_constants", wrong)
    qmodel, direct = both(model, 1, 3, 8, 8)
    assert direct.convolutions == 1
    x = torch.randn(1, 3, 8, 8)
    step = (qmodel(x).max() - qmodel(x).min()) / 255
    assert (call(direct, x) - qmodel(x)).abs().max() <= 1.5 * step


@pytest.mark.parametrize("backend", ["x86", "onednn"])
def test_a_sum_that_differs_stays_torchs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Lambda(lambda m, x: (y := m.a(x)) + m.b(y), a=conv(3, 8), b=conv(8, 8))
    made = onednn_primitives._convolution_attributes

    def wrong(lib: Any, spec: onednn_primitives.ConvSpec) -> Any:
        return made(lib, spec if spec.residual is None else spec._replace(residual=(2 * spec.residual[0], 0)))

    monkeypatch.setattr(onednn_primitives, "_convolution_attributes", wrong)
    qmodel, direct = both(model, 1, 3, 8, 8, backend=backend)
    assert not any(step.residual for step in direct._steps.values())
    x = torch.randn(1, 3, 8, 8)
    step = (qmodel(x).max() - qmodel(x).min()) / 255
    assert (call(direct, x) - qmodel(x)).abs().max() <= 1.5 * step


def test_torchs_sum_in_place_leaves_the_scales_of_primitives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(direct_plan._MAKERS, torch.ops.quantized.conv2d_add, lambda *_: None)
    model = Lambda(lambda m, x: m.a(x) + m.b(torch.relu(m.c(x))), a=conv(3, 8), b=conv(8, 8), c=conv(3, 8))
    qmodel, direct = both(model, 1, 3, 8, 8, backend="onednn")
    assert direct.convolutions == 2 and any("conv2d_add" in str(node.target) for node in qmodel.graph.nodes)
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    step = (qmodel(x).max() - qmodel(x).min()) / 255
    for _ in range(3):
        assert (call(direct, x) - qmodel(x)).abs().max() <= 2 * step


def test_a_convolution_that_reads_a_view_of_the_residual_does_not_write_over_it() -> None:
    """The rows that it reads of one image lie dense, so that they are read where they are."""
    model = Lambda(lambda m, x: (y := m.a(x)) + m.b(y[:, :, :6]), a=conv(3, 8), b=nn.Conv2d(8, 8, 3, padding=(2, 1)))
    qmodel, direct = both(model, 1, 3, 8, 8)
    assert any(step.residual for step in direct._steps.values())
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(4))  # calibrated with it
    step = (qmodel(x).max() - qmodel(x).min()) / 255
    assert (call(direct, x) - qmodel(x)).abs().max() <= 2 * step


def test_numbers_taken_from_values_are_taken_at_each_call() -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        largest = x.abs().max().item()
        return m.a(x / largest) * largest

    qmodel, direct = both(Lambda(forward, a=conv(3, 8)), 1, 3, 8, 8)
    x = 5 * torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert (call(direct, x) - qmodel(x)).abs().max() <= 0.02 * qmodel(x).abs().max()


def test_a_kernel_that_takes_longer_than_torchs_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_plan, "slower", lambda call, other: call().shape == other().shape)
    model = Lambda(lambda m, x: (y := m.a(x)) + m.b(m.d(y)), a=conv(3, 8), b=conv(8, 8), d=conv(8, 8, groups=8))
    _, direct = both(model, 1, 3, 8, 8)
    assert list(direct._steps) == ["d"]  # a depthwise one always pays


def test_nothing_to_replace() -> None:
    qmodel = fxq.quantize(Lambda(lambda m, x: x + torch.relu(x)), [torch.randn(3, 4)], progress=False)
    with pytest.raises(BackendError, match="no convolution or linear"):
        DirectModel(qmodel, (torch.randn(3, 4),), {})


def test_callers_at_the_same_time_have_memory_of_their_own() -> None:
    _, direct = both(shuffling(), 1, 3, 8, 8)
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), running():
        expected = direct(x).clone()
        busy = direct._idle.pop()  # as a caller in another thread holds it
        assert torch.equal(direct(x), expected)
        assert direct._idle != [busy]
