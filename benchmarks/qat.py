"""The cost of a step of quantization-aware training: float, fxq and torch.ao side by side, taking turns.

A step is forward, loss, backward and SGD. Each model does one after the other for a number of rounds; the fastest of
each counts, because everything else on the machine only adds. CPU time is shown beside it, for machines that are busy.

    python benchmarks/qat.py                                  mobilenet_v2, batches of 16 at 224x224, one thread
    python benchmarks/qat.py --model resnet18 --threads 2
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import fxq
from fxq.models import load_model


def torch_ao(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """The same model under torch.ao's FX quantization-aware training with its defaults."""
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    return prepare_qat_fx(copy.deepcopy(model), get_default_qat_qconfig_mapping("x86"), (x,))


class Trainer:
    """A model with its optimizer; keeps the time of each step."""

    def __init__(self, model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> None:
        self.model, self.x, self.labels = model, x, labels
        self.optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def step(self) -> None:
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = F.cross_entropy(self.model(self.x), self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.cpu_seconds.append(time.process_time() - cpu_start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilenet_v2")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = load_model(args.model).train()
    x, labels = torch.randn(args.batch_size, 3, args.size, args.size), torch.randint(0, 1000, (args.batch_size,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = {"float": copy.deepcopy(model), "torch.ao": torch_ao(model, x)}
    models |= {"fxq": fxq.prepare_qat(model, x), "fxq, learned scales": fxq.prepare_qat(model, x, learn_scales=True)}
    trainers = {name: Trainer(one.train(), x, labels) for name, one in models.items()}
    for _ in tqdm(range(args.rounds + 1), "rounds"):
        for trainer in trainers.values():
            trainer.step()
    best = {name: (min(t.seconds[1:]), min(t.cpu_seconds[1:])) for name, t in trainers.items()}
    peer, peer_cpu = best["torch.ao"]
    rows = [(name, wall * 1e3, wall / peer, cpu * 1e3, cpu / peer_cpu) for name, (wall, cpu) in best.items()]
    headers = ("step", "ms", "of torch.ao", "CPU ms", "of torch.ao")
    print(tabulate(rows, headers, floatfmt=("", ".0f", ".2f", ".0f", ".2f")))


if __name__ == "__main__":
    main()
