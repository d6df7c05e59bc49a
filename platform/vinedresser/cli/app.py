"""The program: one verb, what its libraries may say, and how errors and signals leave it."""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import typer

from vinedresser.cli.commands import app
from vinedresser.errors import InterruptedRunError, VinedresserError

# 128 + SIGINT, as shells have it.
_INTERRUPTED = 130


class _ToStderr(logging.Handler):
    """Writes to what `sys.stderr` is by then, so that lines appear above a bar, not through it."""

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except (OSError, ValueError):  # closed: nobody is there to be told
            self.handleError(record)


def _quiet_libraries() -> None:
    """Telemetry off unless the user asks for it, and no chatter of libraries on stderr."""
    for key, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "PYTHONWARNINGS": "ignore",
    }.items():
        os.environ.setdefault(key, value)
    if not sys.warnoptions:
        import warnings

        warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.ERROR, format="          %(message)s", handlers=[_ToStderr()])
    logging.getLogger("vinedresser").setLevel(logging.INFO)


class _Stopper:
    """SIGTERM as a KeyboardInterrupt, the one exception that Ray lets through its waits."""

    def __init__(self) -> None:
        self.is_told = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.is_told = True
        raise KeyboardInterrupt

    def exit_code(self) -> int:
        """After an interruption: says how to go on."""
        if self.is_told:
            error = InterruptedRunError("told to stop; the same command goes on from where it was")
            sys.stderr.write(f"{error}\n")
            return error.exit_code
        sys.stderr.write("interrupted; the same command goes on from where it was\n")
        return _INTERRUPTED


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Returns:
        0 fine, 2 wrong input or configuration, 3 environment, 4 training or search failed,
        75 try again later, 130 interrupted, 1 a fault of ours.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    is_debug = "--debug" in words or bool(os.environ.get("VINEDRESSER_DEBUG"))
    words = [word for word in words if word != "--debug"]
    _quiet_libraries()
    stopper = _Stopper()
    signal.signal(signal.SIGTERM, stopper)
    try:
        result = app(words, standalone_mode=False)
    except VinedresserError as error:
        return _fail(error, str(error), error.exit_code, is_debug=is_debug)
    except KeyboardInterrupt:
        return stopper.exit_code()
    except BrokenPipeError:
        sys.stdout = None
        return 0
    except typer.Exit as error:
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - the last line of defence against a traceback
        return _foreign(error, is_debug=is_debug)
    if result == _INTERRUPTED:  # what Typer makes of a KeyboardInterrupt
        return stopper.exit_code()
    return result if isinstance(result, int) else 0


def _fail(error: BaseException, text: str, code: int, *, is_debug: bool) -> int:
    if is_debug:
        raise error
    sys.stderr.write(text + "\n")
    return code


def _foreign(error: Exception, *, is_debug: bool) -> int:
    """Usage errors of the command line, and faults that nobody foresaw."""
    show = getattr(error, "show", None)
    if show is not None:
        show()
        return 2
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    text = f"error[E-BUG] {type(error).__name__}: {line}; run again with --debug and report it"
    return _fail(error, text, 1, is_debug=is_debug)
