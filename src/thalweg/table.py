"""Plain text tables and short numbers, for whatever prints itself."""

from __future__ import annotations

from collections.abc import Sequence


def align(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table in plain text: the first column to the left, the others to the right.

    Args:
        columns: the headings.
        rows: one list of cells per row, each as long as `columns`.

    Example:
        >>> print(align(["route", "bytes"], [["backprop", "12 kB"], ["spsa", "0"]]))
        route     bytes
        --------  -----
        backprop  12 kB
        spsa          0
    """
    lines = [list(columns), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )


def short(value: float | None, digits: int = 3) -> str:
    """Write a number in few characters; None is a dash.

    Example:
        >>> short(0.97312), short(None), short(1234567.0), short(0.0)
        ('0.973', '-', '1.23e+06', '0')
    """
    return "-" if value is None else f"{value:.{digits}g}"


def scaled(value: float | None, unit: str = "") -> str:
    """Write a count or a size with a decimal prefix; None is a dash.

    Example:
        >>> scaled(36864, "B"), scaled(0, "B"), scaled(2.5e9), scaled(None)
        ('36.9 kB', '0 B', '2.5 G', '-')
    """
    if value is None:
        return "-"
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()
