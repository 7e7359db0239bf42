"""Some samples of data that may be read only once, spread over all of it.

Data that is sorted, by class or by time, begins with what is not typical of it. So for corrections, and to rank layers,
the one call keeps samples from everywhere, in memory for twice as many as are wanted: of every batch until there are
too many, then of every second, every fourth, and so on. The same data gives the same samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from fxq.lockstep import samples_in

_PIECE = 4  # samples that a batch is never cut below; the first axis of one image is no batch, but is shorter


def spread_samples(batches: Sequence[Any], samples: int, *, whole: bool = False) -> list[Any]:
    """About so many samples of some batches: a part of each, or where that would be too little, of evenly spaced ones.

    Args:
        batches: tensors, or tuples, lists and dicts; the tensors in a batch that are as long as its first one are
            cut to evenly spaced entries along the first axis.
        samples: what is wanted; more than the batches hold leaves them as they are.
        whole: cut no batch, because it is not known what one is.

    Example:
        >>> spread_samples([torch.arange(8), torch.arange(8, 16)], 8)
        [tensor([0, 2, 4, 6]), tensor([ 8, 10, 12, 14])]
    """
    if _count(batches) <= samples:
        return list(batches)
    share = max(samples // len(batches), _PIECE)
    pieces = list(batches) if whole else [_cut(batch, share) for batch in batches]
    number = min(len(pieces), max(1, len(pieces) * samples // _count(pieces)))
    return [pieces[at * len(pieces) // number] for at in range(number)]


def in_pieces(batches: Sequence[Any]) -> list[Any]:
    """The same samples in smaller batches, which take less memory to run.

    Example:
        >>> in_pieces([torch.arange(6)])
        [tensor([0, 1, 2, 3]), tensor([4, 5])]
    """
    return [_entries(batch, slice(at, at + _PIECE)) for batch in batches for at in range(0, samples_in(batch), _PIECE)]


class KeepSpread:
    """Data that remembers samples spread over all of it while it is read.

    Args:
        data: an iterable of batches.
        samples: to keep; up to twice as many, and at least one batch, are held.
        whole: as for :func:`spread_samples`.
        limit: keep no more samples than these bytes hold, than the first batch has, and than four.

    Example:
        >>> data = KeepSpread([torch.arange(0, 6), torch.arange(6, 12)], 8)
        >>> batches = list(data)
        >>> data.kept
        [tensor([0, 1, 3, 4]), tensor([ 6,  7,  9, 10])]
    """

    def __init__(self, data: Iterable[Any], samples: int, *, whole: bool = False, limit: float = math.inf) -> None:
        self.data, self.samples, self.whole, self.limit = data, samples, whole, limit
        self._held: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        self._held, every = [], 1
        for number, batch in enumerate(self.data):
            if number == 0:
                self.samples = int(min(self.samples, max(_PIECE, samples_in(batch), self.limit / _bytes_of_one(batch))))
            if self.samples and number % every == 0:
                own = dict(batch) if isinstance(batch, Mapping) and not self.whole else batch  # one that can be cut
                own = tree_map_only(torch.Tensor, torch.clone, own)  # a model may write to what it is given
                self._held = self._shortened([*self._held, own])
                if len(self._held) > 1 and _count(self._held) > 2 * self.samples:
                    self._held, every = self._held[::2], 2 * every
            yield batch

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    @property
    def kept(self) -> list[Any]:
        """The samples, in batches, in the order of the data that was read."""
        return spread_samples(self._held, self.samples, whole=self.whole)

    def taken(self) -> list[Any]:
        """The samples, of which no others are held any more."""
        kept, self._held = self.kept, []
        return kept

    def _shortened(self, batches: list[Any]) -> list[Any]:
        share = max(2 * self.samples // len(batches), _PIECE)
        return batches if self.whole else [_cut(batch, share) for batch in batches]


def _count(batches: Sequence[Any]) -> int:
    return sum(samples_in(batch) for batch in batches)


def _bytes_of_one(batch: Any) -> float:
    """Bytes of one sample of a batch."""
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
    return max(1.0, sum(tensor.nbytes for tensor in tensors) / max(1, samples_in(batch)))


def _cut(batch: Any, samples: int) -> Any:
    """Evenly spaced entries of a batch, copied, so that nothing keeps the others in memory."""
    length = samples_in(batch)
    if length <= samples:
        return batch
    chosen = torch.arange(samples) * length // samples
    return _entries(batch, chosen)


def _entries(batch: Any, chosen: torch.Tensor | slice) -> Any:
    """These entries of the tensors in a batch that are as long as its first one."""
    length = samples_in(batch)
    return tree_map_only(torch.Tensor, lambda x: x[chosen] if x.dim() and x.shape[0] == length else x, batch)
