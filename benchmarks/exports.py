"""Write quantized models in every format and judge what comes back.

    python benchmarks/exports.py                                  # torchvision models with random weights
    python benchmarks/exports.py --models resnet18 vit_b_32
    python benchmarks/exports.py --data DIR                       # real models on real images (real_data.py)
    python benchmarks/exports.py --models resnet18 --aot          # with an AOTInductor package; minutes a model

For each model: size of the float32 weights and of the files in MB, and how far the results are from their source.
``.fxq``, TorchScript and the program lowered again are compared with the packed model; ONNX (onnxruntime and OpenVINO),
the exported program and the AOTInductor package with the reference graph, in units of the output's step: "3 (0.2%)" is
a largest difference of 3 steps, with 0.2 % of the values more than one step away. With random weights deep models
amplify single roundings; real ones do not. ``--data`` also prints on how many images the predictions are those of the
packed model. ``--aot`` also times the package beside the packed kernels: one image, one thread, the least time.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from formats import (
    Distance,
    Failure,
    Shipped,
    ahead_of_time,
    attempt,
    compile_ahead,
    lowered_again,
    native,
    onnx_in_onnxruntime,
    onnx_in_openvino,
    program,
    run_onnx,
    torchscript,
)
from random_models import make_alive, tensors_of
from real_data import TASKS, load_task
from tabulate import tabulate
from torch import nn

import fxq
from fxq.models import load_model
from fxq.timing import measure

MODELS = (
    "resnet18", "mobilenet_v2", "mobilenet_v3_large", "shufflenet_v2_x1_0", "lraspp_mobilenet_v3_large", "vit_b_32",
)  # fmt: skip
FIXED_224 = ("vit",)
FORMATS = {
    ".fxq": native, "TorchScript": torchscript, "program": program, "lowered again": lowered_again,
    "onnxruntime": onnx_in_onnxruntime, "OpenVINO": onnx_in_openvino,
}  # fmt: skip
SUFFIXES = {"fxq MB": ".fxq", "onnx MB": ".onnx"}


def shipped_from(model: nn.Module, calibration: list[torch.Tensor], x: torch.Tensor, folder: Path) -> Shipped:
    """A model quantized for x86, with what it is compared on."""
    return Shipped(fxq.quantize(model, calibration, progress=False), (x,), folder)


def row(name: str, model: nn.Module, shipped: Shipped, aot: bool) -> dict[str, Any]:
    """One line of the table."""
    size = sum(parameter.numel() for parameter in model.parameters()) * 4
    results = {label: attempt(format, shipped) for label, format in FORMATS.items()}
    cells: dict[str, Any] = {"model": name, "float MB": f"{size / 1e6:.1f}"}
    for label, suffix in SUFFIXES.items():
        file = shipped.file(suffix)
        cells[label] = f"{file.stat().st_size / 1e6:.1f}" if file.exists() else ""
    if aot:
        results["AOT"] = attempt(ahead_of_time, shipped)
    for label, result in results.items():
        if isinstance(result, Failure):
            print(f"{name}, {label}: {result.error!r:.300}")
    return cells | results | (times(shipped) if isinstance(results.get("AOT"), Distance) else {})


def times(shipped: Shipped) -> dict[str, str]:
    """Milliseconds of one image on one thread: the AOTInductor package beside the packed kernels, taking turns."""
    (x,) = shipped.args
    one = x[:1].contiguous()  # a package is compiled for the strides of its example
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            frozen = fxq.freeze(shipped.lowered, one)
            calls = {"AOT": compile_ahead(shipped), "eager": shipped.lowered, "frozen": frozen}
            found = measure({label: lambda call=call: call(one) for label, call in calls.items()}, seconds=3)
    finally:
        torch.set_num_threads(before)
    return {f"{label} ms": f"{timing.minimum:.2f}" for label, timing in found.items()}


def random_weights(name: str, folder: Path, aot: bool) -> dict[str, Any]:
    """The row of a torchvision model on noise."""
    generator = torch.Generator().manual_seed(0)
    size = 224 if aot or name.startswith(FIXED_224) else 64  # timed at the usual size
    batches = [torch.randn(2, 3, size, size, generator=generator) for _ in range(3)]
    torch.manual_seed(0)
    model = make_alive(load_model(name), (batches[0],))
    return row(name, model, shipped_from(model, batches[:2], torch.cat(batches), folder), aot)


def real(name: str, data: Path, folder: Path, images: int, aot: bool) -> dict[str, Any]:
    """The row of a real model, with the predictions that agree with the packed model's."""
    task = load_task(name, data)
    x = task.images[:images]
    shipped = shipped_from(task.model, list(task.calibration[:100].split(20)), x, folder)
    cells = row(name, task.model, shipped, aot)
    shape = (len(x), -1)
    packed = shipped.packed.view(shape).argmax(1)
    found = {"onnxruntime": tensors_of(run_onnx(shipped.file(".onnx"), (x,))), "reference": shipped.expected}
    agree = {key: int((value.view(shape).argmax(1) == packed).sum()) for key, value in found.items()}
    right = {key: int((value.view(shape).argmax(1) == task.labels[:images]).sum()) for key, value in found.items()}
    right["packed"] = int((packed == task.labels[:images]).sum())
    print(f"{name}: of {len(packed)} images, same prediction as the packed model: {agree}; right: {right}", flush=True)
    return cells


def main() -> None:
    """Parse the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--data", type=Path, help="folder of real models and images")
    parser.add_argument("--images", type=int, default=200, help="with --data: how many")
    parser.add_argument("--aot", action="store_true", help="compile with AOTInductor too")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = []
    names = [*TASKS] if options.data and options.models is MODELS else options.models
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            if options.data:
                rows.append(real(name, options.data, Path(folder), options.images, options.aot))
            else:
                rows.append(random_weights(name, Path(folder), options.aot))
        print(tabulate(rows[-1:], "keys"), flush=True)
    print("\n" + tabulate(rows, "keys"))


if __name__ == "__main__":
    main()
