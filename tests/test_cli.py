"""The commands as a user meets them: words, exit codes, one line for an error, the user's own traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from thalweg import cli
from thalweg.recipes import PAPERS

STEP = """
import torch

def step():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    x, y = torch.randn(16, 4), torch.randn(16, 1)
    return model, lambda: (model(x) - y).square().mean(), list(model.parameters())

def talks():
    print("loading")
    model, loss, parameters = step()
    return model, lambda: print("here") or loss(), parameters

def breaks_late():
    model, _, parameters = step()
    return model, lambda: model(torch.randn(16, 5)).mean(), parameters

def breaks():
    settings = {}
    return settings["learning rate"]
"""


def thalweg(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "thalweg.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"]])
def test_help_names_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    for command in cli._COMMANDS:
        assert f"  {command} " in shown


def test_no_command_and_a_wrong_one_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert cli.main(["walk"]) == 2
    assert "one of list, run, compare, doctor, report, got 'walk'" in capsys.readouterr().err


def test_list_has_every_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(PAPERS)
    assert cli.main(["list", "--json"]) == 0
    assert [paper["number"] for paper in json.loads(capsys.readouterr().out)] == list(range(1, 28))


def test_own_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "nowhere.py:step"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("thalweg: source: expected a file that is there")
    assert len(err.splitlines()) == 1


def test_the_users_own_error_shows_the_users_own_traceback(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(STEP)
    done = thalweg("doctor", "mine.py:breaks", cwd=tmp_path)
    assert done.returncode == 2
    assert 'settings["learning rate"]' in done.stderr
    assert "mine.py" in done.stderr
    assert "KeyError: 'learning rate'" in done.stderr
    assert "user_step.py" not in done.stderr
    assert "importlib" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("thalweg: mine.py:breaks raised KeyError")


def test_a_file_that_cannot_be_imported_shows_its_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import torch\nraise RuntimeError('no data')\n")
    done = thalweg("doctor", "mine.py:step", cwd=tmp_path)
    assert done.returncode == 2
    assert "line 2" in done.stderr
    assert "importlib" not in done.stderr


def test_interrupt_exits_with_130_and_tells_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._COMMANDS, "compare", interrupted)
    assert cli.main(["compare", "classify", "--out", "a b"]) == 130
    assert "thalweg compare classify --out 'a b' --resume" in capsys.readouterr().err
    assert cli.main(["compare", "classify", "--resume"]) == 130
    assert "--resume --resume" not in capsys.readouterr().err
    assert cli.main(["compare", "mine.py:step"]) == 130
    assert "--resume" not in capsys.readouterr().err
    monkeypatch.setitem(cli._COMMANDS, "list", interrupted)
    assert cli.main(["list"]) == 130
    assert "--resume" not in capsys.readouterr().err


def test_other_errors_are_bugs_and_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli._COMMANDS, "list", lambda arguments: {}["bug"])
    with pytest.raises(KeyError, match="bug"):
        cli.main(["list"])


def test_doctor_examines_a_users_step(tmp_path: Path) -> None:
    pytest.importorskip("thalweg.doctor.examine", reason="the doctor has not moved in yet")
    (tmp_path / "mine.py").write_text(STEP)
    done = thalweg("doctor", "mine.py:step", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    as_json = thalweg("doctor", "mine.py:step", "--json", cwd=tmp_path)
    assert as_json.returncode == 0, as_json.stderr
    assert isinstance(json.loads(as_json.stdout), dict)


@pytest.mark.parametrize("command", ["doctor", "compare"])
def test_what_a_users_step_prints_does_not_get_into_the_json(command: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(STEP)
    done = thalweg(command, "mine.py:talks", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), dict)
    assert done.stderr.startswith("loading\nhere\n")


@pytest.mark.parametrize("command", ["doctor", "compare"])
def test_a_closure_that_raises_shows_the_users_own_traceback(command: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(STEP)
    done = thalweg(command, "mine.py:breaks_late", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("thalweg: mine.py:breaks_late raised RuntimeError: mat1")
    frames = [line for line in done.stderr.splitlines() if line.startswith("  File ")]
    assert "mine.py" in frames[0]
