"""Fashion-MNIST, read from a Debian package, packed or installed; this module never downloads anything."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from thalweg.data.archive import data_folder, deb_members, require_contents
from thalweg.data.classification import Classification
from thalweg.data.mnist import read_idx
from thalweg.errors import ArgumentError

INSTALLED = Path("/usr/share/datasets/fashion-mnist")
PACKAGES = "dataset-fashion-mnist_*.deb"
# the first 16 hexadecimal digits of the sha256 over the bytes of each array, header left out
HASHES: Mapping[str, str] = MappingProxyType(
    {
        "train-images-idx3-ubyte": "2e487a6c89124f78",
        "train-labels-idx1-ubyte": "657fbd221bfc9f41",
        "t10k-images-idx3-ubyte": "c867c93ff9536059",
        "t10k-labels-idx1-ubyte": "3d0e6c6ea990b53b",
    }
)
_MEND = (
    "Run `apt-get install dataset-fashion-mnist`; or `apt-get download dataset-fashion-mnist` (it writes one "
    "file and runs nothing), and set THALWEG_DATA or data_dir to the folder it lies in."
)


def fashion_mnist(
    data_dir: str | Path | None = None, *, hashes: Mapping[str, str] = HASHES
) -> Classification:
    """Load 70 000 articles of clothing of 28x28 pixels; choose it when MNIST is too easy to tell rules apart.

    Args:
        data_dir: the folder that holds the Debian package dataset-fashion-mnist, or what is in it (the four
            idx files, gzipped or plain, there or in `fashion-mnist/`). None reads the folder from the
            environment variable THALWEG_DATA, and without it looks where the installed package lies.
        hashes: what the arrays of the four files have to hash to; only tests give another.

    Returns:
        Inputs of shape (examples, 784) in [0, 1], ten classes: 60 000 for training, 10 000 for testing.

    Raises:
        ArgumentError: no folder given or found, no package in it, a file that is not idx, or other contents
            than expected.

    Paper:
        Xiao, Rasul, Vollgraf: Fashion-MNIST. arXiv 1708.07747. The data are under the MIT licence.
    """
    folder = data_folder(data_dir, _MEND, otherwise=INSTALLED)
    contents = _read(folder, tuple(hashes))
    arrays: dict[str, Tensor] = {}
    for name, expected in hashes.items():
        arrays[name] = read_idx(contents[name], name)
        require_contents(name, arrays[name].numpy().tobytes(), expected, _MEND)

    def part(name: str) -> tuple[Tensor, Tensor]:
        images, labels = arrays[f"{name}-images-idx3-ubyte"], arrays[f"{name}-labels-idx1-ubyte"]
        return images.flatten(1).to(torch.float32) / 255, labels.to(torch.int64)

    return Classification(*part("train"), *part("t10k"), classes=10, name="Fashion-MNIST")


def _read(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    inside = INSTALLED.relative_to("/")
    for unpacked in (folder / "fashion-mnist", folder / inside, folder):
        for ending in (".gz", ""):
            if (unpacked / f"{names[0]}{ending}").is_file():
                return {name: _plain(name, _file(unpacked / f"{name}{ending}")) for name in names}
    packages = sorted([*folder.glob(PACKAGES), *folder.glob("dataset-fashion-mnist.deb")])
    if not packages:
        raise ArgumentError("data_dir", str(folder), f"a folder with {PACKAGES}", _MEND)
    members = {name: f"{inside.as_posix()}/{name}.gz" for name in names}
    found = deb_members(packages[-1], members.values(), _MEND)
    return {name: _plain(name, found[member]) for name, member in members.items()}


def _file(path: Path) -> bytes:
    if not path.is_file():
        raise ArgumentError("data_dir", str(path.parent), f"a folder with {path.name}", _MEND)
    return path.read_bytes()


def _plain(name: str, content: bytes) -> bytes:
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ArgumentError(name, str(error), "a whole gzip file", _MEND) from None
