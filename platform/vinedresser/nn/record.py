"""Attention weights on request: a module reports them, whoever wants to see them records.

Nothing is kept while nobody records, so that training pays one look at a context variable.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn

_FOUND: ContextVar[list[tuple[nn.Module, Tensor]] | None] = ContextVar("found", default=None)


@contextmanager
def recording() -> Iterator[list[tuple[nn.Module, Tensor]]]:
    """The list into which `record` puts (module, weights) while the block runs."""
    found: list[tuple[nn.Module, Tensor]] = []
    token = _FOUND.set(found)
    try:
        yield found
    finally:
        _FOUND.reset(token)


def is_recording() -> bool:
    """Whether weights are wanted; a fused kernel that never forms them must not be used then."""
    return _FOUND.get() is not None


def record(module: nn.Module, weights_BHTS: Tensor) -> None:
    """Reports a module's weights (B, H, T, S); T is 1 where it attends step by step."""
    found = _FOUND.get()
    if found is not None:
        found.append((module, weights_BHTS))
