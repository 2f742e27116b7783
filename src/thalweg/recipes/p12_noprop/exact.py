"""What must hold to the last digit: the noise levels' algebra, locality, and blocks that know the label."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from thalweg.local import DenoisingBlock, NoProp, cosine, one_hot_labels
from thalweg.noise import Key

FEATURES, CLASSES, EXAMPLES, BLOCKS = 6, 4, 32, 3


class Oracle(nn.Module):
    """A block that reads the label off the input, and is sure."""

    def forward(self, latent: Tensor, inputs: Tensor) -> Tensor:
        """Logits."""
        return 1e4 * inputs[:, :CLASSES]


def identities(seed: int) -> dict[str, float]:
    """The largest deviation from each identity: all are to be zero, or as good as."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.rand(EXAMPLES, FEATURES, generator=draw, dtype=torch.float64)
    y = torch.randint(CLASSES, (EXAMPLES,), generator=draw)
    return {
        "levels": max(_levels(steps) for steps in (2, 5, 10, 100)),
        "locality": _locality(x, y, seed),
        "order": _order(x, y, seed),
        "oracle": _oracle(x, y, seed),
    }


def _levels(steps: int) -> float:
    """Mean, variance and divergence of one step, relative to what they should be."""
    levels = cosine(steps)
    worst = 0.0
    for index in range(steps):
        before, after = levels.levels[index], levels.levels[index + 1]
        move = levels.transition(index)
        mean = move.guess + move.state * before**0.5 - after**0.5
        variance = move.state**2 * (1 - before) + move.noise**2 - (1 - after)
        divergence = 0.5 * (move.guess / move.noise) ** 2 / (0.5 * levels.weight(index)) - 1
        worst = max(worst, abs(float(mean)), abs(float(variance)), abs(float(divergence)))
    return worst


def _learner(seed: int) -> NoProp:
    torch.manual_seed(seed)
    labels = one_hot_labels(CLASSES)
    blocks = [DenoisingBlock(labels, FEATURES, width=8) for _ in range(BLOCKS)]
    return NoProp(blocks, labels, anchor="own").double()


def _locality(x: Tensor, y: Tensor, seed: int) -> float:
    """What one block's loss does to the gradients of the others: nothing."""
    learner = _learner(seed)
    next(iter(learner.phases((x, y), only=[1]))).backward()
    others = [p.grad for index in (0, 2) for p in learner.blocks[index].parameters() if p.grad is not None]
    return max((float(grad.abs().max()) for grad in others), default=0.0)


def _order(x: Tensor, y: Tensor, seed: int) -> float:
    """The same weights whether blocks learn first to last or last to first."""
    found = []
    for order in (range(BLOCKS + 1), reversed(range(BLOCKS + 1))):
        learner = _learner(seed)
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
        for phase in learner.phases((x, y), key=Key(seed), only=order):
            optimizer.zero_grad()
            phase.backward()
            optimizer.step()
        found.append(torch.cat([parameter.detach().flatten() for parameter in learner.parameters()]))
    return float((found[0] - found[1]).abs().max())


def _oracle(x: Tensor, y: Tensor, seed: int) -> float:
    """How far the last latent's mean is from the label's point when every block knows the label."""
    told = x.clone()
    told[:, :CLASSES] = torch.eye(CLASSES, dtype=x.dtype)[y]
    labels = one_hot_labels(CLASSES)
    learner = NoProp([Oracle() for _ in range(BLOCKS)], labels).double()
    latent = torch.zeros(EXAMPLES, CLASSES, dtype=x.dtype)
    # from the mean of a start that already has its share of the label
    latent = latent + learner.levels.levels[0] ** 0.5 * labels.weight[y]
    for index in range(BLOCKS):
        move = learner.levels.transition(index)
        guess = learner.denoised(learner.blocks[index](latent, told))
        latent = move.guess * guess + move.state * latent
    return float((latent - learner.levels.levels[-1] ** 0.5 * labels.weight[y]).abs().max())
