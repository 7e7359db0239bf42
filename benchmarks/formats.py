"""Quantized models in every format: what is written, read back and run, and how far its results are from their source.

``.fxq``, TorchScript and a program lowered again are compared with the packed model; an exported program, ONNX and an
AOTInductor package with the reference graph. Distances are in steps of the scale of the output's tensor.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from random_models import tensors_of
from torch import nn
from torch.fx import Node

import fxq
from fxq.graph_module import QuantModule
from fxq.partition import reference_of
from fxq.qdq import is_quantize


class Distance(NamedTuple):
    """How far results are from others: the largest difference in steps, and the percentage of those over one step."""

    steps: float
    percent: float

    def __str__(self) -> str:
        return "equal" if self.steps == 0 else f"{self.steps:.2g} ({self.percent:.2g}%)"


class Failure(NamedTuple):
    """The error that a format ends with."""

    error: Exception

    def __str__(self) -> str:
        known = isinstance(self.error, fxq.FxqError)
        return "refused" if known else f"fails: {type(self.error).__name__}"


class Shipped:
    """A quantized model with inputs, and the folder its files go to."""

    def __init__(self, lowered: nn.Module, args: tuple[Any, ...], folder: Path) -> None:
        self.lowered, self.args, self.folder = lowered, args, folder
        reference = reference_of(lowered)
        assert isinstance(reference, QuantModule)
        self.reference = reference
        with torch.no_grad():
            expected = self.reference(*args)
            self.expected, self.steps = tensors_of(expected), steps_of(self.reference, expected)
            self.packed = tensors_of(lowered(*args))

    def file(self, suffix: str) -> Path:
        """The path of a format's file."""
        return self.folder / f"model{suffix}"

    def from_reference(self, output: Any) -> Distance:
        """Distance of an output from the reference graph's."""
        return distance(tensors_of(output), self.expected, self.steps)

    def from_packed(self, output: Any) -> Distance:
        """Distance of an output from the packed model's."""
        return distance(tensors_of(output), self.packed, self.steps)


def steps_of(reference: QuantModule, output: Any) -> torch.Tensor:
    """For each value of an output, the scale of its tensor."""
    return _steps(next(iter(reversed(reference.graph.nodes))).args[0], output)


def _steps(structure: Any, output: Any) -> torch.Tensor:
    if isinstance(structure, Node):
        return torch.full_like(tensors_of(output), _step(structure))
    pairs = zip(*(x.values() if isinstance(x, dict) else x for x in (structure, output)), strict=True)
    return torch.cat([_steps(*pair) for pair in pairs]) if structure else torch.empty(0)


def _step(node: Node) -> float:
    """The scale of the integers that a tensor is, or the coarsest of those that it is computed from in float."""
    found, seen, waiting = [], set(), [node]
    while waiting:
        if (source := waiting.pop()) in seen:
            continue
        seen.add(source)
        if is_quantize(source):
            found.append(float(source.args[1]))
        else:
            waiting.extend(source.all_input_nodes)
    return max(found, default=1.0)


def distance(found: torch.Tensor, source: torch.Tensor, steps: torch.Tensor) -> Distance:
    """How far results are from their source."""
    far = (found - source).abs() / steps
    return Distance(float(far.max()), 100 * float(far.gt(1.01).float().mean()))


def native(shipped: Shipped) -> Distance:
    """The fxq file."""
    fxq.save(shipped.lowered, shipped.file(".fxq"))
    return shipped.from_packed(fxq.load(shipped.file(".fxq"))(*shipped.args))


def torchscript(shipped: Shipped) -> Distance:
    """The TorchScript file."""
    fxq.to_torchscript(shipped.lowered, path=shipped.file(".pt"))
    return shipped.from_packed(torch.jit.load(shipped.file(".pt"))(*shipped.args))


def program(shipped: Shipped) -> Distance:
    """The exported program, run as it is."""
    torch.export.save(fxq.to_exported_program(shipped.lowered), shipped.file(".pt2"))
    return shipped.from_reference(torch.export.load(shipped.file(".pt2")).module()(*shipped.args))


def lowered_again(shipped: Shipped) -> Distance:
    """The program that :func:`program` wrote, on packed kernels."""
    if not shipped.file(".pt2").exists():
        raise fxq.FxqError("there is no program")
    return shipped.from_packed(fxq.from_exported_program(torch.export.load(shipped.file(".pt2")))(*shipped.args))


def onnx_in_onnxruntime(shipped: Shipped) -> Distance:
    """The ONNX file, in onnxruntime."""
    import onnx

    fxq.to_onnx(shipped.lowered, shipped.file(".onnx"))
    onnx.checker.check_model(str(shipped.file(".onnx")), full_check=True)
    return shipped.from_reference(run_onnx(shipped.file(".onnx"), shipped.args))


def onnx_in_openvino(shipped: Shipped) -> Distance:
    """The ONNX file that :func:`onnx_in_onnxruntime` wrote, in OpenVINO."""
    import openvino

    compiled = openvino.Core().compile_model(str(shipped.file(".onnx")), "CPU")
    found = compiled([x.numpy() for x in _tensors(shipped.args)]).to_tuple()
    return shipped.from_reference([torch.from_numpy(value) for value in found])


def ahead_of_time(shipped: Shipped) -> Distance:
    """An AOTInductor package."""
    return shipped.from_reference(compile_ahead(shipped)(*shipped.args))


def compile_ahead(shipped: Shipped) -> Callable[..., Any]:
    """The exported program as an AOTInductor package, compiled unless it was, and loaded."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    if shutil.which("g++") is None and shutil.which("clang++") is None:
        raise fxq.FxqError("AOTInductor needs a C++ compiler, and there is none")
    path = shipped.file(".aot.pt2")
    if not path.exists():
        aoti_compile_and_package(fxq.to_exported_program(shipped.lowered), package_path=str(path))
    package: Callable[..., Any] = aoti_load_package(str(path))
    return package


def run_onnx(path: Path, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """The outputs of an ONNX file in onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {entry.name: x.numpy() for entry, x in zip(session.get_inputs(), _tensors(args), strict=True)}
    return [torch.from_numpy(value) for value in session.run(None, feed)]


def _tensors(args: tuple[Any, ...]) -> list[torch.Tensor]:
    return [x for x in args if isinstance(x, torch.Tensor)]


def attempt(format: Callable[[Shipped], Distance], shipped: Shipped) -> Distance | Failure:
    """What a format gives, or the error it ends with."""
    try:
        with torch.no_grad():
            return format(shipped)
    except Exception as error:
        return Failure(error)
