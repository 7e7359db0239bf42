"""What a file may call computes tensors; nothing in the list runs, opens, or follows an address that it is given."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F

from fxq.file_functions import functions, tensor_methods
from fxq.ops import VOCABULARY


def test_nothing_that_evaluates_imports_opens_or_calls_by_name() -> None:
    dangerous = {eval, exec, compile, open, __import__, setattr, delattr, vars, globals, operator.attrgetter}
    assert not dangerous & set(functions().values())
    assert not [name for name in functions() if name.split(":")[1].startswith("_") and name != "torch:_assert"]


@pytest.mark.parametrize(
    "name",
    [
        "new", "set_", "resize_", "resize_as_", "as_strided", "as_strided_", "data_ptr", "untyped_storage", "numpy",
        "apply_", "map_", "type", "to_sparse", "to_sparse_csr", "indices", "values", "col_indices", "to_dense",
        "to_mkldnn", "record_stream", "module_load", "register_hook", "backward", "share_memory_", "cuda",
        "pin_memory", "lcm", "lcm_", "__setstate__", "__reduce_ex__", "_make_subclass",
    ],
)  # fmt: skip
def test_no_method_that_trusts_its_arguments(name: str) -> None:
    assert name not in tensor_methods()


@pytest.mark.parametrize(
    "name",
    [
        "torch:from_file", "torch:frombuffer", "torch:load", "torch:save", "torch:empty_strided", "torch:as_strided",
        "torch:segment_reduce", "torch:sparse_coo_tensor", "torch:sparse_csr_tensor", "torch:lstm",
        "torch:embedding_bag", "torch:ctc_loss", "torch:quantize_per_tensor", "torch:embedding_renorm_",
        "functional:ctc_loss", "functional:embedding_bag", "functional:triplet_margin_with_distance_loss",
        "operator:call", "operator:attrgetter", "operator:methodcaller", "builtins:eval", "builtins:setattr",
    ],
)  # fmt: skip
def test_no_function_that_trusts_its_arguments(name: str) -> None:
    assert name not in functions()


def test_what_models_call_is_there() -> None:
    found = set(functions().values())
    assert {op.target for op in VOCABULARY} <= found
    assert {torch.roll, torch.arange, torch.einsum, torch.fft.rfft2, torch.linalg.vector_norm, F.grid_sample} <= found
    assert {"view", "expand", "masked_fill_", "softmax", "unbind", "split", "norm", "new_zeros"} <= tensor_methods()
