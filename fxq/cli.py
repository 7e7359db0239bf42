"""The command line: ``fxq quantize``, ``inspect``, ``convert``, ``bench`` and ``backends``."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import fxq
from fxq import cli_ship
from fxq.errors import ConfigError, FxqError, FxqWarning
from fxq.image_folder import ImageFolder
from fxq.models import load_model, preprocessing
from fxq.presets import PRESETS
from fxq.serialization import load_for_tables

_DESCRIPTION = "Quantize PyTorch models to int8 for CPUs, and look at the result."
_EPILOG = """\
a first run:
  fxq backends                               what can run on this machine?
  fxq quantize mobilenet_v2 --weights DEFAULT --calibrate photos/ --out mobilenet_v2.fxq
  fxq inspect mobilenet_v2.fxq --table graph
  fxq bench mobilenet_v2.fxq                 how fast is it here?
  fxq convert mobilenet_v2.fxq --to onnx     for onnxruntime and others

and then, in Python:
  model = fxq.load("mobilenet_v2.fxq")       # call it like the float model

`fxq COMMAND --help` explains a command. Exit status: 0 done, 1 an error (one line says which), 2 wrong usage.
"""
_QUANTIZE_EPILOG = """\
what happens:
  The float model runs over the images (no labels needed) while observers record the range of every tensor.
  Ranges become scales and zero points, and the quantized graph is saved. A few hundred images like those the
  model will see are enough; more rarely help.

examples:
  fxq quantize resnet18 --weights DEFAULT --calibrate photos/ --out resnet18.fxq
      a torchvision model with its pretrained weights, downloaded once; --weights may also be a state-dict file
  fxq quantize my_package.nets:make_net --weights net.pt --size 64 --calibrate photos/ --out net.fxq
      any function without arguments that makes a model; found from the current directory
  fxq quantize resnet18 --weights DEFAULT --calibrate photos/ --out resnet18.fxq --exclude conv1 fc
      keep these modules in float, here the first and the last layer
  fxq quantize resnet18 --weights DEFAULT --calibrate photos/ --num-batches 8 --backend qnnpack --out arm.fxq
      for ARM, calibrated on 8 batches of images spread evenly over the folder
"""
_INSPECT_EPILOG = """\
tables:
  summary   the whole result at a glance: how much is int8, what stays float and why
  graph     every node: op, int8 or float, kernel, scale, zero point, shape, reason
  fusion    what was folded into and fused with what

example:
  fxq inspect resnet18.fxq --table all | less -S
"""
_BACKENDS_EPILOG = """\
examples:
  fxq backends            the backends, their engines, and which of them this build of torch has
  fxq backends qnnpack    every op that qnnpack runs in int8, and what is fused with it
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after the program's name; ``None`` for those of the process.

    Returns:
        The exit status: 0 when done, 1 after an error, of which one line on stderr tells.

    Raises:
        SystemExit: with status 2 for wrong usage, with 0 after ``--help``; as argparse does.

    Example:
        >>> main(["backends", "x86"])
        0
    """
    args = _make_parser().parse_args(argv)
    try:
        with _short_warnings():
            args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (FxqError, OSError) as error:
        _note("error", error)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _make_parser() -> argparse.ArgumentParser:
    parser = _parser_with_examples(argparse.ArgumentParser(prog="fxq", description=_DESCRIPTION), _EPILOG)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_quantize(commands)
    _add_inspect(commands)
    _add_shipping(commands)
    _add_backends(commands)
    return parser


def _parser_with_examples(parser: argparse.ArgumentParser, epilog: str) -> argparse.ArgumentParser:
    parser.epilog = epilog
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser


def _add_quantize(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "quantize a model with calibration images and save it"
    parser = _parser_with_examples(commands.add_parser("quantize", help=text, description=text), _QUANTIZE_EPILOG)
    parser.add_argument("model", metavar="MODEL", help="a torchvision model's name, or package.module:callable")
    parser.add_argument("--calibrate", metavar="DIR", required=True, help="folder of images, searched recursively")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="file to write, e.g. model.fxq")
    parser.add_argument(
        "--weights", metavar="W", help="DEFAULT or another name torchvision has, or a state-dict file (default: random)"
    )
    parser.add_argument("--backend", metavar="NAME", default="x86", help="see `fxq backends` (default: x86)")
    parser.add_argument(
        "--qconfig",
        choices=("per_channel", "per_tensor"),
        default="per_channel",
        help="per_channel: the backend's recommended one; per_tensor: min-max, the classic one (default: per_channel)",
    )
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default="default",
        help="how ranges are chosen and errors corrected, from fast to accurate; docs/accuracy.md (default: default)",
    )
    parser.add_argument("--pow2-scales", action="store_true", help="scales are powers of two, for shift-only devices")
    parser.add_argument(
        "--exclude", metavar="NAME", nargs="+", action="extend", default=[], help="modules to keep in float"
    )
    parser.add_argument("--size", metavar="N", type=_positive, help="height and width (default: the weights' or 224)")
    parser.add_argument("--batch-size", metavar="N", type=_positive, default=32, help="images in a batch (default: 32)")
    parser.add_argument(
        "--num-batches", metavar="N", type=_positive, help="batches to take, spread over the folder (default: all)"
    )
    parser.add_argument("--quiet", action="store_true", help="print no progress and no summary")
    parser.set_defaults(run=_quantize)


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "print tables about a saved model"
    parser = _parser_with_examples(commands.add_parser("inspect", help=text, description=text), _INSPECT_EPILOG)
    parser.add_argument("file", metavar="FILE", type=Path, help="a file that `fxq quantize` or fxq.save wrote")
    parser.add_argument(
        "--table", choices=(*_TABLES, "all"), default="summary", help="what to print (default: summary)"
    )
    parser.add_argument("--backend", metavar="NAME", help="lower for this backend instead of the saved one")
    parser.set_defaults(run=_inspect)


def _add_shipping(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text, epilog = cli_ship.CONVERT_TEXT, cli_ship.CONVERT_EPILOG
    parser = _parser_with_examples(commands.add_parser("convert", help=text, description=text), epilog)
    cli_ship.add_convert_arguments(parser)
    text, epilog = cli_ship.BENCH_TEXT, cli_ship.BENCH_EPILOG
    parser = _parser_with_examples(commands.add_parser("bench", help=text, description=text), epilog)
    cli_ship.add_bench_arguments(parser, _positive)


def _add_backends(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "list the backends, or what one of them runs"
    parser = _parser_with_examples(commands.add_parser("backends", help=text, description=text), _BACKENDS_EPILOG)
    parser.add_argument("name", metavar="NAME", nargs="?", help="show the ops of this backend")
    parser.set_defaults(run=_backends)


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


def _quantize(args: argparse.Namespace) -> None:
    _check_writable(args.out)
    model = load_model(args.model, args.weights)
    if args.weights is None and ":" not in args.model:
        _note("note", f"{args.model} has random weights; --weights DEFAULT or a state-dict file gives it trained ones")
    images = ImageFolder(
        args.calibrate,
        preprocessing(args.model, args.weights, args.size),
        batch_size=args.batch_size,
        max_images=args.num_batches and args.num_batches * args.batch_size,
    )
    qmodel = fxq.quantize(
        model,
        images,
        backend=args.backend,
        qconfig=args.qconfig,
        exclude=tuple(args.exclude),
        calibration=args.preset,
        pow2_scales=args.pow2_scales,
        progress=False if args.quiet else None,
    )
    fxq.save(qmodel, args.out)
    if not args.quiet:
        print(fxq.summary(qmodel))
        print(f"\nsaved {args.out} ({args.out.stat().st_size / 1e6:.1f} MB); `fxq inspect {args.out}` shows more")


def _check_writable(path: Path) -> None:
    """Said now, not after minutes of calibration."""
    if path.is_dir():
        raise ConfigError(f"--out {path}: this is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--out {path}: there is no folder {str(path.parent)!r}")


def _inspect(args: argparse.Namespace) -> None:
    model = load_for_tables(args.file, args.backend)
    names = list(_TABLES) if args.table == "all" else [args.table]
    with cli_ship.any_error_of(args.file):
        print("\n\n".join(str(_TABLES[name](model)) for name in names))


_TABLES = {"summary": fxq.summary, "graph": fxq.graph_table, "fusion": fxq.fusion_table}


def _backends(args: argparse.Namespace) -> None:
    print(fxq.backends() if args.name is None else fxq.backend_table(args.name))


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Print fxq's own warnings as one line each, without the place in the source that issued them."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_short(message, category, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
            if issubclass(category, FxqWarning):
                _note("warning", message)
            else:
                show(message, category, *args, **kwargs)

        warnings.showwarning = show_short
        yield


def _note(kind: str, message: object) -> None:
    print(f"fxq: {kind}: {' '.join(str(message).split())}", file=sys.stderr)
