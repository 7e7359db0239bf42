"""Quantize models of other libraries than torchvision with one call and say what became of them.

    python benchmarks/other_models.py --library timm --results timm.jsonl    # one process a model; resumable
    python benchmarks/other_models.py --library transformers --results transformers.jsonl --markdown
    python benchmarks/other_models.py --library smp --model "Unet resnet18"  # one model, one JSON line

Weights are random but alive, as of benchmarks/coverage.py, and configurations of transformers small, so that nothing
is downloaded. Each model is called as its users do: with a tensor, or with a dict of keyword inputs. SQNR compares all
float outputs with the float model's on a batch that calibration did not see, "another batch" on one of another size.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from coverage import append_row, read, shares, status
from more_libraries import MORE, more_builders
from random_models import make_alive
from torch import nn

import fxq
from fxq.numerics import sqnr
from fxq.torchvision_ops import import_torchvision

LIBRARIES = ("timm", "transformers", "smp", "pytorchcv", "ultralytics", "monai", *MORE)

Batch = Callable[[int, int], Any]  # of a batch size and a seed
Build = Callable[[], tuple[nn.Module, Batch]]

TIMM = """
resnet18:128 resnetv2_50:128 seresnet18:128 skresnet18:128 resnest14d:128 res2net50_14w_8s:128 regnety_002:128
efficientnet_b0:128 tf_efficientnetv2_b0:128 mobilenetv3_small_100:128 mobilenetv4_conv_small:128 ghostnet_100:128
rexnet_100:128 hrnet_w18_small:128 dla34:128 dpn48b:128 dm_nfnet_f0:96 convnext_atto:128 convnextv2_atto:128
coatnet_nano_rw_224:224 cait_xxs24_224:224 deit3_small_patch16_224:224 vit_tiny_patch16_224:224
swin_tiny_patch4_window7_224:224 swinv2_tiny_window8_256:256 levit_128s:224 twins_svt_small:224 poolformer_s12:128
mixer_s32_224:224 gmlp_ti16_224:224 crossvit_tiny_240:240 mobilevit_xxs:128 mobileone_s0:128 repvit_m0_9:128
fastvit_t8:128 edgenext_xx_small:128 davit_tiny:128 hiera_tiny_224:224 volo_d1_224:224 nest_tiny:224
tiny_vit_5m_224:224 mixnet_s:128 cspdarknet53:128 halonet26t:256 maxvit_nano_rw_256:256 inception_v4:128
efficientvit_b0:128 pvt_v2_b0:128 beit_base_patch16_224:224 coat_tiny:224 convit_tiny:224 convmixer_768_32:224
cpubone_nano:160 csatv2:160 cspnext_tiny:224 densenet264d:160 efficientformer_l1:224 efficientformerv2_s0:224
efficientvim_m1:160 efficientvit_m0:224 eva02_tiny_patch14_224:224 fasternet_t0:224 focalnet_tiny_srf:224
gcvit_xxtiny:224 hardcorenas_b:160 hgnetv2_b0:160 sam2_hiera_tiny:160 iformer_t:224 inception_next_atto:224
inception_resnet_v2:299 inception_v3:160 lcnetv2_small:160 lowformer_b0:224 test_mambaout:160 mobilenetv5_base:160
mvitv2_tiny:224 naflexvit_base_patch16_parfac_gap:384 nasnetalarge:160 nextvit_small:224 pit_ti_224:224
pnasnet5large:160 rdnet_tiny:224 repghostnet_050:224 selecsls42:160 legacy_seresnet18:160 sequencer2d_s:224
shvit_s1:224 starnet_s050:224 swiftformer_xs:224 swinv2_cr_tiny_224:224 tnt_s_legacy_patch16_224:224 tresnet_m:224
vgg11:160 visformer_tiny:224 vit_small_r26_s32_224:224 test_vit_relpos:160 samvit_base_patch16_224:224
vitamin_small_224:224 ese_vovnet19b_slim_dw:160 legacy_xception:160 xception41p:160 xcit_nano_12_p8_224:224
"""
PYTORCHCV = """
airnet50_1x64d_r16 alexnetb bagnet9 bam_resnet18 bninception cbam_resnet18 centernet_resnet18_voc cgnet_cityscapes
channelnet condensenet74_c8_g8 darknet53 densenet121 diaresnet10 dicenet_wd5 diracnet18v2 dla46xc dpn68
edanet_cityscapes efficientnet_b0 fbnet_cb fishnet99 ghostnet hardnet39ds hrnet_w18_small_v1 ibn_resnet50 igcv3_wd4
irevnet301 isqrtcovresnet18 linknet_cityscapes menet108_8x1_g3 mixnet_s mnasnet_small mobilenetv2_wd4
mobilenetv3_small_w7d20 octresnet10_ad2 peleenet preresnet18_wd4 proxylessnas_mobile pyramidnet110_a48_cifar10
regnetx002 resattnet56 revnet38 scnet50 selecsls42 shufflenet_g1_w3d4 shufflenetv2_wd2 simplepose_resnet18_coco sknet50
sparsenet121 spnasnet squeezenet_v1_1 sqnxt23_w1 unet_cityscapes vovnet27s xdensenet121_2 zfnet
"""
ULTRALYTICS = """
yolov3-tiny yolov5n yolov6n yolov8n yolov8n-cls yolov8n-obb yolov8n-pose yolov8n-seg yolov9t yolov10n yolo11n
yolo11n-seg yolo12n rtdetr-resnet50
"""
_2D: dict[str, Any] = {"spatial_dims": 2, "in_channels": 3, "out_channels": 2}
_VIT: dict[str, Any] = {"img_size": 64, "hidden_size": 96, "mlp_dim": 192, "num_heads": 4}
_DYNAMIC = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]}
MONAI: dict[str, dict[str, Any]] = {
    "UNet": {**_2D, "channels": (16, 32, 64), "strides": (2, 2), "num_res_units": 2},
    "BasicUNet": {**_2D, "features": (16, 16, 32, 32, 64, 16)},
    "AttentionUnet": {**_2D, "channels": (8, 16, 32), "strides": (2, 2)},
    "DynUNet": {**_2D, **_DYNAMIC},
    "VNet": {**_2D, "in_channels": 1},
    "SegResNet": _2D,
    "UNETR": {**_2D, **_VIT, "feature_size": 8},
    "SwinUNETR": {**_2D, "feature_size": 12},
    "DenseNet121": _2D,
}
SMP = """
Unet:resnet18 Unet:efficientnet-b0 Unet:mit_b0 UnetPlusPlus:resnet18 FPN:resnet18 PSPNet:resnet18
Linknet:resnet18 MAnet:resnet18 DeepLabV3Plus:resnet18 UPerNet:resnet18 Segformer:mit_b0
"""
_LAYERS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_TEXT = {**_LAYERS, "vocab_size": 99, "max_position_embeddings": 64}
_IMAGE = {**_LAYERS, "image_size": 64, "patch_size": 16}
_STAGES = {"hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 2, 1]}
_GPT2 = {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_T5 = {"vocab_size": 99, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
_SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
_SPEECH = {**_LAYERS, "conv_dim": (32,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
_RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 32}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "BertForSequenceClassification": ("Bert", _TEXT, "text"),
    "DistilBertForSequenceClassification": (
        "DistilBert", {"vocab_size": 99, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}, "text"),
    "RobertaForSequenceClassification": ("Roberta", _TEXT, "text"),
    "ModernBertForSequenceClassification": ("ModernBert", {**_TEXT, "pad_token_id": 0}, "text"),
    "GPT2LMHeadModel": ("GPT2", _GPT2, "text"),
    "LlamaForCausalLM": ("Llama", {**_TEXT, "num_key_value_heads": 2}, "text"),
    "T5EncoderModel": ("T5", _T5, "text"),
    "T5ForConditionalGeneration": ("T5", _T5, "sequences"),
    "ViTForImageClassification": ("ViT", _IMAGE, "image"),
    "Dinov2ForImageClassification": ("Dinov2", _IMAGE, "image"),
    "SwinForImageClassification": ("Swin", _SWIN, "image"),
    "Swinv2ForImageClassification": ("Swinv2", _SWIN, "image"),
    "ConvNextForImageClassification": ("ConvNext", _STAGES, "image"),
    "ResNetForImageClassification": ("ResNet", {**_STAGES, "embedding_size": 16}, "image"),
    "MobileNetV2ForImageClassification": ("MobileNetV2", {}, "image"),
    "SegformerForSemanticSegmentation": (
        "Segformer", {"hidden_sizes": [16, 32, 48, 64], "decoder_hidden_size": 32}, "image"),
    "CLIPVisionModel": ("CLIPVision", _IMAGE, "image"),
    "Wav2Vec2ForCTC": ("Wav2Vec2", _SPEECH, "sound"),
    "AlbertForSequenceClassification": ("Albert", _TEXT | {"embedding_size": 32}, "text"),
    "ElectraForSequenceClassification": ("Electra", _TEXT | {"embedding_size": 32}, "text"),
    "MobileBertForSequenceClassification": (
        "MobileBert", _TEXT | {"embedding_size": 32, "true_hidden_size": 32, "intra_bottleneck_size": 32}, "text"),
    "DebertaForSequenceClassification": ("Deberta", _TEXT | _RELATIVE, "text"),
    "DebertaV2ForSequenceClassification": ("DebertaV2", _TEXT | _RELATIVE | {"share_att_key": True}, "text"),
    "MPNetForSequenceClassification": ("MPNet", _TEXT, "text"),
    "SqueezeBertForSequenceClassification": ("SqueezeBert", _TEXT | {"embedding_size": 64}, "text"),
    "ConvBertForSequenceClassification": ("ConvBert", _TEXT | {"embedding_size": 64}, "text"),
    "RoFormerForSequenceClassification": ("RoFormer", _TEXT | {"embedding_size": 64}, "text"),
    "OPTForCausalLM": (
        "OPT", {**_LAYERS, "vocab_size": 99, "ffn_dim": 128, "max_position_embeddings": 64,
                "word_embed_proj_dim": 64}, "text"),
    "GPTNeoXForCausalLM": ("GPTNeoX", _TEXT, "text"),
    "BloomForCausalLM": ("Bloom", {"vocab_size": 99, "hidden_size": 64, "n_layer": 2, "n_head": 4}, "text"),
    "Qwen2ForCausalLM": ("Qwen2", _TEXT | {"num_key_value_heads": 2}, "text"),
    "GemmaForCausalLM": ("Gemma", _TEXT | {"num_key_value_heads": 2, "head_dim": 16}, "text"),
    "CLIPTextModel": ("CLIPText", _TEXT, "text"),
    "SiglipVisionModel": ("SiglipVision", _IMAGE, "image"),
    "DeiTForImageClassification": ("DeiT", _IMAGE, "image"),
    "BeitForImageClassification": ("Beit", _IMAGE, "image"),
    "ViTMSNForImageClassification": ("ViTMSN", _IMAGE, "image"),
    "IJepaForImageClassification": ("IJepa", _IMAGE, "image"),
    "DINOv3ViTModel": ("DINOv3ViT", _IMAGE, "image"),
    "YolosForObjectDetection": ("Yolos", _IMAGE | {"image_size": [64, 64], "num_detection_tokens": 8}, "image"),
    "ConvNextV2ForImageClassification": ("ConvNextV2", _STAGES, "image"),
    "RegNetForImageClassification": ("RegNet", _STAGES | {"embedding_size": 16, "groups_width": 8}, "image"),
    "PoolFormerForImageClassification": (
        "PoolFormer", {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}, "image"),
    "FocalNetForImageClassification": (
        "FocalNet", {"image_size": 64, "embed_dim": 16, "depths": [1, 1, 1, 1]}, "image"),
    "SwiftFormerForImageClassification": (
        "SwiftFormer", {"image_size": 64, "embed_dims": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}, "image"),
    "MobileViTV2ForImageClassification": ("MobileViTV2", {"image_size": 64, "width_multiplier": 0.5}, "image"),
    "TextNetForImageClassification": ("TextNet", {}, "image"),
    "HubertForCTC": ("Hubert", _SPEECH, "sound"),
    "WavLMForCTC": ("WavLM", _SPEECH, "sound"),
    "UniSpeechForCTC": ("UniSpeech", _SPEECH, "sound"),
}  # fmt: skip


def _inputs(kind: str, size: int = 64, channels: int = 3) -> Batch:
    def batch(number: int, seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        if kind in ("tensor", "image"):
            images = torch.randn(number, channels, size, size, generator=generator)
            return images if kind == "tensor" else {"pixel_values": images}
        if kind == "sound":
            return {"input_values": torch.randn(number, 4000, generator=generator)}
        mask = torch.ones(number, 16, dtype=torch.long)
        mask[0, 13:] = 0
        text = {"input_ids": torch.randint(3, 99, (number, 16), generator=generator), "attention_mask": mask}
        decoded = {"decoder_input_ids": torch.randint(3, 99, (number, 7), generator=generator)}
        return text | decoded if kind == "sequences" else text

    return batch


def builders(library: str) -> dict[str, Build]:
    """What makes each model of a library, and its batches."""
    import_torchvision()
    if library in MORE:
        return more_builders(library)
    if library == "timm":
        import timm

        sizes = dict(item.split(":") for item in TIMM.split())
        return {n: lambda n=n, s=s: (timm.create_model(n), _inputs("tensor", int(s))) for n, s in sizes.items()}
    if library == "smp":
        import segmentation_models_pytorch as smp

        pairs = [item.split(":") for item in SMP.split()]
        return {
            f"{a} {e}": lambda a=a, e=e: (smp.create_model(a, e, encoder_weights=None, classes=4), _inputs("tensor"))
            for a, e in pairs
        }
    if library == "pytorchcv":
        from pytorchcv.model_provider import get_model

        return {name: lambda name=name: _of_pytorchcv(get_model(name)) for name in PYTORCHCV.split()}
    if library == "ultralytics":
        return {name: lambda name=name: (_of_ultralytics(name), _inputs("tensor", 128)) for name in ULTRALYTICS.split()}
    if library == "monai":
        import monai.networks.nets as nets

        return {
            name: lambda name=name, o=options: (getattr(nets, name)(**o), _inputs("tensor", 64, o["in_channels"]))
            for name, options in MONAI.items()
        }
    import transformers

    def build(name: str) -> tuple[nn.Module, Batch]:
        config, options, kind = TRANSFORMERS[name]
        return getattr(transformers, name)(getattr(transformers, f"{config}Config")(**options)), _inputs(kind)

    return {name: lambda name=name: build(name) for name in TRANSFORMERS}


def _of_pytorchcv(model: nn.Module) -> tuple[nn.Module, Batch]:
    size = getattr(model, "in_size", (224, 224))[0]
    return model, _inputs("tensor", min(size, 224), getattr(model, "in_channels", 3))


def _of_ultralytics(name: str) -> nn.Module:
    from ultralytics.nn import tasks

    tasks_of = {"cls": "Classification", "obb": "OBB", "pose": "Pose", "seg": "Segmentation"}
    kind = "RTDETRDetection" if name.startswith("rtdetr") else tasks_of.get(name.rpartition("-")[2], "Detection")
    model: nn.Module = getattr(tasks, f"{kind}Model")(f"{name}.yaml", verbose=False)
    return model


class _Called(nn.Module):
    """A model as :func:`make_alive` calls it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Any:
        return call(self.model, batch)


def call(model: nn.Module, batch: Any) -> Any:
    """Call a model as its users do."""
    with torch.no_grad():
        return model(**batch) if isinstance(batch, dict) else model(batch)


def tensors_of(output: Any) -> list[torch.Tensor]:
    """The float tensors of an output, those of a cache of keys and values apart."""
    if isinstance(output, torch.Tensor):
        return [output.flatten()] if output.is_floating_point() else []
    items = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for item in items for tensor in tensors_of(item)]


def quality(model: nn.Module, qmodel: nn.Module, batch: Any) -> float:
    """SQNR of all float outputs.

    Raises:
        TypeError: if the output is of another type.
    """
    expected, actual = call(model, batch), call(qmodel, batch)
    if type(expected) is not type(actual):
        raise TypeError(f"{type(actual).__name__} instead of {type(expected).__name__}")
    return sqnr(torch.cat(tensors_of(expected)), torch.cat(tensors_of(actual)))


def measure(name: str, build: Build) -> dict[str, Any]:
    """The row of a model."""
    torch.manual_seed(0)
    model, batch = build()
    make_alive(_Called(model), (batch(2, 0),))
    start = time.process_time()
    qmodel = fxq.quantize(model, [batch(2, 0), batch(2, 1)], progress=False)
    seconds = time.process_time() - start
    return {
        "model": name, "status": status(qmodel), **shares(qmodel), "sqnr": quality(model, qmodel, batch(2, 2)),
        "another": quality(model, qmodel, batch(3, 3)), "seconds": seconds,
    }  # fmt: skip


def measure_apart(name: str, build: Build, seconds: float) -> dict[str, Any]:
    """The row of a model, measured in a fork of this process: importing a library takes longer than most models."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, name, build))
    process.start()
    sender.close()
    try:
        row = receiver.recv() if receiver.poll(seconds) else {"status": f"fails: took more than {seconds:g} seconds"}
    except EOFError:
        row = {"status": "fails: the process ended"}
    process.kill()
    process.join()
    return {"model": name} | row


def _send(sender: Connection, name: str, build: Build) -> None:
    try:
        sender.send(measure(name, build))
    except Exception as error:  # whatever a library's model or fxq raises is the row's status
        sender.send({"status": f"fails: {type(error).__name__}: {str(error).splitlines()[0]}"})


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; the reasons are those of nodes that stay float."""
    headers = ["model", "traced", "int8 MACs %", "SQNR dB", "another batch", "seconds", "float, why"]
    lines = [
        [row["model"], row["status"], row.get("int8_percent", ""),
         *(f"{row[key]:.1f}" if key in row else "" for key in ("sqnr", "another", "seconds")),
         "; ".join(f"{count} {why}" for why, count in row.get("float_nodes", {}).items())]
        for row in rows
    ]  # fmt: skip
    rows_of_text = [headers, ["---"] * len(headers), *([str(cell) for cell in line] for line in lines)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows_of_text)


def main() -> None:
    """Parse the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=LIBRARIES, required=True)
    parser.add_argument("--model", help="measure one model in this process and print its row as JSON")
    parser.add_argument("--results", type=Path, default=Path("other_models.jsonl"))
    parser.add_argument("--markdown", action="store_true", help="print the table of the results and stop")
    parser.add_argument("--seconds", type=float, default=300, help="limit of one model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.markdown:
        print(table(read(options.results)))
        return
    known = builders(options.library)
    if options.model:
        print(json.dumps(measure(options.model, known[options.model])))
        return
    done = {row["model"] for row in read(options.results)}
    for name in known:
        if name not in done:
            append_row(options.results, row := measure_apart(name, known[name], options.seconds))
            print(name, row["status"], row.get("int8_percent"), row.get("sqnr"), flush=True)


if __name__ == "__main__":
    main()
