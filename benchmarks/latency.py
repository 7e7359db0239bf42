"""Latency of fxq's int8 models beside every other path from a float PyTorch model to a fast one on a CPU.

    python benchmarks/latency.py                                         # one thread, batch 1
    python benchmarks/latency.py --batch 1 16 --threads 1 2              # four tables
    python benchmarks/latency.py --models mobilenet_v2 --tools fxq OpenVINO
    python benchmarks/latency.py --memory                                # on disk, loaded and while running, instead

The models have random weights, the same for every tool. The tools take turns, so that a busy moment of the machine
meets all of them; the minimum is the most robust number. Peers that are not installed (the extra "peers") are left
out. Prints, for each number of threads and batch size:

1. milliseconds a call, minimum and (in brackets) median;
2. the ratio of the minima to fxq's x86 backend (> 1: slower than fxq) with the geometric mean over the models;
3. what part of the int8 peak a model reaches: its multiply-accumulates in the minimum time, over the rate of a large
   int8 matrix product measured in the same run.

Run with OMP_WAIT_POLICY=passive if the machine is shared. The compiled tools take minutes a model to compile.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
from inference_memory import memory_table
from latency_peers import PEERS, Run, Tool, calibration_data, channels_last, quiet
from model_matrix import live_model
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import fxq
from fxq.engine import packing
from fxq.macs import counting

MODELS = (
    "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "shufflenet_v2_x1_0", "googlenet",
)  # fmt: skip
BASE = "fxq x86"
SLICE = 0.15  # seconds a tool runs before the next one has its turn
MATRIX = 1024

# The processor's time of all threads, for one thread on a busy machine: waiting for a core does not count.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Samples = dict[str, list[float]]


def fxq_tool(backend: str, frozen: bool) -> Tool:
    """fxq, eager or frozen."""

    def make(model: nn.Module, x: torch.Tensor, threads: int) -> Run:
        quantized = fxq.quantize(model, calibration_data(x), backend=backend, progress=False)
        last = channels_last(x)
        run = fxq.freeze(quantized, last) if frozen else quantized
        return lambda: run(last)

    return make


FXQ: dict[str, Tool] = {
    f"fxq {backend}{' frozen' * frozen}": fxq_tool(backend, frozen)
    for backend in ("x86", "onednn", "fbgemm", "qnnpack")
    for frozen in (False, True)
}
TOOLS = FXQ | PEERS


def make_runs(name: str, tools: list[str], batch: int, threads: int) -> tuple[dict[str, Run], int]:
    """A call of the model for each tool that can run it, and the model's multiply-accumulates."""
    model = live_model(name, 224)
    x = torch.randn(batch, 3, 224, 224)
    with torch.no_grad(), counting(model) as macs:
        model(x)
    runs = {}
    for tool in tools:
        try:
            runs[tool] = TOOLS[tool](model, x, threads)
            with quiet():
                runs[tool]()
        except Exception as error:  # a tool that cannot run a model is a finding about the tool
            runs.pop(tool, None)
            tqdm.write(f"{tool} does not run {name}: {type(error).__name__}: {str(error).strip().splitlines()[0][:99]}")
    return runs, sum(macs.values())


def peak_run() -> tuple[Run, int]:
    """A large int8 matrix product and its multiply-accumulates."""
    weight = torch.quantize_per_tensor(torch.randn(MATRIX, MATRIX), 0.05, 0, torch.qint8)
    x = torch.quantize_per_tensor(torch.randn(MATRIX, MATRIX), 0.05, 128, torch.quint8)
    with packing("onednn"):
        packed = torch.ops.quantized.linear_prepack(weight, None)
    return lambda: torch.ops.quantized.linear(x, packed, 1.0, 128), MATRIX**3


def interleave(runs: dict[str, Run], rounds: int, clock: Callable[[], float] = time.perf_counter) -> Samples:
    """Seconds of single calls; in each round every tool runs for a moment."""
    samples: Samples = {tool: [] for tool in runs}
    with torch.no_grad():
        for _ in range(rounds):
            for tool, run in runs.items():
                run()  # the others have had the caches
                samples[tool] += _timed(run, clock)
    return samples


def _timed(run: Run, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    times: list[float] = []
    until = time.perf_counter() + SLICE
    while not times or time.perf_counter() < until:
        start = clock()
        run()
        times.append(clock() - start)
    return times


def measure(
    name: str, tools: list[str], batch: int, threads: int, rounds: int, clock: Callable[[], float]
) -> tuple[Samples, dict[str, float]]:
    """Samples of every tool, and the part of the int8 peak that its best one is."""
    runs, macs = make_runs(name, tools, batch, threads)
    runs["peak"], peak_macs = peak_run()
    samples = interleave(runs, rounds, clock)
    peak = peak_macs / min(samples.pop("peak"))
    tqdm.write(f"{name}: " + ", ".join(f"{tool} {min(times) * 1e3:.2f}" for tool, times in samples.items()))
    return samples, {tool: macs / min(times) / peak for tool, times in samples.items()}


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


def table(
    models: list[str], tools: list[str], cell: Callable[[str, str], str], *last: tuple[str, Callable[[str], str]]
) -> str:
    """Tools down, models across."""
    lines = [[tool, *(cell(tool, model) for model in models), *(of(tool) for _, of in last)] for tool in tools]
    headers = ["", *(model.replace("_v2_x1_0", "_v2") for model in models), *(name for name, _ in last)]
    return tabulate(lines, headers, disable_numparse=True, stralign="right", colalign=("left",))


def report(found: dict[str, tuple[Samples, dict[str, float]]], tools: list[str]) -> str:
    """The three tables."""
    models = list(found)

    def times(tool: str, model: str) -> list[float]:
        return found[model][0].get(tool, [])

    def milliseconds(tool: str, model: str) -> str:
        seconds = times(tool, model)
        return f"{min(seconds) * 1e3:.2f} ({statistics.median(seconds) * 1e3:.1f})" if seconds else "-"

    def ratio(tool: str, model: str) -> float | None:
        both = times(tool, model), times(BASE, model)
        return min(both[0]) / min(both[1]) if all(both) else None

    def mean(tool: str) -> str:
        ratios = [ratio(tool, model) for model in models]
        known = [value for value in ratios if value is not None]
        return f"{geometric_mean(known):.2f}" + ("" if len(known) == len(ratios) else f" of {len(known)}")

    def ratio_cell(tool: str, model: str) -> str:
        value = ratio(tool, model)
        return "-" if value is None else f"{value:.2f}"

    def share(tool: str, model: str) -> str:
        value = found[model][1].get(tool)
        return "-" if value is None else f"{value:.0%}"

    parts = ["milliseconds, minimum (median)", table(models, tools, milliseconds)]
    if BASE in tools:
        parts += [f"\ntimes {BASE}", table(models, tools, ratio_cell, ("geom. mean", mean))]
    return "\n".join([*parts, "\nshare of the int8 peak", table(models, tools, share)])


def chosen(patterns: list[str]) -> list[str]:
    """Tools whose names contain one of the patterns."""
    return [tool for tool in TOOLS if any(pattern in tool for pattern in patterns)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME")
    parser.add_argument("--tools", nargs="+", default=[""], metavar="PART", help=f"parts of: {', '.join(TOOLS)}")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], metavar="N")
    parser.add_argument("--threads", nargs="+", type=int, default=[1], metavar="N")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="what is measured (default wall)")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each tool (default 10)")
    parser.add_argument("--memory", action="store_true", help="measure memory of float and int8 models, not time")
    options = parser.parse_args()
    if options.memory:
        for batch in options.batch:
            print(f"\nMiB, batch {batch}\n\n{memory_table(options.models, batch)}")
        return
    tools = chosen(options.tools)
    for threads in options.threads:
        torch.set_num_threads(threads)
        for batch in options.batch:
            found = {
                name: measure(name, tools, batch, threads, options.rounds, CLOCKS[options.clock])
                for name in tqdm(options.models, unit="model", desc=f"{threads} threads, batch {batch}")
            }
            print(f"\n{threads} thread{'s' * (threads > 1)}, batch {batch}\n\n{report(found, tools)}")


if __name__ == "__main__":
    main()
