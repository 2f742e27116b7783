"""FILE.py:FUNCTION: what is accepted, and what each mistake is called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.lab.user_step import UserCodeError, load_step
from thalweg.step import Step

HEAD = "import torch\nmodel = torch.nn.Linear(2, 1)\nloss = lambda: model(torch.ones(3, 2)).mean()\n"


def write(folder: Path, body: str) -> str:
    (folder / "mine.py").write_text(HEAD + body)
    return f"{folder / 'mine.py'}:step"


def test_a_step_is_loaded_with_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "beside_mine.py").write_text("SCALE = 2.0\n")
    body = "def step():\n    from beside_mine import SCALE\n    return model, loss, model.parameters()\n"
    step = load_step(write(tmp_path, body))
    assert isinstance(step, Step)
    assert isinstance(step.parameters, tuple)
    assert [tuple(p.shape) for p in step.parameters] == [(1, 2), (1,)]
    assert step.closure().requires_grad


def test_dataclasses_in_the_file_work(tmp_path: Path) -> None:
    body = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        + HEAD
        + "@dataclass\nclass C:\n    x: int = 1\n"
        + "def step():\n    return Step(model, loss, list(model.parameters()))\n"
        + "from thalweg.step import Step\n"
    )
    (tmp_path / "mine.py").write_text(body)
    assert len(load_step(f"{tmp_path / 'mine.py'}:step").parameters) == 2


@pytest.mark.parametrize("source", ["mine.py", "mine:step", "mine.py:", "mine.py:a b", ":step", ""])
def test_other_forms_are_refused(source: str) -> None:
    with pytest.raises(ArgumentError, match=r"FILE\.py:FUNCTION"):
        load_step(source)


def test_missing_file_and_missing_function(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"nowhere\.py is not"):
        load_step(f"{tmp_path}/nowhere.py:step")
    with pytest.raises(ArgumentError, match="it defines loss, other"):
        load_step(write(tmp_path, "def other(): pass\n"))
    with pytest.raises(ArgumentTypeError, match="a function named step"):
        load_step(write(tmp_path, "step = 3\n"))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("None", r"mine\.py, line 4\): expected \(model, closure, parameters\), got None"),
        ("model, loss", "got 'a tuple of 2'"),
        ("loss, model, []", r"expected a torch\.nn\.Module"),
        ("model, model(torch.ones(3, 2)).mean(), model.parameters()", "a function without arguments"),
        ("model, loss, model", r"Return model\.parameters\(\)"),
        ("model, loss, model.named_parameters()", "at place 0"),
        ("model, loss, 3", "third part"),
        ("model, loss, []", "at least one parameter"),
    ],
)
def test_other_return_values_are_refused_with_file_and_line(
    tmp_path: Path, returned: str, message: str
) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError), match=message):
        load_step(write(tmp_path, f"def step():\n    return {returned}\n"))


def test_what_the_user_raised_is_kept(tmp_path: Path) -> None:
    with pytest.raises(UserCodeError, match="raised KeyError: 'lr'") as caught:
        load_step(write(tmp_path, "def step():\n    return {}['lr']\n"))
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(UserCodeError, match="could not be imported: SyntaxError"):
        load_step(write(tmp_path, "def step(:\n"))
    assert torch.is_grad_enabled()
