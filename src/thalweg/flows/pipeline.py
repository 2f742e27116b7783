"""A reward through a diffusers pipeline, differentiated by the policy of the caller's choice."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from thalweg.errors import (
    ArgumentError,
    ArgumentTypeError,
    require_floating,
    require_integer,
)
from thalweg.flows.families import KNOWN, Conditions, base, family_of, time_shift
from thalweg.flows.schedule import State, read_schedule
from thalweg.noise import Key, normal
from thalweg.rollouts.rollout import rollout
from thalweg.rollouts.route import Policy
from thalweg.step import draw_key

_Embeddings = dict[str, tuple[Tensor | None, Tensor | None]]  # the positive and the negative ones


def through(
    pipeline: Any,
    latents: Tensor,
    steps: int,
    *,
    prompt_embeds: Tensor,
    guidance_scale: float,
    negative_prompt_embeds: Tensor | None = None,
    pooled_prompt_embeds: Tensor | None = None,
    negative_pooled_prompt_embeds: Tensor | None = None,
    eta: float = 0.0,
    decode: bool = True,
    then: Callable[[Tensor], Any] | None = None,
    gradient: Policy | None = None,
    key: Key | None = None,
) -> Any:
    """Sample from a diffusers pipeline, decode, and score, with a graph that fits.

    Choose it to train LoRA weights, latents or embeddings on a differentiable reward of the images, or on
    any loss of them. The steps are those of the pipeline's own `__call__` with its own scheduler, and
    `gradient` says how they are differentiated, as in `thalweg.rollouts.rollout`; the decoder and the reward
    stand inside the same policy, so that `Checkpointed` moves their memory too. The pipeline is not changed:
    scheduler, training flags, `.grad`. Its safety checker is not run.

    | pipeline | what it has | its timesteps, guidance, decoding |
    | --- | --- | --- |
    | Stable Diffusion 1 and 2 | `unet`, `vae`, `scheduler` | as in StableDiffusionPipeline |
    | Stable Diffusion 3 | `transformer`, `vae`, `scheduler` | as in StableDiffusion3Pipeline |

    Any scheduler will do whose steps are weighted sums of latents and network outputs, multistep methods
    included: DDIM, Euler, Heun, PNDM, LMS, DPM-Solver and DPM-Solver++, DEIS, flow matching; see
    `thalweg.flows.schedule`. Others are refused by name. Transforms as in the policy.

    Args:
        pipeline: the pipeline, with or without LoRA adapters; nothing is imported from diffusers.
        latents: standard normal noise, (batch, channels, height, width) of the latent space; the scheduler's
            first standard deviation is multiplied in, as the pipeline does.
        steps: what the pipeline calls `num_inference_steps`, at least 1.
        prompt_embeds: (batch, tokens, width), as `pipeline.encode_prompt` returns them.
        guidance_scale: classifier-free guidance; at most 1 for none.
        negative_prompt_embeds: of the same shape; needed with guidance.
        pooled_prompt_embeds: (batch, width), for Stable Diffusion 3.
        negative_pooled_prompt_embeds: of the same shape; needed with guidance there.
        eta: the share of fresh noise in [0, 1], for DDIM.
        decode: run the decoder; else the final latents are handed on.
        then: what to make of the images: a reward, a loss. Images are (batch, 3, height, width), nominally in
            [0, 1] and not clamped, because a clamp has no gradient outside; the pipeline's own images are
            `images.clamp(0, 1)`.
        gradient: the policy; None for `Backprop()`. For `Skipped` and masks the network is the pipeline's.
        key: the noise of stochastic samplers and random rules; None takes one from torch's generator.

    Returns:
        What `then` returns; without it the images, or the latents with `decode=False`.

    Raises:
        ArgumentError, ArgumentTypeError: a pipeline of another kind, or a wrong argument.
        UnsupportedError: a scheduler or a setting of the pipeline that cannot be served; the message says
            what can.
        NonFiniteError: the result holds nan or infinity.

    Paper:
        Prabhudesai, Goyal, Pathak, Fragkiadaki: Aligning Text-to-Image Diffusion Models with Reward
        Backpropagation. arXiv 2310.03739, 2023.

    Example:
        >>> from thalweg.rollouts import Checkpointed
        >>> def train(pipe, optimizer, reward, embeds, negative):
        ...     latents = torch.randn(len(embeds), 4, 64, 64)
        ...     loss = through(pipe, latents, 50, prompt_embeds=embeds, negative_prompt_embeds=negative,
        ...                    guidance_scale=7.5, then=lambda images: -reward(images).mean(),
        ...                    gradient=Checkpointed(budget="10GiB"))
        ...     loss.backward()
        ...     optimizer.step()
    """
    family = family_of(pipeline)
    network = getattr(pipeline, family.network)
    require_integer("steps", steps, 1)
    _require_latents(latents, base(network), pipeline)
    guidance = _number("guidance_scale", guidance_scale, 0.0, math.inf)
    eta = _number("eta", eta, 0.0, 1.0)
    if not isinstance(decode, bool):
        raise ArgumentTypeError("decode", decode, "True or False")
    if then is not None and not callable(then):
        raise ArgumentTypeError("then", then, "a function of the images, or None")
    given: _Embeddings = {"prompt_embeds": (prompt_embeds, negative_prompt_embeds)}
    pooled = (pooled_prompt_embeds, negative_pooled_prompt_embeds)
    if family.pooled:
        given["pooled_prompt_embeds"] = pooled
    elif any(value is not None for value in pooled):
        raise ArgumentError("pooled_prompt_embeds", pooled[0], f"None for {type(pipeline).__name__}")
    conditions = _conditions(given, len(latents), guidance > 1)
    mu = time_shift(pipeline.scheduler, base(network), latents) if family.shifts_time else None
    schedule = read_schedule(pipeline.scheduler, steps, eta=eta, mu=mu, scales_input=family.scales_latents)
    if key is None and schedule.noisy:
        key = draw_key()
    predict = family.predict
    scales = family.scales_latents and schedule.start != 1

    def step(network: Any, state: State, k: int, time: Tensor, key: Key | None = None) -> State:
        update = schedule.updates[k]
        now = _latest(state)
        seen = now if update.scale == 1 else now * update.scale
        if guidance > 1:
            seen = _doubled(seen)
        output = predict(network, seen, time, conditions)
        if guidance > 1:
            without, conditioned = output.chunk(2)
            output = torch.lerp(without, conditioned, guidance)
        noise = normal(now, key) if key is not None and update.noise else None
        return schedule.advance(k, state, output, noise)

    result = rollout(
        step,
        schedule.begin(latents * schedule.start if scales else latents),
        len(schedule.times),
        gradient=gradient,
        network=network,
        then=_read_out(pipeline.vae, family.shifts_latents, decode, then),
        inputs=schedule.timesteps(latents.device).unbind(),
        key=key,
    )
    return result


def _read_out(
    vae: Any, shifts: bool, decode: bool, then: Callable[[Tensor], Any] | None
) -> Callable[[tuple[Tensor, ...]], Any]:
    scale = vae.config.scaling_factor
    shift = getattr(vae.config, "shift_factor", None) or 0.0

    def read(state: State) -> Any:
        found = _latest(state)
        if decode:
            found = found / scale
            found = vae.decode(found + shift if shifts else found, return_dict=False)[0] * 0.5 + 0.5
        return found if then is None else then(found)

    return read


def _doubled(latents: Tensor) -> Tensor:
    # of one sample a view will do, which copies nothing and keeps nothing twice
    return latents.expand(2, -1, -1, -1) if len(latents) == 1 else torch.cat([latents, latents])


def _latest(state: State) -> Tensor:
    return state if isinstance(state, Tensor) else state[0]


def _conditions(given: _Embeddings, batch: int, guided: bool) -> Conditions:
    """Check the embeddings, and put the negative ones before the others, as guidance wants them."""
    mend = "pipeline.encode_prompt makes them from text."
    found = {}
    for name, (embeds, negative) in given.items():
        for argument, value in ((name, embeds), (f"negative_{name}", negative)):
            if value is None and (argument == name or guided):
                why = "a tensor, since guidance_scale is above 1" if argument != name else "a tensor"
                raise ArgumentTypeError(argument, None, why, mend)
            if value is None:
                continue
            dimensions = 2 if name.startswith("pooled") else 3
            if require_floating(argument, value).ndim != dimensions or len(value) != batch:
                raise ArgumentError(argument, value, f"{dimensions} dimensions, the first of {batch}", mend)
        assert embeds is not None
        if guided:
            assert negative is not None
            if negative.shape != embeds.shape:
                raise ArgumentError(
                    f"negative_{name}", negative, f"the shape {tuple(embeds.shape)} of {name}"
                )
            embeds = torch.cat([negative, embeds])
        found[name] = embeds
    return found


def _require_latents(latents: Tensor, network: Any, pipeline: Any) -> None:
    require_floating("latents", latents)
    channels = network.config.in_channels
    if latents.ndim != 4 or latents.shape[1] != channels or not len(latents):
        expected = f"shape (batch, {channels}, height, width)"
        raise ArgumentError("latents", latents, expected, "Images are not latents: the decoder makes them.")
    if channels != pipeline.vae.config.latent_channels:
        mend = "A network with further channels (inpainting, depth) has another loop."
        raise ArgumentTypeError("pipeline", type(pipeline), KNOWN, mend)


def _number(argument: str, value: object, least: float, most: float) -> float:
    expected = f"a number from {least:g} to {most:g}" if math.isfinite(most) else f"a number from {least:g}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgumentTypeError(argument, value, expected)
    if not (math.isfinite(value) and least <= value <= most):
        raise ArgumentError(argument, value, expected)
    return float(value)
