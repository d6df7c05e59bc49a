"""Recording of attention weights, the one mechanism by which they leave a model.

Forward hooks do not suffice: weights are no module's output, and a fused kernel never forms them,
so an attention module must choose its path by `is_recording`. Nothing is kept outside `recording`;
training pays for reading a context variable.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn

_FOUND: ContextVar[list[tuple[nn.Module, Tensor]] | None] = ContextVar("found", default=None)


@contextmanager
def recording() -> Iterator[list[tuple[nn.Module, Tensor]]]:
    """Yield the list to which `record` appends (module, weights) while the block runs."""
    found: list[tuple[nn.Module, Tensor]] = []
    token = _FOUND.set(found)
    try:
        yield found
    finally:
        _FOUND.reset(token)


def is_recording() -> bool:
    """Return true inside `recording`: fused kernels that never form the weights are excluded."""
    return _FOUND.get() is not None


def record(module: nn.Module, weights_BHTS: Tensor) -> None:
    """Append the weights (B, H, T, S) of a module; T is 1 where it attends step by step."""
    found = _FOUND.get()
    if found is not None:
        found.append((module, weights_BHTS))
