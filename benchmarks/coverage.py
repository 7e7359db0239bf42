"""Quantize every model of torchvision and say what became of it.

    python benchmarks/coverage.py --results coverage.jsonl            # all models, one process each; resumable
    python benchmarks/coverage.py --results coverage.jsonl --markdown docs/coverage.md
    python benchmarks/coverage.py --model swin_t                      # one model, one JSON line
    python benchmarks/coverage.py --results coverage.jsonl --ship     # adds the formats to the rows that lack them

Weights are random but alive: BatchNorm statistics come from a forward pass in which only BatchNorm layers are in
training mode, and parameters that start as zero or next to zero get ordinary values, so that outputs depend on inputs.
Each model calibrates on two batches of noise and is judged on two others; numbers are medians over seeds (weights and
data), of which large models get fewer. torch.ao's FX graph mode runs on the same model and data beside it; a table is
put together from all runs that --results holds, and torch.ao's columns may come from an earlier one.

SQNR and cosine compare the output with the float model's; for detection models, whose boxes are a list of another
length each time, the raw output of the head on the feature maps (of the region proposal network where there is one).
"rounded input" is the SQNR of the float model against itself when nothing but its input is rounded to 8 bits: what the
model makes of the smallest error any 8-bit model has. That error itself is at about 40 dB. Where the float model
leaves 30 dB of it or more, it is well conditioned, and a cosine of 0.99 can be asked of its int8 model. Where it
leaves 10 dB or less, any error at all changes everything, and which of two tools is ahead is chance. Seconds are CPU
seconds to prepare and convert, on one thread, in memory that the process has beforehand. "memory" is the peak of
quantize in one call, float model included, less one float forward pass, over the float model; the graphs, which take
some MiB, weigh more the smaller the model is. Another small model is quantized before, because what a process loads
once belongs to no model. It is what is in use: while it is measured, the allocator gives large tensors back to the
system when they are freed, in the float pass too. Left to itself, glibc keeps what it may need again, up to hundreds of
MiB for a detector.

".fxq", "TorchScript", "torch.export" (the program as it is), "lowered again" and "ONNX" (in onnxruntime) say whether
what is written and read again gives equal numbers: those of the packed model, for programs and ONNX those of the
reference graph. What differs in ONNX begins with float ops of which onnxruntime has its own (silu, softmax,
layer_norm), and with sums of the float reference that round next to the middle of two integers. "3 (0.2%)" is a
largest difference of 3 steps of its output's scale, with 0.2 % of the values more than one step away; random weights
amplify roundings. A model in regions is saved whole, and its regions are written one by one. Empty cells were not run.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peers import convert_torch_ao, prepare_torch_ao
from random_models import inputs_of, make_alive, model_names, outputs
from ship import FORMATS, ship
from tabulate import tabulate
from torch import nn

import fxq
from fxq.models import load_model
from fxq.numerics import choose_qparams, dequantize, quantize, sqnr
from fxq.partition import partition_of, regions_of
from fxq.spec import QuantSpec

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h

UINT8 = QuantSpec(dtype=torch.uint8, quant_min=0, quant_max=255, symmetric=False)


def rounded(value: Any) -> Any:
    """Inputs rounded to 8 bits."""
    if isinstance(value, (list, tuple)):
        return type(value)(rounded(item) for item in value)
    qparams = choose_qparams(value.min(), value.max(), UINT8)
    return dequantize(quantize(value, qparams, UINT8), qparams)


def measure(name: str, peer: bool, seeds: int, seconds: float) -> dict[str, Any]:
    """The row of a model: medians over seeds, of which none is begun after ``seconds``."""
    start = time.perf_counter()
    row, runs = {}, []
    for seed in range(seeds):
        if runs and time.perf_counter() - start > seconds:
            break
        found, run = measure_seed(name, seed, peer)
        row = row or found
        runs.append(run)
    for key in runs[0]:
        values = [run[key] for run in runs if isinstance(run.get(key), float)]
        row[key] = statistics.median(values) if values else runs[0][key]
    return {**row, "seeds": len(runs)}


def measure_seed(name: str, seed: int, peer: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """What does not depend on the seed, and what does."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = make_alive(load_model(name), inputs_of(name, generator))
    batches, others = ([inputs_of(name, generator) for _ in range(2)] for _ in range(2))
    expected = outputs(model, others)
    run: dict[str, Any] = {"rounded": sqnr(expected, outputs(model, [rounded(batch) for batch in others]))}
    row = {} if seed else _memory(model, batches[0])
    _hold_memory(model)
    start = time.process_time()
    prepared = fxq.prepare(model, batches[0])
    took = time.process_time() - start
    fxq.calibrate(prepared, batches, forward_fn=call, progress=False)
    start = time.process_time()
    fxq.convert(prepared)
    run["seconds"] = took + time.process_time() - start
    del prepared
    qmodel = fxq.quantize(model, batches, example_inputs=batches[0], forward_fn=call, progress=False)
    actual = outputs(qmodel, others)
    run["sqnr"] = sqnr(expected, actual)
    run["cosine"] = torch.nn.functional.cosine_similarity(expected.double(), actual.double(), dim=0).item()
    row |= {"model": name, "status": status(qmodel), **shares(qmodel)}
    del qmodel
    if peer:
        run |= _torch_ao(model, batches, others, expected)
    return row, run


def call(model: nn.Module, batch: tuple[Any, ...]) -> Any:
    """A batch is the model's arguments."""
    return model(*batch)


def status(qmodel: nn.Module) -> str:
    """Whether a model was traced as a whole."""
    found = regions_of(qmodel)
    inside = f" and {len(found) - 1} regions" if len(found) > 1 else ""
    return f"whole{inside}" if "" in found else f"{len(found)} regions"


def _memory(model: nn.Module, batch: tuple[Any, ...]) -> dict[str, float]:
    size, forward, whole = peak_memory(model, batch)
    return {"memory": round((size + whole - forward) / size, 2), "mib": round(size / 2**20, 1)}


def peak_memory(model: nn.Module, batch: tuple[Any, ...]) -> tuple[int, int, int]:
    """Bytes of a float model, and the most that this process holds in a forward pass and in quantizing in one call."""
    fxq.quantize(_Usual().eval(), [torch.rand(1, 8, 8, 8)], progress=False)
    size = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])

    def whole() -> None:
        fxq.quantize(model, [batch], example_inputs=batch, forward_fn=call, progress=False)

    with _freeing_at_once():
        return size, _peak(lambda: call(model, batch)), _peak(whole)


class _Usual(nn.Module):
    """Some usual layers: what a process loads when it quantizes them for the first time belongs to no model."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.Hardswish())
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        x = x + self.squeeze(x) * self.depthwise(x)
        left, right = torch.cat([x, torch.max_pool2d(x, 3, 1, 1)], 1).chunk(2, dim=1)
        return torch.relu(self.linear((left + right).mean((2, 3))))


@contextmanager
def _freeing_at_once() -> Iterator[None]:
    """While open, glibc's allocator takes memory for tensors from the system and gives it back when they are freed."""
    libc = ctypes.CDLL("libc.so.6")

    def set_thresholds(mapped: int, trimmed: int) -> None:
        libc.mallopt(_M_MMAP_THRESHOLD, mapped)
        libc.mallopt(_M_TRIM_THRESHOLD, trimmed)

    set_thresholds(1 << 16, 1 << 16)
    try:
        yield
    finally:
        set_thresholds(1 << 25, 1 << 26)  # which glibc comes to by itself where large tensors are freed


def _hold_memory(model: nn.Module) -> None:
    """Let the process have, and from now on keep, memory for copies of the model: getting it is not the tools' time."""
    ctypes.CDLL("libc.so.6").mallopt(_M_TRIM_THRESHOLD, -1)
    del [copy.deepcopy(model) for _ in range(2)][:]


def _peak(action: Callable[[], Any]) -> int:
    """The most bytes of memory that this process holds while an action runs."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the most resident so far becomes what is resident now
    with torch.no_grad():
        action()
    return most_resident()


def most_resident() -> int:
    """The most bytes that this process has held."""
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def shares(qmodel: nn.Module) -> dict[str, Any]:
    """How much of it is int8, and why the rest is not."""
    records = fxq.graph_records(qmodel)
    partition = partition_of(qmodel)
    total = sum(record["macs"] for record in records) + (partition.left_macs if partition else 0)
    int8 = sum(record["macs"] for record in records if record["type"] == "int8")
    reasons = Counter(record["reason"].partition(":")[0] for record in records if record["type"] == "float")
    before, after = (sum(r.plan.weight_bytes[i] for r in regions_of(qmodel).values()) for i in (0, 1))
    return {
        "macs": total,
        "int8_percent": round(100 * int8 / total, 2),
        "float_nodes": dict(reasons),
        "size_ratio": round(before / after, 2) if after else None,
    }


def _torch_ao(model: nn.Module, batches: list[Any], others: list[Any], expected: torch.Tensor) -> dict[str, Any]:
    """SQNR of torch.ao's result and CPU seconds, or the kind of error it ends with."""
    try:
        with torch.no_grad():
            start = time.process_time()
            prepared = prepare_torch_ao(model, batches[0])
            took = time.process_time() - start
            for batch in batches:
                prepared(*batch)
            start = time.process_time()
            converted = convert_torch_ao(prepared)
            took += time.process_time() - start
            return {"torch_ao": sqnr(expected, outputs(converted, others)), "torch_ao_seconds": took}
    except Exception as error:
        return {"torch_ao": f"fails: {type(error).__name__}", "torch_ao_seconds": None}


def run_all(results: Path, names: list[str], options: argparse.Namespace) -> None:
    """Measure what ``results`` lacks of each model in a process of its own, bounded in time and memory."""
    measuring = ["--seeds", str(options.seeds), "--seed-seconds", str(options.seed_seconds)]
    measuring += ["--peer"] if options.peer else []
    for name in names:
        rows = {row["model"]: row for row in read(results)}
        if name not in rows:
            append_row(results, {"model": name} | _in_process(["--model", name, *measuring], "status", options))
        if options.ship and "formats" not in rows.get(name, {}):
            append_row(results, {"model": name} | _in_process(["--model", name, "--ship"], "formats", options))
        row = next(row for row in read(results) if row["model"] == name)
        formats = row.get("formats", "")
        print(name, row["status"], row.get("int8_percent"), row.get("sqnr"), row.get("torch_ao"), formats, flush=True)


def _in_process(arguments: list[str], key: str, options: argparse.Namespace) -> dict[str, Any]:
    """What this script prints, or why it does not under ``key``."""
    try:
        run = subprocess.run(
            [sys.executable, __file__, *arguments], capture_output=True, text=True, timeout=options.seconds,
            preexec_fn=lambda: _limit_memory(options.gib),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {key: f"fails: took more than {options.seconds} seconds"}
    if run.returncode != 0:
        return {key: f"fails: {(run.stderr.strip().splitlines() or [f'exit status {run.returncode}'])[-1]}"}
    found: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    return found


def append_row(results: Path, row: dict[str, Any]) -> None:
    """One more line of JSON."""
    with results.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _limit_memory(gib: float) -> None:
    limit = int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def read(results: Path) -> list[dict[str, Any]]:
    """The rows measured so far; what lines of one model say is one row."""
    rows: dict[str, dict[str, Any]] = {}
    for line in results.read_text().splitlines() if results.exists() else []:
        found = json.loads(line)
        rows.setdefault(found["model"], {}).update(found)
    return list(rows.values())


def table(rows: list[dict[str, Any]], style: str) -> str:
    """The table that docs/ shows; the formats have columns if they were tried."""
    headers = [
        "model", "traced", "int8 MACs %", "SQNR dB", "torch.ao dB", "cosine", "rounded input dB", "float nodes",
        "weights", "seconds", "torch.ao seconds", "memory", "seeds",
    ]  # fmt: skip
    shipped = any("formats" in row for row in rows)
    lines = [
        [
            row["model"], row["status"], row.get("int8_percent", ""), _number(row.get("sqnr"), 1),
            _number(row.get("torch_ao"), 1), _number(row.get("cosine"), 4), _number(row.get("rounded"), 1),
            _reasons(row.get("float_nodes", {})), f"{row['size_ratio']}x smaller" if row.get("size_ratio") else "",
            _number(row.get("seconds"), 1), _number(row.get("torch_ao_seconds"), 1),
            f"{row['memory']}x" if "memory" in row else "", row.get("seeds", ""),
            *(_formats(row.get("formats", {})) if shipped else ()),
        ]
        for row in sorted(rows, key=lambda row: str(row["model"]))
    ]  # fmt: skip
    return tabulate(lines, [*headers, *(FORMATS if shipped else ())], tablefmt=style, disable_numparse=True)


def _formats(found: dict[str, str] | str) -> list[str]:
    return [found if isinstance(found, str) else found.get(name, "") for name in FORMATS]


def _number(value: float | str | None, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, float) else value or ""


def _reasons(reasons: dict[str, int]) -> str:
    return "; ".join(f"{count} {why}" for why, count in reasons.items()) or "none"


def main() -> None:
    """Parse the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="measure one model in this process and print its row as JSON")
    parser.add_argument("--models", nargs="+", default=None, help="only these")
    parser.add_argument("--results", type=Path, default=Path("coverage.jsonl"))
    parser.add_argument("--markdown", type=Path, help="write the table of the results to this file and stop")
    parser.add_argument("--seeds", type=int, default=3, help="sets of weights and data, fewer for large models")
    parser.add_argument("--seed-seconds", type=float, default=60, help="begin no other seed of a model after these")
    parser.add_argument("--seconds", type=int, default=900, help="limit of one model")
    parser.add_argument("--gib", type=float, default=20.0, help="limit of address space of one model")
    parser.add_argument("--ship", action="store_true", help="write and run every format; with --model, only that")
    parser.add_argument("--peer", action="store_true", help="run torch.ao FX on the same model and data")
    options = parser.parse_args()
    if options.model:
        torch.set_num_threads(1)
    if options.model and options.ship:
        print(json.dumps(ship(options.model)))
    elif options.model:
        print(json.dumps(measure(options.model, options.peer, options.seeds, options.seed_seconds)))
    elif options.markdown:
        title, _, rest = (__doc__ or "").partition("\n\n    python")
        notes = rest.partition("\n\n")[2].strip()
        text = f"# Every torchvision model, in one call\n\n{title}\n\n{notes}"
        options.markdown.write_text(f"{text}\n\n{table(read(options.results), 'github')}\n")
    else:
        run_all(options.results, options.models or model_names(), options)
        print(table(read(options.results), "simple"))


if __name__ == "__main__":
    main()
