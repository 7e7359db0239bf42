"""What ``torch.compile`` and TorchScript made of modules: the first has Python modules inside, the second has none."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import nn

SCRIPTED = "TorchScript, whose code torch.fx does not see; give the Python module it was made from"


def compiled_from(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` made another of; the module itself if it was not made so."""
    maker = sys.modules.get("torch._dynamo.eval_frame")  # takes seconds to import, and nothing is compiled without it
    if maker is None or not isinstance(module, maker.OptimizedModule):
        return module
    return nn.Module.get_submodule(module, "_orig_mod")


def python_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` without TorchScript's, which take no hooks."""
    for path, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            yield path, module
