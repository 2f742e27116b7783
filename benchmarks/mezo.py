"""What training a causal language model takes in memory: MeZO beside inference and backpropagation.

    python benchmarks/mezo.py [--lengths 64 128 256 512 1024] [--batch 4] [--repeats 3] [--out FILE.json]

A GPT-2 of transformers, built from a small configuration without downloading anything. Bytes are the weights
and the most that lived beside them at once, counted by `thalweg.ledger`; every route makes a whole step with
the weights moved, by plain gradient descent where it has gradients. The ratio is to inference (one forward
without a graph), and the claim is that MeZO's stays at most 1.05 at every length. What it adds is never more
than the largest parameter, which shows only where the activations are smaller than that (`--lengths 8`).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from thalweg.blackbox import SPSA, LowRank, MeZO, Streamed
from thalweg.ledger.storages import StorageCounter
from thalweg.step import backward
from thalweg.table import align, scaled

VOCABULARY = 2048
MOST = 1.05


def language_model(longest: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=longest,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def routes(model: nn.Module, tokens: torch.Tensor) -> dict[str, Callable[[], object]]:
    """One step of each; `(hooks)` frees every gradient as soon as its parameter has moved."""
    parameters = list(model.parameters())

    def closure() -> torch.Tensor:
        return model(input_ids=tokens, labels=tokens).loss

    def inference() -> None:
        with torch.no_grad():
            closure()

    def descend() -> None:
        closure().backward()
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(parameter.grad, alpha=-1e-7)
                parameter.grad = None

    def checkpointed() -> None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        descend()
        model.gradient_checkpointing_disable()

    def hooked() -> None:
        def move(parameter: torch.Tensor) -> None:
            with torch.no_grad():
                parameter.add_(parameter.grad, alpha=-1e-7)
            parameter.grad = None

        handles = [p.register_post_accumulate_grad_hook(move) for p in parameters]
        backward(closure, parameters, gradient=Streamed(SPSA(restore="swap", directions="gaussian")))
        for handle in handles:
            handle.remove()

    mezo = MeZO(parameters, lr=1e-7, seed=0)
    low_rank = MeZO(parameters, lr=1e-7, seed=0, gradient=SPSA(directions=LowRank(4), restore="swap"))
    return {
        "inference": inference,
        "mezo": lambda: mezo.step(closure),
        "mezo, low rank 4": lambda: low_rank.step(closure),
        "spsa, streamed (hooks)": hooked,
        "backprop": descend,
        "backprop, checkpointed": checkpointed,
    }


def peak_bytes(run: Callable[[], object]) -> int:
    counter = StorageCounter(None, None)
    with counter:
        run()
    return counter.peak_bytes


def measure(lengths: list[int], batch: int, repeats: int) -> dict[str, object]:
    """Bytes and times of each route at each length."""
    model = language_model(max(lengths)).train()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    rows = []
    for length in lengths:
        tokens = torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))
        steps = routes(model, tokens)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(repeats):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                times[name].append(1000 * (time.perf_counter() - start))
        inference = None
        for name, step in steps.items():
            total = weights + peak_bytes(step)
            inference = inference or total
            rows.append(
                {
                    "length": length,
                    "route": name,
                    "bytes": total,
                    "bytes_beside_weights": total - weights,
                    "ms": statistics.median(times[name]),
                    "ratio": total / inference,
                }
            )
    worst = max(row["ratio"] for row in rows if row["route"] in ("mezo", "mezo, low rank 4"))
    return {
        "benchmark": "mezo",
        "batch": batch,
        "parameter_bytes": weights,
        "largest_parameter_bytes": largest,
        "worst_mezo_ratio": worst,
        "holds": worst <= MOST,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "rows": rows,
    }


def table(found: dict[str, object]) -> str:
    rows = [
        [
            str(row["length"]),
            row["route"],
            scaled(row["bytes_beside_weights"], "B"),
            scaled(row["bytes"], "B"),
            f"{row['ms']:.0f}",
            f"{row['ratio']:.3f}",
        ]
        for row in found["rows"]
    ]
    return align(["tokens", "route", "beside weights", "with weights", "ms", "bytes / inference"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/mezo.json"))
    options = parser.parse_args()
    # newer transformers rename the switch of checkpointing and say so at every use
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    torch.set_num_threads(1)
    found = measure(options.lengths, options.batch, options.repeats)
    print(table(found))
    print(f"MeZO at most {MOST} of inference: {found['holds']} (worst {found['worst_mezo_ratio']:.3f})")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
