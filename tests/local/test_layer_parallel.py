"""Blocks of NoProp on two processes: the result of one process, and nothing sent while they learn."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from thalweg.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from thalweg.local import DenoisingBlock, FlowNoProp, LayerParallel, NoProp, learned_labels, one_hot_labels
from thalweg.noise import Key

WORLD, STEPS, DEPTH = 2, 4, 5


def network() -> NoProp:
    torch.manual_seed(0)
    labels = one_hot_labels(3)
    blocks = [DenoisingBlock(labels, 4, width=6) for _ in range(DEPTH)]
    for block in blocks:
        # dropout draws from torch's generators: it too has to come from the key
        block.input_path.append(nn.Dropout(0.3))
    return NoProp(blocks, labels, anchor="own")


def batches() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(12, 4, generator=g), torch.randint(0, 3, (12,), generator=g)) for _ in range(STEPS)]


def train(learner: Any, parameters: Any) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
    for step, batch in enumerate(batches()):
        for phase in learner.phases(batch, key=Key(9, step)):
            optimizer.zero_grad()
            phase.backward()
            optimizer.step()


def state(learner: NoProp) -> dict[str, Tensor]:
    """Weights and the statistics of batch norm, in copies."""
    return {name: value.clone() for name, value in learner.state_dict().items()}


def refused(*arguments: Any, **options: Any) -> None:
    raise AssertionError("something was sent while the blocks were learning")


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    parallel = LayerParallel(network())
    # each rank stands elsewhere in its own generator, and it must not matter
    torch.manual_seed(rank + 17)
    named = [
        name
        for name in dir(dist)
        if name.startswith(("all_", "broadcast", "send", "isend", "reduce", "gather"))
    ]
    before = {name: getattr(dist, name) for name in named}
    for name in named:
        setattr(dist, name, refused)
    train(parallel, parallel.learned())
    untouched = {
        name: value
        for name, value in state(parallel.learner).items()
        if name.startswith(tuple(f"blocks.{i}." for i in range(DEPTH) if i % WORLD != rank))
    }
    fresh = network().state_dict()
    assert untouched
    assert all(torch.equal(value, fresh[name]) for name, value in untouched.items())
    for name, function in before.items():
        setattr(dist, name, function)
    parallel.gather_()
    answer = parallel.eval().predict(batches()[0][0], key=Key(3))
    torch.save((parallel.places, state(parallel.learner), answer), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_make_what_one_makes(tmp_path: Path) -> None:
    """Weights, batch norm statistics and answers, bit for bit; no collective is called in training."""
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=WORLD)
    alone = network()
    train(alone, alone.parameters())
    wanted = state(alone)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    assert [places for places, _, _ in found] == [(0, 2, 4), (1, 3, 5)]
    answer = alone.eval().predict(batches()[0][0], key=Key(3))
    for _, weights, theirs in found:
        assert weights.keys() == wanted.keys()
        assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
        assert torch.equal(theirs, answer)


def test_bad_input_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="init_process_group"):
        LayerParallel(network())
    labels = learned_labels(3, 4)
    with pytest.raises(ArgumentError, match="anchor"):
        LayerParallel(NoProp([DenoisingBlock(one_hot_labels(3), 4, width=6)], one_hot_labels(3)))
    with pytest.raises(ArgumentError, match="learn"):
        LayerParallel(NoProp([DenoisingBlock(labels, 4, width=6)], labels, anchor="own"))
    flow = FlowNoProp(DenoisingBlock(labels, 4, width=6, timed=True), labels)
    with pytest.raises(ArgumentTypeError, match="NoProp"):
        LayerParallel(flow)  # type: ignore[arg-type]


def test_more_processes_than_blocks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    for world, fits in ((DEPTH + 1, True), (DEPTH + 2, False)):
        monkeypatch.setattr(dist, "get_world_size", lambda group, world=world: world)
        if fits:
            assert LayerParallel(network()).places == (0,)
        else:
            with pytest.raises(ArgumentError, match="ranks"):
                LayerParallel(network())
