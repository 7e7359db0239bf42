"""Quantize every model of torchvision and say what became of it.

    python benchmarks/coverage.py --results coverage.jsonl            # all models, one process each; resumable
    python benchmarks/coverage.py --results coverage.jsonl --markdown docs/coverage.md
    python benchmarks/coverage.py --model swin_t                      # one model, one JSON line

Weights are random but alive: BatchNorm statistics come from a train-mode forward pass, and parameters that start as
zero or next to zero get ordinary values, so that outputs depend on inputs. Every model calibrates on two batches of
noise and is judged on a third. SQNR is that of the output to the float model's; torch.ao's FX graph mode runs on the
same model and data beside it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from peers import convert_torch_ao, prepare_torch_ao
from tabulate import tabulate
from torch import nn

import fxq
from fxq.models import load_model
from fxq.numerics import sqnr
from fxq.partition import partition_of, regions_of
from fxq.torchvision_ops import import_torchvision

VIDEO = ("mc3", "mvit", "r2plus1d", "r3d", "s3d", "swin3d")
DETECTION = ("fasterrcnn", "fcos", "keypointrcnn", "maskrcnn", "retinanet", "ssd")
FIXED_224 = ("vit", "maxvit")  # their position tables are made for this size


def model_names() -> list[str]:
    """Every float model of torchvision."""
    import_torchvision()
    import torchvision

    return [name for name in torchvision.models.list_models() if not name.startswith("quantized_")]


def inputs_of(name: str, generator: torch.Generator) -> tuple[Any, ...]:
    """One batch of noise of the kind a model takes."""

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    if name.startswith(DETECTION):
        return ([torch.rand(3, 256, 256, generator=generator)],)
    if name.startswith("raft"):
        return tuple(torch.rand(1, 3, 128, 128, generator=generator) * 2 - 1 for _ in range(2))
    if name.startswith(("mvit", "s3d")):
        return (noise(1, 3, 16, 224, 224),)
    if name.startswith(VIDEO):
        return (noise(1, 3, 8, 112, 112),)
    size = 224 if name.startswith(FIXED_224) else 299 if name.startswith("inception") else 160
    return (noise(2, 3, size, size),)


def make_alive(model: nn.Module, args: tuple[Any, ...], trains: bool) -> nn.Module:
    """Ordinary values for parameters that start at zero or next to it, BatchNorm statistics from a forward pass."""
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter.data, std=0.02)
        elif parameter.numel() and parameter.abs().max() < 1e-4 and parameter.any():
            nn.init.constant_(parameter.data, 0.5)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if norms and trains:
        for norm in norms:
            norm.momentum = None
        with torch.no_grad():
            model.train()(*args)
    return model.eval()


def tensors_of(output: Any) -> torch.Tensor:
    """All float tensors of an output in one vector."""
    if isinstance(output, torch.Tensor):
        return output.flatten() if output.is_floating_point() else torch.empty(0)
    items = output.values() if isinstance(output, dict) else output
    return torch.cat([tensors_of(item) for item in items])


def measure(name: str, peer: bool) -> dict[str, Any]:
    """Quantize one model; returns the row of the table."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    trains = not name.startswith(DETECTION)
    model = make_alive(load_model(name), inputs_of(name, generator), trains)
    batches = [inputs_of(name, generator) for _ in range(3)]
    start = time.perf_counter()
    prepared = fxq.prepare(model, batches[0])
    prepare_seconds = time.perf_counter() - start
    fxq.calibrate(prepared, batches[:2], forward_fn=lambda m, batch: m(*batch), progress=False)
    start = time.perf_counter()
    qmodel = fxq.convert(prepared)
    convert_seconds = time.perf_counter() - start
    del prepared
    with torch.no_grad():
        expected = model(*batches[2])
        actual = qmodel(*batches[2])
    row = {
        "model": name,
        "status": "whole" if "" in regions_of(qmodel) else f"{len(regions_of(qmodel))} regions",
        **_shares(qmodel),
        "sqnr": None if name.startswith(DETECTION) else sqnr(tensors_of(expected), tensors_of(actual)),
        "seconds": round(prepare_seconds + convert_seconds, 1),
    }
    if peer:
        del qmodel
        row["torch_ao"] = _torch_ao(model, batches, expected)
    row["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return row


def _shares(qmodel: nn.Module) -> dict[str, Any]:
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


def _torch_ao(model: nn.Module, batches: list[tuple[Any, ...]], expected: Any) -> float | str:
    """SQNR of torch.ao's result, or the kind of error it ends with."""
    try:
        with torch.no_grad():
            prepared = prepare_torch_ao(model, batches[0])
            for batch in batches[:2]:
                prepared(*batch)
            return sqnr(tensors_of(expected), tensors_of(convert_torch_ao(prepared)(*batches[2])))
    except Exception as error:
        return f"fails: {type(error).__name__}"


def run_all(results: Path, names: list[str], seconds: int, gib: float, peer: bool) -> None:
    """Measure each model that ``results`` lacks in a process of its own, bounded in time and memory."""
    done = {row["model"] for row in read(results)}
    for name in names:
        if name in done:
            continue
        command = [sys.executable, __file__, "--model", name, *(["--peer"] if peer else [])]
        try:
            run = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds, preexec_fn=lambda: _limit_memory(gib)
            )
            lines = run.stdout.strip().splitlines()
            row = json.loads(lines[-1]) if run.returncode == 0 else _failed(name, run.stderr.strip().splitlines()[-1])
        except subprocess.TimeoutExpired:
            row = _failed(name, f"took more than {seconds} seconds")
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(name, row["status"], row.get("int8_percent"), row.get("sqnr"), row.get("torch_ao"), flush=True)


def _limit_memory(gib: float) -> None:
    limit = int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _failed(name: str, why: str) -> dict[str, Any]:
    return {"model": name, "status": f"fails: {why}"}


def read(results: Path) -> list[dict[str, Any]]:
    """The rows measured so far."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def table(rows: list[dict[str, Any]], style: str) -> str:
    """The table that docs/ shows."""
    headers = ["model", "traced", "int8 MACs %", "SQNR dB", "torch.ao dB", "float nodes", "weights", "seconds"]
    lines = [
        [
            row["model"], row["status"], row.get("int8_percent", ""), _decibels(row.get("sqnr")),
            _decibels(row.get("torch_ao")), _reasons(row.get("float_nodes", {})),
            f"{row['size_ratio']}x smaller" if row.get("size_ratio") else "", row.get("seconds", ""),
        ]
        for row in sorted(rows, key=lambda row: str(row["model"]))
    ]  # fmt: skip
    return tabulate(lines, headers, tablefmt=style, disable_numparse=True)


def _decibels(value: float | str | None) -> str:
    return f"{value:.1f}" if isinstance(value, float) else value or ""


def _reasons(reasons: dict[str, int]) -> str:
    return "; ".join(f"{count} {why}" for why, count in reasons.items()) or "none"


def main() -> None:
    """Parse the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="measure one model in this process and print its row as JSON")
    parser.add_argument("--models", nargs="+", default=None, help="only these")
    parser.add_argument("--results", type=Path, default=Path("coverage.jsonl"))
    parser.add_argument("--markdown", type=Path, help="write the table of the results to this file and stop")
    parser.add_argument("--seconds", type=int, default=900, help="limit of one model")
    parser.add_argument("--gib", type=float, default=20.0, help="limit of address space of one model")
    parser.add_argument("--peer", action="store_true", help="run torch.ao FX on the same model and data")
    options = parser.parse_args()
    if options.model:
        print(json.dumps(measure(options.model, options.peer)))
    elif options.markdown:
        text = "# Every torchvision model, in one call\n\n" + (__doc__ or "").partition("\n\n    python")[0]
        notes = (__doc__ or "").rpartition("\n\n")[2]
        table_text = table(read(options.results), "github")
        options.markdown.write_text(f"{text}\n\n{notes.strip()}\n\n{table_text}\n")
    else:
        run_all(options.results, options.models or model_names(), options.seconds, options.gib, options.peer)
        print(table(read(options.results), "simple"))


if __name__ == "__main__":
    main()
