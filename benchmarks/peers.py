"""The tools fxq is measured against, each set up the way its own documentation says.

``pip install "fxq[peers]"`` installs those besides torch.ao. Each takes a float model in eval mode and a list of input
batches, and returns a module that is called like the model.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

Batches = Sequence[torch.Tensor]


class Called(nn.Module):
    """A function of a tensor, as a module."""

    def __init__(self, call: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x)


def prepare_torch_ao(model: nn.Module, x: torch.Tensor, backend: str = "x86") -> nn.Module:
    """torch.ao FX graph mode with the default qconfig of a backend, ready to calibrate."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

        return quantize_fx.prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping(backend), (x,))


def convert_torch_ao(prepared: nn.Module, backend: str = "x86") -> nn.Module:
    """The int8 model of a calibrated torch.ao model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import quantize_fx

        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = backend
        try:
            return quantize_fx.convert_fx(copy.deepcopy(prepared))
        finally:
            torch.backends.quantized.engine = before


def torch_ao(model: nn.Module, batches: Batches, backend: str = "x86") -> nn.Module:
    """torch.ao FX graph mode: prepared, calibrated, converted."""
    prepared = prepare_torch_ao(model, batches[0], backend)
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
    return convert_torch_ao(prepared, backend)


def onnxruntime(model: nn.Module, batches: Batches, per_channel: bool = False) -> nn.Module:
    """onnxruntime's static quantization of the exported, pre-processed model; min-max ranges are its default."""
    from onnxruntime import InferenceSession
    from onnxruntime.quantization import CalibrationDataReader, quant_pre_process, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"x": batch.numpy()}

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported, ready, int8 = (str(Path(folder) / name) for name in ("float.onnx", "ready.onnx", "int8.onnx"))
        axes = {"x": {0: "batch"}}
        torch.onnx.export(model, (batches[0],), exported, input_names=["x"], dynamic_axes=axes, dynamo=False)
        quant_pre_process(exported, ready)
        quantize_static(ready, int8, Reader(), per_channel=per_channel)
        session = InferenceSession(int8, providers=["CPUExecutionProvider"])
    return Called(lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0]))


def nncf(model: nn.Module, batches: Batches) -> nn.Module:
    """NNCF's post-training quantization of the OpenVINO model, run by OpenVINO."""
    import nncf
    import openvino

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = openvino.convert_model(model, example_input=batches[0])
        quantized = nncf.quantize(converted, nncf.Dataset(batches, lambda batch: batch.numpy()))
    # What is not int8 would run in bfloat16 where the CPU has it.
    compiled = openvino.compile_model(quantized, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return Called(lambda x: torch.from_numpy(compiled(x.numpy())[0].copy()))
