"""Every format of a torchvision model with random weights: the columns of ``coverage.py --ship``."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from formats import (
    Distance,
    Failure,
    Shipped,
    attempt,
    distance,
    lowered_again,
    onnx_in_onnxruntime,
    program,
    torchscript,
)  # fmt: skip
from random_models import inputs_of, make_alive, outputs
from torch import nn

import fxq
from fxq.models import load_model
from fxq.partition import partition_of, region_inputs, regions_of

_OF_REGIONS: dict[str, Callable[[Shipped], Distance]] = {
    "TorchScript": torchscript, "torch.export": program, "lowered again": lowered_again, "ONNX": onnx_in_onnxruntime,
}  # fmt: skip
FORMATS = (".fxq", *_OF_REGIONS)


def ship(name: str) -> dict[str, Any]:
    """What each format gives, and the errors of those that fail."""
    warnings.filterwarnings("ignore")
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = make_alive(load_model(name), inputs_of(name, generator))
    batches, others = ([inputs_of(name, generator) for _ in range(2)] for _ in range(2))
    qmodel = fxq.quantize(
        model, batches, example_inputs=batches[0], forward_fn=lambda m, batch: m(*batch), progress=False
    )
    found: dict[str, list[Distance | Failure]] = {".fxq": [_saved(model, qmodel, others)]}
    errors: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for path, shipped in _shipped(qmodel, others[0], Path(folder)):
            for label, format in _OF_REGIONS.items():
                found.setdefault(label, []).append(result := attempt(format, shipped))
                if isinstance(result, Failure):
                    errors[f"{label} {path}".strip()] = f"{type(result.error).__name__}: {result.error}"[:400]
    formats = {label: _joined(results) for label, results in found.items()}
    return {"model": name, "formats": formats, "format_errors": errors}


def _saved(model: nn.Module, qmodel: nn.Module, others: list[Any]) -> Distance | Failure:
    """The fxq file, loaded with the float model for the code around regions."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            fxq.save(qmodel, f"{folder}/model.fxq")
            loaded = fxq.load(f"{folder}/model.fxq", model=model)
        source = outputs(qmodel, others)
        return distance(outputs(loaded, others), source, source.abs().max() / 255)  # of regions no one scale tells
    except Exception as error:
        return Failure(error)


def _shipped(qmodel: nn.Module, args: tuple[Any, ...], folder: Path) -> Iterator[tuple[str, Shipped]]:
    """The model, or each of its regions with what it is called with."""
    if partition_of(qmodel) is None:
        yield "", Shipped(qmodel, args, folder)
        return
    seen = region_inputs(qmodel, (args, {}))
    for path, region in regions_of(qmodel).items():
        if id(region) in seen:
            inputs, keywords = seen[id(region)]
            (folder / path).mkdir(exist_ok=True)
            yield path, Shipped(region, (*inputs, *keywords.values()), folder / path)


def _joined(results: list[Distance | Failure]) -> str:
    """One cell: the farthest of the regions, and how many fail."""
    far = [result for result in results if isinstance(result, Distance)]
    failures = [str(result) for result in results if isinstance(result, Failure)]
    if not failures or not far:
        return str(max(far)) if far else failures[0]
    return f"{max(far)}; {len(failures)} of {len(results)} regions {failures[0]}"
