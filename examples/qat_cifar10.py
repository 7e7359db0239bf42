"""Train a CIFAR-10 MobileNetV2 with 4-bit weights, which post-training quantization breaks, and run it in int8.

Weights take the integers from -8 to 7 and are run by the same int8 kernels as 8-bit ones; activations have 8 bits. The
scales of the weights are learned (LSQ). After each epoch the model is converted and its int8 accuracy measured.

DATA has mobilenet_v2_cifar10.pt (a state dict of torchvision's mobilenet_v2(num_classes=10)) and cifar10.npz (train_x,
train_y, test_x, test_y, and train_jpeg_x and so on: uint8 NHWC images and labels).
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import fxq
from fxq.backends import get_backend
from fxq.torchvision_ops import import_torchvision

_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
_STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
_SIZE = 64


@dataclass
class Images:
    """uint8 images ``[N, 3, 32, 32]`` and their classes."""

    pixels: torch.Tensor
    labels: torch.Tensor


def load_images(data: Path) -> tuple[Images, Images]:
    """15,085 images to train with, 2,517 to test with."""
    arrays = np.load(data / "cifar10.npz")

    def images(*names: str) -> Images:
        pixels = np.concatenate([arrays[f"{name}_x"] for name in names])
        labels = np.concatenate([arrays[f"{name}_y"] for name in names])
        return Images(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(labels).long())

    return images("train", "train_jpeg"), images("test", "test_jpeg")


def network_input(pixels: torch.Tensor) -> torch.Tensor:
    normalised = (pixels.float() / 255 - _MEAN) / _STD
    return F.interpolate(normalised, size=_SIZE, mode="bilinear", align_corners=False)


def augmented(pixels: torch.Tensor) -> torch.Tensor:
    """Flipped and moved by up to two pixels."""
    if torch.rand(()) < 0.5:
        pixels = pixels.flip(3)
    top, left = torch.randint(0, 5, (2,)).tolist()
    return F.pad(pixels, (2, 2, 2, 2))[:, :, top : top + 32, left : left + 32]


@torch.no_grad()
def accuracy(model: nn.Module, test: Images) -> float:
    found = torch.cat([model(network_input(batch)).argmax(1) for batch in test.pixels.split(100)])
    return 100 * (found == test.labels).float().mean().item()


def four_bit(observer: str, activation_observer: str, *, per_channel: bool = True) -> fxq.QConfig:
    table = get_backend("x86")
    weight = table.weight.replace(
        quant_min=-8, quant_max=7, observer=observer, ch_axis=table.weight.ch_axis if per_channel else None
    )
    return fxq.QConfig(activation=table.activation.replace(observer=activation_observer), weight=weight)


def loss_of(outputs: torch.Tensor, labels: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Cross entropy on the labels, and how far the probabilities are from the float model's."""
    divergence = F.kl_div(outputs.log_softmax(1), expected.log_softmax(1), reduction="batchmean", log_target=True)
    return F.cross_entropy(outputs, labels) + 2 * divergence


def train(prepared: nn.Module, teacher: nn.Module, training: Images, test: Images, args: argparse.Namespace) -> None:
    """BatchNorm's statistics and the ranges are frozen before the end."""
    steps = args.epochs * (args.images // args.batch_size)
    scales = [parameter for name, parameter in prepared.named_parameters() if name.endswith(".step")]
    others = [parameter for name, parameter in prepared.named_parameters() if not name.endswith(".step")]
    optimizer = torch.optim.SGD([{"params": others}, {"params": scales}], args.rate, momentum=0.9)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.rate, total_steps=steps, pct_start=0.1)
    schedule = fxq.QATSchedule(freeze_observers_at=steps * 3 // 4, freeze_batchnorm_at=steps * 7 // 8)
    for epoch in range(args.epochs):
        prepared.train()
        order = torch.randperm(len(training.labels))[: args.images // args.batch_size * args.batch_size]
        progress = tqdm(order.split(args.batch_size), f"epoch {epoch + 1}")
        for batch in progress:
            x = network_input(augmented(training.pixels[batch]))
            with torch.no_grad():
                expected = teacher(x)
            loss = loss_of(prepared(x), training.labels[batch], expected)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
            schedule.step(prepared)
            progress.set_postfix(loss=f"{loss.item():.3f}")
        print(f"epoch {epoch + 1}: int8 top-1 {accuracy(fxq.convert(prepared), test):.1f} %", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the model and the images")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--images", type=int, default=9_600, help="images an epoch")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rate", type=float, default=0.003)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    import_torchvision()
    from torchvision.models import mobilenet_v2

    model = mobilenet_v2(num_classes=10)
    model.load_state_dict(torch.load(args.data / "mobilenet_v2_cifar10.pt", weights_only=True))
    training, test = load_images(args.data)
    calibration = [network_input(batch) for batch in training.pixels[:200].split(50)]
    results = {"float": accuracy(model.eval(), test)}
    for name, per_channel in (("4-bit weights, post-training, per tensor", False), ("the same, per channel", True)):
        qmodel = fxq.quantize(model, calibration, qconfig=four_bit("mse", "histogram", per_channel=per_channel))
        results[name] = accuracy(qmodel, test)

    start = time.perf_counter()
    prepared = fxq.prepare_qat(copy.deepcopy(model).train(), calibration[0], qconfig=four_bit("lsq", "moving_average"))
    fxq.calibrate(prepared, calibration)
    train(prepared, model.eval(), training, test, args)
    results[f"trained, {(time.perf_counter() - start) / 60:.0f} minutes"] = accuracy(fxq.convert(prepared), test)
    print(tabulate(results.items(), headers=("", "top-1 %"), floatfmt=".1f"))


if __name__ == "__main__":
    main()
