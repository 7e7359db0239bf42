"""fxq: FX graph-mode int8 quantization of PyTorch models on CPU."""

from fxq.api import convert, convert_to_reference, lower, prepare, quantize
from fxq.bias_correction import correct_bias
from fxq.calibration import calibrate
from fxq.comparison import compare, compare_records
from fxq.config import QConfig, QConfigMapping
from fxq.errors import FxqError, FxqWarning
from fxq.exported import from_exported_program, to_exported_program
from fxq.freezing import freeze
from fxq.learned_rounding import learn_rounding
from fxq.networkx_export import to_networkx, write_graph
from fxq.onnx_export import to_onnx
from fxq.profiling import profile, profile_records
from fxq.qat import (
    disable_fake_quant,
    disable_observers,
    enable_fake_quant,
    enable_observers,
    fake_quant_effects,
    freeze_batchnorm,
    freeze_observers,
    prepare_qat,
)
from fxq.qat_schedule import QATSchedule
from fxq.records import graph_records, observer_records
from fxq.report import backend_table, backends, fusion_table, graph_table, observer_table, summary
from fxq.sensitivity import sensitivity, sensitivity_records
from fxq.serialization import load, load_reference, save
from fxq.spec import QuantSpec
from fxq.torchscript import to_torchscript
from fxq.tuning import tune

__all__ = [
    "FxqError",
    "FxqWarning",
    "QATSchedule",
    "QConfig",
    "QConfigMapping",
    "QuantSpec",
    "backend_table",
    "backends",
    "calibrate",
    "compare",
    "compare_records",
    "convert",
    "convert_to_reference",
    "correct_bias",
    "disable_fake_quant",
    "disable_observers",
    "enable_fake_quant",
    "enable_observers",
    "fake_quant_effects",
    "freeze",
    "freeze_batchnorm",
    "freeze_observers",
    "from_exported_program",
    "fusion_table",
    "graph_records",
    "graph_table",
    "learn_rounding",
    "load",
    "load_reference",
    "lower",
    "observer_records",
    "observer_table",
    "prepare",
    "prepare_qat",
    "profile",
    "profile_records",
    "quantize",
    "save",
    "sensitivity",
    "sensitivity_records",
    "summary",
    "to_exported_program",
    "to_networkx",
    "to_onnx",
    "to_torchscript",
    "tune",
    "write_graph",
]
