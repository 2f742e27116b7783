"""A run: cells, what they hand in, what is written, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.lab import Claim, Lab


def lab_in(out: Path, **changes: Any) -> Lab:
    arguments: dict[str, Any] = {"name": "toy", "kind": "recipe", "config": {"width": 3}, "seeds": [0, 1]}
    return Lab(out, **(arguments | changes))


def draw() -> list[float]:
    return [float(torch.rand(())), random.random(), float(np.random.rand())]  # noqa: NPY002


def test_cells_draw_the_same_in_any_order_and_touch_no_global_state(tmp_path: Path) -> None:
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())  # noqa: NPY002
    with lab_in(tmp_path / "a") as lab:
        first = [lab.cell(name, draw, seed=0) for name in ("x", "y")]
    with lab_in(tmp_path / "b") as lab:
        second = [lab.cell(name, draw, seed=0) for name in ("y", "x")]
        other_seed = lab.cell("x", draw, seed=1)
    assert first == second[::-1]
    assert all(len({a, b, c}) == 3 for a, b, c in zip(first[0], first[1], other_seed))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()  # noqa: NPY002


def test_random_state_comes_back_when_a_cell_raises(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), lab_in(tmp_path) as lab:
        lab.cell("x", lambda: torch.rand(3).tolist()[0] / 0, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert not (tmp_path / "claims.json").exists()
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "unfinished"


def test_resume_loads_what_is_done_and_runs_the_rest(tmp_path: Path) -> None:
    calls: list[str] = []

    def work(name: str) -> dict[str, Any]:
        calls.append(name)
        return {"pair": (1, 2), "nan": float("nan"), "minus": float("-inf")}

    def interrupted() -> None:
        raise KeyboardInterrupt

    first = []
    with pytest.raises(KeyboardInterrupt), lab_in(tmp_path) as lab:  # noqa: PT012
        first.append(lab.cell("a", lambda: work("a"), seed=0))
        lab.cell("b", interrupted, seed=0)
    with lab_in(tmp_path, resume=True) as lab:
        again = lab.cell("a", lambda: work("a"), seed=0)
        lab.cell("b", lambda: work("b"), seed=0)
    assert calls == ["a", "b"]
    assert (
        repr(first[0]) == repr(again) == repr({"pair": [1, 2], "nan": float("nan"), "minus": float("-inf")})
    )


def test_without_resume_an_earlier_run_is_replaced(tmp_path: Path) -> None:
    with lab_in(tmp_path) as lab:
        lab.cell("a", lambda: 1, seed=0)
        lab.save("old", {"w": torch.zeros(1)})
        lab.document("old", 1)
    (tmp_path / "notes.txt").write_text("mine")
    with lab_in(tmp_path, config={"width": 4}) as lab:
        assert lab.cell("a", lambda: 2, seed=0) == 2
    assert not (tmp_path / "weights" / "old.safetensors").exists()
    assert not (tmp_path / "old.json").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_cell_whose_weights_are_gone_or_changed_runs_again(tmp_path: Path) -> None:
    def work() -> int:
        lab.save("w", {"w": torch.rand(2)})
        return 1

    with lab_in(tmp_path) as lab:
        lab.cell("a", work, seed=0)
    whole = (tmp_path / "weights" / "w.safetensors").read_bytes()
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(b"half")):
        damage(tmp_path / "weights" / "w.safetensors")
        with lab_in(tmp_path, resume=True) as lab:
            lab.cell("a", work, seed=0)
        assert (tmp_path / "weights" / "w.safetensors").read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"width": 4}}, "width 3 -> 4"),
        ({"config": {"width": 3, "depth": 1}}, "depth None -> 1"),
        ({"name": "other"}, "name 'toy' -> 'other'"),
    ],
)
def test_resume_is_refused_under_another_configuration(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with lab_in(tmp_path):
        pass
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(ArgumentError, match=message), lab_in(tmp_path, resume=True, **change):
        pass
    assert (tmp_path / "run.json").read_bytes() == before


def test_resume_may_add_seeds(tmp_path: Path) -> None:
    with lab_in(tmp_path, seeds=[0]) as lab:
        lab.cell("a", lambda: "first", seed=0)
    with lab_in(tmp_path, seeds=[0, 1], resume=True) as lab:
        assert [lab.cell("a", lambda: "second", seed=seed) for seed in lab.seeds] == ["first", "second"]


def test_what_is_handed_in_is_written_with_its_cell(tmp_path: Path) -> None:
    def work() -> None:
        lab.log(step=1, loss=0.5)
        lab.table("T", ["a", "b"], [[1, None]])
        figure = Figure()
        figure.add_subplot().plot([1, 2])
        lab.figure("curve", figure, "A curve.")
        lab.save("net", {"weight": torch.arange(3.0), "tied": torch.arange(6.0)[::2]})

    with lab_in(tmp_path) as lab:
        lab.log(note="outside")
        lab.cell("a", work, seed=1)
        lab.document("extra", {"rows": [1.5]})
        lab.claims([Claim("c", "none", 1.0, holds=True), Claim("d", "none", 2.0, holds=False)])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"note": "outside"}, {"cell": "a", "seed": 1, "step": 1, "loss": 0.5}]
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["status"] == "finished"
    assert run["passed"] is False
    assert run["tables"] == [{"title": "T", "columns": ["a", "b"], "rows": [[1, None]]}]
    assert (tmp_path / run["figures"][0]["file"]).read_bytes().startswith(b"\x89PNG")
    weights = load_file(tmp_path / run["weights"][0]["file"])
    assert torch.equal(weights["tied"], torch.tensor([0.0, 2.0, 4.0]))
    assert json.loads((tmp_path / "extra.json").read_text()) == {"rows": [1.5]}
    assert [claim["holds"] for claim in json.loads((tmp_path / "claims.json").read_text())["claims"]] == [
        True,
        False,
    ]
    assert not list(tmp_path.rglob("*.partial"))


def test_threads_are_set_only_when_asked_and_put_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    with lab_in(tmp_path / "a", threads=before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with lab_in(tmp_path / "b"):
        assert torch.get_num_threads() == before


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ArgumentError, match="out: expected a new folder"), lab_in(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_runs_in_one_folder_at_once_are_refused(tmp_path: Path) -> None:
    with lab_in(tmp_path) as lab:
        lab.cell("a", lambda: 1, seed=0)
        with pytest.raises(ArgumentError, match="no other run"), lab_in(tmp_path, resume=True):
            pass
        assert lab.cell("b", lambda: 2, seed=0) == 2
    with lab_in(tmp_path, resume=True) as lab:
        assert lab.cell("b", lambda: 3, seed=0) == 2
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArgumentError, match="out: expected a folder"), lab_in(tmp_path / "file"):
        pass


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"name": "../up"}, "name"),
        ({"name": 3}, "name"),
        ({"kind": "poem"}, "kind"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [0, 0]}, "seeds"),
        ({"seeds": [-1]}, r"seeds\[0\]"),
        ({"seeds": 3}, "seeds"),
        ({"device": "abacus"}, "device"),
        ({"device": "cuda:99"}, "device"),
        ({"threads": 0}, "threads"),
        ({"config": {"w": torch.zeros(1)}}, "config"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, change: dict[str, Any], argument: str) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError), match=argument):
        lab_in(tmp_path / "run", **change)
    assert not (tmp_path / "run").exists()


def test_wrong_calls_inside_a_run_are_named(tmp_path: Path) -> None:
    with lab_in(tmp_path) as lab:
        lab.cell("a", lambda: 1, seed=0)
        lab.save("w", {"w": torch.zeros(1)})
        for call, message in [
            (lambda: lab.cell("a", lambda: 1, seed=0), "a name that no cell of seed 0 has had"),
            (lambda: lab.cell("t", lambda: torch.zeros(1), seed=0), "the result of cell 't'"),
            (lambda: lab.cell("k", lambda: {1: 2}, seed=0), "a string"),
            (lambda: lab.cell("n", lambda: lab.cell("m", lambda: 1, seed=0), seed=0), "no cell inside"),
            (lambda: lab.cell("", lambda: 1, seed=0), "name"),
            (lambda: lab.cell("s", lambda: 1, seed=-1), "seed"),
            (lambda: lab.table("T", ["a"], [[1, 2]]), r"rows\[0\]: expected 1 values"),
            (lambda: lab.save("w", {"w": torch.zeros(1)}), "none of the run's weights"),
            (lambda: lab.save("v", {"w": 3}), "a tensor"),  # type: ignore[dict-item]
            (lambda: lab.figure("f", 3), "a matplotlib figure"),
            (lambda: lab.document("run", 1), "does not use itself"),
            (lambda: lab.claims([{"statement": "x"}]), r"claims\[0\]"),  # type: ignore[list-item]
            (lambda: lab.log(loss=torch.zeros(1)), "metrics"),
            (lambda: lab.progress(0), "total"),
            (lambda: lab.plan(-1), "number_of_cells"),
        ]:
            with pytest.raises((ArgumentError, ArgumentTypeError), match=message):
                call()
    assert [cell.name.split("-")[0] for cell in (tmp_path / "cells").iterdir()] == ["a"]


def test_nothing_is_handed_in_before_the_run_begins(tmp_path: Path) -> None:
    lab = lab_in(tmp_path)
    with pytest.raises(ArgumentError, match="with Lab"):
        lab.log(loss=1)
    with pytest.raises(ArgumentError, match="with Lab"):
        lab.plan(3)


def test_replacing_a_run_deletes_nothing_outside_its_folder(tmp_path: Path) -> None:
    with lab_in(tmp_path / "run") as lab:
        lab.cell("one", draw, seed=0)
    kept = tmp_path / "kept.txt"
    kept.write_text("mine")
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text())
    record["weights"] = [{"name": "kept", "file": "../kept.txt", "sha256": ""}]
    path.write_text(json.dumps(record))
    with lab_in(tmp_path / "run"):
        pass
    assert kept.read_text() == "mine"
