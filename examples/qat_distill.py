"""Repair a model that post-training quantization breaks, by training without labels: the float model is the teacher.

An ImageNet MobileNetV2 whose channels differ in range by a factor of 700 is quantized with one scale a weight, from
the smallest to the largest value. Most channels are left with two or three integers, and from there training finds no
way. So channels are first equalized: those whose activations are small are made larger, as far as relu6 lets them, and
the weights that read them smaller, which leaves the float model as it is. Then the model trains with fake quantization
to give the float model's logits.

DATA has mobilenet_v2_imagenet.pt (a state dict; input x / 127.5 - 1, rotated by 180 degrees) and
imagenet500/NNNN.jpg (shorter side 256; the file name is the class). Every fifth image tests, the others train.
"""

from __future__ import annotations

import argparse
import copy
import itertools
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


_CONV_NORM_RELU6 = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU6]


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


@torch.no_grad()
def equalize(model: nn.Module, images: torch.Tensor) -> None:
    """Bring the channels between two layers to similar ranges (Nagel et al., arXiv:1906.04721, section 4.1).

    The factor that evens out both layers' weights is limited so that it lets no activation reach the 6 of relu6.
    Channels that are zero on all images only widen ranges, and are removed.
    """
    blocks = [block for block in model.modules() if [*map(type, block.children())] == _CONV_NORM_RELU6]
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    reader_of = dict(itertools.pairwise(convs))  # nothing else reads what is behind a relu6
    largest: dict[nn.Module, torch.Tensor] = {}

    def keep(norm: nn.Module, inputs: object, out: torch.Tensor) -> None:
        reach = out.amax((0, 2, 3))
        largest[norm] = torch.maximum(largest.get(norm, reach), reach)

    handles = [block[1].register_forward_hook(keep) for block in blocks]
    logits(model, images)
    for handle in handles:
        handle.remove()
    for _ in range(3):
        for producer, norm, _ in blocks:
            reader = reader_of.get(producer)
            if reader is None:
                continue
            before = (producer.weight * norm.weight[:, None, None, None]).abs().amax((1, 2, 3))
            after = reader.weight.abs().amax((1, 2, 3) if reader.groups > 1 else (0, 2, 3))
            reach = largest[norm]
            factor = (after / before.clamp(min=1e-8)).sqrt().minimum((5.7 / reach.clamp(min=1e-3)).clamp(min=1))
            factor = torch.where((reach >= 6) | (reach <= 0), torch.ones_like(factor), factor.clamp(min=1e-3))
            for tensor in (norm.weight, norm.bias, reach):
                tensor.mul_(factor)
            factor[reach <= 0] = torch.inf
            reader.weight.div_(factor.reshape(-1, 1, 1, 1) if reader.groups > 1 else factor.reshape(1, -1, 1, 1))
            norm.weight[reach <= 0] = 0


def parameter_groups(prepared: nn.Module, rate: float) -> list[dict[str, object]]:
    """A learning rate for each tensor in proportion to its values: Adam's steps are of one size for all."""
    return [
        {"params": [parameter], "lr": rate * parameter.detach().abs().mean().item()}
        for parameter in prepared.parameters()
    ]


def train(
    prepared: nn.Module, images: torch.Tensor, targets: torch.Tensor, test: Images, args: argparse.Namespace
) -> None:
    """Minimise the distance to the teacher's logits ``targets``, ``[N, 1000]``."""
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
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3, help="Adam's, relative to a tensor's mean absolute value")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = load_model("mobilenet_v2", weights=str(args.data / "mobilenet_v2_imagenet.pt"))
    training, test = load_images(args.data)
    shown = torch.cat([training.images, training.images.flip(3)])  # mirrored too: more to learn from
    targets, expected = logits(model, shown), logits(model, test.images)

    results = {"float": expected, "int8": post_training(model, training, test)}
    student = copy.deepcopy(model)
    student.classifier[0] = nn.Identity()  # the teacher's targets were made without dropout
    equalize(student, training.images)
    results["int8, equalized"] = post_training(student, training, test)

    prepared = prepare(student, training)
    train(prepared, shown, targets, test, args)
    results["int8, equalized and trained"] = logits(fxq.convert(prepared), test.images)
    rows = [(name, accuracy(out, test.labels), sqnr(expected, out)) for name, out in results.items()]
    print(tabulate(rows, headers=("", "top-1 %", "dB to float"), floatfmt=".1f"))


def prepare(model: nn.Module, training: Images) -> nn.Module:
    """Ready to train, and calibrated, which already is post-training quantization."""
    prepared = fxq.prepare_qat(model, training.images[:1], qconfig=PER_TENSOR)
    fxq.freeze_batchnorm(prepared)  # this model's are folded: their statistics are no statistics
    fxq.calibrate(prepared, training.images[:100].split(25))
    return prepared


def post_training(model: nn.Module, training: Images, test: Images) -> torch.Tensor:
    """Logits of the int8 model without training."""
    return logits(fxq.convert(prepare(model, training)), test.images)


if __name__ == "__main__":
    main()
