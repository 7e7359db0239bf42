"""Small models, and the pipeline up to a pass, for the tests of tracing, passes and the plan."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fxq.backends import get_backend
from fxq.config import QConfigMapping
from fxq.graph_module import QuantModule
from fxq.lockstep import observers_off
from fxq.op_table import Backend
from fxq.ops import VOCABULARY, Dictionary
from fxq.pass_base import Pass, Pipeline
from fxq.passes.canonicalize import Canonicalize
from fxq.plan import QuantPlan, Reason
from fxq.preparation import prepare_passes
from fxq.presets import get_preset
from fxq.qdq import is_dequantize, is_quantize
from fxq.tracing import trace

OPS = Dictionary(VOCABULARY)
_RANDOM = (("running_mean", -1, 1), ("running_var", 0.5, 2), ("weight", 0.5, 1.5), ("bias", -1, 1))


class Lambda(nn.Module):
    """A model of some named parts and a forward; parts are traced as modules, BatchNorm gets random statistics."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.function = forward
        randomize(self)
        self.eval()

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


class Two(Lambda):
    """A :class:`Lambda` of two inputs."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:  # type: ignore[override]
        return self.function(self, x, y)


def checked(m: nn.Module, x: torch.Tensor) -> Any:
    """A forward with checks of every kind; not in a test module, because pytest rewrites what asserts there."""
    assert x.dim() == 4, f"not an image: {x.shape}"
    assert not x.is_complex()
    assert x.shape[1] == 3 and x.shape[2] > 0
    if x.shape[1] != 3:
        raise ValueError(f"{x.shape[1]} channels")
    print("called")
    return m.a(x)  # type: ignore[operator]


def randomize(model: nn.Module) -> nn.Module:
    """Give every norm layer statistics and an affine map that a test cannot miss."""
    for module in model.modules():
        for name, low, high in _RANDOM:
            tensor = getattr(module, name, None)
            norm = hasattr(module, "running_var") or isinstance(module, (nn.GroupNorm, nn.LayerNorm))
            if norm and isinstance(tensor, torch.Tensor):
                tensor.data.uniform_(low, high)
    return model


def fresh(model: nn.Module, *inputs: Any, **keywords: Any) -> QuantModule:
    """The traced model with an empty plan."""
    module, untraceable = trace(model, inputs, keywords)
    module.meta["fxq"] = QuantPlan("x86", untraceable=untraceable)
    return module


def canonical(model: nn.Module, *inputs: Any, **keywords: Any) -> QuantModule:
    """The traced and canonicalized model."""
    module = fresh(model, *inputs, **keywords)
    Pipeline([Canonicalize(OPS)])(module)
    return module


def before(
    last: type[Pass], model: nn.Module, *inputs: Any, backend: Backend | str = "x86", qconfig: Any = None,
    exclude: Any = (),
) -> tuple[QuantModule, Pass]:  # fmt: skip
    """The module as prepare hands it to the pass of class ``last``, and that pass."""
    table = get_backend(backend) if isinstance(backend, str) else backend
    mapping = qconfig or QConfigMapping()
    module = fresh(model, *inputs)
    Pipeline([Canonicalize(table.dictionary)])(module)
    steps = prepare_passes(table, mapping.resolved(table, exclude), (inputs, {}), get_preset("default"))
    at = next(position for position, step in enumerate(steps) if type(step) is last)
    Pipeline(steps[:at])(module)
    return module, steps[at]


def run(step: Pass, module: QuantModule) -> int:
    """Run one pass with its checks."""
    return Pipeline([step])(module)[step.name]


def run_exactly(step: Pass, module: QuantModule, *inputs: Any) -> int:
    """Run a pass that changes constants: the output stays equal in float, and a second run changes nothing."""
    expected = module(*inputs)
    count = run(step, module)
    torch.testing.assert_close(module(*inputs), expected, rtol=1e-4, atol=1e-4)
    text = graph_text(module)
    assert run(step, module) == 0
    assert graph_text(module) == text
    return count


def op_names(module: QuantModule) -> list[str]:
    """Names of the canonical ops in order; other calls by their target."""
    found = []
    for node in module.graph.nodes:
        if node.op.startswith("call_"):
            op = OPS.op_of(node)
            found.append(op.name if op else str(getattr(node.target, "__name__", node.target)))
    return found


def graph_text(module: QuantModule) -> str:
    """The graph as text, to see that a pass changed nothing."""
    return "\n".join(node.format_node() or "" for node in module.graph.nodes)


def reason(module: QuantModule, name: str) -> Reason | None:
    """Why a node stays float; ``None`` if it does not."""
    return module.plan.decisions[name].reason


def same(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Assert that two outputs, however nested, are equal within a float tolerance."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def quiet(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Call with the warnings of torch about its own future silenced."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deprecated.*")
        return function(*arguments, **keywords)


def int8_ops(module: QuantModule) -> set[str]:
    """Names of the nodes of a lowered graph that run on integers."""
    return {name for name, kernel in module.plan.kernels.items() if kernel.name.startswith(("quantized::", "aten::"))}


def quantizes(module: QuantModule) -> int:
    return sum(is_quantize(node) for node in module.graph.nodes)


def dequantizes(module: QuantModule) -> int:
    return sum(is_dequantize(node) for node in module.graph.nodes)


def batches(shape: Sequence[int] = (2, 3, 8, 8), count: int = 2) -> list[torch.Tensor]:
    return [torch.randn(*shape) for _ in range(count)]


def conv(cin: int = 3, cout: int = 4, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, kernel, **{"padding": kernel // 2, **options})


def interpreted(module: QuantModule, *args: Any) -> dict[str, Any]:
    """The value of every node, from torch.fx's own interpreter."""
    found = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n):
            found[n.name] = super().run_node(n)
            return found[n.name]

    with observers_off(module), torch.no_grad():
        Recorder(module).run(*args)
    return found
