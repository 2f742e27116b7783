"""The files that a run ends with: metrics.jsonl, claims.json, run.json."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thalweg.lab.cells import Cell, Page
from thalweg.lab.claim import Claim
from thalweg.lab.files import to_json, write_bytes, write_json


def write_outcome(
    out: Path,
    head: dict[str, Any],
    *,
    claims: Sequence[Claim],
    page: Page,
    cells: Sequence[Cell],
    documents: Sequence[str],
    machine: dict[str, Any],
    started: float,
) -> None:
    """Write what a finished run has to say; what differs between repetitions stands under machine and timing.

    Args:
        out: the folder of the run.
        head: what run.json has said from the start: format, name, kind, preset, seeds, identity.
        claims: in the order in which they shall be read.
        page: metrics, tables, figures and weights of the whole run.
        cells: in the order in which they were asked for.
        documents: names of further JSON files.
        machine: as `describe_machine` gives it.
        started: seconds since the epoch.
    """
    verdict = {
        "passed": not any(claim.failed for claim in claims),
        "claims": [claim.to_dict() for claim in claims],
    }
    # run.json last: a run that calls itself finished has all its files
    write_bytes(out / "metrics.jsonl", "".join(_line(row) for row in page.metrics).encode())
    write_json(
        out / "claims.json", {name: head[name] for name in ("name", "kind", "preset", "seeds")} | verdict
    )
    record = {
        **head,
        "status": "finished",
        **verdict,
        "tables": page.tables,
        # a figure may draw times, so that its hash would make equal runs differ
        "figures": [{key: entry[key] for key in ("name", "file", "caption")} for entry in page.figures],
        "weights": page.weights,
        "documents": [f"{name}.json" for name in documents],
        "cells": [{"cell": cell.name, "seed": cell.seed} for cell in cells],
        "machine": machine,
        "timing": {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "seconds": round(time.time() - started, 3),
            "cells": [{"cell": cell.name, "seed": cell.seed, "seconds": cell.seconds} for cell in cells],
        },
    }
    write_json(out / "run.json", record)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(to_json(row, "metrics"), ensure_ascii=False, allow_nan=False) + "\n"
