"""What a run hands in: metrics, tables, figures, weights, claims and documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.lab.arguments import require_name
from thalweg.lab.cells import Page, file_hash
from thalweg.lab.claim import Claim
from thalweg.lab.encoding import figure_bytes, tensor_bytes
from thalweg.lab.files import to_json, write_bytes, write_json


class Handed:
    """The part of a `Lab` that takes in results, for the cell in hand or for the run.

    Args:
        out: the folder of the run.
        name: of the run.
    """

    def __init__(self, out: Path, name: str) -> None:
        self.out = out
        self.name = name
        self._entered = False
        self._run = Page()
        self._in_cell: tuple[str, int, Page] | None = None
        self._claims: list[Claim] = []
        self._documents: list[str] = []

    def log(self, **metrics: object) -> None:
        """Add one row to metrics.jsonl; inside a cell the row carries the cell's name and seed.

        Args:
            metrics: JSON values, for example `step=10, loss=0.3`; times belong under `timing={...}`, because
                everything else has to come out the same when the run is repeated.
        """
        page = self._page()
        where: dict[str, Any] = {}
        if self._in_cell is not None:
            where = {"cell": self._in_cell[0], "seed": self._in_cell[1]}
        for taken in where:
            if taken in metrics:
                raise ArgumentError(taken, metrics[taken], "another name: the row has the cell's")
        page.metrics.append(where | to_json(metrics, "metrics"))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add a table to the page of the run.

        Args:
            title: one line above it.
            columns: headings.
            rows: JSON values, as many in each row as there are columns; None is shown as empty.
        """
        page = self._page()
        for index, row in enumerate(rows):
            if len(row) != len(columns):
                raise ArgumentError(f"rows[{index}]", row, f"{len(columns)} values, one for each column")
        page.tables.append(
            {"title": title, "columns": to_json(columns, "columns"), "rows": to_json(rows, "rows")}
        )

    def figure(self, name: str, figure: Any, caption: str = "") -> None:
        """Save a matplotlib figure as figures/NAME.png, to be shown on the page of the run.

        Args:
            name: letters, digits, "_", "-" and ".".
            figure: a `matplotlib.figure.Figure`; it is neither changed nor closed.
            caption: a sentence below it: what to see.
        """
        self._require_open()
        require_name("name", name)
        self._keep("figures", f"{name}.png", figure_bytes(figure), {"name": name, "caption": caption})

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Save tensors as weights/NAME.safetensors.

        Args:
            name: letters, digits, "_", "-" and ".".
            tensors: for example `model.state_dict()`; tied weights are written once for each name.

        Raises:
            MissingExtraError: safetensors is not installed.
        """
        self._require_open()
        require_name("name", name)
        self._keep("weights", f"{name}.safetensors", tensor_bytes(tensors), {"name": name})

    def claims(self, claims: Sequence[Claim]) -> None:
        """Hand in the claims of the run, once, in the order in which they shall be read."""
        self._require_open()
        for index, claim in enumerate(claims):
            if not isinstance(claim, Claim):
                raise ArgumentTypeError(f"claims[{index}]", claim, "a thalweg.lab.Claim")
        self._claims = list(claims)

    def document(self, name: str, value: object) -> None:
        """Write one more JSON file beside the others, atomically and at once.

        Args:
            name: the file's name without ".json"; not one of those that the run writes itself.
            value: JSON values.
        """
        self._require_open()
        require_name("name", name)
        if name in ("run", "claims", "config", "metrics"):
            raise ArgumentError("name", name, "a name that the run does not use itself")
        write_json(self.out / f"{name}.json", value)
        if name not in self._documents:
            self._documents.append(name)

    def _keep(
        self, kind: Literal["figures", "weights"], file: str, content: bytes, entry: dict[str, str]
    ) -> None:
        pages = [self._run, self._page()]
        path = f"{kind}/{file}"
        if any(other["file"] == path for page in pages for other in getattr(page, kind)):
            raise ArgumentError("name", entry["name"], f"a name that none of the run's {kind} has had")
        write_bytes(self.out / path, content)
        found = {**entry, "file": path, "sha256": file_hash(self.out / path)}
        getattr(self._page(), kind).append(found)

    def _page(self) -> Page:
        self._require_open()
        return self._run if self._in_cell is None else self._in_cell[2]

    def _require_open(self) -> None:
        if not self._entered:
            raise ArgumentError("lab", self.name, "a run that has begun", "Write `with Lab(...) as lab:`.")
