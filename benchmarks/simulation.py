"""Does the reference graph predict what the packed model predicts? On all test images, with each difference traced.

    python benchmarks/simulation.py --data DIR

DIR is described in benchmarks/real_data.py. Every model is quantized for every backend; its reference graph (float ops
between quantize and dequantize) and its int8 kernels run on the same images. Where the predicted class differs, each
kernel is given the integers that its predecessors made, so that its own roundings are seen alone: "LSB" is the largest
difference of any integer, "from a tie" how far the values that differ were from the middle of two integers at most.
"margin" is the distance of the two best scores in the reference graph, in steps of the last scale: all images' median,
and the largest of those whose prediction differs. "top-1" is the reference graph's and the packed model's, "ms" that
of float, reference graph and packed model. The second table has one line for each of these images.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from accuracy import scores
from real_data import TASKS, Task, load_task
from tabulate import tabulate

import fxq
from fxq.agreement import Agreement, kernel_agreement
from fxq.backends import BACKENDS, get_backend
from fxq.engine import available_engines
from fxq.graph_module import QuantModule
from fxq.qdq import is_quantize

BATCH = 20
HEADERS = ["model", "backend", "images", "differ", "LSB", "from a tie", "integers %", "margin: median", "of these",
           "top-1 %", "ms an image"]  # fmt: skip
TRACE_HEADERS = ["model", "backend", "image", "reference: class (score)", "packed: class (score)", "margin",
                 "kernels that round differently", "the first", "from a tie"]  # fmt: skip


def last_step(reference: QuantModule) -> float:
    """The scale of the last quantize node: one step of the scores."""
    return float([node for node in reference.graph.nodes if is_quantize(node)][-1].args[1])  # type: ignore[arg-type]


def timed_scores(model: Any, images: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Scores, and the milliseconds an image."""
    start = time.perf_counter()
    return scores(model, images), 1000 * (time.perf_counter() - start) / len(images)


def best_two(values: torch.Tensor) -> str:
    top = values.topk(2)
    return ", ".join(f"{c} ({s:.3f})" for c, s in zip(top.indices.tolist(), top.values.tolist(), strict=True))


def simulate(task: Task, backend: str, images: torch.Tensor, labels: torch.Tensor) -> tuple[list[Any], list[list[Any]]]:
    """The line of one model on one backend, and one for each image whose prediction differs."""
    prepared = fxq.prepare(task.model, task.calibration[:1], backend=backend)
    fxq.calibrate(prepared, task.calibration.split(BATCH), progress=False)
    reference = fxq.convert_to_reference(prepared)
    assert isinstance(reference, QuantModule)
    milliseconds = [timed_scores(task.model, images[: 5 * BATCH])[1]]
    expected, took = timed_scores(reference, images)
    actual, took_packed = timed_scores(fxq.lower(reference, backend), images)
    milliseconds += [took, took_packed]
    differ = (expected.argmax(1) != actual.argmax(1)).nonzero().flatten().tolist()
    top = expected.topk(2).values
    margins = (top[:, 0] - top[:, 1]) / last_step(reference)
    kernels = [kernel_agreement(reference, get_backend(backend), images[at : at + 1]) for at in differ]
    every = [line for lines in kernels for line in lines]
    row = [
        task.name, backend, len(images), len(differ), max((k.max_lsb for k in every), default=0),
        f"{max((k.from_tie for k in every), default=0):.1g}",
        f"{100 * sum(k.share for k in every) / max(len(every), 1):.1g}",
        f"{margins.median().item():.0f}", f"{max((margins[at].item() for at in differ), default=0):.0f}",
        " / ".join(f"{100 * (s.argmax(1) == labels).float().mean().item():.2f}" for s in (expected, actual)),
        " / ".join(f"{s:.1f}" for s in milliseconds),
    ]  # fmt: skip
    return row, [
        [task.name, backend, at, best_two(expected[at]), best_two(actual[at]), f"{margins[at].item():.0f}",
         *_rounding(lines)]
        for at, lines in zip(differ, kernels, strict=True)
    ]  # fmt: skip


def _rounding(lines: list[Agreement]) -> list[Any]:
    """How many kernels rounded any value of an image differently, the first of them, and from how near a tie."""
    different = [line for line in lines if line.max_lsb]
    first = different[0].node if different else ""
    return [f"{len(different)} of {len(lines)}", first, f"{max((k.from_tie for k in different), default=0):.1g}"]


def main() -> None:
    """Print one line a model and backend, then one for each difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=list(BACKENDS))
    parser.add_argument("--images", type=int, default=None, help="test with the first N images only")
    options = parser.parse_args()
    rows, traces = [], []
    for name in options.models:
        task = load_task(name, options.data)
        for backend in options.backends:
            if get_backend(backend).engine in available_engines():
                row, trace = simulate(task, backend, task.images[: options.images], task.labels[: options.images])
                rows.append(row)
                traces += trace
    print(tabulate(rows, HEADERS, disable_numparse=True))
    print()
    print(tabulate(traces, TRACE_HEADERS, disable_numparse=True))


if __name__ == "__main__":
    main()
