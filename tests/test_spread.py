"""Samples kept while data is read: few, from everywhere, the same each time, and batches that nobody cuts wrongly."""

from __future__ import annotations

import math
from collections import UserDict

import pytest
import torch
from models_for_tests import Lambda
from torch import nn

import fxq
from fxq.backends import get_backend
from fxq.lockstep import samples_in
from fxq.spread import KeepSpread, in_pieces, spread_samples

SIZES = [(1, 500), (2, 64), (3, 100), (40, 32), (500, 1), (129, 1), (33, 7), (1000, 8)]


@pytest.mark.parametrize(("batches", "size"), SIZES)
def test_samples_are_few_and_from_everywhere(batches, size):
    rows = torch.arange(batches * size, dtype=torch.float32).view(batches, size, 1)
    data = KeepSpread(iter(rows), 64)
    held = []
    for seen, batch in zip(data, rows, strict=True):
        assert torch.equal(seen, batch)
        held.append(sum(map(samples_in, data._held)))
    kept = torch.cat(data.kept).flatten()
    assert 48 <= len(kept) <= 64 and max(held) <= max(128, size)
    assert torch.equal(kept, kept.sort().values) and len(kept.unique()) == len(kept)
    quarters = torch.histc(kept, 4, 0, batches * size)
    assert quarters.min() >= 8  # of 16 on average
    again = KeepSpread(rows, 64)
    assert len(list(again)) == len(again) == batches and torch.equal(torch.cat(again.kept).flatten(), kept)


def test_all_is_kept_of_little_data():
    data = KeepSpread([torch.ones(8, 2), torch.ones(8, 2)], 64)
    assert all(map(torch.equal, list(data), data.kept))


def test_nothing_is_kept_if_nothing_is_wanted():
    data = KeepSpread([torch.ones(8)], 0)
    assert len(list(data)) == 1 and data.kept == []


def test_tensors_in_a_batch_are_cut_together():
    x, mask = torch.arange(6).view(6, 1), torch.ones(3)
    (cut,) = spread_samples([{"x": x, "y": [x, "label"], "mask": mask}], 4)
    assert cut["x"].flatten().tolist() == [0, 1, 3, 4] and torch.equal(cut["y"][0], cut["x"])
    assert cut["y"][1] == "label" and cut["mask"] is mask
    assert cut["x"].untyped_storage().nbytes() == 4 * x.element_size()  # the rest can be freed
    assert spread_samples(["anything"], 1) == ["anything"]


def test_any_mapping_is_cut():
    data = KeepSpread([UserDict(x=torch.arange(32), scale=0.5) for _ in range(3)], 8)
    assert all(type(batch) is UserDict for batch in data)
    assert sum(len(kept["x"]) for kept in data.kept) == 8


def test_images_in_lists_are_not_cut():
    batch = ([torch.ones(3, 9, 9), torch.ones(3, 8, 8)], [{"boxes": torch.ones(2, 4)}] * 2)
    found = spread_samples([batch] * 40, 16)
    assert 0 < len(found) < 40 and all(kept is batch for kept in found)


def test_whole_batches():
    batches = list(torch.arange(80).view(10, 8, 1))
    assert [x[0].item() for x in spread_samples(batches, 32, whole=True)] == [0, 16, 40, 56]
    data = KeepSpread(batches, 8, whole=True)
    list(data)
    assert all(len(batch) == 8 for batch in data.kept)


def test_biases_are_corrected_on_sorted_data():
    """Where the first classes are not like the others, the mean error of all is taken out, not theirs."""
    torch.manual_seed(0)
    net = Lambda(lambda m, x: m.b(torch.relu(m.a(x))), a=nn.Linear(4, 16), b=nn.Linear(16, 3)).requires_grad_(False)
    data = [torch.randn(32, 4) * 0.1 + level for level in torch.linspace(-2, 2, 16).tolist()]
    weight = get_backend("qnnpack").weight.replace(quant_min=-3, quant_max=3, ch_axis=None)
    qconfig = fxq.QConfig(activation=get_backend("qnnpack").activation, weight=weight)
    prepared = fxq.prepare(net, torch.cat(data), qconfig=qconfig, backend="qnnpack")
    fxq.calibrate(prepared, data)
    reference = fxq.convert_to_reference(prepared)
    everything, spread = torch.cat(data), KeepSpread(data, 64)
    list(spread)

    def shift(batches):
        corrected = fxq.correct_bias(reference, prepared, batches, samples=64)
        return (corrected(everything) - net(everything)).mean(0).abs().max().item()

    assert shift(spread.kept) < 0.3 * shift(data[:2])


@pytest.mark.parametrize("whole", [False, True])
def test_what_a_model_does_to_its_input_does_not_reach_the_samples(whole: bool) -> None:
    data = KeepSpread([torch.arange(4), torch.arange(4, 8)], 8, whole=whole)
    for batch in data:
        batch.zero_()
    assert torch.equal(torch.cat(data.kept), torch.arange(8))


def test_no_more_samples_than_some_bytes_hold_or_the_first_batch_has() -> None:
    for limit, samples in ((math.inf, 8), (4.0 * 6 * 10, 6), (10.0, 4)):  # a sample has 10 numbers of 4 bytes
        data = KeepSpread(torch.rand(20, 2, 10).unbind(), 8, limit=limit)
        list(data)
        assert sum(len(batch) for batch in data.kept) == samples


def test_pieces_hold_the_same_samples() -> None:
    batches = [{"x": torch.arange(9), "scale": torch.ones(1)}, {"x": torch.arange(9, 12), "scale": torch.ones(1)}]
    pieces = in_pieces(batches)
    assert [len(piece["x"]) for piece in pieces] == [4, 4, 1, 3]
    assert torch.equal(torch.cat([piece["x"] for piece in pieces]), torch.arange(12))
    assert all(len(piece["scale"]) == 1 for piece in pieces)
