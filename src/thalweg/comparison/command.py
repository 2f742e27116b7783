"""`thalweg compare TASK` and `thalweg compare FILE.py:FUNCTION`."""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from thalweg.comparison import tasks
from thalweg.comparison.compare import compare, default_routes
from thalweg.comparison.rows import Comparison
from thalweg.errors import ArgumentError, MissingExtraError


@dataclass(frozen=True, slots=True)
class Output:
    """Where the outcome goes.

    Args:
        json: print the outcome as JSON, and nothing else, on standard output.
        out: folder for the run; runs/compare_TASK by default.
        resume: go on with an interrupted run in that folder; the result is the same.
        check: exit with 1 when an asserted claim does not hold.
    """

    json: bool = False
    out: Path | None = None
    resume: bool = False
    check: bool = False


@dataclass(frozen=True, slots=True)
class StepOptions:
    """How to compare routes on a step of your own.

    Args:
        routes: names among those that suit the step; none for all.
        standard_error: draw until the bias of a route is known this well ...
        limit: ... but at most this often ...
        seconds: ... and no longer than about this per route.
        seed: names the random draws.
        json: print the outcome as JSON, and nothing else, on standard output.
    """

    routes: tuple[str, ...] = ()
    standard_error: float = 0.05
    limit: int = 1000
    seconds: float = 4.0
    seed: int = 0
    json: bool = False


def task_names() -> tuple[str, ...]:
    """The tasks there are: one module each in `thalweg.comparison.tasks`."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(tasks.__path__)))


def main(arguments: list[str]) -> int:
    """Run the command with what stands after `thalweg compare`; returns the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            f"usage: thalweg compare TASK [options]\n       thalweg compare FILE.py:FUNCTION [options]\n"
            f"tasks: {', '.join(task_names())}\n"
            "FUNCTION returns (model, closure, parameters). Options: thalweg compare TASK --help"
        )
        return 0
    target, *rest = arguments
    if ".py:" in target:
        return _compare_step(target, rest)
    if target not in task_names():
        raise ArgumentError("TASK", target, f"one of {', '.join(task_names())}, or FILE.py:FUNCTION")
    return _compare_task(target, rest)


def _compare_task(name: str, arguments: list[str]) -> int:
    from thalweg.lab import Lab

    task = importlib.import_module(f"thalweg.comparison.tasks.{name}")
    config, output = _parse(f"thalweg compare {name}", task.Config, arguments)
    out = output.out if output.out is not None else Path("runs") / f"compare_{name}"
    seeds = range(config.seed, config.seed + config.seeds)
    with Lab(
        out,
        name=f"compare_{name}",
        kind="compare",
        config=asdict(config),
        seeds=list(seeds),
        device=config.device,
        resume=output.resume,
        quiet=output.json,
        threads=1 if config.device == "cpu" else None,
    ) as lab:
        comparison, claims = task.run(config, lab)
        lab.claims(claims)
        lab.document("comparison", comparison.to_dict())
    failed = [claim for claim in claims if claim.failed]
    _show(comparison, output.json)
    if not output.json:
        held = sum(claim.holds is True for claim in claims)
        print(f"\n{held} of {len(claims)} claims hold; everything lies in {out}")
        for claim in failed:
            print(f"does not hold: {claim.statement} (measured {claim.measured}, spread {claim.spread})")
    return 1 if failed and output.check else 0


def _compare_step(source: str, arguments: list[str]) -> int:
    from thalweg.lab.user_step import load_step, users_code

    options = _tyro().cli(StepOptions, args=arguments, prog=f"thalweg compare {source}")

    def progress(row: Any) -> None:
        if not options.json and sys.stderr.isatty():
            print(f"measured {row.route}", file=sys.stderr)

    with users_code(source, aside=options.json):
        step = load_step(source)
        routes = default_routes(step)
        unknown = [name for name in options.routes if name not in routes]
        if unknown:
            raise ArgumentError("routes", unknown[0], "names among " + ", ".join(routes))
        comparison = compare(
            {name: rule for name, rule in routes.items() if not options.routes or name in options.routes},
            step,
            standard_error=options.standard_error,
            limit=options.limit,
            seconds=options.seconds,
            seed=options.seed,
            on_row=progress,
        )
    _show(comparison, options.json)
    return 1 if all(row.note.startswith("refused") for row in comparison.rows) else 0


def _show(comparison: Comparison, as_json: bool) -> None:
    if as_json:
        print(json.dumps(comparison.to_dict(), indent=2, allow_nan=False))
    else:
        print(comparison)


def _parse(prog: str, config: type[Any], arguments: list[str]) -> tuple[Any, Output]:
    tyro = _tyro()

    def request(config: Any, output: Output) -> tuple[Any, Output]:
        return config, output

    flat = tyro.conf.OmitArgPrefixes
    request.__annotations__ = {"config": Annotated[config, flat], "output": Annotated[Output, flat]}
    call: Callable[..., tuple[Any, Output]] = tyro.conf.configure(tyro.conf.FlagCreatePairsOff)(request)
    parsed: tuple[Any, Output] = tyro.cli(call, args=arguments, prog=prog)
    return parsed


def _tyro() -> Any:
    try:
        import tyro
    except ImportError:
        raise MissingExtraError("tyro", "recipes") from None
    return tyro
