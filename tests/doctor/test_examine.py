"""What an examination must not do, what it must survive, and what it refuses."""

import importlib
import random
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import thalweg.doctor
from thalweg.doctor import examine
from thalweg.doctor.hospital import HEALTHY, SICK
from thalweg.doctor.remedies import REMEDIES
from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.step import Step


def _state(model):
    tensors = [*model.parameters(), *model.buffers()]
    return (
        [t.detach().clone() for t in tensors],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [m.training for m in model.modules()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        [p._backward_hooks and len(p._backward_hooks) for p in model.parameters()],
        torch.get_rng_state(),
        random.getstate(),
        torch.is_grad_enabled(),
    )


def _same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
    if isinstance(one, list | tuple) and not all(isinstance(each, int) for each in one):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other))
    return one == other


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*SICK, *HEALTHY])
def test_leaves_everything_bit_identical(name):
    case = (SICK | HEALTHY)[name](0)
    for index, parameter in enumerate(case.model.parameters()):
        if index % 2:
            parameter.grad = torch.ones_like(parameter)
    next(case.model.modules()).train(False)
    before = _state(case.model)
    groups = case.optimizer and case.optimizer.state_dict()
    examine(case.model, case.losses, optimizer=case.optimizer)
    assert _same(before, _state(case.model))
    assert (case.optimizer and case.optimizer.state_dict()) == groups


def test_leaves_everything_as_it_was_when_the_closure_raises():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    before = _state(model)

    def loss():
        model(torch.randn(8, 4))
        raise KeyError("batch")

    with pytest.raises(KeyError, match="batch"):
        examine(model, loss)
    assert _same(before, _state(model))


def test_every_evaluation_sees_the_same_noise_and_buffers():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1))
    x = torch.randn(16, 4)
    seen = []

    def loss():
        value = model(x).square().mean() + torch.rand(()) + random.random()
        seen.append((value.item(), model[1].num_batches_tracked.item()))
        return value

    examine(model, loss, seed=3)
    assert len(seen) > 1
    assert len(set(seen)) == 1


def test_takes_a_step_and_losses_per_example():
    model = nn.Linear(3, 1)
    x = torch.randn(7, 3)
    step = Step(model, lambda: model(x).square().mean(1), [model.weight])
    report = examine(*step)
    assert report["loss"] == pytest.approx(model(x).square().mean().item(), rel=1e-6)
    assert list(report["A.parameter_gradients"]) == ["weight"]
    expected = torch.autograd.grad(model(x).square().mean(), model.weight)[0].norm().item()
    assert report["A.parameter_gradients"]["weight"] == pytest.approx(expected, rel=1e-5)


def test_in_place_activations_residual_sums_shared_modules_and_rich_outputs():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)
            self.act = nn.ReLU(inplace=True)
            self.outer = nn.Linear(6, 6)

        def forward(self, x, *, scale):
            out = self.outer(self.act(self.inner(x)))
            out += x
            return {"hidden": out * scale, "extras": (out.shape, [None])}

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()
            self.same = self.block

        def forward(self, x):
            for _ in range(5):
                x = self.block(x, scale=0.9)["hidden"]
            return (x, {"last": x})

    model = Net()
    x = torch.randn(4, 6)
    expected = torch.autograd.grad(model(x)[0].square().mean(), list(model.parameters()))
    report = examine(model, lambda: model(x)[0].square().mean())
    assert report.worst < 2
    measured = list(report["A.parameter_gradients"].values())
    assert measured == pytest.approx([g.norm().item() for g in expected], rel=1e-5)
    assert len(report["A.blocks"]["block"]["gradients"]) == 5


def test_a_transformers_model_with_its_own_outputs():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=5, n_head=2, n_embd=16, vocab_size=20, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    tokens = torch.randint(20, (2, 8))
    report = examine(model, lambda: model(input_ids=tokens, labels=tokens).loss)
    assert report.worst < 2
    assert list(report["A.gain"]) == ["transformer.h.#"]


def test_a_compiled_model_is_examined_as_the_code_it_came_from():
    plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    model = torch.compile(plain, backend="eager")
    x = torch.randn(3, 4)
    report = examine(model, lambda: model(x).square().mean())
    assert list(report["A.parameter_gradients"]) == [name for name, _ in plain.named_parameters()]
    assert any(each.what == "the compiled code" for each in report.not_measured)
    assert report.worst < 2
    assert torch.allclose(model(x), plain(x))


def test_saved_bytes_by_hand():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(32, 8)
    report = examine(model, lambda: model(x).sum(), checks=["memory"])
    # the ReLU keeps its output, which the second layer reuses; sum keeps nothing
    assert report["G.bytes"] == {"1": 32 * 16 * 4}
    assert report["G.total_bytes"] == 32 * 16 * 4


def test_a_frozen_backbone_that_keeps_its_activations():
    model = nn.ModuleDict(
        {"backbone": nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8)), "head": nn.Linear(8, 2)}
    )
    x = torch.randn(16, 8)

    def loss():
        return model["head"](model["backbone"](x)).square().mean()

    found = examine(model, loss, model["head"].parameters()).findings
    assert [(f.code, f.where, f.severity) for f in found] == [("M2", "backbone", 2)]
    model["backbone"].requires_grad_(False)
    assert examine(model, loss, model["head"].parameters()).findings == ()


def test_checks_choose_what_is_measured_and_cost_what_they_say():
    model = nn.Linear(2, 2)
    calls = []

    def loss():
        calls.append(1)
        return model(torch.ones(1, 2)).sum()

    report = examine(model, loss, checks=["flow"])
    assert len(calls) == report["evaluations"]["forwards"] == 1
    assert not any(name.startswith(("C.", "G.", "H.")) for name in report.measurements)
    calls.clear()
    assert len(calls) == 0
    assert examine(model, loss)["evaluations"] == {"forwards": 2, "backwards": 2}
    assert len(calls) == 2


def test_every_piece_named_in_a_remedy_exists():
    named = {
        name for each in REMEDIES.values() for name in re.findall(r"(?:thalweg|nn|torch)\.[\w.]*\w", each.use)
    }
    assert {"thalweg.gates.clip", "thalweg.SPSA", "thalweg.BinaryNeuron"} <= named
    for name in named:
        room, *parts = name.split(".")
        found = importlib.import_module({"nn": "torch.nn"}.get(room, room))
        for part in parts:
            found = getattr(found, part)
        assert found is not None


def test_index_by_an_unknown_measurement_lists_the_known():
    report = examine(nn.Linear(1, 1), lambda: torch.ones(()), checks=["flow"])
    with pytest.raises(ArgumentError, match=r"A\.gain"):
        report["A.gian"]


MODEL = nn.Linear(2, 1)


def _good():
    return MODEL(torch.ones(1, 2)).sum()


@pytest.mark.parametrize(
    ("arguments", "options", "argument"),
    [
        ((MODEL, 3.0), {}, "losses"),
        ((MODEL, MODEL), {}, "losses"),
        ((MODEL, {}), {}, "losses"),
        ((MODEL, {"a": torch.ones(())}), {}, "losses"),
        ((MODEL, lambda: 1.0), {}, "losses"),
        ((MODEL, lambda: torch.ones(2, 2)), {}, "losses"),
        ((MODEL, lambda: torch.ones(0)), {}, "losses"),
        ((MODEL, lambda: torch.ones((), dtype=torch.long)), {}, "losses"),
        ((MODEL, lambda: {}), {}, "losses"),
        ((MODEL, lambda: {"a": None}), {}, "losses"),
        ((MODEL, lambda: [1, 2]), {}, "losses"),
        ((_good, MODEL), {}, "model"),
        ((nn.Tanh(), _good), {}, "model"),
        ((MODEL, _good, MODEL), {}, "parameters"),
        ((MODEL, _good, []), {}, "parameters"),
        ((MODEL, _good), {"checks": ["flows"]}, "checks"),
        ((MODEL, _good), {"checks": "flow"}, "checks"),
        ((MODEL, _good), {"checks": []}, "checks"),
        ((MODEL, _good), {"optimizer": 0.1}, "optimizer"),
        ((MODEL, _good), {"optimizer": [MODEL]}, "optimizer"),
        ((MODEL, _good), {"seed": -1}, "seed"),
        ((MODEL, _good), {"seed": 0.5}, "seed"),
    ],
)
def test_refuses_by_name_and_changes_nothing(arguments, options, argument):
    before = _state(MODEL)
    with pytest.raises((ArgumentError, ArgumentTypeError), match=rf"^{argument}"):
        examine(*arguments, **options)
    assert _same(before, _state(MODEL))


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    bad=st.sampled_from([None, float("nan"), float("inf"), -float("inf")]),
)
def test_any_shape_dtype_and_value_gives_a_report(shape, dtype, bad):
    model = nn.Sequential(nn.Linear(shape[-1], 3), nn.Tanh(), nn.Linear(3, 1)).to(dtype)
    x = torch.ones(shape, dtype=dtype)
    if bad is not None:
        x.view(-1)[0] = bad
    report = examine(model, lambda: model(x).square().mean())
    codes = {f.code for f in report.findings if f.severity >= 2}
    # tanh saturates at infinity, so the loss stays finite there and the first weight's gradient is 0 * inf
    assert codes == (set() if bad is None else {"V4"})
    assert str(report)


def test_exports():
    assert set(thalweg.doctor.__all__) <= set(dir(thalweg.doctor))


def test_a_loss_with_a_derivative_in_it_is_healthy():
    critic = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))
    real, fake = torch.randn(2, 64, 2)

    def losses():
        # the last bias cancels: its exact zero is checked by running the closure at moved parameters
        between = (0.5 * (real + fake)).requires_grad_()
        (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        return {
            "gap": critic(fake).mean() - critic(real).mean(),
            "penalty": (slope.norm(dim=1) - 1).square().mean(),
        }

    report = examine(critic, losses)
    assert report["A.parameter_gradients"]["2.bias"] == 0
    assert report.worst < 2


@pytest.mark.filterwarnings("ignore")
def test_a_reentrant_checkpoint_is_not_measured_and_not_a_disease():
    first, second = nn.Linear(4, 8), nn.Linear(8, 1)
    x = torch.randn(5, 4)

    def loss():
        hidden = first(x).tanh()
        return torch.utils.checkpoint.checkpoint(second, hidden, use_reentrant=True).square().mean()

    report = examine(nn.Sequential(first, second), loss)
    assert report.findings == ()
    assert "gradients" in [each.what for each in report.not_measured]


def test_sparse_gradients_are_examined():
    model = nn.Sequential(nn.Embedding(50, 4, sparse=True), nn.Flatten(), nn.Linear(16, 3))
    x, y = torch.randint(50, (8, 4)), torch.randint(3, (8,))
    loss = lambda: nn.functional.cross_entropy(model(x), y)  # noqa: E731
    report = examine(model, {"one": loss, "two": loss})
    assert report.worst == 0
    loss().backward()
    expected = 2 * model[0].weight.grad.to_dense().norm().item()
    assert report["A.parameter_gradients"]["0.weight"] == pytest.approx(expected, rel=1e-5)


def test_the_mean_of_an_empty_batch_is_where_the_nan_is_from():
    model = nn.Linear(4, 1)
    (finding,) = examine(model, lambda: model(torch.ones(0, 4)).mean()).findings
    assert (finding.code, finding.severity) == ("V4", 3)
    assert "first at mean" in finding.title


def test_a_frozen_module_behind_a_learned_one_has_to_keep_its_activations():
    model = nn.ModuleDict({"made": nn.Linear(8, 4), "judge": nn.Sequential(nn.Linear(4, 256), nn.Tanh())})
    model["judge"].requires_grad_(False)
    x = torch.randn(16, 8)
    report = examine(model, lambda: model["judge"](model["made"](x)).square().mean())
    assert report["G.bytes"]["judge.1"] > report["G.total_bytes"] / 2
    assert report.findings == ()


def test_every_term_of_a_mapping_sees_the_same_noise_and_numpy_draws_are_given_back():
    model, x = nn.Linear(4, 1), torch.randn(64, 4)

    def noisy():
        return (model(x + torch.randn(64, 4)) * float(np.random.rand())).square().mean()  # noqa: NPY002

    def plain():
        return model(x + torch.randn(64, 4)).square().mean()

    before = np.random.get_state()  # noqa: NPY002
    assert examine(model, {"one": noisy, "other": noisy}).measurements
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert np.random.get_state()[2] == before[2]  # noqa: NPY002
    norms = examine(model, {"one": plain, "other": plain})["C.norm"]
    assert norms["one"] == norms["other"] > 0
