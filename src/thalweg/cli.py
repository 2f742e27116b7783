"""The commands: `thalweg list`, `run`, `compare`, `doctor`, `report`."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
import traceback
from collections.abc import Callable

USAGE = """\
usage: thalweg COMMAND ...

  list                        the papers, and which of them have a recipe here
  run NN [options]            run the recipe of paper NN and check its claims
  compare TASK [options]      lay gradient routes side by side on real data
  compare FILE.py:FUNCTION    the same on your own training step
  doctor FILE.py:FUNCTION     what is wrong with the gradient of your own training step
  report [--runs DIR]         all results as a static site

`thalweg COMMAND --help` tells the options of a command."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; what `thalweg` and `python -m thalweg.cli` call.

    Args:
        arguments: what stands after `thalweg`; None takes the process's own.

    Returns:
        The exit status: 0, 1 when `--check` finds an asserted claim that does not hold, 2 for a wrong
        argument (one line on standard error), 130 after Ctrl-C.

    Example:
        >>> main(["walk"])
        2
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if given else 2
    command, *rest = given
    if command == "--version":
        from thalweg import __version__

        print(f"thalweg {__version__}")
        return 0
    if command not in _COMMANDS:
        return _refuse(f"COMMAND: expected one of {', '.join(_COMMANDS)}, got {command!r}")
    try:
        status = _COMMANDS[command](rest)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return _interrupted(given)
    except BrokenPipeError:
        # a reader such as `head` that has seen enough; nothing may be flushed into its closed pipe at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        return _explain(error)


def _module_command(module: str) -> Callable[[list[str]], int]:
    # imported when called: `thalweg --help` and a wrong word must not wait for the rest of the library
    def command(arguments: list[str]) -> int:
        main: Callable[[list[str]], int] = importlib.import_module(module).main
        return main(arguments)

    return command


def _doctor(arguments: list[str]) -> int:
    import argparse
    import json

    parser = argparse.ArgumentParser(prog="thalweg doctor", allow_abbrev=False)
    parser.add_argument("source", metavar="FILE.py:FUNCTION", help="a function that returns a training step")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    options = parser.parse_args(arguments)

    from thalweg.lab.files import to_json
    from thalweg.lab.user_step import load_step, users_code

    with users_code(options.source, aside=options.json):
        step = load_step(options.source)
        examination = importlib.import_module("thalweg.doctor").examine(*step)
    if options.json:
        print(json.dumps(to_json(examination.to_dict(), "examination"), indent=2, allow_nan=False))
    else:
        print(examination)
    return 0


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "list": _module_command("thalweg.recipes.listing"),
    "run": _module_command("thalweg.recipes.command"),
    "compare": _module_command("thalweg.comparison.command"),
    "doctor": _doctor,
    "report": _module_command("thalweg.report.command"),
}


def _interrupted(given: list[str]) -> int:
    print("\ninterrupted", file=sys.stderr)
    if given[0] in ("run", "compare") and not any(".py:" in word for word in given[1:2]):
        again = given if "--resume" in given else [*given, "--resume"]
        print(f"what is done is kept; go on with: thalweg {shlex.join(again)}", file=sys.stderr)
    return 130


def _explain(error: Exception) -> int:
    from thalweg.errors import (
        ArgumentError,
        ArgumentTypeError,
        MissingExtraError,
        NonFiniteError,
        UnsupportedError,
    )
    from thalweg.lab.user_step import UserCodeError

    if isinstance(error, UserCodeError) and error.__cause__ is not None:
        # from the user's first frame on: ours, torch's and importlib's before it say nothing to them
        cause = error.__cause__
        shown = cause.__traceback__
        while shown is not None and _is_ours(shown.tb_frame.f_code.co_filename):
            shown = shown.tb_next
        traceback.print_exception(type(cause), cause, shown)
        return _refuse(str(error))
    own = (ArgumentError, ArgumentTypeError, MissingExtraError, NonFiniteError, UnsupportedError)
    if isinstance(error, own):
        return _refuse(str(error))
    raise error


def _is_ours(file: str) -> bool:
    import torch

    homes = (os.path.dirname(os.path.abspath(__file__)), os.path.dirname(torch.__file__))
    return file.startswith(("<frozen importlib", *(home + os.sep for home in homes)))


def _refuse(message: str) -> int:
    print(f"thalweg: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
