"""MeZO: the steps it makes, the log it keeps, the bytes it takes, and the drift that "inplace" brings."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from thalweg.blackbox import (
    SPSA,
    Blocks,
    EvolutionStrategies,
    ForwardGradient,
    LowRank,
    MeZO,
    OnePoint,
    Sparse,
    replay_,
)
from thalweg.blackbox.directions import direction
from thalweg.blackbox.mezo import Log, Update
from thalweg.errors import ArgumentError, NonFiniteError
from thalweg.ledger.storages import StorageCounter
from thalweg.noise import Key


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 1)).to(dtype)


def batches(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randn(8, 4, generator=generator, dtype=torch.float64).to(dtype)


def train(net, optimizer, steps):
    for _, x in zip(range(steps), batches(next(net.parameters()).dtype)):
        optimizer.step(lambda x=x: (net(x) - x.sum(1, keepdim=True)).pow(2).mean())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_state_after_k_steps_is_sgd_on_c_z_with_stored_z(weight_decay):
    net, scale, lr = network(), 1e-3, 0.01
    twin = copy.deepcopy(net)
    train(net, MeZO(net.parameters(), lr=lr, weight_decay=weight_decay, seed=5), 20)
    weights = list(twin.parameters())
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in weights if p.ndim == 1], "weight_decay": 0.0},
    ]
    sgd = torch.optim.SGD(groups, lr=lr)
    for step, x in zip(range(20), batches()):
        zs = [direction("gaussian", p.detach(), Key(5, step=step), 0, i) for i, p in enumerate(weights)]
        start = [p.detach().clone() for p in weights]

        def loss_at(sign, start=start, zs=zs, x=x):
            with torch.no_grad():
                for p, value, z in zip(weights, start, zs):
                    p.copy_(value + sign * scale * z)
                return (twin(x) - x.sum(1, keepdim=True)).pow(2).mean()

        c = (loss_at(1) - loss_at(-1)) / (2 * scale)
        with torch.no_grad():
            for p, value, z in zip(weights, start, zs):
                p.copy_(value)
                p.grad = c * z
        sgd.step()
    for a, b in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


RULES = [
    None,
    SPSA(3, 1e-2, "rademacher", "forward", "copy"),
    SPSA(scale=1e-2, weights="sign", restore="swap"),
    SPSA(2, 1e-2, LowRank(2), restore="swap"),
    SPSA(2, 1e-2, Sparse(0.3, keep="largest"), restore="swap"),
    SPSA(2, 1e-2, Blocks(of="rademacher"), restore="swap"),
    SPSA(scale=1e-2, directions="sphere"),
    EvolutionStrategies(4, weights="ranks"),
    ForwardGradient(2, "gaussian"),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_replaying_the_log_gives_the_parameters_bit_for_bit(rule, dtype):
    net = network(dtype)
    start = [p.detach().clone() for p in net.parameters()]
    matrices = [p for p in net.parameters() if p.ndim > 1]
    vectors = [p for p in net.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.01, "lr": 1e-2}, {"params": vectors}]
    optimizer = MeZO(groups, lr=3e-3, gradient=rule, seed=3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=10)
    for _, x in zip(range(10), batches(dtype)):
        optimizer.step(lambda x=x: net(x).pow(2).mean())
        scheduler.step()
    ordered = [value for value in start if value.ndim > 1] + [value for value in start if value.ndim == 1]
    trained = matrices + vectors
    assert any(not torch.equal(a, b) for a, b in zip(ordered, trained))
    replay_(ordered, optimizer.log)
    assert all(torch.equal(a, b) for a, b in zip(ordered, trained))


def test_a_forward_gradient_under_no_grad_leaves_forward_mode_on():
    point = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        ForwardGradient().estimate(lambda: (point**2).sum(), [point], Key(0))
    assert torch._C._is_fwd_grad_enabled()


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [
        (torch.float64, 5e-16, 2e-15),
        (torch.float32, 3e-7, 1.2e-6),
        (torch.float16, 2.4e-3, 9.6e-3),
        (torch.bfloat16, 2e-2, 8e-2),
    ],
    ids=str,
)
def test_restore_drift_of_inplace_after_100_steps(dtype, low, high):
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(0.02 * torch.randn(64, 64))
    before = layer.weight.detach().clone()
    rule = SPSA(scale=1e-3, directions="gaussian", restore="inplace", allow_drift=True)
    for seed in range(100):
        rule.estimate(lambda: layer(torch.ones(1, 64, dtype=dtype)).mean(), [layer.weight], Key(seed))
    drift = ((layer.weight - before).double().norm() / before.double().norm()).item()
    # within a factor of two of measurements of the bare cycle: 1e-15, 6e-7, 4.8e-3, 3.9e-2
    assert low < drift < high


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_inplace_in_low_precision_is_refused_without_acknowledging_the_drift(dtype):
    net = network(dtype)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = MeZO(net.parameters(), gradient=SPSA(restore="inplace"))
    with pytest.raises(ArgumentError, match=r"parameters\[0\].*allow_drift=True"):
        optimizer.step(lambda: net(torch.ones(2, 4, dtype=dtype)).mean())
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
    assert len(optimizer.log) == 0


def test_inplace_equals_copy_up_to_rounding_over_several_samples():
    net = network()
    x = torch.ones(3, 4, dtype=torch.float64)
    found = [
        SPSA(3, 1e-3, "gaussian", restore=restore).estimate(
            lambda: net(x).pow(2).mean(), list(net.parameters()), Key(0)
        )
        for restore in ("copy", "inplace")
    ]
    for a, b in zip(found[0].gradients, found[1].gradients):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_inplace_comes_back_after_an_exception():
    net = network()
    before = [p.detach().clone() for p in net.parameters()]

    def closure():
        raise KeyError("interrupted")

    with pytest.raises(KeyError, match="interrupted"):
        SPSA(restore="inplace").estimate(closure, list(net.parameters()), Key(0))
    for a, b in zip(before, net.parameters()):
        torch.testing.assert_close(a, b.detach(), rtol=0, atol=1e-15)


def peak(run):
    counter = StorageCounter(None, None)
    with counter:
        run()
    return counter.peak_bytes


def test_extra_memory_is_the_largest_parameter_and_that_of_spsa_through_grad_is_all():
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
    x = torch.randn(2, 64)
    largest, total = 64 * 64 * 4, 8 * 64 * 64 * 4
    optimizer = MeZO(net.parameters(), lr=1e-3, seed=0)

    def infer():
        with torch.no_grad():
            net(x).pow(2).mean()

    inference = peak(infer)
    in_place = peak(lambda: optimizer.step(lambda: net(x).pow(2).mean()))
    # beside the largest parameter's new value stands its direction only while it is drawn into it
    assert in_place <= inference + largest + 1024
    parameters = list(net.parameters())
    through_grad = peak(lambda: SPSA().estimate(lambda: net(x).pow(2).mean(), parameters, Key(0)).gradients)
    assert through_grad >= inference + total


def test_conservative_keeps_the_best_of_three():
    point = torch.ones(10, dtype=torch.float64, requires_grad=True)
    rule = SPSA(scale=1e-3, directions="gaussian")
    loss = lambda: (point**2).sum()  # noqa: E731
    bold = MeZO([point], lr=1.0, gradient=rule, conservative=True, seed=0)
    calls = []
    for _ in range(10):
        before = loss().item()
        bold.step(lambda: calls.append(1) or loss())
        assert loss().item() <= before
    assert len(calls) == 5 * 10
    assert any(update.coefficients == (0.0,) for update in bold.log)
    timid = MeZO([point], lr=1e-3, gradient=rule, conservative=True, seed=0)
    before = loss().item()
    timid.step(loss)
    assert loss().item() < before
    # what was evaluated is what was kept, bit for bit
    start = torch.ones(10, dtype=torch.float64)
    replay_([start], bold.log)
    replay_([start], timid.log)
    assert torch.equal(start, point.detach())


def test_sign_steps_have_the_length_of_their_directions():
    point = torch.ones(10, dtype=torch.float64, requires_grad=True)
    rule = SPSA(weights="sign")
    optimizer = MeZO([point], lr=0.25, gradient=rule, seed=0)
    optimizer.step(lambda: 1e6 * (point**2).sum())
    assert torch.equal((point.detach() - 1).abs(), torch.full((10,), 0.25, dtype=torch.float64))


def test_a_saved_run_goes_on_as_if_it_had_not_stopped():
    whole, half = network(), network()
    train(whole, MeZO(whole.parameters(), lr=0.01, seed=2), 8)
    optimizer = MeZO(half.parameters(), lr=0.01, seed=2)
    stream = batches()
    for _, x in zip(range(4), stream):
        optimizer.step(lambda x=x: (half(x) - x.sum(1, keepdim=True)).pow(2).mean())
    file = io.BytesIO()
    torch.save({"net": half.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = network()
    other.load_state_dict(state["net"])
    again = MeZO(other.parameters(), lr=1.0, seed=9)
    again.load_state_dict(state["optimizer"])
    assert again.log.updates == optimizer.log.updates
    assert again.param_groups[0]["lr"] == 0.01
    # the stream of batches has already been asked for a fifth
    generator = batches()
    for _ in range(4):
        next(generator)
    for _, x in zip(range(4), generator):
        again.step(lambda x=x: (other(x) - x.sum(1, keepdim=True)).pow(2).mean())
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), other.parameters()))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"]
)
def test_a_copy_of_model_and_optimizer_goes_on_alike(duplicate):
    net = network()
    optimizer = MeZO(net.parameters(), lr=0.01, seed=2)
    train(net, optimizer, 3)
    other_net, other = duplicate((net, optimizer))
    train(net, optimizer, 2)
    train(other_net, other, 2)
    assert len(other.log) == len(optimizer.log) == 5
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other_net.parameters()))


def test_the_baseline_of_one_point_is_saved_with_the_run():
    net, other = network(), network()
    first = MeZO(net.parameters(), lr=0.01, gradient=OnePoint(), seed=2)
    train(net, first, 3)
    other.load_state_dict(net.state_dict())
    second = MeZO(other.parameters(), lr=0.01, gradient=OnePoint(), seed=2)
    second.load_state_dict(first.state_dict())
    for model, optimizer in ((net, first), (other, second)):
        train(model, optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters()))


@pytest.mark.gpu
def test_replay_on_cuda_is_bit_exact():
    net = network(torch.float32).cuda()
    start = [p.detach().clone() for p in net.parameters()]
    optimizer = MeZO(net.parameters(), lr=0.01, seed=2)
    for _ in range(5):
        optimizer.step(lambda: net(torch.ones(2, 4, device="cuda")).pow(2).mean())
    replay_(start, optimizer.log)
    assert all(torch.equal(a, b) for a, b in zip(start, net.parameters()))


def test_it_learns_and_manual_seed_governs_the_directions():
    losses = []
    for _ in range(2):
        net = network()
        torch.manual_seed(7)
        optimizer = MeZO(net.parameters(), lr=0.01)
        x = next(batches())
        losses.append([optimizer.step(lambda: (net(x) - 1).pow(2).mean()).item() for _ in range(60)])  # noqa: B023
    assert losses[0] == losses[1]
    assert losses[0][-1] < 0.5 * losses[0][0]


def test_tied_parameters_move_once():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    optimizer = MeZO([first.weight], lr=0.1, seed=0)
    before = first.weight.detach().clone()
    optimizer.step(lambda: second(first(torch.ones(1, 4))).sum())
    (update,) = optimizer.log
    z = direction("gaussian", before, update.key, 0, 0)
    torch.testing.assert_close(first.weight.detach(), before - 0.1 * update.coefficients[0] * z)
    assert second.weight is first.weight


def test_bad_arguments_are_refused_and_nothing_changes():
    weight = torch.zeros(3, requires_grad=True)
    for make, name in (
        (lambda: MeZO([weight], lr=0.0), "lr"),
        (lambda: MeZO([weight], weight_decay=-1.0), "weight_decay"),
        (lambda: MeZO([weight], weight_decay=0.1, conservative=True), "weight_decay"),
        (lambda: MeZO([weight], gradient=SPSA), "gradient"),
        (lambda: MeZO([weight], gradient=torch.optim.SGD), "gradient"),
        (lambda: MeZO([weight], conservative=1), "conservative"),
        (lambda: MeZO([weight], conservative=True, gradient=SPSA(restore="inplace")), "conservative"),
        (lambda: MeZO([weight], seed=-1), "seed"),
        (lambda: MeZO([weight]).step(None), "closure"),
        (lambda: MeZO([torch.zeros(3)]), r"params\[0\]"),
        (lambda: replay_([weight], []), "log"),
        (lambda: replay_([weight, weight], Log(SPSA(), (1,))), "parameters"),
        (lambda: replay_([torch.zeros(2, dtype=torch.int64)], Log(SPSA(), (1,))), r"parameters\[0\]"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"^{name}: expected"):
            make()
    optimizer = MeZO([weight], gradient=SPSA())
    optimizer.step(lambda: (weight**2).sum())
    with pytest.raises(ArgumentError, match="before it"):
        optimizer.add_param_group({"params": [torch.zeros(2, requires_grad=True)]})
    before = weight.detach().clone()
    with pytest.raises(NonFiniteError, match="sample 0"):
        optimizer.step(lambda: (weight**2).sum() + float("nan"))
    assert torch.equal(weight.detach(), before)
    assert len(optimizer.log) == 1


def test_a_log_is_made_of_plain_numbers():
    weight = torch.zeros(3, requires_grad=True)
    optimizer = MeZO([weight], lr=0.5, gradient=SPSA(), seed=4)
    optimizer.step(lambda: (weight - 1).pow(2).sum())
    (update,) = optimizer.log
    assert update == Update(Key(4), update.coefficients, (0.5,), (0.0,))
    assert isinstance(update.coefficients[0], float)


def language_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=512, n_positions=128, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


def test_a_language_model_trains_in_the_memory_of_inference_at_any_length():
    model = language_model()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    optimizer = MeZO(model.parameters(), lr=1e-5, seed=0)
    growth = []
    for length in (32, 128):
        tokens = torch.arange(2 * length).view(2, length) % 512

        def closure(tokens=tokens):
            return model(input_ids=tokens, labels=tokens).loss

        def infer(closure=closure):
            with torch.no_grad():
                closure()

        inference = weights + peak(infer)
        assert weights + peak(lambda closure=closure: optimizer.step(closure)) <= 1.05 * inference
        growth.append((weights + peak(lambda closure=closure: closure().backward())) / inference)
        model.zero_grad()
    # backpropagation instead takes the more the longer the sequence is
    assert growth[1] > growth[0] > 1.05


def test_a_language_model_with_dropout_and_tied_weights_is_replayed_bit_for_bit():
    model = language_model().train()
    assert model.lm_head.weight is model.transformer.wte.weight
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = MeZO(model.parameters(), lr=1e-4, weight_decay=0.01, seed=1)
    tokens = torch.arange(64).view(2, 32)
    for _ in range(3):
        optimizer.step(lambda: model(input_ids=tokens, labels=tokens).loss)
    assert any(not torch.equal(a, b) for a, b in zip(start, model.parameters()))
    replay_(start, optimizer.log)
    assert all(torch.equal(a, b) for a, b in zip(start, model.parameters()))


def test_a_slope_that_overflows_is_refused_before_anything_moves():
    weight = torch.ones(3, requires_grad=True)
    optimizer = MeZO([weight], gradient=SPSA(scale=1e-3))
    with pytest.raises(NonFiniteError, match="slopes"):
        optimizer.step(lambda: 3e38 * torch.tanh(1e6 * (weight - 1).sum()))
    assert torch.equal(weight.detach(), torch.ones(3))
    assert len(optimizer.log) == 0


def test_a_compiled_model_gives_the_same_steps():
    net, twin = network(torch.float32), network(torch.float32)
    compiled = torch.compile(net, backend="aot_eager")
    for restore in ("copy", "swap"):
        for model, called in ((net, compiled), (twin, twin)):
            optimizer = MeZO(model.parameters(), lr=0.01, gradient=SPSA(restore=restore), seed=0)
            for _ in range(3):
                optimizer.step(lambda called=called: called(torch.ones(2, 4)).pow(2).mean())
        for a, b in zip(net.parameters(), twin.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
