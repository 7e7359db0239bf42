"""From a float model to a prepared one: the passes in order, for a whole model or for each of its regions."""

from __future__ import annotations

from torch import nn

from fxq.config import ResolvedConfig, qualified_name
from fxq.errors import InputError, TraceError
from fxq.graph_module import BACKEND, QuantModule
from fxq.hooks import forward_needs_hooks, gives_the_same
from fxq.op_table import Backend
from fxq.partition import (
    Inputs,
    Recording,
    join,
    leaves_to_search,
    prepare_leaves,
    prepare_partition,
    recording,
    runs,
)
from fxq.pass_base import Pass, Pipeline
from fxq.passes.absorb_bias import AbsorbBias
from fxq.passes.annotate import Annotate
from fxq.passes.canonicalize import Canonicalize
from fxq.passes.drop_identity import DropIdentity
from fxq.passes.drop_islands import DropIslands
from fxq.passes.equalize import Equalize
from fxq.passes.expose_projections import ExposeProjections
from fxq.passes.finish_training import TRAINABLE
from fxq.passes.float_attention import FloatAttention
from fxq.passes.float_coordinates import FloatCoordinates
from fxq.passes.float_exits import FloatExits
from fxq.passes.float_residuals import FloatResiduals
from fxq.passes.fold_batchnorm import FoldBatchNorm
from fxq.passes.fold_constants import FoldConstants
from fxq.passes.fold_ranks import FoldRanks
from fxq.passes.follow_mode import FollowMode
from fxq.passes.insert_fake_quantize import InsertFakeQuantize
from fxq.passes.insert_observers import InsertObservers
from fxq.passes.qat_conv_bn import AttachBatchNorm, DetachBatchNorm, Records
from fxq.passes.record_facts import RecordFacts
from fxq.passes.record_input_means import RecordInputMeans
from fxq.passes.rewrite_scalars import RewriteScalars
from fxq.passes.share_qparams import ShareQParams
from fxq.passes.smooth import Smooth
from fxq.plan import EXCLUDED, Origin, QuantPlan, Stage, float_decision
from fxq.presets import PRESETS, Preset
from fxq.tracing import trace
from fxq.training_table import training_table

_PLAIN = PRESETS["simple"]


def prepare_passes(
    table: Backend, config: ResolvedConfig, inputs: Inputs, preset: Preset = _PLAIN, borrow: bool = False
) -> list[Pass]:
    """What happens between the canonical graph and the prepared one, in order; some of it only if a preset asks."""
    ops = table.dictionary
    steps = [
        ExposeProjections(config),
        DropIdentity(ops),
        FoldConstants(ops),
        RecordFacts(*inputs, ops),
        FoldRanks(),
        FoldBatchNorm(ops, keep_sources=borrow),
        Equalize(config, inputs, ops),
        AbsorbBias(config, inputs, ops),
        RewriteScalars(ops),
        Annotate(table, config, ops),
        FloatAttention(table, ops),
        FloatResiduals(table, ops),
        FloatCoordinates(table, ops),
        FloatExits(table),
        DropIslands(table),
        ShareQParams(table, ops),
        InsertObservers(table),
        RecordInputMeans(ops),
        Smooth(config, ops),
    ]
    asked = {
        Equalize: preset.equalize,
        AbsorbBias: preset.equalize,
        Smooth: preset.smooth,
        RecordInputMeans: preset.correct_rounding,
    }
    return [step for step in steps if asked.get(type(step), True)]


def prepare_training_passes(table: Backend, config: ResolvedConfig, inputs: Inputs, model: nn.Module) -> list[Pass]:
    """The same for a model that will be trained: nothing that parameters enter is computed beforehand."""
    table = training_table(table)
    ops = table.dictionary
    batch_norms: Records = {}
    return [
        FollowMode(model, ops),
        DropIdentity(ops),
        FoldConstants(ops, parameters=False),
        RecordFacts(*inputs, ops),
        FoldRanks(),
        DetachBatchNorm(batch_norms, ops),
        RewriteScalars(ops),
        Annotate(table, config, ops),
        FloatAttention(table, ops),
        FloatResiduals(table, ops),
        FloatCoordinates(table, ops),
        FloatExits(table),
        DropIslands(table),
        ShareQParams(table, ops),
        InsertFakeQuantize(table),
        AttachBatchNorm(batch_norms, ops),
    ]


def prepare_model(
    model: nn.Module,
    inputs: Inputs,
    table: Backend,
    config: ResolvedConfig,
    *,
    training: bool = False,
    preset: Preset = _PLAIN,
    borrow: bool = False,
) -> nn.Module:
    """Prepare a model as one region; where it cannot be traced as a whole, its largest traceable submodules.

    Args:
        training: for training with fake quantization instead of calibration.
        preset: one that equalizes needs real inputs.
        borrow: what is prepared reads weights of the model, until :func:`fxq.copying.give_back`.

    Raises:
        TraceError: if nothing of it can be traced.
        ConfigError: if a name in ``config`` matches nothing.
    """
    known: list[tuple[Origin, str]] = []

    def region(module: nn.Module, its_inputs: Inputs, path: str) -> QuantModule:
        around = tuple(qualified_name(type(model.get_submodule(outer))) for outer in _ancestors(path))
        try:
            prepared, found = _prepare_region(
                module, its_inputs, path, around, table, config, known, training, preset, borrow
            )
        except InputError as error:
            if not runs(module, its_inputs):
                raise
            statement = f"what was traced fails where the model does not: {error}"
            message = f"{type(module).__name__} cannot be traced with torch.fx: {statement}"
            raise TraceError(message, statement) from error
        prepare_leaves(prepared, found, lambda part, given, inner: region(part, given, join(path, inner)))
        return prepared

    try:
        prepared: nn.Module = region(model, inputs, "")
    except TraceError as reason:
        prepared = prepare_partition(model, inputs, reason, region, borrow=borrow)
    config.check_names(known)
    if training:
        _restore_modes(prepared, model)
    return prepared


def _restore_modes(prepared: nn.Module, model: nn.Module) -> None:
    """Give each module the mode of the module at its path in the model, or of the nearest around it."""
    modes = {path: module.training for path, module in model.named_modules(remove_duplicate=False)}
    for path, module in prepared.named_modules():
        module.training = next(modes[outer] for outer in (*_ancestors(path), "") if outer in modes)


def _prepare_region(
    model: nn.Module,
    inputs: Inputs,
    path: str,
    around: tuple[str, ...],
    table: Backend,
    config: ResolvedConfig,
    known: list[tuple[Origin, str]],
    training: bool,
    preset: Preset,
    borrow: bool,
) -> tuple[QuantModule, Recording]:
    """A prepared region, with what its float modules got and did on the example inputs."""
    share = bool(path) and not borrow  # parts are of a copy
    # a part may get lists of another length, as that of the images in a batch
    needs_hooks = not path and not training and forward_needs_hooks(model, inputs)
    module, untraceable = trace(
        model, *inputs, follow_mode=training, share=share, borrow=borrow, unroll=not path, with_hooks=needs_hooks
    )
    if needs_hooks and not gives_the_same(module, model, inputs):
        statement = "its forward hooks do what a graph cannot"
        raise TraceError(f"{type(model).__name__} cannot be traced with torch.fx: {statement}", statement)
    plan = QuantPlan(table.name, notes=list(table.notes), model=type(model).__name__, untraceable=untraceable)
    module.meta["fxq"] = plan
    module.meta[BACKEND] = table
    ops = training_table(table).dictionary if training else table.dictionary
    Pipeline([Canonicalize(ops)])(module)
    if path:
        plan.origins = {name: _inside(path, around, origin) for name, origin in plan.origins.items()}
    for node in module.graph.nodes:
        op = ops.op_of(node)
        known.append((plan.origin(node.name), op.name if op else ""))
        if node.op == "call_module" and config.lookup(plan.origin(node.name), "") is None:
            plan.decisions[node.name] = float_decision(EXCLUDED)
    if training:
        passes = Pipeline(prepare_training_passes(table, config, inputs, model))
    else:
        passes = Pipeline(prepare_passes(table, config, inputs, preset, borrow=borrow))
    found = Recording()
    leaves = leaves_to_search(module)
    if leaves:
        with recording(module, leaves.values()) as found:
            passes(module)
    else:
        passes(module)
    for observer in map(module.get_submodule, plan.observers.values()) if path else ():
        observer.where = f"{observer.where} of the part '{path}'"  # type: ignore[assignment]
    if training:
        plan.properties.add(TRAINABLE)
    plan.stage = Stage.PREPARED
    return module, found


def _inside(path: str, around: tuple[str, ...], origin: Origin) -> Origin:
    """The origin as seen from the whole model; ``around`` are the types of the region and of the modules around it."""
    inner = origin.module_path
    return Origin(f"{path}.{inner}" if inner else path, origin.kind, origin.around + around)


def _ancestors(path: str) -> list[str]:
    """``a.b`` and ``a`` for ``a.b``."""
    parts = path.split(".") if path else []
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
