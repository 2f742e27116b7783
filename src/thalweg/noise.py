"""Random numbers drawn from a key: the same bits under recomputation, double backward and compilation.

A draw is one small operator whose only source of randomness is its key, so whoever runs it again with the
same key gets the same numbers: `torch.utils.checkpoint`, `torch.compile`, a second backward, a probe that has
to be undone. A `torch.Generator` in the middle of a computation cannot promise that: checkpointing does not
replay it, and compilation rejects it.

Two kinds of keys. A `Key` is written down by the caller and names one draw for ever. A *fresh* key is taken
from torch's default CPU generator by `fresh_key`, so that `torch.manual_seed` governs it and torch's own
checkpointing replays it; units such as `thalweg.BinaryNeuron` use that one.

The numbers themselves come from torch's generators. Those of CPU and CUDA differ, so a key may be bound to a
device and then refuses another. The CPU's generator reads 32 bits of a seed: there two different keys name
the same numbers with a chance of 2^-32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, ArgumentTypeError, require_floating, require_integer

T = TypeVar("T")
_MASK = (1 << 64) - 1
_library = torch.library.Library("thalweg", "FRAGMENT")


@dataclass(frozen=True, slots=True)
class Key:
    """The name of one draw; choose it when the same numbers must come back later.

    Args:
        seed: which stream, an integer of at least 0.
        step: which step of the process, at least 0.
        call: which draw within the step, at least 0.
        device: device type ("cpu", "cuda") whose stream the numbers were first drawn on, or None when
            it does not matter; a draw on another device is then refused.

    Raises:
        ArgumentError, ArgumentTypeError: a field out of range.

    Example:
        >>> a = normal(torch.empty(3), Key(seed=0, step=4))
        >>> bool((a == normal(torch.empty(3), Key(seed=0, step=4))).all())
        True
    """

    seed: int
    step: int = 0
    call: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("seed", "step", "call"):
            require_integer(name, getattr(self, name), 0)
        if self.device is not None:
            if not isinstance(self.device, str):
                raise ArgumentTypeError("device", self.device, "a device type such as 'cpu', or None")
            try:
                torch.device(self.device)
            except RuntimeError:
                raise ArgumentError(
                    "device", self.device, "a device type such as 'cpu' or 'cuda', or None"
                ) from None

    def at(self, *, step: int | None = None, call: int | None = None) -> Key:
        """The same stream at another step or call."""
        return replace(
            self, step=self.step if step is None else step, call=self.call if call is None else call
        )

    def bits(self) -> int:
        """The key folded into 63 bits, well mixed: neighbouring keys share nothing."""
        state = 0
        for word in (self.seed, self.step, self.call):
            state = _mix(state ^ (word & _MASK))
        return state >> 1


def _mix(word: int) -> int:
    # the finaliser of splitmix64: a bijection in which every input bit reaches every output bit
    word = (word + 0x9E3779B97F4A7C15) & _MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)


def fresh_key(like: Tensor) -> Tensor:
    """Take a key from torch's default CPU generator; `torch.manual_seed` and checkpointing govern it.

    Args:
        like: any tensor of the computation; only its presence counts.

    Returns:
        An int64 tensor of shape (1,) on the CPU, to be passed to `uniform`, `normal` or `rademacher`.

    Example:
        >>> logits = torch.zeros(2)
        >>> uniform(logits, fresh_key(logits)).shape
        torch.Size([2])
    """
    if not isinstance(like, Tensor):
        raise ArgumentTypeError("like", like, "a tensor")
    # the compiler merges equal calls even of seeded operators, but never two calls of `empty`: an empty
    # tensor of its own keeps this key apart from its twins
    key: Tensor = _fresh_key(like.detach(), torch.empty(0, device="cpu"))
    return key


def replayed(body: Callable[[], T], devices: Iterable[torch.device] = ()) -> Callable[[], T]:
    """Make every call of `body` see the random numbers that its first call saw: common random numbers.

    Choose it to evaluate one loss several times under the same dropout masks and the same fresh keys. After
    any number of calls torch's generators stand where one call leaves them, so training goes on drawing.

    Args:
        body: a function without arguments that draws from torch's default generators.
        devices: the devices whose default generators are rewound beside the CPU's.

    Returns:
        A function like `body`; each of its calls but the first rewinds the generators first.

    Example:
        >>> draw = replayed(lambda: torch.rand(3))
        >>> bool((draw() == draw()).all())
        True
    """
    if not callable(body):
        raise ArgumentTypeError("body", body, "a function without arguments")
    modules = [
        (torch.get_device_module(device), device)
        for device in sorted(set(devices), key=str)
        if device.type not in ("cpu", "meta")
    ]
    modules = [(module, device) for module, device in modules if hasattr(module, "set_rng_state")]
    states: list[Tensor] = []

    def call() -> T:
        if states:
            torch.set_rng_state(states[0])
            for (module, device), state in zip(modules, states[1:]):
                module.set_rng_state(state, device)
        else:
            states.append(torch.get_rng_state())
            states.extend(module.get_rng_state(device) for module, device in modules)
        return body()

    return call


def uniform(like: Tensor, key: Key | Tensor) -> Tensor:
    """Draw from the uniform distribution on [0, 1), in the shape, dtype and device of `like`.

    Args:
        like: floating-point tensor, any shape; its values are not read. Below 32 bits the draw is made in
            float32 and rounded.
        key: a `Key`, or the tensor that `fresh_key` returned.

    Returns:
        A tensor without gradient. Under `torch.vmap` the bits are those of the call on the whole batch, with
        the mapped dimension first.

    Raises:
        ArgumentTypeError: `like` is not floating point, or `key` is neither of the two.
        ArgumentError: the key is bound to another device.
    """
    return _draw("uniform", like, key)


def normal(like: Tensor, key: Key | Tensor) -> Tensor:
    """Draw from the standard normal distribution; arguments, returns and errors as in `uniform`."""
    return _draw("normal", like, key)


def rademacher(like: Tensor, key: Key | Tensor) -> Tensor:
    """Draw -1 or 1 with equal probability; arguments, returns and errors as in `uniform`."""
    return _draw("rademacher", like, key)


def _draw(kind: str, like: Tensor, key: Key | Tensor) -> Tensor:
    require_floating("like", like)
    if isinstance(key, Key):
        if key.device is not None and torch.device(key.device).type != like.device.type:
            mend = (
                "Streams differ between devices: draw where the key was made, or use a key without a device."
            )
            raise ArgumentError("key", key, f"a key of device {like.device.type!r}", mend)
        key = torch.tensor([key.bits()], dtype=torch.int64, device="cpu")
    elif not (isinstance(key, Tensor) and key.dtype == torch.int64 and key.shape == (1,)):
        raise ArgumentTypeError("key", key, "a Key or the tensor that fresh_key returned")
    drawn: Tensor = _operators[kind](like.detach(), key)
    return drawn


def _sample(kind: str, like: Tensor, key: Tensor) -> Tensor:
    generator = torch.Generator(like.device)
    generator.manual_seed(int(key))
    dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
    out = torch.empty(like.shape, dtype=dtype, device=like.device)
    if kind == "uniform":
        out.uniform_(generator=generator)
        if dtype is not like.dtype:
            # rounding to few bits must not reach 1, which a uniform draw never returns
            return out.to(like.dtype).clamp_(max=1 - torch.finfo(like.dtype).eps / 2)
    elif kind == "normal":
        out.normal_(generator=generator)
    else:
        out.random_(0, 2, generator=generator).mul_(2).sub_(1)
    return out.to(like.dtype)


def _take_key(like: Tensor, mark: Tensor) -> Tensor:
    return torch.randint(2**62, (1,), dtype=torch.int64, device="cpu")


def _fake_draw(like: Tensor, key: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _define() -> dict[str, Any]:
    for kind in ("uniform", "normal", "rademacher"):
        _library.define(f"{kind}(Tensor like, Tensor key) -> Tensor", tags=[torch.Tag.pt2_compliant_tag])
        for device in ("CPU", "CUDA"):
            _library.impl(kind, lambda like, key, kind=kind: _sample(kind, like, key), device)
        torch.library.register_fake(f"thalweg::{kind}", _fake_draw, lib=_library)
        torch.library.register_vmap(f"thalweg::{kind}", _batched_draw(kind), lib=_library)
    # seeded: never dropped, kept in order, and replayed by compiled checkpointing
    tags = [torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded]
    _library.define("fresh_key(Tensor like, Tensor mark) -> Tensor", tags=tags)
    for device in ("CPU", "CUDA"):
        _library.impl("fresh_key", _take_key, device)
    torch.library.register_fake(
        "thalweg::fresh_key", lambda like, mark: torch.empty(1, dtype=torch.int64, device="cpu"), lib=_library
    )
    torch.library.register_vmap(
        "thalweg::fresh_key",
        lambda info, in_dims, like, mark: (torch.ops.thalweg.fresh_key(like, mark), None),
        lib=_library,
    )
    return {kind: getattr(torch.ops.thalweg, kind) for kind in ("uniform", "normal", "rademacher")}


def _batched_draw(kind: str) -> Any:
    def rule(
        info: Any, in_dims: tuple[int | None, int | None], like: Tensor, key: Tensor
    ) -> tuple[Tensor, int]:
        like_dim, key_dim = in_dims
        draw = getattr(torch.ops.thalweg, kind)
        if key_dim is not None:
            keys = key.movedim(key_dim, 0)
            likes = like.movedim(like_dim, 0) if like_dim is not None else like.expand(len(keys), *like.shape)
            return torch.stack([draw(one, each) for one, each in zip(likes, keys)]), 0
        assert like_dim is not None
        return draw(like.movedim(like_dim, 0), key), 0

    return rule


_operators = _define()
_fresh_key = torch.ops.thalweg.fresh_key
