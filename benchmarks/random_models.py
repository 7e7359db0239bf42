"""torchvision's models with weights and inputs of noise that are alive: outputs depend on inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxq.torchvision_ops import import_torchvision

VIDEO = ("mc3", "mvit", "r2plus1d", "r3d", "s3d", "swin3d")
DETECTION = ("fasterrcnn", "fcos", "keypointrcnn", "maskrcnn", "retinanet", "ssd")
FIXED_224 = ("vit", "maxvit")  # their position tables are made for this size


def model_names() -> list[str]:
    """Every float model of torchvision."""
    import_torchvision()
    import torchvision

    return [name for name in torchvision.models.list_models() if not name.startswith("quantized_")]


def inputs_of(name: str, generator: torch.Generator) -> tuple[Any, ...]:
    """One batch of noise of the kind a model takes."""

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    if name.startswith(DETECTION):
        return ([torch.rand(3, 256, 256, generator=generator) for _ in range(2)],)
    if name.startswith("raft"):
        return tuple(torch.rand(1, 3, 128, 128, generator=generator) * 2 - 1 for _ in range(2))
    if name.startswith(("mvit", "s3d")):
        return (noise(1, 3, 16, 224, 224),)
    if name.startswith(VIDEO):
        return (noise(1, 3, 8, 112, 112),)
    size = 224 if name.startswith(FIXED_224) else 299 if name.startswith("inception") else 160
    return (noise(2, 3, size, size),)


def make_alive(model: nn.Module, args: tuple[Any, ...]) -> nn.Module:
    """Ordinary values for parameters that start at zero or next to it, BatchNorm statistics from a forward pass."""
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter.data, std=0.02)
        elif parameter.numel() and parameter.abs().max() < 1e-4 and parameter.any():
            nn.init.constant_(parameter.data, 0.5)
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
            module.reset_running_stats()
            module.train()
    with torch.no_grad():
        model(*args)
    return model.eval()


def tensors_of(output: Any) -> torch.Tensor:
    """All float tensors of an output in one vector."""
    if isinstance(output, torch.Tensor):
        return output.flatten() if output.is_floating_point() else torch.empty(0)
    if output is None:
        return torch.empty(0)
    items = output.values() if isinstance(output, dict) else output
    return torch.cat([tensors_of(item) for item in items])


def outputs(model: nn.Module, batches: list[Any]) -> torch.Tensor:
    """All that a model answers to some batches in one vector; of a detection model its first head's raw output."""
    found: list[torch.Tensor] = []
    head = next((model.get_submodule(path) for path in ("rpn.head", "head") if _has(model, path)), None)
    handle = None
    if hasattr(model, "transform") and head is not None:
        handle = head.register_forward_hook(lambda _, __, out: found.append(tensors_of(out)))
    with torch.no_grad():
        for batch in batches:
            out = model(*batch)
            if handle is None:
                found.append(tensors_of(out))
    if handle is not None:
        handle.remove()
    return torch.cat(found)


def _has(model: nn.Module, path: str) -> bool:
    try:
        return isinstance(model.get_submodule(path), nn.Module)
    except AttributeError:
        return False
