"""The commands for saved models: ``fxq convert`` and ``fxq bench``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from fxq.api import lower
from fxq.batch_sizes import example_inputs
from fxq.errors import FxqError
from fxq.exported import to_exported_program
from fxq.graph_module import QuantModule
from fxq.onnx_export import to_onnx
from fxq.serialization import load, load_reference
from fxq.timing import float_graph, measure
from fxq.torchscript import to_torchscript

CONVERT_TEXT = "write a saved model for another runtime"
CONVERT_EPILOG = """\
formats:
  onnx         QuantizeLinear/DequantizeLinear with int8 weights, for onnxruntime, OpenVINO and others (opset 18)
  torchscript  the packed int8 kernels, for torch without fxq, from Python or C++
  exported     a program for torch.export.load and the compilers behind it

examples:
  fxq convert resnet18.fxq --to onnx                       writes resnet18.onnx
  fxq convert resnet18.fxq --to onnx --clips               a float graph with the calibrated ranges as Clip nodes
  fxq convert resnet18.fxq --to torchscript --out net.pt
"""
BENCH_TEXT = "time a saved model beside the same graph in float"
BENCH_EPILOG = """\
example:
  fxq bench resnet18.fxq --batch 1 --threads 1

Both run in this process and take turns. The float graph has BatchNorm folded, as the int8 one has.
"""
_SUFFIXES = {"onnx": ".onnx", "torchscript": ".pt", "exported": ".pt2"}


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``fxq convert``."""
    parser.add_argument("file", metavar="FILE", type=Path, help="a file that `fxq quantize` or fxq.save wrote")
    parser.add_argument("--to", choices=tuple(_SUFFIXES), required=True, help="format to write")
    parser.add_argument("--out", metavar="FILE", type=Path, help="file to write (default: FILE with another suffix)")
    parser.add_argument("--backend", metavar="NAME", help="for torchscript: kernels of this backend")
    parser.add_argument("--clips", action="store_true", help="for onnx: clips instead of quantize/dequantize")
    parser.add_argument("--fixed-batch", action="store_true", help="for onnx and exported: the example's batch size")
    parser.set_defaults(run=convert)


def convert(args: argparse.Namespace) -> None:
    """Run ``fxq convert``."""
    out = args.out or args.file.with_suffix(_SUFFIXES[args.to])
    reference = load_reference(args.file)
    if args.to == "onnx":
        to_onnx(reference, out, dynamic_batch=not args.fixed_batch, qdq=not args.clips)
    elif args.to == "torchscript":
        to_torchscript(lower(reference, args.backend) if args.backend else reference, path=out)
    else:
        program = to_exported_program(reference, dynamic_batch=not args.fixed_batch)
        try:
            torch.export.save(program, out)
        except (OSError, RuntimeError) as error:
            raise FxqError(f"{out}: cannot be written ({error})") from error
    print(f"saved {out} ({out.stat().st_size / 1e6:.1f} MB)")


def add_bench_arguments(parser: argparse.ArgumentParser, positive: Any) -> None:
    """Arguments of ``fxq bench``."""
    parser.add_argument("file", metavar="FILE", type=Path, help="a file that `fxq quantize` or fxq.save wrote")
    parser.add_argument("--backend", metavar="NAME", help="kernels of this backend instead of the saved one")
    parser.add_argument("--batch", metavar="N", type=positive, default=1, help="images a call (default: 1)")
    parser.add_argument("--threads", metavar="N", type=positive, help="threads (default: torch's choice)")
    parser.add_argument("--seconds", metavar="N", type=positive, default=3, help="for each model (default: 3)")
    parser.set_defaults(run=bench)


def bench(args: argparse.Namespace) -> None:
    """Run ``fxq bench``."""
    reference = load_reference(args.file)
    assert isinstance(reference, QuantModule)  # one in regions cannot be loaded without its code
    lowered = load(args.file, args.backend)
    assert isinstance(lowered, QuantModule)
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or before)
    try:
        inputs = [_channels_last(x) for x in example_inputs(reference, args.batch)]
        plain = float_graph(reference)
        with torch.no_grad():
            times = measure({"float": lambda: plain(*inputs), "int8": lambda: lowered(*inputs)}, args.seconds)
    finally:
        threads = torch.get_num_threads()
        torch.set_num_threads(before)
    base = times["float"].minimum
    rows = [[name, t.minimum, t.median, t.calls, f"{base / t.minimum:.2f}x"] for name, t in times.items()]
    shapes = ", ".join(str(list(x.shape)) for x in inputs if isinstance(x, torch.Tensor))
    print(f"{reference.plan.model}, backend {lowered.plan.backend}, input {shapes}, {threads} threads\n")
    print(tabulate(rows, ["model", "min ms", "median ms", "calls", "speed"], floatfmt=".3f"))


def _channels_last(x: Any) -> Any:
    """Images as the int8 kernels like them; float convolutions do too."""
    if isinstance(x, torch.Tensor) and x.dim() == 4 and x.is_floating_point():
        return torch.rand(x.shape).contiguous(memory_format=torch.channels_last)
    return x
