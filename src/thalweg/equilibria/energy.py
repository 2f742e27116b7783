"""Energy networks: layers that settle together, as an ordinary layer or under a learner of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from thalweg.equilibria.activations import scaled_sigmoid
from thalweg.equilibria.convergence import Found, Status, iterate
from thalweg.equilibria.links import require_links
from thalweg.equilibria.minimize import Policy, minimized
from thalweg.equilibria.nudged import Number
from thalweg.equilibria.relaxation import Activation, Descent, Relaxation, relax_once, require_relaxation
from thalweg.equilibria.state import State
from thalweg.errors import ArgumentError, require_floating
from thalweg.noise import Key

Pull = Callable[[State, int], Tensor | None]


class EnergyNetwork(nn.Module):
    """Layers s_1 ... s_L above a fixed input s_0; the energy is [|s|^2 / 2] - sum_l <s_l, link_l(s_{l-1})>.

    Make one with `hopfield`, `convergent` or `even_odd`. Called, it is a layer like any other: it relaxes and
    hands out the output layer at rest, differentiated by the policy of your choice. Train it with a loss of
    yours behind it, or with `EquilibriumPropagation` or `CoupledLearning`, which nudge by the cost itself.

    Args:
        links: modules, link l from layer l - 1 to l; the first sees the input. In a holomorphic network each
            is holomorphic. Dropout and batch norm have no place in an energy.
        relaxation: the dynamics.
        leak: whether the energy has the units' own term, which `Activation` stands for.
        input_shape: of one input; None where the first link is a `torch.nn.Linear`.

    Paper:
        Scellier, Bengio: Equilibrium Propagation. Frontiers in Computational Neuroscience 2017,
        arXiv 1602.05179.

    Example:
        >>> from thalweg.equilibria import Implicit, dense_links
        >>> network = convergent(dense_links([4, 8, 3]))
        >>> output = network(torch.rand(5, 4), gradient=Implicit())
        >>> output.sum().backward()
        >>> output.shape, network.links[0].weight.grad.shape
        (torch.Size([5, 3]), torch.Size([8, 4]))
    """

    def __init__(
        self,
        links: Sequence[nn.Module],
        relaxation: Relaxation,
        *,
        leak: bool,
        input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        modules, self.shapes = require_links(links, input_shape)
        require_relaxation(relaxation, len(modules))
        self.links = nn.ModuleList(modules)
        self.relaxation = relaxation
        self.leak = leak

    def zeros(self, inputs: Tensor) -> State:
        """The state in which all units are 0, for inputs of shape (batch, ...)."""
        require_floating("inputs", inputs)
        return tuple(inputs.new_zeros(len(inputs), *shape) for shape in self.shapes)

    def energy(self, inputs: Tensor, states: State) -> Tensor:
        """The energy of each example, shape (batch,), differentiable in everything."""
        below = (inputs, *states[:-1])
        total: Tensor | None = None
        for link, state, under in zip(self.links, states, below):
            term = -(state * link(under)).flatten(1).sum(1)
            if self.leak:
                term = term + 0.5 * (state * state).flatten(1).sum(1)
            total = term if total is None else total + term
        assert total is not None
        return total

    def drive(self, inputs: Tensor) -> Tensor:
        """What the input says to the first layer, the same throughout a relaxation."""
        driven: Tensor = self.links[0](inputs)
        return driven

    def forces(self, drive: Tensor, states: State, which: Sequence[int]) -> list[Tensor]:
        """Minus the derivative of the energy by some layers, written out: no graph of the energy is made.

        Args:
            drive: `drive(inputs)`.
            states: all layers.
            which: the layers asked for, from 0.
        """
        wanted = set(which)
        found: dict[int, Tensor] = {0: drive} if 0 in wanted else {}
        for index in range(1, len(states)):
            up, down = index in wanted, index - 1 in wanted
            if up or down:
                forward, back = _both_ways(
                    self.links[index], states[index - 1], states[index] if down else None, up
                )
                if forward is not None:
                    found[index] = found[index] + forward if index in found else forward
                if back is not None:
                    found[index - 1] = found[index - 1] + back
        return [found[index] - states[index] if self.leak else found[index] for index in which]

    def relax(
        self,
        drive: Tensor,
        states: State,
        steps: int,
        *,
        tolerance: float | None = None,
        pull: Pull | None = None,
        slow: Number | None = None,
        free: Sequence[int] | None = None,
        what: str = "EnergyNetwork",
    ) -> Found:
        """Relax, leaving no graph.

        Args:
            drive: `drive(inputs)`.
            states: where to start.
            steps: how many at most; exactly, without a tolerance.
            tolerance: as in `minimize`, or None.
            pull: `pull(states, index)` returns a force on a layer besides the energy's, or None.
            slow: what divides the force on the output layer, or None.
            free: the layers that move; None for all.
            what: for messages.
        """
        last = len(states) - 1

        def forces(state: State, which: Sequence[int]) -> list[Tensor]:
            found = self.forces(drive, state, which)
            for place, index in enumerate(which):
                extra = pull(state, index) if pull is not None else None
                if extra is not None:
                    found[place] = found[place] + extra
                if index == last and slow is not None:
                    found[place] = found[place] / slow
            return found

        with torch.no_grad():
            return iterate(
                lambda s: relax_once(self.relaxation, forces, s, free), states, tolerance, steps, what
            )

    def forward(
        self,
        inputs: Tensor,
        *,
        gradient: Policy | None = None,
        states: State | None = None,
        tolerance: float | None = 1e-5,
        max_steps: int = 500,
        strict: bool = True,
        status: Status | None = None,
        key: Key | None = None,
    ) -> Tensor:
        """The output layer at rest, shape (batch, ...).

        Args:
            inputs: of shape (batch, ...).
            gradient: `Implicit()` (the default), `Nudged(...)`, `Backprop()` or `OneStep()`.
            states: where to start; None for zeros.
            tolerance, max_steps, strict, status, key: as in `thalweg.equilibria.minimize`.
        """
        start = self.zeros(inputs) if states is None else tuple(states)
        if len(start) != len(self.links):
            raise ArgumentError("states", f"{len(start)} layers", f"{len(self.links)} of them")
        settling = _Settling(self, inputs)
        found = minimized(
            settling,
            start,
            self.relaxation,
            gradient=gradient,
            tolerance=tolerance,
            max_steps=max_steps,
            strict=strict,
            status=status,
            key=key,
        )
        settling.forget()
        return found[-1]


class _Settling:
    """A network's energy for fixed inputs, whose word to the first layer is said once."""

    def __init__(self, network: EnergyNetwork, inputs: Tensor) -> None:
        self._network = network
        self._inputs = inputs
        self._drives: dict[bool, Tensor] = {}

    def energies(self, state: State) -> Tensor:
        return self._network.energy(self._inputs, state)

    def forces(self, state: State, which: Sequence[int], graph: bool) -> list[Tensor]:
        with torch.set_grad_enabled(graph):
            if graph not in self._drives:
                self._drives[graph] = self._network.drive(self._inputs)
            return self._network.forces(self._drives[graph], state, which)

    def forget(self) -> None:
        """A backward says it again, so that nothing is kept for it."""
        self._drives.clear()


def _both_ways(
    link: nn.Module, below: Tensor, above: Tensor | None, up: bool
) -> tuple[Tensor | None, Tensor | None]:
    """What a link says to the layer above, and its transpose to the layer below."""
    if isinstance(link, nn.Linear):
        back = None if above is None else torch.matmul(above, link.weight)
        return (link(below) if up else None), back
    if above is None:
        return link(below), None
    graph = torch.is_grad_enabled()
    leaf = below if graph and below.requires_grad else below.detach().requires_grad_()
    with torch.enable_grad():
        forward = link(leaf)
        (back,) = torch.autograd.grad(forward, leaf, above.conj(), create_graph=graph)
    return (forward if graph else forward.detach()) if up else None, back.conj()


def hopfield(
    links: Sequence[nn.Module], *, rate: float = 0.5, input_shape: Sequence[int] | None = None
) -> EnergyNetwork:
    """The original paper's network: units clipped to [0, 1], gradient descent on the Hopfield energy.

    A unit stuck at a bound has no derivative, while a nudge of finite strength can still pull it off: give
    exact policies a network with a linear or sigmoid output (`even_odd`, `convergent`).

    Args:
        links: for example `dense_links([784, 500, 10])`.
        rate: step size of the relaxation.
        input_shape: as in `EnergyNetwork`.

    Example:
        >>> from thalweg.equilibria import dense_links
        >>> hopfield(dense_links([784, 500, 10])).shapes
        [(500,), (10,)]
    """
    return EnergyNetwork(links, Descent(rate, 0.0, 1.0), leak=True, input_shape=input_shape)


def convergent(
    links: Sequence[nn.Module],
    *,
    activation: Callable[[Tensor], Tensor] = scaled_sigmoid,
    input_shape: Sequence[int] | None = None,
) -> EnergyNetwork:
    """A convergent recurrent network: each step sets all layers to the activation of what they are told.

    Args:
        links: `dense_links(...)` or `conv_links(...)`.
        activation: `scaled_sigmoid` for dense links; `half_clip`, or the holomorphic `smooth_clip`, for
            convolutions.
        input_shape: as in `EnergyNetwork`.

    Paper:
        Ernoult and others: Updates of Equilibrium Prop Match Gradients of Backprop Through Time in an RNN
        with Static Input. NeurIPS 2019, arXiv 1905.13633.

    Example:
        >>> from thalweg.equilibria import dense_links
        >>> convergent(dense_links([64, 128, 10])).leak
        False
    """
    return EnergyNetwork(links, Activation(activation), leak=False, input_shape=input_shape)


def even_odd(links: Sequence[nn.Module], *, input_shape: Sequence[int] | None = None) -> EnergyNetwork:
    """The fast simulation: a Hopfield network whose even, then odd layers jump to their exact minimum.

    Hidden units are clipped to [0, 1], the output is linear. A few steps do what a descent needs tens for.

    Args:
        links: `dense_links(..., gain=0.5)` or `conv_links(..., gain=0.5)`.
        input_shape: as in `EnergyNetwork`.

    Paper:
        Scellier and others: Energy-based learning algorithms for analog computing: a comparative study.
        NeurIPS 2023, arXiv 2312.15103.

    Example:
        >>> from thalweg.equilibria import dense_links
        >>> even_odd(dense_links([64, 128, 10], gain=0.5)).relaxation.order
        'even-odd'
    """
    hidden = len(links) - 1
    relaxation = Descent(1.0, (*[0.0] * hidden, None), (*[1.0] * hidden, None), "even-odd")
    return EnergyNetwork(links, relaxation, leak=True, input_shape=input_shape)
