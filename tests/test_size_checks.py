"""Sizes that the float model refuses, on kernels that would compute something of them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.engine import available_engines
from fxq.errors import InputError
from fxq.graph_module import REFERENCE
from fxq.lazy_code import Uncompiled
from fxq.size_checks import Trial


class Between(nn.Module):
    """A function between two convolutions of one pixel."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], dims: int = 2) -> None:
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.before, self.after, self.function = conv(4, 8, 1), conv(8, 4, 1), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.function(self.before(x)))


class Sum(nn.Module):
    """Adds a constant to a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 1)
        self.register_buffer("constant", torch.randn(1, 8, 9, 9, generator=torch.Generator().manual_seed(2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) + self.constant


class Moved(nn.Module):
    """A layer whose channels or pixels are the first axis of the input."""

    def __init__(self, layer: nn.Module, *order: int) -> None:
        super().__init__()
        self.layer, self.order = layer, order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        moved = x.permute(self.order)
        return self.layer(moved if len(self.order) != 3 else moved[None])


class Two(nn.Module):
    """The sum of a convolution of each input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.one(x) + self.other(y)


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def quantized(model: nn.Module, *shape: int, backend: str = "x86") -> nn.Module:
    return fxq.quantize(model.eval(), [noise(*shape)], backend=backend, progress=False)


REFUSED = {
    "conv1d": ("x86", lambda: nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU()), (1, 4, 9), (1, 4, 2)),
    "conv2d": ("x86", lambda: nn.Conv2d(4, 8, 3), (1, 4, 9, 9), (1, 4, 9, 2)),
    "conv2d padded": ("x86", lambda: nn.Conv2d(4, 8, 5, padding=1), (1, 4, 9, 9), (1, 4, 2, 9)),
    "conv2d dilated": ("x86", lambda: nn.Conv2d(4, 8, 2, dilation=4), (1, 4, 9, 9), (1, 4, 4, 9)),
    "conv3d": ("x86", lambda: nn.Conv3d(4, 8, 2), (1, 4, 3, 3, 3), (1, 4, 1, 3, 3)),
    "silu": ("x86", lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.SiLU()), (1, 4, 9, 9), (1, 4, 2, 9)),
    "avg_pool2d": ("x86", lambda: Between(lambda x: F.avg_pool2d(x, 4)), (1, 4, 9, 9), (1, 4, 9, 3)),
    "avg_pool3d": ("x86", lambda: Between(lambda x: F.avg_pool3d(x, 2), 3), (1, 4, 3, 3, 3), (1, 4, 3, 1, 3)),
    "avg_pool3d padded": (
        "x86", lambda: Between(lambda x: F.avg_pool3d(x, 3, 1, 1), 3), (1, 4, 3, 3, 3), (1, 4, 3, 2, 3)),
    "instance_norm": ("x86", lambda: Between(nn.InstanceNorm2d(8)), (1, 4, 9, 9), (1, 4, 1, 1)),
    "conv2d_add": ("onednn", Sum, (1, 4, 9, 9), (1, 4, 8, 9)),
    "conv2d_add larger": ("onednn", Sum, (1, 4, 9, 9), (1, 4, 10, 9)),
    "qnnpack channels": ("qnnpack", lambda: nn.Conv2d(4, 8, 3, padding=1), (1, 4, 9, 9), (1, 3, 9, 9)),
    "qnnpack more channels": ("qnnpack", lambda: nn.Conv2d(4, 8, 3, padding=1), (1, 4, 9, 9), (1, 5, 9, 9)),
    "qnnpack features": ("qnnpack", lambda: nn.Linear(4, 8), (1, 5, 4), (1, 5, 5)),
    "conv2d of rows first": ("x86", lambda: Moved(nn.Conv2d(4, 8, 3), 2, 0, 1), (9, 9, 4), (2, 9, 4)),
    "qnnpack of features first": ("qnnpack", lambda: Moved(nn.Linear(8, 4), 1, 0), (8, 5), (4, 5)),
    "qnnpack of more features": ("qnnpack", lambda: Moved(nn.Linear(8, 4), 1, 0), (8, 5), (9, 5)),
    "qnnpack transposed": ("x86", lambda: nn.ConvTranspose2d(8, 8, 2, 2), (1, 8, 9, 9), (1, 7, 9, 9)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_float_model_refuses_is_refused(name: str) -> None:
    backend, make, taken, refused = REFUSED[name]
    if backend not in available_engines():
        pytest.skip(f"no {backend}")
    model = make().eval()
    qmodel = quantized(model, *taken, backend=backend)
    with pytest.raises((RuntimeError, ValueError)):
        model(noise(*refused))
    for _ in range(2):
        with pytest.raises((InputError, ValueError)):
            qmodel(noise(*refused))
    assert qmodel(noise(*taken)).shape == model(noise(*taken)).shape


def test_copies_refuse_too() -> None:
    qmodel = quantized(nn.Conv2d(4, 8, 3), 1, 4, 9, 9)
    for clone in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):
        with pytest.raises(InputError, match="fails on it"):
            clone(noise(1, 4, 2, 2))


def test_the_reference_runs_for_smaller_sizes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    qmodel = quantized(nn.Conv2d(4, 8, 3), 1, 4, 9, 9)
    runs = shapes_tried(monkeypatch)
    for size in (9, 12, 5, 6, 5, 4, 9):
        qmodel(noise(1, 4, size, size))
    assert runs == [(1, 4, 5, 5), (1, 4, 4, 4)]
    assert isinstance(vars(type(qmodel.meta[REFERENCE]))["forward"], Uncompiled)


def shapes_tried(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that reference graphs will run for."""
    found: list[tuple[int, ...]] = []
    run = Trial.run_call

    def run_call(trial: Trial, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        found.append(tuple(args[0].shape))
        run(trial, args, kwargs)

    monkeypatch.setattr(Trial, "run_call", run_call)
    return found


def test_first_axes_between_known_ones_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    if "qnnpack" not in available_engines():
        pytest.skip("no qnnpack")
    qmodel = quantized(nn.Linear(8, 4), 4, 8, backend="qnnpack")
    runs = shapes_tried(monkeypatch)
    for batch in (4, 1, 2, 3, 6, 5, 1, 8):
        qmodel(noise(batch, 8))
    assert runs == [(1, 8), (6, 8), (8, 8)]


@pytest.mark.parametrize("batches", [(4, 2), (4, 1), (1, 4)])
def test_fused_sums_refuse_operands_of_two_batches(batches: tuple[int, int]) -> None:
    if "onednn" not in available_engines():
        pytest.skip("no onednn")
    model, inputs = Two().eval(), (noise(1, 4, 9, 9), noise(1, 4, 9, 9))
    qmodel = fxq.quantize(model, [inputs], backend="onednn", progress=False)
    assert "conv2d_add" in {region.row for region in qmodel.meta[REFERENCE].plan.regions}
    qmodel(noise(4, 4, 9, 9), noise(4, 4, 9, 9))
    with pytest.raises(InputError, match="'add' adds tensors of sizes"):
        qmodel(*(noise(batch, 4, 9, 9) for batch in batches))


def test_models_without_such_kernels_do_not_ask() -> None:
    qmodel = quantized(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)), 1, 4, 9, 9)
    assert not any("unchecked" in name for name in qmodel.plan.properties)
