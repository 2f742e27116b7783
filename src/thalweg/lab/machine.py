"""What a run was made on, without a word that names the machine itself."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Describe processor, software and commit; no host name, no user and no path.

    Args:
        device: where the run computes; a CUDA device is described by its name.

    Returns:
        A dictionary of JSON values: processor, cores, threads, accelerator, memory_gib, platform, python,
        torch, thalweg, commit, changed. `commit` is None outside a checkout of Thalweg; `changed` says
        whether the checkout had uncommitted changes.

    Example:
        >>> describe_machine(torch.device("cpu"))["torch"] == torch.__version__
        True
    """
    commit, changed = _commit()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "memory_gib": _memory(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "thalweg": _version(),
        "commit": commit,
        "changed": changed,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> float | None:
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
    return round(pages * size / 2**30, 1)


def _version() -> str | None:
    try:
        return importlib.metadata.version("thalweg")
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> tuple[str | None, bool | None]:
    package = Path(__file__).resolve().parent
    # an installed copy may lie inside somebody else's repository: only one that tracks this file counts
    if _git(package, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None, None
    commit = _git(package, "rev-parse", "HEAD")
    status = _git(package, "status", "--porcelain", "--untracked-files=no")
    return commit, None if status is None else bool(status)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
