"""Small configurations of models of more libraries, for benchmarks/other_models.py."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Batch = Callable[[int, int], Any]
Spec = tuple[str, str, dict[str, Any], Batch]  # module, class, options, inputs


def _noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _images(size: int) -> Batch:
    return lambda number, seed: _noise(seed, number, 3, size, size)


def _tokens(number: int, seed: int) -> torch.Tensor:
    return torch.randint(1, 99, (number, 16), generator=torch.Generator().manual_seed(seed))


def _sample(channels: int, size: int, key: str = "sample", context: int = 0) -> Batch:
    def batch(number: int, seed: int) -> dict[str, Any]:
        given: dict[str, Any] = {key: _noise(seed, number, channels, size, size), "timestep": torch.full((number,), 10)}
        return given | ({"encoder_hidden_states": _noise(seed + 1, number, 7, context)} if context else {})

    return batch


def _plain_sample(number: int, seed: int) -> dict[str, Any]:
    return {"sample": _noise(seed, number, 3, 32, 32)}


_UNET = {"layers_per_block": 1, "sample_size": 16}
_CROSS = {
    "block_out_channels": (32, 64), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 32, "attention_head_dim": 8,
}  # fmt: skip
_CODER = {
    "block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 8,
}  # fmt: skip
_DIT = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "num_layers": 2, "sample_size": 8}
_VIT = {"image_size": 64, "patch_size": 16, "num_classes": 10, "dim": 64, "depth": 2, "heads": 4, "mlp_dim": 128}
_SWINIR = {
    "img_size": 32, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 2], "window_size": 8, "mlp_ratio": 2,
    "upscale": 2, "upsampler": "pixelshuffle",
}  # fmt: skip
_SEANET = {"channels": 1, "n_filters": 8, "dimension": 32, "ratios": [4, 2], "norm": "weight_norm", "causal": True}


def _diffusers() -> dict[str, Spec]:
    blocks = {
        "block_out_channels": (32, 32), "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    tiny = {"encoder_block_out_channels": (32, 32), "decoder_block_out_channels": (32, 32),
            "num_encoder_blocks": (1, 2), "num_decoder_blocks": (2, 1)}  # fmt: skip
    sd3 = {"sample_size": 8, "patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 1,
           "attention_head_dim": 8, "num_attention_heads": 4, "caption_projection_dim": 32,
           "joint_attention_dim": 32, "pooled_projection_dim": 64}  # fmt: skip
    sana = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
            "num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32,
            "caption_channels": 32, "sample_size": 8}  # fmt: skip
    latent = _sample(4, 8, "hidden_states", 32)

    def labels(number: int, seed: int) -> dict[str, Any]:
        return _sample(4, 8, "hidden_states")(number, seed) | {"class_labels": torch.zeros(number, dtype=torch.long)}

    def pooled(number: int, seed: int) -> dict[str, Any]:
        return latent(number, seed) | {"pooled_projections": _noise(seed + 2, number, 64)}

    found: dict[str, tuple[dict[str, Any], Batch]] = {
        "UNet2DModel": (_UNET | blocks | {"in_channels": 3, "out_channels": 3}, _sample(3, 16)),
        "UNet2DConditionModel": (_UNET | _CROSS, _sample(4, 16, context=32)),
        "AutoencoderKL": (_CODER, _plain_sample),
        "VQModel": (_CODER, _plain_sample),
        "AutoencoderTiny": (tiny, _plain_sample),
        "DiTTransformer2DModel": (_DIT | {"patch_size": 2, "norm_num_groups": 4}, labels),
        "SD3Transformer2DModel": (sd3, pooled),
        "SanaTransformer2DModel": (sana, latent),
    }
    return {name: ("diffusers", name, *rest) for name, rest in found.items()}


def _vit_pytorch() -> dict[str, Spec]:
    classes = {"vit": "ViT", "simple_vit": "SimpleViT", "deepvit": "DeepViT", "parallel_vit": "ViT", "rvt": "RvT",
               "vit_for_small_dataset": "ViT", "learnable_memory_vit": "ViT"}  # fmt: skip
    found: dict[str, tuple[str, dict[str, Any]]] = {module: (name, _VIT) for module, name in classes.items()}
    found["cait"] = "CaiT", _VIT | {"cls_depth": 1}
    found["xcit"] = "XCiT", _VIT | {"cls_depth": 1, "local_patch_kernel_size": 3}
    found["levit"] = "LeViT", {"image_size": 64, "num_classes": 10, "stages": 3, "dim": (32, 48, 64), "depth": 1,
                               "heads": (2, 2, 2), "mlp_mult": 2}  # fmt: skip
    found["max_vit"] = "MaxViT", {"num_classes": 10, "dim_conv_stem": 16, "dim": 16, "dim_head": 8, "depth": (1, 1),
                                  "window_size": 4}  # fmt: skip
    return {name: (f"vit_pytorch.{name}", *rest, _images(64)) for name, rest in found.items()}


def _spandrel() -> dict[str, Spec]:
    found: dict[str, tuple[str, dict[str, Any]]] = {
        "SwinIR": ("SwinIR", _SWINIR),
        "Swin2SR": ("Swin2SR", _SWINIR),
        "DRCT": ("DRCT", _SWINIR | {"gc": 8}),
        "OmniSR": ("OmniSR", {"num_feat": 16, "block_num": 1, "window_size": 8, "res_num": 2, "up_scale": 2}),
        "SPAN": ("SPAN", {"num_in_ch": 3, "num_out_ch": 3, "feature_channels": 16, "upscale": 2}),
        "SAFMN": ("SAFMN", {"dim": 16, "n_blocks": 2, "upscaling_factor": 2}),
        "PLKSR": ("PLKSR", {"dim": 16, "n_blocks": 2, "upscaling_factor": 2}),
        "MoSR": ("MoSR", {"n_block": 2, "dim": 16}),
        "NAFNet": (
            "NAFNet", {"width": 8, "middle_blk_num": 1, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]}),
        "RealCUGAN": ("UpCunet2x", {}),
    }  # fmt: skip
    size = {"RealCUGAN": 64}
    return {
        name: (f"spandrel.architectures.{name}", *rest, _images(size.get(name, 32))) for name, rest in found.items()
    }


def _sound() -> dict[str, Spec]:
    return {
        "SEANetEncoder": ("encodec.modules", "SEANetEncoder", _SEANET, lambda n, seed: _noise(seed, n, 1, 2400)),
        "SEANetDecoder": ("encodec.modules", "SEANetDecoder", _SEANET, lambda n, seed: _noise(seed, n, 32, 100)),
    }


def _perceivers() -> dict[str, Spec]:
    options = {"input_channels": 3, "input_axis": 2, "num_freq_bands": 4, "max_freq": 10.0, "depth": 2,
               "num_latents": 16, "latent_dim": 32, "cross_heads": 1, "latent_heads": 2, "cross_dim_head": 16,
               "latent_dim_head": 16, "num_classes": 10}  # fmt: skip
    linear = {"num_tokens": 99, "dim": 64, "seq_len": 16, "depth": 2, "heads": 4, "dim_head": 16, "k": 8}
    return {
        "Perceiver": ("perceiver_pytorch", "Perceiver", options, lambda n, seed: _noise(seed, n, 16, 16, 3)),
        "LinformerLM": ("linformer", "LinformerLM", linear, _tokens),
    }


MORE: dict[str, Callable[[], dict[str, Spec]]] = {
    "diffusers": _diffusers, "vit-pytorch": _vit_pytorch, "spandrel": _spandrel, "encodec": _sound,
    "perceiver": _perceivers,
}  # fmt: skip


def more_builders(library: str) -> dict[str, Callable[[], tuple[nn.Module, Batch]]]:
    """What makes each model of a library of :data:`MORE`, and its batches."""

    def build(spec: Spec) -> tuple[nn.Module, Batch]:
        module, name, options, batch = spec
        return getattr(importlib.import_module(module), name)(**options), batch

    return {name: lambda spec=spec: build(spec) for name, spec in MORE[library]().items()}
