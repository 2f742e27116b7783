"""`thalweg compare classify`: the main job, at a size for tests."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import thalweg as tw
from thalweg.comparison.classifiers import HardClassifier, SmoothClassifier
from thalweg.comparison.command import main, task_names
from thalweg.comparison.tasks.classify import Config, all_routes, claims
from thalweg.comparison.training import NoiseOfEqualNorm, accuracy, initial_network, train
from thalweg.data import digits
from thalweg.errors import ArgumentError
from thalweg.noise import Key

THALWEG = str(Path(sys.executable).parent / "thalweg")


def test_the_expected_loss_is_the_enumeration_of_all_codes() -> None:
    """The closed sum over codes equals the expectation that `Enumeration` finds by running every outcome."""
    data = digits()
    x, y = data.train_inputs[:6].double(), data.train_labels[:6]
    torch.manual_seed(0)
    exact = HardClassifier(64, 10, "expected", width=5, bits=4).double()
    waiting = HardClassifier(64, 10, None, width=5, bits=4).double()
    waiting.load_state_dict(exact.state_dict())
    tw.backward(lambda: exact.losses(x, y), exact.parameters())
    loss = tw.backward(lambda: waiting.losses(x, y), waiting.parameters(), gradient=tw.Enumeration())
    assert torch.allclose(loss, exact.losses(x, y).mean(), rtol=1e-12)
    for one, other in zip(exact.parameters(), waiting.parameters()):
        assert torch.allclose(one.grad, other.grad, rtol=1e-9, atol=1e-12)


def test_every_route_of_a_network_starts_from_the_same_weights() -> None:
    data = digits()
    for name in ("smooth", "hard units", "blocks", "energy"):
        nets = [initial_network(route, data, 3, "cpu") for route in all_routes() if route.network == name]
        for net in nets[1:]:
            assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), net.parameters()))


def test_every_route_trains_on_the_same_data_in_the_same_order() -> None:
    """Two names for one rule end with the same bits."""
    data = digits()
    backprop = next(route for route in all_routes() if route.name == "backprop")
    runs = [
        train(backprop, data, learning_rate=0.01, steps=5, seed=1, batch=8, device="cpu") for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(runs[0].parameters(), runs[1].parameters()))


def test_every_route_has_its_reference_and_each_network_a_noise_control() -> None:
    routes = {route.name: route for route in all_routes()}
    for route in routes.values():
        assert routes[route.reference].network == route.network
        assert routes[route.reference].reference == route.reference
    for network in ("smooth", "hard units"):
        noise = [r for r in routes.values() if r.network == network and isinstance(r.rule, NoiseOfEqualNorm)]
        assert len(noise) == 1


def test_noise_is_as_long_as_the_exact_gradient_and_has_no_direction() -> None:
    torch.manual_seed(0)
    net, data = SmoothClassifier(64, 10), digits()
    closure = lambda: net.losses(data.train_inputs[:32], data.train_labels[:32])  # noqa: E731
    parameters = tuple(net.parameters())
    exact = tw.Backprop().estimate(closure, parameters, Key(0)).gradients
    noise = NoiseOfEqualNorm().estimate(closure, parameters, Key(0)).gradients
    for one, other in zip(exact, noise):
        assert one is not None
        assert other is not None
        assert torch.allclose(one.norm(), other.norm(), rtol=1e-5)
        cosine = (one * other).sum() / one.norm() ** 2
        assert abs(cosine) < 5 / one.numel() ** 0.5


def test_accuracy_leaves_the_network_in_training() -> None:
    net, data = SmoothClassifier(64, 10).train(), digits()
    assert 0 <= accuracy(net, data.test_inputs, data.test_labels) <= 1
    assert net.training


def test_unknown_routes_and_bad_numbers_are_refused() -> None:
    with pytest.raises(ArgumentError, match="backprop"):
        Config(routes=("nonsense",))
    with pytest.raises(ArgumentError, match="steps"):
        Config(steps=0)
    with pytest.raises(ArgumentError, match="classify"):
        main(["nonsense"])
    assert "classify" in task_names()


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All routes, few steps, once."""
    out = tmp_path_factory.mktemp("run") / "classify"
    command = [THALWEG, "compare", "classify", "--steps", "80", "--seeds", "1", "--json", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    found["out"] = out
    return found


def test_the_references_are_exact_and_the_unbiased_routes_are_unbiased(outcome: dict[str, Any]) -> None:
    routes = {route.name: route for route in all_routes()}
    rows = {row["route"]: row for row in outcome["rows"]}
    assert set(rows) == set(routes)
    for name, row in rows.items():
        if routes[name].other_objective:
            assert row["cosine"] is None
        elif name == routes[name].reference:
            assert row["cosine"] == pytest.approx(1, abs=1e-6)
            assert row["bias"] == 0
        elif routes[name].unbiased:
            assert row["bias_se"] <= 0.05
            assert abs(row["bias"]) <= 5 * row["bias_se"]


def test_straight_through_is_visibly_biased_and_noise_learns_nothing(outcome: dict[str, Any]) -> None:
    rows = {row["route"]: row for row in outcome["rows"]}
    assert rows["straight-through"]["bias"] > 5 * rows["straight-through"]["bias_se"]
    assert rows["noise"]["accuracy"] < 0.25
    assert rows["noise-hard"]["accuracy"] < 0.25
    assert abs(rows["noise"]["cosine"]) < 0.1
    assert rows["backprop"]["accuracy"] > 0.8


def test_learners_stand_beside_their_twins_at_equal_steps_and_operations(outcome: dict[str, Any]) -> None:
    routes = {route.name: route for route in all_routes()}
    rows = {row["route"]: row for row in outcome["rows"]}
    for name, row in rows.items():
        assert (row["accuracy_equal_operations"] is not None) == routes[name].learner
    assert rows["equilibrium-propagation"]["cosine"] > 0.98
    assert rows["predictive-coding"]["cosine"] == pytest.approx(1, abs=1e-5)
    assert 0 < rows["feedback-alignment"]["cosine"] < rows["sign-symmetry"]["cosine"] < 1
    assert rows["blocks-local"]["saved_bytes"] < rows["blocks-backprop"]["saved_bytes"]
    assert rows["noprop"]["saved_bytes"] < rows["denoising-backprop"]["saved_bytes"]
    assert rows["readouts-only"]["accuracy"] < rows["blocks-local"]["accuracy"]


def test_claims_and_figure_are_recorded(outcome: dict[str, Any]) -> None:
    out = outcome["out"]
    assert (out / "figures" / "accuracy_against_cost.png").stat().st_size > 10_000
    recorded = json.loads((out / "claims.json").read_text())
    assert recorded["passed"] is True
    assert len(recorded["claims"]) == 18
    assert json.loads((out / "comparison.json").read_text())["rows"] == outcome["rows"]


def test_a_claim_fails_when_its_number_does(outcome: dict[str, Any]) -> None:
    """The claims can fail: the same rows, with one number moved."""
    from thalweg.comparison.rows import Row

    rows = [Row(**row) for row in outcome["rows"]]
    routes = list(all_routes())

    def failed(**changes: Any) -> list[str]:
        moved = [Row(**{**row, **changes.get(row["route"], {})}) for row in outcome["rows"]]
        return [claim.statement for claim in claims(tuple(moved), routes, 0.1) if not claim.holds]

    assert not [claim for claim in claims(tuple(rows), routes, 0.1) if not claim.holds]
    assert len(failed(spsa={"bias": 0.5})) == 1
    assert len(failed(spsa={"bias_se": 0.2})) == 1
    assert len(failed(backprop={"cosine": 0.999})) == 1
    assert len(failed(noise={"accuracy": 0.5})) == 1
    assert len(failed(**{"straight-through": {"bias": 0.0}})) == 1


def without_times(value: Any) -> Any:
    """The same JSON without what a clock measured."""
    if isinstance(value, dict):
        return {
            k: without_times(v) for k, v in value.items() if k not in ("ms_per_step", "timing", "machine")
        }
    return [without_times(each) for each in value] if isinstance(value, list) else value


def test_a_killed_run_resumes_to_the_same_json(tmp_path: Path) -> None:
    command = [THALWEG, "compare", "classify", "--routes", "backprop", "spsa", "score-function-mean"]
    command += ["--steps", "60", "--seeds", "2", "--json", "--out"]
    whole = subprocess.run([*command, str(tmp_path / "whole")], capture_output=True, text=True, check=True)
    killed = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL)
    cells = tmp_path / "killed" / "cells"
    deadline = time.monotonic() + 120
    while len(list(cells.glob("*.json"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert killed.returncode == -signal.SIGKILL
    finished = {path: path.stat().st_mtime_ns for path in cells.glob("*.json")}
    assert 4 <= len(finished) < 12
    resumed = subprocess.run(
        [*command, str(tmp_path / "killed"), "--resume"], capture_output=True, text=True, check=True
    )
    assert without_times(json.loads(resumed.stdout)) == without_times(json.loads(whole.stdout))
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items())
    for name in ("claims.json", "config.json", "metrics.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_step_of_ones_own_on_the_command_line(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "own_step.py"
    command = [THALWEG, "compare", f"{example}:step", "--json", "--limit", "40"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    rows = {row["route"]: row for row in json.loads(done.stdout)["rows"]}
    assert rows["backprop"]["bias"] == 0
    assert rows["spsa"]["saved_bytes"] == 0


def test_a_step_that_every_route_refuses_is_a_failure(tmp_path: Path) -> None:
    source = tmp_path / "nowhere.py"
    source.write_text(
        "import torch\n"
        "def step():\n"
        "    model = torch.nn.Linear(2, 1)\n"
        "    x = torch.full((3, 2), float('nan'))\n"
        "    return model, lambda: model(x).mean(), list(model.parameters())\n"
    )
    done = subprocess.run([THALWEG, "compare", f"{source}:step"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "refused" in done.stdout
