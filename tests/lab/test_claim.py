"""Claims refuse to hold on nothing."""

from __future__ import annotations

from typing import Any

import pytest

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.lab import Claim

GOOD: dict[str, Any] = {"statement": "s", "reported": "r", "measured": 1.0, "holds": True}


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"statement": " "}, "statement"),
        ({"statement": 3}, "statement"),
        ({"reported": ""}, "reported"),
        ({"measured": "1"}, "measured"),
        ({"measured": True}, "measured"),
        ({"measured": float("nan")}, "holds"),
        ({"measured": float("inf")}, "holds"),
        ({"measured": None}, "holds"),
        ({"spread": -1.0}, "spread"),
        ({"holds": None}, "holds"),
        ({"holds": 1}, "holds"),
        ({"asserted": 0}, "asserted"),
    ],
)
def test_wrong_fields_are_named(change: dict[str, Any], argument: str) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError), match=f"^{argument}"):
        Claim(**(GOOD | change))


def test_only_asserted_claims_fail() -> None:
    assert not Claim(**GOOD).failed
    assert Claim(**(GOOD | {"holds": False})).failed
    assert not Claim(**(GOOD | {"holds": False, "asserted": False})).failed
    assert Claim(**(GOOD | {"measured": float("nan"), "holds": False})).verdict == "does not hold"
    assert Claim(**(GOOD | {"holds": None, "asserted": False})).verdict == "only reported"


def test_claims_pass_through_their_fields() -> None:
    claim = Claim(**GOOD, spread=0.5)
    assert Claim.from_dict(claim.to_dict()) == claim
    assert list(claim.to_dict()) == ["statement", "reported", "measured", "spread", "holds", "asserted"]
