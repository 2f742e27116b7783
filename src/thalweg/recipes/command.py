"""`thalweg run NN`: one recipe, its claims, and what they say."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any

from thalweg.errors import ArgumentError, MissingExtraError, require_integer
from thalweg.lab import Claim, Lab
from thalweg.lab.files import read_json
from thalweg.recipes.contract import PRESETS, Recipe, find
from thalweg.table import align, short


def main(arguments: list[str], package: str = "thalweg.recipes") -> int:
    """Run the command with what stands after `thalweg run`; returns the exit status.

    Args:
        arguments: NN, the options that every recipe has, and --FIELD VALUE for the fields of its `Config`.
        package: where to look for recipes.

    Returns:
        0, or 1 when `--check` is given and an asserted claim does not hold.

    Raises:
        ArgumentError: no such recipe or preset, a wrong option.
    """
    parser = _parser()
    if not arguments or arguments[0] in ("-h", "--help"):
        parser.print_help()
        return 0
    recipe = _chosen(arguments[0], package)
    options, rest = parser.parse_known_args(arguments)
    _require_no_clash(recipe)
    config = recipe.config(options.preset)
    if "-h" in rest or "--help" in rest:
        parser.print_help()
        print(f"\nfields of {recipe.name} (preset {options.preset}):\n")
    config = _override(config, rest, f"thalweg run {recipe.number}")
    require_integer("seed", options.seed, 0)
    count = options.seeds if options.seeds is not None else (1 if options.preset == "smoke" else 3)
    require_integer("seeds", count, 1)
    out = options.out if options.out is not None else Path("runs") / f"{recipe.name}-{options.preset}"
    with (
        Lab(
            out,
            name=recipe.name,
            kind="recipe",
            config={field.name: getattr(config, field.name) for field in fields(config)},
            seeds=range(options.seed, options.seed + count),
            device=options.device,
            preset=options.preset,
            resume=options.resume,
            quiet=options.json,
            threads=options.threads,
        ) as lab,
        redirect_stdout(sys.stderr) if options.json else nullcontext(),
    ):
        claims = recipe.run(config, lab)
    if options.json:
        sys.stdout.write((out / "claims.json").read_text(encoding="utf-8"))
    else:
        print(_shown(claims))
        print(f"\neverything lies in {out}")
    return 1 if options.check and not read_json(out / "claims.json")["passed"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="thalweg run",
        usage="thalweg run NN [options] [--FIELD VALUE ...]",
        description="Run the recipe of one paper and check its claims.",
        epilog="`thalweg run NN --help` also tells the fields of that recipe.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("number", metavar="NN", help="number of the paper, see `thalweg list`")
    parser.add_argument("--preset", default="small", choices=PRESETS, help="size of the run (small)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (0)")
    parser.add_argument("--seeds", type=int, help="how many seeds (3; smoke: 1)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="torch's number of threads")
    parser.add_argument("--out", type=Path, help="folder of the run (runs/NN_short_name-PRESET)")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument("--check", action="store_true", help="exit with 1 when an asserted claim fails")
    parser.add_argument("--json", action="store_true", help="print claims.json, and nothing else")
    return parser


def _chosen(number: str, package: str) -> Recipe:
    recipes = find(package)
    there = ", ".join(str(each) for each in recipes) or "none yet"
    if not number.isdecimal() or int(number) not in recipes:
        raise ArgumentError("NN", number, f"the number of a paper that has a recipe here ({there})")
    return recipes[int(number)]


def _require_no_clash(recipe: Recipe) -> None:
    taken = {action.dest for action in _parser()._actions}
    for field in fields(recipe.config("smoke")):
        if field.name in taken:
            raise ArgumentError(
                f"{recipe.module}.Config.{field.name}", field.name, "a name that is not an option of `run`"
            )


def _override(config: Any, arguments: list[str], prog: str) -> Any:
    if not arguments:
        return config
    try:
        import tyro
    except ImportError:
        raise MissingExtraError("tyro", "recipes") from None
    return tyro.cli(type(config), default=config, args=arguments, prog=prog)


def _shown(claims: list[Claim]) -> str:
    rows = [
        [
            claim.statement,
            short(claim.measured),
            short(claim.spread),
            claim.reported or "-",
            claim.verdict,
            "yes" if claim.asserted else "no",
        ]
        for claim in claims
    ]
    return align(["claim", "measured", "spread", "reported", "verdict", "asserted"], rows)
