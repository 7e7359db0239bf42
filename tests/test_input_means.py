"""The means of a layer's input channels: of all places and samples, however they come."""

from __future__ import annotations

import copy

import pytest
import torch

from fxq.input_means import PLACES, InputMeans


def values(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)) + 2


@pytest.mark.parametrize(
    ("places", "shape", "axis"),
    [(2, (6, 4, 5, 7), 1), (1, (6, 4, 9), 1), (3, (6, 4, 2, 3, 2), 1), (0, (6, 4), 1), (0, (6, 9, 4), 2)],
)
def test_means_are_those_of_each_channel(places, shape, axis):
    x = values(*shape)
    means = InputMeans(4, places)
    means(x[:2])
    means(x[2:])
    expected = x.double().transpose(0, axis).flatten(1).mean(1)
    sample_means = x.double().movedim(axis, 1).reshape(6, 4, -1).mean(2)
    scatter = (sample_means - expected).square().sum() / 6 / 5
    shrunk = expected * (1 - scatter / expected.square().sum())
    torch.testing.assert_close(means.shrunken(), shrunk, rtol=1e-5, atol=1e-6)


def test_without_a_batch_dimension():
    x = values(2, 4, 5, 5)
    together, apart = InputMeans(4, 2), InputMeans(4, 2)
    together(x)
    for one in x:
        apart(one)
    torch.testing.assert_close(apart.shrunken(), together.shrunken())
    vector = InputMeans(4, 0)
    vector(values(4))
    assert int(vector.samples) == 1


def test_one_sample_and_no_signal_tell_nothing():
    means = InputMeans(4, 2)
    assert not means.shrunken().any()
    means(values(1, 4, 3, 3))
    assert not means.shrunken().any()
    means(values(1, 4, 3, 3))
    assert means.shrunken().all()
    noise = InputMeans(4, 0)
    noise(torch.tensor([[1.0, -1, 1, -1], [-1, 1, -1, 1]]))
    assert not noise.shrunken().any()


def test_a_large_image_is_sampled_evenly():
    x = torch.linspace(0, 1, 100).reshape(1, 1, 100, 1).expand(2, 1, 100, 80)
    means = InputMeans(1, 2)
    means(x)
    assert abs(means.shrunken().item() - 0.5) < 0.05
    tokens = InputMeans(1, 0)
    tokens(torch.linspace(0, 1, 10 * PLACES).reshape(1, -1, 1).expand(2, -1, 1))
    assert abs(tokens.shrunken().item() - 0.5) < 0.01


def test_off_it_records_nothing_and_its_state_can_be_kept():
    means = InputMeans(4, 0)
    means(values(8, 4))
    means.enabled = False
    means(100 * values(8, 4))
    other = InputMeans(4, 0)
    other.load_state_dict(copy.deepcopy(means.state_dict()))
    assert torch.equal(other.shrunken(), means.shrunken()) and int(other.samples) == 8
    assert repr(other) == "InputMeans(channels=4, samples=8)"


@pytest.mark.parametrize(("places", "shape"), [(0, (3, 0, 4)), (2, (0, 4, 5, 5)), (2, (2, 4, 0, 5)), (2, (8, 8))])
def test_nothing_and_what_the_layer_will_refuse_is_not_recorded(places, shape):
    means = InputMeans(4, places)
    means(values(*shape))
    assert int(means.samples) == 0 and not means.total.isnan().any()


@pytest.mark.parametrize("shape", [(7, 3), (1, 3), (5, 4, 3)])
def test_large_batches_are_added_up_in_parts(shape, monkeypatch):
    whole, parts = InputMeans(3, 0), InputMeans(3, 0)
    whole(values(*shape))
    monkeypatch.setattr("fxq.input_means._CHUNK", 7)
    parts(values(*shape))
    for name, expected in whole.named_buffers():
        torch.testing.assert_close(parts.get_buffer(name), expected)
