"""Evaluate one closure at several points under the same conditions, and leave what one evaluation leaves."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thalweg.borrowed import unexpanded
from thalweg.errors import NonFiniteError
from thalweg.losses import losses_per_example
from thalweg.noise import replayed
from thalweg.step import Closure


@dataclass(frozen=True, slots=True)
class _Kept:
    module: nn.Module
    name: str
    buffer: Tensor
    value: Tensor


class Buffers:
    """The buffers of every module that a body runs, so that the body can be run again from the same ones.

    Found by hooks on all modules while the body runs for the first time; costs a copy of these buffers.
    """

    def __init__(self) -> None:
        self._seen: set[nn.Module] = set()
        self._kept: list[_Kept] | None = None
        self._running: dict[nn.Module, list[_Kept]] = {}
        self._replaced: list[_Kept] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Watch the first run of the body; later runs start from the buffers that this one found."""
        if self._kept is not None:
            self.rewind()
            yield
            return
        self._kept = []
        handles = (
            nn.modules.module.register_module_forward_pre_hook(self._enter),
            nn.modules.module.register_module_forward_hook(self._leave),
        )
        try:
            with warnings.catch_warnings():
                # the hook is made for being called once more by a compiled module
                warnings.filterwarnings("ignore", message=r"Using `torch.compile\(module\)` when there are")
                yield
        finally:
            for handle in handles:
                handle.remove()

    def rewind(self) -> None:
        """Give every buffer the value it had before the first run."""
        for kept in self._replaced:
            kept.module._buffers[kept.name] = kept.buffer
        with torch.no_grad():
            for kept in self._kept or ():
                unexpanded(kept.buffer).copy_(kept.value)

    def _enter(self, module: nn.Module, _inputs: object) -> None:
        if torch.compiler.is_compiling() or module in self._seen:
            return
        assert self._kept is not None
        new = [each for each in module.modules() if each not in self._seen]
        self._seen.update(new)
        # native kernels write running statistics without a new version, so there is no telling later
        found = [
            _Kept(each, name, buffer, unexpanded(buffer.detach()).clone())
            for each in new
            for name, buffer in each._buffers.items()
            if buffer is not None
        ]
        self._kept.extend(found)
        self._running[module] = found

    def _leave(self, module: nn.Module, _inputs: object, _output: object) -> None:
        if torch.compiler.is_compiling():
            return
        # only what the module itself replaced: `functional_call` puts the user's buffers back after this
        self._replaced += [
            kept
            for kept in self._running.pop(module, ())
            if kept.module._buffers.get(kept.name) is not kept.buffer
        ]


class Evaluations:
    """A closure that may be called many times within one estimate, always under the conditions of the first.

    Every evaluation sees the same torch random numbers (dropout masks, fresh keys) and starts from the same
    module buffers (BatchNorm statistics). Afterwards random state and buffers are as after one evaluation;
    after an exception the buffers are as before.

    Args:
        closure: returns the loss, a scalar or one value per example.
        parameters: whose devices' generators are replayed.
    """

    def __init__(self, closure: Closure, parameters: Sequence[Tensor]) -> None:
        self._run = replayed(closure, [parameter.device for parameter in parameters])
        self._buffers = Buffers()
        self.count = 0

    def loss(self, name: str) -> Tensor:
        """Evaluate once; the mean loss in float32 or better.

        Args:
            name: what the error calls this evaluation, for example "sample 0, sign +".

        Raises:
            NonFiniteError: the loss is nan or infinite; the message holds `name`.
        """
        try:
            with self._buffers.recorded():
                value = self._run()
            self.count += 1
            losses = losses_per_example(value)
        except NonFiniteError as error:
            self._buffers.rewind()
            mend = "a smaller scale or float32 often mends it; under restore='swap' so does 'copy'"
            raise NonFiniteError(f"{name}: {error}; {mend}") from error
        except BaseException:
            self._buffers.rewind()
            raise
        return losses.to(torch.promote_types(losses.dtype, torch.float32)).mean()


@contextmanager
def eager_if(condition: bool) -> Iterator[None]:
    """Run compiled modules and functions as they were written while the body runs, when `condition` holds."""
    with ExitStack() as stack:
        if condition:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
