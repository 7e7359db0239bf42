"""Run a reference graph and the float graph it came from side by side, node by node.

A graph is usually run batch by batch, from the first node to the last. Here each node runs on all batches before the
next node does, in both graphs. So whoever looks on can compare a layer's output with what it should be, change the
layer's constants (its bias, the rounding of its weight), run it again, and go on: every later layer sees the change.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from fxq.calibration import ForwardFn, forward_parameters, iterate, model_inputs, run_batch
from fxq.errors import CalibrationError
from fxq.graph_module import QuantModule
from fxq.lazy_code import interpreted
from fxq.partition import Inputs, regions_of
from fxq.plan import Stage
from fxq.walk import Walk


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
    parameters = forward_parameters(prepared)
    batches = _first_batches(data, samples)
    if regions.keys() == {""} and forward_fn is None:
        return {"": [copy.deepcopy(model_inputs(batch, parameters)) for batch in batches]}
    calls: dict[str, list[Inputs]] = {path: [] for path in regions}
    with contextlib.ExitStack() as stack, torch.no_grad(), interpreted(regions.values()):
        for path, region in regions.items():
            stack.enter_context(observers_off(region))
            stack.callback(_record_calls(region, calls[path]).remove)
        for batch in batches:
            run_batch(prepared, batch, parameters, forward_fn)
    return calls


def _record_calls(region: QuantModule, calls: list[Inputs]) -> torch.utils.hooks.RemovableHandle:
    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(copy.deepcopy((args, kwargs)))  # code around a region may write into them later

    return region.register_forward_pre_hook(record, with_kwargs=True)


def _first_batches(data: Iterable[Any], samples: int) -> Iterator[Any]:
    """Batches until there are so many samples."""
    seen = 0
    for batch in iterate(data):
        yield batch
        seen += samples_in(batch)
        if seen >= samples:
            return
    if seen == 0:
        raise CalibrationError(
            "the calibration data is empty: give at least one batch (a generator can be read only once)"
        )


def samples_in(batch: Any) -> int:
    """Entries along the first axis of the first tensor in a batch that has one; 1 if there is none."""
    tensors = (leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.dim())
    return next((tensor.shape[0] for tensor in tensors), 1)


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
