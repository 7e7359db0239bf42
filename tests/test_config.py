"""QConfigs and mappings: which entry wins, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxq.backends import get_backend
from fxq.config import QConfig, QConfigMapping, named_qconfig, qualified_name
from fxq.errors import ConfigError
from fxq.plan import Origin

X86 = get_backend("x86")
BEST, PLAIN = named_qconfig("per_channel", X86), named_qconfig("per_tensor", X86)
CONV = "torch.nn.modules.conv.Conv2d"
ORIGIN = Origin("features.0.conv", CONV, ("my.Block", "torch.nn.modules.container.Sequential"))


def lookup(mapping, origin=ORIGIN, op="conv2d", exclude=()):
    return mapping.resolved(X86, exclude).lookup(origin, op)


def test_default_is_per_channel():
    assert lookup(QConfigMapping()) == BEST
    assert BEST.weight.per_channel and not PLAIN.weight.per_channel and PLAIN.activation.observer == "minmax"


@pytest.mark.parametrize(
    "mapping",
    [
        QConfigMapping().set_global("per_tensor"),
        QConfigMapping().set_object_type(nn.Conv2d, "per_tensor"),
        QConfigMapping().set_object_type("conv2d", "per_tensor"),
        QConfigMapping().set_object_type("my.Block", "per_tensor"),
        QConfigMapping().set_module_name("features.0", "per_tensor"),
        QConfigMapping().set_module_name("features.0.conv", PLAIN).set_module_name("features", None),
        QConfigMapping().set_module_name_regex(r"features\.\d", "per_tensor"),
        QConfigMapping().set_module_name_regex("feat.*", None).set_module_name_regex(".*conv", "per_tensor"),
        QConfigMapping().set_module_name("features", "per_tensor").set_module_name_regex(".*", None),
        QConfigMapping().set_module_name_regex("features.*", "per_tensor").set_object_type(nn.Conv2d, None),
        QConfigMapping().set_object_type(nn.Conv2d, "per_tensor").set_global(None),
        QConfigMapping().set_object_type(nn.Conv2d, "per_tensor").set_object_type("my.Block", None),
    ],
)
def test_the_most_specific_entry_wins(mapping):
    assert lookup(mapping) == PLAIN


@pytest.mark.parametrize(
    "exclude",
    ["conv2d", nn.Conv2d, [nn.Conv2d], "features.0.conv", "features", "feat*", "features.?", ["x", "*.conv"],
     "my.Block"],
)
def test_exclusions_win_over_all(exclude):
    assert lookup(QConfigMapping().set_module_name("features.0.conv", PLAIN), exclude=exclude) is None


@pytest.mark.parametrize("exclude", ["conv", nn.Linear, "features.1", "Conv2d", "feature", "features.0.conv.weight"])
def test_exclusions_of_others_do_not(exclude):
    assert lookup(QConfigMapping(), exclude=exclude) == BEST


def test_functions_are_types():
    origin = Origin("", qualified_name(F.relu))
    assert lookup(QConfigMapping().set_object_type(F.relu, None), origin, "relu") is None
    assert lookup(QConfigMapping(), origin, "relu", exclude=F.relu) is None


@pytest.mark.parametrize(
    ("mapping", "exclude", "what"),
    [
        (QConfigMapping().set_module_name("classifier", None), (), "module name 'classifier'"),
        (QConfigMapping().set_module_name_regex("head.*", None), (), r"regex 'head\.\*'"),
        (QConfigMapping().set_object_type(nn.Linear, None), (), "type 'torch.nn.modules.linear.Linear'"),
        (QConfigMapping(), ("features.9",), "exclude 'features.9'"),
        (QConfigMapping(), (nn.LSTM,), "exclude 'torch.nn.modules.rnn.LSTM'"),
    ],
)
def test_entries_that_match_nothing(mapping, exclude, what):
    with pytest.raises(ConfigError, match=f"{what}.* matches nothing.*features"):
        mapping.resolved(X86, exclude).check_names([(ORIGIN, "conv2d")])


def test_entries_that_match():
    mapping = QConfigMapping().set_module_name("features", None).set_module_name_regex(".*conv", None)
    mapping.set_object_type("my.Block", None).set_object_type("conv2d", None)
    mapping.resolved(X86, ("features.*", nn.Conv2d)).check_names([(ORIGIN, "conv2d")])


@pytest.mark.parametrize("qconfig", ["best", 42, {"activation": 8}])
def test_what_is_no_qconfig(qconfig):
    with pytest.raises(ConfigError, match="qconfig"):
        QConfigMapping().set_global(qconfig).resolved(X86)
    with pytest.raises(ConfigError, match="qconfig"):
        QConfigMapping().set_module_name("a", qconfig).resolved(X86)


def test_malformed_entries():
    with pytest.raises(ConfigError, match="regular expression"):
        QConfigMapping().set_module_name_regex("(", None)
    with pytest.raises(ConfigError, match="per-tensor activations"):
        QConfig(activation=BEST.activation.replace(ch_axis=0), weight=BEST.weight)
    with pytest.raises(ConfigError, match="int8 weights"):
        QConfig(activation=BEST.activation, weight=BEST.weight.replace(dtype=torch.uint8, quant_min=0, quant_max=255))
