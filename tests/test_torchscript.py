"""TorchScript files: run by torch alone, in another process, to the last bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import Lambda, conv, quiet
from torch import nn

import fxq
from fxq.engine import available_engines, cpu_has_vnni
from fxq.errors import FxqError, StageError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
MORE = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(2))

# What a user without fxq runs: importing it fails.
ALONE = """
import sys, warnings
sys.modules["fxq"] = None
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
torch.backends.quantized.engine = sys.argv[3]
inputs, expected = torch.load(sys.argv[2], weights_only=True)
torch.testing.assert_close(torch.jit.load(sys.argv[1])(inputs), expected, rtol=0, atol=0)
"""


def residual(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return m.fc(torch.relu(m.b(torch.relu(m.a(x))) + m.a(x)).mean((2, 3)))


def big(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.cat([x, x], 2)] * 2, 3).contiguous(memory_format=torch.channels_last)


def wide(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = torch.relu(m.depthwise(m.w(x)))
    return y * torch.sigmoid(y.mean((2, 3), keepdim=True))


def transposed(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return m.b(m.t(m.a(x)))


CASES: dict[str, Any] = {
    "residual": residual,
    "depthwise": wide,
    "grouped": lambda m, x: m.grouped(m.w(x)),
    "silu": lambda m, x: m.b(F.silu(m.a(x))),
    "squeeze": lambda m, x: m.a(big(x)) * torch.sigmoid(m.b(m.a(big(x)).mean((2, 3), keepdim=True))),
    "pool": lambda m, x: F.max_pool2d(torch.relu(m.a(big(x))), 3, 2, 1),
    "dict": lambda m, x: {"out": m.a(x), "aux": torch.relu(m.b(m.a(x)))},
    "shape": lambda m, x: m.a(x).view(x.shape[0], -1, x.size(2) * x.size(3) // 2).mean(-1),
    "attention": lambda m, x: m.mha(*[m.a(x).flatten(2).transpose(1, 2)] * 3, need_weights=False)[0],
    "float leaf": lambda m, x: m.lstm(m.a(x).flatten(2).transpose(1, 2))[0],
}


def net(case: str) -> nn.Module:
    torch.manual_seed(3)
    return Lambda(
        CASES.get(case, transposed), a=conv(), b=conv(4, 4), fc=nn.Linear(4, 5), w=conv(3, 130),
        t=nn.ConvTranspose2d(4, 4, 3), depthwise=conv(130, 260, groups=130), grouped=conv(130, 4, groups=2),
        lstm=nn.LSTM(4, 3, batch_first=True),
        mha=nn.MultiheadAttention(4, 2, batch_first=True),
    )  # fmt: skip


def quantized(case: str, backend: str = "x86", qconfig: str = "per_channel") -> nn.Module:
    return quiet(fxq.quantize, net(case), [X], backend=backend, qconfig=qconfig)


@pytest.mark.parametrize("qconfig", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_last_bit(case: str, qconfig: str, tmp_path: Path) -> None:
    model = quantized(case, qconfig=qconfig)
    traced = fxq.to_torchscript(model, X, tmp_path / "net.pt")
    before = torch.backends.quantized.engine
    loaded = torch.jit.load(tmp_path / "net.pt")
    for x in (X, MORE):
        for again in (traced, loaded):
            torch.testing.assert_close(quiet(again, x), model(x), rtol=0, atol=0)
    assert torch.backends.quantized.engine == before


@pytest.mark.parametrize(
    ("backend", "case"), [("x86", "residual"), ("x86", "depthwise"), ("onednn", "residual"), ("qnnpack", "residual")]
)
def test_in_a_fresh_process_without_fxq(backend: str, case: str, tmp_path: Path) -> None:
    model = quantized(case, backend)
    fxq.to_torchscript(model, path=tmp_path / "net.pt")
    torch.save((MORE, model(MORE)), tmp_path / "data.pt")
    command = [sys.executable, "-c", ALONE, str(tmp_path / "net.pt"), str(tmp_path / "data.pt"), backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_groups_are_split_for_the_x86_engine() -> None:
    if not cpu_has_vnni() or "onednn" not in available_engines():
        pytest.skip("without VNNI the x86 engine is fbgemm")
    text = str(fxq.to_torchscript(quantized("depthwise")).graph)
    assert "aten::split" in text and "quantized::cat" in text
    assert "aten::split" not in str(fxq.to_torchscript(quantized("grouped")).graph)


def test_reference_and_loaded_models(tmp_path: Path) -> None:
    model = quantized("residual")
    fxq.save(model, tmp_path / "net.fxq")
    for source in (fxq.load(tmp_path / "net.fxq"), fxq.load_reference(tmp_path / "net.fxq")):
        torch.testing.assert_close(fxq.to_torchscript(source)(MORE), model(MORE), rtol=0, atol=0)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) if float(x.sum()) != 0 else x


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError):
        fxq.to_torchscript(fxq.prepare(net("residual"), X))
    with pytest.raises(FxqError, match=r"Branches could not be traced as a whole.*regions one by one"):
        fxq.to_torchscript(quiet(fxq.quantize, Branches().eval(), [X]))
    with pytest.raises(FxqError, match=r"none/net\.pt: cannot be written"):
        fxq.to_torchscript(quantized("residual"), path=tmp_path / "none" / "net.pt")
    with pytest.raises(FxqError, match=r"cannot be written \(Is a directory\)"):
        fxq.to_torchscript(quantized("residual"), path=tmp_path)
    with pytest.raises(FxqError, match=r"node 'depthwise' needs a kernel of onednn beside those of fbgemm.*'x86'"):
        fxq.to_torchscript(quantized("depthwise", "fbgemm"))


def test_transposed_convolutions_run_in_float(tmp_path: Path) -> None:
    """As they come back wrong from torch's files; the result is the reference graph's then."""
    model = quantized("transposed", qconfig="per_tensor")
    fxq.to_torchscript(model, X, tmp_path / "net.pt")
    found = quiet(torch.jit.load(tmp_path / "net.pt"), X)
    scale = model.plan.kernels["b"].scale
    torch.testing.assert_close(found, model(X), rtol=0, atol=1.01 * scale)
    assert "quantized::conv2d" in str(torch.jit.load(tmp_path / "net.pt").inlined_graph)


def test_a_list_for_an_input_is_refused() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, levels: list[torch.Tensor]) -> torch.Tensor:
            return self.conv(levels[0]) + self.conv(levels[1])

    x = torch.rand(2, 3, 8, 8)
    prepared = fxq.prepare(Head().eval(), ([x, x],))
    prepared([x, x])
    with pytest.raises(FxqError, match=r"Head takes 1 inputs \(levels\), of which 0 are tensors"):
        fxq.to_torchscript(fxq.convert(prepared))


def test_numbers_taken_from_values_are_refused() -> None:
    model = Lambda(lambda m, x: m.a(x / x.abs().max().item()), a=nn.Conv2d(3, 4, 1))
    qmodel = fxq.quantize(model, [torch.randn(1, 3, 8, 8)], progress=False)
    with pytest.raises(FxqError, match=r"'item' takes numbers from the values"):
        fxq.to_torchscript(qmodel)


@pytest.mark.parametrize("inputs", [torch.randn(2, 5, 8, 8), torch.randint(0, 9, (2, 3, 8, 8))])
def test_inputs_that_the_model_does_not_take(inputs: torch.Tensor) -> None:
    with pytest.raises(FxqError):
        fxq.to_torchscript(quantized("residual"), inputs)


def test_outputs_that_torchscript_has_no_type_for() -> None:
    model = Lambda(lambda m, x: {"o": m.a(x), "z": [m.a(x), (x,)]}, a=conv())
    with pytest.raises(FxqError, match=r"torch\.jit\.trace refuses the model \(RuntimeError"):
        fxq.to_torchscript(quiet(fxq.quantize, model, [X]))
