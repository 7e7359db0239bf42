"""Ratios of scales with which nothing is half way between two integers."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from fxq.odd_fractions import odd_fractions


@pytest.mark.parametrize("columns", [1, 2])
def test_fractions_share_an_odd_denominator_and_are_near(columns):
    generator = torch.Generator().manual_seed(0)
    given = 10 ** (-1.5 * torch.rand(300, columns, generator=generator, dtype=torch.float64) + 0.3)
    found = odd_fractions(given)
    assert (found / given - 1).abs().max() < 1.5e-3
    assert (found / given - 1).abs().mean() < 2e-4
    for row in found.tolist():
        fractions = [Fraction(value).limit_denominator(4095) for value in row]
        assert [float(fraction) for fraction in fractions] == pytest.approx(row, rel=1e-15)
        common = torch.tensor([fraction.denominator for fraction in fractions])
        assert (common % 2 == 1).all()
        assert common.prod() <= 4095 or torch.lcm(common[0], common[-1]) <= 4095


def test_sums_keep_away_from_halves():
    ratios = odd_fractions(torch.tensor([[0.37, 0.81]]).double())[0]
    numbers = torch.arange(-255, 256, dtype=torch.float64)
    sums = numbers[:, None] * ratios[0] + numbers * ratios[1]
    assert (sums - sums.floor() - 0.5).abs().min() > 1.2e-4


def test_tiny_ratios_are_not_zero():
    assert (odd_fractions(torch.tensor([[1e-9, 0.5]]).double()) > 0).all()
