"""The kinds of diffusers pipelines: what sets one apart from another, and which are refused."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from thalweg.errors import ArgumentTypeError, UnsupportedError

Conditions = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Family:
    """What sets one kind of pipeline apart.

    Args:
        network: the name of its network.
        arguments: what the network's `forward` must take.
        predict: calls it.
        pooled: whether it has pooled embeddings.
        scales_latents: whether it multiplies by the scheduler's `init_noise_sigma` and `scale_model_input`.
        shifts_time: whether it tells the scheduler a time shift.
        shifts_latents: whether it adds the decoder's `shift_factor`.
    """

    network: str
    arguments: frozenset[str]
    predict: Callable[[Any, Tensor, Tensor, Conditions], Tensor]
    pooled: bool
    scales_latents: bool
    shifts_time: bool
    shifts_latents: bool


def _through_unet(network: Any, x: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
    output: Tensor = network(x, time, encoder_hidden_states=conditions["prompt_embeds"], return_dict=False)[0]
    return output


def _through_transformer(network: Any, x: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
    output: Tensor = network(
        hidden_states=x,
        timestep=time.expand(len(x)),
        encoder_hidden_states=conditions["prompt_embeds"],
        pooled_projections=conditions["pooled_prompt_embeds"],
        return_dict=False,
    )[0]
    return output


_FAMILIES = (
    Family(
        "unet",
        frozenset({"sample", "timestep", "encoder_hidden_states"}),
        _through_unet,
        pooled=False,
        scales_latents=True,
        shifts_time=False,
        shifts_latents=False,
    ),
    Family(
        "transformer",
        frozenset({"hidden_states", "timestep", "encoder_hidden_states", "pooled_projections"}),
        _through_transformer,
        pooled=True,
        scales_latents=False,
        shifts_time=True,
        shifts_latents=True,
    ),
)
KNOWN = "a text-to-image pipeline of the kind of StableDiffusionPipeline or StableDiffusion3Pipeline"
# further inputs that a network of the right signature may be configured to need
_FURTHER_INPUTS = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")


def family_of(pipeline: Any) -> Family:
    """The family of a pipeline, or a refusal that says why it belongs to none."""

    def refuse(why: str) -> ArgumentTypeError:
        mend = f"{why} Write its step yourself and pass it to thalweg.rollouts.rollout."
        return ArgumentTypeError("pipeline", type(pipeline), KNOWN, mend)

    for part in ("scheduler", "vae"):
        if getattr(pipeline, part, None) is None:
            raise refuse(f"It has no {part}.")
    call = _arguments(type(pipeline).__call__) if callable(pipeline) else frozenset()
    for name in ("image", "mask_image", "control_image"):
        if name in call:
            raise refuse(f"Its loop takes {name}.")
    for family in _FAMILIES:
        network = getattr(pipeline, family.network, None)
        if network is None:
            continue
        forward = base(network).forward
        found = _arguments(getattr(forward, "__func__", forward))
        if not family.arguments <= found or "img_ids" in found:
            raise refuse(f"Its {family.network}, {type(network).__name__}, takes other arguments.")
        for name in _FURTHER_INPUTS:
            if getattr(base(network).config, name, None) is not None:
                raise refuse(f"Its {family.network} needs further inputs ({name}).")
        if getattr(pipeline, "_all_hooks", None):
            raise UnsupportedError(
                f"{type(pipeline).__name__}: its parts are moved off the device between calls, and a "
                "backward would find them gone. Call pipeline.remove_all_hooks() and pipeline.to(device), "
                "and let Checkpointed(budget=...) make it fit"
            )
        return family
    raise refuse("It has neither a unet nor a transformer.")


@lru_cache(maxsize=64)
def _arguments(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def base(network: Any) -> Any:
    """The network below a compiler's or an adapter's wrapper."""
    network = getattr(network, "_orig_mod", network)
    return network.get_base_model() if hasattr(network, "get_base_model") else network


def time_shift(scheduler: Any, network: Any, latents: Tensor) -> float | None:
    """Stable Diffusion 3's `mu`: linear in the number of patches, for schedulers with dynamic shifting."""
    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        return None
    patches = math.prod(size // network.config.patch_size for size in latents.shape[2:])
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.16)
    slope = (high - low) / (many - few)
    return float(slope * patches + low - slope * few)
