"""Files are whole or absent, and JSON loses no number."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.lab.files import from_json, read_json, to_json, write_bytes, write_json

WORDS = ("NaN", "Infinity", "-Infinity")
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text().filter(lambda t: t not in WORDS)
values = st.recursive(
    leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
)


@given(values)
def test_every_value_comes_back_bit_for_bit(value: object) -> None:
    text = json.dumps(to_json(value, "value"), allow_nan=False)
    # repr tells -0.0 from 0.0, 1 from 1.0 and True, and takes nan for equal to nan
    assert repr(from_json(json.loads(text))) == repr(value)


def test_numpy_doubles_are_numbers(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": np.float64(0.5), "y": np.float64("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 0.5, "y": "NaN"}
    assert math.isnan(read_json(tmp_path / "a.json")["y"])


@pytest.mark.parametrize("value", [torch.zeros(2), np.float32(1), np.zeros(2), {1: 2}, object(), {3}, b"x"])
def test_what_json_cannot_say_is_refused_by_name(value: object) -> None:
    with pytest.raises(ArgumentTypeError, match=r"row\['x'\]"):
        to_json({"x": value}, "row")


@pytest.mark.parametrize("word", WORDS)
def test_words_for_non_finite_numbers_are_refused(word: str) -> None:
    with pytest.raises(ArgumentError, match="as a float"):
        to_json([word], "row")


def test_paths_lose_their_folder() -> None:
    assert to_json(Path("/home/somebody/data"), "config") == "data"


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_bytes(path, b"old")

    def crash(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(path, b"new, and much longer")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    write_bytes(path, b"new")
    assert [found.name for found in tmp_path.iterdir()] == ["a.txt"]


def test_reading_what_is_not_json_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{half")
    with pytest.raises(ArgumentError, match=r"run\.json: expected a file of JSON"):
        read_json(tmp_path / "run.json")


def test_a_write_that_does_not_end_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_bytes(path, b"old")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
