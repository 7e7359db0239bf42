"""The int8 and float paths fxq's speed is compared with, each set up for speed the way its own documentation says.

A tool is a function of a float model, an example input and a number of threads, and returns a call without arguments
that runs the model once. All start from the same float weights, calibrate with the same data and get the same input.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peers import convert_torch_ao, prepare_torch_ao
from torch import nn

Run = Callable[[], Any]
Tool = Callable[[nn.Module, torch.Tensor, int], Run]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings, progress bars and log lines of the tools."""
    sink = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def calibration_data(x: torch.Tensor) -> list[torch.Tensor]:
    """Batches like ``x``, the same for every tool."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=generator) for _ in range(4)]


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def float_eager(model: nn.Module, x: torch.Tensor, threads: int) -> Run:
    """Float, channels_last."""
    model, x = copy.deepcopy(model).to(memory_format=torch.channels_last), channels_last(x)  # type: ignore[call-overload]
    return lambda: model(x)


def float_compiled(model: nn.Module, x: torch.Tensor, threads: int) -> Run:
    """torch.compile with the weights frozen into the code."""
    return _inductor(copy.deepcopy(model).to(memory_format=torch.channels_last), channels_last(x))  # type: ignore[call-overload]


def _inductor(model: nn.Module, x: torch.Tensor) -> Run:
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    with quiet(), inductor.patch(freezing=True):
        compiled = torch.compile(model)
        for _ in range(2):
            compiled(x)
    return lambda: compiled(x)


def torch_ao(model: nn.Module, x: torch.Tensor, threads: int) -> Run:
    """torch.ao FX graph mode, eager."""
    quantized, x = _torch_ao(model, x)
    return lambda: quantized(x)


def _torch_ao(model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    prepared = prepare_torch_ao(model, x)
    for batch in calibration_data(x):
        prepared(batch)
    return convert_torch_ao(prepared), channels_last(x)


def torch_ao_frozen(model: nn.Module, x: torch.Tensor, threads: int) -> Run:
    """torch.ao FX graph mode, traced and frozen with TorchScript."""
    quantized, x = _torch_ao(model, x)
    with quiet():
        frozen = torch.jit.freeze(torch.jit.trace(quantized, x))  # type: ignore[no-untyped-call]
    return lambda: frozen(x)


def pt2e(model: nn.Module, x: torch.Tensor, threads: int) -> Run:
    """torchao PT2E with the x86 quantizer, compiled by Inductor."""
    with quiet():
        from torchao.quantization.pt2e import move_exported_model_to_eval
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        model, x = copy.deepcopy(model).to(memory_format=torch.channels_last), channels_last(x)  # type: ignore[call-overload]
        prepared = prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
        for batch in calibration_data(x):
            prepared(channels_last(batch))
        converted = convert_pt2e(prepared)
        move_exported_model_to_eval(converted)
    return _inductor(converted, x)


def onnxruntime_int8(model: nn.Module, x: torch.Tensor, threads: int) -> Run:
    """onnxruntime: static QDQ, uint8 activations, int8 weights a channel."""
    import onnxruntime as ort

    path = _quantized_onnx(model, x)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {"input": x.numpy()}
    return lambda: session.run(None, feed)


def _quantized_onnx(model: nn.Module, x: torch.Tensor) -> Path:
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(q.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(calibration_data(x))

        def get_next(self) -> Any:
            batch = next(self.batches, None)
            return None if batch is None else {"input": batch.numpy()}

    folder = Path(tempfile.mkdtemp())
    with quiet():
        torch.onnx.export(model, (x,), str(folder / "float.onnx"), input_names=["input"], dynamo=False)
        quant_pre_process(str(folder / "float.onnx"), str(folder / "ready.onnx"))
        q.quantize_static(
            str(folder / "ready.onnx"), str(folder / "int8.onnx"), Reader(), quant_format=q.QuantFormat.QDQ,
            per_channel=True, activation_type=q.QuantType.QUInt8, weight_type=q.QuantType.QInt8,
        )  # fmt: skip
    return folder / "int8.onnx"


def openvino_int8(model: nn.Module, x: torch.Tensor, threads: int) -> Run:
    """OpenVINO, quantized by NNCF."""
    with quiet():
        import nncf
        import openvino as ov

        converted = ov.convert_model(model, example_input=x, input=[tuple(x.shape)])
        quantized = nncf.quantize(converted, nncf.Dataset(calibration_data(x), lambda batch: batch.numpy()))
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        request = ov.Core().compile_model(quantized, "CPU", settings).create_infer_request()
    feed = [x.numpy()]
    return lambda: request.infer(feed, share_inputs=True)


PEERS: dict[str, Tool] = {
    "float": float_eager,
    "float compiled": float_compiled,
    "torch.ao FX": torch_ao,
    "torch.ao FX frozen": torch_ao_frozen,
    "PT2E + Inductor": pt2e,
    "onnxruntime": onnxruntime_int8,
    "OpenVINO": openvino_int8,
}
