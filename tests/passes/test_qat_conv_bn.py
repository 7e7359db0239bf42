"""A layer and its BatchNorm trained as one: without rounding the float model, with rounding torch.ao's numbers."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import Lambda, same
from torch import nn

import fxq
from fxq.backends import get_backend
from fxq.conv_bn import channel_factor, normalize
from fxq.fake_quantize import fake_quantizes

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LAYERS = {
    "conv2d": (nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), X),
    "conv2d with bias, grouped": (nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6), X),
    "conv1d": (nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), torch.randn(4, 3, 8)),
    "conv3d": (nn.Conv3d(3, 6, 3), nn.BatchNorm3d(6), torch.randn(2, 3, 5, 5, 5)),
    "conv_transpose2d, grouped": (nn.ConvTranspose2d(3, 6, 3, groups=3), nn.BatchNorm2d(6), X),
    "linear": (nn.Linear(5, 6), nn.BatchNorm1d(6), torch.randn(7, 5)),
    "no affine map": (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False), X),
    "average of all batches": (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, momentum=None), X),
}


def net(layer: nn.Module, norm: nn.Module) -> nn.Module:
    return Lambda(lambda m, x: F.relu(m.norm(m.layer(x))), layer=copy.deepcopy(layer), norm=copy.deepcopy(norm)).train()


def step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """One step of SGD; returns the output before it."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    out = model(x)
    (out - 0.3).square().mean().backward()
    optimizer.step()
    return out


def targets(model: fxq.graph_module.QuantModule) -> list[object]:
    return [node.target for node in model.graph.nodes]


@pytest.mark.parametrize("name", LAYERS)
def test_without_rounding_it_trains_as_the_float_model(name):
    layer, norm, x = LAYERS[name]
    model = net(layer, norm)
    prepared = fxq.prepare_qat(model, x)
    assert normalize in targets(prepared)
    fxq.disable_fake_quant(prepared)
    for _ in range(3):
        same(step(prepared, x), step(model, x), 1e-4)
    state = prepared.state_dict()
    assert set(model.state_dict()) <= set(state)
    for key, value in model.state_dict().items():
        same(state[key], value, 1e-4)
    same(prepared.eval()(x), model.eval()(x), 1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_folding_is_exact(name):
    """The reference graph has the integers of the fake-quantized weights, and so the fake-quantized outputs."""
    layer, norm, x = LAYERS[name]
    prepared = fxq.prepare_qat(net(layer, norm), x)
    for _ in range(3):
        step(prepared, x)
    expected = prepared.eval()(x)
    actual = fxq.convert_to_reference(prepared)(x)
    output = next(fake for fake in fake_quantizes(prepared) if "relu" in fake.where)
    steps = (actual - expected).abs() / output.scale
    assert steps.max() < 1.01 and (steps > 0.5).float().mean() < 0.01


def test_frozen_statistics_stay_and_are_used():
    layer, norm, x = LAYERS["conv2d"]
    prepared = fxq.prepare_qat(net(layer, norm), x)
    step(prepared, x)
    fxq.freeze_batchnorm(prepared)
    fxq.freeze_observers(prepared)
    before = {key: value.clone() for key, value in prepared.named_buffers()}
    same(prepared(x), prepared.eval()(x))
    weight = prepared.get_parameter("norm.weight").clone()
    step(prepared.train(), x)
    assert all(torch.equal(value, before[key]) for key, value in prepared.named_buffers())
    assert not torch.equal(prepared.get_parameter("norm.weight"), weight)
    fxq.freeze_batchnorm(prepared, False)
    step(prepared, x)
    assert not torch.equal(prepared.get_buffer("norm.running_mean"), before["norm.running_mean"])


def test_a_batchnorm_in_eval_mode_stays_so():
    layer, norm, x = LAYERS["conv2d"]
    model = net(layer, norm)
    model.norm.eval()
    prepared = fxq.prepare_qat(model, x)
    fxq.disable_fake_quant(prepared)
    assert prepared.training and not prepared.get_submodule("norm").training
    for _ in range(2):
        same(step(prepared, x), step(model, x), 1e-4)
    same(prepared.get_buffer("norm.running_mean"), model.norm.running_mean, 0)
    prepared.train()
    step(prepared, x)
    assert not torch.equal(prepared.get_buffer("norm.running_mean"), model.norm.running_mean)


def test_a_gamma_of_zero_can_grow():
    layer, norm, x = LAYERS["conv2d"]
    model = net(layer, norm)
    nn.init.zeros_(model.norm.weight)
    prepared = fxq.prepare_qat(model, x)
    step(prepared, x)
    out = step(prepared, x)
    assert bool(out.isfinite().all())
    assert bool(prepared.get_parameter("norm.weight").grad.abs().sum() > 0)
    assert all(bool(parameter.grad.isfinite().all()) for parameter in prepared.parameters())


def test_a_module_called_twice_counts_both_batches():
    conv, norm, x = LAYERS["conv2d"]
    model = Lambda(
        lambda m, x: F.relu(m.norm(m.conv(x))) + F.relu(m.norm(m.conv(x * 2))), conv=conv, norm=copy.deepcopy(norm)
    ).train()
    prepared = fxq.prepare_qat(model, x)
    assert targets(prepared).count(normalize) == 2
    fxq.disable_fake_quant(prepared)
    same(step(prepared, x), step(model, x), 1e-4)
    same(prepared.get_buffer("norm.running_var"), model.norm.running_var, 1e-4)
    assert int(prepared.get_buffer("norm.num_batches_tracked")) == 2
    fxq.enable_fake_quant(prepared)
    step(prepared, x)
    same(fxq.convert_to_reference(prepared)(x), prepared.eval()(x), 1e-4)


def test_one_weight_before_two_batchnorms_is_trained_apart():
    """Its two scaled versions cannot have one grid: both BatchNorms stay ops of their own."""
    conv, norm, x = LAYERS["conv2d"]
    parts = {"conv": conv, "a": copy.deepcopy(norm), "b": nn.BatchNorm2d(6)}
    model = Lambda(lambda m, x: F.relu(m.a(m.conv(x))) + F.relu(m.b(m.conv(x))), **parts).train()
    prepared = fxq.prepare_qat(model, x)
    assert normalize not in targets(prepared)
    fxq.disable_fake_quant(prepared)
    same(step(prepared, x), step(model, x), 1e-4)
    fxq.enable_fake_quant(prepared)
    step(prepared, x)
    same(fxq.convert_to_reference(prepared)(x), prepared.eval()(x), 1e-4)


def test_an_excluded_layer_trains_in_float():
    layer, norm, x = LAYERS["conv2d"]
    model = Lambda(
        lambda m, x: m.head(F.relu(m.norm(m.layer(x)))), layer=layer, norm=copy.deepcopy(norm), head=nn.Conv2d(6, 4, 1)
    ).train()
    prepared = fxq.prepare_qat(model, x, exclude=["layer"])
    assert F.batch_norm in targets(prepared)
    for _ in range(2):
        step(prepared, x)
    qmodel = fxq.convert(prepared)
    assert F.batch_norm not in targets(qmodel)  # folded into the float layer
    same(fxq.convert_to_reference(prepared)(x), prepared.eval()(x), 1e-4)


def test_a_step_is_that_of_torch_ao():
    """Same model, same grids: the first batch sets both sides' ranges, then the losses and gradients are compared."""
    from torch.ao.quantization import QConfig, QConfigMapping
    from torch.ao.quantization.fake_quantize import FakeQuantize
    from torch.ao.quantization.observer import MinMaxObserver
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    x = torch.randn(4, 3, 8, 8)
    model = Lambda(
        lambda m, x: m.fc(F.relu(m.norm(m.conv(x))).flatten(1)),
        conv=nn.Conv2d(3, 4, 3, bias=False), norm=nn.BatchNorm2d(4), fc=nn.Linear(4 * 36, 5),
    ).train()  # fmt: skip
    spec = {"observer": MinMaxObserver, "reduce_range": False}
    peer_config = QConfig(
        activation=FakeQuantize.with_args(**spec, quant_min=0, quant_max=255, dtype=torch.quint8),
        weight=FakeQuantize.with_args(
            **spec, quant_min=-128, quant_max=127, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric
        ),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = prepare_qat_fx(copy.deepcopy(model), QConfigMapping().set_global(peer_config), (x,))
    weight = fxq.QuantSpec(dtype=torch.int8, quant_min=-128, quant_max=127, symmetric=True, observer="minmax")
    activation = get_backend("x86").activation.replace(observer="minmax")
    prepared = fxq.prepare_qat(model, x, qconfig=fxq.QConfig(activation=activation, weight=weight))
    peer(x), prepared(x)
    grids = _peer_grids(peer)
    for fake in fake_quantizes(prepared):  # the peer's weights use -128 too: take its grids
        scale, zero_point = grids[_kind(fake.where)]
        fake.scale.copy_(scale)
        fake.zero_point.copy_(zero_point)
    for name in ("running_mean", "running_var"):  # these have seen the first batch on another grid
        prepared.get_buffer(f"norm.{name}").copy_(peer.conv.bn.get_buffer(name))
    peer.apply(torch.ao.quantization.disable_observer)
    fxq.freeze_observers(prepared)
    same(step(prepared, x), step(peer, x), 1e-4)
    theirs = dict(peer.named_parameters())
    for name, parameter in prepared.named_parameters():
        peer_name = name.replace("norm.", "conv.bn.") if "norm" in name else name
        same(parameter.grad, theirs[peer_name].grad, 1e-4)
        same(parameter, theirs[peer_name], 1e-4)
    same(prepared.get_buffer("norm.running_var"), peer.conv.bn.running_var, 1e-4)


def _peer_grids(peer: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    found = {}
    for node in peer.graph.nodes:
        module = peer.get_submodule(node.target) if node.op == "call_module" else None
        if module is not None and "activation_post_process" in str(node.target):
            found[_kind(str(node.args[0]))] = module.scale, module.zero_point
        fake = getattr(module, "weight_fake_quant", None)
        if fake is not None:
            found[f"{node.target}.weight"] = fake.scale, fake.zero_point
    return found


def _kind(where: str) -> str:
    """One name for a tensor in both graphs."""
    for name in ("conv.weight", "fc.weight"):
        if name in where or name.replace(".", "_") in where:
            return name
    if "'x'" in where or where == "x":
        return "input"
    return next((key for key in ("fc", "flatten") if key in where), "conv")


def test_the_factor_divides_by_no_zero():
    var, gamma = torch.tensor([4.0, 1.0]), torch.tensor([0.0, -2.0])
    assert channel_factor(var, gamma, 0.0, batch=True).tolist() == [0.5, -2.0]
    assert channel_factor(var, gamma, 0.0, batch=False).tolist() == [0.0, -2.0]
    assert channel_factor(var, None, 0.0, batch=True).tolist() == [0.5, 1.0]
