"""A training step out of the user's own file, named as FILE.py:FUNCTION."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from traceback import walk_tb
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from thalweg.errors import ArgumentError, ArgumentTypeError, NonFiniteError, UnsupportedError, describe
from thalweg.step import Step

_FORM = "Write `def FUNCTION(): return model, closure, parameters`."


class UserCodeError(RuntimeError):
    """The user's own file or function raised; `__cause__` is what it raised, with its traceback."""


def load_step(source: str) -> Step:
    """Import a file by its path and call one of its functions for a training step.

    Args:
        source: "FILE.py:FUNCTION"; the function takes no arguments and returns (model, closure, parameters).
            The file may import its neighbours, as when it is run as a script.

    Returns:
        The step; parameters that were an iterator are a tuple.

    Raises:
        ArgumentError, ArgumentTypeError: no such file or function, or another return value; the message says
            file, line and what came.
        UserCodeError: the file or the function raised.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "mine.py")
        >>> _ = file.write_text(
        ...     "import torch\\n"
        ...     "def step():\\n"
        ...     "    model = torch.nn.Linear(2, 1)\\n"
        ...     "    return model, lambda: model(torch.ones(4, 2)).mean(), model.parameters()\\n"
        ... )
        >>> len(load_step(f"{file}:step").parameters)
        2
    """
    if not isinstance(source, str):
        raise ArgumentTypeError("source", source, "a string such as 'train.py:step'")
    file, separator, name = source.rpartition(":")
    if not separator or not file.endswith(".py") or not name.isidentifier():
        raise ArgumentError("source", source, "FILE.py:FUNCTION, for example 'train.py:step'")
    path = Path(file)
    if not path.is_file():
        raise ArgumentError("source", source, f"a file that is there; {file} is not", _FORM)
    module = _import(path)
    function = getattr(module, name, None)
    if function is None:
        functions = [
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__
        ]
        has = f"it defines {', '.join(functions)}" if functions else "it defines none"
        raise ArgumentError("source", source, f"a function of {file}; {has}", _FORM)
    if not callable(function):
        raise ArgumentTypeError("source", function, f"a function named {name} in {file}", _FORM)
    return _checked(_call(function, f"{file}:{name}"), function, file, name)


@contextmanager
def users_code(source: str, *, aside: bool = False) -> Iterator[None]:
    """Run a body that calls the user's step: what the step raises is named as theirs.

    Args:
        source: "FILE.py:FUNCTION".
        aside: send what the step prints to standard error, so that standard output is free for JSON.

    Raises:
        UserCodeError: an exception that came through the file, our own refusals excepted.
    """
    file = source.rpartition(":")[0]
    try:
        with redirect_stdout(sys.stderr) if aside else nullcontext():
            yield
    except (ArgumentError, ArgumentTypeError, NonFiniteError, UnsupportedError, UserCodeError):
        raise
    except Exception as error:
        files = [Path(frame.f_code.co_filename).resolve() for frame, _ in walk_tb(error.__traceback__)]
        if Path(file).resolve() not in files:
            raise
        raise UserCodeError(f"{source} raised {type(error).__name__}: {error}") from error


def _import(path: Path) -> ModuleType:
    name = f"thalweg_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses and pickle look a class's module up by name
    sys.modules[name] = module
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        # stays: the step may import its neighbours as late as in its closure
        sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserCodeError(f"{path} could not be imported: {type(error).__name__}: {error}") from error
    return module


def _call(function: Callable[[], Any], where: str) -> Any:
    try:
        return function()
    except Exception as error:
        raise UserCodeError(f"{where} raised {type(error).__name__}: {error}") from error


def _checked(returned: Any, function: Callable[[], Any], file: str, name: str) -> Step:
    line = getattr(getattr(function, "__code__", None), "co_firstlineno", None)
    where = f"the return value of {name} ({file}, line {line})" if line else f"the return value of {name}"
    if not isinstance(returned, tuple) or len(returned) != 3:
        got = f"a {type(returned).__name__} of {len(returned)}" if isinstance(returned, tuple) else returned
        raise ArgumentTypeError(where, got, "(model, closure, parameters)", _FORM)
    model, closure, parameters = returned
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(where, model, "a torch.nn.Module as its first part", _FORM)
    if not callable(closure):
        mend = "The closure computes the loss when it is called: `lambda: criterion(model(x), y)`."
        raise ArgumentTypeError(where, closure, "a function without arguments as its second part", mend)
    if isinstance(parameters, nn.Module | Tensor):
        raise ArgumentTypeError(
            where, type(parameters), "the parameters as its third part", "Return model.parameters()."
        )
    try:
        found = tuple(parameters)
    except TypeError:
        raise ArgumentTypeError(where, parameters, "the parameters as its third part") from None
    for index, parameter in enumerate(found):
        if not isinstance(parameter, Tensor):
            got = f"{describe(parameter)} at place {index}"
            raise ArgumentTypeError(where, got, "tensors in its third part", "Return model.parameters().")
    if not found:
        raise ArgumentError(where, "no parameters", "at least one parameter in its third part")
    return Step(model, closure, found)
