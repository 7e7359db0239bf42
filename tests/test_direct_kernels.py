"""Graphs that call oneDNN's convolutions give the lowered model's numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import Lambda, conv
from torch import nn

import fxq
from fxq import onednn
from fxq.direct_kernels import DirectModel
from fxq.engine import running
from fxq.errors import BackendError
from fxq.models import load_model

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
    ).eval()  # fmt: skip


def both(model: nn.Module, *shape: int, backend: str = "x86") -> tuple[nn.Module, DirectModel]:
    generator = torch.Generator().manual_seed(4)
    images = [torch.randn(shape, generator=generator) for _ in range(3)]
    qmodel = fxq.quantize(model, images, backend=backend, progress=False)
    return qmodel, DirectModel(qmodel, (images[0],), {})


@pytest.mark.parametrize("backend", ["x86", "onednn", "fbgemm", "qnnpack"])
def test_all_convolutions_of_symmetric_weights_are_replaced(backend: str) -> None:
    qmodel, direct = both(shuffling(), 2, 3, 16, 16, backend=backend)
    kernels = [k.name for k in qmodel.plan.kernels.values() if "conv" in k.name]
    assert direct.convolutions == len(kernels) >= 4
    scale = (qmodel(torch.randn(2, 3, 16, 16)).abs().max() / 127).item()
    for seed in range(3):
        x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode(), running():
            found = direct(x)
        assert (found - qmodel(x)).abs().max() <= 4 * scale


def test_numbers_of_a_real_model() -> None:
    """resnet18 on the x86 backend, where torch's kernels are oneDNN's too: the same to the last bit."""
    qmodel, direct = both(load_model("resnet18"), 1, 3, 64, 64)
    assert direct.convolutions == 20
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(9))
    with torch.inference_mode(), running():
        found = direct(x)
    step = (qmodel(x).max() - qmodel(x).min()) / 255
    assert (found - qmodel(x)).abs().max() <= 2 * step


def test_a_kernel_that_gives_other_numbers_stays_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Lambda(lambda m, x: m.b(torch.relu(m.a(x))), a=conv(3, 8), b=conv(8, 8)).eval()
    made = onednn._constants

    def wrong(spec: onednn.ConvSpec) -> dict[int, torch.Tensor]:
        found = made(spec)
        if spec.weight.shape[1] == 3:
            found[onednn._BIAS] = found[onednn._BIAS] + 3
        return found

    monkeypatch.setattr(onednn, "_constants", wrong)
    qmodel, direct = both(model, 1, 3, 8, 8)
    assert direct.convolutions == 1
    x = torch.randn(1, 3, 8, 8)
    step = (qmodel(x).max() - qmodel(x).min()) / 255
    with torch.inference_mode(), running():
        assert (direct(x) - qmodel(x)).abs().max() <= 1.5 * step


def test_nothing_to_replace() -> None:
    qmodel = fxq.quantize(nn.Linear(4, 4).eval(), [torch.randn(3, 4)], progress=False)
    with pytest.raises(BackendError, match="no convolution"):
        DirectModel(qmodel, (torch.randn(3, 4),), {})


def test_callers_at_the_same_time_have_memory_of_their_own() -> None:
    _, direct = both(shuffling(), 1, 3, 8, 8)
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), running():
        expected = direct(x).clone()
        busy = direct._idle.pop()  # as a caller in another thread holds it
        assert torch.equal(direct(x), expected)
        assert direct._idle != [busy]
