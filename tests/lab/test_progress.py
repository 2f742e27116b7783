"""The time left, and silence where nobody looks."""

from __future__ import annotations

import pytest

from thalweg.lab import progress as module
from thalweg.lab.progress import Progress, Ticker


def test_time_left_counts_computed_cells_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    bar = Progress(quiet=True)
    bar.plan(10)
    assert bar.seconds_left() is None
    for _ in range(4):
        bar.start("loaded")
        bar.finish(computed=False)
    assert bar.seconds_left() is None
    bar.start("computed")
    now[0] += 6.0
    bar.finish(computed=True)
    assert bar.seconds_left() == pytest.approx(5 * 6.0)
    bar.start("half done")
    tick = Ticker(bar, 4, "steps")
    now[0] += 3.0
    tick(2)
    assert bar.seconds_left() == pytest.approx(4.5 * 6.0)


def test_nothing_is_printed_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress(quiet=False) as bar:
        bar.plan(2)
        bar.start("a")
        bar.finish(computed=True)
    assert capfd.readouterr() == ("", "")
