"""The checks of what a run is given before anything is written."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from thalweg.errors import ArgumentError, ArgumentTypeError, require_integer

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def require_name(argument: str, name: object) -> str:
    """Return a name that may become the name of a file, or raise."""
    if not isinstance(name, str):
        raise ArgumentTypeError(argument, name, "a string")
    if not _NAME.fullmatch(name):
        raise ArgumentError(argument, name, 'letters, digits, "_", "-" and ".", because it names a file')
    return name


def require_seeds(seeds: object) -> tuple[int, ...]:
    """Return the seeds of a run as a tuple, or raise: at least one, each at least 0, each once."""
    if isinstance(seeds, str) or not isinstance(seeds, Sequence):
        raise ArgumentTypeError("seeds", seeds, "a sequence of integers")
    for index, seed in enumerate(seeds):
        require_integer(f"seeds[{index}]", seed, 0)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ArgumentError("seeds", list(seeds), "at least one seed, and each once")
    return tuple(seeds)


def require_device(device: str | torch.device) -> torch.device:
    """Return the device of a run, or raise: the CPU, or a CUDA device that is there."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ArgumentError("device", device, "'cpu' or 'cuda'") from None
    if found.type not in ("cpu", "cuda"):
        raise ArgumentError("device", device, "'cpu' or 'cuda'")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ArgumentError("device", str(device), f"one of {torch.cuda.device_count()} CUDA devices here")
    # fork_rng and seeding want to know which one
    return torch.device("cuda", found.index or 0) if found.type == "cuda" else found
