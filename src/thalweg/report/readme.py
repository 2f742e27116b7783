"""The parts of the README that come from recorded results, so that its numbers are never typed in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thalweg.errors import ArgumentError
from thalweg.lab import record
from thalweg.lab.record import read_run
from thalweg.recipes import find
from thalweg.report.board import markdown_board, read_results

COMPARISONS = {
    "compare": ("compare_classify", "accuracy_against_cost"),
    "sampler": ("compare_sampler", "error_against_bytes"),
}
"""By the name of their marks: the recorded comparisons, and the figure of each."""


def fill(readme: str, results_dir: Path | str) -> str:
    """Write every generated part of a README anew.

    A part stands between `<!-- NAME -->` and `<!-- /NAME -->`: "board" for the papers that are built,
    "compare" and "sampler" for recorded comparisons. A part whose marks are missing is left out.

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
    results = read_results(results_dir)
    for mark, (name, _) in COMPARISONS.items():
        if f"<!-- {mark} -->" not in readme:
            continue
        if name not in results:
            raise ArgumentError(
                "results_dir", str(results_dir), f"a recorded {name}", "Make one: make results."
            )
        readme = _between(readme, mark, markdown_comparison(results[name]))
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
    """Record what `make results` has run in `runs/`, and write the README's generated parts."""
    for name, figure in COMPARISONS.values():
        record(Path("runs") / name, "results", figure=figure)
    for recipe in find().values():
        run = Path("runs") / f"{recipe.name}-small"
        # the first figure of a recipe is the one it would show in a talk
        record(run, "results", figure=read_run(run)["figures"][0]["name"])
    path = Path("README.md")
    path.write_text(fill(path.read_text(encoding="utf-8"), "results"), encoding="utf-8")


if __name__ == "__main__":
    main()
