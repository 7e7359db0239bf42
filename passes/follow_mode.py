"""Let what behaves by its mode, as dropout and BatchNorm do, follow the mode of its module from now on.

A ``training`` argument that is a flag of the trace becomes a call of a :class:`~fxq.training_mode.Mode` module, put at
the path of the module whose mode it was, together with that module's tensors.
"""

from __future__ import annotations

from torch import fx, nn
from torch.fx import Node

from fxq.errors import ConfigError
from fxq.graph_module import QuantModule, free_path
from fxq.ops import BATCH_NORM, Dictionary
from fxq.pass_base import Pass
from fxq.plan import QuantPlan
from fxq.training_mode import Mode, ModeFlag, NormMode, weight_of_batch


class FollowMode(Pass):
    """Flags of the trace become calls of modules that tell their mode.

    Args:
        model: the float model, of which the BatchNorms' counters are taken.
    """

    requires = frozenset({"canonical"})

    def __init__(self, model: nn.Module, ops: Dictionary) -> None:
        self.model, self.ops = model, ops

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        changed = 0
        module.eval()  # float leaves have flags too, and passes run the graph
        for node in list(module.graph.nodes):
            flags = _flags(node)
            if not flags:
                continue
            is_norm = self.ops.op_of(node) is BATCH_NORM
            path = self._mode_path(flags[0].path, NormMode if is_norm else Mode, module)
            with module.graph.inserting_before(node):
                mode = module.graph.create_node("call_module", path, name=f"{node.name}_mode")
            node.args, node.kwargs = _replaced(node.args, mode), _replaced(node.kwargs, mode)
            if is_norm and getattr(self.model.get_submodule(flags[0].path), "momentum", 0.1) is None:
                self._average_all_batches(node, path, module)
            changed += 1
        return changed

    def _mode_path(self, path: str, kind: type[Mode], module: QuantModule) -> str:
        """Where the module that tells the mode is; it takes over the tensors that are at ``path``."""
        owner = module.get_submodule(path) if has_submodule(module, path) else None
        if type(owner) is kind:
            return path
        if owner is not None and (owner._modules or isinstance(owner, Mode)):
            path = free_path(module, f"{path}.mode".removeprefix("."))
            owner = None
        mode = kind()
        if owner is not None:
            mode._parameters.update(owner._parameters)
            mode._buffers.update(owner._buffers)
        if kind is NormMode:
            self._take_count(mode, path)
        module.add_submodule(path, mode.eval())
        return path

    def _take_count(self, mode: Mode, path: str) -> None:
        original = self.model.get_submodule(path) if has_submodule(self.model, path) else None
        if isinstance(original, nn.SyncBatchNorm):
            raise ConfigError(
                f"'{path}' is a SyncBatchNorm, which fxq cannot train with fake quantization; use BatchNorm, with "
                f"fxq.freeze_batchnorm where a process has too few images for statistics of its own"
            )
        counter = None if original is None else original._buffers.get("num_batches_tracked")
        if counter is not None:
            mode.register_buffer("num_batches_tracked", counter.detach().clone())

    @staticmethod
    def _average_all_batches(node: Node, path: str, module: QuantModule) -> None:
        """Without a momentum all batches weigh the same in the running statistics."""
        with module.graph.inserting_before(node):
            counter = module.graph.get_attr(f"{path}.num_batches_tracked")
            momentum = module.graph.create_node(
                "call_function", weight_of_batch, (counter,), name=f"{node.name}_momentum"
            )
        args = list(node.args)
        args[BATCH_NORM.index("momentum")] = momentum
        node.args = tuple(args)


def has_submodule(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _flags(node: Node) -> list[ModeFlag]:
    found: list[ModeFlag] = []
    fx.node.map_aggregate(
        (node.args, node.kwargs), lambda value: found.append(value) if isinstance(value, ModeFlag) else None
    )
    return found


def _replaced(arguments: fx.node.Argument, mode: Node) -> fx.node.Argument:
    return fx.node.map_aggregate(
        arguments, lambda value: mode if isinstance(value, ModeFlag) else value
    )
