"""`thalweg run` in a process of its own: kill and resume, check, JSON, seeds, fields, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}


def thalweg(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(HERE / "toy_command.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=ENVIRONMENT,
        timeout=120,
        check=False,
    )


def start(*arguments: object, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(HERE / "toy_command.py"), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=ENVIRONMENT,
        # a shell that runs the tests in the background hands down an ignored Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for_cells(out: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(list(out.glob("cells/*.json"))) < count:
        assert time.monotonic() < deadline, "the run wrote no cells"
        time.sleep(0.02)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(each) for key, each in value.items() if key not in ("timing", "machine")}
    if isinstance(value, list):
        return [without_times(each) for each in value]
    return value


def contents(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.suffix == ".json":
            found[name] = without_times(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            found[name] = [without_times(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def test_killed_and_resumed_run_ends_with_the_same_files(tmp_path: Path) -> None:
    request = ("run", 91, "--seeds", 3, "--throws", 30, "--pause", 0.01)
    assert thalweg(*request, "--out", "whole", cwd=tmp_path).returncode == 0
    process = start(*request, "--out", "killed", cwd=tmp_path)
    wait_for_cells(tmp_path / "killed", 2)
    process.kill()
    process.communicate(timeout=60)
    assert not (tmp_path / "killed" / "claims.json").exists()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "cells").glob("*.json")}
    assert len(done) < 6, "the kill came too late to mean anything"
    assert thalweg(*request, "--out", "killed", "--resume", cwd=tmp_path).returncode == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == before for path, before in done.items()), "a done cell ran again"


def test_one_interrupt_tells_how_to_resume(tmp_path: Path) -> None:
    request = ("run", 91, "--pause", "0.05", "--out", "a folder")
    process = start(*request, cwd=tmp_path)
    wait_for_cells(tmp_path / "a folder", 0)
    deadline = time.monotonic() + 60
    while not (tmp_path / "a folder" / "config.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "holds" not in out
    assert "thalweg run 91 --pause 0.05 --out 'a folder' --resume" in err
    assert "Traceback" not in err


def test_check_fails_with_an_asserted_claim_only(tmp_path: Path) -> None:
    common = ("run", "91", "--preset", "smoke", "--check", "--out")
    assert thalweg(*common, "good", cwd=tmp_path).returncode == 0
    failed = thalweg(*common, "bad", "--bound", 0.5, cwd=tmp_path)
    assert failed.returncode == 1
    assert "does not hold" in failed.stdout
    unchecked = thalweg("run", 91, "--preset", "smoke", "--bound", 0.5, "--out", "other", cwd=tmp_path)
    assert unchecked.returncode == 0


def test_json_is_claims_json_and_nothing_else(tmp_path: Path) -> None:
    done = thalweg("run", 91, "--preset", "smoke", "--seed", 4, "--seeds", 2, "--json", cwd=tmp_path)
    assert done.returncode == 0
    out = tmp_path / "runs" / "91_dice-smoke"
    assert done.stdout == (out / "claims.json").read_text()
    assert json.loads(done.stdout)["seeds"] == [4, 5]
    # what the recipe itself prints is moved aside
    assert done.stderr == "a recipe may print; --json must not mind\n"
    weights = list((out / "weights").glob("*.safetensors"))
    assert len(weights) == 4


def test_no_output_names_the_machine_or_the_folder(tmp_path: Path) -> None:
    assert thalweg("run", 91, "--preset", "smoke", cwd=tmp_path).returncode == 0
    for path in (tmp_path / "runs").rglob("*.json*"):
        text = path.read_text()
        assert str(tmp_path) not in text, path
        assert str(HERE) not in text, path
        assert os.uname().nodename not in text, path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "92"], "NN: expected the number of a paper that has a recipe here (91), got '92'"),
        (["run", "91", "--preset", "gpu"], "preset: expected one of smoke, small"),
        (["run", "91", "--seeds", "0"], "seeds: expected an integer of at least 1, got 0"),
        (["run", "91", "--device", "tpu9"], "device: expected 'cpu' or 'cuda', got 'tpu9'"),
        (["run", "91", "--width", "3"], "--width"),
        (["run", "91", "--throws", "many"], "many"),
    ],
)
def test_wrong_arguments_are_refused_and_leave_nothing(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = thalweg(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_resume_under_another_configuration_says_what_differs(tmp_path: Path) -> None:
    assert thalweg("run", 91, "--preset", "smoke", "--out", "run", cwd=tmp_path).returncode == 0
    before = contents(tmp_path / "run")
    done = thalweg("run", 91, "--preset", "smoke", "--out", "run", "--sides", 8, "--resume", cwd=tmp_path)
    assert done.returncode == 2
    assert "sides 6 -> 8" in done.stderr
    assert contents(tmp_path / "run") == before


def test_help_tells_the_fields_of_the_recipe(tmp_path: Path) -> None:
    done = thalweg("run", 91, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "--resume" in done.stdout
    assert "--throws" in done.stdout
    assert "how often, per cell" in done.stdout
