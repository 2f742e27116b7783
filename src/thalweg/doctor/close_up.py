"""A second, closer look at every operation, taken only when the first found a sign.

Forward: which operation first made a value that is not finite. Backward: through which node the gradient
first stopped being finite, and at which node it became exactly zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from thalweg.doctor.graph import Node, is_leaf, marks_upstream, tensors_in, upstream
from thalweg.doctor.patient import Patient, total
from thalweg.doctor.readings import Readings
from thalweg.doctor.recording import Origin, Recording


@dataclass(frozen=True, slots=True)
class CloseUp:
    """Where things first went wrong; None where they did not.

    Args:
        forward: the first operation that made a non-finite value from finite ones.
        backward: the first node, in backward order, that did.
        zeroed: for each node at which a gradient became exactly zero, the `id` of the asked-for parameters
            behind it that therefore got none.
    """

    forward: Origin | None
    backward: Origin | None
    zeroed: tuple[tuple[Origin, str, frozenset[int]], ...]


class _Finite(TorchFunctionMode):
    """Notes for each operation whether what went in and what came out is finite."""

    def __init__(self, recording: Recording, readings: Readings) -> None:
        super().__init__()
        self._recording = recording
        self._readings = readings
        self.notes: list[tuple[Origin, list[int], list[int]]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        given = _floating((args, kwargs or {}))
        before = [self._readings.norm(tensor) for tensor in given] if given else []
        result = func(*args, **(kwargs or {}))
        made = _floating(result)
        deliberate = any(_is_non_finite(value) for value in (*args, *(kwargs or {}).values()))
        if given and made and not deliberate and not name.startswith(("empty", "new_empty", "__get__")):
            after = [self._readings.norm(tensor) for tensor in made]
            self.notes.append((self._recording.here(name), before, after))
        return result


def _floating(value: object) -> list[Tensor]:
    return [tensor for tensor in tensors_in(value) if tensor.is_floating_point()]


def _is_non_finite(value: object) -> bool:
    return isinstance(value, float) and value - value != 0


def look(patient: Patient, zero: Iterable[Tensor] = (), finite: bool = True) -> CloseUp:
    """Run the step once more, reading every operation.

    Args:
        patient: the step; this makes its own visit.
        zero: parameters whose gradient is exactly zero and whose zero is to be explained.
        finite: whether to look for the origin of non-finite values in the forward too.
    """
    recording = Recording(patient.model)
    readings = recording.readings
    watch = _Finite(recording, readings)
    with patient.visit(), recording.watching():
        with recording:
            if finite:
                with watch:
                    terms = patient.terms()
            else:
                terms = patient.terms()
        recording.forward_done()
        loss = total(terms)
        seen = _Backward(readings)
        order = upstream([loss.grad_fn])
        handles = [node.register_hook(seen.at(node)) for node in order if not is_leaf(node)]
        try:
            patient.gradients(loss)
        finally:
            for handle in handles:
                handle.remove()
        values = readings.read()
    forward = next(
        (
            origin
            for origin, before, after in watch.notes
            if all(_finite(values[slot]) for slot in before)
            and not all(_finite(values[slot]) for slot in after)
        ),
        None,
    )
    backward = next(
        (
            recording.place(node)
            for node, came, went in seen.notes
            if all(_finite(values[slot]) for slot in came if slot is not None)
            and not all(_finite(values[slot]) for slot in went if slot is not None)
        ),
        None,
    )
    wanted = {id(parameter): 1 << index for index, parameter in enumerate(zero)}
    return CloseUp(forward, backward, tuple(_zeroed(recording, order, seen, values, wanted)))


class _Backward:
    """Hooks on nodes that note the norms of the gradients that came and went."""

    def __init__(self, readings: Readings) -> None:
        self._readings = readings
        self.notes: list[tuple[Node, list[int | None], list[int | None]]] = []

    def at(self, node: Node) -> Callable[[Any, Any], None]:
        def hook(went: tuple[Tensor | None, ...], came: tuple[Tensor | None, ...]) -> None:
            self.notes.append((node, self._norms(came), self._norms(went)))

        return hook

    def _norms(self, gradients: tuple[Tensor | None, ...]) -> list[int | None]:
        return [None if each is None else self._readings.norm(each) for each in gradients]


def _zeroed(
    recording: Recording, order: list[Node], seen: _Backward, values: list[float], wanted: dict[int, int]
) -> list[tuple[Origin, str, frozenset[int]]]:
    if not wanted:
        return []
    behind = marks_upstream(order, lambda node: wanted.get(id(node.variable), 0) if is_leaf(node) else 0)
    found = []
    for node, came, went in seen.notes:
        if not any(slot is not None and values[slot] != 0 for slot in came):
            continue
        bits = 0
        for (following, _), slot in zip(node.next_functions, went):
            if following is not None and (slot is None or values[slot] == 0):
                bits |= behind[following]
        if bits:
            found.append((recording.place(node), type(node).__name__, frozenset(_ids(bits, wanted))))
    return found


def _ids(bits: int, wanted: dict[int, int]) -> list[int]:
    return [key for key, bit in wanted.items() if bits & bit]


def _finite(value: float) -> bool:
    return value - value == 0
