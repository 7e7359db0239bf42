"""Weights and biases of layers while a graph is being prepared: read, scaled channel by channel, and written.

A tensor may be read by several layers; what is changed for one of them gets a path of its own.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn
from torch.fx import Node

from fxq.conv_bn import scale_channels
from fxq.graph_module import QuantModule, free_path, get_attribute, set_tensor
from fxq.ops import CONV_TRANSPOSES, LAYER_NORM, LINEAR, Op
from fxq.plan import QuantPlan
from fxq.scaled_weight import ScaledWeight


def constant(value: object, module: QuantModule) -> torch.Tensor | None:
    """The tensor of a ``get_attr`` argument; ``None`` for anything else."""
    if not isinstance(value, Node) or value.op != "get_attr":
        return None
    tensor = get_attribute(module, str(value.target))
    return tensor if isinstance(tensor, torch.Tensor) else None


def static_tensor(value: object, module: QuantModule) -> torch.Tensor | None:
    """The tensor of a ``get_attr`` argument in float64, so that changing it rounds once; ``None`` for anything else."""
    tensor = constant(value, module)
    return None if tensor is None else tensor.detach().double()


def static_parameters(layer: Node, op: Op, module: QuantModule) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Weight and bias of a layer in float64; ``None`` if they are not constant."""
    weight, bias = (static_tensor(op.get(layer, name), module) for name in ("weight", "bias"))
    return None if weight is None or (bias is None and op.get(layer, "bias") is not None) else (weight, bias)


def axis_one_is_channels(layer: Node, weight: torch.Tensor, plan: QuantPlan) -> bool:
    """Whether axis 1 of a layer's output is its channels.

    It is not for a linear layer on (N, L, features), nor for a conv without a batch dimension.
    """
    fact = plan.facts.get(layer.name)
    return fact is not None and len(fact.shape) == weight.dim()


def scale_outputs(weight: torch.Tensor, scale: torch.Tensor, op: Op, layer: Node) -> torch.Tensor:
    """A layer's weight with each output channel multiplied by its entry of ``scale``, ``[out]``; a LayerNorm's too."""
    groups = 1 if op in (LINEAR, LAYER_NORM) else op.get(layer, "groups")
    return scale_channels(weight, scale, op in CONV_TRANSPOSES, groups)


def scale_inputs(weight: torch.Tensor, scale: torch.Tensor, op: Op, layer: Node) -> torch.Tensor:
    """A layer's weight with each input channel multiplied by its entry of ``scale``, ``[in]``."""
    if op in CONV_TRANSPOSES:
        return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    groups = 1 if op is LINEAR else op.get(layer, "groups")
    per_output = weight.shape[0] // groups
    rows = scale.reshape(groups, 1, -1).expand(-1, per_output, -1)
    return weight * rows.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))


def constant_response(weight: torch.Tensor, value: torch.Tensor, op: Op, layer: Node) -> torch.Tensor:
    """What a conv or linear layer without padding and bias makes of inputs that are ``value``, ``[in]``, everywhere.

    Not of a transposed conv, where places differ.
    """
    kernel = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    groups = 1 if op is LINEAR else op.get(layer, "groups")
    return (kernel.reshape(groups, -1, kernel.shape[1]) @ value.reshape(groups, -1, 1)).flatten()


def is_padded(node: Node, op: Op) -> bool:
    """Whether a conv or pool pads its input."""
    padding = op.get(node, "padding")
    return any(padding) if isinstance(padding, (tuple, list)) else padding != 0


def set_parameters(
    layer: Node, op: Op, weight: torch.Tensor, bias: torch.Tensor | None, module: QuantModule, readers: Counter[int]
) -> None:
    """Store a layer's weight and bias as parameters of the dtype its weight has, a :class:`ScaledWeight` as it is.

    A layer without a bias gets one if ``bias`` is given.
    ``readers`` is what :func:`count_readers` counted before any change.
    """
    weight_node, bias_node = op.get(layer, "weight"), op.get(layer, "bias")
    dtype = get_attribute(module, str(weight_node.target)).dtype
    weight_path = _own_path(weight_node, module, readers)
    values = {"weight": (weight_path, weight)}
    if bias is not None and bias_node is None:
        bias_path = weight_path.rpartition(".")[0] + ".bias"
        values["bias"] = free_path(module, bias_path.removeprefix(".")), bias
    elif bias is not None:
        values["bias"] = _own_path(bias_node, module, readers), bias
    args = list(layer.args)
    with layer.graph.inserting_before(layer):
        for name, (path, value) in values.items():
            set_tensor(module, path, value if isinstance(value, ScaledWeight) else nn.Parameter(value.to(dtype)))
            args[op.index(name)] = layer.graph.get_attr(path)
    layer.args = tuple(args)


def count_readers(module: QuantModule) -> Counter[int]:
    """How many nodes read each tensor, by its identity: one tensor may be known under several paths.

    A call of a module counts for each of its parameters, which a function may read as well (tied embeddings).
    """
    readers: Counter[int] = Counter()
    for node in module.graph.nodes:
        if node.op == "get_attr":
            readers[id(get_attribute(module, str(node.target)))] += len(node.users)
        elif node.op == "call_module":
            readers.update(id(tensor) for tensor in module.get_submodule(str(node.target)).parameters())
    return readers


def is_shared(node: Node, module: QuantModule, readers: Counter[int]) -> bool:
    """Whether more than one node reads the tensor of a ``get_attr`` node."""
    return readers[id(get_attribute(module, str(node.target)))] > 1


def _own_path(node: Node, module: QuantModule, readers: Counter[int]) -> str:
    """The path of a tensor that only this layer reads; a new path if others read it too."""
    path = str(node.target)
    return free_path(module, path) if is_shared(node, module, readers) else path
