"""The parts of the README that come from recorded results, so that its numbers are never typed in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thalweg.errors import ArgumentError
from thalweg.lab import record
from thalweg.report.board import markdown_board, read_results

COMPARISON = "compare_classify"
_FIGURE = "accuracy_against_cost"


def fill(readme: str, results_dir: Path | str) -> str:
    """Write every generated part of a README anew.

    A part stands between `<!-- NAME -->` and `<!-- /NAME -->`: "board" for the papers that are built,
    "compare" for the recorded comparison. A part whose marks are missing is left out.

    Args:
        readme: the text of the README.
        results_dir: the folder of committed results.

    Returns:
        The new text.

    Raises:
        ArgumentError: the README asks for a comparison that is not recorded.

    Example:
        >>> fill("no marks here", "no/such/folder")
        'no marks here'
    """
    if "<!-- board -->" in readme:
        readme = _between(readme, "board", markdown_board(results_dir))
    if "<!-- compare -->" in readme:
        results = read_results(results_dir)
        if COMPARISON not in results:
            mend = "Make one: make results."
            raise ArgumentError("results_dir", str(results_dir), f"a recorded {COMPARISON}", mend)
        readme = _between(readme, "compare", markdown_comparison(results[COMPARISON]))
    return readme


def markdown_comparison(result: Mapping[str, Any]) -> str:
    """Write a recorded comparison as its verdict, its table and where it was made."""
    table = result["tables"][0]
    lines = [f"> {table['title']}", "", _row(table["columns"]), _row(["---"] * len(table["columns"]))]
    lines += [_row(row) for row in table["rows"]]
    machine = result["machine"]
    held = sum(claim["holds"] is True for claim in result["claims"])
    lines += [
        "",
        f"{held} of {len(result['claims'])} asserted claims hold; torch {machine['torch']}, "
        f"{result['identity']['device']}, {result['timing']['seconds']:.0f} s.",
    ]
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _between(text: str, name: str, content: str) -> str:
    pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    return pattern.sub(lambda found: f"{found[1]}{content}{found[2]}", text)


def main() -> None:
    """Record the comparison in `runs/` and write the README's generated parts; `make results` calls it."""
    record(Path("runs") / COMPARISON, "results", figure=_FIGURE)
    path = Path("README.md")
    path.write_text(fill(path.read_text(encoding="utf-8"), "results"), encoding="utf-8")


if __name__ == "__main__":
    main()
