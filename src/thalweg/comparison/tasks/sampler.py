"""One reward through one sampler of digits, differentiated by every policy of `thalweg.rollouts`."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from thalweg.comparison.digit_sampler import LATENT, RewardedSampler, pretrain
from thalweg.comparison.measure import measure
from thalweg.comparison.pareto import error_against_bytes
from thalweg.comparison.rows import Comparison, Row
from thalweg.comparison.training import NoiseOfEqualNorm
from thalweg.data import digits
from thalweg.errors import ArgumentError, require_integer
from thalweg.lab import Claim, Lab
from thalweg.noise import Key, normal
from thalweg.rollouts import (
    Backsolve,
    Checkpointed,
    Discrete,
    RandomLast,
    Reversible,
    Route,
    Truncated,
    step_calls,
)
from thalweg.step import Backprop, Rule, Step, backward
from thalweg.table import scaled

TITLE = "A reward through a sampler by every policy"
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
SLOTS = 8
# a stream of random numbers for each use: training noise, held-out noise, noise that judges
_TRAIN, _HELD_OUT, _TEST = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Config:
    """What `thalweg compare sampler` can be told.

    Args:
        policies: names of the policies to run; none for all.
        steps: steps of the sampler.
        updates: optimizer steps that backprop may take; the others get as many operations.
        pretraining: optimizer steps of the decoder and of each judge; twice as many for the field.
        seeds: number of seeds.
        seed: the first seed.
        batch: samples a step.
        device: "cpu" or "cuda".
    """

    policies: tuple[str, ...] = ()
    steps: int = 64
    updates: int = 5
    pretraining: int = 500
    seeds: int = 3
    seed: int = 0
    batch: int = 64
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("updates", "pretraining", "seeds", "batch"):
            require_integer(name, getattr(self, name), 1)
        require_integer("steps", self.steps, SLOTS + 1)
        require_integer("seed", self.seed, 0)
        names = list(all_policies())
        for name in self.policies:
            if name not in names:
                raise ArgumentError("policies", name, "names among " + ", ".join(names))


@dataclass(frozen=True, slots=True)
class Policy:
    """One way to differentiate the sampler.

    Args:
        gradient: what `rollout` is told.
        method: None for a rollout, or the solver of `integrate`.
        rule: what `thalweg.backward` is told.
        exact: whether the gradient must be that of backprop.
    """

    gradient: Any
    method: str | None = None
    rule: Rule = field(default_factory=Backprop)
    exact: bool = False


def all_policies() -> dict[str, Policy]:
    """Every policy of this task by name."""
    slots = Checkpointed(slots=SLOTS)
    return {
        "backprop": Policy(Backprop(), exact=True),
        "checkpointed-slots": Policy(slots, exact=True),
        "checkpointed-segments": Policy(Checkpointed(segments=SLOTS), exact=True),
        "truncated-1": Policy(Truncated(last=1)),
        "truncated-8": Policy(Truncated(last=8)),
        "truncated-8-checkpointed": Policy(Truncated(last=8, store=Checkpointed(slots=2))),
        "truncated-random": Policy(Truncated(last=RandomLast())),
        "identity-jacobian": Policy(Route(state=0.0)),
        "discrete": Policy(Discrete(), "euler", exact=True),
        "reversible": Policy(Reversible(), "reversible_heun", exact=True),
        "backsolve": Policy(Backsolve(), "euler"),
        "noise": Policy(slots, rule=NoiseOfEqualNorm()),
    }


@dataclass(frozen=True, slots=True)
class SamplerRow(Row):
    """A row with what is particular to a process.

    Args:
        error: |g^ - g| / |g| of one draw, by root mean square.
        field_evaluations: calls of the field a step, those of recomputation counted.
        kept_by_part: bytes kept for backward by the chain, the decoder and the reward.
        reward: log-probability of the wanted digit after as many operations as backprop's updates take.
        reward_sd: its standard deviation over seeds.
        second_judge: how often a judge that gave no gradient sees the wanted digit, in [0, 1].
        reward_equal_memory: the reward after as many updates, with the batch that fits into the same bytes.
    """

    error: float | None = None
    field_evaluations: int | None = None
    kept_by_part: dict[str, int] | None = None
    reward: float | None = None
    reward_sd: float | None = None
    second_judge: float | None = None
    reward_equal_memory: float | None = None

    def cells(self) -> dict[str, str]:
        """The row as text; see `Row.cells`."""
        parts = self.kept_by_part or {}
        spread = "" if self.reward_sd is None else f" ± {self.reward_sd:.2f}"
        second = "-" if self.second_judge is None else f"{100 * self.second_judge:.0f} %"
        return Row.cells(self) | {
            "error": "-" if self.error is None else f"{self.error:.2g}",
            "field calls": "-" if self.field_evaluations is None else str(self.field_evaluations),
            "chain / decoder / reward": " / ".join(scaled(value, "B") for value in parts.values()) or "-",
            "reward, equal operations": "-" if self.reward is None else f"{self.reward:.2f}{spread}",
            "second judge": second,
            "reward, equal memory": (
                "-" if self.reward_equal_memory is None else f"{self.reward_equal_memory:.2f}"
            ),
        }


COLUMNS = (
    "route",
    "cosine",
    "norm ratio",
    "error",
    "field calls",
    "operations",
    "kept",
    "chain / decoder / reward",
    "peak",
    "ms/step",
    "reward, equal operations",
    "second judge",
    "reward, equal memory",
)


def run(config: Config, lab: Lab) -> tuple[Comparison, list[Claim]]:
    """Measure every policy on one reward, then let each fine-tune the field.

    Each policy picks its step size from the same grid on held-out noise; rewards are of noise that neither
    trained nor chose.
    """
    policies = {n: p for n, p in all_policies().items() if not config.policies or n in config.policies}
    lab.plan(1 + len(policies) * (2 + 2 * config.seeds))
    state = _pretrained(config, lab)
    exact = _exact_cost(state, config)
    before = _test_reward(_sampler(state, config), config, config.seed)
    with warnings.catch_warnings():
        # that its error is that of a step is what the row shows
        warnings.filterwarnings("ignore", message="Backsolve with method='euler'")
        rows = tuple(_row(name, policy, state, exact, config, lab) for name, policy in policies.items())
    title = verdict(rows, before["reward"], config)
    settings = asdict(config) | {
        "reward_before": before["reward"],
        "second_judge_before": before["second_judge"],
    }
    comparison = Comparison("sampler of digits", title, rows, settings, COLUMNS)
    lab.table(title, COLUMNS, [[row.cells()[name] for name in COLUMNS] for row in rows])
    lab.figure("error_against_bytes", error_against_bytes(rows), "Error of the gradient against bytes kept.")
    return comparison, claims(rows, policies, before["reward"], config)


def _pretrained(config: Config, lab: Lab) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}

    def train() -> dict[str, Any]:
        sampler = RewardedSampler(config.steps)
        pretrain(sampler, digits(), config.pretraining)
        lab.save("sampler", sampler.state_dict())
        kept.update(sampler.state_dict())
        return {"saved": "weights/sampler.safetensors"}

    saved = lab.cell("pretrain", train, seed=config.seed)["saved"]
    if not kept:
        from safetensors.torch import load_file

        kept.update(load_file(lab.out / saved))
    return kept


def _sampler(state: dict[str, Tensor], config: Config) -> RewardedSampler:
    sampler = RewardedSampler(config.steps)
    sampler.load_state_dict(state)
    sampler.requires_grad_(False)
    sampler.field.requires_grad_(True)
    return sampler.to(config.device)


def _noise(count: int, stream: int, seed: int, step: int, config: Config) -> Tensor:
    like = torch.empty(count, LATENT, device=config.device)
    return normal(like, Key(seed, step, stream))


def _step(policy: Policy, state: dict[str, Tensor], config: Config) -> Step:
    sampler = _sampler(state, config)
    noise = _noise(config.batch, _TRAIN, config.seed, 0, config)
    return Step(sampler, _losses(sampler, noise, policy), tuple(sampler.field.parameters()))


def _exact_cost(state: dict[str, Tensor], config: Config) -> dict[str, Any]:
    from thalweg.ledger import cost

    found = cost(_step(Policy(Backprop()), state, config), repeats=1)
    slots = cost(_step(Policy(Checkpointed(slots=SLOTS)), state, config), repeats=1)
    return {"operations": found.operations, "peak_bytes": slots.peak_bytes}


def _row(
    name: str, policy: Policy, state: dict[str, Tensor], exact: dict[str, Any], config: Config, lab: Lab
) -> SamplerRow:
    measured = lab.cell(f"measure {name}", lambda: _measure(policy, state, config), seed=config.seed)
    updates = max(1, round(config.updates * exact["operations"] / measured["operations"]))
    fitting = max(1, int(config.batch * exact["peak_bytes"] / measured["peak_bytes"]))

    def learn(rate: float, seed: int, stream: int, updates: int, batch: int) -> dict[str, float]:
        sampler = _fine_tuned(policy, state, rate, seed, updates, batch, config)
        return sampler.reward(_noise(512, stream, seed, 0, config))

    def tune() -> dict[str, Any]:
        scores = {
            rate: learn(rate, config.seed, _HELD_OUT, updates, config.batch)["reward"]
            for rate in LEARNING_RATES
        }
        return {
            "learning_rate": max(scores, key=lambda rate: scores[rate]),
            "held_out": list(scores.values()),
        }

    rate: float = lab.cell(f"tune {name}", tune, seed=config.seed)["learning_rate"]

    def over_seeds(title: str, updates: int, batch: int) -> list[dict[str, float]]:
        return [
            lab.cell(f"{title} {name}", partial(learn, rate, seed, _TEST, updates, batch), seed=seed)
            for seed in range(config.seed, config.seed + config.seeds)
        ]

    learned = over_seeds("equal operations", updates, config.batch)
    in_memory = over_seeds("equal memory", config.updates, fitting)
    rewards = [each["reward"] for each in learned]
    return SamplerRow(
        route=name,
        network="sampler",
        reference="backprop",
        **measured,
        reward=statistics.fmean(rewards),
        reward_sd=statistics.stdev(rewards) if len(rewards) > 1 else None,
        second_judge=statistics.fmean(each["second_judge"] for each in learned),
        reward_equal_memory=statistics.fmean(each["reward"] for each in in_memory),
    )


def _measure(policy: Policy, state: dict[str, Tensor], config: Config) -> dict[str, Any]:
    from thalweg.ledger import cost

    # another solver has another exact gradient: that of its own steps
    reference = _step(Policy(Backprop(), policy.method), state, config)
    exact = torch.autograd.grad(reference.closure().mean(), list(reference.parameters))
    step = _step(policy, state, config)
    found = measure(step, policy.rule, exact, limit=2000)
    # E|h - g|^2 = |E h - g|^2 + E|h - E h|^2, both relative to |g|^2; chance can take the first below zero
    found["error"] = max(0.0, found["squared_bias"] + found["variance"]) ** 0.5
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    handle = step.model.get_submodule("field").register_forward_pre_hook(count)
    try:
        policy.rule.estimate(step.closure, step.parameters, Key(0))
    finally:
        handle.remove()
    by_module = cost(step, gradient=policy.rule, repeats=1).by_module
    parts = {"decoder": 0, "judge": 0}
    for part in parts:
        parts[part] = sum(size for path, size in by_module.items() if path.split(".")[0] == part)
    chain = sum(by_module.values()) - sum(parts.values())
    return found | {"field_evaluations": calls, "kept_by_part": {"chain": chain, **parts}}


def _fine_tuned(
    policy: Policy, state: dict[str, Tensor], rate: float, seed: int, updates: int, batch: int, config: Config
) -> RewardedSampler:
    sampler = _sampler(state, config)
    parameters = list(sampler.field.parameters())
    optimizer = torch.optim.Adam(parameters, lr=rate)
    for update in range(updates):
        noise = _noise(batch, _TRAIN, seed, update, config)
        optimizer.zero_grad()
        backward(_losses(sampler, noise, policy), parameters, gradient=policy.rule, key=Key(seed, update))
        optimizer.step()
    return sampler


def _losses(sampler: RewardedSampler, noise: Tensor, policy: Policy) -> Callable[[], Tensor]:
    return lambda: sampler.losses(noise, policy.gradient, policy.method)


def _test_reward(sampler: RewardedSampler, config: Config, seed: int) -> dict[str, float]:
    return sampler.reward(_noise(512, _TEST, seed, 0, config))


def verdict(rows: tuple[SamplerRow, ...], before: float, config: Config) -> str:
    """The outcome in one line."""
    by_name = {row.route: row for row in rows}
    parts = [f"reward {before:.2f} before"]
    for name in ("backprop", "checkpointed-slots"):
        if name in by_name:
            row = by_name[name]
            parts.append(f"{name} {row.reward:.2f} keeping {scaled(row.saved_bytes, 'B')}")
    biased = [
        row for row in rows if row.route not in ("backprop", "noise") and row.cosine and row.cosine < 0.999
    ]
    if biased:
        best = max(biased, key=lambda row: row.reward or -float("inf"))
        parts.append(f"best of the biased: {best.route} {best.reward:.2f}, cosine {best.cosine:.2f}")
    return f"{config.steps} steps of a digit sampler, {config.seeds} seeds: " + "; ".join(parts)


def claims(
    rows: tuple[SamplerRow, ...], policies: dict[str, Policy], before: float, config: Config
) -> list[Claim]:
    """What the comparison asserts about its own rows."""
    by_name = {row.route: row for row in rows}
    found = []
    for name, row in by_name.items():
        if policies[name].exact and row.error is not None:
            found.append(
                _claim(f"{name}: the gradient is backprop's (error below 1e-4)", row.error, row.error < 1e-4)
            )
    slots = by_name.get("checkpointed-slots")
    if slots is not None:
        # decoder and reward are one more step of the process, the last
        least = step_calls(config.steps + 1, SLOTS) - 1
        statement = f"checkpointed-slots: the field is called {least} times, the least with {SLOTS} states"
        found.append(_claim(statement, slots.field_evaluations, slots.field_evaluations == least))
    noise, exact = by_name.get("noise"), by_name.get("backprop")
    if noise is not None and exact is not None and noise.reward is not None and exact.reward is not None:
        share = (noise.reward - before) / (exact.reward - before)
        statement = "noise as long as the gradient gains less than a quarter of what backprop gains"
        found.append(_claim(statement, share, share < 0.25))
    return found


def _claim(statement: str, measured: float | None, holds: bool) -> Claim:
    return Claim(
        statement=statement, reported=None, measured=measured, spread=None, holds=holds, asserted=True
    )
