"""NoProp in use: label embeddings, predictions, the ledger, dtypes, compilation, digits, refusals."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_noprop import CLASSES, batch, learner

from thalweg.blackbox import SPSA
from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.ledger import cost, price
from thalweg.local import (
    BackpropNoProp,
    DenoisingBlock,
    NoiseLevels,
    NoProp,
    cosine,
    learned_labels,
    one_hot_labels,
    prototype_labels,
)
from thalweg.noise import Key, normal
from thalweg.step import Step, backward


def test_learned_labels_start_orthonormal_and_say_when_they_cannot() -> None:
    assert torch.allclose(
        learned_labels(4, 9).weight @ learned_labels(4, 9).weight.T, torch.eye(4), atol=1e-5
    )
    assert not torch.equal(learned_labels(4, 9).weight, learned_labels(4, 9, seed=1).weight)
    with pytest.warns(UserWarning, match="orthogonal"):
        narrow = learned_labels(5, 2).weight
    assert torch.allclose(narrow.T @ narrow, torch.eye(2), atol=1e-5)


def test_prototypes_are_the_most_central_examples() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 2, 3, 3, generator=g), torch.arange(40) % 2
    labels = prototype_labels(x, y, 2)
    for label in range(2):
        members = x[y == label].flatten(1)
        medians = torch.cdist(members, members).quantile(0.5, 1)
        assert torch.equal(labels.weight[label].flatten(), members[medians.argmin()])
    assert labels.shape == (2, 3, 3)
    assert labels.learned


def test_prototype_latents_take_a_path_of_convolutions() -> None:
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8) % 2
    labels = prototype_labels(x, y, 2)
    net = NoProp([DenoisingBlock(labels, (1, 8, 8), width=8, channels=(2, 2, 4)) for _ in range(2)], labels)
    for phase in net.phases((x, y)):
        phase.backward()
    assert labels.weight.grad is not None
    assert net.eval().predict(x).shape == (8, 2)
    with pytest.raises(ArgumentError, match="prototypes"):
        DenoisingBlock(labels, (1, 8, 9))


def test_the_first_block_alone_and_several_starts() -> None:
    net = learner().eval()
    x, _ = batch()
    key = Key(3)
    like = torch.empty(12, CLASSES)
    with torch.no_grad():
        wanted = net.blocks[0](normal(like, key.at(call=0)), x)
    assert torch.equal(net.predict(x, blocks=1, key=key), wanted)
    assert torch.equal(net.predict(x, key=key), net.predict(x, key=key))
    assert not torch.equal(net.predict(x, key=key), net.predict(x, key=key, noise=False))
    together = net.predict(x, samples=4, key=key)
    assert torch.allclose(together.exp().sum(1), torch.ones(12), atol=1e-5)


def test_distance_readout_and_equal_weights() -> None:
    for options in ({"readout": "distance"}, {"weights": "one"}):
        net = learner(labels=learned_labels(CLASSES, 4), **options)  # type: ignore[arg-type]
        for phase in net.phases(batch()):
            phase.backward()
        assert net.eval().predict(batch()[0]).shape == (12, CLASSES)
    near = learner(labels=one_hot_labels(CLASSES), readout="distance")
    logits = near.readout(torch.randn(2, CLASSES), near.embedding)
    mixed = near.embedding.mix(near.readout.linear(torch.zeros(2, CLASSES)).softmax(1))
    assert logits.shape == (2, CLASSES)
    assert mixed.shape == (2, CLASSES)
    assert bool((logits <= 0).all())


def test_kept_bytes_do_not_grow_with_depth_and_are_priced_as_measured() -> None:
    x, y = batch(64)

    def step(depth: int) -> Step:
        net = learner(depth)
        return Step(net, lambda: net.phases((x, y)), tuple(net.parameters()))

    kept = [cost(step(depth), repeats=0).saved_bytes for depth in (2, 4, 16)]
    assert kept[0] == kept[1] == kept[2] > 0
    (priced,), measured = price(step(2)), cost(step(2), repeats=0)
    assert priced.operations == measured.operations
    assert priced.saved_bytes == measured.saved_bytes


def test_another_rule_sees_the_same_draws_at_each_evaluation() -> None:
    net = learner(1)
    (phase,) = net.phases(batch())
    assert torch.equal(phase.loss(), phase.loss())
    backward(phase.loss, phase.parameters, gradient=SPSA(samples=2))
    assert all(p.grad is not None for p in phase.parameters)


def test_keyed_draws_leave_the_default_generator_alone() -> None:
    net = learner(1)
    net.blocks[0].input_path.append(nn.Dropout(0.5))
    state = torch.get_rng_state()
    (phase,) = net.phases(batch(), key=Key(1))
    assert torch.equal(phase.loss(), phase.loss())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    net = learner(2).to(dtype)
    x, y = batch()
    for phase in net.phases((x.to(dtype), y)):
        assert phase.backward().dtype == dtype
    assert net.eval().predict(x.to(dtype)).dtype == dtype


def test_blocks_may_be_compiled() -> None:
    plain = learner(2)
    whole = copy.deepcopy(plain)
    for index, block in enumerate(whole.blocks):
        whole.blocks[index] = torch.compile(block, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(whole.phases(batch(), key=Key(1)), plain.phases(batch(), key=Key(1))):
        assert torch.allclose(ours.backward(), theirs.backward(), rtol=1e-5)


def test_the_baseline_trains_end_to_end() -> None:
    labels = one_hot_labels(CLASSES)
    net = BackpropNoProp([DenoisingBlock(labels, 4, width=6) for _ in range(2)], labels)
    x, y = batch()
    assert torch.equal(net(x, key=Key(1)), net(x, key=Key(1)))
    nn.functional.cross_entropy(net(x), y).backward()
    assert all(p.grad is not None for p in net.parameters())
    with pytest.raises(ArgumentError, match="start"):
        BackpropNoProp(net.blocks, labels, start=1.0)


def test_bad_input_is_refused() -> None:
    labels = one_hot_labels(CLASSES)
    block = DenoisingBlock(labels, 4, width=6)
    for change, error in [
        ({"blocks": []}, ArgumentError),
        ({"blocks": [block, block]}, ArgumentError),
        ({"blocks": [len]}, ArgumentTypeError),
        ({"embedding": "onehot"}, ArgumentTypeError),
        ({"levels": cosine(2)}, ArgumentError),
        ({"levels": [0.1, 0.9]}, ArgumentTypeError),
        ({"eta": 0.0}, ArgumentError),
        ({"readout": "linear"}, ArgumentError),
        ({"anchor": "none"}, ArgumentError),
        ({"weights": "two"}, ArgumentError),
    ]:
        with pytest.raises(error):
            NoProp(**{"blocks": [block], "embedding": labels, **change})  # type: ignore[arg-type]
    for levels in [(0.1,), (0.5, 0.1), (0.1, 0.1), (0.0, 0.5), (0.5, 1.0), (0.5, float("nan"))]:
        with pytest.raises(ArgumentError, match="levels"):
            NoiseLevels(levels)
    with pytest.raises(ArgumentTypeError):
        NoiseLevels([0.1, 0.5])  # type: ignore[arg-type]
    for arguments in ({"steps": 0}, {"offset": 0.0}, {"margin": 0.6}):
        with pytest.raises(ArgumentError):
            cosine(**arguments)  # type: ignore[arg-type]
    net = learner()
    x, y = batch()
    for wrong, error in [
        (x, ArgumentTypeError),
        ((x, y.float()), ArgumentTypeError),
        ((x, y[:3]), ArgumentError),
        ((x, y + 1), ArgumentError),
        ((x, -y), ArgumentError),
        ((None, y), ArgumentTypeError),
    ]:
        with pytest.raises(error):
            net.phases(wrong)
    with pytest.raises(ArgumentError, match="only"):
        net.phases((x, y), only=[3])
    with pytest.raises(ArgumentTypeError, match="key"):
        net.phases((x, y), key=3)  # type: ignore[arg-type]
    for options in ({"blocks": 0}, {"blocks": 4}, {"samples": 0}):
        with pytest.raises(ArgumentError):
            net.predict(x, **options)
    for shape in [(12,), (12, CLASSES + 1)]:
        wrong_block = nn.Module()
        wrong_block.forward = lambda z, x, shape=shape: torch.zeros(shape)  # type: ignore[method-assign]
        with pytest.raises(ArgumentError, match="logits"):
            NoProp([wrong_block], labels).predict(x)
    with pytest.raises(ArgumentError, match="class 2"):
        prototype_labels(x, y.clamp(max=1), CLASSES)
    for wrong_inputs in (0, (1, 3, 8), (1, 8)):
        with pytest.raises(ArgumentError):
            DenoisingBlock(labels, wrong_inputs)  # type: ignore[arg-type]


def test_predicting_in_training_mode_with_batch_norm_warns() -> None:
    net = learner(1)
    with pytest.warns(UserWarning, match="eval"):
        net.predict(batch()[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.eval().predict(batch()[0])


def test_learns_digits_from_the_input_and_not_from_the_labels_shape() -> None:
    """The honest rows in small: noise-free, the first block alone, and shuffled inputs at chance."""
    pytest.importorskip("sklearn")
    from thalweg.data.digits import digits

    data = digits()
    torch.manual_seed(0)
    labels = one_hot_labels(10)
    net = NoProp([DenoisingBlock(labels, 64, width=32) for _ in range(3)], labels)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for epoch in range(6):
        order = torch.randperm(1400, generator=torch.Generator().manual_seed(epoch))
        for index in order.split(64):
            for phase in net.phases((data.train_inputs[index], data.train_labels[index])):
                optimizer.zero_grad()
                phase.backward()
                optimizer.step()
    net.eval()
    x, y = data.test_inputs, data.test_labels

    def accuracy(inputs: Tensor, **options: Any) -> float:
        return float((net.predict(inputs, **options).argmax(1) == y).float().mean())

    assert accuracy(x, noise=False) > 0.9
    assert accuracy(x, blocks=1) > 0.9
    assert accuracy(x[torch.randperm(len(x))], noise=False) < 0.2
