"""Take out of each layer's bias what rounding its weight adds to the mean of its output.

``(W - W_int8) * E[input]``: section 4.2 of Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction" (arXiv:1906.04721), with means recorded while calibrating. It costs next to nothing, at run time nothing.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn
from torch.fx import Node

from fxq.graph_module import QuantModule, free_path, get_attribute, set_tensor
from fxq.input_means import InputMeans
from fxq.numerics import dequantize, quantize
from fxq.ops import LINEAR, Dictionary, Op
from fxq.pass_base import Pass
from fxq.passes.layer_weights import constant_response, count_readers, is_shared
from fxq.plan import QuantPlan, Slot, counted
from fxq.spec import QParams

_CHUNK = 1 << 17  # elements of a weight rounded at a time, whose temporaries stay in cache


class CorrectBias(Pass):
    """Biases of layers whose input means were recorded; the recorders go."""

    requires = frozenset({"observed"})

    def __init__(self, ops: Dictionary) -> None:
        self.ops = ops

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        readers = count_readers(module)
        nodes = {node.name: node for node in module.graph.nodes}
        corrected = 0
        for name, path in plan.input_means.items():
            means = module.get_submodule(path)
            assert isinstance(means, InputMeans)
            corrected += self._correct(nodes[name], means.shrunken(), module, plan, readers)
        _drop_recorders(module, plan)
        if corrected:
            layers = counted(corrected, "layer")
            plan.notes = [*plan.notes, f"biases corrected: {layers}, for the rounding of their weights"]
        return corrected

    def _correct(
        self, layer: Node, mean: torch.Tensor, module: QuantModule, plan: QuantPlan, readers: Counter[int]
    ) -> bool:
        op = self.ops.op_of(layer)
        assert op is not None
        bias = op.get(layer, "bias")
        constant = bias is None or (isinstance(bias, Node) and bias.op == "get_attr")
        if Slot(layer.name, (op.index("weight"),)) not in plan.groups or not constant or not mean.any():
            return False
        weight = op.get(layer, "weight").args[0]  # behind its observer
        value = _response_to_rounding(weight, mean.float(), op, layer, module, plan)
        path = f"{str(weight.target).rpartition('.')[0]}.bias".removeprefix(".")
        if bias is not None:
            value += get_attribute(module, str(bias.target)).detach()
            path = str(bias.target)
        if bias is None or is_shared(bias, module, readers):
            path = free_path(module, path)
        set_tensor(module, path, nn.Parameter(value, requires_grad=False))  # a new one: the old may be the user's
        with layer.graph.inserting_before(layer):
            layer.update_arg(op.index("bias"), layer.graph.get_attr(path))
        return True


def _response_to_rounding(
    weight: Node, mean: torch.Tensor, op: Op, layer: Node, module: QuantModule, plan: QuantPlan
) -> torch.Tensor:
    """What a layer makes of its mean input with ``W - W_int8`` for a weight, which is never held as a whole."""
    values = get_attribute(module, str(weight.target)).detach()
    slot = Slot(layer.name, (op.index("weight"),))
    spec = plan.specs[slot]
    observer = module.get_submodule(plan.observers[plan.groups[slot]])
    qparams = observer.qparams()  # type: ignore[operator]
    one_group = op is LINEAR or op.get(layer, "groups") == 1
    rows = max(1, _CHUNK * len(values) // values.numel()) if one_group and spec.ch_axis in (None, 0) else len(values)
    parts = []
    for start in range(0, len(values), rows):
        own = slice(start, start + rows)
        part = values[own]
        own_qparams = qparams if spec.ch_axis is None else QParams(qparams.scale[own], qparams.zero_point[own])
        rounded = dequantize(quantize(part, own_qparams, spec), own_qparams, spec.ch_axis)
        parts.append(constant_response(torch.sub(part, rounded, out=rounded), mean, op, layer))
    return torch.cat(parts)


def _drop_recorders(module: QuantModule, plan: QuantPlan) -> None:
    paths = set(plan.input_means.values())
    for node in list(module.graph.nodes):
        if node.op == "call_module" and node.target in paths:
            module.graph.erase_node(node)
    for path in paths:
        module.delete_submodule(path)
    plan.input_means.clear()
