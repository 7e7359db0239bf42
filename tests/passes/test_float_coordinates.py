"""Positions at which images are sampled are computed in float, whatever the image's size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.numerics import sqnr


class Warp(nn.Module):
    """Samples features at each pixel's place plus a flow, as optical flow and restoration nets do."""

    def __init__(self, join) -> None:
        super().__init__()
        self.features, self.flow = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(3, 2, 3, 1, 1)
        self.last, self.join = nn.Conv2d(8, 4, 1), join

    def forward(self, x):
        features, flow = self.features(x), self.flow(x)
        height, width = x.shape[2], x.shape[3]
        ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.stack((xs, ys)).float() + flow
        grid = self.join(places, width, height).permute(0, 2, 3, 1)
        return self.last(F.grid_sample(features, grid, align_corners=True))


def joined(places, width, height):
    return torch.cat((places[:, :1] * 2 / (width - 1) - 1, places[:, 1:] * 2 / (height - 1) - 1), 1)


def scaled(places, width, height):
    return places / ((width - 1) / 2) - 1


@pytest.mark.parametrize("join", [joined, scaled])
def test_positions_are_float_at_any_size(join):
    torch.manual_seed(0)
    model = Warp(join).eval()
    qmodel = fxq.quantize(model, [torch.randn(2, 3, 32, 32) for _ in range(2)], progress=False)
    for size in (32, 64):
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            assert sqnr(model(x), qmodel(x)) > 20
    table = fxq.graph_table(qmodel)
    assert "positions need" in table
    assert not any(record["op"] in ("add", "cat") and record["type"] == "int8" for record in fxq.graph_records(qmodel))


def test_what_is_sampled_stays_int8():
    qmodel = fxq.quantize(Warp(scaled).eval(), [torch.randn(2, 3, 32, 32)], progress=False)
    convs = [record for record in fxq.graph_records(qmodel) if "conv2d" in record["op"]]
    assert len(convs) == 3 and all(record["type"] == "int8" for record in convs)


class Counting(nn.Module):
    """Adds the number of each token to it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.first(x) + torch.arange(x.shape[1]).float().unsqueeze(1))


def test_numbers_counted_up_to_a_size_are_added_in_float():
    torch.manual_seed(0)
    qmodel = fxq.quantize(Counting().eval(), [torch.randn(2, 16, 8)], progress=False)
    adds = [record for record in fxq.graph_records(qmodel) if record["op"] == "add"]
    assert [record["type"] for record in adds] == ["float"]
