"""The conversions of reference graphs round as kernels do."""

from __future__ import annotations

import torch

from fxq.qdq import QUANTIZE, QUANTIZE_AVERAGE


def test_quantize_average_takes_what_is_next_to_a_half_for_one() -> None:
    near = torch.tensor([0.5, 1.5, 2.5, 0.50005, 0.49995, 1.49995, 1.5003, 2.4997, 300.0, -9.0])
    got = QUANTIZE_AVERAGE(near, 1.0, 0, 0, 255, torch.uint8)
    assert got.tolist() == [0, 2, 2, 0, 0, 2, 2, 2, 255, 0]


def test_quantize_is_torchs_own_to_the_last_bit() -> None:
    """The packed kernels' entry; ties and what is next to them included."""
    x = torch.randn(200_003, generator=torch.Generator().manual_seed(0))
    for scale in (float(torch.tensor(0.0296841)), 1 / 256, float(torch.tensor(1 / 255))):
        ties = (torch.arange(-99, 99) + 0.5) * scale
        for zero_point in (0, 134, 135):
            for values in (x, ties):
                expected = torch.quantize_per_tensor(values, scale, zero_point, torch.quint8).int_repr()
                assert torch.equal(QUANTIZE(values, scale, zero_point, 0, 255, torch.uint8), expected)
