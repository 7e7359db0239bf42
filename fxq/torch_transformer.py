"""Lets torch.fx trace through ``nn.TransformerEncoder`` and its relatives.

torch takes them for leaves, and their forwards branch on values of masks and on whether a fused float kernel may run.
While a trace is under way, masks pass through unconverted (:func:`fxq.attention.multihead_attention` takes boolean and
float ones), the hint ``is_causal``, which changes no result, is not computed from them, and the fused kernel is off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules import transformer

LAYERS = (
    nn.TransformerEncoderLayer, nn.TransformerEncoder, nn.TransformerDecoderLayer, nn.TransformerDecoder,
    nn.Transformer,
)  # fmt: skip

_SAYS_OF_A_PROXY: tuple[tuple[Any, str, Callable[[Any], Any]], ...] = (
    (F, "_canonical_mask", lambda mask: mask),
    (F, "_none_or_dtype", lambda mask: None),
    (transformer, "_get_seq_len", lambda source: None),
    (transformer, "_detect_is_causal_mask", lambda mask: False),
)


@contextmanager
def traceable_transformers() -> Iterator[None]:
    """While open, the forwards of torch's transformer layers do not branch on proxies."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as stack:
            for owner, name, answer in _SAYS_OF_A_PROXY:
                stack.enter_context(mock.patch.object(owner, name, _unless_proxy(getattr(owner, name), answer)))
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _unless_proxy(function: Callable[..., Any], answer: Callable[[Any], Any]) -> Callable[..., Any]:
    def asked(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else kwargs.get("mask")
        return answer(first) if isinstance(first, fx.Proxy) else function(*args, **kwargs)

    return asked
