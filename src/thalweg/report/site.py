"""A static site of all results: a board of the papers, and a page for each run. Opens from disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thalweg.errors import ArgumentError, MissingExtraError
from thalweg.lab import Claim, read_run
from thalweg.lab.files import from_json, to_json, write_bytes
from thalweg.report.board import board, counted, measured, read_results
from thalweg.table import short


@dataclass(frozen=True, slots=True)
class Recorded:
    """A run or a committed result on its way to its page.

    Args:
        slug: the page's name without ".html", and the name of the folder of its files.
        title: what was run.
        source: "run" or "result".
        record: the content of run.json or of the committed result.
        folder: where the record's files lie.
        claims: its claims.
        metrics: one entry per cell and quantity, see `_metrics`.
    """

    slug: str
    title: str
    source: str
    record: dict[str, Any]
    folder: Path
    claims: tuple[Claim, ...]
    metrics: tuple[dict[str, Any], ...]

    @property
    def asserted(self) -> tuple[Claim, ...]:
        """The claims that the run asserts."""
        return tuple(claim for claim in self.claims if claim.asserted)

    @property
    def status(self) -> str:
        """One word or three: "holds", "does not hold", "recorded" without asserted claims, "not finished"."""
        if self.record.get("status") != "finished":
            return "not finished"
        if not self.asserted:
            return "recorded"
        return "does not hold" if any(claim.failed for claim in self.asserted) else "holds"


def write_site(runs: Path | str, out: Path | str, *, results: Path | str = "results") -> Path:
    """Write the site; existing pages of the same names are replaced.

    Args:
        runs: folder whose subfolders are runs; one that is missing or holds none gives a site with the board.
        out: folder of the site, made when missing; not one of a run.
        results: folder of committed results.

    Returns:
        The path of index.html.

    Raises:
        ArgumentError: `out` is a file or the folder of a run, or a record cannot be read.
        MissingExtraError: jinja2 is not installed.
    """
    out = Path(out)
    if (out.exists() and not out.is_dir()) or (out / "run.json").exists():
        raise ArgumentError("out", str(out), "a folder for the site")
    environment = _environment()
    recorded = [*_runs(Path(runs)), *_results(Path(results))]
    # a committed result comes last and stands for its paper; a smoke run decides nothing
    decided = [
        each for each in recorded if each.status != "not finished" and each.record["preset"] != "smoke"
    ]
    outcomes = {each.record["name"]: each.record for each in decided}
    standings = board(outcomes)
    pages = {each.record["name"]: each.slug for each in decided}
    index = environment.get_template("index.html").render(
        standings=standings, counts=counted(standings), recorded=recorded, pages=pages, root=""
    )
    for each in recorded:
        for figure in each.record["figures"]:
            source = each.folder / figure["file"]
            if source.is_file():
                write_bytes(out / "runs" / each.slug / Path(figure["file"]).name, source.read_bytes())
        page = environment.get_template("run.html").render(run=each, record=each.record, root="../")
        write_bytes(out / "runs" / f"{each.slug}.html", page.encode())
    write_bytes(out / "index.html", index.encode())
    return out / "index.html"


def _runs(folder: Path) -> list[Recorded]:
    found = []
    for path in sorted(folder.glob("*/run.json")):
        record = read_run(path.parent)
        found.append(_recorded(path.parent.name, "run", record, path.parent))
    return found


def _results(folder: Path) -> list[Recorded]:
    return [
        _recorded(f"result-{name}", "result", record, folder) for name, record in read_results(folder).items()
    ]


def _recorded(slug: str, source: str, record: dict[str, Any], folder: Path) -> Recorded:
    # a run that has not finished has none of these yet
    record = {"claims": [], "figures": [], "tables": [], **record}
    claims = tuple(Claim.from_dict(claim) for claim in record["claims"])
    metrics = folder / "metrics.jsonl" if source == "run" else None
    rows = _metrics(metrics) if metrics is not None and metrics.is_file() else ()
    title = record["name"].replace("_", " ")
    return Recorded(slug, title, source, record, folder, claims, rows)


def _metrics(path: Path) -> tuple[dict[str, Any], ...]:
    """Reduce metrics.jsonl to one entry per cell and quantity: count, first, last, least and greatest."""
    values: dict[tuple[str, Any, str], list[float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = from_json(json.loads(line))
        cell, seed = row.pop("cell", ""), row.pop("seed", None)
        row.pop("timing", None)
        for name, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                values.setdefault((cell, seed, name), []).append(float(value))
    return tuple(
        {
            "cell": cell,
            "seed": seed,
            "name": name,
            "rows": len(found),
            "first": found[0],
            "last": found[-1],
            "least": min(found),
            "greatest": max(found),
        }
        for (cell, seed, name), found in values.items()
        if name != "step"
    )


def _environment() -> Any:
    try:
        import jinja2
    except ImportError:
        raise MissingExtraError("jinja2", "recipes") from None
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("thalweg.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = _number
    environment.filters["duration"] = _duration
    environment.filters["measured"] = measured
    environment.filters["numeric"] = lambda value: isinstance(value, int | float)
    environment.filters["plain"] = _plain
    return environment


def _number(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value)
    return short(value, 4) if isinstance(value, float) else str(value)


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(to_json(value, "value"), ensure_ascii=False)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"
