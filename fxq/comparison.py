"""Where the error of a quantized model is: its layers side by side with those of the float model.

The float model is prepared once more, which gives a graph with the node names of the reference graph. Both run node
by node on the same batches. At each quantize node of the reference graph there is one record, of two kinds of error:

* the error so far, which the layers before have contributed to: the quantized model's value against the float one's;
* the layer's own: all its inputs are the float model's, and only the layer itself is quantized. With its weights alone
  quantized, then its output alone, the own error is divided between the two. The sum of the two squared errors is
  taken as the whole; how they interact is left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx import Node

from fxq.api import as_inputs
from fxq.backends import get_backend
from fxq.calibration import ForwardFn, example_inputs_of, understood
from fxq.config import QConfigMapping
from fxq.errors import InputError
from fxq.float_model import without_compile
from fxq.graph_module import BACKEND, QuantModule, copy_module, free_path, get_attribute
from fxq.interpreter import Interpreter
from fxq.lockstep import region_inputs
from fxq.measures import Noise, keep_batches, model_outputs, output_noise
from fxq.partition import Inputs, map_regions, reference_of, regions_of
from fxq.passes.layer_weights import constant_response, scale_inputs, scale_outputs
from fxq.plan import EXCLUDED, QuantPlan
from fxq.preparation import prepare_model
from fxq.qdq import DEQUANTIZE, is_dequantize, is_quantize
from fxq.records import graph_records
from fxq.report import table
from fxq.walk import Walk


def compare(
    model: nn.Module,
    qmodel: nn.Module,
    data: Iterable[Any],
    *,
    num_batches: int | None = None,
    forward_fn: ForwardFn | None = None,
    example_inputs: Any = None,
) -> str:
    """A table of each layer's error: what it has added up to, the layer's own, and what that comes from.

    Args:
        model: the float model that ``qmodel`` was made from, in eval mode; left as it is.
        qmodel: reference or lowered.
        data: batches as for :func:`fxq.calibrate`; a few dozen samples tell enough.
        num_batches: compare on this many batches; all by default.
        forward_fn: as for :func:`fxq.calibrate`; returns the model's output. Needs ``example_inputs``.
        example_inputs: as for :func:`fxq.quantize`; by default the first batch.

    Returns:
        One line a quantized tensor, in order of execution. "SQNR" and "cosine" compare it with the float model's as
        the whole model runs; "own SQNR" where only this layer is quantized. The last two columns divide the own error
        between the rounding of weights and that (and clipping) of the output. The last line is the model's output;
        there the own error is that of the whole model.

    Raises:
        StageError: if ``qmodel`` is neither reference nor lowered.
        InputError: if ``qmodel`` was made from another model.
        CalibrationError: if there is no data.

    Example:
        >>> print(fxq.compare(model, qmodel, images))                                 # doctest: +SKIP
    """
    records = compare_records(
        model, qmodel, data, num_batches=num_batches, forward_fn=forward_fn, example_inputs=example_inputs
    )
    rows = [
        [
            f"{r['region']}: {r['node']}" if r["region"] else r["node"],
            r["op"],
            f"{r['sqnr']:.1f}",
            f"{r['cosine']:.4f}",
            f"{r['own_sqnr']:.1f}",
            *("" if r[key] is None else f"{100 * r[key]:.0f}" for key in ("weights_share", "activations_share")),
        ]
        for r in records
    ]
    headers = ["node", "op", "SQNR dB", "cosine", "own SQNR dB", "weights %", "activations %"]
    return table(rows, headers, [36, 28, None, None, None, None, None])


def compare_records(
    model: nn.Module,
    qmodel: nn.Module,
    data: Iterable[Any],
    *,
    num_batches: int | None = None,
    forward_fn: ForwardFn | None = None,
    example_inputs: Any = None,
) -> list[dict[str, Any]]:
    """What :func:`compare` prints, as records.

    Returns:
        Dicts with the keys ``region``, ``node`` (of the float graph), ``module``, ``op``, ``sqnr`` and ``own_sqnr``
        (dB), ``cosine``, ``weights_share`` and ``activations_share`` (they add up to 1; ``None`` without any error).

    Raises:
        StageError, InputError, CalibrationError: as :func:`compare`.
    """
    reference, model = reference_of(qmodel), without_compile(model)
    batches = keep_batches(data, num_batches)
    given: Inputs
    if example_inputs is None:
        given = example_inputs_of(model, batches[0], forward_fn)
    else:
        given = as_inputs(example_inputs, model)
    if forward_fn is None:
        batches = list(understood(batches, given, model))
    floats = _float_graphs(model, reference, given)
    weights_only, activations_only = _only_one(floats, reference)
    calls = region_inputs(floats, batches, samples=len(batches) * 2**31, forward_fn=forward_fn)
    twins, halves = regions_of(floats), regions_of(weights_only)
    records = []
    for path, region in regions_of(reference).items():
        comparison = _RegionComparison(region, twins[path], halves[path], calls[path])
        records += [{"region": path} | record for record in comparison.records()]
    expected = model_outputs(model, batches, forward_fn)
    whole, weights, activations = (
        output_noise(expected, model_outputs(m, batches, forward_fn)) for m in (qmodel, weights_only, activations_only)
    )
    output = {"region": "", "node": "output", "module": "", "op": ""}
    return [*records, output | _errors(whole, whole, weights, activations)]


def _float_graphs(model: nn.Module, reference: nn.Module, inputs: Inputs) -> nn.Module:
    """The float model as the graph that ``reference`` was made from, or one for each of its regions."""
    regions = regions_of(reference)
    first = next(iter(regions.values()))
    backend = first.meta.get(BACKEND) or get_backend(first.plan.backend)
    excluded = {
        region.plan.origin(name).module_path
        for region in regions.values()
        for name, decision in region.plan.decisions.items()
        if decision.reason is EXCLUDED
    }
    config = QConfigMapping().resolved(backend, sorted(excluded - {""}))  # an excluded attention module stays whole
    floats = prepare_model(model, inputs, backend, config)
    twins = regions_of(floats)
    for path, region in regions.items():
        known = {node.name for node in twins[path].graph.nodes} if path in twins else set()
        strangers = [layer.end for layer in _layers(region) if not {layer.end, *layer.chain} <= known]
        if strangers:
            raise InputError(
                f"{region.plan.where(strangers[0])} of the quantized model is not in the float model: give the model "
                f"that it was made from, and inputs of the same form"
            )
    plans = {id(twins[path]): region.plan for path, region in regions.items()}
    return map_regions(floats, lambda twin: _evened(twin, plans[id(twin)]) if id(twin) in plans else twin)


def _evened(floats: QuantModule, plan: QuantPlan) -> QuantModule:
    """The float graph with its layers equalized and biases absorbed as they were when ``plan``'s graph was made.

    The model stays what it is, but the values between these layers are those that the quantized model rounds.
    """
    clone = copy_module(floats)
    nodes = {node.name: node for node in clone.graph.nodes}
    _equalize(clone, nodes, plan)
    _absorb_biases(clone, nodes, plan)
    clone.recompile()
    return clone


def _equalize(clone: QuantModule, nodes: dict[str, Node], plan: QuantPlan) -> None:
    """Scale the layers; a first layer of several pairs was divided once for all its second ones (by Smooth)."""
    ops = clone.meta[BACKEND].dictionary
    divided: set[str] = set()
    for pair in plan.equalized:
        scale = torch.tensor(pair.scale, dtype=torch.float64)
        changes = [(nodes[pair.second], scale_inputs)]
        if pair.first not in divided:
            changes.append((nodes[pair.first], scale_outputs))
        divided.add(pair.first)
        for node, change in changes:
            op = ops.op_of(node)
            weight, bias = (_constant(clone, op.get(node, name)) for name in ("weight", "bias"))
            assert weight is not None
            factor = 1 / scale if change is scale_outputs else scale
            _put(clone, node, op.index("weight"), change(weight.double(), factor, op, node).float())
            if bias is not None and change is scale_outputs:
                _put(clone, node, op.index("bias"), (bias.double() / scale).float())


def _absorb_biases(clone: QuantModule, nodes: dict[str, Node], plan: QuantPlan) -> None:
    ops = clone.meta[BACKEND].dictionary
    for pair in plan.absorbed:
        first, second = nodes[pair.first], nodes[pair.second]
        shift = torch.tensor(pair.shift, dtype=torch.float64)
        op = ops.op_of(second)
        weight = _constant(clone, op.get(second, "weight"))
        assert weight is not None
        for node, change in ((first, -shift), (second, constant_response(weight.double(), shift, op, second))):
            op = ops.op_of(node)
            bias = _constant(clone, op.get(node, "bias"))
            total = change if bias is None else bias.double() + change
            _put(clone, node, op.index("bias"), total.float())


def _put(module: QuantModule, node: Node, position: int, value: torch.Tensor) -> None:
    """Let a node read ``value`` as its argument at a position."""
    path = free_path(module, f"{node.name}_argument{position}")
    module.register_buffer(path, value)
    with module.graph.inserting_before(node):
        node.update_arg(position, module.graph.get_attr(path))


@dataclass(frozen=True)
class _Layer:
    """A tensor that is quantized: ``end`` and the ``chain`` that makes it, by names in the float graph."""

    end: str
    chain: tuple[str, ...]
    quantize: Node

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        return DEQUANTIZE(self.quantize.target(x, *self.quantize.args[1:]), *self.quantize.args[1:3])  # type: ignore


def _layers(reference: QuantModule) -> list[_Layer]:
    chains = {nodes[-1]: nodes for nodes in ((*r.nodes, *r.absorbed) for r in reference.plan.regions)}
    quantizes = [node for node in reference.graph.nodes if is_quantize(node)]
    ends = [node.name.rpartition("_q")[0] for node in quantizes]
    return [_Layer(end, chains.get(end, ()), node) for end, node in zip(ends, quantizes, strict=True)]


def _only_one(floats: nn.Module, reference: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The model with only its weights quantized, and with only its activations quantized."""
    ours, theirs = regions_of(floats), regions_of(reference)
    weights = {id(ours[path]): _with_constants(ours[path], theirs[path], theirs[path]) for path in theirs}
    activations = {id(theirs[path]): _with_constants(theirs[path], ours[path], theirs[path]) for path in theirs}
    return (
        map_regions(floats, lambda region: weights.get(id(region), region)),
        map_regions(reference, lambda region: activations[id(region)]),
    )


def _with_constants(module: QuantModule, source: QuantModule, reference: QuantModule) -> QuantModule:
    """A copy of ``module`` whose quantized layers read the weights and biases of ``source``."""
    clone = copy_module(module)
    for path in clone.plan.observers.values():
        clone.get_submodule(path).enabled = False  # type: ignore[assignment]
    nodes = {node.name: node for node in clone.graph.nodes}
    others = {node.name: node for node in source.graph.nodes}
    for name in [region.nodes[0] for region in reference.plan.regions]:
        for position, argument in enumerate(others[name].args):
            value = _constant(source, argument)
            if value is not None:
                _put(clone, nodes[name], position, value)
            elif argument is None:
                nodes[name].update_arg(position, None)  # no bias, where a correction may have added one
    clone.recompile()
    return clone


def _constant(module: QuantModule, argument: Any) -> torch.Tensor | None:
    """The tensor that an argument stands for if it is one of the module's, in float; else ``None``."""
    if not isinstance(argument, Node):
        return None
    if argument.op == "get_attr":
        return get_attribute(module, str(argument.target)).detach()  # type: ignore[no-any-return]
    if argument.op == "call_module" and argument.target in module.plan.observers.values():
        return _constant(module, argument.args[0])
    if is_dequantize(argument) and argument.args[0].op == "get_attr":  # type: ignore[union-attr]
        return argument.target(*(_constant(module, a) if isinstance(a, Node) else a for a in argument.args))  # type: ignore
    return None


class _RegionComparison:
    """One traced part of the model: its float graph and its reference graph run side by side.

    Args:
        reference: the reference graph.
        floats: the float graph.
        weights_only: the float graph with the quantized layers' weights.
        calls: the inputs of both.
    """

    def __init__(
        self, reference: QuantModule, floats: QuantModule, weights_only: QuantModule, calls: list[Inputs]
    ) -> None:
        self.floats, self.reference = floats, reference
        self.expected, self.actual = Walk(floats, calls), Walk(reference, calls)
        self.own = _OwnWeights(weights_only, floats, self.expected, [layer.chain for layer in _layers(reference)])
        self.layers: dict[str, list[_Layer]] = defaultdict(list)
        for layer in _layers(reference):
            self.layers[layer.end].append(layer)
        self.ahead = iter(reference.graph.nodes)
        self.ops = {record["node"]: record["op"] for record in graph_records(reference)}

    def records(self) -> Iterator[dict[str, Any]]:
        """One record a layer, in order of execution."""
        with torch.no_grad():
            for node in self.floats.graph.nodes:
                self.expected.run(node)
                self.own.run(node)
                for layer in self.layers.get(node.name, ()):
                    yield self._record(node, layer)
                self.own.release(node)
                self.expected.release(node)

    def _record(self, node: Node, layer: _Layer) -> dict[str, Any]:
        first = layer.chain[0] if layer.chain else ""
        found = {
            "node": layer.end,
            "module": self.reference.plan.origin(first or layer.end).module_path,
            "op": self.ops[first] if first else "quantize",
        }
        so_far, own, weights, activations = Noise(), Noise(), Noise(), Noise()
        expected = self.expected.values(node)
        for x, y, rough in zip(expected, self._quantized(layer), self.own.values(node, expected), strict=True):
            so_far.add(x, y)
            own.add(x, layer.rounded(rough))
            weights.add(x, rough)
            activations.add(x, layer.rounded(x))
        return found | _errors(so_far, own, weights, activations)

    def _quantized(self, layer: _Layer) -> list[torch.Tensor]:
        """The quantized model's values of a layer, one a batch; runs the reference graph up to there."""
        values: list[torch.Tensor] = []
        for current in self.ahead:
            self.actual.run(current)
            if current is layer.quantize:
                values = [DEQUANTIZE(q, *current.args[1:3]) for q in self.actual.values(current)]
            self.actual.release(current)
            if current is layer.quantize:
                break
        return values


class _OwnWeights:
    """What each layer makes of the float model's values with its quantized weights.

    Args:
        weights_only: the float graph with the quantized layers' weights.
        floats: the float graph, which ``walk`` runs.
        chains: names of the nodes of each layer.
    """

    def __init__(
        self, weights_only: QuantModule, floats: QuantModule, walk: Walk, chains: list[tuple[str, ...]]
    ) -> None:
        self.walk = walk
        self.floats = {node.name: node for node in floats.graph.nodes}
        self.nodes = {node.name: node for node in weights_only.graph.nodes}
        self.chain_of = {name: chain for chain in chains for name in chain}
        self.interpreter = Interpreter(weights_only)
        self.found: dict[str, list[Any]] = {}

    def run(self, node: Node) -> None:
        """Run a node of the float graph, which has run there, if it is one of a layer."""
        chain = self.chain_of.get(node.name, ())
        if chain:
            self.found[node.name] = [self._call(self.nodes[node.name], chain, at) for at in range(self.walk.size)]

    def _call(self, node: Node, chain: tuple[str, ...], batch: int) -> Any:
        def value(source: Node) -> Any:
            if source.name in chain:
                return self.found[source.name][batch]
            if source.op == "get_attr":
                return self.interpreter.fetch_attr(str(source.target))
            return self.walk.values(self.floats[source.name])[batch]

        args, kwargs = fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)
        return getattr(self.interpreter, node.op)(node.target, args, kwargs)

    def values(self, node: Node, otherwise: list[Any]) -> list[Any]:
        """A node's value for each batch."""
        return self.found.get(node.name, otherwise)

    def release(self, node: Node) -> None:
        """Drop the values of the layer that ends in a node."""
        chain = self.chain_of.get(node.name, ())
        if chain and node.name == chain[-1]:
            for name in chain:
                self.found.pop(name, None)


def _errors(so_far: Noise, own: Noise, weights: Noise, activations: Noise) -> dict[str, Any]:
    both = weights.noise + activations.noise
    return {
        "sqnr": so_far.sqnr,
        "cosine": so_far.cosine,
        "own_sqnr": own.sqnr,
        "weights_share": weights.noise / both if both else None,
        "activations_share": activations.noise / both if both else None,
    }
