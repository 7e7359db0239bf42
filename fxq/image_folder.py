"""Calibration batches from a folder of images."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fxq.errors import CalibrationError, ConfigError, MissingDependencyError

#: From a PIL image in RGB to one tensor, without a batch axis.
Transform = Callable[[Any], torch.Tensor]

#: File name endings, in lower case, that are taken for images.
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


class ImageFolder:
    """The images below a folder, in batches: an iterable that can be gone through again and again.

    The files are sorted by path, so every run sees the same batches. Labels play no role: subfolders are
    searched too, whatever they stand for.

    Args:
        folder: searched recursively for files whose names end in one of :data:`IMAGE_SUFFIXES`.
        transform: from a PIL image in RGB to one tensor, see :func:`fxq.models.preprocessing`.
        batch_size: images in a batch; the last batch may be smaller.
        max_images: how many images to take at most, spread evenly over the sorted files so that a folder of
            class folders contributes from every class; ``None`` for all.

    Raises:
        CalibrationError: there is no such folder or no image in it; while iterating, an image that cannot be
            read or whose tensor has another shape than its batch.
        ConfigError: ``batch_size`` or ``max_images`` below 1.
        MissingDependencyError: pillow is not installed.

    Example:
        >>> images = ImageFolder("photos", preprocessing("resnet18"), batch_size=8, max_images=256)
        >>> qmodel = fxq.quantize(model, images)
    """

    def __init__(
        self,
        folder: str | Path,
        transform: Transform,
        *,
        batch_size: int = 32,
        max_images: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size {batch_size}: a batch has at least 1 image")
        if max_images is not None and max_images < 1:
            raise ConfigError(f"max_images {max_images}: calibration needs at least 1 image")
        self._open_image = _import_pillow()
        self.files = _spread(_find_images(Path(folder)), max_images)
        self.transform = transform
        self.batch_size = batch_size

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.files) // self.batch_size)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for start in range(0, len(self.files), self.batch_size):
            yield self._load_batch(self.files[start : start + self.batch_size])

    def _load_batch(self, files: list[Path]) -> torch.Tensor:
        tensors = [self._load(file) for file in files]
        for file, tensor in zip(files, tensors, strict=True):
            if tensor.shape != tensors[0].shape:
                raise CalibrationError(
                    f"{file} becomes a tensor of shape {list(tensor.shape)} but {files[0]} one of "
                    f"{list(tensors[0].shape)}, so they do not fit in one batch; crop to one size or use batches of 1"
                )
        return torch.stack(tensors)

    def _load(self, file: Path) -> torch.Tensor:
        try:
            with self._open_image(file) as image:
                rgb = image.convert("RGB")
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
            raise CalibrationError(f"{file} cannot be read as an image: {error}") from error
        return self.transform(rgb)


def _import_pillow() -> Callable[[Path], Any]:
    try:
        return importlib.import_module("PIL.Image").open  # type: ignore[no-any-return]
    except ModuleNotFoundError as error:
        raise MissingDependencyError("pillow is not installed; install it with: pip install 'fxq[vision]'") from error


def _find_images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise CalibrationError(f"there is no folder {str(folder)!r}")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    if not files:
        raise CalibrationError(
            f"no image in {str(folder)!r} or its subfolders; looked for *{', *'.join(sorted(IMAGE_SUFFIXES))}"
        )
    return files


def _spread(files: list[Path], count: int | None) -> list[Path]:
    if count is None or count >= len(files):
        return files
    return [files[index * len(files) // count] for index in range(count)]
