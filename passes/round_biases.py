"""Put biases on the grid of their layer's integer sums, ``input scale * weight scale``.

A runtime that follows ONNX's QLinearConv, as qnnpack does, adds biases as integers to the sums. With biases on that
grid its numbers are those of the reference graph but for ties, and nothing is lost where the grid is finer than the
output's. Where it is not, the bias stays as it is: packed kernels add it in float.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import torch
from torch import nn
from torch.fx import Node

from fxq.graph_module import QuantModule, get_attribute, set_tensor
from fxq.ops import CONV_TRANSPOSES
from fxq.pass_base import Pass
from fxq.plan import QuantPlan
from fxq.qdq import activation_qparams, is_quantize
from fxq.quant_layers import QuantLayer, quant_layers

_FINE = 0.5  # of the output's step: a bias moves by a quarter of a step at most


class RoundBiases(Pass):
    """Biases of int8 layers become multiples of ``input scale * weight scale``, channel by channel."""

    requires = frozenset({"reference"})

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        found: dict[str, list[tuple[QuantLayer, torch.Tensor]]] = defaultdict(list)
        for layer in quant_layers(module):
            bias, grid = layer.op.get(layer.node, "bias"), _grid(layer, module)
            if grid is not None and isinstance(bias, Node):
                found[str(bias.target)].append((layer, _rounded(layer.bias(module), grid, layer.node)))
        readers = Counter(str(node.target) for node in module.graph.nodes if node.op == "get_attr" for _ in node.users)
        changed = sum(_write(path, layers, readers[path], module) for path, layers in found.items())
        module.graph.eliminate_dead_code()
        return changed


def _write(path: str, layers: list[tuple[QuantLayer, torch.Tensor]], readers: int, module: QuantModule) -> int:
    """Give layers their rounded biases, where they were if all that read them agree; returns how many changed."""
    before, first = get_attribute(module, path), layers[0][1]
    changed = sum(not torch.equal(rounded, before) for _, rounded in layers)
    if changed and readers == len(layers) and all(torch.equal(rounded, first) for _, rounded in layers):
        set_tensor(module, path, nn.Parameter(first, requires_grad=False))
    elif changed:
        for layer, rounded in layers:
            layer.set_bias(rounded, module)
    return changed


def _rounded(bias: torch.Tensor, grid: torch.Tensor, layer: Node) -> torch.Tensor:
    return torch.where(grid <= _finest(layer), torch.round(bias / grid) * grid, bias).to(bias.dtype)


def _grid(layer: QuantLayer, module: QuantModule) -> torch.Tensor | None:
    """What one unit of the sums stands for, in float64; ``None`` for layers whose sums are float."""
    qparams = activation_qparams(layer.op.get(layer.node, "input"))
    if qparams is None or layer.op in CONV_TRANSPOSES:
        return None
    return layer.qparams(module)[0].double().flatten() * qparams[0]


def _finest(layer: Node) -> float:
    """How fine a grid must be for what becomes of the layer's output; anything will do for what stays float."""
    node = layer
    while len(node.users) == 1 and not is_quantize(node):
        node = next(iter(node.users))
    return _FINE * float(node.args[1]) if is_quantize(node) else float("inf")  # type: ignore[arg-type]
