"""The tools fxq is measured against, each set up the way its own documentation says."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn


def prepare_torch_ao(model: nn.Module, x: torch.Tensor, backend: str = "x86") -> nn.Module:
    """torch.ao FX graph mode with the default qconfig of a backend, ready to calibrate."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

        return quantize_fx.prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping(backend), (x,))


def convert_torch_ao(prepared: nn.Module, backend: str = "x86") -> nn.Module:
    """The int8 model of a calibrated torch.ao model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import quantize_fx

        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = backend
        try:
            return quantize_fx.convert_fx(copy.deepcopy(prepared))
        finally:
            torch.backends.quantized.engine = before
