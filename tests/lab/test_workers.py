"""Cells side by side give what cells one after the other give."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.lab import Job, Lab
from thalweg.lab.cells import cell_path


def draw(scale: float) -> dict[str, Any]:
    """Random numbers of the cell, and where they were drawn."""
    return {"drawn": (scale * torch.rand(3)).tolist(), "threads": torch.get_num_threads()}


def where() -> int:
    return os.getpid()


def refuse(number: int) -> int:
    raise ArgumentError("number", number, "a better one", "Choose another.")


def lab(out: Path, **fields: Any) -> Lab:
    return Lab(out, name="dice", kind="recipe", config={}, seeds=[0], quiet=True, threads=1, **fields)


JOBS = [Job(f"draw {scale}", seed, draw, (scale,)) for scale in (1.0, 2.0) for seed in (0, 1)]


def test_side_by_side_is_one_after_the_other(tmp_path: Path) -> None:
    """The same results in the same order, the same cells on disk, whatever the number of workers."""
    found = {}
    for workers in (1, 2):
        with lab(tmp_path / str(workers)) as run:
            found[workers] = run.cells(JOBS, workers=workers)
            found[workers].append(run.cell("after", lambda: torch.rand(1).tolist(), seed=0))
    assert found[1] == found[2]
    with lab(tmp_path / "single") as run:
        alone = [
            run.cell(job.name, lambda job=job: job.function(*job.arguments), seed=job.seed) for job in JOBS
        ]
    assert alone == found[2][:-1]
    outcomes = [json.loads((tmp_path / str(workers) / "run.json").read_text()) for workers in (1, 2)]
    assert outcomes[0]["identity"] == outcomes[1]["identity"]


def test_workers_are_other_processes(tmp_path: Path) -> None:
    with lab(tmp_path / "run") as run:
        found = run.cells([Job(f"where {index}", 0, where) for index in range(3)], workers=2)
    assert os.getpid() not in found
    assert len(set(found)) <= 2


def test_finished_cells_are_loaded(tmp_path: Path) -> None:
    with lab(tmp_path / "run") as run:
        first = run.cells(JOBS[:2], workers=1)
    path = cell_path(tmp_path / "run" / "cells", JOBS[0].name, JOBS[0].seed)
    before = path.stat().st_mtime_ns
    with lab(tmp_path / "run", resume=True) as run:
        assert run.cells(JOBS, workers=2)[:2] == first
    assert path.stat().st_mtime_ns == before


def test_an_error_of_a_worker_is_raised_here_and_keeps_what_was_done(tmp_path: Path) -> None:
    jobs = [Job("bad", seed, refuse, (seed,)) for seed in (0, 1)]
    with lab(tmp_path / "run") as run:
        run.cell("before", lambda: 1, seed=0)
        with pytest.raises(ArgumentError, match=r"number: .*Choose another"):
            run.cells(jobs, workers=2)
    assert len(list((tmp_path / "run" / "cells").glob("*.json"))) == 1


def test_bad_jobs_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with lab(tmp_path / "run") as run:
        with pytest.raises(ArgumentError, match=r"jobs\[1\]"):
            run.cells([JOBS[0], JOBS[0]])
        with pytest.raises(ArgumentTypeError, match="name"):
            run.cells([Job("", 0, where)])
        with pytest.raises(ArgumentError, match="workers"):
            run.cells(JOBS, workers=0)
        run.cell("draw 1.0", lambda: 1, seed=0)
        with pytest.raises(ArgumentError, match=r"draw 1\.0"):
            run.cells(JOBS)
    assert len(list((tmp_path / "run" / "cells").glob("*.json"))) == 1


SCRIPT = """
import os, sys, time
from pathlib import Path
from thalweg.lab import Job, Lab

def linger(folder, index):
    Path(folder, f"pid{index}").write_text(str(os.getpid()))
    time.sleep(120)

if __name__ == "__main__":
    out = sys.argv[1]
    with Lab(out + "/run", name="dice", kind="recipe", config={}, seeds=[0], quiet=True) as run:
        run.cells([Job(f"linger {index}", 0, linger, (out, index)) for index in range(2)], workers=2)
"""


def test_workers_end_with_a_run_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "linger.py"
    script.write_text(SCRIPT)
    started = subprocess.Popen([sys.executable, str(script), str(tmp_path)])
    marks = [tmp_path / f"pid{index}" for index in range(2)]
    deadline = time.monotonic() + 60
    while not all(mark.exists() and mark.read_text() for mark in marks) and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = [int(mark.read_text()) for mark in marks]
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))


def alive(pid: int) -> bool:
    """Whether a process runs; one that waits for a parent to notice its end does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
