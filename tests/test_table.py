"""Text tables and short numbers."""

import pytest

from thalweg.table import align, scaled, short


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    lines = align(["a", "long heading"], [["first", "1"], ["x", "22"]]).splitlines()
    assert lines[1] == "-----  ------------"
    assert lines[2].endswith("1")
    assert lines[3].endswith("22")
    assert len(lines[2]) == len(lines[3]) == len(lines[1])


@pytest.mark.parametrize(
    ("value", "text"), [(999, "999 B"), (1000, "1 kB"), (-2.5e6, "-2.5 MB"), (3e12, "3 TB"), (0, "0 B")]
)
def test_sizes_take_decimal_prefixes(value: float, text: str) -> None:
    assert scaled(value, "B") == text


def test_a_missing_number_is_a_dash() -> None:
    assert short(None) == scaled(None, "B") == "-"
