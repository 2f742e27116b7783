"""A small language model of characters, and the text it reads: no download, Python brings it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

# a line break and the printable characters of ASCII; what else the text holds is left out
ALPHABET = "\n" + "".join(chr(code) for code in range(32, 127))
BLOCK = 2000

SHIFTS: dict[str, Callable[[str], str]] = {
    "upper case": str.upper,
    "no spaces": lambda text: text.replace(" ", ""),
    "underscores": lambda text: text.replace(" ", "_"),
    "swapped case": str.swapcase,
}


@dataclass(frozen=True, slots=True)
class Corpus:
    """Three disjoint parts of one text, as indices into `ALPHABET`.

    Args:
        train: what is trained on.
        held_out: what settings are chosen on.
        test: what the results are judged on.
    """

    train: Tensor
    held_out: Tensor
    test: Tensor


def corpus(seed: int, shift: str | None = None) -> Corpus:
    """Python's own help texts, dealt out in blocks: eight tenths to train, one each to choose and to judge.

    Args:
        seed: deals the blocks; the same blocks for every shift.
        shift: one of `SHIFTS`, the task to be fine-tuned to; None for the text as it is.
    """
    text = "".join(letter for name in sorted(topics) for letter in topics[name] if letter in ALPHABET)
    blocks = [text[start : start + BLOCK] for start in range(0, len(text), BLOCK)]
    dealt = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed)).tolist()
    tenth = len(blocks) // 10
    parts = [dealt[2 * tenth :], dealt[:tenth], dealt[tenth : 2 * tenth]]
    change = SHIFTS[shift] if shift else str
    return Corpus(*(_indices(change("".join(blocks[index] for index in part))) for part in parts))


def _indices(text: str) -> Tensor:
    place = {letter: index for index, letter in enumerate(ALPHABET)}
    return torch.tensor([place[letter] for letter in text])


def windows(text: Tensor, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Draw pieces of a text; (batch, length + 1)."""
    starts = torch.randint(len(text) - length, (batch, 1), generator=generator)
    return text[starts + torch.arange(length + 1)]


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each behind its layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_feed_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.attended = nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) to the same."""
        batch, length, width = x.shape
        mixed = self.queries_keys_values(self.before_attention(x))
        parts = mixed.view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        queries, keys, values = parts.unbind(0)
        attended = nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.attended(attended.transpose(1, 2).reshape(batch, length, width))
        added: Tensor = self.narrow(nn.functional.gelu(self.wide(self.before_feed_forward(x))))
        return x + added


class LanguageModel(nn.Module):
    """A causal transformer over characters.

    Args:
        width: d, a multiple of `heads`.
        layers: blocks.
        heads: of each block.
        longest: the most characters it reads.
    """

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4, longest: int = 64) -> None:
        super().__init__()
        self.letters = nn.Embedding(len(ALPHABET), width)
        self.places = nn.Embedding(longest, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.last_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(ALPHABET))
        for embedding in (self.letters, self.places):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, letters: Tensor) -> Tensor:
        """Indices (batch, length) to logits of the next letter (batch, length, letters)."""
        places = torch.arange(letters.shape[1], device=letters.device)
        logits: Tensor = self.head(self.last_norm(self.blocks(self.letters(letters) + self.places(places))))
        return logits

    def loss(self, pieces: Tensor) -> Tensor:
        """Mean cross-entropy of the next letter in nats; pieces (batch, length + 1)."""
        logits = self(pieces[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), pieces[:, 1:].flatten())

    @torch.no_grad()
    def write(self, beginning: Tensor, letters: int, generator: torch.Generator) -> str:
        """Go on from a beginning, (length,) indices, drawing each next letter; what was written."""
        written, longest = beginning, len(self.places.weight)
        for _ in range(letters):
            chances = self(written[None, -longest:])[0, -1].softmax(0)
            written = torch.cat([written, chances.multinomial(1, generator=generator)])
        return "".join(ALPHABET[index] for index in written[len(beginning) :].tolist())


class LowRankAdapter(nn.Module):
    """A linear layer that stays as it is, plus a product of two thin matrices that learns (LoRA).

    Args:
        layer: kept frozen but for its bias.
        rank: of the product, at least 1.
    """

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        layer.weight.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        changed: Tensor = self.layer(x) + x @ self.down.T @ self.up.T
        return changed


def adapt_(model: LanguageModel, rank: int) -> list[nn.Parameter]:
    """Put an adapter around every linear layer; returns what learns: the thin matrices and the biases."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear) and not isinstance(module, LowRankAdapter):
                setattr(module, name, LowRankAdapter(layer, rank))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or name.endswith((".up", ".down")):
            parameter.requires_grad_(True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
