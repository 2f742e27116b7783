"""A generative field: a network, the path it was trained on, and what it predicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from thalweg.errors import (
    ArgumentError,
    ArgumentTypeError,
    require_choice,
    require_floating,
    require_positive,
)
from thalweg.flows.path import Curve, Path, clock_times, over, require_path
from thalweg.flows.prediction import Affine, Kind, conversion, require_kind, require_regular

Network = Callable[..., Tensor]
Direction = Literal["data_at_0", "data_at_1"]


@dataclass(frozen=True, slots=True, eq=False)
class Field:
    """A network with the two facts without which its output means nothing: its path and what it predicts.

    Choose it to switch prediction, schedule, sampler or guidance without training again. A field is called
    as `field(x, t, **conditions)`; `predict` converts on the fly, `converted` and `on` return fields. All
    conversions are affine in the output and differentiable; transforms as in the network.

    Args:
        network: `network(x, t, **conditions)` with x of shape (batch, ...) and t of shape (batch,), in the
            dtype of x but at least float32; a module or any function.
        path: the noising path; t = 0 is data and t = 1 noise.
        predicts: "data", "noise", "score" (the gradient of log p_t), "velocity" (the slope dx/dt of the
            probability flow) or "v" (alpha noise - sigma data). A trained network's score is not certified to
            be the gradient of anything.
        direction: "data_at_1" for a network trained with time from noise to data, such as most of rectified
            flow: it is then told 1 - t, and its velocity is negated. Never guessed.
        clock: what the network is told of the time, a function of it; for example `lambda t: 999 * t`.
        coupled: whether the network was trained on noise that is not normal or not independent of the data,
            as after reflow or between two sets of data. Then "noise" means what was mixed in; the score, and
            samplers that add noise, are refused because no formula gives them.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Paper:
        Lai, Song, Kim, Mitsufuji, Ermon: The Principles of Diffusion Models. arXiv 2510.21890, 2025.

    Example:
        >>> from thalweg.flows import Straight
        >>> field = Field(lambda x, t: -x, Straight(), predicts="velocity")
        >>> field.predict("data", torch.ones(2, 3), 0.5)[0]
        tensor([1.5000, 1.5000, 1.5000])
    """

    network: Network
    path: Path
    predicts: Kind = "velocity"
    direction: Direction = "data_at_0"
    clock: Curve | None = None
    coupled: bool = False

    def __post_init__(self) -> None:
        if not callable(self.network) or isinstance(self.network, type):
            raise ArgumentTypeError("network", self.network, "a function network(x, t, **conditions)")
        require_path("path", self.path)
        require_kind("predicts", self.predicts)
        require_choice("direction", self.direction, ("data_at_0", "data_at_1"))
        if self.clock is not None and not callable(self.clock):
            raise ArgumentTypeError("clock", self.clock, "a function of time, or None")
        if not isinstance(self.coupled, bool):
            raise ArgumentTypeError("coupled", self.coupled, "a bool")
        self._refuse_score("predicts", self.predicts)

    def __call__(self, x: Tensor, t: Tensor | float, **conditions: Any) -> Tensor:
        """What the network says at x, of the kind `predicts`.

        Args:
            x: (batch, ...).
            t: times in [0, 1], (batch,) or one for all.
            conditions: handed to the network.

        Returns:
            A tensor shaped as x.
        """
        times = batched_times(x, t)
        if self.direction == "data_at_1":
            times = 1 - times
        output = self.network(x, times if self.clock is None else self.clock(times), **conditions)
        if not isinstance(output, Tensor) or output.shape != x.shape:
            raise ArgumentError(
                "network", output, f"a network whose output has the shape {tuple(x.shape)} of x"
            )
        if self.direction == "data_at_1" and self.predicts == "velocity":
            output = -output
        return output.to(x.dtype)

    def predict(self, kind: Kind, x: Tensor, t: Tensor | float, **conditions: Any) -> Tensor:
        """The prediction of another kind: the state's share plus the output's share.

        Raises:
            ArgumentError: a time at which it cannot be had, such as the noise at t = 0 from a prediction of
                data. On other devices than the CPU such times give infinities instead, without a wait.
        """
        require_kind("kind", kind)
        self._refuse_score("kind", kind)
        output = self(x, t, **conditions)
        if kind == self.predicts:
            return output
        return self._converted(kind, x, t, output)

    def converted(self, kind: Kind) -> Field:
        """The same field as one that predicts another kind."""
        require_kind("kind", kind)
        self._refuse_score("kind", kind)
        if kind == self.predicts:
            return self

        def network(x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
            return self.predict(kind, x, t, **conditions)

        return Field(joined(network, self), self.path, kind, coupled=self.coupled)

    def on(self, path: Path) -> Field:
        """The same field on another path: at equal signal-to-noise ratio the points differ by a factor alone.

        `field.on(VarianceExploding())` are the coordinates x / alpha, sigma / alpha of EDM, k-diffusion and
        AdjointDPM, in which an Euler step is a step of DDIM.

        Args:
            path: the path on which the new field lives; its ratio should lie within that of the old one.

        Example:
            >>> from thalweg.flows import Cosine, Straight
            >>> field = Field(lambda x, t: x, Cosine(), predicts="noise").on(Straight())
            >>> field.predicts, field(torch.ones(1, 2), 0.3).shape
            ('noise', torch.Size([1, 2]))
        """
        require_path("path", path)
        kind = self.predicts

        def network(x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
            there = path.coefficients(t)
            ratio = path.half_log_snr(t)
            times = self.path.time_at(ratio)
            here = self.path.coefficients(times)
            # whichever share is larger: neither end divides by zero
            scale = torch.where(ratio < 0, there.sigma / here.sigma, there.alpha / here.alpha)
            before = x / over(scale, x)
            output = self(before, times, **conditions)
            if kind in ("data", "noise"):
                return output
            if kind == "score":
                return output / over(scale, x)
            pair = [conversion(kind, part, here) for part in ("data", "noise")]
            shares = there[2:] if kind == "velocity" else (-there.sigma, there.alpha)
            found = Affine(
                sum(share * part.state for share, part in zip(shares, pair)),
                sum(share * part.output for share, part in zip(shares, pair)),
            )
            return _applied(require_regular(found, kind, kind, t), before, output)

        return Field(joined(network, self), path, kind, coupled=self.coupled)

    def with_network(self, network: Network) -> Field:
        """The field with another network in its place, as masked routes and averaged weights need it."""
        return replace(self, network=network)

    def _refuse_score(self, argument: str, kind: Kind) -> None:
        if self.coupled and kind == "score":
            mend = "Only independent normal noise gives the score: take it from the flow before the reflow."
            raise ArgumentError(argument, kind, "another prediction of a coupled field", mend)

    def _converted(self, kind: Kind, x: Tensor, t: Tensor | float, output: Tensor) -> Tensor:
        found = conversion(self.predicts, kind, self.path.coefficients(t))
        return _applied(require_regular(found, self.predicts, kind, t), x, output)


class JoinedNetwork(nn.Module):
    """A function of fields as one network: the modules of all of them are its own."""

    def __init__(self, function: Network, networks: tuple[Network, ...]) -> None:
        super().__init__()
        self.function = function
        # each module once and by one name, which is how masks and optimizers want to see it
        found: dict[nn.Module, None] = {}
        for network in networks:
            if isinstance(network, JoinedNetwork):
                found.update(dict.fromkeys(network.parts))
            elif isinstance(network, nn.Module):
                found[network] = None
        self.parts: nn.ModuleList = nn.ModuleList(found)

    def forward(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """Call the function."""
        return self.function(x, t, **conditions)


def joined(function: Network, *fields: Field) -> Network:
    """The function, as a module where one of the fields is of a module, so that its parameters are found."""
    networks = tuple(dict.fromkeys(field.network for field in fields))
    if not any(isinstance(network, nn.Module) for network in networks):
        return function
    return JoinedNetwork(function, networks)


def edm_preconditioned(network: Network, sigma_data: float = 0.5) -> Network:
    """Make a network of order 1 predict data well at every noise level, as EDM does.

    The result predicts "data" on a path with alpha = 1 whose `clock` hands it sigma:
    `Field(edm_preconditioned(net), VarianceExploding(80.0), "data", clock=lambda t: 80 * t)`.

    Args:
        network: `network(x, c, **conditions)`; it sees inputs of unit variance and c = log(sigma) / 4.
        sigma_data: the standard deviation of the data, above 0.

    Returns:
        A network of x, shape (batch, ...), and sigma, shape (batch,); a module if the network is one.

    Example:
        >>> network = edm_preconditioned(lambda x, c: torch.zeros_like(x), sigma_data=1.0)
        >>> network(torch.ones(1, 2), torch.ones(1))
        tensor([[0.5000, 0.5000]])
    """
    if not callable(network):
        raise ArgumentTypeError("network", network, "a function network(x, c, **conditions)")
    require_positive("sigma_data", sigma_data)

    def preconditioned(x: Tensor, sigma: Tensor, **conditions: Any) -> Tensor:
        spread = sigma**2 + sigma_data**2
        seen = x * over(spread.rsqrt(), x)
        skip, out = sigma_data**2 / spread, sigma * sigma_data * spread.rsqrt()
        return over(skip, x) * x + over(out, x) * network(seen, sigma.log() / 4, **conditions)

    return JoinedNetwork(preconditioned, (network,)) if isinstance(network, nn.Module) else preconditioned


def batched_times(x: Tensor, t: Tensor | float) -> Tensor:
    """One time per example, (batch,), in the dtype of x, or in float32 where that is coarser."""
    if require_floating("x", x).ndim == 0:
        raise ArgumentError("x", x, "a batch of states, shape (batch, ...)")
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not isinstance(t, Tensor):
        if not (isinstance(t, float) and 0 <= t <= 1):
            clock_times(t)  # says what is wrong, or that it is an integer
        return x.new_full((len(x),), t, dtype=dtype)
    if t.ndim == 0:
        return t.to(x.device, dtype).expand(len(x))
    if t.shape != (len(x),):
        raise ArgumentError("t", t, f"one time, or {len(x)} of them, shape ({len(x)},)")
    return t.to(x.device, dtype)


def _applied(affine: Affine, x: Tensor, output: Tensor) -> Tensor:
    if isinstance(affine.state, float) and affine.state == 0:
        return over(torch.as_tensor(affine.output), x) * output
    return over(torch.as_tensor(affine.state), x) * x + over(torch.as_tensor(affine.output), x) * output
