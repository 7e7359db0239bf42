"""What quantizing costs: CPU seconds by number of nodes, peak memory of the process, and the time of the import.

    python benchmarks/scaling.py --nodes 100 1000 10000
    python benchmarks/scaling.py --memory                              # torchvision models instead

The model is a chain of conv, BatchNorm and ReLU, three nodes a layer. Each line is measured in a process of its own, on
one thread; torch.ao's FX graph mode runs beside it up to ``--peer-nodes``, beyond which it takes too long.

``--memory`` prints by how much ``fxq.quantize`` raises the resident memory at most, float model included, and the share
of that in what it may take: twice the float model, and what a forward pass of the float model on the same batch raises
it by. Imports and everything else that was there before are not counted.
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
from coverage import inputs_of, make_alive, most_resident, peak_memory
from peers import convert_torch_ao, prepare_torch_ao
from tabulate import tabulate
from torch import nn

from fxq.models import load_model
from fxq.torchvision_ops import import_torchvision

LARGE = ["resnet18", "resnet50", "mobilenet_v2", "vit_b_32", "alexnet", "convnext_tiny",
         "fasterrcnn_mobilenet_v3_large_320_fpn"]  # fmt: skip


def chain(nodes: int) -> nn.Module:
    """Conv, BatchNorm and ReLU until there are ``nodes`` of them."""
    parts = [part for _ in range(-(-nodes // 3)) for part in (nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())]
    return nn.Sequential(*parts).eval()


def measure(nodes: int, tool: str) -> dict[str, float]:
    """CPU seconds to prepare and to convert a chain, and the peak memory of this process in MiB."""
    sys.setrecursionlimit(100_000)
    torch.set_num_threads(1)
    import fxq

    model, x = chain(nodes), torch.randn(1, 8, 4, 4)
    start = time.process_time()
    prepared = fxq.prepare(model, x) if tool == "fxq" else prepare_torch_ao(model, x)
    middle = time.process_time()
    with torch.no_grad():
        prepared(x)
    calibrated = time.process_time()
    _ = fxq.convert(prepared) if tool == "fxq" else convert_torch_ao(prepared)
    end = time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"prepare": middle - start, "convert": end - calibrated, "peak": peak}


def measure_memory(name: str) -> dict[str, float]:
    """MiB of a float model, of its forward pass and of quantizing it in one call."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    import_torchvision()
    before = most_resident()
    model = make_alive(load_model(name), inputs_of(name, generator))
    size, forward, whole = peak_memory(model, inputs_of(name, generator))
    found = {"size": size, "forward": forward - before - size, "whole": whole - before}
    return {part: number / 2**20 for part, number in found.items()}


def memory_row(name: str, found: dict[str, float]) -> list[object]:
    """A line of the table of :func:`measure_memory`."""
    size, forward, whole = found["size"], found["forward"], found["whole"]
    return [name, size, forward, whole, (whole - forward) / size, whole / (2 * size + forward)]


def run_alone(*arguments: str) -> dict[str, float]:
    """What this file prints as JSON in a process of its own."""
    command = [sys.executable, __file__, *arguments]
    found: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def import_seconds(package: str) -> float:
    """Median seconds of an import in a fresh process, the start of Python not counted."""
    code = f"import time; t = time.perf_counter(); import {package}; print(time.perf_counter() - t)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(7)]
    return statistics.median(float(run.stdout) for run in runs)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[100, 300, 1000, 3000, 10000])
    parser.add_argument("--peer-nodes", type=int, default=1000)
    parser.add_argument("--memory", nargs="*", metavar="MODEL", help="peak memory of these, or of some typical ones")
    parser.add_argument("--one-model", help="measure its memory here and print JSON")
    parser.add_argument("--one", nargs=2, metavar=("NODES", "TOOL"), help="measure here and print JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(int(options.one[0]), options.one[1])))
        return
    if options.one_model:
        print(json.dumps(measure_memory(options.one_model)))
        return
    if options.memory is not None:
        found = [memory_row(name, run_alone("--one-model", name)) for name in options.memory or LARGE]
        headers = ["model", "float MiB", "forward MiB", "quantize MiB", "less forward, / float", "of the limit"]
        print(tabulate(found, headers, floatfmt=("", ".1f", ".1f", ".1f", ".2f", ".2f")))
        return
    rows = []
    for nodes in options.nodes:
        for tool in ("fxq", "torch.ao") if nodes <= options.peer_nodes else ("fxq",):
            cost = run_alone("--one", str(nodes), tool)
            total = cost["prepare"] + cost["convert"]
            rows.append([nodes, tool, cost["prepare"], cost["convert"], 1e3 * total / nodes, cost["peak"]])
    headers = ["nodes", "tool", "prepare s", "convert s", "ms a node", "peak MiB"]
    print(tabulate(rows, headers, floatfmt=("", "", ".2f", ".2f", ".1f", ".0f")))
    torch_alone, both = import_seconds("torch"), import_seconds("fxq")
    print(f"\nimport torch: {torch_alone:.2f} s, import fxq: {both:.2f} s")


if __name__ == "__main__":
    main()
