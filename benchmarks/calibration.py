"""What calibrating costs: seconds of a calibrating forward pass over seconds of the float one.

    python benchmarks/calibration.py --models resnet50 mobilenet_v2 --batch 1

Runs float, fxq and torch.ao (FX graph mode, its default histogram observers) in turn, many times, on the same input
with the same number of threads, and prints medians of the ratios to the float pass beside it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from peers import prepare_torch_ao
from tabulate import tabulate
from torch import nn

import fxq
from fxq.models import load_model


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ratios(model: nn.Module, x: torch.Tensor, qconfig: str, rounds: int) -> tuple[float, float, float]:
    """Median float seconds, and median ratios of fxq's and torch.ao's calibrating pass to the float pass."""
    prepared = {
        "fxq": fxq.prepare(model, x, backend="x86", qconfig=qconfig),
        "torch.ao": prepare_torch_ao(model, x),
    }
    floats: list[float] = []
    found: dict[str, list[float]] = {name: [] for name in prepared}
    with torch.no_grad():
        for call in (model, *prepared.values()):
            call(x)
        for _ in range(rounds):
            floats.append(seconds(lambda: model(x)))
            for name, module in prepared.items():
                found[name].append(seconds(lambda module=module: module(x)) / floats[-1])
    return statistics.median(floats), *(statistics.median(values) for values in found.values())


def main() -> None:
    """Print one line a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50", "mobilenet_v2", "resnet18", "shufflenet_v2_x1_0"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--qconfig", default="per_channel")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    for name in options.models:
        x = torch.rand(options.batch, 3, 224, 224)
        took, ours, theirs = ratios(load_model(name), x, options.qconfig, options.rounds)
        rows.append([name, f"{took * 1e3:.1f}", f"{ours:.2f}", f"{theirs:.2f}"])
    print(tabulate(rows, ["model", "float ms", "fxq / float", "torch.ao / float"], disable_numparse=True))


if __name__ == "__main__":
    main()
