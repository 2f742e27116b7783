"""Blocks that learn alone: locality, equality with autograd on one block, flat memory, refusals."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thalweg.blackbox import SPSA
from thalweg.errors import ArgumentError, ArgumentTypeError, NonFiniteError
from thalweg.ledger import cost, price
from thalweg.local import LocalStack, Readout, unit_length
from thalweg.noise import Key
from thalweg.step import Learner, Phase, Step, backward

WIDTH, CLASSES = 8, 3


def stack(depth: int = 3, dtype: torch.dtype = torch.float64, **options: Any) -> LocalStack:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(depth)]
    return LocalStack(blocks, [Readout(WIDTH, CLASSES) for _ in range(depth)], **options).to(dtype)


def batch(dtype: torch.dtype = torch.float64, examples: int = 12) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(examples, WIDTH, generator=g, dtype=dtype)
    return x, torch.randint(0, CLASSES, (examples,), generator=g)


def train(learner: Any, steps: int = 3, **options: Any) -> list[Tensor]:
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.01)
    losses = []
    for _ in range(steps):
        for phase in learner.phases(batch(), **options):
            optimizer.zero_grad()
            losses.append(phase.backward())
            optimizer.step()
    return losses


def test_locality_each_phase_leaves_every_other_block_without_gradient() -> None:
    learner = stack()
    assert isinstance(learner, Learner)
    for index, phase in enumerate(learner.phases(batch())):
        assert isinstance(phase, Phase)
        learner.zero_grad()
        phase.backward()
        for name, parameter in learner.named_parameters():
            assert (parameter.grad is not None) == (name.split(".")[1] == str(index)), name


def test_locality_training_block_two_leaves_block_one_bit_identical() -> None:
    learner = stack()
    before = copy.deepcopy(learner.blocks[0].state_dict())
    second = copy.deepcopy(learner.blocks[1].state_dict())
    train(learner, only=[1])
    assert all(torch.equal(before[name], value) for name, value in learner.blocks[0].state_dict().items())
    assert not torch.equal(second["0.weight"], learner.blocks[1][0].weight)


def test_one_block_equals_ordinary_autograd_step_for_step() -> None:
    learner = stack(1)
    twin = copy.deepcopy(learner)
    losses = train(learner, 5)
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.01)
    x, y = batch()
    for ours in losses:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(twin.local[0].linear(twin.blocks[0](x)), y)
        loss.backward()
        optimizer.step()
        assert torch.allclose(loss.detach(), ours, rtol=1e-14)
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(learner.parameters(), twin.parameters()))


def test_the_forward_of_a_phase_is_used_again_and_computed_fresh_otherwise() -> None:
    learner = stack(2)
    calls: list[Tensor] = []
    learner.blocks[0].register_forward_hook(lambda module, inputs, output: calls.append(output.detach()))
    seen: list[Tensor] = []
    learner.blocks[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for phase in learner.phases(batch()):
        phase.backward()
    assert len(calls) == 1
    assert torch.equal(seen[-1], calls[0])
    calls.clear()
    for phase in learner.phases(batch()):
        phase.loss()
    assert len(calls) == 2


def test_any_rule_can_take_the_loss_of_a_phase() -> None:
    learner = stack(2)
    exact = [
        (phase.backward(), [p.grad.clone() for p in phase.parameters]) for phase in learner.phases(batch())
    ]
    learner.zero_grad()
    for (loss, gradients), phase in zip(exact, learner.phases(batch())):
        found = backward(phase.loss, phase.parameters, gradient=SPSA(samples=400), key=Key(3))
        assert torch.allclose(loss, found, rtol=1e-4)
        flat = torch.cat([p.grad.reshape(-1) for p in phase.parameters])
        wanted = torch.cat([g.reshape(-1) for g in gradients])
        # 400 directions in 99 dimensions: the expected cosine is about sqrt(400 / 499)
        assert nn.functional.cosine_similarity(flat, wanted, 0) > 0.75


def test_memory_does_not_grow_with_depth() -> None:
    def kept(depth: int) -> int:
        learner = stack(depth)
        data = batch()
        found = cost(
            Step(learner, lambda: learner.phases(data), tuple(learner.parameters())), repeats=0
        ).saved_bytes
        return found

    assert kept(2) == kept(4) == kept(16) > 0


def test_priced_without_data_as_measured() -> None:
    learner = stack()
    data = batch()
    step = Step(learner, lambda: learner.phases(data), tuple(learner.parameters()))
    (priced,), measured = price(step), cost(step, repeats=0)
    assert priced.operations == measured.operations > 0
    assert priced.evaluations == measured.evaluations == 3


def test_prediction_sums_what_the_blocks_say() -> None:
    learner = stack(normalize="length")
    x, _ = batch()
    each = learner.scores(x)
    assert torch.allclose(learner.predict(x), each[0] + each[1] + each[2])
    assert torch.equal(learner.predict(x, blocks=1), each[0])
    assert not learner.predict(x).requires_grad


def test_inputs_are_detached_and_frozen_blocks_only_pass_on() -> None:
    learner = stack(3)
    learner.blocks[1].requires_grad_(False)
    learner.local[1].requires_grad_(False)
    x, y = batch()
    x.requires_grad_()
    names = []
    for phase in learner.phases((x, y)):
        phase.backward()
        names.append(phase.name)
    assert names == ["block 0", "block 2"]
    assert x.grad is None


def test_unit_length_of_zero_is_zero() -> None:
    rows = unit_length(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    assert torch.equal(rows, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    assert unit_length(torch.randn(2, 3, 4, 4)).flatten(1).norm(dim=1).allclose(torch.ones(2))


def test_blocks_may_be_compiled() -> None:
    plain = stack(2)
    blocks = [torch.compile(block, backend="aot_eager", fullgraph=True) for block in plain.blocks]
    compiled = LocalStack(blocks, list(plain.local))
    for ours, theirs in zip(compiled.phases(batch()), plain.phases(batch())):
        assert torch.allclose(ours.backward(), theirs.backward())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    learner = stack(2, dtype, normalize="length")
    for phase in learner.phases(batch(dtype)):
        assert phase.backward().dtype == dtype
    assert learner.predict(batch(dtype)[0]).dtype == dtype


def test_amp_scaler_and_accumulation() -> None:
    learner = stack(1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    (phase,) = learner.phases(batch())
    backward(phase.loss, phase.parameters, scaler=scaler)
    scaled = [p.grad.clone() for p in phase.parameters]
    learner.zero_grad()
    phase.backward()
    phase.backward()
    assert all(torch.allclose(a, 4 * p.grad) for a, p in zip(scaled, phase.parameters))


def test_bad_input_is_refused() -> None:
    block, local = nn.Linear(4, 4), Readout(4, 3)
    for blocks, losses, error in [
        ([], local, ArgumentError),
        ([block, "two"], local, ArgumentTypeError),
        (block, local, ArgumentTypeError),
        ([block, nn.Linear(4, 4)], local, ArgumentError),  # one readout for two blocks
        ([block, block], [local, Readout(4, 3)], ArgumentError),
        ([block], [local, Readout(4, 3)], ArgumentError),
        ([block], nn.Linear(4, 3), ArgumentTypeError),
        ([block], [nn.Linear(4, 3)], ArgumentTypeError),
    ]:
        with pytest.raises(error):
            LocalStack(blocks, losses)  # type: ignore[arg-type]
    for normalize, error in [("l3", ArgumentError), (3, ArgumentTypeError)]:
        with pytest.raises(error):
            LocalStack([block], local, normalize=normalize)  # type: ignore[arg-type]
    learner = stack(2)
    with pytest.raises(ArgumentTypeError, match="batch"):
        learner.phases(batch()[0])
    for only in ([2], ["0"], [-1], []):
        with pytest.raises(ArgumentError, match="only"):
            learner.phases(batch(), only=only)  # type: ignore[arg-type]
    for count in (0, 3):
        with pytest.raises(ArgumentError, match="blocks"):
            learner.predict(batch()[0], blocks=count)
    with pytest.raises(ArgumentTypeError, match="one tensor"):
        LocalStack([nn.LSTM(4, 4)], local).predict(torch.ones(2, 4))


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    learner = stack(1)
    x, y = batch()
    x[0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        next(iter(learner.phases((x, y)))).backward()
    assert all(p.grad is None for p in learner.parameters())
