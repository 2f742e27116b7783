"""A budget of evaluations that stops any rule, optimizer or loop."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

from thalweg.errors import ArgumentTypeError, require_integer

T = TypeVar("T")


class BudgetSpent(Exception):
    """The signal that a closure was asked for one evaluation more than its budget allows."""


class Budget:
    """Count the calls of a closure and stop before the first one too many.

    Choose it to compare methods at equal evaluations, whatever each spends per step. The call that would
    exceed the budget raises `BudgetSpent` in the middle of a step: the rule gives parameters and buffers back
    as they were, no `.grad` is filled, and a `with` block around the loop ends quietly there.

    Args:
        evaluations: how many calls are allowed, at least 1.

    Raises:
        ArgumentError, ArgumentTypeError: a number out of range.

    Example:
        >>> import torch
        >>> from thalweg.blackbox.spsa import SPSA
        >>> from thalweg.step import backward
        >>> weight = torch.tensor([3.0], requires_grad=True)
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> with Budget(evaluations=101) as budget:
        ...     closure = budget.counted(lambda: (weight**2).sum())
        ...     while True:
        ...         optimizer.zero_grad()
        ...         loss = backward(closure, [weight], gradient=SPSA())
        ...         optimizer.step()
        >>> budget.spent, budget.left, bool(weight.detach().abs() < 1e-3)
        (101, 0, True)
    """

    def __init__(self, evaluations: int) -> None:
        require_integer("evaluations", evaluations, 1)
        self.evaluations = evaluations
        self.spent = 0

    def __repr__(self) -> str:
        return f"Budget(evaluations={self.evaluations}, spent={self.spent})"

    @property
    def left(self) -> int:
        """How many calls are still allowed."""
        return self.evaluations - self.spent

    def counted(self, closure: Callable[[], T]) -> Callable[[], T]:
        """A closure that does the same and counts; several closures may share one budget.

        Raises:
            ArgumentTypeError: not a function.
        """
        if not callable(closure):
            raise ArgumentTypeError("closure", closure, "a function without arguments")

        def call() -> T:
            if self.spent >= self.evaluations:
                raise BudgetSpent(f"all {self.evaluations} evaluations are spent")
            self.spent += 1
            return closure()

        return call

    def __enter__(self) -> Budget:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        return kind is not None and issubclass(kind, BudgetSpent) and self.left == 0
