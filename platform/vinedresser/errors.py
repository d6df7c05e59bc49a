"""Errors that a user can act on: found, expected, what to do.

Each takes exactly one message, so that Ray can pickle it across processes, and each carries the
exit code of the command line: 2 wrong input or configuration, 3 environment (disk, permission,
server), 4 training or search failed, 75 try again later (sysexits' EX_TEMPFAIL).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar


class VinedresserError(Exception):
    """Base of every error that is reported in one line and without a traceback."""

    exit_code: ClassVar[int] = 4
    topic: ClassVar[str] = "RUN"

    def __init__(self, message: str) -> None:
        super().__init__(message)

    def __str__(self) -> str:
        """Return one line per problem, each with its topic."""
        return "\n".join(f"error[E-{self.topic}] {line}" for line in self.args[0].splitlines())


@contextmanager
def reworded(
    caught: type[Exception], raised: type[Exception], before: str = "", after: str = ""
) -> Iterator[None]:
    """Raise the errors of one class as another one, with text before and after their message."""
    try:
        yield
    except caught as error:
        text = error.args[0] if isinstance(error, VinedresserError) else error
        raise raised(f"{before}{text}{after}") from None


class ConfigError(VinedresserError):
    """A key, value or name in a configuration is wrong."""

    exit_code = 2
    topic = "CONFIG"


class DataError(VinedresserError):
    """A corpus, shard set or model folder does not fit the run."""

    exit_code = 2
    topic = "DATA"


class DamagedError(DataError):
    """A committed folder fails its own manifest: truncated, changed, missing or extra files."""


class MachineError(VinedresserError):
    """Disk, permission, memory or a server is in the way."""

    exit_code = 3
    topic = "MACHINE"


class TrainingError(VinedresserError):
    """Training or a search failed: non-finite loss, every trial failed, parity not reached."""

    exit_code = 4
    topic = "TRAIN"


class DivergedError(TrainingError):
    """The loss or its gradient is not finite any more, or far above that of guessing."""


class BusyError(VinedresserError):
    """Another process holds what this command needs; run the same command later."""

    exit_code = 75
    topic = "BUSY"


class InterruptedRunError(VinedresserError):
    """The run stopped on request; the same command resumes it from its checkpoint."""

    exit_code = 75
    topic = "STOPPED"


class PreemptedError(InterruptedRunError):
    """The run wrote a checkpoint because its node is about to be lost; it continues elsewhere."""
