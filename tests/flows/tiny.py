"""Pipelines built from tiny configurations, without weights, tokenizers or a network."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

diffusers.logging.set_verbosity_error()
transformers.logging.set_verbosity_error()


def stable_diffusion(scheduler: Any = None, dtype: torch.dtype = torch.float64) -> Any:
    """A StableDiffusionPipeline with LoRA on its attention; 8x8 latents, 16x16 images."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=32,
            max_position_embeddings=8,
        )
    )
    with_lora(unet)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=None,
        unet=unet,
        scheduler=scheduler or DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )
    return ready(pipe, dtype)


def stable_diffusion_3(scheduler: Any = None, dtype: torch.dtype = torch.float64) -> Any:
    """A StableDiffusion3Pipeline with LoRA on its attention; 8x8 latents, 16x16 images."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        latent_channels=4,
        shift_factor=0.06,
        scaling_factor=1.5,
    )
    with_lora(transformer)
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        **dict.fromkeys(names),
    )
    return ready(pipe, dtype)


def with_lora(network: Any) -> None:
    """Freeze a network and add LoRA weights that are not zero, so that every factor has a gradient."""
    from peft import LoraConfig

    network.requires_grad_(False)
    network.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)


def ready(pipe: Any, dtype: torch.dtype) -> Any:
    """In one precision, quiet, nothing trainable but LoRA weights."""
    pipe.to(dtype=dtype)
    pipe.vae.requires_grad_(False)
    if getattr(pipe, "text_encoder", None) is not None:
        pipe.text_encoder.requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def network(pipe: Any) -> Any:
    """The pipeline's network."""
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def adapters(pipe: Any) -> list[Tensor]:
    """The LoRA weights."""
    return [p for p in network(pipe).parameters() if p.requires_grad]


def conditions(pipe: Any, guidance: float, batch: int = 2) -> dict[str, Any]:
    """Embeddings for a batch, in the words of the pipeline's own call."""
    dtype = next(network(pipe).parameters()).dtype
    if hasattr(pipe, "unet"):
        tokens = torch.randint(0, 32, (2 * batch, 8))
        embeds, negative = pipe.text_encoder(tokens)[0].detach().chunk(2)
    else:
        embeds, negative = torch.randn(2, batch, 5, 16, dtype=dtype)
    found = {"prompt_embeds": embeds.clone(), "guidance_scale": guidance}
    if not hasattr(pipe, "unet"):
        found["pooled_prompt_embeds"] = torch.randn(batch, 8, dtype=dtype)
    if guidance > 1:
        found["negative_prompt_embeds"] = negative.clone()
        if "pooled_prompt_embeds" in found:
            found["negative_pooled_prompt_embeds"] = torch.randn(batch, 8, dtype=dtype)
    return found


def latents(pipe: Any, batch: int = 2) -> Tensor:
    """Noise that requires grad."""
    dtype = next(network(pipe).parameters()).dtype
    return torch.randn(batch, 4, 8, 8, dtype=dtype, requires_grad=True)


def own_call(pipe: Any, start: Tensor, steps: int, output: str, **given: Any) -> Tensor:
    """The pipeline's own `__call__`, with a graph."""
    call = type(pipe).__call__.__wrapped__  # what torch.no_grad wraps
    result: Tensor = call(
        pipe,
        num_inference_steps=steps,
        latents=start,
        output_type=output,
        return_dict=False,
        height=16,
        width=16,
        **given,
    )[0]
    return result
