"""Real models and images from a folder, for measuring accuracy.

The folder (``--data``) holds float32 state dicts and images:

==========================  ==========================================================================================
mobilenet_v2_imagenet.pt    torchvision mobilenet_v2; 224 centre crop, x / 127.5 - 1, rotated by 180 degrees
squeezenet1_0.pt            torchvision squeezenet1_0; 227 centre crop, ImageNet normalisation
mobilenet_v2_cifar10.pt     torchvision mobilenet_v2(num_classes=10); ImageNet normalisation, 32 -> 64 bilinear
resnet20_cifar10.pt         resnet20() of cifar_resnet.py in the same folder; ImageNet normalisation
imagenet500/NNNN.jpg        images, shorter side 256; the file name is the class
cifar10.npz                 train_x, train_y, test_x, test_y: uint8 NHWC images and labels
==========================  ==========================================================================================
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from fxq.models import load_model
from fxq.torchvision_ops import import_torchvision

_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
_STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


@dataclass(frozen=True)
class Task:
    """A float model in eval mode with calibration images ``[N, 3, H, W]`` and labelled test images."""

    name: str
    model: nn.Module
    calibration: torch.Tensor
    images: torch.Tensor
    labels: torch.Tensor


def load_task(name: str, data: Path, views: bool = False) -> Task:
    """The task of a name in :data:`TASKS`, from the folder ``data``.

    Args:
        views: test on ten views of each ImageNet image (its corners and its centre, and these mirrored), and on each
            CIFAR-10 image mirrored as well: chance counts for less.
    """
    model, (calibration, images, labels) = TASKS[name](data, views)
    return Task(name, model.eval(), calibration, images, labels)


Images = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _imagenet(data: Path, size: int, transform: Callable[[torch.Tensor], torch.Tensor], views: bool) -> Images:
    """Every fifth image calibrates, the others test."""
    files = sorted((data / "imagenet500").glob("*.jpg"))
    labels = torch.tensor([int(file.stem) for file in files])
    calibrates = torch.arange(len(files)) % 5 == 0
    pictures = [Image.open(file).convert("RGB") for file in files]
    centres = torch.stack([_crop(picture, size, 0.5, 0.5) for picture in pictures])
    calibration, images, labels = transform(centres[calibrates].float()), centres[~calibrates], labels[~calibrates]
    if views:
        tested = [picture for picture, used in zip(pictures, calibrates.tolist(), strict=True) if not used]
        places = [(0.5, 0.5), (0, 0), (0, 1), (1, 0), (1, 1)]
        crops = [torch.stack([_crop(picture, size, *place) for picture in tested]) for place in places]
        images = torch.cat([*crops, *(crop.flip(3) for crop in crops)])
        labels = labels.repeat(len(images) // len(labels))
    return calibration, transform(images.float()), labels


def _crop(image: Image.Image, size: int, x: float, y: float) -> torch.Tensor:
    """A square at a place between left and right, top and bottom: 0.5 is the centre."""
    left, top = int((image.width - size) * x), int((image.height - size) * y)
    return torch.from_numpy(np.array(image.crop((left, top, left + size, top + size)))).permute(2, 0, 1)


def _normalise(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels / 255 - _MEAN) / _STD


def _cifar10(data: Path, size: int, views: bool) -> Images:
    arrays = np.load(data / "cifar10.npz")

    def images(name: str, count: int | None) -> torch.Tensor:
        pixels = torch.from_numpy(arrays[name][:count]).permute(0, 3, 1, 2).float()
        x = _normalise(pixels)
        return x if size == 32 else F.interpolate(x, size=size, mode="bilinear", align_corners=False)

    test = torch.cat([images("test_x", None), images("test_jpeg_x", None)])
    labels = torch.cat([torch.from_numpy(arrays[name]).long() for name in ("test_y", "test_jpeg_y")])
    if views:
        test, labels = torch.cat([test, test.flip(3)]), labels.repeat(2)
    return images("train_x", 200), test, labels


def _weights(model: nn.Module, path: Path) -> nn.Module:
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def _mobilenet_v2_imagenet(data: Path, views: bool) -> tuple[nn.Module, Images]:
    images = _imagenet(data, 224, lambda pixels: (pixels / 127.5 - 1).flip(2, 3), views)
    return load_model("mobilenet_v2", weights=str(data / "mobilenet_v2_imagenet.pt")), images


def _squeezenet1_0(data: Path, views: bool) -> tuple[nn.Module, Images]:
    return load_model("squeezenet1_0", weights=str(data / "squeezenet1_0.pt")), _imagenet(data, 227, _normalise, views)


def _mobilenet_v2_cifar10(data: Path, views: bool) -> tuple[nn.Module, Images]:
    import_torchvision()
    from torchvision.models import mobilenet_v2

    return _weights(mobilenet_v2(num_classes=10), data / "mobilenet_v2_cifar10.pt"), _cifar10(data, 64, views)


def _resnet20_cifar10(data: Path, views: bool) -> tuple[nn.Module, Images]:
    spec = importlib.util.spec_from_file_location("cifar_resnet", data / "cifar_resnet.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return _weights(module.resnet20(), data / "resnet20_cifar10.pt"), _cifar10(data, 32, views)


TASKS: dict[str, Callable[[Path, bool], tuple[nn.Module, Images]]] = {
    "mobilenet_v2_imagenet": _mobilenet_v2_imagenet,
    "squeezenet1_0_imagenet": _squeezenet1_0,
    "mobilenet_v2_cifar10": _mobilenet_v2_cifar10,
    "resnet20_cifar10": _resnet20_cifar10,
}
