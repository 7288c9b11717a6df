"""Folders of random, tiny pipelines of the diffusers classes that the presets name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanImage,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.guiders.adaptive_projected_guidance_mix import AdaptiveProjectedMixGuidance
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

WIDTH = 16  # of every text encoder


def tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """A token for every byte."""
    letters = {letter: i + 3 for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE({"<pad>": 0, "<s>": 1, "</s>": 2, **letters}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=max_length, pad_token="<pad>",
                                   bos_token="<s>", eos_token="</s>")


def t5(vocabulary: int = 400) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=vocabulary, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                                   pad_token_id=0, eos_token_id=1))


def clip_config() -> CLIPTextConfig:
    return CLIPTextConfig(vocab_size=400, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2,
                          num_attention_heads=2, projection_dim=WIDTH, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def qwen() -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config={"vocab_size": 400, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 3,
                     "num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
                     "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 2]}},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": WIDTH,
                       "fullatt_block_indexes": [0]}))


def autoencoder(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=channels, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5)


def flux() -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8), guidance_embeds=True)
    return FluxPipeline(scheduler(), autoencoder(4), CLIPTextModel(clip_config()), tokenizer(77), t5(), tokenizer(512),
                        transformer)


def sd3() -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=2 * WIDTH, caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH, pos_embed_max_size=32, qk_norm="rms_norm", dual_attention_layers=(0,))
    text = T5EncoderModel(T5Config(vocab_size=400, d_model=2 * WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                                   pad_token_id=0, eos_token_id=1))
    return StableDiffusion3Pipeline(
        transformer, scheduler(), autoencoder(4), CLIPTextModelWithProjection(clip_config()), tokenizer(77),
        CLIPTextModelWithProjection(clip_config()), tokenizer(77), text, tokenizer(512))


def qwen_image() -> QwenImagePipeline:
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6))
    vae = AutoencoderKLQwenImage(base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1,
                                 temperal_downsample=[False, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    return QwenImagePipeline(scheduler(), vae, qwen(), tokenizer(2048), transformer)


def hunyuan_image() -> HunyuanImagePipeline:
    transformer = HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=WIDTH, text_embed_2_dim=WIDTH, rope_axes_dim=(8, 8))
    vae = AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32), layers_per_block=1,
        spatial_compression_ratio=2, sample_size=32, scaling_factor=0.5, downsample_match_channel=False,
        upsample_match_channel=False)
    return HunyuanImagePipeline(scheduler(), vae, qwen(), tokenizer(2048), t5(), ByT5Tokenizer(), transformer,
                                guider=AdaptiveProjectedMixGuidance(), ocr_guider=AdaptiveProjectedMixGuidance())


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


PIPELINES: dict[str, Callable[[], Any]] = {
    "flux.1-dev": flux, "sd3.5-large": sd3, "qwen-image": qwen_image, "hunyuan-image-2.1": hunyuan_image}


def write(name: str, folder: Path) -> DiffusionPipeline:
    """A pipeline of the class that the preset of that name loads."""
    torch.manual_seed(0)
    pipeline = PIPELINES[name]()
    pipeline.save_pretrained(folder, safe_serialization=True)
    return pipeline
