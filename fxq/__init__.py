"""fxq: FX graph-mode int8 quantization of PyTorch models on CPU."""

from fxq.api import convert, convert_to_reference, lower, prepare, quantize
from fxq.calibration import calibrate
from fxq.config import QConfig, QConfigMapping

__all__ = [
    "QConfig",
    "QConfigMapping",
    "calibrate",
    "convert",
    "convert_to_reference",
    "lower",
    "prepare",
    "quantize",
]
