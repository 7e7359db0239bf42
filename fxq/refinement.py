"""Changing the constants of a reference graph after conversion: what bias correction and learned rounding share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from fxq.calibration import ForwardFn
from fxq.errors import StageError
from fxq.graph_module import BACKEND, QuantModule, copy_module, free_path, get_attribute
from fxq.lockstep import region_inputs
from fxq.numerics import dequantize
from fxq.op_table import Backend
from fxq.ops import Op
from fxq.partition import Inputs, map_regions, regions_of
from fxq.passes.find_kernels import int_weight
from fxq.passes.layer_weights import count_readers, is_shared
from fxq.plan import Stage
from fxq.qdq import DEQUANTIZE_CHANNEL, is_dequantize

SAMPLES = 64  # of the calibration data, for corrections

Refinement = Callable[[QuantModule, QuantModule, Sequence[Inputs]], None]


@dataclass(frozen=True)
class QuantLayer:
    """A layer of a reference graph with a constant integer weight.

    Attributes:
        node: calls it; ``op`` is what it calls.
        weight_path: of the integers in the module.
        shape: of the weight.
        channels: outputs.
        bias_path: of its bias, or of where one that it alone reads will be.
    """

    node: Node
    op: Op
    weight_path: str
    shape: tuple[int, ...]
    channels: int
    bias_path: str

    @property
    def dequantize(self) -> Node:
        """The node that dequantizes the weight."""
        found = self.op.get(self.node, "weight")
        assert isinstance(found, Node)
        return found

    def integers(self, reference: QuantModule) -> torch.Tensor:
        """The weight's int8 values."""
        found: torch.Tensor = get_attribute(reference, self.weight_path)
        return found

    def qparams(self, reference: QuantModule) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero_point in float32, shaped so that they broadcast with the integers."""
        _, scale, zero_point, *axis = self.dequantize.args
        if self.dequantize.target is not DEQUANTIZE_CHANNEL:
            return torch.tensor(scale), torch.tensor(float(zero_point))  # type: ignore[arg-type]
        shape = [1] * len(self.shape)
        shape[axis[0]] = -1  # type: ignore[index]
        tensors = (get_attribute(reference, str(node.target)) for node in (scale, zero_point))  # type: ignore[union-attr]
        first, second = (tensor.float().reshape(shape) for tensor in tensors)
        return first, second

    def dequantized(self, reference: QuantModule) -> torch.Tensor:
        """The real values of the weight."""
        weight = int_weight(reference, self.dequantize)
        return dequantize(weight.values, weight.qparams, weight.ch_axis)

    def float_weight(self, prepared: QuantModule) -> torch.Tensor:
        """The weight before it was quantized."""
        twin = next(node for node in prepared.graph.nodes if node.name == self.node.name)
        source = self.op.get(twin, "weight")
        while source.op != "get_attr":  # past its observer
            source = source.args[0]
        found: torch.Tensor = get_attribute(prepared, str(source.target))
        return found.detach()


def quant_layers(reference: QuantModule) -> list[QuantLayer]:
    """Layers with an integer weight and a bias that is constant or absent, in the order they run."""
    table: Backend = reference.meta[BACKEND]
    ops = table.dictionary
    readers = count_readers(reference)
    taken: set[str] = set()
    found = []
    for node in reference.graph.nodes:
        op = ops.op_of(node)
        if op is None or op.weight is None or op.bias is None:
            continue
        weight, bias = op.get(node, op.weight), op.get(node, op.bias)
        if not is_dequantize(weight) or weight.args[0].op != "get_attr":
            continue
        if bias is None or (isinstance(bias, Node) and bias.op == "get_attr"):
            found.append(_layer(node, op, weight, bias, reference, readers, taken))
    return found


def _layer(
    node: Node,
    op: Op,
    weight: Node,
    bias: Node | None,
    reference: QuantModule,
    readers: Counter[int],
    taken: set[str],
) -> QuantLayer:
    path = str(weight.args[0].target)  # type: ignore[union-attr]
    values = get_attribute(reference, path)
    bias_path = f"{path.rpartition('.')[0]}.bias".removeprefix(".") if bias is None else str(bias.target)
    if bias is None or is_shared(bias, reference, readers):
        bias_path = _free(reference, bias_path, taken)
    taken.add(bias_path)
    groups = op.get(node, "groups") if "groups" in op.signature.defaults else 1
    channels = values.shape[op.weight_axis] * (groups if op.weight_axis else 1)
    return QuantLayer(node, op, path, tuple(values.shape), channels, bias_path)


def _free(reference: QuantModule, path: str, taken: set[str]) -> str:
    candidate, number = free_path(reference, path), 0
    while candidate in taken:
        number += 1
        candidate = free_path(reference, f"{path}_{number}")
    return candidate


def refine(
    reference: nn.Module,
    prepared: nn.Module,
    change: Refinement,
    data: Iterable[Any] | None = None,
    *,
    samples: int = 1,
    forward_fn: ForwardFn | None = None,
) -> nn.Module:
    """A copy of a reference graph, changed region by region.

    Args:
        change: ``change(reference region, prepared region, inputs)`` writes into the first; the inputs are those of
            the float model, none without data.
        data, samples, forward_fn: as for :func:`fxq.lockstep.region_inputs`.

    Raises:
        StageError: if the two are not a reference graph and the prepared model it came from.
    """
    floats = regions_of(prepared, Stage.PREPARED)
    paths = {id(region): path for path, region in regions_of(reference, Stage.REFERENCE).items()}
    if set(paths.values()) != floats.keys() or any(BACKEND not in r.meta for r in regions_of(reference).values()):
        raise StageError("the reference graph is not of this prepared model; give fxq.convert_to_reference(prepared)")
    calls: dict[str, list[Inputs]] = {}
    if data is not None:
        calls = region_inputs(prepared, data, samples=samples, forward_fn=forward_fn)

    def changed(region: QuantModule) -> QuantModule:
        clone = copy_module(region)
        path = paths[id(region)]
        change(clone, floats[path], calls.get(path, []))
        clone.graph.eliminate_dead_code()
        clone.graph.lint()
        clone.plan.check(clone.graph)
        clone.recompile()
        return clone

    return map_regions(reference, changed)
