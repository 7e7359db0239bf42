"""Repair a model that post-training quantization breaks, by training without labels: the float model is the teacher.

An ImageNet MobileNetV2 whose channels differ in range by a factor of 700 is quantized with one scale a weight, from
the smallest to the largest value. Most small channels are rounded to zero. Fake quantization with the float model's
logits as targets moves them back onto the grid.

DATA has mobilenet_v2_imagenet.pt (a state dict; input x / 127.5 - 1, rotated by 180 degrees) and
imagenet500/NNNN.jpg (shorter side 256; the file name is the class). Every fifth image tests, the others train.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import fxq
from fxq.models import load_model
from fxq.numerics import sqnr

PER_TENSOR = fxq.QConfig(
    activation=fxq.QuantSpec(
        dtype=torch.uint8, quant_min=0, quant_max=255, symmetric=False, observer="moving_average"
    ),
    weight=fxq.QuantSpec(dtype=torch.int8, quant_min=-127, quant_max=127, symmetric=True, observer="minmax"),
)


@dataclass
class Images:
    """Images ``[N, 3, 224, 224]`` and their classes."""

    images: torch.Tensor
    labels: torch.Tensor


def load_images(data: Path) -> tuple[Images, Images]:
    """400 images to train with, 100 to test with."""
    files = sorted((data / "imagenet500").glob("*.jpg"))
    images = torch.stack([_centre_crop(Image.open(file).convert("RGB")) for file in tqdm(files, "images")])
    labels = torch.tensor([int(file.stem) for file in files])
    test = torch.arange(len(files)) % 5 == 0
    return Images(images[~test], labels[~test]), Images(images[test], labels[test])


def _centre_crop(image: Image.Image, size: int = 224) -> torch.Tensor:
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = torch.from_numpy(np.array(image.crop((left, top, left + size, top + size)))).permute(2, 0, 1)
    return (pixels / 127.5 - 1).flip(1, 2)


@torch.no_grad()
def logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(batch) for batch in images.split(25)])


def accuracy(outputs: torch.Tensor, labels: torch.Tensor) -> float:
    return 100 * (outputs.argmax(1) == labels).float().mean().item()


def parameter_groups(prepared: nn.Module, rate: float) -> list[dict[str, object]]:
    """A learning rate for each parameter in proportion to its typical value: Adam's steps do not know how large."""
    return [
        {"params": [parameter], "lr": rate * parameter.detach().abs().max().item() + 1e-6}
        for parameter in prepared.parameters()
    ]


def train(
    prepared: nn.Module, images: torch.Tensor, targets: torch.Tensor, test: Images, args: argparse.Namespace
) -> None:
    """Minimise the distance to the teacher's logits."""
    steps = args.epochs * (len(images) // args.batch_size)
    optimizer = torch.optim.Adam(parameter_groups(prepared, args.rate))
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    schedule = fxq.QATSchedule(freeze_observers_at=steps * 3 // 4)
    start = time.perf_counter()
    for epoch in range(args.epochs):
        prepared.train()
        progress = tqdm(torch.randperm(len(images)).split(args.batch_size), f"epoch {epoch + 1}")
        for batch in progress:
            if len(batch) < args.batch_size:
                continue
            loss = F.mse_loss(prepared(images[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
            schedule.step(prepared)
            progress.set_postfix(loss=f"{loss.item():.3f}")
        outputs = logits(fxq.convert(prepared), test.images)
        minutes = (time.perf_counter() - start) / 60
        int8 = accuracy(outputs, test.labels)
        print(f"epoch {epoch + 1}: int8 top-1 {int8:.0f} %, {minutes:.1f} minutes", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the model and the images")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3, help="Adam's, as a share of a tensor's largest value")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = load_model("mobilenet_v2", weights=str(args.data / "mobilenet_v2_imagenet.pt"))
    training, test = load_images(args.data)
    targets, expected = logits(model, training.images), logits(model, test.images)

    prepared = fxq.prepare_qat(model, training.images[:1], qconfig=PER_TENSOR)
    fxq.freeze_batchnorm(prepared)  # this model's BatchNorms are folded: their statistics are no statistics
    fxq.calibrate(prepared, training.images[:100].split(25))
    ptq = logits(fxq.convert(prepared), test.images)
    train(prepared, training.images, targets, test, args)
    qat = logits(fxq.convert(prepared), test.images)
    rows = [
        (name, accuracy(outputs, test.labels), sqnr(expected, outputs))
        for name, outputs in (("float", expected), ("int8, post-training", ptq), ("int8, trained", qat))
    ]
    print(tabulate(rows, headers=("", "top-1 %", "dB to float"), floatfmt=".1f"))


if __name__ == "__main__":
    main()
