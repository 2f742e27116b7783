"""Forward-forward: goodness, labels in inputs, wrong labels, both predictions, real digits."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.ledger import cost, price
from thalweg.local import ForwardForward, Goodness, Readout, hybrid_images
from thalweg.noise import Key
from thalweg.step import Learner, Step

CLASSES, FEATURES = 4, 9


def learner(depth: int = 3, **options: Any) -> ForwardForward:
    torch.manual_seed(0)
    first = FEATURES + (CLASSES if options.get("label") == "append" else 0)
    widths = [first, *[8] * depth]
    blocks = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths)]
    if options.pop("read", False):
        options["readouts"] = [Readout(8, CLASSES) for _ in range(depth)]
    return ForwardForward(blocks, CLASSES, **options)


def batch(examples: int = 10) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.rand(examples, FEATURES, generator=g)
    return x, torch.randint(0, CLASSES, (examples,), generator=g)


def test_goodness_at_the_threshold_costs_two_logarithms_of_two() -> None:
    """Spec 09: G = theta gives 2 ln 2 in total for positives and negatives."""
    positive = torch.tensor([True, True, False])
    for local, output in [
        (Goodness(3.0), torch.full((3, 5), math.sqrt(3.0))),
        (Goodness(15.0, reduce="sum"), torch.full((3, 5), math.sqrt(3.0))),
    ]:
        assert torch.allclose(local(output, positive), torch.tensor(2 * math.log(2)))
        assert torch.allclose(local.scores(output), torch.zeros(3), atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(0.1, 5))
def test_goodness_is_the_binary_cross_entropy_of_goodness_minus_threshold(
    positives: int, negatives: int, threshold: float
) -> None:
    output = torch.randn(positives + negatives, 3, 2, dtype=torch.float64)
    positive = torch.arange(positives + negatives) < positives
    away = output.square().mean((1, 2)) - threshold
    wanted = sum(
        nn.functional.binary_cross_entropy_with_logits(part, torch.full_like(part, float(sign)))
        for part, sign in ((away[positive], True), (away[~positive], False))
    )
    assert torch.allclose(Goodness(threshold)(output, positive), torch.as_tensor(wanted))


@pytest.mark.parametrize("label", ["overlay", "append"])
def test_labels_in_inputs(label: Any) -> None:
    net = learner(label=label, label_scale=2.0)
    x, y = batch()
    own = net.labelled(x, y)
    code = own[:, :CLASSES] if label == "overlay" else own[:, FEATURES:]
    assert torch.equal(code, 2 * nn.functional.one_hot(y, CLASSES).float())
    rest = own[:, CLASSES:] if label == "overlay" else own[:, :FEATURES]
    assert torch.equal(rest, x[:, CLASSES:] if label == "overlay" else x)
    neutral = net.labelled(x, None)
    assert torch.allclose(neutral.sum(1) - rest.sum(1), torch.full((10,), 2.0))


@pytest.mark.parametrize("negatives", ["random", "all", "hard"])
def test_negatives_carry_wrong_labels_and_nothing_else_wrong(negatives: Any) -> None:
    net = learner(negatives=negatives)
    x, y = batch(2000)
    found, positive = net.contrast((x, y), key=Key(3))
    copies = CLASSES - 1 if negatives == "all" else 1
    assert len(found) == 2000 * (1 + copies)
    assert int(positive.sum()) == 2000
    wrong = found[2000:, :CLASSES].argmax(1).view(copies, 2000)
    assert bool((wrong != y).all())
    assert torch.equal(found[:, CLASSES:], x[:, CLASSES:].repeat(1 + copies, 1))
    if negatives == "random":
        shift = (wrong - y) % CLASSES
        share = torch.bincount(shift[0], minlength=CLASSES)[1:] / 2000
        assert bool(((share - 1 / 3).abs() < 5 * (2 / 9 / 2000) ** 0.5).all())
    assert torch.equal(net.contrast((x, y), key=Key(3))[0], found)


def test_hard_negatives_follow_what_the_stack_believes() -> None:
    net = learner(1, negatives="hard", read=True)
    assert net.readouts is not None
    readout: Any = net.readouts[0]
    with torch.no_grad():
        readout.linear.weight.zero_()
        readout.linear.bias.copy_(torch.tensor([0.5, 0.3, 0.1, 0.1]).log())
    x = batch(4000)[0]
    wrong = net.contrast((x, torch.zeros(4000, dtype=torch.int64)), key=Key(1))[0][4000:, :CLASSES].argmax(1)
    share = torch.bincount(wrong, minlength=CLASSES)[1:] / 4000
    wanted = torch.tensor([0.6, 0.2, 0.2])
    assert bool(((share - wanted).abs() < 5 * (wanted * (1 - wanted) / 4000).sqrt()).all())


def test_locality_and_phases() -> None:
    net = learner(read=True)
    assert isinstance(net, Learner)
    names = []
    for phase in net.phases(batch()):
        net.zero_grad()
        phase.backward()
        names.append(phase.name)
        own = {id(p) for p in phase.parameters}
        assert all((p.grad is not None) == (id(p) in own) for p in net.parameters())
    assert names == [f"{kind} {i}" for kind in ("block", "readout") for i in range(3)]


def test_the_next_block_cannot_read_the_goodness_of_the_one_before() -> None:
    net = learner(2)
    seen: list[Tensor] = []
    net.blocks[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for phase in net.phases(batch()):
        phase.backward()
    alive = seen[0].square().mean(1)
    assert torch.allclose(alive[alive > 0], torch.ones(int((alive > 0).sum())), atol=1e-4)


def test_prediction_by_goodness_written_out() -> None:
    net = learner(2)
    x, _ = batch()
    with torch.no_grad():
        for label in range(CLASSES):
            state = net.labelled(x, torch.full((10,), label))
            total = torch.zeros(10)
            for block in net.blocks:
                state = block(state / (state.square().mean(1, keepdim=True).sqrt() + 1e-8))
                total += state.square().mean(1) - 1.0
            assert torch.allclose(net.predict(x)[:, label], total, atol=1e-5)
    each = net.scores(x)
    assert torch.equal(net.predict(x, skip=1), each[1])
    assert torch.equal(net.predict(x, blocks=1), each[0])


def test_unlabelled_pairs_and_hybrid_images() -> None:
    g = torch.Generator().manual_seed(0)
    images = torch.rand(6, 1, 12, 12, generator=g)
    mixed = hybrid_images(images, Key(1))
    partner = images.roll(1, 0)
    assert bool(((mixed == images) | (mixed == partner)).all())
    share = (mixed == images).float().mean((1, 2, 3))
    assert bool(((share > 0.05) & (share < 0.95)).all())
    # large patches: neighbours mostly come from the same image
    own = mixed == images
    assert (own[..., 1:] == own[..., :-1]).float().mean() > 0.8
    blocks = [nn.Sequential(nn.Flatten(), nn.Linear(144, 8), nn.ReLU())]
    net = ForwardForward(blocks, 3, label=None, readouts=[Readout(8, 3)])
    names = [phase.name for phase in net.phases((images, mixed))]
    assert names == ["block 0"]
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    names = [phase.name for phase in net.phases((images, mixed, labels)) if phase.backward() is not None]
    assert names == ["block 0", "readout 0"]
    assert net.predict(images, by="readout").shape == (6, 3)
    with pytest.raises(ArgumentError, match="readout"):
        net.predict(images)


def test_memory_does_not_grow_with_depth_and_is_priced_as_measured() -> None:
    x, y = batch(64)

    def step(depth: int) -> Step:
        net = learner(depth, read=True)
        return Step(net, lambda: net.phases((x, y)), tuple(net.parameters()))

    kept = [cost(step(depth), repeats=0).saved_bytes for depth in (2, 4, 16)]
    assert kept[0] == kept[1] == kept[2] > 0
    (priced,), measured = price(step(2)), cost(step(2), repeats=0)
    assert priced.operations == measured.operations


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    net = learner(2, read=True, negatives="hard").to(dtype)
    x, y = batch()
    for phase in net.phases((x.to(dtype), y)):
        assert phase.backward().dtype == dtype


def test_learns_digits() -> None:
    pytest.importorskip("sklearn")
    from thalweg.data.digits import digits

    data = digits()
    x, y = data.train_inputs, data.train_labels
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(a, 96), nn.ReLU()) for a in (74, 96)]
    net = ForwardForward(blocks, 10, label="append", readouts=[Readout(96, 10) for _ in blocks])
    optimizer = torch.optim.Adam(net.parameters(), lr=0.005)
    for epoch in range(8):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for index in order.split(50):
            for phase in net.phases((x[index], y[index])):
                optimizer.zero_grad()
                phase.backward()
                optimizer.step()
    for by in ("goodness", "readout"):
        right = net.predict(data.test_inputs, by=by).argmax(1) == data.test_labels  # type: ignore[arg-type]
        assert right.float().mean() > 0.75


def test_bad_input_is_refused() -> None:
    for options, error in [
        ({"classes": 1}, ArgumentError),
        ({"label": "behind"}, ArgumentError),
        ({"label_scale": 0.0}, ArgumentError),
        ({"negatives": "some"}, ArgumentError),
        ({"readouts": [Readout(8, 4)] * 2}, ArgumentError),
        ({"local": nn.ReLU()}, ArgumentTypeError),
    ]:
        with pytest.raises(error):
            ForwardForward(**{"blocks": [nn.Linear(9, 8)], "classes": CLASSES, **options})  # type: ignore[arg-type]
    for make in (lambda: Goodness(0.0), lambda: Goodness(reduce="max")):  # type: ignore[arg-type]
        with pytest.raises(ArgumentError):
            make()
    net = learner()
    x, y = batch()
    for wrong, error in [
        (x, ArgumentTypeError),
        ((x, y, y), ArgumentTypeError),
        ((x.long(), y), ArgumentTypeError),
        ((x, y + CLASSES), ArgumentError),
        ((x[:, :3], y), ArgumentError),
    ]:
        with pytest.raises(error):
            net.phases(wrong)
    with pytest.raises(ArgumentTypeError, match="key"):
        net.phases((x, y), key=1)  # type: ignore[arg-type]
    for options in ({"by": "vote"}, {"by": "readout"}, {"skip": 3}, {"blocks": 4}):
        with pytest.raises(ArgumentError):
            net.predict(x, **options)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="flat"):
        learner(label="append").phases((x.view(10, 3, 3), y))
    with pytest.raises(ArgumentError, match="images"):
        hybrid_images(torch.rand(1, 1, 4, 4), Key(0))
    with pytest.raises(ArgumentTypeError):
        hybrid_images(torch.rand(2, 1, 4, 4), 0)  # type: ignore[arg-type]
