"""A claim: one sentence that a run can confirm or refute, with the number that decided it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from thalweg.errors import ArgumentError, ArgumentTypeError


@dataclass(frozen=True, slots=True)
class Claim:
    """What a run says about one statement of a paper; recipes return these, never prose.

    Args:
        statement: one sentence with the criterion in it, for example "accuracy above 0.95".
        reported: the paper's number and where it stands, or that it could not be established; None where
            the statement is not a paper's.
        measured: our number; nan and infinity are kept, and can never make a claim hold.
        spread: standard deviation over seeds, at least 0, or None where there is one value only.
        holds: whether the criterion is met; None where this run decides nothing (only with `asserted=False`).
        asserted: True when the run as a whole fails with this claim, False when it is only reported.

    Raises:
        ArgumentError, ArgumentTypeError: an empty statement, a number or a truth value of another type, a
            claim that holds on a non-finite number, an asserted one without a verdict.

    Example:
        >>> claim = Claim("accuracy above 0.9", "0.98 (Table 2)", measured=0.95, spread=0.01, holds=True)
        >>> claim.verdict
        'holds'
    """

    statement: str
    reported: str | None
    measured: float | None
    spread: float | None = None
    holds: bool | None = None
    asserted: bool = True

    def __post_init__(self) -> None:
        for name in ("statement", "reported"):
            text = getattr(self, name)
            if text is None and name == "reported":
                continue
            if not isinstance(text, str):
                raise ArgumentTypeError(name, text, "a string")
            if not text.strip():
                raise ArgumentError(name, text, "a sentence")
        for name in ("measured", "spread"):
            number = getattr(self, name)
            if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
                raise ArgumentTypeError(name, number, "a number or None", "Call .item() on a tensor.")
        if self.spread is not None and self.spread < 0:
            raise ArgumentError("spread", self.spread, "a standard deviation of at least 0")
        if self.holds is not None and not isinstance(self.holds, bool):
            raise ArgumentTypeError("holds", self.holds, "True, False or None", "Wrap it: bool(...).")
        if not isinstance(self.asserted, bool):
            raise ArgumentTypeError("asserted", self.asserted, "True or False")
        if self.asserted and self.holds is None:
            raise ArgumentError("holds", None, "True or False, because the claim is asserted")
        if self.holds and (self.measured is None or not math.isfinite(self.measured)):
            raise ArgumentError("holds", True, "False or None, because `measured` is not a finite number")

    @property
    def verdict(self) -> str:
        """The outcome in words: "holds", "does not hold" or "only reported"."""
        if self.holds is None:
            return "only reported"
        return "holds" if self.holds else "does not hold"

    @property
    def failed(self) -> bool:
        """Whether this claim makes `--check` fail."""
        return self.asserted and not self.holds

    def to_dict(self) -> dict[str, Any]:
        """The six fields, as they stand in claims.json."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Claim:
        """A claim from its six fields, as `to_dict` gives them."""
        return cls(**{name: fields[name] for name in cls.__slots__})
