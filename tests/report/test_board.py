"""The board of the papers, and its agreement with the README."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from thalweg.lab import Claim, Lab, record
from thalweg.recipes import find
from thalweg.report import board, markdown_board
from thalweg.report.board import counted, read_results

ROOT = Path(__file__).resolve().parents[2]
HOLDS = Claim("a | b", "none", 1.0, 0.25, holds=True)
FAILS = Claim("c", "none", 2.0, holds=False)
SHOWN = Claim("d", "none", 3.0, holds=None, asserted=False)


def results(folder: Path, claims: list[Claim]) -> Path:
    run = folder / "run"
    with Lab(run, name="06_stochastic_neurons", kind="recipe", config={}, seeds=[0]) as lab:
        lab.claims(claims)
    record(run, folder / "results")
    return folder / "results"


@pytest.mark.parametrize(
    ("claims", "status"),
    [
        ([HOLDS], "holds"),
        ([HOLDS, SHOWN], "holds"),
        ([HOLDS, FAILS], "1 of 2 hold"),
        ([FAILS], "0 of 1 hold"),
        ([SHOWN], "only reported"),
        ([], "not recorded"),
    ],
)
def test_standing_counts_asserted_claims(tmp_path: Path, claims: list[Claim], status: str) -> None:
    standings = board(read_results(results(tmp_path, claims)), built=[6])
    assert [standing.status for standing in standings if standing.paper.number == 6] == [status]
    assert {standing.status for standing in standings if standing.paper.number != 6} == {"not built"}
    assert counted(standings)["hold"] == (status == "holds")


def test_markdown_has_one_row_per_asserted_claim(tmp_path: Path) -> None:
    lines = markdown_board(results(tmp_path, [HOLDS, FAILS, SHOWN]), built=[6]).splitlines()
    assert len(lines) == 2 + 2
    assert "a \\| b | 1 ± 0.25 | holds |" in lines[2]
    assert lines[3] == "| | | | c | 2 | does not hold |"
    for line in lines:
        assert len(re.findall(r"(?<!\\)\|", line)) == 7


def test_readme_agrees_with_results() -> None:
    """Between the two marks of the README stands exactly what the committed results give."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    marked = re.search(r"<!-- board -->\n(.*?)<!-- /board -->", readme, re.DOTALL)
    if marked is None:
        assert not find(), "recipes are here, and the README has no board between <!-- board --> marks"
        pytest.skip("no recipe is here yet, so that the README has no board")
    assert marked[1].strip() == markdown_board(ROOT / "results").strip()
