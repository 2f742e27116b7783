"""`thalweg report`: write the site."""

from __future__ import annotations

import argparse
from pathlib import Path

from thalweg.report.site import write_site


def main(arguments: list[str]) -> int:
    """Write the site with what stands after `thalweg report`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="thalweg report", description="Write all results as a static site.", allow_abbrev=False
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs (runs)")
    parser.add_argument("--results", type=Path, default=Path("results"), help="recorded results (results)")
    parser.add_argument("--out", type=Path, default=Path("site"), help="folder of the site (site)")
    options = parser.parse_args(arguments)
    print(f"open {write_site(options.runs, options.out, results=options.results)}")
    return 0
