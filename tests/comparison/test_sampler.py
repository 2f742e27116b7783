"""`thalweg compare sampler`: a reward through a sampler, by every policy, at a size for tests."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from thalweg.comparison.digit_sampler import LATENT, RewardedSampler
from thalweg.comparison.tasks.sampler import Config, all_policies
from thalweg.errors import ArgumentError
from thalweg.rollouts import step_calls
from thalweg.step import Backprop

THALWEG = str(Path(sys.executable).parent / "thalweg")


@pytest.mark.parametrize("name", [name for name, policy in all_policies().items() if policy.exact])
def test_exact_policies_give_the_gradient_of_the_plain_loop(name: str) -> None:
    torch.manual_seed(0)
    sampler = RewardedSampler(steps=20).double()
    noise = torch.randn(3, LATENT, dtype=torch.float64)
    policy = all_policies()[name]
    if policy.method == "reversible_heun":
        loss = sampler.losses(noise, Backprop(), policy.method).mean()
    else:
        x = noise
        for k in range(20):
            x = sampler.step(sampler.field, x, k)
        loss = sampler.read_out(x).mean()
    parameters = list(sampler.field.parameters())
    exact = torch.autograd.grad(loss, parameters)
    found = torch.autograd.grad(
        sampler.losses(noise, policy.gradient, policy.method).mean(), parameters, allow_unused=True
    )
    for one, other in zip(exact, found):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def test_the_second_judge_never_gives_a_gradient() -> None:
    sampler = RewardedSampler(steps=9)
    sampler.losses(torch.randn(2, LATENT), Backprop()).mean().backward()
    assert all(p.grad is None for p in sampler.second_judge.parameters())
    assert any(p.grad is not None for p in sampler.judge.parameters())


def test_unknown_policies_are_refused() -> None:
    with pytest.raises(ArgumentError, match="backprop"):
        Config(policies=("nonsense",))
    with pytest.raises(ArgumentError, match="steps"):
        Config(steps=3)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All policies, few updates, once."""
    out = tmp_path_factory.mktemp("run") / "sampler"
    command = [THALWEG, "compare", "sampler", "--steps", "20", "--updates", "2", "--pretraining", "60"]
    command += ["--seeds", "1", "--json", "--check", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout[-2000:]
    assert (out / "figures" / "error_against_bytes.png").stat().st_size > 10_000
    return {row["route"]: row for row in json.loads(done.stdout)["rows"]}


def test_every_policy_is_a_row_and_the_exact_ones_are_exact(rows: dict[str, Any]) -> None:
    policies = all_policies()
    assert set(rows) == set(policies)
    for name, row in rows.items():
        assert (row["error"] < 1e-4) == policies[name].exact, name


def test_memory_is_what_each_policy_promises(rows: dict[str, Any]) -> None:
    chain = {name: row["kept_by_part"]["chain"] for name, row in rows.items()}
    assert chain["checkpointed-slots"] < chain["backprop"] / 20
    assert chain["truncated-1"] < chain["backprop"] / 10
    assert chain["reversible"] < chain["discrete"] / 5
    for name in ("backprop", "truncated-1", "discrete"):
        assert rows[name]["kept_by_part"]["decoder"] > 0
    for name in ("checkpointed-slots", "truncated-8-checkpointed"):
        assert rows[name]["kept_by_part"]["decoder"] == 0, "then= is inside the checkpoint"


def test_field_calls_are_counted(rows: dict[str, Any]) -> None:
    assert rows["backprop"]["field_evaluations"] == 20
    assert rows["checkpointed-slots"]["field_evaluations"] == step_calls(21, 8) - 1
    assert rows["discrete"]["field_evaluations"] == 40
