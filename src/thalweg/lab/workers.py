"""Cells side by side: worker processes, so that a run of many small cells uses every core."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch

from thalweg.errors import ArgumentError
from thalweg.lab.cells import own_randomness

MOST_WORKERS = 8


@dataclass(frozen=True, slots=True)
class Job:
    """A cell that any process can run.

    Args:
        name: what the cell does; together with the seed unique in the run.
        seed: at least 0.
        function: of a module, not a lambda or a function inside another: a worker imports it by its name. It
            returns JSON values and calls nothing of the `Lab`.
        arguments: what it is called with; anything that can be pickled.
    """

    name: str
    seed: int
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()

    @property
    def at(self) -> tuple[str, int]:
        """Name and seed, by which the cell is known in its run."""
        return self.name, self.seed

    def run(self, device: torch.device) -> tuple[Any, float]:
        """The result, and the seconds that it took; the default generators are those of the cell."""
        begun = time.perf_counter()
        with own_randomness(self.name, self.seed, device):
            result = self.function(*self.arguments)
        return result, time.perf_counter() - begun


def require_distinct(jobs: Sequence[Job]) -> None:
    """Refuse two jobs of one name and seed."""
    seen: set[tuple[str, int]] = set()
    for index, job in enumerate(jobs):
        if job.at in seen:
            raise ArgumentError(f"jobs[{index}]", job.at, "a name and seed that no other job has")
        seen.add(job.at)


def cores() -> int:
    """How many cores this process may use, at least 1."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed is not None else os.cpu_count() or 1


def run_jobs(jobs: Sequence[Job], device: torch.device, workers: int) -> Iterator[tuple[Job, Any, float]]:
    """Run jobs in so many processes of one thread each; what is finished first comes first.

    Yields:
        A job, its result, and the seconds that it took.

    Raises:
        Exception: what a job raised; the jobs that have not begun are dropped.
    """
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            yield job, *job.run(device)
        return
    # not fork: the threads of torch and of the bar do not survive one
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _begin, (os.getpid(),))
    try:
        waiting = {pool.submit(job.run, device): job for job in jobs}
        for done in as_completed(waiting):
            yield waiting[done], *done.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(parent: int) -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    # a run that was killed cannot tell its workers to stop
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
