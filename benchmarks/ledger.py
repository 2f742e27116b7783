"""What counting costs, and how near a price under fake tensors comes to the count on real ones.

Two tables. Overhead: one step as it is and the same step under the ledger's counter, alternating, median of
the repeats; torch's own `FlopCounterMode` beside it. Price: the predicted against the counted bytes and
operations. Ratios last. Run as `python benchmarks/ledger.py [--out FILE.json] [--repeats N]`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from thalweg.borrowed import isolated
from thalweg.ledger import cost, price
from thalweg.ledger.cost import count
from thalweg.noise import Key
from thalweg.step import Backprop, Step, as_step
from thalweg.table import align, scaled

Parts = tuple[nn.Module, Callable[[], Tensor], list[Tensor]]


def dense() -> Parts:
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.LayerNorm(512), nn.Linear(512, 10))
    x, y = torch.randn(128, 256), torch.randint(0, 10, (128,))
    return model, lambda: functional.cross_entropy(model(x), y), list(model.parameters())


def convolutions() -> Parts:
    def layer(inner: int, outer: int) -> list[nn.Module]:
        return [nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU(inplace=True)]

    layers = [
        *layer(3, 16),
        *layer(16, 16),
        nn.MaxPool2d(2),
        *layer(16, 32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    model = nn.Sequential(*layers, nn.Linear(32, 10))
    x, y = torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,))
    return model, lambda: functional.cross_entropy(model(x), y), list(model.parameters())


def encoder() -> Parts:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    x = torch.randn(8, 64, 64)
    return model, lambda: model(x).square().mean(), list(model.parameters())


def checkpointed() -> Parts:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(256, 256), nn.Tanh()) for _ in range(16)])
    x = torch.randn(64, 256)

    def closure() -> Tensor:
        h = x
        for start in range(0, 16, 4):
            h = checkpoint(model[start : start + 4], h, use_reentrant=False)
        return h.square().mean()

    return model, closure, list(model.parameters())


def language_model() -> Parts:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=4, num_attention_heads=4, hidden_size=64, intermediate_size=128, vocab_size=512
    )
    model = LlamaForCausalLM(config)
    tokens = torch.randint(0, 512, (4, 64))
    return model, lambda: model(input_ids=tokens, labels=tokens).loss, list(model.parameters())


def denoiser() -> Parts:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
        layers_per_block=1,
    )
    x, text = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 32)
    noise_level = torch.randint(0, 1000, (2,))
    return model, lambda: functional.mse_loss(model(x, noise_level, text).sample, x), list(model.parameters())


STEPS = {
    "dense": dense,
    "convolutions": convolutions,
    "encoder": encoder,
    "checkpointed": checkpointed,
    "language model": language_model,
    "denoiser": denoiser,
}


def available() -> dict[str, Callable[[], Parts]]:
    """The steps whose packages are installed."""
    found = {}
    for name, make in STEPS.items():
        try:
            make()
        except ImportError:
            continue
        found[name] = make
    return found


def overhead(name: str, step: Step, repeats: int) -> dict[str, Any]:
    def bare() -> None:
        torch.autograd.grad(step.closure(), step.parameters, allow_unused=True)

    def by_torch() -> None:
        with FlopCounterMode(display=False):
            bare()

    runs: dict[str, Callable[[], Any]] = {
        "bare": bare,
        "flop_counter_mode": by_torch,
        "ledger": lambda: count(step, Backprop(), Key(0)),
    }
    times: dict[str, list[float]] = {label: [] for label in runs}
    with isolated(step.model, step.parameters):
        for _ in range(repeats + 1):
            for label, run in runs.items():
                start = time.perf_counter()
                run()
                times[label].append(1000 * (time.perf_counter() - start))
    median = {f"{label}_ms": statistics.median(values[1:]) for label, values in times.items()}
    return {"step": name, **median, "ratio": median["ledger_ms"] / median["bare_ms"]}


def prediction(name: str, make: Callable[[], Parts]) -> dict[str, Any]:
    real = cost(make, repeats=1)
    start = time.perf_counter()
    told = price(make)[0]
    seconds = time.perf_counter() - start
    fields = ("saved_bytes", "peak_bytes", "operations")
    numbers = {f: {"cost": getattr(real, f), "price": getattr(told, f)} for f in fields}
    ratios = {f"{f}_ratio": pair["price"] / pair["cost"] for f, pair in numbers.items()}
    return {"step": name, "price_seconds": seconds, **numbers, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/ledger.json"))
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    steps = available()
    slower = [overhead(name, as_step(make), options.repeats) for name, make in steps.items()]
    predicted = [prediction(name, make) for name, make in steps.items()]
    rows = [
        [
            r["step"],
            *(f"{r[f'{label}_ms']:.2f}" for label in ("bare", "flop_counter_mode", "ledger")),
            f"{r['ratio']:.1f}",
        ]
        for r in slower
    ]
    print(align(["step", "bare ms", "FlopCounterMode ms", "ledger ms", "ledger / bare"], rows), end="\n\n")
    rows = [
        [
            p["step"],
            f"{p['price_seconds']:.2f} s",
            scaled(p["saved_bytes"]["cost"], "B"),
            scaled(p["peak_bytes"]["cost"], "B"),
            scaled(p["operations"]["cost"], "FLOP"),
            *(f"{p[f'{f}_ratio']:.4f}" for f in ("saved_bytes", "peak_bytes", "operations")),
        ]
        for p in predicted
    ]
    headings = [
        "step",
        "price takes",
        "kept",
        "peak",
        "operations",
        "kept ratio",
        "peak ratio",
        "operations ratio",
    ]
    print(align(headings, rows))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"torch": torch.__version__, "threads": 1, "overhead": slower, "price": predicted}
    options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
