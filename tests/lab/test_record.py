"""What is committed of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from thalweg.errors import ArgumentError
from thalweg.lab import Claim, Lab, read_run, record


def finished(out: Path) -> Path:
    with Lab(
        out, name="06_stochastic_neurons", kind="recipe", config={"w": 1}, seeds=[0], preset="small"
    ) as lab:
        lab.figure("curve", Figure(), "A curve.")
        lab.claims([Claim("c", "none", 1.0, 0.5, holds=True)])
    return out


def test_a_record_carries_what_is_needed_to_believe_it(tmp_path: Path) -> None:
    path = record(finished(tmp_path / "run"), tmp_path / "results", figure="curve")
    found = json.loads(path.read_text())
    assert path.name == "06_stochastic_neurons.json"
    assert found["claims"] == [Claim("c", "none", 1.0, 0.5, holds=True).to_dict()]
    assert found["preset"] == "small"
    assert found["seeds"] == [0]
    assert {"commit", "torch", "processor"} <= found["machine"].keys()
    assert (tmp_path / "results" / found["figures"][0]["file"]).read_bytes().startswith(b"\x89PNG")


def test_an_unfinished_run_is_not_recorded(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        Lab(tmp_path / "run", name="a", kind="recipe", config={}, seeds=[0]),
    ):
        1 / 0  # noqa: B018
    with pytest.raises(ArgumentError, match="finished"):
        record(tmp_path / "run", tmp_path / "results")
    with pytest.raises(ArgumentError, match=r"run\.json"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ArgumentError, match=r"figures \(curve\)"):
        record(finished(tmp_path / "other"), tmp_path / "results", figure="map")
    assert not (tmp_path / "results").exists()
