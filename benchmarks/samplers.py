"""What a sampler costs outside its network, beside the diffusers scheduler that takes the same steps.

    python benchmarks/samplers.py [--steps 50] [--repeats 31] [--device cpu] [--out FILE.json]

The network answers at once with a tensor that was there before, so that what is timed is everything else: a
scheduler's `scale_model_input` and `step`, and a step of `sample`. Both run without gradients, on latents
(batch, 4, side, side); tables are made before (`set_timesteps`; the sampler's first call). All variants run
in turn in one process; times are medians of the repeats, in microseconds per step.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

from thalweg.flows import (
    DDIM,
    AdamsBashforth,
    DPMSolverPP2M,
    Euler,
    Field,
    Straight,
    VarianceExploding,
    VariancePreserving,
    sample,
)
from thalweg.flows.linear_steps import Solver
from thalweg.table import align

PAIRS: dict[str, tuple[str, dict[str, Any], Solver]] = {
    "DDIM": ("DDIMScheduler", {"clip_sample": False}, DDIM()),
    "DPM-Solver++(2M)": ("DPMSolverMultistepScheduler", {}, DPMSolverPP2M()),
    "Euler in sigma": ("EulerDiscreteScheduler", {}, Euler()),
    "LMS, order 4": ("LMSDiscreteScheduler", {}, AdamsBashforth(4)),
    "flow matching": ("FlowMatchEulerDiscreteScheduler", {}, Euler()),
}


def theirs(name: str, options: dict[str, Any], steps: int, x: torch.Tensor) -> Callable[[], None]:
    scheduler = getattr(diffusers, name)(**options)
    answer = torch.randn_like(x)

    def run() -> None:
        scheduler.set_timesteps(steps, device=x.device)
        state = x
        start = time.perf_counter()
        for t in scheduler.timesteps:
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(state, t)
            state = scheduler.step(answer, t, state, return_dict=False)[0]
        run.spent = finished(start, x.device)  # type: ignore[attr-defined]

    return run


def ours(name: str, solver: Solver, steps: int, x: torch.Tensor) -> Callable[[], None]:
    path = VariancePreserving()
    if "Euler" in name or "LMS" in name:
        path = VarianceExploding(20.0)  # type: ignore[assignment]
    if "Flow" in name:
        path = Straight()  # type: ignore[assignment]
    answer = torch.randn_like(x)
    field = Field(lambda x, t: answer, path, "velocity" if "Flow" in name else "noise")
    times = torch.linspace(0.98, 0.01, steps + 1, dtype=torch.float64)

    def run() -> None:
        start = time.perf_counter()
        sample(field, x, times, solver=solver)
        run.spent = finished(start, x.device)  # type: ignore[attr-defined]

    return run


def finished(start: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(side: int, batch: int, steps: int, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    x = torch.randn(batch, 4, side, side, device=device)
    runs: dict[str, Any] = {}
    for name, (scheduler, options, solver) in PAIRS.items():
        runs[name] = ours(scheduler, solver, steps, x)
        runs[f"{name} (diffusers)"] = theirs(scheduler, options, steps, x)
    times: dict[str, list[float]] = {name: [] for name in runs}
    warmup = 2
    with torch.no_grad():
        for repeat in range(warmup + repeats):
            for name, run in runs.items():
                run()
                if repeat >= warmup:
                    times[name].append(1e6 * run.spent / steps)
    median = {name: statistics.median(values) for name, values in times.items()}
    return [
        {
            "sampler": name,
            "shape": list(x.shape),
            "diffusers_us": median[f"{name} (diffusers)"],
            "us": median[name],
            "over_diffusers": median[name] / median[f"{name} (diffusers)"],
        }
        for name in PAIRS
    ]


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        [
            row["sampler"],
            "x".join(map(str, row["shape"])),
            *(f"{row[key]:.1f}" for key in ("diffusers_us", "us")),
            f"{row['over_diffusers']:.2f}",
        ]
        for row in rows
    ]
    return align(["sampler", "latents", "diffusers us/step", "us/step", "ours / diffusers"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/samplers.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for side, batch in ((8, 1), (64, 4)):
        rows += measure(side, batch, options.steps, options.repeats, torch.device(options.device))
    print(table(rows))
    found = {
        "benchmark": "samplers",
        "steps": options.steps,
        "repeats": options.repeats,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "device": options.device,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
