"""Write quantized models in every format and judge what comes back.

    python benchmarks/exports.py                                  # torchvision models with random weights
    python benchmarks/exports.py --models resnet18 vit_b_32
    python benchmarks/exports.py --data DIR                       # real models on real images (real_data.py)
    python benchmarks/exports.py --models resnet18 --aot          # with an AOTInductor package; minutes a model

For each model: size of the float32 weights and of the files in MB, and how far the results are from their source.
``.fxq``, TorchScript and the program lowered again are compared bit for bit with the packed model; ONNX (onnxruntime
and OpenVINO), the exported program and the AOTInductor package with the reference graph, in units of the output's
step: "3 (0.2%)" is a largest difference of 3 steps, with 0.2 % of the values more than one step away. With random
weights deep models amplify single roundings; real ones do not. ``--data`` also prints on how many images the
predictions are those of the packed model.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from coverage import make_alive, tensors_of
from real_data import TASKS, load_task
from tabulate import tabulate
from torch import nn

import fxq
from fxq.models import load_model
from fxq.qdq import is_quantize

MODELS = (
    "resnet18", "mobilenet_v2", "mobilenet_v3_large", "shufflenet_v2_x1_0", "lraspp_mobilenet_v3_large", "vit_b_32",
)  # fmt: skip
FIXED_224 = ("vit",)
HEADERS = ("model", "float MB", "fxq MB", "onnx MB", ".fxq", "TorchScript", "program", "lowered again", "onnxruntime",
           "OpenVINO", "AOT")  # fmt: skip


class Shipped:
    """A quantized model with inputs, and the folder its files go to."""

    def __init__(self, model: nn.Module, calibration: list[torch.Tensor], x: torch.Tensor, folder: Path) -> None:
        prepared = fxq.prepare(model, calibration[0])
        fxq.calibrate(prepared, calibration, progress=False)
        self.reference = fxq.convert_to_reference(prepared)
        self.lowered = fxq.lower(self.reference, "x86")
        self.x, self.folder = x, folder
        with torch.no_grad():
            self.expected = tensors_of(self.reference(x))
            self.packed = tensors_of(self.lowered(x))
        self.step = [node.args[1] for node in self.reference.graph.nodes if is_quantize(node)][-1]

    def file(self, suffix: str) -> Path:
        """The path of a format's file."""
        return self.folder / f"model{suffix}"

    def steps(self, found: torch.Tensor) -> str:
        """Distance from the reference graph."""
        far = (found - self.expected).abs() / self.step
        return f"{far.max():.0f} ({100 * far.gt(1.01).float().mean():.2g}%)"

    def bits(self, found: torch.Tensor) -> str:
        """Whether a result is the packed model's."""
        return "equal" if torch.equal(found, self.packed) else self.steps(found) + "!"


def native(shipped: Shipped) -> str:
    """The fxq file."""
    fxq.save(shipped.lowered, shipped.file(".fxq"))
    return shipped.bits(tensors_of(fxq.load(shipped.file(".fxq"))(shipped.x)))


def torchscript(shipped: Shipped) -> str:
    """The TorchScript file."""
    fxq.to_torchscript(shipped.lowered, path=shipped.file(".pt"))
    return shipped.bits(tensors_of(torch.jit.load(shipped.file(".pt"))(shipped.x)))


def program(shipped: Shipped) -> tuple[str, str]:
    """The exported program, run as it is and lowered again."""
    torch.export.save(fxq.to_exported_program(shipped.lowered), shipped.file(".pt2"))
    loaded = torch.export.load(shipped.file(".pt2"))
    again = fxq.from_exported_program(loaded)
    return shipped.steps(tensors_of(loaded.module()(shipped.x))), shipped.bits(tensors_of(again(shipped.x)))


def run_onnx(path: Path, x: torch.Tensor) -> torch.Tensor:
    """The outputs in onnxruntime, in one vector."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return tensors_of([torch.from_numpy(value) for value in found])


def run_openvino(path: Path, x: torch.Tensor) -> torch.Tensor | None:
    """The same in OpenVINO, if it is installed."""
    try:
        import openvino
    except ModuleNotFoundError:
        return None
    compiled = openvino.Core().compile_model(str(path), "CPU")
    return tensors_of([torch.from_numpy(value) for value in compiled([x.numpy()]).to_tuple()])


def ahead_of_time(shipped: Shipped) -> str:
    """An AOTInductor package, compiled and run."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        print("AOTInductor left out: there is no C++ compiler")
        return ""
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    package = aoti_compile_and_package(
        fxq.to_exported_program(shipped.lowered), package_path=str(shipped.file(".aot.pt2"))
    )
    return shipped.steps(tensors_of(aoti_load_package(package)(shipped.x)))


def row(name: str, model: nn.Module, shipped: Shipped, aot: bool) -> list[Any]:
    """One line of the table."""
    size = sum(parameter.numel() for parameter in model.parameters()) * 4
    path = shipped.file(".onnx")
    cells: list[str] = [attempt(native, shipped), attempt(torchscript, shipped)]
    exported = attempt(program, shipped)
    cells += [*exported] if isinstance(exported, tuple) else [exported, ""]

    def written(run: Callable[[Path, torch.Tensor], torch.Tensor | None]) -> Callable[[Shipped], str]:
        def judge(shipped: Shipped) -> str:
            fxq.to_onnx(shipped.lowered, path)
            onnx.checker.check_model(str(path), full_check=True)
            found = run(path, shipped.x)
            return "" if found is None else shipped.steps(found)

        return judge

    cells += [attempt(written(run_onnx), shipped), attempt(written(run_openvino), shipped)]
    cells.append(attempt(ahead_of_time, shipped) if aot else "")
    sizes = [size, *(shipped.file(suffix).stat().st_size for suffix in (".fxq", ".onnx"))]
    return [name, *(f"{number / 1e6:.1f}" for number in sizes), *cells]


def attempt(function: Callable[[Shipped], Any], shipped: Shipped) -> Any:
    """What a format gives, or the kind of error it ends with."""
    try:
        with torch.no_grad():
            return function(shipped)
    except Exception as error:
        print(f"{function.__name__}: {type(error).__name__}: {str(error)[:300]}")
        return f"fails: {type(error).__name__}"


def random_weights(name: str, folder: Path, aot: bool) -> list[Any]:
    """The row of a torchvision model on noise."""
    generator = torch.Generator().manual_seed(0)
    size = 224 if name.startswith(FIXED_224) else 64
    batches = [torch.randn(2, 3, size, size, generator=generator) for _ in range(3)]
    torch.manual_seed(0)
    model = make_alive(load_model(name), (batches[0],))
    return row(name, model, Shipped(model, batches[:2], torch.cat(batches), folder), aot)


def real(name: str, data: Path, folder: Path, images: int, aot: bool) -> list[Any]:
    """The row of a real model, with the predictions that agree with the packed model's."""
    task = load_task(name, data)
    shipped = Shipped(task.model, list(task.calibration[:100].split(20)), task.images[:images], folder)
    cells = row(name, task.model, shipped, aot)
    shape = (len(shipped.x), -1)
    packed = shipped.packed.view(shape).argmax(1)
    found = {"onnxruntime": run_onnx(shipped.file(".onnx"), shipped.x), "reference": shipped.expected}
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
        print(tabulate(rows[-1:], HEADERS), flush=True)
    print("\n" + tabulate(rows, HEADERS))


if __name__ == "__main__":
    main()
