"""Calibration images from a folder: which, in what order, and what each mistake says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fxq.errors import CalibrationError, ConfigError, MissingDependencyError
from fxq.image_folder import ImageFolder

Image = pytest.importorskip("PIL.Image")


def write_image(path: Path, value: int = 0, size: tuple[int, int] = (4, 4), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).convert(mode).save(path)


def to_tensor(image: Any) -> torch.Tensor:
    """The first pixel's values, in the shape of the image."""
    width, height = image.size
    return torch.tensor(image.getpixel((0, 0))).reshape(3, 1, 1).expand(3, height, width)


def first_values(images: ImageFolder) -> list[int]:
    return [int(value) for batch in images for value in batch[:, 0, 0, 0]]


def test_sorted_recursive_batches(tmp_path: Path) -> None:
    for value, name in enumerate(["a/2.png", "a/b/1.png", "c.PNG", "d.bmp", "e.gif"]):
        write_image(tmp_path / name, value)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "folder.png").mkdir()
    images = ImageFolder(tmp_path, to_tensor, batch_size=2)
    assert [batch.shape for batch in images] == [(2, 3, 4, 4), (2, 3, 4, 4), (1, 3, 4, 4)]
    assert len(images) == 3
    assert first_values(images) == [0, 1, 2, 3, 4]
    assert first_values(images) == [0, 1, 2, 3, 4], "a second pass sees the same"


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "LA"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    write_image(tmp_path / "image.png", 255, mode=mode)
    assert first_values(ImageFolder(tmp_path, to_tensor)) == [255]


def test_max_images_are_spread_over_the_files(tmp_path: Path) -> None:
    for value in range(10):
        write_image(tmp_path / f"{value}.png", value)
    assert first_values(ImageFolder(str(tmp_path), to_tensor, max_images=3)) == [0, 3, 6]
    assert first_values(ImageFolder(tmp_path, to_tensor, max_images=99)) == list(range(10))


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"no folder .*missing"):
        ImageFolder(tmp_path / "missing", to_tensor)


def test_empty_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(CalibrationError, match=r"no image in .*\*\.jpg"):
        ImageFolder(tmp_path, to_tensor)


@pytest.mark.parametrize("keep", [0, 20, 50])
def test_unreadable_image_is_named(keep: int, tmp_path: Path) -> None:
    write_image(tmp_path / "broken.png", size=(64, 64))
    content = (tmp_path / "broken.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(content[:keep])
    with pytest.raises(CalibrationError, match=r"broken\.png cannot be read as an image"):
        list(ImageFolder(tmp_path, to_tensor))


def test_images_of_different_shapes_are_named(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png", size=(4, 5))
    with pytest.raises(CalibrationError, match=r"b\.png .*\[3, 5, 4\] but .*a\.png .*\[3, 4, 4\]"):
        list(ImageFolder(tmp_path, to_tensor))
    assert len(list(ImageFolder(tmp_path, to_tensor, batch_size=1))) == 2


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"max_images": 0}])
def test_sizes_below_one(options: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        ImageFolder(tmp_path, to_tensor, **options)


def test_missing_pillow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingDependencyError, match=r"fxq\[vision\]"):
        ImageFolder(tmp_path, to_tensor)
