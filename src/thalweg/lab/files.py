"""Files that are whole or absent: atomic writing, and JSON in which no number is silently lost."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path, PurePath
from typing import Any

from thalweg.errors import ArgumentError, ArgumentTypeError

# JSON has no word for them; these are the strings that protobuf's JSON mapping uses
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old content or the new one, never a part.

    Args:
        path: where to; its folder is made when missing.
        content: everything that the file shall hold.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_bytes(Path(folder, "a", "b.txt"), b"whole")
        ...     [found.name for found in Path(folder, "a").iterdir()]
        ['b.txt']
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # a fixed name in the same folder: a killed writer leaves at most one, and the next writer takes it over
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON, atomically; see `to_json` for what may be in it."""
    text = json.dumps(to_json(value, path.stem), indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, f"{text}\n".encode())


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote; nan and infinity come back as numbers.

    Raises:
        ArgumentError: the file is not JSON.
    """
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArgumentError(path.name, str(error), "a file of JSON") from None


def to_json(value: object, argument: str) -> Any:
    """Turn a value into what JSON can say, exactly; nan and infinity become the strings of protobuf's JSON.

    Args:
        value: None, truth values, numbers, strings, and lists, tuples and mappings with string keys of these.
            A path becomes its last part, so that no file names the machine it was written on; a dataclass
            (a policy such as `SPSA()`) becomes its `repr`.
        argument: the name used in the error messages.

    Raises:
        ArgumentTypeError: anything else, tensors among them.
        ArgumentError: a string that is one of the three words for a non-finite number.

    Example:
        >>> to_json({"loss": float("nan"), "steps": (1, 2)}, "row")
        {'loss': 'NaN', 'steps': [1, 2]}
    """
    if isinstance(value, str):
        if value in _NON_FINITE:
            raise ArgumentError(argument, value, "another string", "Give the number itself, as a float.")
        return value
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        # float(): numpy's float64 is a float whose repr is not JSON
        return float(value) if math.isfinite(value) else _word(value)
    if isinstance(value, PurePath):
        return value.name
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ArgumentTypeError(f"{argument}: key", key, "a string, which is all JSON has for a key")
        return {str(key): to_json(each, f"{argument}[{key!r}]") for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [to_json(each, f"{argument}[{index}]") for index, each in enumerate(value)]
    if is_dataclass(value) and not isinstance(value, type):
        return repr(value)
    mend = "Call .tolist() on it." if hasattr(value, "tolist") else ""
    raise ArgumentTypeError(
        argument, value, "None, a truth value, number, string, list or mapping of these", mend
    )


def from_json(value: Any) -> Any:
    """Undo `to_json`: the three words become the numbers they stand for."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, list):
        return [from_json(each) for each in value]
    if isinstance(value, dict):
        return {key: from_json(each) for key, each in value.items()}
    return value


def _word(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"
