"""A zeroth-order step on several processes, which tell each other keys and scalars and nothing else."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from thalweg.blackbox.directions import Bound
from thalweg.blackbox.estimate import Evaluations
from thalweg.blackbox.slopes import Measuring, Slopes
from thalweg.errors import ArgumentError, ArgumentTypeError, NonFiniteError, UnsupportedError, require_choice
from thalweg.noise import Key
from thalweg.step import Closure, Estimate


@dataclass(slots=True)
class Traffic:
    """What one process has sent since its rule was made.

    Args:
        steps: estimates.
        collectives: all-gathers.
        sent: bytes that had to reach other processes: what this one contributed, once for each of the others.
    """

    steps: int = 0
    collectives: int = 0
    sent: int = 0

    def per_step(self) -> float:
        """Bytes sent per estimate; 0.0 before the first."""
        return self.sent / max(self.steps, 1)


@dataclass(frozen=True, slots=True)
class Distributed:
    """Share one estimate between the processes of `torch.distributed`; some ten numbers cross the wire.

    Choose it where a data-parallel wrapper would send all gradients. Every rank keeps the bare module, draws
    the directions again from their keys and arrives at the same gradients, bit for bit, whatever its own
    torch seed: sums run in the order of the ranks. The key of each step is that of rank 0; a `MeZO` writes
    its own into its log, so give it the same seed everywhere.

    A loss that is nan or infinite, or any other exception in one rank's closure, raises on all ranks at once.
    At each step the ranks compare shapes, rule and a checksum of the weights; what differs is refused.

    Args:
        gradient: a rule over keyed directions: `SPSA`, `EvolutionStrategies`, `ForwardGradient`, `OnePoint`.
        split: "batch": every rank evaluates the same directions on a batch of its own; the loss is the mean
            of the ranks' mean losses, as under DistributedDataParallel. One all-gather per evaluation, and
            the result is that of one process on the whole batch (batches of the same size).
            "directions": every rank evaluates directions of its own, `samples` each, on the same batch or on
            one of its own; two all-gathers per step, and the result is the mean of what one process finds
            with `rank_key(key, 0)`, `rank_key(key, 1)`, ... Ranks of losses and signs are each process's own,
            and `restore="inplace"`, after which every rank's weights would differ by a rounding, is refused.
        group: a process group, or None for the default one.

    Attributes:
        traffic: a `Traffic` that counts what this process sent through this rule.

    Raises:
        ArgumentError, ArgumentTypeError: a field out of range, or another kind of rule.

    Example:
        >>> import tempfile, torch.distributed as dist
        >>> from thalweg.blackbox.spsa import SPSA
        >>> from thalweg.step import backward
        >>> start = f"file://{tempfile.mkdtemp()}/start"
        >>> dist.init_process_group("gloo", init_method=start, rank=0, world_size=1)
        >>> weight = torch.tensor([3.0], requires_grad=True)
        >>> loss = backward(lambda: (weight**2).sum(), [weight], gradient=Distributed(SPSA(scale=0.5)))
        >>> weight.grad
        tensor([6.])
        >>> dist.destroy_process_group()
    """

    gradient: Measuring
    split: Literal["batch", "directions"] = "batch"
    group: Any = field(default=None, repr=False, compare=False)
    traffic: Traffic = field(default_factory=Traffic, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_choice("split", self.split, ("batch", "directions"))
        if isinstance(self.gradient, type) or not isinstance(self.gradient, Measuring):
            raise ArgumentTypeError(
                "gradient",
                self.gradient,
                "a rule over keyed directions: SPSA, EvolutionStrategies, ForwardGradient, OnePoint",
                "For other rules call thalweg.all_reduce_gradients_(parameters) after thalweg.backward.",
            )
        if self.split == "directions" and _restore(self.gradient) == "inplace":
            mend = "'swap' needs as little memory and returns exactly; split='batch' takes 'inplace' too."
            expected = "'copy' or 'swap' with split='directions': each rank would round on its own way"
            raise ArgumentError("gradient", "restore='inplace'", expected, mend)

    def estimate(self, closure: Closure, parameters: Sequence[Tensor], key: Key) -> Estimate:
        """The evaluations of the rule on each rank; `evaluations` counts this rank's.

        Raises:
            NonFiniteError: the loss of a rank is nan or infinite; raised on every rank.
            ArgumentError: rule, shapes or weights differ between the ranks; raised on every rank.
            RuntimeError: another rank failed; that rank raises the error itself.
            UnsupportedError: torch.distributed is not initialised.
        """
        with torch.no_grad():
            return self.measure(Evaluations(closure, parameters), parameters, key).estimate(parameters)

    def measure(self, evaluations: Evaluations, parameters: Sequence[Tensor], key: Key) -> Slopes:
        """As `estimate`, but the gradient stays a few numbers and a key."""
        ranks = _Ranks(self.group, parameters, self.traffic)
        key = ranks.agree(repr(self), parameters, key)
        self.traffic.steps += 1
        if self.split == "batch":
            return self.gradient.measure(_Averaged(evaluations, ranks), parameters, key)
        bound = self._joined(ranks.count, parameters, key)
        error, numbers, found = None, [torch.zeros(())] * (1 + len(bound.weights) // ranks.count), None
        try:
            found = self.gradient.measure(evaluations, parameters, rank_key(key, ranks.own))
            numbers = [found.loss, *found.coefficients]
        except Exception as caught:
            error = caught
        try:
            rows = ranks.gather("this step", numbers, error)
        except BaseException:
            evaluations._buffers.rewind()
            raise
        assert found is not None
        loss = torch.stack([row[0] for row in rows]).mean()
        coefficients = tuple(number / ranks.count for row in rows for number in row[1:])
        loss = loss.to(found.loss.device, found.loss.dtype)
        return Slopes(loss, coefficients, bound, found.evaluations)

    def bind(self, parameters: Sequence[Tensor], key: Key) -> Bound:
        """The directions of the estimate with this key, those of all ranks."""
        if self.split == "batch":
            return self.gradient.bind(parameters, key)
        return self._joined(_world(self.group)[1], parameters, key)

    def _joined(self, count: int, parameters: Sequence[Tensor], key: Key) -> _Joined:
        return _Joined(tuple(self.gradient.bind(parameters, rank_key(key, rank)) for rank in range(count)))


def rank_key(key: Key, rank: int) -> Key:
    """The key under which one rank draws its own directions in `Distributed(..., split="directions")`.

    Example:
        >>> rank_key(Key(7), 0) == rank_key(Key(7), 1)
        False
    """
    return Key(seed=key.bits(), step=rank, device=key.device)


@dataclass(frozen=True, slots=True, eq=False)
class _Joined:
    """The directions of all ranks, one after the other."""

    bounds: tuple[Bound, ...]

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(weight / len(self.bounds) for bound in self.bounds for weight in bound.weights)

    def part(self, sample: int, index: int, value: Tensor) -> Tensor | None:
        rank, own = divmod(sample, len(self.bounds[0].weights))
        return self.bounds[rank].part(own, index, value)


class _Averaged(Evaluations):
    """Evaluations whose losses are the means over the ranks."""

    def __init__(self, evaluations: Evaluations, ranks: _Ranks) -> None:
        self._evaluations, self._ranks, self._buffers = evaluations, ranks, evaluations._buffers
        self.count = evaluations.count

    def loss(self, name: str) -> Tensor:
        """Evaluate once on every rank; the mean, and the mean tangent where the loss carries one."""
        error, pair, own = None, [torch.zeros(()), torch.zeros(())], torch.zeros(())
        carries = forward_ad._current_level >= 0
        pair = pair if carries else pair[:1]
        try:
            own = self._evaluations.loss(name)
            primal, tangent = forward_ad.unpack_dual(own)
            pair = [primal, torch.zeros_like(primal) if tangent is None else tangent][: len(pair)]
        except Exception as caught:
            error = caught
        self.count = self._evaluations.count
        try:
            rows = self._ranks.gather(name, pair, error)
        except BaseException:
            self._buffers.rewind()
            raise
        mean = torch.stack([row.to(own.device, own.dtype) for row in rows]).mean(0)
        return forward_ad.make_dual(mean[0], mean[1]) if carries else mean[0]


class _Ranks:
    """The processes of a group, and what they say to each other."""

    def __init__(self, group: Any, parameters: Sequence[Tensor], traffic: Traffic) -> None:
        self.own, self.count = _world(group)
        self._group, self._traffic = group, traffic
        # under fake tensors nothing is sent: every rank is taken to say the same
        self._fake = any(isinstance(parameter, FakeTensor) for parameter in parameters)
        device = parameters[0].device
        self._device = device if device.type == "cuda" and _uses_nccl(group) else torch.device("cpu")

    def agree(self, rule: str, parameters: Sequence[Tensor], key: Key) -> Key:
        """Check that all ranks are about to do the same, and return the key of rank 0."""
        if self._fake:
            return key
        what = (re.sub(r" at 0x[0-9a-f]+", "", rule), [(tuple(p.shape), str(p.dtype)) for p in parameters])
        words = [word % (1 << 64) for word in (key.seed, key.step, key.call)]
        signed = [word - (1 << 64) if word >> 63 else word for word in words]
        numbers = [*signed, zlib.crc32(repr(what).encode()), _checksum(parameters)]
        rows = self._all_gather(torch.tensor(numbers, dtype=torch.int64, device=self._device))
        found = [row.tolist() for row in rows]
        for rank, row in enumerate(found):
            if row[3] != found[0][3]:
                mend = "Make rule and model the same everywhere, and give the parameters in the same order."
                expected = "the same rule, shapes and dtypes on every rank"
                raise ArgumentError("parameters", f"others on rank {rank} than on rank 0", expected, mend)
            if row[4] != found[0][4]:
                mend = "Send them once: `for p in parameters: torch.distributed.broadcast(p.data, 0)`."
                expected = "the same weights, bit for bit, on every rank"
                raise ArgumentError("parameters", f"others on rank {rank} than on rank 0", expected, mend)
        seed, step, call = (word % (1 << 64) for word in found[0][:3])
        return replace(key, seed=seed, step=step, call=call)

    def gather(self, name: str, numbers: Sequence[Tensor], error: Exception | None) -> list[Tensor]:
        """The numbers of each rank in float64; raises on every rank when one of them came with an error."""
        state = 0 if error is None else 1 if isinstance(error, NonFiniteError) else 2
        if self._fake:
            if error is not None:
                raise error
            return [torch.stack([n.double() for n in numbers])] * self.count
        own = [number.detach().to(self._device, torch.float64) for number in numbers]
        rows = self._all_gather(torch.stack([own[0].new_tensor(float(state)), *own]))
        if error is not None:
            raise error
        for rank, state in enumerate(torch.stack(rows)[:, 0].tolist()):
            if state == 1:
                raise NonFiniteError(f"{name}: the loss of rank {rank} is nan or infinite")
            if state == 2:
                raise RuntimeError(f"{name}: rank {rank} failed; its own error says why")
        return [row[1:] for row in rows]

    def _all_gather(self, payload: Tensor) -> list[Tensor]:
        import torch.distributed as dist

        rows = [torch.empty_like(payload) for _ in range(self.count)]
        # not all_reduce: whose order of summation is not the same on every rank
        dist.all_gather(rows, payload, group=self._group)
        self._traffic.collectives += 1
        self._traffic.sent += payload.nbytes * (self.count - 1)
        return rows


def _checksum(parameters: Sequence[Tensor]) -> int:
    """A sum of the weights' bits as integers: exact, so in any order of summation the same."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [p.detach().view(integers[p.element_size()]).sum(dtype=torch.int64) for p in parameters]
    total = sums[0]
    for each in sums[1:]:
        # times an odd number, so that two parameters that changed places are seen
        total = total * 31 + each.to(total.device)
    return int(total)


def _restore(rule: object) -> object:
    # `OnePoint` keeps its own in the rule that it is made of
    return getattr(rule, "restore", getattr(getattr(rule, "_point", None), "restore", None))


def _world(group: Any) -> tuple[int, int]:
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise UnsupportedError("Distributed: call torch.distributed.init_process_group first")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ArgumentError("group", group, "a group to which this process belongs")
    return rank, dist.get_world_size(group)


def _uses_nccl(group: Any) -> bool:
    import torch.distributed as dist

    return "nccl" in dist.get_backend(group)
