"""Models by name: torchvision's, or a callable of the user's own."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxq.errors import ConfigError, FileFormatError, MissingDependencyError
from fxq.image_folder import Transform
from fxq.torchvision_ops import import_torchvision

# Their constructors spend seconds on a slow initialization (and warn about it) unless told not to.
_SLOW_TO_INITIALIZE = ("googlenet", "inception_v3")
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_KEYS_NAMED = 3


def load_model(name_or_ref: str, weights: str | None = None) -> nn.Module:
    """Build a float model and load its weights.

    Args:
        name_or_ref: a torchvision model (``"resnet18"``, see ``torchvision.models.list_models()``), or
            ``"package.module:callable"``, called without arguments to make the model. The current directory
            is searched for the package as well.
        weights: ``None`` (random, or whatever the callable loads), the path of a file with a state dict, or,
            for a torchvision model, ``"DEFAULT"`` or the name of one of its pretrained weights
            (``"IMAGENET1K_V1"``), which torchvision downloads and caches.

    Returns:
        The model, in eval mode.

    Raises:
        ConfigError: no such model or weights, or weights of another model; names what was close.
        FileFormatError: the file is not a state dict.
        MissingDependencyError: torchvision, or a module the callable imports, is not installed.

    Example:
        >>> model = load_model("resnet18")
        >>> model = load_model("my_package.my_models:make_small_net", weights="small_net.pt")
    """
    path = _state_dict_path(weights)
    if ":" in name_or_ref:
        if weights is not None and path is None:
            raise ConfigError(
                f"weights {weights!r}: {name_or_ref} is not a torchvision model, so this must be the path of an "
                "existing file with its state dict"
            )
        model = _call_reference(name_or_ref)
    else:
        model = _build_torchvision_model(name_or_ref, None if path else weights)
    if path is not None:
        _load_state_dict(model, path, name_or_ref)
    return model.eval()


def preprocessing(name_or_ref: str, weights: str | None = None, size: int | None = None) -> Transform:
    """The transform from a PIL image to the tensor a model expects.

    Args:
        name_or_ref, weights: as for :func:`load_model`.
        size: height and width of the input; ``None`` for what the weights were trained with, or 224.

    Returns:
        The transform that comes with pretrained torchvision weights, otherwise torchvision's usual one for
        ImageNet: resize the shorter side to ``size * 256 / 224``, centre crop, normalize.

    Raises:
        ConfigError: no such model or weights, or a ``size`` that is not positive.
        MissingDependencyError: torchvision is not installed.

    Example:
        >>> preprocessing("resnet18")(Image.open("cat.jpg").convert("RGB")).shape
        torch.Size([3, 224, 224])
    """
    if size is not None and size < 1:
        raise ConfigError(f"size {size}: the input's height and width must be at least 1")
    if weights is not None and _state_dict_path(weights) is None and ":" not in name_or_ref:
        return _make_preset(_find_weights(name_or_ref, weights).transforms, size)
    transforms = import_torchvision().transforms
    size = size or 224
    compose: Transform = transforms.Compose(
        [
            transforms.Resize(_resize_for(size)),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(_IMAGENET_MEAN, _IMAGENET_STD),
        ]
    )
    return compose


def _make_preset(preset: Callable[..., Transform], size: int | None) -> Transform:
    if size is None:
        return preset()
    sizes = {"crop_size": size, "resize_size": _resize_for(size)}
    taken = inspect.signature(preset).parameters  # presets for segmentation do not crop, those for detection do neither
    return preset(**{name: value for name, value in sizes.items() if name in taken})


def _resize_for(size: int) -> int:
    return round(size * 256 / 224)


def _state_dict_path(weights: str | None) -> Path | None:
    """The path, if ``weights`` is one rather than a name: it exists, or looks like a file's name."""
    if weights is None:
        return None
    path = Path(weights)
    if path.is_file():
        return path
    if path.suffix or path.name != weights:
        raise ConfigError(f"weights {weights!r}: there is no such file")
    return None


def _build_torchvision_model(name: str, weights: str | None) -> nn.Module:
    _check_known(name)
    models = import_torchvision().models
    options: dict[str, Any] = {"weights": None if weights is None else _find_weights(name, weights)}
    if weights is None:
        # a segmentation or detection model otherwise downloads a backbone though its own weights are random
        if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
            options["weights_backbone"] = None
        if name in _SLOW_TO_INITIALIZE:
            options["init_weights"] = False
    try:
        model: nn.Module = models.get_model(name, **options)
    except OSError as error:
        raise ConfigError(
            f"could not download the weights {weights} of {name} ({error}); "
            "give the path of a file with the state dict instead"
        ) from error
    return model


def _check_known(name: str) -> None:
    known = import_torchvision().models.list_models()
    if name not in known:
        raise ConfigError(
            f"torchvision has no model {name!r}{_close_to(name, known)}; "
            "a model of your own is named as package.module:callable"
        )


def _find_weights(name: str, weights: str) -> Any:
    _check_known(name)
    members = import_torchvision().models.get_model_weights(name).__members__
    if weights not in members:
        raise ConfigError(
            f"{name} has no weights {weights!r} and there is no such file; "
            f"torchvision has: {', '.join(members) or 'none for this model'}"
        )
    return members[weights]


def _close_to(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known))
    return f" (did you mean {', '.join(close)}?)" if close else ""


def _call_reference(reference: str) -> nn.Module:
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute.isidentifier():
        raise ConfigError(f"{reference!r} is not of the form package.module:callable")
    with contextlib.suppress(MissingDependencyError):
        import_torchvision()  # so that "import torchvision" works in the user's module too
    with _current_directory_importable():
        make = _find_callable(module_name, attribute)
        try:
            model = make()
        except Exception as error:  # the user's own code may raise anything
            raise ConfigError(f"{reference} raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{reference} returned {type(model).__name__}, not a torch.nn.Module")
    return model


@contextlib.contextmanager
def _current_directory_importable() -> Iterator[None]:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _find_callable(module_name: str, attribute: str) -> Callable[[], Any]:
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"there is no module {error.name!r} in the current directory or among the installed packages"
            ) from error
        raise MissingDependencyError(f"{module_name} needs {error.name!r}, which is not installed") from error
    except Exception as error:  # the user's own code may raise anything
        raise ConfigError(f"importing {module_name} raised {type(error).__name__}: {error}") from error
    if not callable(getattr(module, attribute, None)):
        known = [name for name, value in vars(module).items() if callable(value)]
        raise ConfigError(f"{module_name} has no callable {attribute!r}{_close_to(attribute, known)}")
    return getattr(module, attribute)  # type: ignore[no-any-return]


def _load_state_dict(model: nn.Module, path: Path, name: str) -> None:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, OSError, RuntimeError, ValueError) as error:
        raise FileFormatError(f"{path}: not a state dict that torch.load(weights_only=True) reads") from error
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise FileFormatError(f"{path}: not a state dict; save one with torch.save(model.state_dict(), path)")
    if problems := _mismatches(model.state_dict(), state):
        raise ConfigError(f"{path} does not fit {name}: {'; '.join(problems)}")
    model.load_state_dict(state)


def _mismatches(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    shapes = [
        f"{key} is {_describe(found[key])} instead of {_describe(expected[key])}"
        for key in expected
        if key in found and _describe(found[key]) != _describe(expected[key])
    ]
    kinds = {
        "missing": [key for key in expected if key not in found],
        "unexpected": [key for key in found if key not in expected],
        "of another shape": shapes,
    }
    return [f"{_some(names)} {kind}" for kind, names in kinds.items() if names]


def _describe(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__


def _some(names: list[str]) -> str:
    more = len(names) - _KEYS_NAMED
    return ", ".join(names[:_KEYS_NAMED]) + (f" and {more} more" if more > 0 else "")
