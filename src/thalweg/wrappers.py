"""Data-parallel wrappers, which only their own backward can serve."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from thalweg.errors import UnsupportedError


@contextmanager
def refuse_wrappers(rule: str) -> Iterator[None]:
    """Refuse data-parallel wrappers inside a body that does not run their backward."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        yield
        return

    def refuse(module: nn.Module, _inputs: object) -> None:
        for cls in type(module).__mro__:
            if cls.__name__ in ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"):
                raise UnsupportedError(
                    f"{rule} under {cls.__name__}: its communication hooks would not fire. Pass the bare "
                    "module on every rank and call thalweg.all_reduce_gradients_(parameters) afterwards"
                )

    handle = nn.modules.module.register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()
