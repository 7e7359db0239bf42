"""The commands for saved models: ``fxq convert`` and ``fxq bench``."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from fxq.api import lower
from fxq.batch_sizes import example_inputs
from fxq.errors import ConfigError, FxqError, StageError
from fxq.exported import to_exported_program
from fxq.graph_module import QuantModule
from fxq.onnx_export import to_onnx
from fxq.serialization import load_regions
from fxq.timing import float_graph, measure
from fxq.torchscript import to_torchscript
from fxq.whole_files import write_file

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

Of a model that was quantized part by part, each part becomes a file: detector.backbone.onnx and so on.
"""
BENCH_TEXT = "time a saved model beside the same graph in float"
BENCH_EPILOG = """\
example:
  fxq bench resnet18.fxq --batch 1 --threads 1

Both run in this process and take turns. The float graph has BatchNorm folded, as the int8 one has. Of a model that
was quantized part by part, each part is timed, with inputs of the sizes it was prepared with.
"""
_SUFFIXES = {"onnx": ".onnx", "torchscript": ".pt", "exported": ".pt2"}
_ONLY_FOR = {"backend": ("torchscript",), "clips": ("onnx",), "fixed_batch": ("onnx", "exported")}


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``fxq convert``."""
    parser.add_argument("file", metavar="FILE", type=Path, help="a file that `fxq quantize` or fxq.save wrote")
    parser.add_argument("--to", choices=tuple(_SUFFIXES), required=True, help="format to write")
    parser.add_argument("--out", metavar="FILE", type=Path, help="file to write (default: FILE with another suffix)")
    parser.add_argument("--backend", metavar="NAME", help="for torchscript: kernels of this backend")
    parser.add_argument("--clips", action="store_true", help="for onnx: clips instead of quantize/dequantize")
    parser.add_argument("--fixed-batch", action="store_true", help="for onnx and exported: the example's batch size")
    parser.set_defaults(run=convert, wrong_usage=parser.error)


def convert(args: argparse.Namespace) -> None:
    """Run ``fxq convert``: one file, or one for each part of a model that was quantized part by part."""
    for option, formats in _ONLY_FOR.items():
        if getattr(args, option) and args.to not in formats:
            args.wrong_usage(f"--{option.replace('_', '-')} is for --to {' and '.join(formats)}")
    regions = load_regions(args.file)
    out = args.out or args.file.with_suffix(_SUFFIXES[args.to])
    refused = []
    for place, reference in regions.items():
        path = out.with_name(f"{out.stem}.{place.replace(os.sep, '_')}{out.suffix}") if place else out
        try:
            if place and not _takes_tensors(reference):
                raise FxqError("it takes other inputs than tensors; convert a module around it or the parts inside")
            with any_error_of(args.file):
                _write(reference, path, args)
        except FxqError as error:
            if not place:
                raise
            refused.append(f"'{place}': {error}")
        else:
            print(f"saved {path} ({path.stat().st_size / 1e6:.1f} MB)")
    if refused:
        raise FxqError(f"{args.file}: {len(refused)} of its parts cannot be converted; {'; '.join(refused)}")


@contextlib.contextmanager
def any_error_of(file: Path) -> Iterator[None]:
    """Whatever a file's graph makes torch raise is one error, which names the file."""
    try:
        yield
    except (FxqError, OSError):
        raise
    except Exception as error:
        raise FxqError(f"{file}: its graph cannot be used ({type(error).__name__}: {error})") from error


def _write(reference: QuantModule, path: Path, args: argparse.Namespace) -> None:
    if path.exists() and path.samefile(args.file):
        raise ConfigError(f"{path}: this is the model itself; name another file with --out")
    if args.to == "onnx":
        to_onnx(reference, path, dynamic_batch=not args.fixed_batch, qdq=not args.clips)
    elif args.to == "torchscript":
        to_torchscript(lower(reference, args.backend) if args.backend else reference, path=path)
    else:
        buffer = io.BytesIO()
        torch.export.save(to_exported_program(reference, dynamic_batch=not args.fixed_batch), buffer)
        write_file(path, buffer.getvalue())


def add_bench_arguments(parser: argparse.ArgumentParser, positive: Any) -> None:
    """Arguments of ``fxq bench``."""
    parser.add_argument("file", metavar="FILE", type=Path, help="a file that `fxq quantize` or fxq.save wrote")
    parser.add_argument("--backend", metavar="NAME", help="kernels of this backend instead of the saved one")
    parser.add_argument("--batch", metavar="N", type=positive, default=1, help="images a call (default: 1)")
    parser.add_argument("--threads", metavar="N", type=positive, help="threads (default: torch's choice)")
    parser.add_argument("--seconds", metavar="N", type=positive, default=3, help="for each model (default: 3)")
    parser.set_defaults(run=bench)


def bench(args: argparse.Namespace) -> None:
    """Run ``fxq bench``: the model, or each part of one that was quantized part by part."""
    processors = os.cpu_count() or 1
    if args.threads and args.threads > processors:
        raise ConfigError(f"--threads {args.threads}: this machine has {processors} processors")
    regions = load_regions(args.file)
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or before)
    try:
        with any_error_of(args.file):
            for place, reference in regions.items():
                _bench_part(place, reference, args)
    finally:
        torch.set_num_threads(before)


def _bench_part(place: str, reference: QuantModule, args: argparse.Namespace) -> None:
    """One part, unless its code is missing: that says nothing of the others."""
    try:
        _bench(place, reference, args)
    except StageError as error:
        if not place:
            raise
        print(f"{place}: {reference.plan.model}: not timed; {error}\n")


def _bench(place: str, reference: QuantModule, args: argparse.Namespace) -> None:
    title = f"{place}: {reference.plan.model}" if place else reference.plan.model
    if place and not _takes_tensors(reference):
        print(f"{title}: not timed, as it takes other inputs than tensors\n")
        return
    backend = args.backend or reference.plan.backend
    lowered = lower(reference, backend)
    # a part's first dimension need not be the batch
    inputs = [_channels_last(x) for x in example_inputs(reference, None if place else args.batch)]
    plain = float_graph(reference)
    with torch.no_grad():
        times = measure({"float": lambda: plain(*inputs), "int8": lambda: lowered(*inputs)}, args.seconds)
    base = times["float"].minimum
    rows = [[name, t.minimum, t.median, t.calls, f"{base / t.minimum:.2f}x"] for name, t in times.items()]
    shapes = ", ".join(str(list(x.shape)) for x in inputs if isinstance(x, torch.Tensor))
    print(f"{title}, backend {backend}, input {shapes}, {torch.get_num_threads()} threads\n")
    print(tabulate(rows, ["model", "min ms", "median ms", "calls", "speed"], floatfmt=".3f") + "\n" * bool(place))


def _takes_tensors(part: QuantModule) -> bool:
    return all(node.name in part.plan.facts for node in part.graph.find_nodes(op="placeholder"))


def _channels_last(x: Any) -> Any:
    """Images as the int8 kernels like them; float convolutions do too."""
    if isinstance(x, torch.Tensor) and x.dim() == 4 and x.is_floating_point():
        return torch.rand(x.shape).contiguous(memory_format=torch.channels_last)
    return x
