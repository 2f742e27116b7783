"""Forward-forward: every block learns to be lively on real examples and quiet on false ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from thalweg.errors import (
    ArgumentError,
    ArgumentTypeError,
    require_choice,
    require_floating,
    require_integer,
    require_positive,
)
from thalweg.local.goodness import Goodness
from thalweg.local.noprop_labels import require_labels
from thalweg.local.stack import BlockPhase, LocalPhase, LocalStack, Normalize, require_modules
from thalweg.noise import Key, fresh_key, uniform


class ForwardForward(LocalStack):
    """Train each block by two forward passes, one of them on wrong labels, and none backwards.

    Choose it where nothing may be sent back between blocks and the classes are few: predicting by goodness
    runs the stack once per class. It trails `LocalStack` with a `Readout` per block, the same locality with
    an ordinary loss; show that one beside it. Inside a block gradients are taken as usual.

    Args:
        blocks: modules, each ending in an activation such as ReLU.
        classes: at least 2.
        local: a `Goodness` for all blocks or one per block; None for `Goodness()`.
        label: how inputs carry their label. "overlay" writes it over the first `classes` features, "append"
            behind the features of flat inputs; None not at all, batches are then (positive, negative) or
            (positive, negative, labels), see `hybrid_images`.
        label_scale: the value that marks the class; the largest value of a feature is a good one.
        negatives: "random" gives each example one wrong label, "all" every wrong one, "hard" one drawn in
            proportion to what the stack believes now, which costs a prediction per batch.
        normalize: of the input of each block, so that a block cannot read off the goodness of the one before:
            "rms", "length", a function, or None.
        readouts: one `Readout` per block, trained beside it on a neutral label (a phase more per block), to
            predict in one pass; None for none.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Paper:
        Hinton: The Forward-Forward Algorithm: Some Preliminary Investigations. arXiv 2212.13345, 2022.

    Example:
        >>> from thalweg.local import ForwardForward
        >>> blocks = [nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 8), nn.ReLU())]
        >>> learner = ForwardForward(blocks, classes=3)
        >>> optimizer = torch.optim.Adam(learner.parameters())
        >>> for phase in learner.phases((torch.rand(5, 6), torch.tensor([0, 1, 2, 0, 1]))):
        ...     optimizer.zero_grad()
        ...     loss = phase.backward()
        ...     optimizer.step()
        >>> learner.predict(torch.rand(5, 6)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        classes: int,
        *,
        local: nn.Module | Sequence[nn.Module] | None = None,
        label: Literal["overlay", "append"] | None = "overlay",
        label_scale: float = 1.0,
        negatives: Literal["random", "all", "hard"] = "random",
        normalize: Normalize = "rms",
        readouts: Iterable[nn.Module] | None = None,
    ) -> None:
        super().__init__(blocks, Goodness() if local is None else local, normalize=normalize)
        require_integer("classes", classes, 2)
        if label is not None:
            require_choice("label", label, ("overlay", "append"))
        require_positive("label_scale", label_scale)
        require_choice("negatives", negatives, ("random", "all", "hard"))
        self.classes = classes
        self.label = label
        self.label_scale = label_scale
        self.negatives = negatives
        self.readouts = None if readouts is None else nn.ModuleList(require_modules("readouts", readouts))
        if self.readouts is not None and len(self.readouts) != len(self.blocks):
            raise ArgumentError("readouts", f"{len(self.readouts)}", f"{len(self.blocks)}, one per block")

    def labelled(self, inputs: Tensor, labels: Tensor | None) -> Tensor:
        """Inputs that carry these labels, or the neutral one for None: the same share of every class."""
        if self.label is None:
            return inputs
        flat = inputs.flatten(1)
        if labels is None:
            code = flat.new_full((len(flat), self.classes), 1 / self.classes)
        else:
            code = _is_class(labels, self.classes).to(flat.dtype)
        if self.label == "append":
            if inputs.ndim != 2:
                raise ArgumentError("batch[0]", inputs, "flat inputs (batch, features) with label='append'")
            return torch.cat([flat, self.label_scale * code], 1)
        if flat.shape[1] < self.classes:
            raise ArgumentError("batch[0]", inputs, f"at least {self.classes} features to write a label over")
        return torch.cat([self.label_scale * code, flat[:, self.classes :]], 1).view(inputs.shape)

    def contrast(self, batch: Any, *, key: Key | None = None) -> tuple[Tensor, Tensor]:
        """Positive examples and then negative ones, and which is which."""
        wanted = (2,) if self.label is not None else (2, 3)
        if not isinstance(batch, tuple | list) or len(batch) not in wanted:
            expected = "(inputs, labels)" if self.label else "(positive, negative) or with labels behind"
            raise ArgumentTypeError("batch", batch, expected)
        inputs = require_floating("batch[0]", batch[0])
        if self.label is None:
            parts = [inputs, require_floating("batch[1]", batch[1])]
            if parts[0].shape[1:] != parts[1].shape[1:]:
                raise ArgumentError("batch[1]", parts[1], f"examples of shape {tuple(inputs.shape[1:])}")
        else:
            require_labels(batch[1], self.classes, len(inputs))
            wrong = self._wrong(inputs, batch[1], fresh_key(inputs) if key is None else key)
            parts = [self.labelled(inputs, batch[1]), *(self.labelled(inputs, each) for each in wrong)]
        x = torch.cat(parts)
        return x, torch.arange(len(x), device=x.device) < len(inputs)

    def phases(
        self, batch: Any, *, only: Iterable[int] | None = None, key: Key | None = None
    ) -> Iterator[Any]:
        """One phase per block, and with `readouts` one more per block.

        Args:
            batch: (inputs, labels), labels int64 of shape (batch,); see `label` for None.
            only: indices of the blocks that learn, None for all.
            key: of the wrong labels, None draws from torch's default generator.
        """
        if key is not None and not isinstance(key, Key):
            raise ArgumentTypeError("key", key, "a thalweg.noise.Key or None")
        chosen = self._chosen(only)
        x, positive = self.contrast(batch, key=key)
        return self._both(x, positive, batch, chosen)

    def _both(
        self, x: Tensor, positive: Tensor, batch: Any, chosen: Sequence[int]
    ) -> Iterator[BlockPhase | LocalPhase]:
        yield from self._phases(x, positive, chosen)
        if self.readouts is None or (self.label is None and len(batch) < 3):
            return
        state = self.labelled(batch[0], None)
        for index in range(max(chosen) + 1):
            with torch.no_grad():
                state = self.run(index, state, ())
            parameters = tuple(p for p in self.readouts[index].parameters() if p.requires_grad)
            if index in chosen and parameters:
                loss = partial(self.readouts[index], self._normal(state), batch[-1])
                yield LocalPhase(f"readout {index}", parameters, loss)

    def scores(
        self, inputs: Tensor, *, blocks: int | None = None, by: Literal["goodness", "readout"] = "goodness"
    ) -> list[Tensor]:
        """What each block says about each class by itself, shapes (batch, classes)."""
        require_choice("by", by, ("goodness", "readout"))
        require_floating("inputs", inputs)
        count = len(self.blocks) if blocks is None else blocks
        require_integer("blocks", count, 1)
        if count > len(self.blocks):
            raise ArgumentError("blocks", count, f"at most {len(self.blocks)}, the number of blocks")
        if by == "readout" and self.readouts is None:
            raise ArgumentError("by", by, "'goodness', since there are no readouts")
        if by == "goodness" and self.label is None:
            raise ArgumentError("by", by, "'readout', since the inputs carry no label")
        with torch.no_grad():
            if by == "readout":
                return [self._read(i, state) for i, state in enumerate(self._states(inputs, None, count))]
            by_class = []
            for label in range(self.classes):
                labels = torch.full((len(inputs),), label, device=inputs.device)
                states = self._states(inputs, labels, count)
                by_class.append([self._local(i).scores(state) for i, state in enumerate(states)])
        return [torch.stack(each, 1) for each in zip(*by_class)]

    def predict(
        self,
        inputs: Tensor,
        *,
        blocks: int | None = None,
        by: Literal["goodness", "readout"] = "goodness",
        skip: int = 0,
    ) -> Tensor:
        """The sum of what the blocks say about each class, shape (batch, classes).

        Args:
            inputs: without labels.
            blocks: how many of them run, None for all.
            by: "goodness" runs them once per class; "readout" once.
            skip: leave the first ones out of the sum, as the paper does with one.
        """
        require_integer("skip", skip, 0)
        found = self.scores(inputs, blocks=blocks, by=by)
        if skip >= len(found):
            raise ArgumentError("skip", skip, f"below {len(found)}, the number of blocks that run")
        return torch.stack(found[skip:]).sum(0)

    def _states(self, inputs: Tensor, labels: Tensor | None, count: int) -> Iterator[Tensor]:
        state = self.labelled(inputs, labels)
        for index in range(count):
            state = self.run(index, state, ())
            yield state

    def _read(self, index: int, state: Tensor) -> Tensor:
        assert self.readouts is not None
        readout: Any = self.readouts[index]
        scores: Tensor = readout.scores(self._normal(state))
        return scores

    def _normal(self, state: Tensor) -> Tensor:
        return state if self.normalize is None else self.normalize(state)

    def _wrong(self, inputs: Tensor, labels: Tensor, key: Key | Tensor) -> list[Tensor]:
        if self.negatives == "all":
            return [(labels + shift) % self.classes for shift in range(1, self.classes)]
        if self.negatives == "random":
            drawn = uniform(inputs.new_empty(len(inputs), dtype=torch.float32), key)
            # rounding may reach the end of the range, where the shift would be a whole turn
            shift = (drawn * (self.classes - 1)).long().clamp(max=self.classes - 2)
            return [(labels + 1 + shift) % self.classes]
        beliefs = self.predict(inputs, by="goodness" if self.readouts is None else "readout")
        beliefs = beliefs.log_softmax(1) if self.readouts is None else beliefs.clamp(min=1e-12).log()
        drawn = uniform(beliefs, key).clamp(min=torch.finfo(beliefs.dtype).tiny)
        # the largest of Gumbel-perturbed logarithms is a draw from the distribution
        return [
            (beliefs - (-drawn.log()).log())
            .masked_fill(_is_class(labels, self.classes), -torch.inf)
            .argmax(1)
        ]


def _is_class(labels: Tensor, classes: int) -> Tensor:
    # F.one_hot looks at the values, which fake tensors do not have
    return labels[:, None] == torch.arange(classes, device=labels.device)
