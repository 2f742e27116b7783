"""The package as a whole: its floors, its import, its wheel, its names."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "thalweg"


def rooms() -> set[str]:
    """Every module and package directly below `thalweg`."""
    found = {path.stem for path in SOURCE.glob("*.py") if path.stem != "__init__"}
    return found | {path.parent.name for path in SOURCE.glob("*/__init__.py")}


def test_the_floors_see_every_room() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    names = [name.strip() for layer in contract["layers"] for name in layer.replace("|", ":").split(":")]
    planned = {name.strip("()") for name in names if name.startswith("(")}
    assert contract["exhaustive"] is True
    assert rooms() | planned == {name.strip("()") for name in names}


def test_the_floors_catch_an_arrow_that_points_up(tmp_path: Path) -> None:
    """The contract is alive: the same configuration breaks on a copy with one wrong import."""
    import shutil

    shutil.copytree(SOURCE, tmp_path / "src" / "thalweg", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    wrong = tmp_path / "src" / "thalweg" / "gates" / "clip.py"
    wrong.write_text(wrong.read_text() + "\nimport thalweg.comparison\n")
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "src")}, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "thalweg.gates" in done.stdout


def test_no_room_has_a_name_that_says_nothing() -> None:
    empty = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert not [path for path in SOURCE.rglob("*") if path.stem in empty]


def test_importing_thalweg_brings_in_torch_and_nothing_heavier() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import thalweg\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new & {'numpy', 'matplotlib', 'sklearn', 'rich', 'tyro', 'jinja2', 'scipy'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_exported_name_exists_and_is_documented() -> None:
    import thalweg

    for name in thalweg.__all__:
        value = getattr(thalweg, name)
        assert value.__doc__, f"thalweg.{name} has no docstring"


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_everything_public_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path.name}: the module has no docstring"
    kinds = (ast.FunctionDef, ast.ClassDef)
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    methods = [
        inner
        for node in public
        if isinstance(node, ast.ClassDef)
        for inner in node.body
        if isinstance(inner, ast.FunctionDef) and not inner.name.startswith(("_", "forward"))
    ]
    bare = [node.name for node in [*public, *methods] if not ast.get_docstring(node)]
    assert not bare, f"without a docstring: {bare}"


def test_a_wheel_works_without_the_checkout(tmp_path: Path) -> None:
    """Built, unpacked elsewhere and imported there: code, type marker and templates are all in it."""
    build = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path / "dist"),
        str(ROOT),
    ]
    subprocess.run(build, check=True, capture_output=True, cwd=tmp_path)
    wheel = next((tmp_path / "dist").glob("thalweg-*.whl"))
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(tmp_path / "site"),
    ]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    code = (
        "import thalweg, pathlib; here = pathlib.Path(thalweg.__file__).parent\n"
        "assert (here / 'py.typed').exists() and list((here / 'report' / 'templates').iterdir())\n"
        "import torch; w = torch.ones(2, requires_grad=True)\n"
        "thalweg.backward(lambda: (w**2).sum(), [w], gradient=thalweg.SPSA()); print(here)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(str(tmp_path / "site"))
