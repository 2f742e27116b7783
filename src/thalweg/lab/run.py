"""A run: cells that resume, metrics, tables, figures, weights and claims, written whole."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import torch

from thalweg.errors import (
    ArgumentError,
    ArgumentTypeError,
    require_choice,
    require_integer,
)
from thalweg.lab.arguments import require_device, require_name, require_seeds
from thalweg.lab.cells import Cell, Page, identity, own_randomness, read_cell, write_cell
from thalweg.lab.files import from_json, to_json
from thalweg.lab.folder import claim_folder, open_folder
from thalweg.lab.handed import Handed
from thalweg.lab.machine import describe_machine
from thalweg.lab.outcome import write_outcome
from thalweg.lab.progress import Progress, Ticker
from thalweg.lab.workers import MOST_WORKERS, Job, cores, require_distinct, run_jobs

T = TypeVar("T")


class Lab(Handed):
    """One run in one folder; choose it for anything long enough to be interrupted or worth keeping.

    Use it as a context manager. Inside, the work is done in cells (`cell`); every cell is on disk when it
    ends, so that a kill loses at most the cell in hand, and a run with `resume=True` goes on from there and
    ends with the same files, times apart. At the end of the block `run.json`, `claims.json` and
    `metrics.jsonl` are written; after an exception they are not.

    Args:
        out: the folder of the run; made when missing, refused when it holds something else than a run.
        name: what was run, for example "06_stochastic_neurons": letters, digits, "_", "-" and ".".
        kind: "recipe" or "compare".
        config: everything that decides the results, as JSON values.
        seeds: the seeds of the run, at least one, each at least 0.
        device: where to compute, "cpu" or "cuda".
        preset: the preset that `config` came from, or None.
        resume: keep the cells that an earlier run with the same configuration left in `out`; otherwise they
            are deleted.
        quiet: no progress bar and no notes; neither is shown anyway where standard error is not a terminal.
        threads: set torch's number of threads for the time of the run; None leaves it alone.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument; a folder that holds other files; a resume under
            another configuration. Nothing was changed.

    Example:
        >>> import tempfile
        >>> from thalweg.lab import Claim
        >>> folder = Path(tempfile.mkdtemp())
        >>> with Lab(folder / "run", name="dice", kind="recipe", config={"sides": 6}, seeds=[0, 1]) as lab:
        ...     lab.plan(len(lab.seeds))
        ...     rolls = [lab.cell("roll", lambda: int(torch.randint(6, ())), seed=s) for s in lab.seeds]
        ...     lab.claims([Claim("never 6", "none", measured=max(rolls), holds=max(rolls) < 6)])
        >>> sorted(path.name for path in (folder / "run").iterdir())
        ['cells', 'claims.json', 'config.json', 'metrics.jsonl', 'run.json']
    """

    def __init__(
        self,
        out: Path | str,
        *,
        name: str,
        kind: str,
        config: Mapping[str, object],
        seeds: Sequence[int],
        device: str | torch.device = "cpu",
        preset: str | None = None,
        resume: bool = False,
        quiet: bool = False,
        threads: int | None = None,
    ) -> None:
        require_name("name", name)
        require_choice("kind", kind, ("recipe", "compare"))
        if threads is not None:
            require_integer("threads", threads, 1)
        super().__init__(Path(out), name)
        self.kind = kind
        self.preset = preset
        self.seeds = require_seeds(seeds)
        self.device = require_device(device)
        self.config: dict[str, Any] = to_json(config, "config")
        self.resume = resume
        self._quiet = quiet
        self._threads = threads
        self._identity_parts = {
            "name": name,
            "kind": kind,
            "config": self.config,
            "device": self.device.type,
            "torch": torch.__version__,
        }
        self._identity = identity(self._identity_parts)
        self._cells: list[Cell] = []
        self._loaded = 0

    def __enter__(self) -> Lab:
        if self._entered:
            raise ArgumentError("lab", self.name, "a new Lab for each run")
        self._entered = True
        # a bar that cannot be shown is an error before anything is touched
        self._progress = Progress(self._quiet)
        self._release = claim_folder(self.out)
        try:
            note = open_folder(self.out, self._head(), resume=self.resume)
        except BaseException:
            self._release()
            raise
        self._started = time.time()
        self._old_threads = torch.get_num_threads()
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        self._machine = describe_machine(self.device)
        if note:
            self._note(note)
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)
        if self._threads is not None:
            torch.set_num_threads(self._old_threads)
        try:
            if error is None:
                self._write()
        finally:
            self._release()

    def plan(self, number_of_cells: int) -> None:
        """Say how many cells the run will have, for the bar and the time left.

        Args:
            number_of_cells: at least 0.
        """
        self._require_open()
        require_integer("number_of_cells", number_of_cells, 0)
        self._progress.plan(number_of_cells)

    def cell(self, name: str, function: Callable[[], T], *, seed: int) -> T:
        """Run one part of the work, or load it when an earlier run has done it.

        torch's, numpy's and Python's default generators are seeded from (name, seed) for the time of the
        cell and put back afterwards, so that a cell depends neither on its neighbours nor on a resume.

        Args:
            name: what the cell does, for example "spsa"; together with the seed unique in the run.
            function: called without arguments; returns JSON values (see `thalweg.lab.files.to_json`).
            seed: one of the seeds of the run, or another number of at least 0.

        Returns:
            What the function returned, after a passage through JSON: tuples are lists, the first time too.

        Raises:
            ArgumentError, ArgumentTypeError: a cell inside a cell, a name that came before, a result that is
                not JSON.
        """
        self._require_new(name, seed)
        self._progress.start(f"{name}, seed {seed}")
        cell = self._load(name, seed)
        loaded = cell is not None
        if cell is None:
            cell = self._compute(name, function, seed)
            write_cell(self.out / "cells", cell)
        self._loaded += loaded
        self._cells.append(cell)
        self._run.extend(cell.page)
        self._progress.finish(computed=not loaded)
        return cast(T, cell.result)

    def cells(self, jobs: Sequence[Job], *, workers: int | None = None) -> list[Any]:
        """Run many cells side by side, each in a process of its own, or load those of an earlier run.

        Choose it over `cell` where cells are many and each of them leaves a core idle; results are those of
        one `cell` after the other. What is timed belongs in a `cell`, where nothing else runs.

        Args:
            jobs: see `Job`.
            workers: how many at a time; None for as many as there are cores, on an accelerator one.

        Returns:
            What the functions returned, in the order of the jobs, after a passage through JSON.

        Raises:
            ArgumentError, ArgumentTypeError: as for `cell`.
        """
        for job in jobs:
            self._require_new(job.name, job.seed)
        require_distinct(jobs)
        if workers is None:
            workers = min(cores(), MOST_WORKERS) if self.device.type == "cpu" else 1
        require_integer("workers", workers, 1)
        found = {job.at: self._load(*job.at) for job in jobs}
        missing = [job for job in jobs if found[job.at] is None]
        self._progress.start(f"{len(missing)} cells side by side")
        for job, returned, seconds in run_jobs(missing, self.device, workers):
            cell = self._cell(job.name, job.seed, returned, Page(), seconds)
            write_cell(self.out / "cells", cell)
            found[job.at] = cell
            self._progress.finish(computed=True)
            self._progress.start(f"{job.name}, seed {job.seed} is done")
        for _ in range(len(jobs) - len(missing)):
            self._progress.finish(computed=False)
        self._loaded += len(jobs) - len(missing)
        self._cells += [cell for cell in found.values() if cell is not None]
        return [cell.result for cell in found.values() if cell is not None]

    def progress(self, total: int, description: str = "") -> Ticker:
        """Count steps inside a cell: call what you get once per step, and the time left moves with it.

        Args:
            total: how many steps the cell has, at least 1.
            description: a word or two for the bar.
        """
        self._require_open()
        return Ticker(self._progress, total, description)

    def _require_new(self, name: str, seed: int) -> None:
        self._require_open()
        if not isinstance(name, str) or not name.strip():
            raise ArgumentTypeError("name", name, "a string that says what the cell does")
        require_integer("seed", seed, 0)
        if self._in_cell is not None:
            raise ArgumentError("name", name, f"no cell inside the cell {self._in_cell[0]!r}")
        if any((cell.name, cell.seed) == (name, seed) for cell in self._cells):
            mend = "Its result would be written over the earlier one's."
            raise ArgumentError("name", name, f"a name that no cell of seed {seed} has had", mend)

    def _load(self, name: str, seed: int) -> Cell | None:
        if not self.resume:
            return None
        return read_cell(self.out, self.out / "cells", name, seed, self._identity)

    def _compute(self, name: str, function: Callable[[], T], seed: int) -> Cell:
        page = Page()
        self._in_cell = (name, seed, page)
        begun = time.perf_counter()
        try:
            with own_randomness(name, seed, self.device):
                returned = function()
        finally:
            self._in_cell = None
        return self._cell(name, seed, returned, page, time.perf_counter() - begun)

    def _cell(self, name: str, seed: int, returned: object, page: Page, seconds: float) -> Cell:
        result = from_json(to_json(returned, f"the result of cell {name!r}"))
        return Cell(name, seed, self._identity, result, page, round(seconds, 3))

    def _head(self) -> dict[str, Any]:
        return {
            "format": 1,
            "name": self.name,
            "kind": self.kind,
            "preset": self.preset,
            "seeds": list(self.seeds),
            "identity": self._identity_parts,
        }

    def _write(self) -> None:
        write_outcome(
            self.out,
            self._head(),
            claims=self._claims,
            page=self._run,
            cells=self._cells,
            documents=self._documents,
            machine=self._machine,
            started=self._started,
        )
        if self._loaded:
            self._note(f"{self._loaded} of {len(self._cells)} cells came from the earlier run.")

    def _note(self, text: str) -> None:
        if not self._quiet:
            print(text, file=sys.stderr)
