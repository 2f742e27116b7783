"""A progress bar with the time left, on standard error, and silence where nobody looks at a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from thalweg.errors import MissingExtraError, require_integer


class Progress:
    """The bar of one run: cells done out of cells planned, and how long the rest will take.

    Args:
        quiet: show nothing; also the case when standard error is not a terminal.

    Raises:
        MissingExtraError: a bar is wanted and rich is not installed.
    """

    def __init__(self, quiet: bool) -> None:
        self.planned = 0
        self.done = 0
        self.part = 0.0
        self._computed = 0.0
        self._seconds = 0.0
        self._started: float | None = None
        self._label = ""
        self._bar: Any = None
        self._task: Any = None
        if not quiet and sys.stderr.isatty():
            self._bar = _bar()

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("", total=None, cells="", left="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def plan(self, cells: int) -> None:
        """Say how many cells the run will have."""
        self.planned = cells
        self._show()

    def start(self, label: str) -> None:
        """A cell begins."""
        self._label, self.part, self._started = label, 0.0, time.perf_counter()
        self._show()

    def advance(self, part: float, label: str = "") -> None:
        """The cell in hand is done to this part, between 0 and 1."""
        self.part = min(part, 1.0)
        self._show(label)

    def finish(self, computed: bool) -> None:
        """A cell ends; one that was loaded says nothing about how long the others take."""
        self.done += 1
        self.part = 0.0
        if computed and self._started is not None:
            self._computed += 1
            self._seconds += time.perf_counter() - self._started
        self._started = None
        self._show()

    def seconds_left(self) -> float | None:
        """The time left at the pace of the cells computed so far, or None as long as it cannot be told."""
        pace = self._computed + self.part
        if not self.planned or pace == 0:
            return None
        running = time.perf_counter() - self._started if self._started is not None else 0.0
        rest = max(self.planned - self.done - self.part, 0.0)
        return (self._seconds + running) / pace * rest

    def _show(self, label: str = "") -> None:
        if self._bar is None:
            return
        left = self.seconds_left()
        self._bar.update(
            self._task,
            description=": ".join(text for text in (self._label, label) if text),
            total=self.planned or None,
            completed=self.done + self.part,
            cells=f"{self.done}/{self.planned} cells" if self.planned else f"{self.done} cells",
            left="" if left is None else f"{int(left) // 60}:{int(left) % 60:02d} left",
        )


class Ticker:
    """Counts the steps inside one cell, so that the time left moves also while a long cell runs.

    Args:
        progress: the bar of the run.
        total: how many steps the cell has, at least 1.
        description: a word or two for the bar.
    """

    def __init__(self, progress: Progress, total: int, description: str) -> None:
        require_integer("total", total, 1)
        self._progress, self._total, self._description, self._steps = progress, total, description, 0

    def __call__(self, steps: int = 1) -> None:
        """Say that so many more steps are done."""
        self._steps += steps
        self._progress.advance(self._steps / self._total, self._description)


def _bar() -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress
    except ImportError:
        raise MissingExtraError("rich", "recipes") from None
    return RichProgress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[cells]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}", markup=False),
        console=Console(stderr=True),
        refresh_per_second=4,
        transient=True,
    )
