"""Every command and example of the README runs, and its numbers are those of the recorded results."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from thalweg.cli import main
from thalweg.report.readme import COMPARISONS, fill

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands(first: str) -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if line.startswith(first)]


@pytest.mark.parametrize("code", blocks("python"))
def test_example_runs_and_says_what_it_promises(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    assert "D1" in printed
    assert "nothing found" in printed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "examples", copy / "examples")
    return copy


@pytest.mark.parametrize("command", commands("thalweg"))
def test_command_runs(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # in this process: that the installed command starts one of its own is tested with the command line
    monkeypatch.chdir(folder)
    program, *arguments = shlex.split(command)
    assert program == "thalweg"
    status = main(arguments)
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert printed.out.strip()


@pytest.mark.parametrize("command", commands("make"))
def test_make_knows_the_command(command: str) -> None:
    target = command.split("#")[0].split()
    done = subprocess.run([*target, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_diffs_name_only_what_there_is() -> None:
    """Whatever a diff, a table or a list calls tw.NAME exists."""
    import thalweg as tw

    names = set(re.findall(r"\btw\.([A-Za-z_]+(?:\.[A-Za-z_]+)?)", README))
    assert {"backward", "SPSA", "doctor.examine", "gates.clip"} <= names
    for name in names:
        value = tw
        for part in name.split("."):
            value = getattr(value, part)


def test_every_example_is_at_most_twelve_lines() -> None:
    assert len(blocks("diff")) == 3
    assert all(len(block.splitlines()) <= 12 for block in blocks("diff"))


def test_the_numbers_are_those_of_the_recorded_results() -> None:
    for name, _ in COMPARISONS.values():
        assert (ROOT / "results" / f"{name}.png").is_file()
    assert fill(README, ROOT / "results") == README


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
