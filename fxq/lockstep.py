"""Run a reference graph and the float graph it came from side by side, node by node.

A graph is usually run batch by batch, from the first node to the last. Here each node runs on all batches before the
next node does, in both graphs. So whoever looks on can compare a layer's output with what it should be, change the
layer's constants (its bias, the rounding of its weight), run it again, and go on: every later layer sees the change.

Values are dropped when their last reader has run. Dequantized activations are not stored at all: they are made from
their integers at each reading, which costs little time and saves three quarters of the memory.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx import Node

from fxq.calibration import ForwardFn, forward_parameters, iterate, run_batch
from fxq.copying import copy_inputs
from fxq.errors import CalibrationError
from fxq.graph_module import QuantModule
from fxq.interpreter import plain
from fxq.partition import Inputs, regions_of
from fxq.plan import Stage
from fxq.qdq import is_dequantize


class Walk:
    """One graph run node by node, each node on all batches.

    Args:
        module: prepared or reference; its observers are passed by.
        inputs: ``(args, kwargs)`` of each call; shapes may differ.

    Example:
        >>> walk = Walk(reference, [((images,), {})])                                 # doctest: +SKIP
        >>> for node in reference.graph.nodes:                                        # doctest: +SKIP
        ...     walk.run(node); print(node, walk.values(node)); walk.release(node)
    """

    def __init__(self, module: QuantModule, inputs: Sequence[Inputs]) -> None:
        self.module = module
        self.size = len(inputs)
        self._interpreter = fx.Interpreter(module)
        self._observers = set(module.plan.observer_nodes(module.graph))
        self._inputs = [bound_arguments(module, *copy_inputs(given)) for given in inputs]
        self._values: dict[Node, list[Any]] = {}
        self._last = _last_reads(module.graph)

    def run(self, node: Node) -> None:
        """Run a node whose inputs have run; once more, if a constant it reads has changed."""
        if node.op == "placeholder":
            name = str(node.target).lstrip("*")
            self._values[node] = [bound.get(name) for bound in self._inputs]
        elif not _made_at_reading(node):
            constants = {source: self._made(source, 0) for source in node.all_input_nodes if _is_constant(source)}
            self._values[node] = [self._call(node, batch, constants) for batch in range(self.size)]

    def values(self, node: Node) -> list[Any]:
        """A node's value for each batch; it has run, and has not been released."""
        return [self._value(node, batch) for batch in range(self.size)]

    def arguments(self, node: Node, batch: int) -> tuple[Any, ...]:
        """What a node is called with in one batch: ``node.args`` with values for nodes."""
        return fx.map_arg(node.args, lambda source: self._value(source, batch))

    def release(self, node: Node) -> None:
        """Drop the values that no node after this one reads."""
        for source in self._last.get(node, ()):
            self._values.pop(source, None)

    def _call(self, node: Node, batch: int, constants: dict[Node, Any]) -> Any:
        if node.name in self._observers:
            return self._value(node.args[0], batch)  # type: ignore[arg-type]

        def value(source: Node) -> Any:
            return constants[source] if source in constants else self._value(source, batch)

        args, kwargs = plain(fx.map_arg((node.args, node.kwargs), value))
        return getattr(self._interpreter, node.op)(node.target, args, kwargs)

    def _value(self, node: Node, batch: int) -> Any:
        return self._made(node, batch) if _made_at_reading(node) else self._values[node][batch]

    def _made(self, node: Node, batch: int) -> Any:
        if node.op == "get_attr":
            return self._interpreter.get_attr(node.target, (), {})
        args = fx.map_arg(node.args, lambda source: self._value(source, batch))
        return node.target(*args)  # type: ignore[operator]


class Step:
    """A node of the reference graph that has just run, with its twin in the float graph.

    Attributes:
        node: in the reference graph.
        twin: the node of the same name in the prepared graph.
    """

    def __init__(self, node: Node, twin: Node, actual: Walk, expected: Walk) -> None:
        self.node, self.twin = node, twin
        self._actual, self._expected = actual, expected

    @property
    def actual(self) -> list[Any]:
        """The quantized model's value of the node, one a batch; a relu that its quantize does is not yet done."""
        return self._actual.values(self.node)

    @property
    def expected(self) -> list[Any]:
        """The float model's value of the node, one a batch."""
        return self._expected.values(self.twin)

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return self._actual.size

    def arguments(self, batch: int) -> tuple[Any, ...]:
        """What the node is called with in the quantized model."""
        return self._actual.arguments(self.node, batch)

    def rerun(self) -> None:
        """Run the node again in the quantized model, because a constant it reads was changed."""
        self._actual.run(self.node)


def lockstep(reference: QuantModule, prepared: QuantModule, inputs: Sequence[Inputs]) -> Iterator[Step]:
    """Both graphs node by node; yields each call that is in both, right after it ran in both.

    The quantized model's values come from the quantized model's own earlier values: errors add up as they do when
    it is used. What the consumer changes in ``reference`` before asking for the next step is seen by all that
    follows. It may not change the graph; an input that a node lacks, such as a bias, is given to it beforehand.

    Memory: per sample about the input and output of the largest layer in float, twice.

    Args:
        reference: a reference graph made from ``prepared``.
        prepared: the float graph; its observers do not see these batches.
        inputs: of each call of the two, as :func:`region_inputs` captures them.

    Example:
        >>> for step in lockstep(reference, prepared, inputs):                        # doctest: +SKIP
        ...     print(step.node, sqnr(torch.cat(step.expected), torch.cat(step.actual)))
    """
    twins = {node.name: node for node in prepared.graph.nodes if node.op.startswith("call_")}
    actual, expected = Walk(reference, inputs), Walk(prepared, inputs)
    ahead = iter(prepared.graph.nodes)
    with torch.no_grad():
        for node in reference.graph.nodes:
            actual.run(node)
            twin = twins.get(node.name)
            if twin is not None and twin.target == node.target:
                _run_until(twin, ahead, expected)
                yield Step(node, twin, actual, expected)
                expected.release(twin)
            actual.release(node)


def _run_until(node: Node, ahead: Iterator[Node], walk: Walk) -> None:
    """Run the nodes of ``ahead`` up to ``node``, which itself is not released yet."""
    for current in ahead:
        walk.run(current)
        if current is node:
            return
        walk.release(current)


def region_inputs(
    prepared: nn.Module, data: Iterable[Any], *, samples: int, forward_fn: ForwardFn | None = None
) -> dict[str, list[Inputs]]:
    """Inputs of each region of a prepared model, by path, when the float model runs on the first batches of data.

    Args:
        prepared: from :func:`fxq.prepare`; its observers do not see these batches.
        data, forward_fn: as for :func:`fxq.calibrate`.
        samples: stop after the batch with which this many samples (entries along the first axis) are reached.

    Returns:
        ``{path: [(args, kwargs), ...]}``, one entry a call; a model that is one region has the path ``""``.

    Raises:
        CalibrationError: if there is no data.
        StageError: if the model was not prepared.
    """
    regions = regions_of(prepared, Stage.PREPARED)
    calls: dict[str, list[Inputs]] = {path: [] for path in regions}
    with contextlib.ExitStack() as stack, torch.no_grad():
        for path, region in regions.items():
            stack.enter_context(observers_off(region))
            stack.callback(_record_calls(region, calls[path]).remove)
        if _run_batches(prepared, data, samples, forward_fn) == 0:
            raise CalibrationError(
                "the calibration data is empty: give at least one batch (a generator can be read only once)"
            )
    return calls


def _record_calls(region: QuantModule, calls: list[Inputs]) -> torch.utils.hooks.RemovableHandle:
    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(copy.deepcopy((args, kwargs)))  # code around a region may write into them later

    return region.register_forward_pre_hook(record, with_kwargs=True)


def _run_batches(model: nn.Module, data: Iterable[Any], samples: int, forward_fn: ForwardFn | None) -> int:
    parameters = forward_parameters(model)
    seen = 0
    for batch in iterate(data):
        run_batch(model, batch, parameters, forward_fn)
        seen += samples_in(batch)
        if seen >= samples:
            break
    return seen


def samples_in(batch: Any) -> int:
    """Entries along the first axis of the first tensor in a batch; 1 if there is none."""
    if isinstance(batch, torch.Tensor):
        return batch.shape[0] if batch.dim() else 1
    members = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (tuple, list)) else ()
    return next((samples_in(member) for member in members), 1)


@contextlib.contextmanager
def observers_off(prepared: QuantModule) -> Iterator[None]:
    """The observers of a prepared graph record nothing inside the block."""
    observers = [prepared.get_submodule(path) for path in prepared.plan.watching()]
    enabled = [observer for observer in observers if observer.enabled]
    for observer in enabled:
        observer.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for observer in enabled:
            observer.enabled = True  # type: ignore[assignment]


def bound_arguments(module: QuantModule, args: tuple[Any, ...], kwargs: Any) -> dict[str, Any]:
    """What the parameters of a graph's forward get, by name, in the order of its placeholders."""
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _is_constant(node: Node) -> bool:
    """A tensor of the module, or what is dequantized from one."""
    return node.op == "get_attr" or (is_dequantize(node) and node.args[0].op == "get_attr")  # type: ignore[union-attr]


def _made_at_reading(node: Node) -> bool:
    return node.op == "get_attr" or is_dequantize(node)


def _last_reads(graph: fx.Graph) -> dict[Node, list[Node]]:
    """For each node, those whose values nobody reads after it, itself included if nobody reads it at all."""
    last: dict[Node, Node] = {}
    for node in graph.nodes:
        last[node] = node
        for source in node.all_input_nodes:
            for stored in _stored(source):
                last[stored] = node
    found: dict[Node, list[Node]] = {}
    for node, reader in last.items():
        found.setdefault(reader, []).append(node)
    return found


def _stored(node: Node) -> Iterator[Node]:
    """The nodes whose values are read when this one is."""
    if not _made_at_reading(node):
        yield node
    for source in node.all_input_nodes if _made_at_reading(node) else ():
        yield from _stored(source)
