"""The program: one verb, log lines on stderr, and the boundary that prints errors as lines."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Sequence

import typer

from vinedresser.cli.verbs import (
    attend,
    check,
    compare,
    describe,
    doctor,
    evaluate,
    export,
    gc,
    jobs,
    prepare,
    prune,
    retrain,
    runs,
    schedule,
    submit,
    sweep,
    sync,
    train,
    translate,
    ui,
)
from vinedresser.config.files import refused
from vinedresser.errors import ConfigError, InterruptedRunError, MachineError, VinedresserError
from vinedresser.workspace.stopping import InterruptOnSigterm

# Exit code by the convention of shells: 128 + SIGINT.
_INTERRUPTED = 130
# Parts of torch's messages when a tensor is too large.
_NO_MEMORY = (
    "can't allocate memory", "out of memory", "size calculation overflowed", "not enough memory",
    "numel: integer multiplication overflow",
)  # fmt: skip

app = typer.Typer(
    help="Train and prune sequence-to-sequence models, selected on decoded quality.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (
    prepare, train, check, sweep, prune, export, retrain, evaluate, compare, translate, describe,
    attend, runs, sync, gc, ui, doctor, submit,
):  # fmt: skip
    app.command(module.__name__.rpartition(".")[2])(module.verb)
app.add_typer(schedule.app, name="schedule")
app.add_typer(jobs.app, name="jobs")


class _ToStderr(logging.Handler):
    """Print messages of the package from INFO with seconds since the start; errors of libraries.

    Writes to the current `sys.stderr`, so that lines appear above a progress bar.
    """

    def __init__(self) -> None:
        super().__init__()
        self._start = time.time()

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record as one line."""
        is_own = record.name.split(".")[0] == "vinedresser"
        if is_own or record.levelno >= logging.ERROR:
            seconds = f"{record.created - self._start:7.1f}s" if is_own else ""
            with contextlib.suppress(OSError, ValueError):  # closed
                sys.stderr.write(f"{seconds:8}  {record.getMessage()}\n")
                sys.stderr.flush()


def _open_streams() -> None:
    """Install the log handler; disable telemetry by default and warnings of libraries."""
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
    for handler in logging.root.handlers:
        if isinstance(handler, _ToStderr):
            logging.root.removeHandler(handler)
    logging.root.addHandler(_ToStderr())
    logging.getLogger("vinedresser").setLevel(logging.INFO)


def _exit_code(interrupt: InterruptOnSigterm) -> int:
    """Print how to resume after an interruption, and return the exit code."""
    if interrupt.is_received:
        error = InterruptedRunError("stopped on request; run the same command to resume")
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stderr.write("interrupted; run the same command to resume\n")
    return _INTERRUPTED


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0 success, 2 wrong input or configuration, 3 environment, 4 training or search failed,
        75 try again later, 130 interrupted, 1 a bug.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    is_debug = "--debug" in words or bool(os.environ.get("VINEDRESSER_DEBUG"))
    words = [word for word in words if word != "--debug"] or ["--help"]
    _open_streams()
    interrupt = InterruptOnSigterm()
    try:
        _refuse_control_characters(words)
        result = app(words, standalone_mode=False)
    except KeyboardInterrupt:
        return _exit_code(interrupt)
    except SystemExit:  # of Typer when the reader of stdout has left; it has muted the streams
        return 0
    except typer.Exit as error:
        return error.exit_code
    except Exception as error:  # so that no traceback is printed
        if is_debug:
            raise
        known = _as_known(error)
        if known is not None:
            sys.stderr.write(f"{known}\n")
            return known.exit_code
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        sys.stderr.write(
            f"error[E-BUG] {type(error).__name__}: {line}; run again with --debug and report it\n"
        )
        return 1
    if result == _INTERRUPTED:  # Typer's result after a KeyboardInterrupt
        return _exit_code(interrupt)
    return result if isinstance(result, int) else 0


def _refuse_control_characters(words: Sequence[str]) -> None:
    """Refuse arguments with control characters; JSON may contain line breaks.

    Raises:
        ConfigError: the first such argument.
    """
    for word in words:
        is_json = word.partition("=")[2][:1] in ("{", "[")
        if problem := refused(word.replace("\n", " ").replace("\r", " ") if is_json else word):
            raise ConfigError(f"{ascii(word)[:80]}: {problem}")


def _as_known(error: Exception) -> VinedresserError | None:
    """Return the error that the user can act on; None for a bug."""
    if isinstance(error, VinedresserError):
        return error
    if (message := getattr(error, "format_message", None)) is not None:  # of Typer
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "vinedresser"
        text = " ".join(message().split()).rstrip(".").replace("Value error, ", "")
        text = text.replace("Input should be", "expected")
        return ConfigError(f"{text}; see `{command} --help`")
    line = " ".join(str(error).split())[:300]
    if isinstance(error, MemoryError) or any(part in line.lower() for part in _NO_MEMORY):
        reason = line or "out of memory"
        return MachineError(f"{reason}; choose smaller sizes, or a machine with more memory")
    if isinstance(error, OSError):
        reason = (error.strerror or line or type(error).__name__).lower()
        path = f"{error.filename}: " if error.filename else ""
        return MachineError(f"{path}{reason}")
    if isinstance(error, RecursionError):
        return ConfigError("a value is nested too deeply; flatten it")
    return None
