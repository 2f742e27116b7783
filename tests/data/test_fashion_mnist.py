"""The reader of Fashion-MNIST, on small packages made here; the real one where THALWEG_DATA holds it."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import struct
import tarfile
from pathlib import Path

import pytest
import torch

from thalweg.data import fashion_mnist
from thalweg.data.fashion_mnist import PACKAGES
from thalweg.errors import ArgumentError

INSIDE = "usr/share/datasets/fashion-mnist"
DEB = "dataset-fashion-mnist_0_all.deb"


def idx(values: torch.Tensor) -> bytes:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.numpy().tobytes()


@pytest.fixture
def files() -> dict[str, bytes]:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for part, count in (("train", 5), ("t10k", 3)):
        images = torch.randint(256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        labels = torch.randint(10, (count,), generator=generator, dtype=torch.uint8)
        made |= {f"{part}-images-idx3-ubyte": idx(images), f"{part}-labels-idx1-ubyte": idx(labels)}
    return made


def hashes(files: dict[str, bytes]) -> dict[str, str]:
    headers = {name: 4 + 4 * content[3] for name, content in files.items()}
    return {name: hashlib.sha256(files[name][skip:]).hexdigest()[:16] for name, skip in headers.items()}


def tar(members: dict[str, bytes]) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w:xz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(f"./{INSIDE}/{name}.gz")
            compressed = gzip.compress(content)
            entry.size = len(compressed)
            archive.addfile(entry, io.BytesIO(compressed))
    return written.getvalue()


def deb(members: dict[str, bytes]) -> bytes:
    entries = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": tar(members)}
    packed = b"!<arch>\n"
    for name, content in entries.items():
        packed += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        packed += b"\n" * (len(content) % 2)
    return packed


def unpack(folder: Path, files: dict[str, bytes], ending: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}{ending}").write_bytes(gzip.compress(content) if ending else content)


@pytest.mark.parametrize("where", ["package", INSIDE, "fashion-mnist", "plain"])
def test_packed_and_unpacked_read_the_same(tmp_path: Path, files: dict[str, bytes], where: str) -> None:
    if where == "package":
        (tmp_path / DEB).write_bytes(deb(files))
    elif where == "plain":
        unpack(tmp_path, files, "")
    else:
        unpack(tmp_path / where, files, ".gz")
    data = fashion_mnist(tmp_path, hashes=hashes(files))
    assert data.name == "Fashion-MNIST"
    pixels = torch.frombuffer(bytearray(files["train-images-idx3-ubyte"][16:]), dtype=torch.uint8)
    assert torch.equal((data.train_inputs * 255).round().to(torch.uint8).flatten(), pixels)
    assert data.test_labels.tolist() == list(files["t10k-labels-idx1-ubyte"][8:])


def test_without_a_folder_the_installed_package_is_read(
    tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.delenv("THALWEG_DATA", raising=False)
    monkeypatch.setattr(sys.modules["thalweg.data.fashion_mnist"], "INSTALLED", tmp_path / "installed")
    with pytest.raises(ArgumentError, match="apt-get install dataset-fashion-mnist"):
        fashion_mnist(hashes=hashes(files))
    unpack(tmp_path / "installed", files, ".gz")
    assert len(fashion_mnist(hashes=hashes(files)).train_labels) == 5


def test_mnist_in_the_place_of_fashion_is_refused(tmp_path: Path, files: dict[str, bytes]) -> None:
    unpack(tmp_path, files, "")
    with pytest.raises(ArgumentError, match=r"^train-images-idx3-ubyte: expected contents of sha256"):
        fashion_mnist(tmp_path)


def test_what_is_missing_or_broken_says_how_to_get_it(tmp_path: Path, files: dict[str, bytes]) -> None:
    expected = hashes(files)
    with pytest.raises(ArgumentError, match="apt-get download dataset-fashion-mnist"):
        fashion_mnist(tmp_path, hashes=expected)
    (tmp_path / DEB).write_bytes(b"!<arch>\nnot a package" * 10)
    with pytest.raises(ArgumentError, match="a Debian package"):
        fashion_mnist(tmp_path, hashes=expected)
    (tmp_path / DEB).write_bytes(deb(dict(list(files.items())[:3])))
    with pytest.raises(ArgumentError, match=r"an archive with .*t10k-labels"):
        fashion_mnist(tmp_path, hashes=expected)
    (tmp_path / DEB).write_bytes(deb(files)[:-200])
    with pytest.raises(ArgumentError, match="an archive with"):
        fashion_mnist(tmp_path, hashes=expected)
    unpack(tmp_path, files, ".gz")
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"\x1f\x8bcut")
    with pytest.raises(ArgumentError, match="a whole gzip file"):
        fashion_mnist(tmp_path, hashes=expected)


@pytest.mark.skipif(
    not list(Path(os.environ.get("THALWEG_DATA", "nowhere")).glob(PACKAGES)),
    reason=f"THALWEG_DATA holds no {PACKAGES}",
)
def test_the_real_package_has_the_recorded_statistics() -> None:
    data = fashion_mnist()
    assert data.train_labels.bincount().tolist() == [6000] * 10
    assert data.test_labels.bincount().tolist() == [1000] * 10
    assert round(float(data.train_inputs.mean()), 4) == 0.2860
    assert round(float(data.train_inputs.std()), 4) == 0.3530
