"""Small blocks, labels and batches for the tests of NoProp."""

from typing import Any

import torch
from torch import Tensor, nn

from thalweg.local import DenoisingBlock, LabelEmbedding, NoProp, one_hot_labels

CLASSES = 3


class Oracle(nn.Module):
    """Knows the class: the input is the one-hot label."""

    def forward(self, latent: Tensor, inputs: Tensor, time: Tensor | None = None) -> Tensor:
        return 1e4 * inputs


class Plain(nn.Module):
    """Two layers on latent and input together."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(CLASSES + 4, 8), nn.Tanh(), nn.Linear(8, CLASSES))

    def forward(self, latent: Tensor, inputs: Tensor) -> Tensor:
        return self.net(torch.cat([latent, inputs], 1))


def learner(depth: int = 3, labels: LabelEmbedding | None = None, **options: Any) -> NoProp:
    torch.manual_seed(0)
    labels = one_hot_labels(CLASSES) if labels is None else labels
    blocks = [DenoisingBlock(labels, 4, width=6, dropout=0.0) for _ in range(depth)]
    return NoProp(blocks, labels, **options)


def batch(examples: int = 12) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(examples, 4, generator=g), torch.randint(0, CLASSES, (examples,), generator=g)
