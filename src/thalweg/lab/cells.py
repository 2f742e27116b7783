"""Cells: the parts of a run, each computed from its own seed and written whole when it ends."""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from thalweg.errors import ArgumentError
from thalweg.lab.files import read_json, to_json, write_json


@dataclass(slots=True)
class Page:
    """What a cell, or the run outside its cells, has handed in so far."""

    metrics: list[dict[str, Any]] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    weights: list[dict[str, Any]] = field(default_factory=list)

    def extend(self, other: Page) -> None:
        """Append everything of another page."""
        self.metrics.extend(other.metrics)
        self.tables.extend(other.tables)
        self.figures.extend(other.figures)
        self.weights.extend(other.weights)


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell as it lies on disk: its name and seed, the identity of its run, result, page and time."""

    name: str
    seed: int
    identity: str
    result: Any
    page: Page
    seconds: float


def identity(parts: Mapping[str, object]) -> str:
    """The hash by which a cell knows the run it belongs to; equal parts give equal hashes.

    Example:
        >>> identity({"width": 3, "name": "a"}) == identity({"name": "a", "width": 3})
        True
    """
    text = json.dumps(to_json(parts, "config"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def cell_seed(name: str, seed: int) -> int:
    """The seed of a cell's own random numbers, from its name and the seed of the run.

    Example:
        >>> cell_seed("spsa", 0) == cell_seed("spsa", 0), cell_seed("spsa", 0) == cell_seed("spsa", 1)
        (True, False)
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]) >> 1


@contextmanager
def own_randomness(name: str, seed: int, device: torch.device) -> Iterator[None]:
    """Seed the default generators of torch, numpy and Python for one cell, and put them back afterwards.

    So a cell draws the same numbers whichever cells ran before it, or were loaded instead of run.
    """
    drawn = cell_seed(name, seed)
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        # not torch.manual_seed: it would seed accelerators that nobody puts back
        torch.default_generator.manual_seed(drawn)
        if cuda:
            torch.cuda.manual_seed(drawn)
        random.seed(drawn)
        if numpy is not None:
            numpy.random.seed(drawn % 2**32)
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)


def cell_path(folder: Path, name: str, seed: int) -> Path:
    """Where a cell lies: a readable name, and a hash so that no two names meet."""
    mark = hashlib.sha256(f"{seed}/{name}".encode()).hexdigest()[:8]
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)[:60].strip("-.") or "cell"
    return folder / f"{readable}-seed{seed}-{mark}.json"


def write_cell(folder: Path, cell: Cell) -> None:
    """Write a cell, atomically."""
    content = {
        "cell": cell.name,
        "seed": cell.seed,
        "identity": cell.identity,
        "result": cell.result,
        **asdict(cell.page),
        "timing": {"seconds": cell.seconds},
    }
    write_json(cell_path(folder, cell.name, cell.seed), content)


def read_cell(out: Path, folder: Path, name: str, seed: int, expected: str) -> Cell | None:
    """Load a cell, or None when it has to be run: not there, or a file that it wrote is gone or changed.

    Raises:
        ArgumentError: it was written under another configuration.
    """
    path = cell_path(folder, name, seed)
    if not path.exists():
        return None
    found = read_json(path)
    if found["identity"] != expected:
        mend = "Choose another folder, or leave out --resume to start afresh."
        raise ArgumentError("resume", path.name, "a cell written under the same configuration", mend)
    page = Page(found["metrics"], found["tables"], found["figures"], found["weights"])
    for entry in page.figures + page.weights:
        file = out / entry["file"]
        if not file.is_file() or file_hash(file) != entry["sha256"]:
            return None
    return Cell(name, seed, expected, found["result"], page, found["timing"]["seconds"])


def file_hash(path: Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
