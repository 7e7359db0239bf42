"""Quantize torchvision's classification and segmentation models for every backend; one line for each pair.

    python benchmarks/model_matrix.py                                # all models, fbgemm, qnnpack and x86
    python benchmarks/model_matrix.py --models resnet18 --backends x86 onednn

The weights are random, with BatchNorm statistics taken from a training-mode forward pass, so that every layer
is alive without a download. SQNR compares the int8 model with the float one. "Kernel LSB" is the worst of any
kernel on the integers it is given, "model LSB" what has become of that at the model's output, in units of the
output's scale (its range / 255 where the model ends in float).
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import fxq
from fxq.agreement import kernel_agreement
from fxq.backends import BACKENDS, get_backend
from fxq.graph_module import QuantModule
from fxq.models import load_model
from fxq.numerics import sqnr
from fxq.plan import Status

MODELS = (
    "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "googlenet", "inception_v3",
    "shufflenet_v2_x1_0", "squeezenet1_1", "densenet121", "efficientnet_b0", "regnet_y_400mf", "mnasnet1_0",
    "vgg16_bn", "fcn_resnet50",
)  # fmt: skip
JUDGED = ("fbgemm", "qnnpack", "x86")
HEAVY = (nn.modules.conv._ConvNd, nn.Linear)
HEADERS = ("model", "backend", "int8 conv+linear", "float nodes", "SQNR dB", "kernel LSB", "model LSB")


def live_model(name: str, size: int) -> nn.Module:
    """A model with random weights whose BatchNorm statistics fit them."""
    torch.manual_seed(0)
    model = load_model(name).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the average over all batches seen
            module.train()  # and only this: in training some models run branches that need large images
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(4, 3, size, size))
    return model.eval()


def weighted_calls(model: nn.Module, example: torch.Tensor) -> int:
    """How many convs and linears a forward pass runs."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hooks = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, HEAVY)]
    with torch.no_grad():
        model(example)
    for hook in hooks:
        hook.remove()
    return calls


def int8_weighted(lowered: QuantModule) -> int:
    """How many convs and linears of a lowered model are int8 kernels."""
    names = (kernel.name for kernel in lowered.plan.kernels.values())
    return sum(name.startswith(("quantized::conv", "quantized::linear")) for name in names)


def float_nodes(lowered: QuantModule) -> Counter[str]:
    """Float nodes by reason."""
    decisions = lowered.plan.decisions.values()
    return Counter(d.reason.code if d.reason else "NO REASON" for d in decisions if d.status is Status.FLOAT)


def output_scale(lowered: QuantModule, output: torch.Tensor) -> float:
    """Scale of a model's output; a range / 255 where it ends in float."""
    end = next(iter(lowered.graph.output_node().all_input_nodes))
    kernel = lowered.plan.kernels.get(end.name)
    if kernel is not None and kernel.scale:
        return kernel.scale
    return (output.max() - output.min()).item() / 255 or 1.0


def tensor_of(output: Any) -> torch.Tensor:
    """The main output of a model, whichever way it returns it."""
    found: torch.Tensor = output["out"] if isinstance(output, dict) else output
    return found


def measure(name: str, backend: str, size: int) -> tuple[Any, ...]:
    """One line of the table."""
    model = live_model(name, size)
    x = torch.randn(2, 3, size, size)
    prepared = fxq.prepare(model, x, backend=backend)
    fxq.calibrate(prepared, [torch.randn(2, 3, size, size) for _ in range(3)], progress=False)
    reference = fxq.convert_to_reference(prepared)
    lowered = fxq.lower(reference, backend)
    lines = kernel_agreement(reference, get_backend(backend), x)
    with torch.no_grad():
        expected, by_reference, by_kernels = (tensor_of(m(x)) for m in (model, reference, lowered))
    reasons = ", ".join(f"{count} {code}" for code, count in sorted(float_nodes(lowered).items()))
    lsb = (by_reference - by_kernels).abs().max().item() / output_scale(lowered, by_kernels)
    return (
        name, backend, f"{int8_weighted(lowered)}/{weighted_calls(model, x)}", reasons or "-",
        f"{sqnr(expected, by_kernels):.1f}", max(line.max_lsb for line in lines), f"{lsb:.1f}",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME")
    parser.add_argument("--backends", nargs="+", default=JUDGED, choices=list(BACKENDS))
    parser.add_argument("--size", type=int, default=128, help="images of SIZE x SIZE (default 128)")
    options = parser.parse_args()
    pairs = [(name, backend) for name in options.models for backend in options.backends]
    lines = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # fxq promises to be silent; so a warning is a finding
        for name, backend in tqdm(pairs, unit="model"):
            lines.append(measure(name, backend, options.size))
    print(tabulate(lines, HEADERS, disable_numparse=True))


if __name__ == "__main__":
    main()
