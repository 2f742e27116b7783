"""The board: each paper, whether its recipe is here, and what its recorded claims say."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thalweg.lab import Claim
from thalweg.lab.files import read_json
from thalweg.recipes import PAPERS, Paper, find
from thalweg.table import short


@dataclass(frozen=True, slots=True)
class Standing:
    """One line of the board.

    Args:
        paper: which paper.
        built: whether its recipe is in the package.
        claims: the claims of its recorded result, or of its latest run; empty without one.
    """

    paper: Paper
    built: bool
    claims: tuple[Claim, ...]

    @property
    def status(self) -> str:
        """ "not built", "not recorded", "holds", or how many of the asserted claims hold."""
        asserted = [claim for claim in self.claims if claim.asserted]
        if not self.built and not self.claims:
            return "not built"
        if not self.claims:
            return "not recorded"
        held = sum(claim.holds is True for claim in asserted)
        if not asserted:
            return "only reported"
        return "holds" if held == len(asserted) else f"{held} of {len(asserted)} hold"


def board(results: Mapping[str, Mapping[str, Any]], built: Collection[int] | None = None) -> list[Standing]:
    """Lay out what stands for each of the papers.

    Args:
        results: recorded results by name, as `read_results` gives them.
        built: numbers of the papers that have a recipe; None looks.

    Returns:
        One line for each paper, in order.
    """
    there = set(find()) if built is None else set(built)
    return [
        Standing(
            paper,
            paper.number in there,
            tuple(Claim.from_dict(claim) for claim in results.get(paper.name, {}).get("claims", ())),
        )
        for paper in PAPERS
    ]


def read_results(results_dir: Path | str) -> dict[str, dict[str, Any]]:
    """Read the committed results of a folder, by name; a missing folder has none."""
    found = {path.stem: read_json(path) for path in sorted(Path(results_dir).glob("*.json"))}
    # measurements of another shape may lie in the same folder
    return {
        name: value for name, value in found.items() if isinstance(value, dict) and value.get("format") == 1
    }


def markdown_board(results_dir: Path | str = "results", built: Collection[int] | None = None) -> str:
    """Write the board of the papers that are built as a table in Markdown, for the README.

    Args:
        results_dir: the folder of committed results.
        built: numbers of the papers that have a recipe; None looks.

    Returns:
        One row for each asserted claim of each recorded paper, a row for each that is built and not recorded;
        papers that are not built are not mentioned. Ends with a newline.

    Example:
        >>> print(markdown_board("no/such/folder", built=[6]).splitlines()[2])
        | 06 | [stochastic_neurons](https://arxiv.org/abs/1308.3432) | `stochastic` | not recorded yet | | |
    """
    lines = ["| | paper | piece | claim | measured | verdict |", "|---|---|---|---|---|---|"]
    for standing in board(read_results(results_dir), built):
        paper = standing.paper
        rooms = ", ".join(f"`{room}`" for room in paper.rooms)
        head = f"| {paper.number:02d} | [{paper.short_name}](https://arxiv.org/abs/{paper.arxiv}) | {rooms} |"
        rows = [claim for claim in standing.claims if claim.asserted]
        if standing.built and not standing.claims:
            lines.append(f"{head} not recorded yet | | |")
        for index, claim in enumerate(rows):
            lead = head if index == 0 else "| | | |"
            lines.append(f"{lead} {_cell(claim.statement)} | {measured(claim)} | {claim.verdict} |")
    return "\n".join(lines) + "\n"


def measured(claim: Claim) -> str:
    """Write a claim's number with its spread: "0.95 ± 0.01"."""
    if claim.spread is None:
        return short(claim.measured)
    return f"{short(claim.measured)} ± {short(claim.spread, 2)}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def counted(standings: Sequence[Standing]) -> dict[str, int]:
    """How many papers are built, recorded, and hold in all asserted claims."""
    return {
        "papers": len(standings),
        "built": sum(standing.built for standing in standings),
        "recorded": sum(bool(standing.claims) for standing in standings),
        "hold": sum(standing.status == "holds" for standing in standings),
    }
