"""The gradient of an ODE solve by every policy, beside those of torchdiffeq and of torchode.

    python benchmarks/ode.py [--dim 32] [--width 256] [--batch 64] [--steps 40] [--repeats 9] [--out FILE]

One network, one loss at the final time, float64. For each method the error of the gradient, of start and
parameters together, against that of the differential equation (800 steps of rk4) and against autograd through
the very same solve; the bytes kept for backward; evaluations of the field, forward and backward together; and
the median time of forward and backward, in turn with the peers, with its ratios to theirs last.

torchode is timed where it can be imported. What it depends on is older than what others here need, and enough
of it runs without: pip install --no-deps torchode torchtyping
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn

from thalweg.ledger import saved_bytes
from thalweg.rollouts import Backsolve, Checkpointed, Discrete, Reversible, Tableau, integrate
from thalweg.step import Backprop
from thalweg.table import align, scaled, short

try:
    import torchode
except ImportError:
    torchode = None

# what torchdiffeq calls rk4
THREE_EIGHTHS = Tableau(
    "three_eighths", ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8), 4
)
PEERS = {"euler": "euler", "heun": "heun2", "rk4 (3/8)": "rk4", "dopri5": "dopri5", "reversible_heun": None}
TORCHODE = {"euler": "Euler", "heun": "Heun", "dopri5": "Dopri5"}
PEER_ROUTES = ("torchdiffeq odeint", "torchdiffeq odeint_adjoint", "torchode AutoDiffAdjoint")
TOLERANCES = {"rtol": 1e-6, "atol": 1e-8}
Solve = Callable[[], Tensor]


class Field(nn.Module):
    """A network of (t, x), as torchdiffeq calls it, that counts its evaluations."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.evaluations = 0
        self.layers = nn.Sequential(
            nn.Linear(dim + 1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, dim)
        )

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        self.evaluations += 1
        slope: Tensor = 6 * self.layers(torch.cat([x, t.expand(len(x), 1)], 1))
        return slope


def routes(method: str, field: Field, x: Tensor, steps: int) -> dict[str, Solve]:
    """The final state by each policy and each peer that has one for the method."""
    times = torch.tensor([0.0, 1.0], dtype=x.dtype)
    adaptive = method == "dopri5"
    found: dict[str, Solve] = {}
    peer = PEERS[method]
    if peer is not None:
        options: dict[str, Any] = TOLERANCES if adaptive else {"options": {"step_size": 1 / steps}}
        for name in ("odeint", "odeint_adjoint"):
            solve = getattr(torchdiffeq, name)
            found[f"torchdiffeq {name}"] = lambda solve=solve, options=options: solve(
                field, x, times, method=peer, **options
            )[-1]
    if torchode is not None and method in TORCHODE:
        found["torchode AutoDiffAdjoint"] = lambda: torchode_solve(method, field, x, steps)
    policies: list[Any] = [Backprop()]
    if method == "reversible_heun":
        policies += [Checkpointed(slots=5), Reversible()]
    else:
        policies += [Discrete(), Discrete(recompute="stage"), Backsolve("stored"), Backsolve("solve")]
        policies[1:1] = [] if adaptive else [Checkpointed(slots=5)]
    settings: dict[str, Any] = TOLERANCES if adaptive else {"steps_between": steps}
    solver = THREE_EIGHTHS if method == "rk4 (3/8)" else method
    for policy in policies:
        found[shown(policy)] = lambda policy=policy: integrate(
            lambda x, t: field(t, x), x, times, method=solver, gradient=policy, **settings
        )[-1]
    return found


def torchode_solve(method: str, field: Field, x: Tensor, steps: int) -> Tensor:
    term = torchode.ODETerm(lambda t, x: field(t[:, None], x), with_stats=False)
    stepper = getattr(torchode, TORCHODE[method])(term=term)
    if method == "dopri5":
        controller, length = torchode.IntegralController(**TOLERANCES, term=term), None
    else:
        controller, length = torchode.FixedStepController(), x.new_full((len(x),), 1 / steps)
    ends = x.new_tensor([0.0, 1.0]).expand(len(x), 2)
    problem = torchode.InitialValueProblem(y0=x, t_eval=ends)
    final: Tensor = (
        torchode.AutoDiffAdjoint(stepper, controller, backprop_through_step_size_control=False)
        .solve(problem, dt0=length)
        .ys[:, -1]
    )
    return final


def gradient(solve: Solve, leaves: Sequence[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(solve().square().sum(), leaves)])


def milliseconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median time of each, in turn, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def measure(method: str, dim: int, width: int, batch: int, steps: int, repeats: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    field = Field(dim, width).double()
    x = torch.randn(batch, dim, dtype=torch.float64, requires_grad=True)
    leaves = [x, *field.parameters()]
    exact = gradient(
        lambda: integrate(
            lambda x, t: field(t, x),
            x,
            torch.tensor([0.0, 1.0], dtype=x.dtype),
            method="rk4",
            gradient=Discrete(),
            steps_between=800,
        )[-1],
        leaves,
    )
    solves = routes(method, field, x, steps)
    own = gradient(solves[shown(Backprop())], leaves)
    rows = []
    for name, solve in solves.items():
        field.evaluations = 0
        found = gradient(solve, leaves)
        evaluations = field.evaluations
        rows.append(
            {
                "method": method,
                "route": name,
                "error": float((found - exact).norm() / exact.norm()),
                "error_of_own_solve": float((found - own).norm() / own.norm()),
                "kept_bytes": saved_bytes(lambda solve=solve: solve().square().sum(), field),
                "evaluations": evaluations,
            }
        )
    runs = {name: lambda solve=solve: gradient(solve, leaves) for name, solve in solves.items()}
    times = milliseconds(runs, repeats)
    for row in rows:
        row["ms"] = times[row["route"]]
        for name in PEER_ROUTES:
            peer = times.get(name)
            row[f"over_{name.split()[1]}"] = row["ms"] / peer if peer else None
    return rows


def shown(policy: Any) -> str:
    """A policy without the fields it leaves at their defaults."""
    given = [
        (f.name, getattr(policy, f.name)) for f in fields(policy) if getattr(policy, f.name) != f.default
    ]
    return f"{type(policy).__name__}({', '.join(f'{name}={value!r}' for name, value in given)})"


def table(rows: Sequence[dict[str, Any]]) -> str:
    columns = [
        "method, route",
        "error",
        "of own solve",
        "kept",
        "evaluations",
        "ms",
        "/ odeint",
        "/ adjoint",
        "/ torchode",
    ]
    lines = [
        [
            f"{row['method']}, {row['route']}",
            f"{row['error']:.1e}",
            f"{row['error_of_own_solve']:.1e}",
            scaled(row["kept_bytes"], "B"),
            str(row["evaluations"]),
            f"{row['ms']:.1f}",
            short(row["over_odeint"]),
            short(row["over_odeint_adjoint"]),
            short(row["over_AutoDiffAdjoint"]),
        ]
        for row in rows
    ]
    return align(columns, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, value in (("dim", 32), ("width", 256), ("batch", 64), ("steps", 40), ("repeats", 9)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/ode.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Backsolve")
    sizes = {name: getattr(given, name) for name in ("dim", "width", "batch", "steps")}
    rows = [row for method in PEERS for row in measure(method, **sizes, repeats=given.repeats)]
    print(table(rows))
    if torchode is None:
        print("torchode is not installed and was left out: pip install --no-deps torchode torchtyping")
    record = {
        "benchmark": "ode",
        **sizes,
        "torch": torch.__version__,
        "torchdiffeq": torchdiffeq.__version__,
        "torchode": None if torchode is None else torchode.__version__,
        "threads": 1,
        "machine": platform.processor() or platform.machine(),
        "rows": rows,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
