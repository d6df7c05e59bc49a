"""Processes without imports: forked from one that has imported what commands import.

A fresh interpreter needs 4 to 7 seconds of CPU for torch, Ray and MLflow before it does what a test
waits for. A fork of a process that has imported them and computed nothing has its own environment,
streams and signals all the same, and dies alone.
"""

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# What commands import sooner or later.
IMPORTED = [
    "pytest", "torch._dynamo", "torch.distributed", "pandas", "jiwer", "sacrebleu", "optuna",
    "matplotlib.pyplot", "mlflow", "mlflow.store.tracking.sqlalchemy_store", "ray.train.torch",
    "ray.tune.integration.ray_train", "vinedresser.cli.app", "vinedresser.distributed.group",
    "vinedresser.sweep", "vinedresser.pipeline", "vinedresser.registry", "trainables.transformer",
    "trainables.attention_rnn", "tests.processes",
]  # fmt: skip
MAIN = "import sys; from vinedresser.cli import main; sys.exit(main())"


def _become(
    code: str, words: Sequence[str], cwd: str, environment: Mapping[str, str], streams: list[str]
) -> None:
    """Be `python -c code words` from here on."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(streams):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND if number else os.O_RDONLY)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, buffering=size, closefd=False)  # noqa: SIM115
        for number, mode, size in ((0, "r", -1), (1, "w", -1), (2, "w", 1))
    )
    sys.argv = ["-c", *words]
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    finally:
        sys.stdout.flush()
        atexit._run_exitfuncs()


class Forked:
    """A process like `python -c code words`, with the methods of subprocess.Popen.

    Attributes:
        pid: its number.
        out: the file that is its standard output.
        err: the file that is its standard error, unless that is `stderr`.
    """

    def __init__(
        self,
        folder: Path,
        code: str,
        words: Sequence[object],
        *,
        cwd: Path,
        env: Mapping[str, str],
        stdin: str = "",
        stderr: Path | None = None,
    ) -> None:
        given, self.out, self.err = (folder / name for name in ("stdin", "out", "err"))
        given.write_text(stdin)
        self.out.touch()
        self.err.touch()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        streams = [str(given), str(self.out), str(stderr or self.err)]
        arguments = code, [*map(str, words)], str(cwd), dict(env), streams
        self._process = context.Process(target=_become, args=arguments)
        self._process.start()
        self.pid = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; return the exit code."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("forked", timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; return what it wrote."""
        self.wait(timeout)
        return self.out.read_text(), self.err.read_text()

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL, unless the process has ended."""
        self.send_signal(signal.SIGKILL)
