"""Checkpointing: keep a few states of a long process and compute the rest again, as rarely as can be."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import comb
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from thalweg.errors import ArgumentError, ArgumentTypeError, require_choice, require_integer

Leaves = tuple[Any, ...]
Advance = Callable[[int, Leaves], Leaves]
_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True, slots=True)
class Checkpointed:
    """The exact gradient of a long process in less memory: keep some states, compute the others again.

    Choose it first when a process does not fit: the gradient is that of `Backprop` to round-off, and only
    time is paid. Give at most one of `slots`, `segments` and `budget`; with none, every state is kept and
    each step computed twice (all but the last), which is right whenever a state is small beside what a step
    keeps, as in diffusion.

    Cost of `slots=S` over N steps: S states and one step's graph are kept, and `step` is called
    `step_calls(N, S)` times, the least that is possible with S states. `stride=L` treats L steps as one: L
    graphs are kept, and N/L takes the place of N; the way to spend memory that is left when all states fit,
    for with N/L slots 2 N - L calls remain. `segments=k` is N/k as a stride, with k slots. With a read-out
    (`then=`), the read-out is computed twice, and counts as one more step of the process.

    It supports double backward, autocast, dropout, `Key`s, hooks, tied weights, captured tensors and
    networks that `torch.compile` has compiled; `torch.func` transforms refuse it. Batch normalisation in
    training mode updates its statistics once, as without checkpoints. What recomputation would not repeat is
    refused by name: a step that draws from a `torch.Generator`, Python's `random` or NumPy, and other buffers
    that change. A step with other side effects, such as a counter, sees them repeated.

    Args:
        slots: how many states are kept at once, the initial one included; at least 1.
        segments: cut the process into so many pieces of equal length; at least 1.
        budget: the most bytes that forward and backward of the rollout may take at their peak, beside the
            parameters and what was there before: a number of bytes or text such as "10GiB", "800MB". `slots`
            and `stride` are then chosen by counting under fake tensors, before anything runs; see
            `thalweg.rollouts.plan`.
        stride: how many steps are computed again together, with all their graphs; at least 1.
        on: "device" keeps states where they are; "host" in the memory of the CPU, which costs two copies of
            a state per kept state.

    Raises:
        ArgumentError, ArgumentTypeError: more than one of the three, or a value out of range.

    Paper:
        Griewank, Walther: Algorithm 799: revolve. ACM Transactions on Mathematical Software 26(1), 2000.

    Example:
        >>> from thalweg.rollouts import rollout
        >>> x = torch.tensor(0.5, requires_grad=True)
        >>> y = rollout(lambda x, k: x + 0.1 * x.sin(), x, 100, gradient=Checkpointed(slots=5))
        >>> step_calls(100, 5)
        416
    """

    slots: int | None = None
    segments: int | None = None
    budget: int | str | None = None
    stride: int = 1
    on: Literal["device", "host"] = "device"

    def __post_init__(self) -> None:
        given = [name for name in ("slots", "segments", "budget") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ArgumentError(given[1], getattr(self, given[1]), f"None beside {given[0]}", "Give one.")
        for name in ("slots", "segments"):
            if getattr(self, name) is not None:
                require_integer(name, getattr(self, name), 1)
        require_integer("stride", self.stride, 1)
        if self.budget is not None:
            read_bytes(self.budget, "budget")
        if self.stride > 1 and (self.budget is not None or self.segments is not None):
            raise ArgumentError("stride", self.stride, "1 beside budget and segments", "They choose it.")
        require_choice("on", self.on, ("device", "host"))


def read_bytes(size: int | str, argument: str = "budget") -> int:
    """Read a number of bytes, or text such as "10GiB" (powers of 1024) or "10GB" (powers of 1000).

    Example:
        >>> read_bytes("1.5KiB"), read_bytes(7)
        (1536, 7)
    """
    expected = "a number of bytes above 0, or text such as '10GiB' or '800MB'"
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise ArgumentTypeError(argument, size, expected)
    if isinstance(size, int):
        value = float(size)
    else:
        number = size.rstrip("kKMGBi ")
        unit = size[len(number) :].strip()
        try:
            value = float(number) * _UNITS[unit]
        except (ValueError, KeyError):
            raise ArgumentError(argument, size, expected) from None
    if not 1 <= value < float("inf"):
        raise ArgumentError(argument, size, expected)
    return int(value)


def step_calls(steps: int, slots: int) -> int:
    """How often `Checkpointed(slots=slots)` calls the step for one forward and one backward.

    N + r N - C(S + r, S + 1) for N steps and S slots, with r the least number for which C(S + r, S) >= N. No
    schedule with S states, the initial one included, can do with fewer (Griewank and Walther).

    Example:
        >>> step_calls(10, 10), step_calls(10, 3), step_calls(10, 1)
        (19, 25, 55)
    """
    require_integer("steps", steps, 1)
    require_integer("slots", slots, 1)
    repeats = most_repeats(steps, slots)
    return steps + repeats * steps - comb(slots + repeats, slots + 1)


def calls_by_pieces(steps: int, slots: int, stride: int, read_out: bool) -> int:
    """How often the step is called with a stride, and with a read-out as one more piece."""
    count = -(-steps // stride)
    stages = count + read_out
    missing = count * stride - steps  # what the first piece lacks, every time it runs
    runs, left = 1, stages
    while left > 1:
        left = first_part(left, slots)
        runs += 1
    return stride * (step_calls(stages, slots) - read_out) - missing * runs


def most_repeats(steps: int, slots: int) -> int:
    """How often the most repeated step is computed again: the least r with C(slots + r, slots) >= steps."""
    if slots == 1:
        return steps - 1
    repeats = 0
    while comb(slots + repeats, slots) < steps:
        repeats += 1
    return repeats


def first_part(steps: int, slots: int) -> int:
    """How many steps to run before the second state is kept; the binomial split."""
    if slots == 1:
        return steps - 1
    repeats = most_repeats(steps, slots)
    return min(comb(slots + repeats - 1, slots), steps - comb(slots + repeats - 2, slots - 1))


def pieces(steps: int, stride: int) -> tuple[int, ...]:
    """Where pieces of `stride` steps begin and end; the first one takes what is left over.

    Example:
        >>> pieces(7, 3)
        (0, 1, 4, 7)
    """
    return (0, *range((steps - 1) % stride + 1, steps + 1, stride))


def equal_pieces(steps: int, segments: int) -> tuple[int, ...]:
    """Where so many pieces of nearly equal length begin and end."""
    segments = min(segments, steps)
    return tuple(steps * index // segments for index in range(segments + 1))


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """Runs pieces of a process under nested checkpoints.

    Args:
        advance: `advance(k, leaves)` computes step k on the flat state.
        ends: where pieces begin and end, in steps; piece i runs from ends[i] to ends[i + 1].
        visit: return the states after all steps and not only the last.
        host: keep states in the CPU's memory.
        normalisations: modules whose statistics a recomputation must leave alone.
    """

    advance: Advance
    ends: tuple[int, ...]
    visit: bool
    host: bool
    normalisations: tuple[nn.Module, ...] = ()

    def run(self, leaves: Leaves, first: int, last: int, slots: int, level: int = 0) -> list[Leaves]:
        """Pieces `first` to `last` with the binomial schedule; returns the states visited.

        `last` may be one more than there are pieces: then a read-out follows, which counts as a piece.
        """
        visited: list[Leaves] = []
        while last - first > 1:
            part = first_part(last - first, slots)
            body = partial(self._nested, first, first + part, slots, level + 1)
            visited = self._joined(visited, self.frame(body, leaves, level))
            leaves = visited[-1]
            first, slots = first + part, max(slots - 1, 1)
        return visited if first == len(self.ends) - 1 else self._piece(visited, first, leaves)

    def frame(self, body: Callable[..., Any], leaves: Leaves, level: int) -> Any:
        """Run `body(*leaves)`, keep only `leaves`, and run it again when its graph is needed."""
        options: dict[str, Any] = {"use_reentrant": False}
        if self.normalisations:
            options["context_fn"] = lambda: (nullcontext(), _statistics_kept(self.normalisations))
        if not self.host:
            return checkpoint(body, *leaves, **options)
        if level == 0:
            with _kept_on_host():
                return checkpoint(body, *leaves, **options)
        # inside another checkpoint a hook would keep states that are computed again anyway; so the copy is a
        # step of the graph
        devices = [leaf.device if isinstance(leaf, Tensor) else None for leaf in leaves]
        parked = [leaf.to("cpu") if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return checkpoint(partial(_returned, body, devices), *parked, **options)

    def _nested(self, first: int, last: int, slots: int, level: int, *leaves: Any) -> list[Leaves]:
        with _room_to_recurse(most_repeats(last - first, slots)):
            return self.run(leaves, first, last, slots, level)

    def _piece(self, visited: list[Leaves], index: int, leaves: Leaves) -> list[Leaves]:
        for k in range(self.ends[index], self.ends[index + 1]):
            leaves = self.advance(k, leaves)
            visited = self._joined(visited, [leaves])
        return visited

    def _joined(self, visited: list[Leaves], found: list[Leaves]) -> list[Leaves]:
        return [*visited, *found] if self.visit else found[-1:]


def _returned(body: Callable[..., Any], devices: Sequence[torch.device | None], *leaves: Any) -> Any:
    return body(*[leaf if device is None else leaf.to(device) for leaf, device in zip(leaves, devices)])


def _kept_on_host() -> AbstractContextManager[Any]:
    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        if not tensor.is_cuda or isinstance(tensor, FakeTensor):
            return tensor.device, tensor.detach().to("cpu", copy=True)
        pinned = torch.empty_like(tensor, device="cpu", pin_memory=True)
        return tensor.device, pinned.copy_(tensor.detach())

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor.to(device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


@contextmanager
def _statistics_kept(modules: tuple[nn.Module, ...]) -> Iterator[None]:
    """Give running statistics back after a recomputation, which would otherwise update them twice."""
    # `.data`: these buffers may be saved for backward, and their version must not change
    buffers = [buffer.data for module in modules for buffer in module._buffers.values() if buffer is not None]
    values = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, values):
            buffer.copy_(value)


_FRAMES_PER_LEVEL = 12  # Python frames that one nested checkpoint takes, generously


@contextmanager
def _room_to_recurse(levels: int) -> Iterator[None]:
    """Raise Python's recursion limit while checkpoints are nested deeply (few slots, many steps)."""
    if levels * _FRAMES_PER_LEVEL < 200:
        yield
        return
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, _depth() + levels * _FRAMES_PER_LEVEL + 500))
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def _depth() -> int:
    depth, frame = 0, sys._getframe()
    while frame.f_back is not None:
        depth, frame = depth + 1, frame.f_back
    return depth
