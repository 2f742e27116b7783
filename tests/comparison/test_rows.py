"""Rows and the table they make."""

import json
from dataclasses import fields

from thalweg.comparison.rows import Comparison, Row

REQUIRED = [
    "route",
    "network",
    "reference",
    "accuracy",
    "accuracy_sd",
    "cosine",
    "cosine_by_layer",
    "norm_ratio",
    "bias",
    "bias_se",
    "variance",
    "needs",
    "evaluations",
    "operations",
    "saved_bytes",
    "peak_bytes",
    "ms_per_step",
]


def table() -> Comparison:
    exact = Row(
        "exact", "net", accuracy=0.5, accuracy_sd=0.01, cosine=1.0, bias=0.0, bias_se=0.0, saved_bytes=2048
    )
    odd = Row(
        "odd", "net", cosine=float("nan"), cosine_by_layer={"a": float("inf")}, bias=0.25, bias_se=0.125
    )
    return Comparison("task", "exact wins", (exact, odd, Row("refused", "net", note="refused: no")))


def test_a_row_has_every_promised_field_in_order() -> None:
    assert [field.name for field in fields(Row)][: len(REQUIRED)] == REQUIRED


def test_json_has_null_where_a_route_has_no_number_and_never_nan() -> None:
    rows = json.loads(json.dumps(table().to_dict(), allow_nan=False))["rows"]
    assert rows[0]["norm_ratio"] is None
    assert rows[1]["cosine"] is None
    assert rows[1]["cosine_by_layer"] == {"a": None}


def test_the_first_line_is_the_verdict_and_empty_columns_are_left_out() -> None:
    lines = str(table()).splitlines()
    assert lines[0] == "exact wins"
    assert "operations" not in lines[2]
    assert "network" not in lines[2]
    assert "2.05 kB" in str(table())
    assert "+0.250 ± 0.125" in str(table())
    assert lines[-1] == "refused: refused: no"


def test_an_exact_route_has_bias_zero_not_plus_minus() -> None:
    assert table().rows[0].cells()["bias ± se"] == "0"
