"""What a user gives as the float model: what it may not be, and the Python modules inside what torch.compile made."""

from __future__ import annotations

import torch
from torch import nn

from fxq.compiled import compiled_from
from fxq.copying import copy_structure
from fxq.errors import ConfigError, StageError, TraceError
from fxq.partition import partition_of


def float_model(model: nn.Module) -> nn.Module:
    """The model to trace: the one that is given, without what ``torch.compile`` put around it.

    Args:
        model: left as it is.

    Returns:
        The model itself; where it or a part of it was compiled, a copy of its modules on the same tensors.

    Raises:
        StageError: if anything of it was made by fxq.
        TraceError: if it is TorchScript.
        ConfigError: if its parameters are of another floating dtype than float32.

    Example:
        >>> float_model(torch.compile(nn.Sequential(nn.ReLU())))
        Sequential(
          (0): ReLU()
        )
    """
    if partition_of(model) is not None or any("fxq" in getattr(m, "meta", {}) for m in model.modules()):
        raise StageError("this model was already prepared or quantized by fxq; prepare takes the float model")
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(
            f"the model is TorchScript ({type(model).__name__} of '{model.original_name}'), whose code torch.fx cannot "
            f"trace; give the Python model that it was made from, and make TorchScript of the result with "
            f"fxq.to_torchscript"
        )
    _require_float32(model)
    return without_compile(model)


def without_compile(model: nn.Module) -> nn.Module:
    """The modules that ``torch.compile`` was called on, instead of what it made of them; the model itself if it was
    not.
    """
    if not any(compiled_from(module) is not module for module in model.modules()):
        return model
    tensors = [*model.parameters(), *model.buffers()]
    return copy_structure(model, {id(tensor): tensor for tensor in tensors})


def _require_float32(model: nn.Module) -> None:
    """Raise ConfigError if a model has floating parameters, but none of float32."""
    found = [(path, p.dtype) for path, p in model.named_parameters() if p.is_floating_point()]
    if found and not any(dtype == torch.float32 for _, dtype in found):
        path, dtype = found[0]
        raise ConfigError(
            f"parameter '{path}' is {dtype}, and no parameter of {type(model).__name__} is torch.float32, which fxq "
            f"quantizes; call model.float() first, or quantize copy.deepcopy(model).float(), and give float32 inputs"
        )
