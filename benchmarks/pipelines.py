"""A reward through diffusers pipelines: bytes, time, and what a step costs beside the network.

    python benchmarks/pipelines.py [--steps 20] [--repeats 7] [--device cpu] [--out FILE.json]

Policies: a Stable-Diffusion-shaped and a flow-matching transformer pipeline of small configurations with
random weights, LoRA on the attention, guidance, decoder and reward. The peer is plain autograd through the
pipeline's own `__call__`. Kept bytes are counted, times are medians of forward and backward, all variants in
turn. `cosine` is that of the LoRA gradient to the peer's.

Overhead: the same sampler with a network that returns a constant, so that only what stands around it is
timed, without and with a graph. The peer is the pipelines' loop written out: guidance, `scale_model_input`
and `scheduler.step`, whose `set_timesteps` is not timed; ours is a whole call of `through`, schedule known.
The time of the constant network itself is taken from both, as from the bound beside them: `x + dt * v`, with
guidance written out likewise, and nothing else around it. Ratios last, ours to theirs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from thalweg.flows import through
from thalweg.flows.schedule import read_schedule
from thalweg.ledger import saved_bytes
from thalweg.rollouts import Checkpointed, Truncated
from thalweg.step import Backprop
from thalweg.table import align, scaled

POLICIES = {
    "Backprop()": Backprop(),
    "Checkpointed(segments=4)": Checkpointed(segments=4),
    "Checkpointed(slots=4)": Checkpointed(slots=4),
    "Checkpointed(slots=steps)": Checkpointed(),
    "Truncated(last=5)": Truncated(last=5),
    "Truncated(last=5), checkpointed": Truncated(last=5, store=Checkpointed()),
}
SCHEDULERS = {
    "DDIM": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "Euler": lambda: diffusers.EulerDiscreteScheduler(),
    "DPM-Solver++ 2M": lambda: diffusers.DPMSolverMultistepScheduler(),
    "flow matching Euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
}


def decoder(**options: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        latent_channels=4,
        **options,
    )


def stable_diffusion() -> tuple[Any, Any, dict[str, Tensor]]:
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
        layers_per_block=1,
    )
    names = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")
    parts = {"unet": unet, "vae": decoder(), "scheduler": SCHEDULERS["DDIM"]()}
    pipe = diffusers.StableDiffusionPipeline(**parts, **dict.fromkeys(names), requires_safety_checker=False)
    embeds, negative = torch.randn(2, 1, 16, 32)
    return pipe, unet, {"prompt_embeds": embeds, "negative_prompt_embeds": negative}


def stable_diffusion_3() -> tuple[Any, Any, dict[str, Tensor]]:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=64,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
    )
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    parts = {
        "transformer": transformer,
        "vae": decoder(shift_factor=0.06, scaling_factor=1.5),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    pipe = diffusers.StableDiffusion3Pipeline(**parts, **dict.fromkeys(names))
    embeds, negative = torch.randn(2, 1, 16, 32)
    pooled, negative_pooled = torch.randn(2, 1, 32)
    return (
        pipe,
        transformer,
        {
            "prompt_embeds": embeds,
            "negative_prompt_embeds": negative,
            "pooled_prompt_embeds": pooled,
            "negative_pooled_prompt_embeds": negative_pooled,
        },
    )


def reward(images: Tensor) -> Tensor:
    return images.clamp(0, 1).square().mean()


def policies(
    name: str, make: Callable[[], tuple[Any, Any, dict[str, Tensor]]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    from peft import LoraConfig

    pipe, network, given = make()
    network.requires_grad_(False)
    network.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    pipe.vae.requires_grad_(False)
    pipe.to(options.device)
    pipe.set_progress_bar_config(disable=True)
    weights = [p for p in network.parameters() if p.requires_grad]
    with torch.no_grad():
        for weight in weights:
            weight.normal_(std=0.1)
    given = {key: value.to(options.device) for key, value in given.items()}
    start = torch.randn(1, 4, 16, 16, device=options.device)
    call = type(pipe).__call__.__wrapped__
    height = 16 * pipe.vae_scale_factor

    def plain() -> Tensor:
        images = call(
            pipe,
            latents=start,
            num_inference_steps=options.steps,
            guidance_scale=5.0,
            output_type="pt",
            return_dict=False,
            height=height,
            width=height,
            **given,
        )[0]
        return reward(images)

    def routed(policy: Any) -> Callable[[], Tensor]:
        def run() -> Tensor:
            value: Tensor = through(
                pipe, start, options.steps, guidance_scale=5.0, then=reward, gradient=policy, **given
            )
            return value

        return run

    runs = {"the pipeline's own loop": plain, **{label: routed(p) for label, p in POLICIES.items()}}
    times = alternate(
        {label: lambda run=run: torch.autograd.grad(run(), weights) for label, run in runs.items()},
        options,
    )
    exact = flat(torch.autograd.grad(plain(), weights))
    kept = {label: saved_bytes(run) for label, run in runs.items()}
    return [
        {
            "pipeline": name,
            "policy": label,
            "kept_bytes": kept[label],
            "milliseconds": times[label],
            "cosine": float(torch.cosine_similarity(flat(torch.autograd.grad(run(), weights)), exact, 0)),
            "kept_ratio": kept[label] / kept["the pipeline's own loop"],
            "time_ratio": times[label] / times["the pipeline's own loop"],
        }
        for label, run in runs.items()
    ]


def flat(gradients: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients]).double()


class Constant(nn.Module):
    """A network that costs nothing: what it returns was made before."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(in_channels=4)
        self.output = torch.randn(batch, 4, 64, 64)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True
    ) -> tuple[Tensor]:
        return (self.output,)


def overhead(name: str, guidance: float, graph: bool, options: argparse.Namespace) -> dict[str, Any]:
    scheduler = SCHEDULERS[name]()
    network = Constant(2 if guidance > 1 else 1).to(options.device)
    network.output = network.output.to(options.device).requires_grad_(graph)
    vae = SimpleNamespace(config=SimpleNamespace(latent_channels=4, scaling_factor=0.18215))
    pipe = SimpleNamespace(unet=network, vae=vae, scheduler=scheduler)
    start = torch.randn(1, 4, 64, 64, device=options.device, requires_grad=graph)
    embeds = torch.zeros(1, 77, 8, device=options.device)
    steps = 50

    def prepare() -> None:
        scheduler.set_timesteps(steps, device=options.device)

    def theirs() -> Tensor:
        x = start
        for t in scheduler.timesteps:
            seen = torch.cat([x] * 2) if guidance > 1 else x
            if hasattr(scheduler, "scale_model_input"):
                seen = scheduler.scale_model_input(seen, t)
            output = network(seen, t, encoder_hidden_states=embeds, return_dict=False)[0]
            if guidance > 1:
                without, conditioned = output.chunk(2)
                output = without + guidance * (conditioned - without)
            x = scheduler.step(output, t, x, return_dict=False)[0]
        return x

    def ours() -> Tensor:
        x: Tensor = through(
            pipe,
            start,
            steps,
            prompt_embeds=embeds,
            negative_prompt_embeds=embeds,
            guidance_scale=guidance,
            decode=False,
        )
        return x

    def bound() -> Tensor:
        x, length = start, 0.02
        for t in scheduler.timesteps:
            seen = torch.cat([x, x]) if guidance > 1 else x
            output = network(seen, t, encoder_hidden_states=embeds, return_dict=False)[0]
            if guidance > 1:
                without, conditioned = output.chunk(2)
                output = without + guidance * (conditioned - without)
            x = x + length * output
        return x

    def bare() -> None:
        for t in scheduler.timesteps:
            network(start, t, encoder_hidden_states=embeds, return_dict=False)

    with torch.set_grad_enabled(graph):
        prepare()
        begin = time.perf_counter()
        read_schedule(SCHEDULERS[name](), steps)
        first = time.perf_counter() - begin
        times = alternate({"theirs": theirs, "ours": ours, "bound": bound, "bare": bare}, options, prepare)
        # the same latents, or the comparison would mean nothing
        begun = start * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else start
        start, plain = begun.detach(), start
        prepare()
        expected = theirs()
        start = plain
        torch.testing.assert_close(ours(), expected, rtol=1e-3, atol=1e-3)
    around = ("theirs", "ours", "bound")
    per_step = {label: 1000 * (times[label] - times["bare"]) / steps for label in around}
    return {
        "scheduler": name,
        "guidance": guidance > 1,
        "graph": graph,
        "steps": steps,
        "theirs_us_per_step": per_step["theirs"],
        "ours_us_per_step": per_step["ours"],
        "bound_us_per_step": per_step["bound"],
        "reading_the_schedule_once_ms": 1000 * first,
        "ratio": per_step["ours"] / per_step["theirs"],
    }


def alternate(
    runs: dict[str, Callable[[], Any]],
    options: argparse.Namespace,
    prepare: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Median milliseconds of each, in turn."""
    times: dict[str, list[float]] = {label: [] for label in runs}
    for repeat in range(options.repeats + 1):
        for label, run in runs.items():
            prepare()
            synchronize(options.device)
            begin = time.perf_counter()
            run()
            synchronize(options.device)
            if repeat:
                times[label].append(1000 * (time.perf_counter() - begin))
    return {label: statistics.median(values) for label, values in times.items()}


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/pipelines.json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    beside = [
        overhead(name, guidance, graph, options)
        for name in SCHEDULERS
        for guidance in (1.0, 5.0)
        for graph in (False, True)
    ]
    headings = ["scheduler", "guidance", "graph", "x + dt v", "diffusers", "through", "ratio"]
    rows = [
        [
            r["scheduler"],
            str(r["guidance"]),
            str(r["graph"]),
            f"{r['bound_us_per_step']:.1f} us/step",
            f"{r['theirs_us_per_step']:.1f}",
            f"{r['ours_us_per_step']:.1f}",
            f"{r['ratio']:.2f}",
        ]
        for r in beside
    ]
    print(align(headings, rows), end="\n\n", flush=True)
    makes = {"Stable Diffusion": stable_diffusion, "Stable Diffusion 3": stable_diffusion_3}
    routed = [row for name, make in makes.items() for row in policies(name, make, options)]
    headings = ["pipeline", "policy", "kept", "ms", "cosine", "kept ratio", "time ratio"]
    rows = [
        [
            r["pipeline"],
            r["policy"],
            scaled(r["kept_bytes"], "B"),
            f"{r['milliseconds']:.0f}",
            f"{r['cosine']:.5f}",
            f"{r['kept_ratio']:.4f}",
            f"{r['time_ratio']:.2f}",
        ]
        for r in routed
    ]
    print(align(headings, rows))
    record = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "machine": platform.machine(),
        "device": options.device,
        "threads": 1,
        "steps": options.steps,
        "overhead": beside,
        "policies": routed,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
