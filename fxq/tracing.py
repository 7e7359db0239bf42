"""Tracing an unmodified model; submodules that cannot be traced stay as float leaves, with the reason.

When a submodule's forward fails under tracing, the nodes it added are erased and one ``call_module`` takes
their place, so exactly the innermost module that cannot be traced is left out.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import dis
import functools
import inspect
import operator
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from fxq.compiled import SCRIPTED
from fxq.config import qualified_name
from fxq.containers import is_made_of_items, items_of
from fxq.copying import (
    READING_FUNCTIONS,
    borrowed,
    copy_container,
    copy_structure,
    copy_tensor,
    only_read,
    only_reads,
)
from fxq.errors import StageError, TraceError
from fxq.graph_module import QuantModule, get_attribute, set_tensor
from fxq.hooks import has_hooks, require_results
from fxq.input_checks import FIXED
from fxq.torch_transformer import LAYERS, traceable_transformers
from fxq.training_mode import mode_flags


class _Proxy(fx.Proxy):
    """A proxy that records ``x += y``, ``x[i] = y``, checks that raise and loops over the parts of a tensor: torch.fx
    would trace the first as ``x + y`` and refuse the others.
    """

    tracer: Tracer

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data" and self.tracer.assign_parameter(self.node, value):
            return
        if name not in ("node", "tracer"):  # torch.fx would keep it here and give back the object without it
            raise TypeError(f"sets the attribute {name!r} of a value that is traced")
        super().__setattr__(name, value)

    def __iter__(self) -> Iterator[fx.Proxy]:
        count = _unpacked(sys._getframe(1))
        count = _number_of_parts(self.node) if count is None else count
        if count is None:
            return self.tracer.iter(self)
        return iter([operator.getitem(self, number) for number in range(count)])

    def __len__(self) -> int:
        count = _number_of_parts(self.node)
        return super().__len__() if count is None else count

    def __bool__(self) -> bool:
        found = _demanded(sys._getframe(1))
        if found is None:
            return super().__bool__()
        demanded, message = found
        condition = self if demanded else self.tracer.create_proxy("call_function", operator.not_, (self,), {})
        self.tracer.create_proxy("call_function", torch._assert, (condition, message), {})
        return demanded


def _unpacked(frame: FrameType) -> int | None:
    """How many values a frame is unpacking, as in ``a, b = x``; ``None`` if it does something else."""
    doing = next((i for i in dis.get_instructions(frame.f_code) if i.offset >= frame.f_lasti), None)
    return int(doing.argval) if doing is not None and doing.opname == "UNPACK_SEQUENCE" else None


# Functions and methods that cut a tensor, with the name of the parameter that says in how many parts.
_CUTS: Mapping[Any, str] = {
    **dict.fromkeys((torch.chunk, "chunk"), "chunks"),
    **dict.fromkeys((torch.split, torch.functional.split, "split"), "split_size_or_sections"),
    **dict.fromkeys((torch.split_with_sizes, "split_with_sizes"), "split_sizes"),
}


def _number_of_parts(node: fx.Node) -> int | None:
    """In how many parts a node cuts a tensor, where its arguments tell; ``None`` of other nodes.

    A chunk of few values may give fewer than asked for, and then running what was traced fails.
    """
    name = _CUTS.get(node.target) if node.op in ("call_function", "call_method") else None
    how = node.kwargs.get(name, node.args[1] if len(node.args) > 1 else None) if name else None
    if isinstance(how, (list, tuple)):
        return len(how)
    return how if name == "chunks" and isinstance(how, int) else None


def _demanded(frame: FrameType) -> tuple[bool, str] | None:
    """The truth value without which the branch that a frame is at raises, as those of ``assert x`` and
    ``if not x: raise ValueError`` do, and the message of what is raised; ``None`` at any other instruction.
    """
    code = list(dis.get_instructions(frame.f_code))
    position = {instruction.offset: number for number, instruction in enumerate(code)}
    number = position[frame.f_lasti] + (code[position[frame.f_lasti]].opname == "TO_BOOL")
    jump = code[number]
    if not jump.opname.startswith("POP_JUMP") or "NONE" in jump.opname:
        return None
    jumps_if = "IF_TRUE" in jump.opname
    for branch, wanted in ((code[number + 1 :], jumps_if), (code[position[jump.argval] :], not jumps_if)):
        message = _raised_message(branch)
        if message is not None:
            return wanted, message
    return None


def _raised_message(code: Sequence[dis.Instruction]) -> str | None:
    """What is said by instructions that make an exception and raise it, and do nothing else; ``None`` of others.

    Where values are formatted into it, they are left out.
    """
    parts: list[str] = []
    for instruction in code:
        if instruction.opname.startswith("RAISE"):
            return "".join(parts) or "a check of the model fails"
        if "JUMP" in instruction.opname or instruction.opname.startswith(("STORE", "RETURN", "FOR_ITER", "POP_TOP")):
            return None
        if instruction.opname.startswith("FORMAT"):
            parts.append("...")
        elif instruction.opname == "LOAD_CONST" and isinstance(instruction.argval, str):
            parts.append(instruction.argval)
    return None


def _record_augmented(name: str) -> None:
    function = getattr(operator, f"i{name}")

    def augmented(self: _Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {}, name=name)

    setattr(_Proxy, f"__i{name}__", augmented)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    _record_augmented(_name)


SWITCHES = (bool, str, type(None))  # what branches are taken by

# Functions that torchvision keeps torch.fx out of and that consist of operations fxq knows; by their names, so that
# torchvision need not be installed.
_TRACED_INTO = frozenset({"torchvision.models.swin_transformer._patch_merging_pad"})

# torch.fx patches nn.Module itself while it traces, so only one trace can be under way.
_ONE_AT_A_TIME = threading.Lock()


class Tracer(fx.Tracer):
    """A ``torch.fx`` tracer that contains failures; ``untraceable`` maps module paths to reasons.

    It lets models that other threads run meanwhile pass through the patched ``nn.Module`` untouched.

    Args:
        inputs, keywords: example inputs; parameters of the model's forward they do not give keep their defaults.
        unroll: a list of tensors among them is traced as a list of that length.
        with_hooks: those of layers are traced, too.
    """

    def __init__(
        self,
        inputs: tuple[Any, ...] = (),
        keywords: Mapping[str, Any] | None = None,
        *,
        unroll: bool = False,
        with_hooks: bool = False,
    ) -> None:
        # Sizes are compared with max and min, which torch.fx records no more than it does other builtins by itself.
        super().__init__(autowrap_functions=(max, min))
        self._autowrap_search.append(builtins)
        self.inputs, self.keywords = inputs, keywords or {}
        self.unroll, self.with_hooks = unroll, with_hooks
        self.untraceable: dict[str, str] = {}
        self.assigned: dict[str, fx.Proxy] = {}  # what the model computed for parameters, by path
        self._thread = threading.get_ident()

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        if kind == "call_function" and qualified_name(target) in _TRACED_INTO:
            return target(*args, **kwargs)
        return super().create_proxy(kind, target, args, kwargs, *rest, **options)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """One placeholder a parameter of forward, also behind decorators and with ``**kwargs``, which torch.fx takes
        no defaults beside, and one for each of the inputs that ``*args`` takes.
        """
        self.graph._graph_namespace.create_name("self", None)  # which a module of that name would shadow
        parameters = list(inspect.signature(self.root.forward).parameters.values())
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
        if rest is not None:
            count = max(len(self.inputs) - len(positional), 0)
            optional = any(parameter.default is not parameter.empty for parameter in positional)
            default = None if optional else inspect.Parameter.empty  # nothing can be required after an optional one
            positional += [
                inspect.Parameter(f"{rest}_{number}", inspect.Parameter.POSITIONAL_ONLY, default=default)
                for number in range(count)
            ]
        named = positional + [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        given = dict(zip((parameter.name for parameter in positional), self.inputs, strict=False)) | dict(self.keywords)
        values = {parameter.name: self._placeholder(parameter, given) for parameter in named}
        for name in given.keys() - values.keys():  # those that **kwargs takes
            more = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            values[name] = self._placeholder(more, given)
        last = max((at for at, p in enumerate(positional) if p.kind is p.POSITIONAL_ONLY), default=-1)
        by_position = [values.pop(parameter.name) for parameter in positional[: last + 1]]
        # hooks, and a forward of its own, are traced as those of modules inside are
        own = self.root._forward_pre_hooks or self.root._forward_hooks or "forward" in vars(self.root)
        call = self.root._call_impl if own else functools.partial(root_fn, self.root)
        return functools.partial(call, *by_position, **values), []

    def _placeholder(self, parameter: inspect.Parameter, given: Mapping[str, Any]) -> Any:
        """What forward is traced with for a parameter: a proxy, or a switch, which callers cannot change later."""
        name, default = parameter.name, parameter.default
        proxy = self.create_proxy("placeholder", name, (), {})
        if default is not parameter.empty:
            proxy.node.args = (default,)  # callers may leave it out as before
        value = given.get(name, default)
        if self.unroll and _is_list_of_tensors(value):
            return self._members(proxy, value)
        if name in given and not isinstance(value, SWITCHES):
            return proxy
        message = f"{name} was {value!r} {FIXED} value"
        if value is None:
            # Not torch.fx's own check, which later passes would drop, for its result is unread.
            torch._assert(self.create_proxy("call_function", operator.is_, (proxy, None), {}), message)
        elif isinstance(value, (*SWITCHES, int, float, tuple, list)):
            torch._assert(operator.eq(proxy, value), message)
        return value

    def _members(self, proxy: fx.Proxy, value: list[Any]) -> list[fx.Proxy]:
        length = self.create_proxy("call_function", len, (proxy,), {})
        message = f"{proxy.node.target} had {len(value)} members {FIXED}s"
        torch._assert(operator.eq(length, len(value)), message)
        return [operator.getitem(proxy, number) for number in range(len(value))]

    def assign_parameter(self, node: fx.Node, value: Any) -> bool:
        """Let later reads of a parameter give what its ``data`` is set to, by layers that compute their weights anew in
        each call; whether that is all there is to it: nothing may have read the parameter before.
        """
        path = str(node.target)
        read = any(n is not node and n.op in ("get_attr", "call_module") and _reads(n, path) for n in self.graph.nodes)
        if node.op != "get_attr" or node.users or read or not isinstance(value, fx.Proxy):
            return False
        self.assigned[path] = value
        return True

    def _has_assigned(self, module_path: str) -> bool:
        return any(path.startswith(f"{module_path}.") for path in self.assigned)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self._has_assigned(module_qualified_name):
            return False
        if isinstance(m, torch.jit.ScriptModule):
            return True
        if self.with_hooks and has_hooks(m):
            return False
        return type(m) not in LAYERS and super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        _require_parameters(m, args, kwargs)
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, fx.Proxy):
                value.node  # noqa: B018  of an attribute such as x.hidden: made when first asked for, and kept
        last = next(reversed(self.graph.nodes), None)
        around, assigned = self.module_stack.copy(), dict(self.assigned)
        given = _Given(args, kwargs)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:  # whatever a forward may raise on a proxy: the module becomes a leaf
            path = self.path_of_module(m)
            self.assigned, self.module_stack = assigned, around
            if self._has_assigned(path):  # as a leaf it would read what was there before
                raise
            self.untraceable[path] = blocking_statement(error)
            self._erase_after(last)
            return self._call_leaf(path, given)

    def _call_leaf(self, path: str, given: _Given) -> fx.Proxy:
        """Call a module that could not be traced.

        A list or dict of its caller that it writes to becomes a value of the graph, of which the caller reads after the
        call what is in it then.
        """
        written = given.put_back()
        values = {id(held): self.create_proxy("call_function", type(held), (held,), {}) for held in written}
        args = tuple(values.get(id(value), value) for value in given.args)
        kwargs = {name: values.get(id(value), value) for name, value in given.kwargs.items()}
        called: fx.Proxy = self.create_proxy("call_module", path, args, kwargs)
        for held in written:
            for key, item in list(_items(held)):
                if isinstance(item, fx.Proxy):
                    held[key] = operator.getitem(values[id(held)], key)
        return called

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, dict) and dataclasses.is_dataclass(a):  # of torch.fx it would become an ordinary dict
            given = {field.name: getattr(a, field.name) for field in dataclasses.fields(a)}
            fields = {name: self.create_arg(value) for name, value in given.items() if value is not None}
            return self.create_node("call_function", type(a), (), fields)
        if is_made_of_items(a):
            return self.create_node("call_function", type(a), (self.create_arg(items_of(a)),), {})
        return super().create_arg(a)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        found = super().getattr(attr, attr_val, parameter_proxy_cache)
        if self.assigned and isinstance(found, fx.Proxy) and found.node.op == "get_attr":
            return self.assigned.get(str(found.node.target), found)
        return found

    def _erase_after(self, last: fx.Node | None) -> None:
        for node in reversed(list(self.graph.nodes)):
            if node is last:
                break
            self.graph.erase_node(node)


def _require_parameters(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise TypeError as a call does whose arguments a module does not take, which its caller may try out."""
    if module._forward_pre_hooks:  # which may give it other ones
        return
    try:
        signature = inspect.signature(module.forward, follow_wrapped=False)
    except ValueError:  # of TorchScript, for one
        return
    signature.bind(*args, **kwargs)


class _Given:
    """The arguments of a call, and what the lists and dicts among them hold before it."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self._before = [(held, held.copy()) for held in (*args, *kwargs.values()) if type(held) in (list, dict)]

    def put_back(self) -> list[Any]:
        """Let those that were written to hold again what they held, and return them."""
        written = [(held, before) for held, before in self._before if not _holds_the_same(held, before)]
        for held, before in written:
            held.clear()
            held.extend(before) if isinstance(held, list) else held.update(before)
        return [held for held, _ in written]


def _items(held: list[Any] | dict[Any, Any]) -> Iterable[tuple[Any, Any]]:
    return held.items() if isinstance(held, dict) else enumerate(held)


def _holds_the_same(held: Any, before: Any) -> bool:
    pairs = zip(_items(held), _items(before), strict=False)
    return len(held) == len(before) and all(one == other and a is b for (one, a), (other, b) in pairs)


def blocking_statement(error: BaseException) -> str:
    """One line: the error, and the file, line and statement of the model's code that raised it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_machinery(f.filename)]
    where = f" at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
    message = str(error).partition("\n")[0].partition(". ")[0]
    return f"{type(error).__name__}: {message}{where}"


def _reads(node: fx.Node, path: str) -> bool:
    """Whether a node reads the parameter at a path or calls a module that it is in."""
    return node.target == path if node.op == "get_attr" else path.startswith(f"{node.target}.")


def _is_list_of_tensors(value: Any) -> bool:
    return type(value) is list and bool(value) and all(isinstance(item, torch.Tensor) for item in value)


_TORCH_FOLDER = os.path.dirname(inspect.getfile(torch)) + os.sep


def _is_machinery(filename: str) -> bool:
    return filename.startswith((_TORCH_FOLDER, "<")) or filename == __file__


def trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    follow_mode: bool = False,
    share: bool = False,
    borrow: bool = False,
    unroll: bool = False,
    with_hooks: bool = False,
) -> tuple[QuantModule, dict[str, str]]:
    """Trace ``model`` in eval mode.

    Args:
        model: left as it is.
        args, kwargs: example inputs; parameters of ``forward`` they do not give are fixed at their defaults.
        follow_mode: the model may be in training mode, and every ``training`` argument in the graph is a
            :class:`~fxq.training_mode.ModeFlag`.
        share: let the result have the parameters of ``model``, which is a copy already, instead of its own.
        borrow: let it read weights where they are, until :func:`fxq.copying.give_back`.
        unroll: where a list of tensors among the inputs keeps anything from being traced, fix its length.
        with_hooks: trace hooks that return nothing, because the forward reads what they collect.

    Returns:
        The traced module and, for each float leaf that could not be traced, its path and the reason.

    Raises:
        StageError: if a module is in training mode.
        TraceError: if the model's own forward cannot be traced.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(f"the {model.original_name} cannot be traced with torch.fx: {SCRIPTED}", SCRIPTED)
    if not follow_mode:
        require_eval(model)
    modes = mode_flags(model) if follow_mode else contextlib.nullcontext()
    with _ONE_AT_A_TIME, _left_as_it_is(model, with_hooks) as put_back, traceable_transformers(), modes:
        try:
            graph, untraceable = _graph_of(model, args, kwargs, unroll, with_hooks)
        except Exception as error:
            statement = blocking_statement(error)
            raise TraceError(
                f"the forward of {type(model).__name__} cannot be traced with torch.fx: {statement}. "
                f"Quantize the submodules that do the work instead, e.g. model.backbone = fxq.quantize("
                f"model.backbone, ...), or move the data-dependent statement into a submodule of its own, which then "
                f"stays float",
                statement,
            ) from error
        for node in graph.nodes:  # else generated code enters its functions in a table that torch.fx keeps for good
            node.meta.pop("is_wrapped", None)
        put_back()  # the graph means the tensors that were there before
        module = QuantModule(model, graph, type(model).__name__)
        _independent_copy(module, graph, share, borrow)
    leaves = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    return module, {path: why for path, why in untraceable.items() if path in leaves}


def _graph_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], unroll: bool, with_hooks: bool
) -> tuple[fx.Graph, dict[str, str]]:
    """The graph of a model, and why modules could not be traced, by path."""
    tracer = Tracer(args, kwargs, with_hooks=with_hooks)
    graph = failure = None
    try:
        graph = tracer.trace(model)
    except Exception as error:
        failure = error
    if unroll and (failure or tracer.untraceable) and any(map(_is_list_of_tensors, (*args, *kwargs.values()))):
        again = Tracer(args, kwargs, unroll=True, with_hooks=with_hooks)
        with contextlib.suppress(Exception):
            unrolled = again.trace(model)
            if failure or len(again.untraceable) < len(tracer.untraceable):
                return unrolled, again.untraceable
    if failure:
        raise failure
    assert graph is not None
    return graph, tracer.untraceable


@contextlib.contextmanager
def _left_as_it_is(model: nn.Module, with_hooks: bool = False) -> Iterator[Callable[[], None]]:
    """Put back whatever tracing does to a model; what is yielded does so, earlier, for attributes that are proxies now.

    Tracing runs each forward on the model itself: forwards that store attributes would leave proxies behind, those
    that update a buffer in place would update it, and torch.fx adds the tensor constants it meets as attributes.
    """
    before = [(module, dict(vars(module))) for module in model.modules()]
    copies: dict[int, Any] = {}
    for module, _ in before:
        module.__dict__.update({name: copy_container(value) for name, value in vars(module).items()})
        module.__dict__["_buffers"] = {
            name: t if t is None else copy_tensor(t, copies) for name, t in module._buffers.items()
        }
        if not with_hooks:
            require_results(module)

    def put_back() -> None:
        for module, attributes in before:
            traced = [name for name in attributes if isinstance(vars(module).get(name), fx.Proxy)]
            vars(module).update({name: attributes[name] for name in traced})

    try:
        yield put_back
    finally:
        for module, attributes in before:
            for name in vars(module).keys() - attributes.keys():
                del module.__dict__[name]
            module.__dict__.update(attributes)  # cleared before, it would need twice the memory from now on


def require_eval(model: nn.Module) -> None:
    """Raise StageError if any module is in training mode."""
    for name, module in model.named_modules():
        if module.training:
            what = f"module '{name}' ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
            raise StageError(f"{what} is in training mode; call model.eval() first")


def seems_traceable(module: nn.Module) -> bool:
    """Whether a module's own forward can be traced when it is given just what it requires, without running it."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    parameters = inspect.signature(module.forward).parameters.values()
    required = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    with _ONE_AT_A_TIME, _left_as_it_is(module), traceable_transformers():
        try:
            Tracer(tuple(torch.empty(0) for _ in required)).trace(module)
        except Exception:
            return False
    return True


def _independent_copy(root: nn.Module, graph: fx.Graph, share: bool, borrow: bool) -> None:
    """Replace every tensor (unless to be shared) and leaf module that ``graph`` uses by a copy; ``root`` is a fresh
    GraphModule.

    Tensors and modules that were one object stay one object. ``copy.deepcopy`` of the model would refuse
    tensors that are computed from parameters, as the older weight_norm leaves them.
    """
    leaves = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    tensors = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    memo: dict[int, Any] = {}
    if borrow:
        memo = borrowed(_lent(root, graph, leaves))
    for path in sorted(leaves, key=len):  # a leaf before what is inside it: only the copy's insides may be replaced
        parent, _, name = path.rpartition(".")
        setattr(root.get_submodule(parent), name, copy_structure(root.get_submodule(path), memo))
    if share:
        return
    for path in tensors:
        value = get_attribute(root, path)
        if isinstance(value, torch.Tensor):
            set_tensor(root, path, copy_tensor(value, memo))


def _lent(root: nn.Module, graph: fx.Graph, leaves: Iterable[str]) -> Iterator[nn.Parameter]:
    """The parameters that a graph reads in no other way than as weights of torch's own layers and their functions."""
    called = [root.get_submodule(path) for path in leaves]
    known: list[nn.Module] = []
    others: list[nn.Module] = []
    for leaf in called:
        inside = list(leaf.modules())
        (known if all(map(only_reads, inside)) else others).extend(inside)
    arguments: list[nn.Parameter] = []
    elsewhere: list[Any] = []
    for node in graph.nodes:
        if node.op == "get_attr":
            value = get_attribute(root, str(node.target))
            lendable = isinstance(value, nn.Parameter) and all(u.target in READING_FUNCTIONS for u in node.users)
            (arguments if lendable else elsewhere).append(value)
    return only_read(known, others, elsewhere, arguments)
