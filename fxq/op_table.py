"""Rows and tables: what a backend can run, and the interface through which a row emits its kernel."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.fx import Node

from fxq.errors import BackendError
from fxq.ops import CLAMP, RELU, VOCABULARY, Dictionary, Op
from fxq.plan import QuantPlan, Reason, TensorFact
from fxq.spec import QParams, QuantSpec


class Out(enum.Enum):
    """Where an op's output qparams come from."""

    OWN = "own"  # observed on the output itself
    SHARE = "share"  # the input's: the op only selects, moves or averages values


@dataclass(frozen=True, slots=True)
class Fixed:
    """Output qparams that the kernel dictates, in uint8 terms."""

    scale: float
    zero_point: int


class Weights(enum.Flag):
    """Weight schemes a kernel runs."""

    NONE = 0
    TENSOR = enum.auto()
    CHANNEL = enum.auto()
    AFFINE = enum.auto()  # with zero_points other than 0


@dataclass(frozen=True, slots=True)
class Tail:
    """One step of a chain after the root: any of ``ops``, which may be absent if ``optional``."""

    ops: tuple[Op, ...]
    optional: bool = False


# A relu or clamp after an op with its own output range costs nothing: the range observed after it ends
# where the clamp does, so that requantization saturates there.
CLAMPED = Tail((RELU, CLAMP), optional=True)


@dataclass(frozen=True, slots=True)
class IntWeight:
    """A quantized weight: int8 values, their qparams and the channel axis (``None`` per tensor)."""

    values: torch.Tensor
    qparams: QParams
    ch_axis: int | None


@dataclass(frozen=True, slots=True)
class OutQuant:
    """Output of an emitted kernel: qparams in uint8 terms and the integers it must saturate at."""

    scale: float
    zero_point: int
    quant_min: int
    quant_max: int

    @property
    def pair(self) -> tuple[float, int]:
        """``(scale, zero_point)``."""
        return self.scale, self.zero_point

    @property
    def saturates(self) -> bool:
        """Whether a kernel's own saturation to uint8 is all the clamping the output needs."""
        return (self.quant_min, self.quant_max) == (0, 255)

    @property
    def real_bounds(self) -> tuple[float, float]:
        """The real values of the smallest and largest integer."""
        return (self.quant_min - self.zero_point) * self.scale, (self.quant_max - self.zero_point) * self.scale


class Emission(Protocol):
    """What a row's ``emit`` is given; implemented by the lowering pass."""

    nodes: tuple[Node, ...]
    out: OutQuant
    relu: bool

    def get(self, parameter: str) -> Any:
        """A parameter of the root op, as in the canonical node."""

    def input(self, parameter: str) -> Any:
        """The int8 node (or list of nodes, or a one-element int8 constant) of an activation parameter."""

    def plain_input(self, parameter: str) -> tuple[Node, float, int]:
        """An activation parameter as a plain uint8 tensor, with its scale and zero_point."""

    def shape(self, parameter: str) -> list[int]:
        """The shape of an activation parameter with the example inputs; empty if it is not known."""

    def tail_input(self, position: int) -> Node:
        """The int8 node of the other operand of the tail's node at ``position``."""

    def weight(self) -> IntWeight:
        """The root op's quantized weight."""

    def tensor(self, parameter: str) -> torch.Tensor | None:
        """A constant float tensor parameter, e.g. the bias."""

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """Insert a call; its value is a quint8 tensor."""

    def plain_call(self, target: Callable[..., Any], *args: Any) -> Node:
        """Insert a call whose value is a plain uint8 tensor."""

    def constant(self, suffix: str, value: Any) -> Node:
        """Attach a constant (packed weight, tensor) to the module; returns the node that reads it."""

    def overwrites(self, operand: Node) -> None:
        """Say that the kernel writes its result over ``operand``, which is copied first if anyone still reads it."""

    def unchecked(self, larger: bool = False) -> None:
        """Say that the kernel computes something of sizes that the float op refuses: of smaller ones than the
        example's, or also of ``larger`` ones."""

    def pack(self, function: Callable[..., Any], *args: Any, engines: tuple[str, ...] = ()) -> Any:
        """Call a prepacking function under the first of the engines that may run the kernel, unless another was found
        to be faster; without any under the backend's own."""


Check = Callable[[Node, Mapping[str, TensorFact]], Reason | None]


class Emit(Protocol):
    """Emits a kernel; ``kernel`` is its name in tables."""

    @property
    def kernel(self) -> str: ...

    def __call__(self, emission: Emission, /) -> Node: ...


def accept(node: Node, facts: Mapping[str, TensorFact]) -> Reason | None:
    """The check of rows that take every argument."""
    return None


@dataclass(frozen=True)
class OpRow:
    """The whole truth about one op on one backend.

    Args:
        name: shown in tables; unique in a backend.
        op: root of the chain.
        emit: makes the kernel's node.
        tail: ops that are fused into it.
        out: ``OWN``, ``SHARE`` or :class:`Fixed`.
        weight: schemes its weight may have (``Weights.NONE``: it has none).
        check: ``None`` or the :class:`~fxq.plan.Reason` why this node cannot run.
        relu_kernel: the kernel has a variant with relu, for ranges whose zero_point is not ``quant_min``.
        mixed_inputs: inputs may have qparams other than the output's, although ``out`` is ``SHARE``.
        averages: computes new values and rounds them to its input's integers.
        heavy: int8 pays on its own; light ops are int8 only next to heavy ones.
    """

    name: str
    op: Op
    emit: Emit
    tail: tuple[Tail | Op, ...] = ()
    out: Out | Fixed = Out.OWN
    weight: Weights = Weights.NONE
    check: Check = accept
    relu_kernel: bool = False
    mixed_inputs: bool = False
    averages: bool = False
    heavy: bool = False

    @property
    def steps(self) -> tuple[Tail, ...]:
        """The tail with bare ops as required steps."""
        return tuple(step if isinstance(step, Tail) else Tail((step,)) for step in self.tail)

    def validate(self) -> None:
        """Raise BackendError where the row contradicts itself."""
        has_weight = self.op.weight is not None
        if has_weight != bool(self.weight):
            raise BackendError(f"row '{self.name}': op '{self.op.name}' and weight={self.weight} do not fit")
        if self.tail and self.out is not Out.OWN:
            raise BackendError(f"row '{self.name}': only rows with out=OWN can absorb a tail")
        if self.mixed_inputs and self.out is not Out.SHARE:
            raise BackendError(f"row '{self.name}': mixed_inputs is about sharing qparams; set out=SHARE")


@dataclass(frozen=True)
class Backend:
    """A table of rows with the engine that runs it and the specs it recommends.

    Args:
        name: as given to ``backend=``.
        engine: the torch engine its weights are packed for.
        rows: what it can run, first match first.
        activation: recommended activation spec.
        weight: recommended per-channel weight spec.
        notes: what the summary says of the choice of specs.
        absent: why an op of the vocabulary has no row.

    Attributes:
        made_by: function and arguments that make this very table, which is how it is pickled; ``None`` for a table that
            is pickled by value.
    """

    name: str
    engine: str
    rows: tuple[OpRow, ...]
    activation: QuantSpec
    weight: QuantSpec
    notes: tuple[str, ...] = ()
    absent: Mapping[Op, Reason] = field(default_factory=dict)
    made_by: tuple[Callable[..., Any], tuple[Any, ...]] | None = field(default=None, init=False, compare=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Backend:
        return self  # immutable, and its ops are compared by identity

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.made_by or super().__reduce_ex__(protocol)

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        doubled = {name for name in names if names.count(name) > 1}
        if doubled:
            raise BackendError(f"backend '{self.name}': row names {sorted(doubled)} are used more than once")
        for row in self.rows:
            row.validate()

    @property
    def dictionary(self) -> Dictionary:
        """The vocabulary plus any op that only this backend's rows bring."""
        return Dictionary(dict.fromkeys((*VOCABULARY, *(row.op for row in self.rows))))

    def rows_of(self, op: Op) -> list[OpRow]:
        """Rows whose root is ``op``, longest chain first."""
        rows = [row for row in self.rows if row.op is op]
        return sorted(rows, key=lambda row: -sum(not step.optional for step in row.steps))

    def row(self, name: str) -> OpRow:
        """The row of a name."""
        return next(row for row in self.rows if row.name == name)


def sharing_ends(plan: QuantPlan, backend: Backend) -> set[str]:
    """Ends of the regions whose output shares its input's qparams."""
    sharing = {row.name for row in backend.rows if row.out is Out.SHARE}
    return {region.end for region in plan.regions if region.row in sharing}


def sharing_or_float(plan: QuantPlan, backend: Backend) -> set[str]:
    """Nodes through which values may pass as they are or in float: with float around them they need no integers."""
    return sharing_ends(plan, backend) | {
        name for name, decision in plan.decisions.items() if decision.reason is not None
    }


def averaging_ends(plan: QuantPlan, backend: Backend) -> set[str]:
    """Ends of the regions that average, which computes values between the input's integers."""
    averaging = {row.name for row in backend.rows if row.averages}
    return {region.end for region in plan.regions if region.row in averaging}
