"""Modules that a graph calls as they are, in files: those of torch.nn by name and arguments, others by name alone.

A file cannot bring code. A module of :data:`REBUILT` is made again from plain constructor arguments; any other must
come from the float model that the loader is given. The tensors of both are the file's.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fxq.checked_functions import require_sizes
from fxq.config import qualified_name
from fxq.copying import copy_structure
from fxq.errors import ConfigError, FileFormatError, StageError
from fxq.graph_json import decode_value, encode_value
from fxq.graph_module import QuantModule
from fxq.partition import replace_regions

# Layers whose attributes are named like the arguments they were made with.
REBUILT: tuple[type[nn.Module], ...] = (
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.Bilinear, nn.CELU, nn.ChannelShuffle,
    nn.CosineSimilarity, nn.Embedding, nn.Fold, nn.GLU, nn.GRU, nn.GRUCell, nn.Hardshrink, nn.LPPool1d, nn.LPPool2d,
    nn.LSTM, nn.LSTMCell, nn.LocalResponseNorm, nn.LogSigmoid, nn.LogSoftmax, nn.PixelUnshuffle,
    nn.RNN, nn.RNNCell, nn.SELU, nn.Softmin, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanhshrink, nn.Threshold,
    nn.Unflatten, nn.Unfold,
)  # fmt: skip
_BY_NAME = {cls.__name__: cls for cls in REBUILT}
_NOT_ATTRIBUTES = frozenset({"self", "args", "kwargs", "device", "dtype"})
_RECURRENT = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
_RECURRENT_OF: dict[type[nn.Module], tuple[str, ...]] = {nn.LSTM: ("proj_size",), nn.RNN: ("nonlinearity",)}
_MAX_LAYERS = 1024


def encode_leaf(module: nn.Module) -> dict[str, Any]:
    """What a file says of a leaf module beside its tensors."""
    name, arguments = qualified_name(type(module)), None
    if type(module) in REBUILT:
        arguments = {key: encode_value(_argument(module, key), name) for key in _parameters(type(module))}
    return {"class": name, "arguments": arguments}


def _parameters(cls: type[nn.Module]) -> list[str]:
    """Constructor parameters that a module has as attributes."""
    if issubclass(cls, nn.RNNBase):  # these pass all of theirs on to the base class
        return [*_RECURRENT, *_RECURRENT_OF.get(cls, ())]
    signature = inspect.signature(cls.__init__).parameters
    return [name for name in signature if name not in _NOT_ATTRIBUTES and not name.startswith("_")]


def _argument(module: nn.Module, name: str) -> Any:
    value = getattr(module, name)
    return value is not None if name == "bias" and not isinstance(value, bool) else value


def decode_leaf(
    record: Mapping[str, Any],
    path: str,
    tensors: Mapping[str, torch.Tensor],
    model: nn.Module | None,
    inside: Mapping[str, QuantModule],
    stand_ins: bool = False,
) -> nn.Module:
    """A leaf module with the tensors of a file.

    Args:
        path: where it stands in the user's model.
        model: gives the modules that a file cannot.
        inside: regions in the module, by their path in it.
        stand_ins: let an empty module stand for one that a file cannot give.

    Raises:
        ConfigError: if the model lacks it, or none is given.
        FileFormatError: for anything :func:`encode_leaf` would not have made.
    """
    name = record["class"]
    if stand_ins and record["arguments"] is None:
        return without_code(name, inside)
    if inside:
        return replace_regions(_from_model(name, path, model), inside, tensors)
    module = _from_model(name, path, model) if record["arguments"] is None else _rebuilt(record, tensors)
    wanted, given = ({key: t.shape for key, t in state.items()} for state in (module.state_dict(), tensors))
    if wanted != given:
        raise FileFormatError(f"the tensors of module '{path}' are not those of a {name}")
    module.load_state_dict(tensors, assign=True)
    return module.eval()


def _rebuilt(record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    cls = _BY_NAME.get(record["class"].rpartition(".")[2])
    if cls is None or qualified_name(cls) != record["class"]:
        raise FileFormatError(f"the class '{record['class']}' is not one that a file may name")
    arguments = {name: decode_value(value, {}) for name, value in record["arguments"].items()}
    if not set(arguments) <= set(_parameters(cls)):
        raise FileFormatError(f"a {cls.__name__} has no arguments {sorted(arguments)}")
    if issubclass(cls, nn.RNNBase) and not 0 < arguments["num_layers"] <= min(len(tensors), _MAX_LAYERS):
        raise FileFormatError(f"a {cls.__name__} of {arguments['num_layers']} layers with {len(tensors)} tensors")
    require_sizes(arguments)
    with torch.device("meta"):
        return cls(**arguments)


def _from_model(name: str, path: str, model: nn.Module | None) -> nn.Module:
    if model is None:
        raise ConfigError(
            f"the file calls '{path}', a {name}, whose code it cannot hold; load it with model= the float model"
        )
    try:
        module = copy_structure(model.get_submodule(path), {})
    except AttributeError:
        raise ConfigError(f"the given model has no module '{path}', which the file calls") from None
    if qualified_name(type(module)) != name:
        raise ConfigError(f"'{path}' of the given model is a {qualified_name(type(module))}; the file wants a {name}")
    return module


class _WithoutCode(nn.Module):
    """In the place of a module whose code a file does not hold."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise StageError(f"the code of '{type(self).__name__}' is missing: fxq.load it with model= the float model")


def without_code(name: str, regions: Mapping[str, QuantModule]) -> nn.Module:
    """A module for tables, with regions at their places and nothing else: it cannot be called."""
    root: nn.Module = type(name, (_WithoutCode,), {})()
    for path, region in regions.items():
        *outer, last = path.split(".")
        module = root
        for step in outer:
            if step not in module._modules:
                module.add_module(step, _WithoutCode())
            module = module.get_submodule(step)
        module.add_module(last, region)
    return root
