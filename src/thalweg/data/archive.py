"""Where the archives of data sets lie, and their members, read without unpacking and checked by hash."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from thalweg.errors import ArgumentError


def data_folder(data_dir: str | Path | None, mend: str, *, otherwise: Path | None = None) -> Path:
    """The folder that the caller named, or the one that the environment variable THALWEG_DATA names.

    Args:
        data_dir: as the caller gave it; None looks into the environment.
        mend: how to get the data, for the message of a refusal.
        otherwise: a folder to use when neither names one, if it exists.

    Raises:
        ArgumentError: no folder named, or not a folder.
    """
    if data_dir is None:
        data_dir = os.environ.get("THALWEG_DATA") or None
        if data_dir is None and otherwise is not None and otherwise.is_dir():
            return otherwise
        if data_dir is None:
            raise ArgumentError("data_dir", None, "a folder, because THALWEG_DATA is not set", mend)
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise ArgumentError("data_dir", str(data_dir), "a folder", mend)
    return folder


def tar_members(archive: Path | io.BytesIO, members: Iterable[str], mend: str) -> dict[str, bytes]:
    """Read members of a tar archive, in one pass over it.

    Raises:
        ArgumentError: not an archive, or a member that it does not hold.
    """
    label = archive.name if isinstance(archive, Path) else "the archive inside the package"
    wanted = tuple(members)
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive) if isinstance(archive, Path) else tarfile.open(fileobj=archive) as tar:
            for entry in tar:
                name = entry.name.removeprefix("./")
                stream = tar.extractfile(entry) if name in wanted else None
                if stream is not None:
                    found[name] = stream.read()
                if len(found) == len(wanted):
                    break
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ArgumentError("data_dir", f"{label}: {error}", f"an archive with {wanted[0]}", mend) from None
    for member in wanted:
        if member not in found:
            raise ArgumentError("data_dir", label, f"an archive with {member}", mend)
    return found


def deb_members(package: Path, members: Iterable[str], mend: str) -> dict[str, bytes]:
    """Read members of the data part of a Debian package; what installing it would run stays unread.

    Raises:
        ArgumentError: not a Debian package, or a member that it does not hold.
    """
    content = package.read_bytes()
    place = 8
    while content[:8] == b"!<arch>\n" and place + 60 <= len(content):
        # an entry's header: its name in 16 bytes, its size in decimal digits from byte 48 to 58
        header = content[place : place + 60]
        digits = header[48:58].decode("ascii", "replace").strip()
        size = int(digits) if digits.isascii() and digits.isdigit() else 0
        if header.startswith(b"data.tar"):
            return tar_members(io.BytesIO(content[place + 60 : place + 60 + size]), members, mend)
        place += 60 + size + size % 2
    raise ArgumentError("data_dir", package.name, "a Debian package", mend)


def zip_members(archive: Path, members: Iterable[str], mend: str) -> dict[str, bytes]:
    """Read members of a zip archive, for example of a wheel.

    Raises:
        ArgumentError: not an archive, or a member that it does not hold.
    """
    wanted = tuple(members)
    try:
        with zipfile.ZipFile(archive) as opened:
            return {member: opened.read(member) for member in wanted}
    except (zipfile.BadZipFile, KeyError, EOFError, OSError) as error:
        expected = f"an archive with {wanted[0]}"
        raise ArgumentError("data_dir", f"{archive.name}: {error}", expected, mend) from None


def require_contents(name: str, content: bytes | memoryview, expected: str, mend: str) -> None:
    """Raise `ArgumentError` unless the sha256 of `content` begins with the hexadecimal digits `expected`."""
    found = hashlib.sha256(content).hexdigest()[: len(expected)]
    if found != expected:
        raise ArgumentError(name, f"contents of sha256 {found}", f"contents of sha256 {expected}", mend)
