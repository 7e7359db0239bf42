"""Training in two processes with DistributedDataParallel (gloo)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fxq
from fxq.fake_quantize import fake_quantizes

X = torch.linspace(-2, 2, 8 * 3 * 8 * 8).reshape(8, 3, 8, 8).sin()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(F.relu(self.norm(self.conv(x))).mean((2, 3)))


def train(model: nn.Module, x: torch.Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 0.5).square().mean().backward()
        optimizer.step()


def prepared(*, learn_scales: bool = False, frozen: bool = False) -> nn.Module:
    model = fxq.prepare_qat(Net().train(), X, learn_scales=learn_scales)
    if frozen:
        fxq.calibrate(model, [X])
        fxq.freeze_batchnorm(model)
        fxq.freeze_observers(model)
    return model


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    half = X[4 * rank : 4 * rank + 4]
    states = {}
    for name, options in (("frozen", {"frozen": True}), ("free", {}), ("learned", {"learn_scales": True})):
        model = prepared(**options)
        parallel = DistributedDataParallel(model)
        train(parallel, half)
        if name == "free":
            fxq.freeze_observers(parallel)  # switches reach through the wrapper
            fxq.freeze_batchnorm(parallel)
            parallel(half)  # brings the last step's buffers together
        states[name] = model.state_dict()
    torch.save(states, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_halves_train_as_one_batch(states):
    """With statistics and ranges frozen, the mean of two gradients is the gradient of the whole batch."""
    model = prepared(frozen=True)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    train(model, X)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(states[0]["frozen"][name], parameter.detach(), rtol=1e-4, atol=1e-5)
        assert not torch.equal(parameter, before[name])


@pytest.mark.parametrize("name", ["frozen", "free"])
def test_both_processes_have_one_model(states, name):
    ours, theirs = states[0][name], states[1][name]
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def test_learned_scales_start_alike_on_different_batches(states):
    steps = [key for key in states[0]["learned"] if key.endswith(".step")]
    assert len(steps) == len([fake for fake in fake_quantizes(prepared(learn_scales=True)) if fake.learns])
    assert all(torch.equal(states[0]["learned"][key], states[1]["learned"][key]) for key in steps)
