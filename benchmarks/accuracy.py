"""Accuracy of int8 models on real weights and images, beside torch.ao FX graph mode on the same data.

    python benchmarks/accuracy.py --data DIR

DIR is described in benchmarks/real_data.py. Prints, for each model and method, top-1, its difference to float in
points, how often the prediction is float's own, the mean SQNR of the scores in dB and the seconds to quantize.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peers import convert_torch_ao, prepare_torch_ao
from real_data import TASKS, Task, load_task
from tabulate import tabulate
from torch import nn

import fxq
from fxq.numerics import sqnr

BATCH = 20


def _fxq(qconfig: str, backend: str) -> Callable[[Task], nn.Module]:
    def quantize(task: Task) -> nn.Module:
        data = task.calibration.split(BATCH)
        return fxq.quantize(task.model, data, backend=backend, qconfig=qconfig, progress=False)

    return quantize


def _torch_ao(backend: str) -> Callable[[Task], nn.Module]:
    def quantize(task: Task) -> nn.Module:
        batches = task.calibration.split(BATCH)
        prepared = prepare_torch_ao(task.model, batches[0], backend)
        with torch.no_grad():
            for batch in batches:
                prepared(batch)
        return convert_torch_ao(prepared, backend)

    return quantize


METHODS: dict[str, Callable[[Task], nn.Module]] = {
    "fxq per_channel x86": _fxq("per_channel", "x86"),
    "fxq per_channel fbgemm": _fxq("per_channel", "fbgemm"),
    "fxq per_channel onednn": _fxq("per_channel", "onednn"),
    "fxq per_channel qnnpack": _fxq("per_channel", "qnnpack"),
    "fxq per_tensor x86": _fxq("per_tensor", "x86"),
    "torch.ao x86": _torch_ao("x86"),
    "torch.ao onednn": _torch_ao("onednn"),
}


def scores(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Float scores ``[N, classes]``."""
    with torch.no_grad():
        return torch.cat([model(batch) for batch in images.split(BATCH)])


def main() -> None:
    """Print one line a model and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--images", type=int, default=None, help="test with the first N images only")
    options = parser.parse_args()
    rows = []
    for name in options.models:
        task = load_task(name, options.data)
        images, labels = task.images[: options.images], task.labels[: options.images]
        expected = scores(task.model, images)
        float_top1 = 100 * (expected.argmax(1) == labels).float().mean().item()
        rows.append([name, "float", f"{float_top1:.1f}", "", "", "", ""])
        for method in options.methods:
            start = time.perf_counter()
            model = METHODS[method](task)
            took = time.perf_counter() - start
            actual = scores(model, images)
            top1 = 100 * (actual.argmax(1) == labels).float().mean().item()
            agree = 100 * (actual.argmax(1) == expected.argmax(1)).float().mean().item()
            decibels = statistics.mean(sqnr(e, a) for e, a in zip(expected, actual, strict=True))
            rows.append(["", method, f"{top1:.1f}", f"{top1 - float_top1:+.1f}", f"{agree:.1f}",
                         f"{decibels:.1f}", f"{took:.1f}"])  # fmt: skip
    headers = ["model", "method", "top-1 %", "to float", "agrees %", "SQNR dB", "seconds"]
    print(tabulate(rows, headers, disable_numparse=True))


if __name__ == "__main__":
    main()
