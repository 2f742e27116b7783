"""A scheduler's steps as linear combinations, read off the scheduler itself."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from thalweg.errors import ArgumentError, ArgumentTypeError, UnsupportedError

_MOST_HISTORY = 4  # a linear multistep method of the field looks back at most so far
_CHECKS = 3
_MOST_REMEMBERED = 16
_COARSE = (torch.float16, torch.bfloat16)
State = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Update:
    """One step: the next latents are a weighted sum of latents, network outputs and noise.

    Args:
        scale: what the latents are multiplied by before the network sees them.
        latents: the weights of the latents, this step's first, then those of the steps before.
        outputs: the weights of the network's outputs, likewise.
        noise: the weight of this step's standard normal noise.
    """

    scale: float
    latents: tuple[float, ...]
    outputs: tuple[float, ...]
    noise: float


@dataclass(frozen=True, slots=True)
class Schedule:
    """A scheduler at one number of steps, without state: any step can be run again.

    The state of the process is the latents; or (latents, older latents ..., older outputs ...), as far back
    as the updates look.

    Args:
        times: what the network is told, one per step.
        integer: whether these are integers.
        start: the standard deviation of the first latents.
        updates: one per step.
    """

    times: tuple[float, ...]
    integer: bool
    start: float
    updates: tuple[Update, ...]

    @property
    def noisy(self) -> bool:
        """Whether any step adds noise."""
        return any(update.noise for update in self.updates)

    def timesteps(self, device: torch.device) -> Tensor:
        """The times as a tensor of shape (steps,)."""
        dtype = torch.int64 if self.integer else torch.float32
        return torch.tensor(self.times, dtype=dtype, device=device)

    def begin(self, latents: Tensor) -> State:
        """The state before the first step."""
        older = len(self.updates[0].latents) + len(self.updates[0].outputs) - 2
        if older == 0:
            return latents
        return (latents, *(torch.zeros_like(latents) for _ in range(older)))

    def advance(self, k: int, state: State, output: Tensor, noise: Tensor | None) -> State:
        """The state after step `k`, in which the network said `output`.

        A sum of products is fused where it can be, and rounded once: beside `x + dt * v` as schedulers write
        it, at most one unit in the last place of the larger of both ends of the step.
        """
        update = self.updates[k]
        if isinstance(state, Tensor) and noise is None and state.dtype not in _COARSE:
            # most samplers: one fused operation
            latents = state if update.latents[0] == 1 else state * update.latents[0]
            return torch.add(latents, output, alpha=update.outputs[0])
        depth = len(update.latents)
        older = () if isinstance(state, Tensor) else state[depth:]
        recent = (state,) if isinstance(state, Tensor) else state[:depth]
        outputs = (output, *older)
        terms = list(zip(update.latents, recent)) + list(zip(update.outputs, outputs))
        if noise is not None:
            terms.append((update.noise, noise))
        new = _weighted(terms, recent[0].dtype)
        if isinstance(state, Tensor):
            return new
        return (new, *recent[: depth - 1], *outputs[: len(update.outputs) - 1])


def _weighted(terms: Sequence[tuple[float, Tensor]], dtype: torch.dtype) -> Tensor:
    if dtype in _COARSE:
        # the weights nearly cancel: sum in float32, as schedulers do
        return _weighted([(weight, value.float()) for weight, value in terms], torch.float32).to(dtype)
    total: Tensor | None = None
    for weight, value in terms:
        if weight == 0:
            continue
        if total is None:
            total = value if weight == 1 else value * weight
        else:
            total = torch.add(total, value, alpha=weight)
    assert total is not None
    return total


_remembered: WeakKeyDictionary[Any, list[_Entry]] = WeakKeyDictionary()


def read_schedule(
    scheduler: Any, steps: int, *, eta: float = 0.0, mu: float | None = None, scales_input: bool = True
) -> Schedule:
    """Read the weights of a diffusers scheduler's steps by running a copy of it on unit inputs.

    Every step of a deterministic solver is linear in the latents and the network's outputs, of this step and
    of earlier ones. The scheduler keeps the earlier ones in itself, so that a step cannot be run twice; as
    weights it can. The answer is remembered for as long as the scheduler and its settings stay. What is not
    linear (clipping, thresholding), draws its own noise, or looks back without end is refused.

    Args:
        scheduler: a scheduler with `set_timesteps`, `timesteps` and `step`; it is left unchanged.
        steps: what `set_timesteps` is given, at least 1.
        eta: the share of fresh noise, for schedulers that have it.
        mu: the time shift of a scheduler with dynamic shifting.
        scales_input: whether the pipeline calls `scale_model_input`.

    Returns:
        A `Schedule`; its number of steps is that of the scheduler's timesteps.

    Raises:
        ArgumentTypeError: not a scheduler.
        ArgumentError: steps or eta that this scheduler does not have.
        UnsupportedError: a scheduler whose steps are not such sums.

    Example:
        >>> from diffusers import EulerDiscreteScheduler
        >>> schedule = read_schedule(EulerDiscreteScheduler(), 10)
        >>> schedule.updates[0].latents, len(schedule.times)
        ((1.0,), 10)
    """
    if not all(hasattr(scheduler, name) for name in ("set_timesteps", "step", "config")):
        raise ArgumentTypeError("pipeline.scheduler", type(scheduler), "a diffusers scheduler")
    if eta and "eta" not in inspect.signature(scheduler.step).parameters:
        name = type(scheduler).__name__
        raise ArgumentError("eta", eta, f"0 for {name}, whose step takes no eta")
    question = (steps, eta, mu, scales_input, dict(scheduler.config))
    entries = _remembered.setdefault(scheduler, [])
    for entry in entries:
        if entry.question == question and entry.holds(scheduler):
            return entry.schedule
    # under no mode of the caller's: the weights are numbers even where tensors are fake
    with _disable_current_modes(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        twin = _copied(scheduler)
        before = dict(vars(twin))
        schedule = _probe(twin, steps, eta, mu, scales_input)
    entries.append(_Entry(question, _settings(scheduler, before, vars(twin)), schedule))
    del entries[:-_MOST_REMEMBERED]
    return schedule


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    """What was read off a scheduler, and what it depended on.

    Args:
        question: what was asked, and the configuration.
        settings: the attributes that a run leaves alone; tensors with their version.
        schedule: the answer.
    """

    question: tuple[Any, ...]
    settings: dict[str, tuple[Any, int]]
    schedule: Schedule

    def holds(self, scheduler: Any) -> bool:
        """Whether the scheduler is still as it was."""
        now = vars(scheduler)
        for name, (value, version) in self.settings.items():
            found = now.get(name)
            if isinstance(value, Tensor):
                if found is not value or value._version != version:
                    return False
            elif found != value:
                return False
        return True


def _settings(scheduler: Any, before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, int]]:
    """Attributes that a run of a copy left in place; those it replaced are the state of a run."""
    found: dict[str, tuple[Any, int]] = {}
    for name, value in vars(scheduler).items():
        if isinstance(value, Tensor):
            if after.get(name) is before[name]:
                found[name] = (value, value._version)
        elif isinstance(value, bool | int | float | str | None) and after.get(name) == before[name]:
            found[name] = (value, 0)
    return found


def _copied(scheduler: Any) -> Any:
    twin = copy.copy(scheduler)
    for name, value in vars(scheduler).items():
        # what an earlier run left behind may hang in a graph, which cannot be copied deeply
        if isinstance(value, Tensor):
            value = value.detach().clone()
        elif isinstance(value, list):
            value = list(value)
        elif isinstance(value, dict):
            value = copy.deepcopy(value)
        twin.__dict__[name] = value
    return twin


def _probe(scheduler: Any, steps: int, eta: float, mu: float | None, scales_input: bool) -> Schedule:
    name = type(scheduler).__name__
    try:
        scheduler.set_timesteps(steps, device="cpu", **({} if mu is None else {"mu": mu}))
    except ValueError as error:
        raise ArgumentError("steps", steps, f"a number of steps that {name} takes", str(error)) from error
    times = scheduler.timesteps
    count = len(times)
    # row 3k + i of a batch is the unit impulse of step k's latents, output or noise; the last rows are checks
    mixed = torch.randn(
        3 * count, _CHECKS, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ) * torch.tensor([0.0, 1.0, 1e4], dtype=torch.float64)
    inputs = torch.cat([torch.eye(3 * count, dtype=torch.float64), mixed], 1)
    accepted = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {"eta": eta} if eta else {}
    results, scales = [], []
    drawn = torch.get_rng_state()
    for k, t in enumerate(times):
        latents, output, noise = (inputs[3 * k + i].reshape(-1, 1, 1, 1).clone() for i in range(3))
        if "variance_noise" in accepted:
            options["variance_noise"] = noise
        given = latents
        if scales_input and hasattr(scheduler, "scale_model_input"):
            given = scheduler.scale_model_input(latents, t)
        scales.append(_scale(name, given, latents, 3 * k))
        found = scheduler.step(output, t, latents, return_dict=False, **options)[0]
        results.append(found.to(torch.float64).reshape(-1))
    if not torch.equal(torch.get_rng_state(), drawn):
        raise UnsupportedError(
            f"{name}: its step draws its own noise, which no key names, so a recomputation would draw other "
            "numbers. Use DDIMScheduler with eta=1, or DPMSolverMultistepScheduler with an sde- algorithm: "
            "their noise comes from key="
        )
    found = torch.stack(results)
    weights = found[:, : 3 * count]
    _require_linear(name, found[:, 3 * count :], weights @ mixed, weights.abs() @ mixed.abs())
    return Schedule(
        times=tuple(times.tolist()),
        integer=not times.is_floating_point(),
        start=float(getattr(scheduler, "init_noise_sigma", 1.0)),
        updates=_updates(name, weights.reshape(count, count, 3), scales),
    )


def _scale(name: str, given: Tensor, latents: Tensor, row: int) -> float:
    scale = float(given[row])
    if not torch.allclose(given, latents * scale, rtol=1e-5):
        raise UnsupportedError(f"{name}.scale_model_input: not a multiple of the latents")
    return scale


def _require_linear(name: str, found: Tensor, expected: Tensor, size: Tensor) -> None:
    # schedulers compute in float32: only an error far above its round-off means a step of another kind
    if not bool(torch.isfinite(found).all()) or bool(((found - expected).abs() > 1e-3 * size).any()):
        raise UnsupportedError(
            f"{name}: its steps are not weighted sums of latents and network outputs, so they cannot be run "
            "again from a state. Switch off clip_sample, thresholding and the like in its configuration, as "
            "latent pipelines do: type(scheduler).from_config(scheduler.config, clip_sample=False)"
        )


def _updates(name: str, weights: Tensor, scales: Sequence[float]) -> tuple[Update, ...]:
    """Rows by lag; `weights[k, j, i]` is what step k makes of input i of step j."""
    count = len(scales)
    lags = torch.arange(count)[:, None] - torch.arange(count)[None, :]
    deepest = [int(lags[weights[:, :, i] != 0].max()) if weights[:, :, i].any() else 0 for i in range(3)]
    if max(deepest) > _MOST_HISTORY or deepest[2] > 0:
        raise UnsupportedError(
            f"{name}: a step looks back at {max(deepest)} earlier ones; at most {_MOST_HISTORY} are "
            "carried in the state. Use a scheduler such as DPMSolverMultistepScheduler"
        )

    def row(k: int, i: int) -> tuple[float, ...]:
        return tuple(float(weights[k, k - lag, i]) if lag <= k else 0.0 for lag in range(deepest[i] + 1))

    return tuple(Update(scales[k], row(k, 0), row(k, 1), float(weights[k, k, 2])) for k in range(count))
