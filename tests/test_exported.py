"""Exported programs: the reference graph's numbers, through a file, and packed kernels again afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import Lambda, conv, quiet
from torch import nn

import fxq
from fxq.errors import FxqError, InputError, StageError
from fxq.qdq import is_quantize

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
MORE = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def attention(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    tokens = m.a(x).flatten(2).transpose(1, 2)
    return m.mha(tokens, tokens, tokens, need_weights=False)[0]


CASES: dict[str, Any] = {
    "residual": lambda m, x: m.fc(torch.relu(m.b(torch.relu(m.a(x))) + m.a(x)).mean((2, 3))),
    "dict": lambda m, x: {"out": m.a(x), "aux": torch.relu(m.b(m.a(x)))},
    "shape": lambda m, x: m.a(x).view(x.shape[0], -1, x.size(2) * x.size(3) // 2).mean(-1),
    "attention": attention,
    "lstm": lambda m, x: m.lstm(m.a(x).flatten(2).transpose(1, 2))[0],
}


def reference_of(case: str) -> nn.Module:
    torch.manual_seed(3)
    net = Lambda(
        CASES[case], a=conv(), b=conv(4, 4), fc=nn.Linear(4, 5), lstm=nn.LSTM(4, 3, batch_first=True),
        mha=nn.MultiheadAttention(4, 2, batch_first=True),
    )  # fmt: skip
    prepared = fxq.prepare(net, X[:1])
    prepared(X)
    return quiet(fxq.convert_to_reference, prepared)


def same(value: Any, other: Any, tolerance: float = 0.0) -> None:
    torch.testing.assert_close(value, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_through_a_file_and_back_to_kernels(case: str, tmp_path: Path) -> None:
    reference = reference_of(case)
    lowered = quiet(fxq.lower, reference, "x86")
    program = fxq.to_exported_program(lowered)
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2")
    with torch.no_grad():
        for x in (X, MORE):
            same(loaded.module()(x), reference(x), 1e-6)
    again = quiet(fxq.from_exported_program, loaded)
    same(again(MORE), lowered(MORE))
    assert fxq.graph_table(again) == fxq.graph_table(lowered)
    other = quiet(fxq.from_exported_program, loaded, "qnnpack")
    same(other(MORE), quiet(fxq.lower, reference, "qnnpack")(MORE))


def test_plain_arithmetic_runs_without_fxq(tmp_path: Path) -> None:
    reference = reference_of("residual")
    torch.export.save(fxq.to_exported_program(reference).run_decompositions(), tmp_path / "net.pt2")
    with torch.no_grad():
        torch.save((MORE, reference(MORE)), tmp_path / "data.pt")
    code = (
        "import sys; sys.modules['fxq'] = None; import torch\n"
        "x, y = torch.load('data.pt', weights_only=True)\n"
        "torch.testing.assert_close(torch.export.load('net.pt2').module()(x), y, rtol=1e-6, atol=1e-6)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr


def test_ahead_of_time(tmp_path: Path) -> None:
    if "FXQ_AOT" not in os.environ:
        pytest.skip("compiling takes its time: FXQ_AOT=1 runs it")
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("there is no C++ compiler")
    reference = reference_of("residual")
    path = str(tmp_path / "net.pt2")
    torch._inductor.aoti_compile_and_package(fxq.to_exported_program(reference), package_path=path)
    compiled = torch._inductor.aoti_load_package(path)
    step = next(node.args[1] for node in reversed(reference.graph.nodes) if is_quantize(node))
    with torch.no_grad():
        for x in (X, MORE):
            same(compiled(x), reference(x), 1.01 * step)


def test_shapes_of_ones_own() -> None:
    program = fxq.to_exported_program(reference_of("dict"), X, dynamic_shapes=({2: torch.export.Dim("height", min=4)},))
    with torch.no_grad():
        same(program.module()(X[:, :, :6])["out"].shape, torch.Size([2, 4, 6, 8]))
    with pytest.raises(Exception, match=r"batch|shape|size|[gG]uard"):
        program.module()(MORE)


def test_a_fixed_batch() -> None:
    net = Lambda(lambda m, x: m.a(x).reshape(2, 256), a=conv())
    prepared = fxq.prepare(net, X)
    prepared(X)
    reference = fxq.convert_to_reference(prepared)
    with pytest.raises(FxqError, match=r"torch\.export refuses.*dynamic_batch=False"):
        fxq.to_exported_program(reference)
    with torch.no_grad():
        same(fxq.to_exported_program(reference, dynamic_batch=False).module()(X), reference(X), 1e-6)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) if float(x.sum()) != 0 else x


def test_refused() -> None:
    with pytest.raises(StageError):
        fxq.to_exported_program(fxq.prepare(conv().eval(), X))
    with pytest.raises(FxqError, match=r"Branches could not be traced as a whole.*regions one by one"):
        fxq.to_exported_program(quiet(fxq.quantize, Branches().eval(), [X]))


def test_programs_of_others_and_changed_ones() -> None:
    with pytest.raises(InputError, match="has no fxq content"):
        fxq.from_exported_program(torch.export.export(conv().eval(), (X,)))
    program = fxq.to_exported_program(reference_of("residual"))
    quantize = next(node for node in program.graph.nodes if node.target is torch.ops.fxq.quantize.default)
    quantize.update_arg(1, 0.5)
    with pytest.raises(InputError, match="changed after fxq made it"):
        fxq.from_exported_program(program)
    state = program.state_dict
    state["fxq_content"] = state["fxq_content"][:-20]
    with pytest.raises(InputError, match="malformed"):
        fxq.from_exported_program(program)


def test_example_inputs_that_are_none() -> None:
    model = quiet(fxq.quantize, Lambda(lambda m, x: m.a(x), a=conv()), [X])
    with pytest.raises(InputError, match="the example inputs are a int; give a tensor"):
        fxq.to_exported_program(model, 5)
