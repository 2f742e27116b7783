"""`thalweg list`: the papers, and which of them have a recipe here."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from thalweg.recipes.contract import find
from thalweg.recipes.papers import PAPERS
from thalweg.table import align


def main(arguments: list[str]) -> int:
    """Print the papers with what stands after `thalweg list`; returns the exit status.

    Args:
        arguments: `--json` for JSON instead of a table.
    """
    parser = argparse.ArgumentParser(prog="thalweg list", allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    options = parser.parse_args(arguments)
    recipes = find()
    if options.json:
        papers = [asdict(paper) | {"recipe": paper.number in recipes} for paper in PAPERS]
        print(json.dumps(papers, indent=2, ensure_ascii=False))
        return 0
    rows = [
        [
            f"{paper.number:02d} {paper.short_name}",
            "yes" if paper.number in recipes else "not yet",
            str(paper.year),
            paper.arxiv,
            paper.title if len(paper.title) <= 60 else f"{paper.title[:57]}...",
        ]
        for paper in PAPERS
    ]
    print(align(["paper", "recipe", "year", "arXiv", "title"], rows))
    return 0
