"""The committed outcome of a run: one small JSON file that says what held, where and when."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from thalweg.errors import ArgumentError
from thalweg.lab.files import read_json, write_json


def record(run_dir: Path | str, results_dir: Path | str, *, figure: str | None = None) -> Path:
    """Copy what is worth committing of a finished run to `results_dir/NAME.json`.

    Args:
        run_dir: the folder of a finished run.
        results_dir: the folder of committed results.
        figure: the name of one of the run's figures, copied to `results_dir/NAME.png`; None for none.

    Returns:
        The path of the JSON file: name, kind, preset, seeds, device, config, claims, tables, machine (with
        commit, processor and torch version) and timing.

    Raises:
        ArgumentError: no run there, one that is not finished, or one without that figure.
    """
    run_dir, results_dir = Path(run_dir), Path(results_dir)
    run = read_run(run_dir)
    if run["status"] != "finished":
        mend = "Go on with it: the same command and --resume."
        raise ArgumentError("run_dir", run_dir.name, "the folder of a finished run", mend)
    picture = None
    if figure is not None:
        found = [entry for entry in run["figures"] if entry["name"] == figure]
        if not found:
            names = ", ".join(entry["name"] for entry in run["figures"]) or "none"
            raise ArgumentError("figure", figure, f"one of the run's figures ({names})")
        picture = {"name": figure, "file": f"{run['name']}.png", "caption": found[0]["caption"]}
        results_dir.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run_dir / found[0]["file"], results_dir / picture["file"])
    keys = ("format", "name", "kind", "preset", "seeds", "identity", "passed", "claims", "tables", "machine")
    outcome: dict[str, Any] = {key: run[key] for key in keys}
    outcome["status"] = "finished"
    outcome["figures"] = [] if picture is None else [picture]
    outcome["timing"] = {key: run["timing"][key] for key in ("started", "seconds")}
    path = results_dir / f"{run['name']}.json"
    write_json(path, outcome)
    return path


def read_run(run_dir: Path | str) -> dict[str, Any]:
    """Read the run.json of a run, finished or not.

    Raises:
        ArgumentError: the folder holds no run.
    """
    path = Path(run_dir) / "run.json"
    if not path.is_file():
        raise ArgumentError("run_dir", Path(run_dir).name, "the folder of a run, with run.json in it")
    found = read_json(path)
    if not isinstance(found, dict) or found.get("format") != 1:
        raise ArgumentError("run_dir", Path(run_dir).name, "a run that this version of Thalweg can read")
    return found
