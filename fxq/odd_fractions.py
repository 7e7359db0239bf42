"""Scale ratios with which no product of an integer falls half way between two integers.

Kernels, runtimes and the reference graph multiply integers by ratios of scales and round; they differ in the last bits
of that product, so one next to a half becomes an integer here and its neighbour there. One such value in a hundred
thousand is enough to move the outputs of deep models apart. With ratios ``p / q`` of one odd ``q`` a half cannot be:
``2 * (p * i + r * j) = q * (2 * n + 1)`` has an even and an odd side. Every result is ``1 / (2 * q)`` or more away from
one, 1.2e-4 with the ``q`` taken here, which is more than float32 rounds off on the way to 255.
"""

from __future__ import annotations

import torch

LARGEST = 4095
_DENOMINATORS = torch.arange(2049, LARGEST + 1, 2, dtype=torch.float64)


def odd_fractions(ratios: torch.Tensor) -> torch.Tensor:
    """The nearest fractions with one odd denominator a row.

    Args:
        ratios: positive float64 ``[N, K]``.

    Returns:
        As many, of which the largest relative change in each row is as small as it can be.

    Example:
        >>> odd_fractions(torch.tensor([[0.3, 0.7]]).double()) * 3205
        tensor([[ 961.5000, 2243.5000]], dtype=torch.float64)
    """
    return torch.cat([_nearest(part) for part in ratios.split(32)])  # all denominators at once: 1 MiB


def _nearest(ratios: torch.Tensor) -> torch.Tensor:
    q = _DENOMINATORS[:, None, None]
    candidates = torch.round(ratios * q).clamp_(min=1) / q
    best = (candidates / ratios - 1).abs().amax(2).argmin(0)
    return candidates[best, torch.arange(len(ratios))]
