"""Checks of rows: ``None`` where the kernel runs, else the reason why it cannot."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch.fx import Node

from fxq.backends.kernels import expand
from fxq.op_table import Check
from fxq.ops import (
    AVG_POOL2D,
    BATCH_NORM,
    CAT,
    CONV_TRANSPOSE2D,
    INSTANCE_NORM,
    INTERPOLATE,
    MATMUL,
    MAX_POOL1D,
    MAX_POOL2D,
    MAX_POOL3D,
    MEAN,
    PAD,
    PRELU,
)
from fxq.plan import Reason, TensorFact
from fxq.qdq import is_quantize

Facts = Mapping[str, TensorFact]

_MAX_POOLS = {op.target for op in (MAX_POOL1D, MAX_POOL2D, MAX_POOL3D)}

NOT_ALL_TENSORS = Reason("options", "joins something other than tensors")
RANK = Reason("options", "the int8 kernel does not take tensors of this rank")


def rank(*ranks: int) -> Check:
    """A check that the first input has one of these numbers of dimensions."""

    def check(node: Node, facts: Facts) -> Reason | None:
        fact = facts.get(node.args[0].name) if isinstance(node.args[0], Node) else None
        return None if fact is not None and len(fact.shape) in ranks else RANK

    return check


def larger_than_a_pixel(node: Node, facts: Facts) -> Reason | None:
    fact = facts.get(node.name)
    if fact is None or len(fact.shape) != 4:
        return RANK
    return None if math.prod(fact.shape[2:]) > 1 else Reason("options", "fusing pays for images only")


def at_least_2d(node: Node, facts: Facts) -> Reason | None:
    fact = facts.get(node.args[0].name) if isinstance(node.args[0], Node) else None
    return None if fact is not None and len(fact.shape) >= 2 else RANK


def wrong_transposed(node: Node, facts: Facts) -> Reason | None:
    return Reason("wrong-kernel", "without the fbgemm engine torch has no right int8 kernel for it")


def not_direct_in_fbgemm(node: Node, facts: Facts) -> Reason | None:
    """A check for transposed convs of images that fbgemm runs right."""
    if _direct_in_fbgemm(node, facts):
        return Reason("wrong-kernel", "fbgemm's transposed conv is wrong for kernels of two rows")
    return rank(4)(node, facts)


def direct_in_fbgemm(node: Node, facts: Facts) -> Reason | None:
    """A check for the transposed convs that fbgemm runs wrong."""
    return None if _direct_in_fbgemm(node, facts) else RANK


def _direct_in_fbgemm(node: Node, facts: Facts) -> bool:
    """Whether fbgemm takes a path of its own, which gives wrong results: found by trying, with kernels of two rows
    and up to six columns.
    """
    source, result = (facts.get(n.name) if isinstance(n, Node) else None for n in (node.args[0], node))
    if source is None or result is None or len(source.shape) != 4 or CONV_TRANSPOSE2D.get(node, "groups") != 1:
        return False
    names = ("stride", "padding", "output_padding", "dilation")
    stride, padding, more, dilation = (expand(CONV_TRANSPOSE2D.get(node, name), 2) for name in names)
    if source.shape[1] % 8 or result.shape[1] % 8 or max(stride) > 2 or any(padding) or dilation != [1, 1]:
        return False
    rows, columns = (
        result.shape[axis] - (source.shape[axis] - 1) * stride[axis - 2] - more[axis - 2] for axis in (2, 3)
    )
    return rows == 2 and columns <= 6


def one_group(dims: int) -> Check:
    """A check for transposed convs of ``dims``-dimensional tensors that have a single group."""

    def check(node: Node, facts: Facts) -> Reason | None:
        if CONV_TRANSPOSE2D.get(node, "groups") != 1:  # all three have the same parameters
            return Reason("options", "per-channel weights of several groups")
        return rank(dims)(node, facts)

    return check


def all_tensors(node: Node, facts: Facts) -> Reason | None:
    tensors = CAT.get(node, "tensors")
    if isinstance(tensors, Node) or not all(isinstance(item, Node) for item in tensors):
        return NOT_ALL_TENSORS
    return None


def tensor_and_tensor_or_scalar(node: Node, facts: Facts) -> Reason | None:
    left, right = node.args
    if not isinstance(left, Node):
        return Reason("options", "a scalar minus or over a tensor has no int8 kernel")
    if isinstance(right, Node) and right.name not in facts:
        return Reason("options", "its second operand is a number known only at run time")
    if isinstance(right, bool) or not isinstance(right, (Node, int, float)):
        return Reason("options", "its second operand is not a tensor or a number")
    return None



def two_tensors(node: Node, facts: Facts) -> Reason | None:
    left, right = (facts.get(arg.name) if isinstance(arg, Node) else None for arg in node.args)
    if left is None or right is None:
        return Reason("options", "takes two tensors")
    if len(left.shape) != len(right.shape) or len(left.shape) < 3:
        return Reason("options", f"the int8 {MATMUL.name} takes two batches of matrices of one rank")
    if left.shape[:-2] != right.shape[:-2]:
        return Reason("options", f"the int8 {MATMUL.name} does not broadcast batches")
    return None


def same_shape(node: Node, facts: Facts) -> Reason | None:
    """The accumulated operand of a conv+add has the conv's own output shape."""
    add = next(iter(node.users), None)
    shapes = {facts[arg.name].shape for arg in add.args if isinstance(arg, Node)} if add is not None else set()
    return None if len(shapes) == 1 else Reason("options", "the added tensor has another shape")


def dims_given(node: Node, facts: Facts) -> Reason | None:
    return None if MEAN.get(node, "dim") is not None else Reason("options", "the mean over all values stays float")


def one_slope(node: Node, facts: Facts) -> Reason | None:
    slope = PRELU.get(node, "weight")
    fact = facts.get(slope.name) if isinstance(slope, Node) and slope.op == "get_attr" else None
    if fact is not None and math.prod(fact.shape) == 1:
        return None
    return Reason("wrong-kernel", "torch's int8 prelu rounds a slope a channel to 8 bits, several integers off")


def padding(node: Node, facts: Facts) -> Reason | None:
    mode, value = PAD.get(node, "mode"), PAD.get(node, "value")
    if mode == "constant" and not value:
        return None
    if mode == "constant" and value == -math.inf and _only_maxima_of(node):
        return None  # -inf rounds to the lowest integer, which is the maximum of no window that any value lies in
    fact = facts.get(node.args[0].name) if isinstance(node.args[0], Node) else None
    if mode == "reflect" and fact is not None and len(fact.shape) in (3, 4):
        return None
    return Reason("options", f"no int8 kernel pads with mode={mode!r}, value={value!r}")


def _only_maxima_of(node: Node) -> bool:
    """Whether max pools alone read a node, where it is not quantized yet."""
    return all(user.target in _MAX_POOLS or is_quantize(user) for user in node.users)


def interpolation(node: Node, facts: Facts) -> Reason | None:
    mode = INTERPOLATE.get(node, "mode")
    fact = facts.get(node.args[0].name) if isinstance(node.args[0], Node) else None
    if INTERPOLATE.get(node, "antialias") or fact is None:
        return Reason("options", "no int8 kernel interpolates with antialias")
    if (mode == "nearest" and len(fact.shape) in (4, 5)) or (mode == "bilinear" and len(fact.shape) == 4):
        return None
    return Reason("options", f"no int8 kernel interpolates with mode={mode!r} on {len(fact.shape)} dimensions")


def input_statistics(node: Node, facts: Facts) -> Reason | None:
    if INSTANCE_NORM.get(node, "use_input_stats"):
        return None
    return Reason("options", "the int8 kernel normalises with the input's own statistics only")


def running_statistics(node: Node, facts: Facts) -> Reason | None:
    training = BATCH_NORM.get(node, "training")
    if training and not isinstance(training, Node):  # a mode that is computed is eval mode once training is over
        return Reason("options", "normalises with batch statistics")
    return rank(4, 5)(node, facts)


def no_divisor(node: Node, facts: Facts) -> Reason | None:
    if AVG_POOL2D.get(node, "divisor_override") is None:
        return None
    return Reason("options", "divisor_override may leave the input's range")
