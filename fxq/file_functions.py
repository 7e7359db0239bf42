"""The functions and methods that a file may name: what a graph's nodes can call when it is read.

A list of what is allowed, and not of what is not: torch has functions that read or write where their arguments say
(``Tensor.new(cdata=...)`` takes an address), trust the indices of sparse tensors, or call Python back. Here are those
that compute dense tensors from dense tensors and check what they are given; for the few that do not check all of it,
there is :mod:`fxq.checked_functions`.
"""

from __future__ import annotations

import functools
import math
import operator
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fxq.aliases import after
from fxq.attention import multihead_attention, window_attention
from fxq.ops import VOCABULARY
from fxq.qdq import DEQUANTIZE, DEQUANTIZE_CHANNEL, QUANTIZE, QUANTIZE_AVERAGE

# Each as a function, as a method and in place, as far as torch has it.
_COMPUTE = """
abs absolute acos acosh add addbmm addcdiv addcmul addmm addmv addr all allclose amax amin aminmax angle any arccos
arccosh arcsin arcsinh arctan arctan2 arctanh argmax argmin argsort argwhere asin asinh atan atan2 atanh baddbmm
bincount bernoulli bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor bmm bucketize
cat ceil celu cholesky cholesky_solve clamp clamp_max clamp_min clip conj conj_physical copysign corrcoef cos cosh
count_nonzero cov cross cummax cummin cumprod cumsum cumulative_trapezoid deg2rad det diff digamma dist div divide dot
eq equal erf erfc erfinv exp exp2 expm1 fix float_power floor floor_divide fmax fmin fmod frac frexp gcd ge greater
greater_equal gt hardshrink heaviside histc hypot i0 igamma igammac imag inner inverse isclose isfinite isin isinf
isnan isneginf isposinf isreal kron kthvalue ldexp le lerp less less_equal lgamma log log10 log1p log2 log_softmax
logaddexp logaddexp2 logcumsumexp logdet logical_and logical_not logical_or logical_xor logit logsumexp lt matmul
matrix_exp matrix_power max maximum mean median min minimum mm mode msort mul multinomial multiply mv mvlgamma
nan_to_num nanmean nanmedian nanquantile nansum ne neg negative nextafter norm not_equal outer pinverse polygamma
positive pow prelu prod qr quantile rad2deg real reciprocal relu remainder renorm round rsqrt rsub selu sgn sigmoid
sign signbit sin sinc sinh slogdet softmax sort sqrt square std sub subtract sum svd tan tanh threshold topk trace
true_divide trunc var vdot where xlogy
"""
_ARRANGE = """
adjoint atleast_1d atleast_2d atleast_3d broadcast_to chunk clone contiguous detach diag diag_embed diagflat diagonal
diagonal_scatter dsplit fill flatten flip fliplr flipud gather hsplit index_add index_copy index_fill index_put
index_reduce index_select masked_fill masked_scatter masked_select moveaxis movedim narrow nonzero permute put ravel
repeat_interleave reshape resolve_conj resolve_neg roll rot90 scatter scatter_add scatter_reduce select select_scatter
slice_scatter split split_with_sizes squeeze swapaxes swapdims t take take_along_dim tensor_split tile transpose tril
triu unbind unflatten unsqueeze vsplit zero
"""
_ASK = "is_complex is_conj is_floating_point is_nonzero is_same_size is_signed numel"

_ONLY_FUNCTIONS = """
_assert adaptive_avg_pool1d adaptive_max_pool1d affine_grid_generator alpha_dropout arange as_tensor avg_pool1d
bartlett_window batch_norm bilinear binary_cross_entropy_with_logits blackman_window block_diag broadcast_tensors
can_cast cartesian_prod cdist channel_shuffle column_stack combinations complex concat concatenate constant_pad_nd
conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d cosine_similarity dropout dstack einsum
embedding empty empty_like eye feature_alpha_dropout feature_dropout full full_like group_norm hamming_window
hann_window hstack instance_norm kaiser_window layer_norm linspace logspace max_pool1d max_pool2d max_pool3d meshgrid
normal ones ones_like pairwise_distance pdist pixel_shuffle pixel_unshuffle polar promote_types rand rand_like randint
randint_like randn randn_like randperm range result_type rms_norm row_stack rrelu scalar_tensor stack std_mean tensor
tensordot trapezoid trapz tril_indices triu_indices vander var_mean view_as_complex view_as_real vstack zeros
zeros_like
"""
_ONLY_METHODS = """
bfloat16 bool byte cauchy_ cdouble cfloat char chalf copy_ cpu dim double element_size expand expand_as exponential_
fill_diagonal_ float geometric_ half int is_contiguous item log_normal_ long ndimension nelement new_empty new_full
new_ones new_tensor new_zeros normal_ random_ repeat requires_grad_ reshape_as short size storage_offset stride
sum_to_size to tolist type_as unfold uniform_ view view_as
"""
_PYTHON_METHODS = "istft norm split stft unflatten unique unique_consecutive"

# Of torch.nn.functional: no losses, nothing that follows unchecked offsets.
_NEURAL = """
adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool1d_with_indices adaptive_max_pool2d
adaptive_max_pool2d_with_indices adaptive_max_pool3d adaptive_max_pool3d_with_indices affine_grid alpha_dropout
batch_norm celu cross_entropy dropout dropout1d dropout2d dropout3d elu elu_ embedding feature_alpha_dropout fold glu
grid_sample group_norm gumbel_softmax hardsigmoid hardswish hardtanh hardtanh_ instance_norm interpolate layer_norm
leaky_relu leaky_relu_ local_response_norm log_softmax logsigmoid lp_pool1d lp_pool2d lp_pool3d max_pool1d
max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices max_unpool1d
max_unpool2d max_unpool3d mish mse_loss multi_head_attention_forward normalize one_hot pad relu relu6 rms_norm rrelu
scaled_dot_product_attention selu sigmoid silu softmax softmin softplus softshrink softsign tanh tanhshrink threshold
unfold upsample upsample_bilinear upsample_nearest
"""
_TENSOR_FUNCTIONS = """
atleast_1d atleast_2d atleast_3d block_diag broadcast_shapes broadcast_tensors cartesian_prod cdist einsum istft
meshgrid norm split stft tensordot unique unique_consecutive
"""
_FFT = """
fft fft2 fftfreq fftn fftshift hfft ifft ifft2 ifftn ifftshift ihfft irfft irfft2 irfftn rfft rfft2 rfftfreq rfftn
"""
_LINALG = "det inv matmul matrix_norm norm pinv solve svd svdvals vector_norm"

# Arithmetic, comparison and indexing only: operator.call and methodcaller would let a file call anything.
_OPERATORS = """
abs add and_ eq floordiv ge getitem gt index invert is_ le lt matmul mod mul ne neg not_ or_ pos pow sub truediv xor
iadd isub imul itruediv ifloordiv imod setitem
"""


@functools.cache
def functions() -> dict[str, Callable[..., Any]]:
    """Every function that a file may call, by the name that it has there."""
    named: dict[str, Callable[..., Any]] = {f"op:{op.name}": op.target for op in VOCABULARY}
    named |= {"fxq:quantize": QUANTIZE, "fxq:quantize_average": QUANTIZE_AVERAGE}
    named |= {"fxq:dequantize": DEQUANTIZE, "fxq:dequantize_channel": DEQUANTIZE_CHANNEL}
    named |= {f"fxq:{f.__name__}": f for f in (multihead_attention, window_attention, after)}
    named |= {f"builtins:{function.__name__}": function for function in (dict, getattr, len, list, max, min)}
    named |= {"collections:OrderedDict": OrderedDict}
    named |= {f"math:{f.__name__}": f for f in (math.ceil, math.floor, math.prod, math.sqrt)}
    named |= {f"operator:{name}": getattr(operator, name) for name in _OPERATORS.split()}
    both = [*_COMPUTE.split(), *_ARRANGE.split()]
    plain = [*both, *(f"{name}_" for name in both), *_ASK.split(), *_ONLY_FUNCTIONS.split()]
    for prefix, source, names in (
        ("torch", torch, plain),
        ("functional", F, _NEURAL.split()),
        ("torch.functional", torch.functional, _TENSOR_FUNCTIONS.split()),
        ("torch.fft", torch.fft, _FFT.split()),
        ("torch.linalg", torch.linalg, _LINALG.split()),
    ):
        named |= {f"{prefix}:{name}": getattr(source, name) for name in names if hasattr(source, name)}
    return named


@functools.cache
def tensor_methods() -> frozenset[str]:
    """Every method of a tensor that a file may call."""
    both = [*_COMPUTE.split(), *_ARRANGE.split()]
    names = [*both, *(f"{name}_" for name in both), *_ASK.split(), *_ONLY_METHODS.split()]
    native = {name for name in names if isinstance(getattr(torch.Tensor, name, None), types.MethodDescriptorType)}
    return frozenset(native | set(_PYTHON_METHODS.split()))
