"""The folder of a run: opened afresh, or for going on, and never somebody else's."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from thalweg.errors import ArgumentError
from thalweg.lab.files import from_json, read_json, write_json


def claim_folder(out: Path) -> Callable[[], None]:
    """Make the folder and keep other processes out of it; a process that dies lets go of it by itself.

    Args:
        out: the folder of a run.

    Returns:
        A function that lets go.

    Raises:
        ArgumentError: it is a file, or another process is running there.
    """
    if out.exists() and not out.is_dir():
        raise ArgumentError("out", str(out), "a folder")
    out.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        return lambda: None
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        mend = "Wait for it, or choose another folder with --out."
        raise ArgumentError("out", str(out), "a folder in which no other run is going on", mend) from None
    except OSError:
        # a file system without locks: two runs at once are then the user's own care
        pass
    return lambda: os.close(descriptor)


def open_folder(out: Path, head: dict[str, Any], *, resume: bool) -> str:
    """Make a run's folder ready: run.json says "unfinished", config.json what is going to run.

    Args:
        out: the folder.
        head: name, kind, preset, seeds and the parts of the run's identity.
        resume: keep what is there, provided that it was made under the same identity; otherwise delete the
            earlier run's files, and only those.

    Returns:
        A sentence for the user when an earlier run was there, or an empty string.

    Raises:
        ArgumentError: `out` is a file or holds something that is not a run, or a resume does not fit. Nothing
            was changed.
    """
    earlier = read_json(out / "run.json") if (out / "run.json").is_file() else None
    if earlier is None and out.is_dir() and any(out.iterdir()):
        mend = "Choose another folder with --out."
        raise ArgumentError("out", str(out), "a new folder, an empty one, or that of an earlier run", mend)
    note = ""
    if earlier is not None and resume:
        _require_same(earlier.get("identity", {}), head["identity"])
        note = f"Going on in {out}: cells that are done are loaded, not run."
    elif earlier is not None:
        _delete(out, earlier)
        note = f"The earlier run in {out} is replaced; --resume would have gone on with it."
    # run.json first: it is what makes the folder a run's
    write_json(out / "run.json", {**head, "status": "unfinished"})
    write_json(out / "config.json", {**head["identity"], "preset": head["preset"], "seeds": head["seeds"]})
    return note


def _require_same(earlier: dict[str, Any], now: dict[str, Any]) -> None:
    # what is compared went through JSON once, so the other side must, too
    now = from_json(now)
    changes = [
        f"{key} {earlier.get(key)!r} -> {now[key]!r}"
        for key in now
        if key != "config" and earlier.get(key) != now[key]
    ]
    before, after = earlier.get("config", {}), now["config"]
    changes += [
        f"{key} {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    if changes:
        mend = "Choose another folder with --out, or leave out --resume to start afresh."
        raise ArgumentError("resume", "; ".join(changes), "the configuration of the earlier run", mend)


def _delete(out: Path, earlier: dict[str, Any]) -> None:
    # run.json goes last: a kill in between leaves a folder that still calls itself a run
    names = ["claims.json", "metrics.jsonl", *earlier.get("documents", [])]
    names += [entry["file"] for entry in earlier.get("figures", []) + earlier.get("weights", [])]
    for cell in sorted((out / "cells").glob("*.json")):
        found = read_json(cell)
        names += [entry["file"] for entry in found.get("figures", []) + found.get("weights", [])]
        names.append(f"cells/{cell.name}")
    for name in names:
        path = out / name
        if path.resolve().is_relative_to(out.resolve()):
            path.unlink(missing_ok=True)
