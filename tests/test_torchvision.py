"""Unmodified torchvision models through the whole compiler, each on the backends it says most about."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxq
from fxq.agreement import kernel_agreement
from fxq.backends import get_backend
from fxq.graph_module import QuantModule
from fxq.models import load_model
from fxq.numerics import sqnr
from fxq.plan import Status
from fxq.torchvision_ops import import_torchvision

HEAVY = (nn.modules.conv._ConvNd, nn.Linear)
# model: image size, backends, reasons of its float nodes
MODELS: dict[str, tuple[int, tuple[str, ...], set[str]]] = {
    "resnet18": (64, ("x86", "fbgemm", "onednn", "qnnpack"), set()),
    "mobilenet_v2": (64, ("x86", "fbgemm", "onednn", "qnnpack"), set()),
    "mobilenet_v3_large": (64, ("x86", "onednn"), set()),
    "shufflenet_v2_x1_0": (64, ("x86", "qnnpack"), set()),
    "densenet121": (64, ("x86",), set()),
    "efficientnet_b0": (64, ("fbgemm",), {"no-kernel"}),
    "googlenet": (64, ("x86",), set()),
    "squeezenet1_1": (64, ("qnnpack",), {"at-exit", "island"}),
    "fcn_resnet50": (64, ("x86",), {"at-exit"}),
}
PAIRS = [(name, backend) for name, (_, backends, _) in MODELS.items() for backend in backends]


@cache
def live_model(name: str) -> nn.Module:
    """Random weights with BatchNorm statistics that fit them; frozen, as every quantization shares it."""
    torch.manual_seed(0)
    model = load_model(name).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.train()
    with torch.no_grad():
        model(images(name))
    return model.eval()


def images(name: str, batch: int = 4) -> torch.Tensor:
    size = MODELS[name][0]
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


@cache
def reference_of(name: str, backend: str) -> QuantModule:
    prepared = fxq.prepare(live_model(name), images(name, 1), backend=backend)
    fxq.calibrate(prepared, [images(name, 2)], progress=False)
    return fxq.convert_to_reference(prepared)


@cache
def lowered_of(name: str, backend: str) -> QuantModule:
    return fxq.lower(reference_of(name, backend), backend)


def weighted_calls(name: str) -> int:
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    model = live_model(name)
    hooks = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, HEAVY)]
    with torch.no_grad():
        model(images(name, 1))
    for hook in hooks:
        hook.remove()
    return calls


def kernels(name: str, backend: str) -> list[str]:
    return [kernel.name for kernel in lowered_of(name, backend).plan.kernels.values()]


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_all_convs_and_linears_are_int8(name: str, backend: str) -> None:
    int8 = [kernel for kernel in kernels(name, backend) if kernel.startswith(("quantized::conv", "quantized::linear"))]
    assert len(int8) == weighted_calls(name) > 0


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_every_float_node_has_a_reason(name: str, backend: str) -> None:
    decisions = lowered_of(name, backend).plan.decisions.values()
    reasons = [decision.reason for decision in decisions if decision.status is Status.FLOAT]
    assert all(reason is not None and reason.text for reason in reasons)
    assert {reason.code for reason in reasons if reason} == MODELS[name][2]


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_every_kernel_is_within_one_lsb(name: str, backend: str) -> None:
    lines = kernel_agreement(reference_of(name, backend), get_backend(backend), images(name, 1))
    assert len(lines) > weighted_calls(name)
    assert [line for line in lines if line.max_lsb > 1] == []


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_it_runs_like_the_model(name: str, backend: str) -> None:
    x = images(name, 3)
    with torch.no_grad():
        expected, actual = live_model(name)(x), lowered_of(name, backend)(x)
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        expected, actual = expected["out"], actual["out"]
    assert actual.shape == expected.shape and actual.isfinite().all()
    assert actual.std() > 0.1 * expected.std()


@pytest.mark.parametrize("backend", MODELS["mobilenet_v2"][1])
def test_mobilenet_v2_is_int8_from_end_to_end(backend: str) -> None:
    """No separate relu6, no float node, one quantize, one dequantize."""
    lowered = lowered_of("mobilenet_v2", backend)
    found = kernels("mobilenet_v2", backend)
    assert not any("clamp" in kernel or "relu" in kernel for kernel in found)
    assert all(d.status in (Status.QUANTIZED, Status.SHARED) for d in lowered.plan.decisions.values())
    assert found.count("quantize_per_tensor") == found.count("dequantize") == 1
    assert "clamp" not in lowered.code and "relu6" not in lowered.code and "hardtanh" not in lowered.code


def test_residuals_of_resnet_are_added_in_the_convs_of_onednn() -> None:
    found = kernels("resnet18", "onednn")
    assert sum(kernel.startswith("quantized::conv2d_add") for kernel in found) == 8
    assert not any(kernel.startswith("quantized::add") for kernel in found)
    # the first block adds the max pool's output, which could be a view; else nothing needs a copy
    assert found.count("aten::clone") <= 1


def test_shared_relu_modules_are_fused_everywhere() -> None:
    assert not any("relu" in kernel for kernel in kernels("resnet18", "x86"))
    assert sum(bool(kernel.fused) for kernel in lowered_of("resnet18", "x86").plan.kernels.values()) == 17


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "squeezenet1_1", "shufflenet_v2_x1_0"])
@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (3, 3, 96, 64)])
def test_other_batch_and_image_sizes(name: str, shape: tuple[int, ...]) -> None:
    """No shape of the example is baked in: what is lost elsewhere is what is lost at the size calibrated with."""
    backend = MODELS[name][1][0]
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(shape, generator=generator)
    with torch.no_grad():
        found = [sqnr(live_model(name)(y), lowered_of(name, backend)(y)) for y in (images(name, 2), x)]
    assert found[1] > found[0] - 6


def transformers() -> dict[str, tuple[nn.Module, tuple[int, ...], list[tuple[int, ...]]]]:
    """Small ones of torchvision's classes: the example's shape and others."""
    models = import_torchvision().models
    swin = {"patch_size": [2, 2], "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2], "window_size": [4, 4]}
    blocks = models.swin_transformer
    v2 = {"block": blocks.SwinTransformerBlockV2, "downsample_layer": blocks.PatchMergingV2}
    sizes = [(1, 3, 32, 32), (3, 3, 48, 40), (1, 3, 34, 38)]  # the last with odd numbers of patches to merge
    return {
        "vit": (models.VisionTransformer(32, 8, 2, 2, 16, 32), (2, 3, 32, 32), [(1, 3, 32, 32), (5, 3, 32, 32)]),
        "swin": (models.SwinTransformer(**swin), (2, 3, 32, 32), sizes),
        "swin v2": (models.SwinTransformer(**swin, **v2), (2, 3, 32, 32), sizes),
    }


@pytest.mark.parametrize("name", ["vit", "swin", "swin v2"])
def test_other_sizes_of_transformers(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, shape, others = transformers()[name]
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    model.eval()
    quantized = fxq.quantize(model, [torch.randn(shape) for _ in range(4)], progress=False)
    for other in (shape, *others):
        x = torch.randn(other)
        with torch.no_grad():
            assert sqnr(model(x), quantized(x)) > 15, other
    fxq.save(quantized, tmp_path / "net.fxq")
    torch.testing.assert_close(fxq.load(tmp_path / "net.fxq")(x), quantized(x), rtol=0, atol=0)
