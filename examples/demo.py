"""Train two torchvision models on real images, quantize each in one call for every backend, and compare.

The images are scikit-learn's handwritten digits (1,797 scans of 8x8 pixels, part of the package, so nothing is
downloaded), enlarged to 64x64. The first run trains for about a minute and keeps the weights in .cache/demo.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import fxq
from fxq.engine import available_engines
from fxq.errors import FxqError
from fxq.models import load_model
from fxq.torchvision_ops import import_torchvision

EPILOG = """\
examples:
  python examples/demo.py                        everything, from training to tables
  python examples/demo.py --weights DEFAULT      start from torchvision's pretrained weights (downloads them)
  python examples/demo.py --backends x86 --qconfig per_tensor
  python examples/demo.py --retrain              forget the cached weights

what to look at:
  accuracy      on 360 images that neither training nor calibration saw
  MB            the float state dict, the saved int8 file
  ms, speed-up  the fastest of many single-image runs, the models taking turns, on one thread by default

The same in three lines of your own:
  qmodel = fxq.quantize(model, calibration_batches, backend="x86")
  print(fxq.summary(qmodel))
  print(fxq.graph_table(qmodel))
"""

EPOCHS = {"mobilenet_v2": 8, "resnet18": 3}
IMAGE_SIZE = 64
BATCH_SIZE = 64
HELD_OUT = 360
CALIBRATION_IMAGES = 256
CACHE = Path(__file__).parent.parent / ".cache" / "demo"


@dataclass
class Digits:
    """Images ``[N, 3, 64, 64]`` in -1 .. 1 and their classes."""

    images: torch.Tensor
    labels: torch.Tensor

    def batches(self, order: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for rows in order.split(BATCH_SIZE):
            yield self.images[rows], self.labels[rows]

    def __len__(self) -> int:
        return len(self.labels)


def load_digits() -> tuple[Digits, Digits]:
    """The digits as (training, held-out) parts, always the same ones."""
    from sklearn.datasets import load_digits as load_from_scikit_learn

    digits = load_from_scikit_learn()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    images = F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear").expand(-1, 3, -1, -1)
    images = images.contiguous(memory_format=torch.channels_last)  # trains up to twice as fast as contiguous
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, training = order[:HELD_OUT], order[HELD_OUT:]
    return Digits(images[training], labels[training]), Digits(images[held_out], labels[held_out])


def trained_model(name: str, training: Digits, weights: str | None, retrain: bool) -> nn.Module:
    """The torchvision model of that name with ten classes, trained now or read from the cache."""
    cached = CACHE / f"{name}_{Path(weights).stem if weights else 'scratch'}.pt"
    model = new_model(name, weights if retrain or not cached.is_file() else None)
    if retrain or not cached.is_file():
        train(model, training, EPOCHS[name], name)
        CACHE.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), cached)
    else:
        model.load_state_dict(torch.load(cached, weights_only=True))
    return model.eval()


def new_model(name: str, weights: str | None) -> nn.Module:
    """Random weights, or pretrained ones in all layers but the classifier, which has other classes."""
    torch.manual_seed(0)
    model: nn.Module = import_torchvision().models.get_model(name, weights=None, num_classes=10)
    if weights is not None:
        own = model.state_dict()
        pretrained = load_model(name, weights).state_dict()
        fitting = {key: value for key, value in pretrained.items() if value.shape == own[key].shape}
        model.load_state_dict(own | fitting)
    return model


def train(model: nn.Module, digits: Digits, epochs: int, name: str) -> None:
    model.train().to(memory_format=torch.channels_last)
    steps = epochs * -(-len(digits) // BATCH_SIZE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=steps)
    with tqdm(total=steps, desc=f"training {name}", unit="batch") as bar:
        for _ in range(epochs):
            for images, labels in digits.batches(torch.randperm(len(digits))):
                loss = F.cross_entropy(model(images), labels, label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.2f}")
    model.to(memory_format=torch.contiguous_format)


@torch.no_grad()
def accuracy(model: Callable[[torch.Tensor], torch.Tensor], digits: Digits) -> float:
    """Percentage of images whose largest logit is their class."""
    right = sum(
        int((model(images).argmax(1) == labels).sum()) for images, labels in digits.batches(torch.arange(len(digits)))
    )
    return 100 * right / len(digits)


@torch.no_grad()
def latencies(models: dict[str, nn.Module], image: torch.Tensor, rounds: int = 60) -> dict[str, float]:
    """Fastest run of each model in milliseconds. They take turns, so other load on the machine is shared fairly."""
    best = dict.fromkeys(models, float("inf"))
    for _ in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            model(image)
            best[name] = min(best[name], (time.perf_counter() - start) * 1e3)
    return best


@dataclass
class Versions:
    """A float model and its int8 versions, by backend."""

    name: str
    models: dict[str, nn.Module]
    megabytes: dict[str, float]


def quantize_for_all(
    name: str, model: nn.Module, calibration: list[torch.Tensor], backends: list[str], qconfig: str
) -> Versions:
    """One call a backend; the staged calls give the graph to save."""
    float_size = saved_size(functools.partial(torch.save, model.state_dict()))
    versions = Versions(name, {"float": model}, {"float": float_size})
    for backend in backends:
        versions.models[backend] = fxq.quantize(model, calibration, backend=backend, qconfig=qconfig)
        prepared = fxq.prepare(model, calibration[0], backend=backend, qconfig=qconfig)
        fxq.calibrate(prepared, calibration, progress=False)
        reference = fxq.convert_to_reference(prepared)
        versions.megabytes[backend] = saved_size(functools.partial(fxq.save, reference))
    return versions


def saved_size(save: Callable[[Path], object]) -> float:
    """Megabytes of the file that ``save`` writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model")
        save(path)
        return path.stat().st_size / 1e6


def table_rows(versions: Versions, held_out: Digits) -> Iterator[list[object]]:
    milliseconds = latencies(versions.models, held_out.images[:1])
    for backend, model in versions.models.items():
        yield [
            versions.name,
            backend if backend == "float" else f"int8 {backend}",
            accuracy(model, held_out),
            versions.megabytes[backend],
            milliseconds[backend],
            milliseconds["float"] / milliseconds[backend],
        ]


def print_results(all_versions: list[Versions], held_out: Digits) -> None:
    print("\nmeasuring ...", flush=True)
    rows = [row for versions in all_versions for row in table_rows(versions, held_out)]
    headers = ["model", "version", "accuracy %", "MB", "ms", "speed-up"]
    print(tabulate(rows, headers, floatfmt=("", "", ".2f", ".2f", ".2f", ".2f")))


def print_tables(versions: Versions, graph_rows: int) -> None:
    backend, model = list(versions.models.items())[-1]
    print(f"\n{versions.name} for {backend}: fxq.summary(qmodel)\n")
    print(fxq.summary(model))
    print("\nthe first rows of fxq.graph_table(qmodel)\n")
    print("\n".join(str(fxq.graph_table(model)).splitlines()[:graph_rows]))


def available_backends() -> list[str]:
    """Those whose engine, which has the same name, is part of this build of torch; the default one last."""
    return [name for name in ("fbgemm", "qnnpack", "onednn", "x86") if name in available_engines()]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models, backends = list(EPOCHS), available_backends()
    parser.add_argument("--models", nargs="+", choices=models, default=models, help="(default: all)")
    parser.add_argument("--backends", nargs="+", choices=backends, default=backends, help="(default: all there are)")
    parser.add_argument("--qconfig", choices=("per_channel", "per_tensor"), default="per_channel")
    parser.add_argument("--weights", metavar="W", help="ImageNet weights to start from: DEFAULT, or a state-dict file")
    parser.add_argument("--retrain", action="store_true", help="train even if there are cached weights")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads while measuring latency")
    parser.add_argument("--graph-rows", type=int, default=25, metavar="N", help="lines of the graph table to print")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    training, held_out = load_digits()
    batches = training.batches(torch.arange(CALIBRATION_IMAGES))
    calibration = [images for images, _ in batches]
    models = {name: trained_model(name, training, args.weights, args.retrain) for name in args.models}
    all_versions = [
        quantize_for_all(name, model, calibration, args.backends, args.qconfig) for name, model in models.items()
    ]
    torch.set_num_threads(args.threads)
    print_results(all_versions, held_out)
    print_tables(all_versions[0], args.graph_rows)


if __name__ == "__main__":
    try:
        main()
    except FxqError as error:
        raise SystemExit(f"demo: error: {error}") from None
