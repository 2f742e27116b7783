"""Solving u = v + A u by products with A alone: the adjoint equation of an equilibrium."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from thalweg.equilibria.convergence import Found, iterate, settled
from thalweg.equilibria.state import State, joined, moved, parted, without_data

SOLVERS = ("neumann", "anderson", "gmres")
Map = Callable[[State], State]


def solve(solver: str, product: Map, right: State, tolerance: float, max_steps: int, what: str) -> Found:
    """Solve u = v + A u.

    Args:
        solver: "neumann", "anderson" or "gmres"; see `thalweg.equilibria.Implicit`.
        product: u -> A u.
        right: v.
        tolerance: as for `iterate`.
        max_steps: products with A, at most.
        what: for messages.
    """

    def step(state: State) -> State:
        return tuple(v + p for v, p in zip(right, product(state)))

    if solver == "neumann":
        return iterate(step, right, tolerance, max_steps, what)
    if solver == "anderson":
        return anderson(step, right, tolerance, max_steps, what)
    return _gmres(step, product, right, tolerance, max_steps, what)


def anderson(
    step: Map, state: State, tolerance: float | None, max_steps: int, what: str, depth: int = 5
) -> Found:
    """Iterate with Anderson's mixing: the step of the combination of earlier ones that would move least.

    Each example has a combination of its own.

    Args:
        depth: how many earlier steps are combined.

    Paper:
        Anderson: Iterative procedures for nonlinear integral equations. Journal of the ACM 12, 1965.
    """
    values = joined(state)
    before: deque[tuple[Tensor, Tensor]] = deque(maxlen=depth + 1)  # images and their residuals
    residual = None
    for count in range(1, max_steps + 1):
        now = parted(values, state)
        following = step(now)
        if tolerance is not None:
            residual = moved(now, following)
            if settled(residual, tolerance, what, count):
                return Found(following, count, residual, True)
        image = joined(following)
        before.append((image, image - values))
        values = _mixed(list(before))
        last = following
    return Found(last, max_steps, residual, tolerance is None or without_data(state))


def _mixed(before: list[tuple[Tensor, Tensor]]) -> Tensor:
    image, gap = before[-1]
    if len(before) == 1:
        return image
    images = torch.stack([image - earlier for earlier, _ in before[:-1]], 1)  # (examples, depth, values)
    gaps = torch.stack([gap - earlier for _, earlier in before[:-1]], 1)
    # scaled to unit length, the differences of a nearly settled state keep their digits
    length = torch.linalg.vector_norm(gaps, dim=2, keepdim=True).clamp(min=torch.finfo(gap.dtype).tiny)
    unit = gaps / length
    gram = unit @ unit.mT
    ridge = 10 * torch.finfo(gap.dtype).eps * torch.eye(len(before) - 1, dtype=gap.dtype, device=gap.device)
    weights = torch.linalg.solve(gram + ridge, unit @ gap.unsqueeze(2))
    mixed: Tensor = image - ((images / length).mT @ weights).squeeze(2)
    return mixed


def _gmres(
    step: Map, product: Map, right: State, tolerance: float, max_steps: int, what: str, restart: int = 20
) -> Found:
    """Restarted GMRES on (1 - A) u = v, all examples in one Krylov space.

    Paper:
        Saad, Schultz: GMRES. SIAM Journal on Scientific and Statistical Computing 7, 1986.
    """
    state, count = right, 0
    if without_data(right):
        # nothing can be decided: a little more than one whole cycle
        space = [product(right) for _ in range(min(restart, max_steps) + 1)]
        return Found(space[-1], len(space), None, True)
    while True:
        following = step(state)
        count += 1
        residual = moved(state, following)
        if settled(residual, tolerance, what, count):
            return Found(state, count, residual, True)
        if count >= max_steps:
            return Found(state, count, residual, False)
        width = min(restart, max_steps - count)
        gap = tuple(b - a for a, b in zip(state, following))
        correction, used = _cycle(product, gap, width, tolerance)
        count += used
        state = tuple(a + c for a, c in zip(state, correction))


def _cycle(product: Map, gap: State, width: int, target: float) -> tuple[State, int]:
    """One Arnoldi cycle: the correction in the Krylov space of the gap, and the products it took."""
    start = joined(gap).reshape(-1)
    length = torch.linalg.vector_norm(start)
    rows = len(joined(gap))
    basis = [start / length]
    rounding = torch.finfo(start.dtype).eps
    hessenberg = start.new_zeros(width + 1, width)
    used = 0
    for k in range(width):
        used += 1
        image = basis[k] - joined(product(parted(basis[k].reshape(rows, -1), gap))).reshape(-1)
        size = float(torch.linalg.vector_norm(image))
        for _ in range(2):  # once more, for the digits that the first pass loses
            for j, vector in enumerate(basis):
                share = vector @ image
                hessenberg[j, k] += share
                image = image - share * vector
        hessenberg[k + 1, k] = torch.linalg.vector_norm(image)
        small = hessenberg[: k + 2, : k + 1]
        first = start.new_zeros(k + 2, 1)
        first[0] = length
        weights = torch.linalg.lstsq(small, first).solution
        left = float(torch.linalg.vector_norm(first - small @ weights))
        # a tenth, and no more than rounding lets it reach; the true residual decides, after the cycle
        if left <= max(0.1 * target, 4 * rounding * float(length)) or float(hessenberg[k + 1, k]) <= (
            4 * rounding * size
        ):
            break
        basis.append(image / hessenberg[k + 1, k])
    combined = sum(weight * vector for weight, vector in zip(weights[:, 0], basis))
    assert isinstance(combined, Tensor)
    return parted(combined.reshape(rows, -1), gap), used
