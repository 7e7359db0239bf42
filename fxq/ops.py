"""The vocabulary: one :class:`Op` for each operation fxq understands, with every way users spell it.

A *canonical* node is a ``call_function`` of ``op.target`` with every parameter given, in the order of
``op.signature``; canonicalize rewrites all spellings to it. Whatever is not in the vocabulary is left
alone and runs in float.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

REQUIRED: Any = object()  # the default of a parameter that has none


class Signature:
    """Parameters parsed from ``"input, stride=1, *, eps=1e-5"``; ``*shape`` takes the rest of the arguments."""

    def __init__(self, text: str) -> None:
        self.defaults: dict[str, Any] = {}
        self.keyword_only: set[str] = set()
        self.rest: str | None = None
        after_star = False
        for part in filter(None, (p.strip() for p in text.split(","))):
            name, _, default = part.partition("=")
            if name == "*":
                after_star = True
            elif name.startswith("*"):
                self.rest = name[1:]
            else:
                self.defaults[name] = ast.literal_eval(default) if default else REQUIRED
                if after_star:
                    self.keyword_only.add(name)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Values of all parameters, or ``None`` if the arguments do not fit."""
        positional = [name for name in self.defaults if name not in self.keyword_only]
        bound = dict(zip(positional, args, strict=False))
        if self.rest is not None:
            bound[self.rest] = tuple(args[len(positional) :])
        elif len(args) > len(positional):
            return None
        for name, value in kwargs.items():
            if name in bound or name not in self.defaults:
                return None
            bound[name] = value
        for name, default in self.defaults.items():
            bound.setdefault(name, default)
        return None if any(value is REQUIRED for value in bound.values()) else bound


@dataclass(frozen=True, eq=False)
class Spelling:
    """One way to write an op: a function, a method name or a module class.

    ``fixed`` adds parameters, ``rename`` maps spelled names to canonical ones, ``must`` lists parameters the
    canonical op lacks with the only value that keeps the meaning; ``derive`` computes parameters that a module
    has no attribute for; ``inplace`` marks spellings that overwrite their first argument (also said by a true
    ``inplace`` parameter).
    """

    what: Callable[..., Any] | str | type[nn.Module]
    signature: str | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    rename: Mapping[str, str] = field(default_factory=dict)
    must: Mapping[str, Any] = field(default_factory=dict)
    derive: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    inplace: bool = False


@dataclass(frozen=True, eq=False)
class Op:
    """One operation.

    Args:
        name: printed in tables and used in configs (``set_object_type("add", None)``).
        target: the function of a canonical node.
        text: signature of ``target``; the order of a canonical node's arguments.
        tensors: names of the parameters that are activations (a list of tensors counts as one parameter).
        weight, bias: names of the parameters of a quantized weight and its float bias.
        weight_axis: axis of the output channels in the weight.
        functions, methods, modules: further spellings with the same signature.
        spellings: spellings whose signature differs.
        inplace: function and method spellings that overwrite their first argument.
    """

    name: str
    target: Callable[..., Any]
    text: str
    tensors: tuple[str, ...] = ("input",)
    weight: str | None = None
    bias: str | None = None
    weight_axis: int = 0
    functions: tuple[Callable[..., Any], ...] = ()
    methods: tuple[str, ...] = ()
    modules: tuple[type[nn.Module], ...] = ()
    spellings: tuple[Spelling, ...] = ()
    inplace: tuple[Callable[..., Any] | str, ...] = ()

    @cached_property
    def signature(self) -> Signature:
        return Signature(self.text)

    def __repr__(self) -> str:
        return f"Op({self.name})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # ops are compared by identity: one of the vocabulary is itself again after pickling
        return (_op_named, (self.name,)) if self in VOCABULARY else super().__reduce_ex__(protocol)

    def all_spellings(self) -> Iterable[Spelling]:
        """Every spelling, the canonical target first."""
        plain: tuple[Callable[..., Any] | str, ...] = (self.target, *self.functions, *self.methods, *self.modules)
        yield from (Spelling(what) for what in plain)
        yield from (Spelling(what, inplace=True) for what in self.inplace)
        yield from self.spellings

    def arguments(self, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` of a canonical node from parameter values."""
        signature = self.signature
        args = tuple(values[name] for name in signature.defaults if name not in signature.keyword_only)
        if signature.rest is not None:
            args += tuple(values[signature.rest])
        return args, {name: values[name] for name in signature.keyword_only}

    def is_canonical(self, node: Node) -> bool:
        """Whether a node that calls ``target`` gives every parameter, as :meth:`arguments` arranges them."""
        signature = self.signature
        positional = len(signature.defaults) - len(signature.keyword_only)
        fits = len(node.args) >= positional if signature.rest is not None else len(node.args) == positional
        return fits and node.kwargs.keys() == signature.keyword_only

    def index(self, parameter: str) -> int:
        """Position of a parameter among a canonical node's arguments."""
        return list(self.signature.defaults).index(parameter)

    def get(self, node: Node, parameter: str) -> Any:
        """A parameter's value on a canonical node."""
        if parameter in self.signature.keyword_only:
            return node.kwargs[parameter]
        if parameter == self.signature.rest:
            return node.args[len(self.signature.defaults) :]
        return node.args[self.index(parameter)]

    def tensor_arguments(self, node: Node) -> list[tuple[tuple[int, ...], Node]]:
        """``(path, producer)`` of every activation argument that is a node; ``path`` indexes ``node.args``."""
        found: list[tuple[tuple[int, ...], Node]] = []
        for name in self.tensors:
            position = self.index(name)
            value = node.args[position]
            if isinstance(value, Node):
                found.append(((position,), value))
            elif isinstance(value, (list, tuple)):
                found += [((position, i), item) for i, item in enumerate(value) if isinstance(item, Node)]
        return found


def _conv(name: str, target: Callable[..., Any], module: type[nn.Module]) -> Op:
    text = "input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1"
    return Op(name, target, text, weight="weight", bias="bias", modules=(module,))


def _conv_transpose(name: str, target: Callable[..., Any], module: type[nn.Module]) -> Op:
    text = "input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1"
    spelling = Spelling(module, "input, output_size=None", must={"output_size": None})
    return Op(name, target, text, weight="weight", bias="bias", weight_axis=1, spellings=(spelling,))


def _max_pool(name: str, target: Callable[..., Any], function: Callable[..., Any], module: type[nn.Module]) -> Op:
    text = "input, kernel_size, stride=(), padding=0, dilation=1, ceil_mode=False"
    must = {"return_indices": False}
    return Op(name, target, text, spellings=(
        Spelling(function, text + ", return_indices=False", must=must),
        Spelling(target, text + ", return_indices=False", must=must),
        Spelling(module, must=must),
    ))  # fmt: skip


CONV1D = _conv("conv1d", F.conv1d, nn.Conv1d)
CONV2D = _conv("conv2d", F.conv2d, nn.Conv2d)
CONV3D = _conv("conv3d", F.conv3d, nn.Conv3d)
CONV_TRANSPOSE1D = _conv_transpose("conv_transpose1d", F.conv_transpose1d, nn.ConvTranspose1d)
CONV_TRANSPOSE2D = _conv_transpose("conv_transpose2d", F.conv_transpose2d, nn.ConvTranspose2d)
CONV_TRANSPOSE3D = _conv_transpose("conv_transpose3d", F.conv_transpose3d, nn.ConvTranspose3d)
LINEAR = Op("linear", F.linear, "input, weight, bias=None", weight="weight", bias="bias", modules=(nn.Linear,))
MATMUL = Op(
    "matmul", torch.matmul, "input, other", tensors=("input", "other"),
    functions=(operator.matmul, torch.bmm, torch.mm), methods=("matmul", "bmm", "mm", "__matmul__"),
)  # fmt: skip

_BATCH_NORM = "input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5"
BATCH_NORM = Op(
    "batch_norm", F.batch_norm, _BATCH_NORM, spellings=tuple(
        Spelling(module, derive={"training": lambda m: m.running_mean is None or m.training})
        for module in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    ),
)  # fmt: skip
LAYER_NORM = Op(
    "layer_norm", F.layer_norm, "input, normalized_shape, weight=None, bias=None, eps=1e-5", modules=(nn.LayerNorm,),
)  # fmt: skip
GROUP_NORM = Op(
    "group_norm", F.group_norm, "input, num_groups, weight=None, bias=None, eps=1e-5", modules=(nn.GroupNorm,),
)  # fmt: skip
INSTANCE_NORM = Op(
    "instance_norm", F.instance_norm,
    "input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5",
    spellings=tuple(
        Spelling(module, derive={"use_input_stats": lambda m: m.running_mean is None or m.training})
        for module in (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    ),
)  # fmt: skip

_INPLACE = "input, inplace=False"
RELU = Op(
    "relu", torch.relu, "input", methods=("relu",), inplace=(torch.relu_, F.relu_, "relu_"),
    spellings=(Spelling(F.relu, _INPLACE), Spelling(nn.ReLU)),
)  # fmt: skip
CLAMP = Op(
    "clamp", torch.clamp, "input, min=None, max=None",
    functions=(torch.clip,), methods=("clamp", "clip"), inplace=(torch.clamp_, "clamp_", "clip_"),
    spellings=(
        Spelling(nn.ReLU6, fixed={"min": 0.0, "max": 6.0}),
        Spelling(F.relu6, _INPLACE, fixed={"min": 0.0, "max": 6.0}),
        Spelling(nn.Hardtanh, rename={"min_val": "min", "max_val": "max"}),
        Spelling(F.hardtanh, "input, min_val=-1.0, max_val=1.0, inplace=False",
                 rename={"min_val": "min", "max_val": "max"}),
        Spelling(F.hardtanh_, "input, min_val=-1.0, max_val=1.0", rename={"min_val": "min", "max_val": "max"},
                 inplace=True),
        Spelling(torch.clamp_min, "input, min", fixed={"max": None}),
        Spelling(torch.clamp_max, "input, max", fixed={"min": None}),
        Spelling(torch.clamp_min_, "input, min", fixed={"max": None}, inplace=True),
        Spelling(torch.clamp_max_, "input, max", fixed={"min": None}, inplace=True),
        Spelling("clamp_min_", "input, min", fixed={"max": None}, inplace=True),
        Spelling("clamp_max_", "input, max", fixed={"min": None}, inplace=True),
        Spelling("clamp_min", "input, min", fixed={"max": None}),
        Spelling("clamp_max", "input, max", fixed={"min": None}),
    ),
)  # fmt: skip
LEAKY_RELU = Op(
    "leaky_relu", F.leaky_relu, "input, negative_slope=0.01, inplace=False", modules=(nn.LeakyReLU,),
    spellings=(Spelling(F.leaky_relu_, "input, negative_slope=0.01", inplace=True),),
)  # fmt: skip
ELU = Op("elu", F.elu, "input, alpha=1.0, inplace=False", modules=(nn.ELU,), spellings=(
    Spelling(F.elu_, "input, alpha=1.0", inplace=True),
))  # fmt: skip
PRELU = Op("prelu", F.prelu, "input, weight", functions=(torch.prelu,), methods=("prelu",), modules=(nn.PReLU,))
SIGMOID = Op(
    "sigmoid", torch.sigmoid, "input", functions=(F.sigmoid,), methods=("sigmoid",), modules=(nn.Sigmoid,),
    inplace=("sigmoid_",),
)  # fmt: skip
HARDSIGMOID = Op("hardsigmoid", F.hardsigmoid, _INPLACE, modules=(nn.Hardsigmoid,))
TANH = Op(
    "tanh", torch.tanh, "input", functions=(F.tanh,), methods=("tanh",), modules=(nn.Tanh,), inplace=("tanh_",),
)  # fmt: skip
HARDSWISH = Op("hardswish", F.hardswish, _INPLACE, modules=(nn.Hardswish,))
SILU = Op("silu", F.silu, _INPLACE, modules=(nn.SiLU,))
MISH = Op("mish", F.mish, _INPLACE, modules=(nn.Mish,))
GELU = Op("gelu", F.gelu, "input, *, approximate='none'", modules=(nn.GELU,))
SOFTMAX = Op("softmax", torch.softmax, "input, dim", spellings=(
    Spelling(F.softmax, "input, dim=None, _stacklevel=3, dtype=None", must={"dtype": None}),
    Spelling("softmax", "input, dim, dtype=None", must={"dtype": None}),
    Spelling(nn.Softmax),
    Spelling(nn.Softmax2d, fixed={"dim": -3}),
))  # fmt: skip

_BINARY = ("input", "other")
ADD = Op("add", operator.add, "input, other", tensors=_BINARY, inplace=(operator.iadd,), spellings=(
    Spelling(torch.add, "input, other, *, alpha=1", must={"alpha": 1}),
    Spelling("add", "input, other, *, alpha=1", must={"alpha": 1}),
    Spelling("add_", "input, other, *, alpha=1", must={"alpha": 1}, inplace=True),
))  # fmt: skip
SUB = Op("sub", operator.sub, "input, other", tensors=_BINARY, inplace=(operator.isub,), spellings=(
    Spelling(torch.sub, "input, other, *, alpha=1", must={"alpha": 1}),
    Spelling(torch.subtract, "input, other, *, alpha=1", must={"alpha": 1}),
    Spelling("subtract", "input, other, *, alpha=1", must={"alpha": 1}),
    Spelling("sub", "input, other, *, alpha=1", must={"alpha": 1}),
    Spelling("sub_", "input, other, *, alpha=1", must={"alpha": 1}, inplace=True),
))  # fmt: skip
MUL = Op(
    "mul", operator.mul, "input, other", tensors=_BINARY,
    functions=(torch.mul, torch.multiply), methods=("mul", "multiply"), inplace=(operator.imul, "mul_", "multiply_"),
)  # fmt: skip
DIV = Op("div", operator.truediv, "input, other", tensors=_BINARY, inplace=(operator.itruediv,), spellings=(
    Spelling(torch.true_divide),
    Spelling("true_divide"),
    Spelling(torch.divide, "input, other, *, rounding_mode=None", must={"rounding_mode": None}),
    Spelling("divide", "input, other, *, rounding_mode=None", must={"rounding_mode": None}),
    Spelling(torch.div, "input, other, *, rounding_mode=None", must={"rounding_mode": None}),
    Spelling("div", "input, other, *, rounding_mode=None", must={"rounding_mode": None}),
    Spelling("div_", "input, other, *, rounding_mode=None", must={"rounding_mode": None}, inplace=True),
))  # fmt: skip

CAT = Op("cat", torch.cat, "tensors, dim=0", tensors=("tensors",), spellings=tuple(
    Spelling(function, "tensors, dim=None, axis=None", rename={"axis": "dim"})
    for function in (torch.cat, torch.concat, torch.concatenate)
))  # fmt: skip
MAX_POOL1D = _max_pool("max_pool1d", torch.max_pool1d, F.max_pool1d, nn.MaxPool1d)
MAX_POOL2D = _max_pool("max_pool2d", torch.max_pool2d, F.max_pool2d, nn.MaxPool2d)
MAX_POOL3D = _max_pool("max_pool3d", torch.max_pool3d, F.max_pool3d, nn.MaxPool3d)
AVG_POOL1D = Op(
    "avg_pool1d", F.avg_pool1d, "input, kernel_size, stride=(), padding=0, ceil_mode=False, count_include_pad=True",
    modules=(nn.AvgPool1d,),
)  # fmt: skip
_AVG_POOL = (
    "input, kernel_size, stride=(), padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None"
)
AVG_POOL2D = Op("avg_pool2d", F.avg_pool2d, _AVG_POOL, modules=(nn.AvgPool2d,))
AVG_POOL3D = Op("avg_pool3d", F.avg_pool3d, _AVG_POOL, modules=(nn.AvgPool3d,))
ADAPTIVE_AVG_POOL1D = Op(
    "adaptive_avg_pool1d", F.adaptive_avg_pool1d, "input, output_size", modules=(nn.AdaptiveAvgPool1d,),
)  # fmt: skip
ADAPTIVE_AVG_POOL2D = Op(
    "adaptive_avg_pool2d", F.adaptive_avg_pool2d, "input, output_size", modules=(nn.AdaptiveAvgPool2d,),
)  # fmt: skip
ADAPTIVE_AVG_POOL3D = Op(
    "adaptive_avg_pool3d", F.adaptive_avg_pool3d, "input, output_size", modules=(nn.AdaptiveAvgPool3d,),
)  # fmt: skip
_MEAN = "input, dim=None, keepdim=None, *, dtype=None, axis=None, keepdims=None"
MEAN = Op("mean", torch.mean, "input, dim=None, keepdim=False", spellings=(
    Spelling(torch.mean, _MEAN, must={"dtype": None}, rename={"axis": "dim", "keepdims": "keepdim"}),
    Spelling("mean", _MEAN, must={"dtype": None}, rename={"axis": "dim", "keepdims": "keepdim"}),
))  # fmt: skip
INTERPOLATE = Op(
    "interpolate", F.interpolate,
    "input, size=None, scale_factor=None, mode='nearest', align_corners=None, recompute_scale_factor=None, "
    "antialias=False",
    spellings=(Spelling(nn.Upsample, fixed={"antialias": False}),),
)  # fmt: skip
_PADS: Mapping[str, tuple[type[nn.Module], ...]] = {
    "constant": (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}
PAD = Op("pad", F.pad, "input, pad, mode='constant', value=None", spellings=tuple(
    Spelling(module, rename={"padding": "pad"}, fixed={"mode": mode}) for mode in _PADS for module in _PADS[mode]
))  # fmt: skip
PIXEL_SHUFFLE = Op(
    "pixel_shuffle", F.pixel_shuffle, "input, upscale_factor", functions=(torch.pixel_shuffle,),
    modules=(nn.PixelShuffle,),
)  # fmt: skip

FLATTEN = Op(
    "flatten", torch.flatten, "input, start_dim=0, end_dim=-1", methods=("flatten",), modules=(nn.Flatten,),
)  # fmt: skip
RESHAPE = Op("reshape", torch.Tensor.reshape, "input, *shape", methods=("reshape", "view"), spellings=(
    Spelling(torch.reshape, "input, shape"),
))  # fmt: skip
PERMUTE = Op("permute", torch.Tensor.permute, "input, *dims", methods=("permute",), spellings=(
    Spelling(torch.permute, "input, dims"),
))  # fmt: skip
TRANSPOSE = Op(
    "transpose", torch.transpose, "input, dim0, dim1", spellings=(
        Spelling("transpose"),
        Spelling(torch.swapaxes, "input, axis0, axis1", rename={"axis0": "dim0", "axis1": "dim1"}),
        Spelling(torch.swapdims),
        Spelling("swapaxes", "input, axis0, axis1", rename={"axis0": "dim0", "axis1": "dim1"}),
        Spelling("swapdims"),
    ),
)  # fmt: skip
SQUEEZE = Op("squeeze", torch.Tensor.squeeze, "input, *dim", functions=(torch.squeeze,), methods=("squeeze",))
UNSQUEEZE = Op("unsqueeze", torch.unsqueeze, "input, dim", methods=("unsqueeze",))
CHUNK = Op("chunk", torch.chunk, "input, chunks, dim=0", methods=("chunk",))
SPLIT = Op("split", torch.split, "tensor, split_size_or_sections, dim=0", tensors=("tensor",), spellings=(
    Spelling("split", "tensor, split_size, dim=0", rename={"split_size": "split_size_or_sections"}),
))  # fmt: skip
GETITEM = Op("getitem", operator.getitem, "input, index")
CONTIGUOUS = Op("contiguous", torch.Tensor.contiguous, "input", spellings=(
    Spelling("contiguous", "input, *, memory_format=None"),
))  # fmt: skip
# The other kinds of dropout are this op only where they do nothing.
_INACTIVE: dict[str, Any] = {"must": {"training": False}, "fixed": {"training": False}}
DROPOUT = Op("dropout", F.dropout, "input, p=0.5, training=True, inplace=False", modules=(nn.Dropout,), spellings=(
    Spelling(torch.dropout, "input, p, train", rename={"train": "training"}, fixed={"inplace": False}),
    *(Spelling(function, "input, p=0.5, training=True, inplace=False", **_INACTIVE)
      for function in (F.dropout1d, F.dropout2d, F.dropout3d)),
    *(Spelling(function, "input, p=0.5, training=False, inplace=False", **_INACTIVE)
      for function in (F.alpha_dropout, F.feature_alpha_dropout)),
    *(Spelling(module, must={"training": False})
      for module in (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)),
))  # fmt: skip

VOCABULARY: tuple[Op, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Op))


def _op_named(name: str) -> Op:
    return next(op for op in VOCABULARY if op.name == name)


CONVS = (CONV1D, CONV2D, CONV3D)
CONV_TRANSPOSES = (CONV_TRANSPOSE1D, CONV_TRANSPOSE2D, CONV_TRANSPOSE3D)


class Dictionary:
    """Look-up from canonical target or from spelling to :class:`Op`."""

    def __init__(self, ops: Iterable[Op]) -> None:
        self.ops = {op.name: op for op in ops}
        self._by_target: dict[Any, Op] = {op.target: op for op in self.ops.values()}
        self._by_spelling: dict[Any, tuple[Op, Spelling]] = {}
        for op in self.ops.values():
            for spelling in op.all_spellings():
                # A spelling with a signature of its own replaces the plain one of the same function.
                self._by_spelling[spelling.what] = (op, spelling)

    def op_of(self, node: Node) -> Op | None:
        """The op of a canonical node, ``None`` for any other node."""
        if node.op != "call_function":
            return None
        op = self._by_target.get(node.target)
        return op if op is not None and op.is_canonical(node) else None

    def spelled(self, what: Any) -> tuple[Op, Spelling] | None:
        """The op and spelling of a function, method name or module class."""
        try:
            return self._by_spelling.get(what)
        except TypeError:  # an unhashable callable is nobody's spelling
            return None
