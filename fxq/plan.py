"""The quantization plan: a side table of one graph, and the only thing that reports and later stages read.

It is keyed by node name and argument path rather than stored in ``node.meta``: a producer-keyed entry
collides on ``y + y`` and goes stale when a graph is copied.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import itertools
from array import array
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.fx import Graph

from fxq.compiled import SCRIPTED
from fxq.errors import PlanError
from fxq.qdq import is_dequantize, is_quantize
from fxq.spec import QuantSpec


class Slot(NamedTuple):
    """One use of a tensor: a consumer and the path of the argument, or ``()`` for the node's own output."""

    node: str
    path: tuple[int, ...] = ()


class Status(enum.Enum):
    """What became of a node."""

    QUANTIZED = "int8"
    SHARED = "int8 shared"
    SHAPE_ONLY = "shape"
    FLOAT = "float"


CHANNELS_LAST = "channels_last"  # a property of plans: weights or example inputs are in this memory format


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a node stays float: a short code for grouping and a sentence for the reader."""

    code: str
    text: str

    def __str__(self) -> str:
        return self.text


EXCLUDED = Reason("excluded", "excluded by the configuration")
UNKNOWN_OP = Reason("unknown-op", "not an operation fxq knows")
NO_KERNEL = Reason("no-kernel", "the backend has no int8 kernel for it")
NOT_FLOAT32 = Reason("not-float32", "its input is not a float32 tensor")
UNTRACEABLE = Reason("untraceable", "the module cannot be traced with torch.fx")
TORCHSCRIPT = Reason("torchscript", SCRIPTED)
OWN_FORWARD = Reason("own-forward", "a subclass with its own forward")
ISLAND = Reason("island", "only float ops around it, where int8 would only add quantize and dequantize")
AT_EXIT = Reason("at-exit", "averages what leaves int8 here anyway, in float without rounding")
ATTENTION = Reason("attention", "attention scores and softmax need more than 8 bits")
WHOLE_ATTENTION = Reason("whole-attention", "attention that cannot be taken apart, its projections included")
DYNAMIC_WEIGHT = Reason("dynamic-weight", "its weight is computed at run time")
NEVER_OBSERVED = Reason("never-observed", "its observer saw no data while calibrating")
OPTIONS = Reason("options", "the int8 kernel does not support these arguments")
WEIGHT_AFFINE = Reason("weight-scheme", "the backend's kernel takes symmetric weights only")
JOINED = Reason("residual", "joins tokens for layer_norm whose ranges differ too much for one scale")
RESIDUAL = Reason("residual", "a sum that layer_norm reads, whose channels differ too much for 8 bits")
INPLACE = Reason("in-place", "part of an update in place")
SENSITIVE = Reason("sensitive", "kept float for accuracy")
COORDINATES = Reason("coordinates", "positions need more than 8 bits")
UNBOUNDED = Reason("unbounded", "has values that no scale holds, as masks do")
RECURRENT = Reason("recurrent", "rounds its state again at each step, which is left to dynamic quantization")
MIXED_QPARAMS = Reason("mixed-qparams", "its int8 kernel cannot change scale and zero_point")


class Decision(NamedTuple):
    """What was decided for one call node."""

    status: Status
    row: str | None = None
    reason: Reason | None = None
    detail: str = ""


def counted(number: int, what: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def float_decision(reason: Reason, detail: str = "") -> Decision:
    """A FLOAT decision; the only way to make one, so that none lacks its reason."""
    return Decision(Status.FLOAT, None, reason, detail)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a node comes from in the user's model.

    Attributes:
        module_path: path of the innermost module around the call.
        kind: the type, function or method that was called.
        around: types of the modules around it, innermost first.
    """

    module_path: str
    kind: str
    around: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TensorFact:
    """Shape and dtype of a value, recorded with the example inputs."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def is_float32(self) -> bool:
        return self.dtype == torch.float32


class ChannelStatistics(NamedTuple):
    """Mean and standard deviation of each output channel of a layer, as the BatchNorm folded into it tells them."""

    mean: array[float]
    std: array[float]

    @classmethod
    def of(cls, mean: torch.Tensor, std: torch.Tensor) -> ChannelStatistics:
        """From two tensors of one dimension; a number takes 8 bytes here, and 32 in a tuple."""
        return cls(array("d", mean.tolist()), array("d", std.tolist()))


class Equalized(NamedTuple):
    """Two layers: the first one's output channels were divided by ``scale``, the second one's inputs multiplied.

    A first layer that several second ones read is in several pairs, and was divided once.
    """

    first: str
    second: str
    scale: tuple[float, ...]


class PendingSmoothing(NamedTuple):
    """Module path of what decides, while calibrating, on the factors of a layer's channels, and who reads these."""

    path: str
    readers: tuple[str, ...]


class Absorbed(NamedTuple):
    """Two layers: the first one's outputs were lowered by ``shift``, which the second one's biases make up for."""

    first: str
    second: str
    shift: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Region:
    """Nodes that run as one int8 kernel: root first, then the tail that is fused into it.

    ``absorbed`` are tail nodes that are gone because a saturation does their work.
    """

    row: str
    nodes: tuple[str, ...]
    absorbed: tuple[str, ...] = ()

    @property
    def end(self) -> str:
        return self.nodes[-1]


@dataclass(frozen=True, slots=True)
class Fusion:
    """One line of the fusion table: what was folded, fused, absorbed or dropped, and into what."""

    action: str
    what: str
    into: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Kernel:
    """How a lowered node runs: its kernel with engine, and its output's scale and zero_point."""

    name: str
    scale: float | None = None
    zero_point: int | None = None
    fused: tuple[str, ...] = ()


class Stage(enum.Enum):
    """How far a graph has come."""

    FLOAT = "float"
    PREPARED = "prepared"
    REFERENCE = "reference"
    LOWERED = "lowered"


@dataclass
class QuantPlan:
    """Everything known about a graph's quantization.

    Attributes:
        backend: name of the backend it was made for.
        stage: how far the graph has come.
        properties: what the passes that ran have established, e.g. ``"canonical"``.
        specs: how each slot is quantized.
        groups: slots with the same number share one observer and so one scale and zero_point.
        fixed: groups whose qparams are dictated by a kernel: ``{group: (scale, zero_point)}``.
        observers: module path of each group's observer, while the graph is prepared.
        input_means: module path of what records the mean of a layer's input, by the layer, while it is prepared.
        smoothings: what is not decided yet about channels, by the layer that writes them, while it is prepared.
        regions: nodes that become one kernel.
        decisions: exactly one for each call node once ``"annotated"``.
        origins: module path and spelling of each node in the user's model.
        facts: shape and dtype of each tensor node.
        containers: nodes whose value is a tuple, list or dict of tensors.
        unbounded: tensors with infinite or huge values, as masks have, with the example inputs; not kept in files.
        kernels: for lowered graphs, how each node runs.
        fusions: log for the fusion table.
        notes: what the summary says about choices that hold for the whole model.
        macs: multiply-accumulates of each conv, linear and float module with the example inputs.
        model: class name of the user's model.
        attributes: plain attributes of the user's module, which code around it may read; those of its parts by path.
        described: of which tensors code around the module may ask shape and dtype, by path.
        weight_bytes: bytes of the quantized weights as float32 and as integers with their qparams.
        untraceable: reason for each float module inside that could not be traced, by path.
        equalized: layers scaled against each other; comparing with the float model needs to know.
        absorbed: layers whose biases moved into the layer after them, likewise.
        statistics: of the layers that a BatchNorm was folded into; not kept in files.
    """

    backend: str
    stage: Stage = Stage.FLOAT
    properties: set[str] = field(default_factory=set)
    specs: dict[Slot, QuantSpec] = field(default_factory=dict)
    groups: dict[Slot, int] = field(default_factory=dict)
    fixed: dict[int, tuple[float, int]] = field(default_factory=dict)
    observers: dict[int, str] = field(default_factory=dict)
    input_means: dict[str, str] = field(default_factory=dict)
    smoothings: dict[str, PendingSmoothing] = field(default_factory=dict)
    regions: list[Region] = field(default_factory=list)
    decisions: dict[str, Decision] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)
    facts: dict[str, TensorFact] = field(default_factory=dict)
    containers: set[str] = field(default_factory=set)
    unbounded: set[str] = field(default_factory=set)
    kernels: dict[str, Kernel] = field(default_factory=dict)
    fusions: list[Fusion] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    macs: dict[str, int] = field(default_factory=dict)
    model: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)
    described: dict[str, TensorFact] = field(default_factory=dict)
    weight_bytes: tuple[int, int] = (0, 0)
    untraceable: dict[str, str] = field(default_factory=dict)
    equalized: list[Equalized] = field(default_factory=list)
    absorbed: list[Absorbed] = field(default_factory=list)
    statistics: dict[str, ChannelStatistics] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantPlan:
        # All that the containers hold is immutable, but for the user's attributes.
        clone = QuantPlan(**{f.name: copy.copy(getattr(self, f.name)) for f in dataclasses.fields(self)})
        clone.attributes = copy.deepcopy(self.attributes, memo)
        memo[id(self)] = clone
        return clone

    def origin(self, name: str) -> Origin:
        """Origin of a node; empty for nodes that fxq inserted."""
        return self.origins.get(name, Origin("", ""))

    def where(self, name: str) -> str:
        """``node 'conv1' (module 'features.0')``, for messages."""
        path = self.origin(name).module_path
        return f"node '{name}'" + (f" (module '{path}')" if path else "")

    def members(self, group: int) -> list[Slot]:
        """All slots of a group."""
        return [slot for slot, number in self.groups.items() if number == group]

    def make_float(self, regions: Iterable[Region], reason: Reason, detail: str = "") -> None:
        """Take regions out of int8: their slots go, their nodes get a FLOAT decision."""
        gone = set(regions)
        names = {name for region in gone for name in region.nodes}
        self.regions = [region for region in self.regions if region not in gone]
        self.decisions.update(dict.fromkeys(names, float_decision(reason, detail)))
        self.specs = {slot: spec for slot, spec in self.specs.items() if slot.node not in names}
        self.groups = {slot: group for slot, group in self.groups.items() if slot.node not in names}

    def make_float_at(self, roots: Container[str], reason: Reason) -> int:
        """Take the regions that begin at some nodes out of int8; returns how many."""
        dropped = [region for region in self.regions if region.nodes[0] in roots]
        self.make_float(dropped, reason)
        return len(dropped)

    def forget(self, name: str) -> None:
        """Drop what is known of a node that a pass erased."""
        for table in (self.decisions, self.origins, self.facts, self.kernels, self.macs, self.statistics):
            table.pop(name, None)

    def check(self, graph: Graph) -> None:
        """Verify that plan and graph agree; run after every pass.

        Raises:
            PlanError: naming the first disagreement.
        """
        names = {node.name for node in graph.nodes}
        calls = {node.name for node in graph.nodes if node.op.startswith("call_")}
        for slot in itertools.chain(self.specs, self.groups):
            if slot.node not in names:
                raise PlanError(f"the plan has a slot of '{slot.node}', which is not in the graph")
        for slot in self.groups:
            if slot not in self.specs:
                raise PlanError(f"slot {slot} is in group {self.groups[slot]} but has no QuantSpec")
        if "annotated" not in self.properties:
            return
        for name, decision in self.decisions.items():
            if name not in calls:
                raise PlanError(f"a decision for '{name}', which is not a call node of the graph")
            if decision.status is Status.FLOAT and decision.reason is None:
                raise PlanError(f"'{name}' stays float without a reason")
        conversions = {node.name for node in graph.nodes if is_quantize(node) or is_dequantize(node)}
        undecided = calls - conversions - self.decisions.keys() - set(self.observer_nodes(graph))
        if undecided:
            raise PlanError(f"no decision for {sorted(undecided)[:5]}")

    def observer_nodes(self, graph: Graph) -> list[str]:
        """Names of the nodes that only watch: calls of :meth:`watching`."""
        paths = self.watching()
        return [node.name for node in graph.nodes if node.op == "call_module" and node.target in paths]

    def watching(self) -> set[str]:
        """Module paths of what looks on while calibrating: observers, what records input means, what smooths."""
        smoothings = (path for path, _ in self.smoothings.values())
        return {*self.observers.values(), *self.input_means.values(), *smoothings}
