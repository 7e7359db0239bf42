"""Accuracy of int8 models on real weights and images, beside other tools on the same data.

    python benchmarks/accuracy.py --data DIR                # fxq and its peers
    python benchmarks/accuracy.py --data DIR --views        # on more views of each test image: less chance
    python benchmarks/accuracy.py --data DIR --observers    # fxq with each way to choose ranges

DIR is described in benchmarks/real_data.py, the peers in benchmarks/peers.py. Prints, for each model and method, top-1
and its difference to float in points with the standard error of that, which is what chance makes of predictions that
are right in one of the two only; top-5, how often the prediction is float's own, the mean SQNR of the scores in dB, and
the seconds from float model to int8 model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import torch
from real_data import TASKS, Task, load_task
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import fxq
from fxq import onednn
from fxq.backends import get_backend
from fxq.numerics import sqnr
from fxq.observers import OBSERVERS

BATCH = 20

Method = Callable[[nn.Module, list[torch.Tensor]], nn.Module]


def _fxq(**options: Any) -> Method:
    return lambda model, batches: fxq.quantize(model, batches, progress=False, **options)


def _peer(quantize: Callable[..., nn.Module], **options: Any) -> Method:
    return lambda model, batches: quantize(model, batches, **options)


def _fxq_frozen(model: nn.Module, batches: list[torch.Tensor]) -> nn.Module:
    """Where oneDNN's C API is installed, in the form that uses it: the other has the numbers of ``fxq x86``."""
    return fxq.freeze(_fxq()(model, batches), batches[0], form="onednn" if onednn.is_available() else None)


METHODS: dict[str, Method] = {
    "fxq x86": _fxq(),
    "fxq x86 frozen": _fxq_frozen,
    "fxq fbgemm": _fxq(backend="fbgemm"),
    "fxq onednn": _fxq(backend="onednn"),
    "fxq qnnpack": _fxq(backend="qnnpack"),
    "fxq simple": _fxq(calibration="simple"),
    "fxq advanced": _fxq(calibration="advanced"),
    "fxq max": _fxq(calibration="max"),
    "fxq pow2": _fxq(pow2_scales=True),
    "fxq per_tensor": _fxq(qconfig="per_tensor"),
    "fxq per_tensor advanced": _fxq(qconfig="per_tensor", calibration="advanced"),
    "torch.ao x86": _peer(peers.torch_ao, backend="x86"),
    "torch.ao onednn": _peer(peers.torch_ao, backend="onednn"),
    "onnxruntime": _peer(peers.onnxruntime),
    "onnxruntime per_channel": _peer(peers.onnxruntime, per_channel=True),
    "NNCF": _peer(peers.nncf),
}


def _observed(activation: str, weight: str, **changes: Any) -> Method:
    backend = get_backend("x86")
    return _fxq(
        qconfig=fxq.QConfig(
            activation=backend.activation.replace(observer=activation),
            weight=backend.weight.replace(observer=weight, **changes),
        )
    )


# Activations with each observer, then weights with each, then the same with one scale a weight.
OBSERVER_METHODS: dict[str, Method] = {
    **{name: _observed(name, get_backend("x86").weight.observer) for name in (*OBSERVERS, "percentile:99.9")},
    **{f"weights {name}": _observed(get_backend("x86").activation.observer, name) for name in ("minmax", "mse")},
    **{
        f"per-tensor weights {name}": _observed(get_backend("x86").activation.observer, name, ch_axis=None)
        for name in ("minmax", "mse")
    },
}


def scores(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Float scores ``[N, classes]``."""
    with torch.no_grad():
        return torch.cat([model(batch) for batch in images.split(BATCH)])


def measures(expected: torch.Tensor, actual: torch.Tensor, labels: torch.Tensor) -> list[str]:
    """Top-1, its difference to that of ``expected``, top-5, agreement in percent, mean SQNR in dB."""

    def right(k: int, values: torch.Tensor) -> torch.Tensor:
        return (values.topk(k).indices == labels[:, None]).any(1).float()

    def top(k: int, values: torch.Tensor) -> float:
        return 100 * right(k, values).mean().item()

    agrees = 100 * (actual.argmax(1) == expected.argmax(1)).float().mean().item()
    decibels = statistics.mean(sqnr(e, a) for e, a in zip(expected, actual, strict=True))
    change = top(1, actual) - top(1, expected)
    chance = 100 * (right(1, actual) != right(1, expected)).sum().sqrt().item() / len(labels)
    to_float = f"{change:+.1f} ± {chance:.1f}"
    return [f"{top(1, actual):.1f}", to_float, f"{top(5, actual):.1f}", f"{agrees:.1f}", f"{decibels:.1f}"]


def measure(task: Task, methods: dict[str, Method], images: int | None) -> list[list[str]]:
    """The table's rows of one model."""
    x, labels = task.images[:images], task.labels[:images]
    expected = scores(task.model, x)
    top1, _, top5, *_ = measures(expected, expected, labels)
    rows = [[task.name, f"float, {len(x)} images", top1, "", top5]]
    for name, quantize in tqdm(methods.items(), task.name):
        start = time.perf_counter()
        try:
            model = quantize(task.model, list(task.calibration.split(BATCH)))
        except ModuleNotFoundError as error:
            rows.append(["", f"{name}: not installed ({error.name}); pip install 'fxq[peers]'"])
            continue
        seconds = time.perf_counter() - start
        rows.append(["", name, *measures(expected, scores(model, x), labels), f"{seconds:.1f}"])
        tqdm.write("  ".join(rows[-1][1:]), file=sys.stderr)
    return rows


def main() -> None:
    """Print one line a model and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", help="only these rows of the table")
    parser.add_argument("--observers", action="store_true", help="compare observers instead of tools")
    parser.add_argument("--views", action="store_true", help="more views of each test image")
    parser.add_argument("--images", type=int, default=None, help="test with the first N images only")
    parser.add_argument("--format", default="simple", help="of the table; github for Markdown")
    options = parser.parse_args()
    known = OBSERVER_METHODS if options.observers else METHODS
    unknown = set(options.methods or ()) - set(known)
    if unknown:
        parser.error(f"unknown methods {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    methods = {name: known[name] for name in options.methods or known}
    rows = [
        row
        for name in options.models
        for row in measure(load_task(name, options.data, options.views), methods, options.images)
    ]
    headers = ["model", "method", "top-1 %", "to float", "top-5 %", "agrees %", "SQNR dB", "seconds"]
    print(tabulate(rows, headers, options.format, disable_numparse=True))


if __name__ == "__main__":
    main()
