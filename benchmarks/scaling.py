"""What quantizing costs: seconds by number of layers, peak memory over the model's, and the time of the import.

    python benchmarks/scaling.py --layers 100 1000 10000

The model is a chain of conv + BatchNorm + ReLU. Each line is measured in a process of its own; torch.ao's FX graph mode
runs beside it up to ``--peer-layers``, beyond which it takes too long.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from peers import convert_torch_ao, prepare_torch_ao
from tabulate import tabulate
from torch import nn


def chain(layers: int) -> nn.Module:
    """Conv, BatchNorm and ReLU, ``layers`` times."""
    parts = [part for _ in range(layers) for part in (nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())]
    return nn.Sequential(*parts).eval()


def measure(layers: int, tool: str) -> dict[str, float]:
    """Seconds to prepare and to convert a chain, and the peak memory of this process in MiB."""
    sys.setrecursionlimit(100_000)
    import fxq

    model, x = chain(layers), torch.randn(1, 8, 4, 4)
    start = time.perf_counter()
    prepared = fxq.prepare(model, x) if tool == "fxq" else prepare_torch_ao(model, x)
    middle = time.perf_counter()
    with torch.no_grad():
        prepared(x)
    calibrated = time.perf_counter()
    _ = fxq.convert(prepared) if tool == "fxq" else convert_torch_ao(prepared)
    end = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"prepare": middle - start, "convert": end - calibrated, "peak": peak}


def import_seconds(package: str) -> float:
    """Median seconds of an import in a fresh process, the start of Python not counted."""
    code = f"import time; t = time.perf_counter(); import {package}; print(time.perf_counter() - t)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(7)]
    return statistics.median(float(run.stdout) for run in runs)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[100, 300, 1000, 3000])
    parser.add_argument("--peer-layers", type=int, default=300)
    parser.add_argument("--one", nargs=2, metavar=("LAYERS", "TOOL"), help="measure here and print JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(int(options.one[0]), options.one[1])))
        return
    rows = []
    for layers in options.layers:
        for tool in ("fxq", "torch.ao") if layers <= options.peer_layers else ("fxq",):
            command = [sys.executable, __file__, "--one", str(layers), tool]
            found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            total = found["prepare"] + found["convert"]
            rows.append([layers, tool, found["prepare"], found["convert"], 1e3 * total / layers, found["peak"]])
    headers = ["layers", "tool", "prepare s", "convert s", "ms a layer", "peak MiB"]
    print(tabulate(rows, headers, floatfmt=("", "", ".2f", ".2f", ".1f", ".0f")))
    torch_alone, both = import_seconds("torch"), import_seconds("fxq")
    print(f"\nimport torch: {torch_alone:.2f} s, import fxq: {both:.2f} s")


if __name__ == "__main__":
    main()
