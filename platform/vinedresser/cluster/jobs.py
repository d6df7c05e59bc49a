"""Commands on a cluster through Ray Jobs: submit, follow, list, stop.

A job is named by the digest of its command, code, environment and slot, so that a second submission
of the same thing follows the first. Whoever reaches Ray's dashboard can read the command and the
environment of a job: neither may hold a secret.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import re
import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from vinedresser.cluster.connect import require_listener
from vinedresser.cluster.package import pack
from vinedresser.errors import ConfigError, InterruptedRunError, MachineError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

# Variables of the submitting process that travel with a job; others belong to the nodes.
ENVIRONMENT = ("VINEDRESSER_PACKAGES", "VINEDRESSER_WORKSPACE", "MLFLOW_TRACKING_URI")

# Ray's supervisor of a job reads it in the job's environment: seconds between SIGTERM and SIGKILL,
# 3 by default, less than a checkpoint may take.
_STOP_SECONDS = ("RAY_JOB_STOP_WAIT_TIME_S", "60")

_POLL_SECONDS = 0.5
_ID = "vinedresser-"
# A password in a URL.
_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]+@")


@dataclass(frozen=True)
class Job:
    """One command for a cluster, with what it needs.

    Attributes:
        words: the verb and its arguments.
        code: folder whose code becomes the working directory of the job.
        environment: variables of the job, without secrets.
        slot: scheduled time that the command belongs to; a slot that succeeded is not run again.
    """

    words: Sequence[str]
    code: Path
    environment: Mapping[str, str]
    slot: str = ""

    def __post_init__(self) -> None:
        """Refuse a password in the command."""
        for word in self.words:
            _refuse_password(word.partition("=")[0], word)


@dataclass(frozen=True)
class JobRow:
    """State of one submitted job."""

    id: str
    status: str
    command: str
    exit_code: int | None
    started: float | None
    seconds: float | None


def job_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of an environment that travel with a job.

    Raises:
        ConfigError: one of them holds a password.
    """
    found = {key: environment[key] for key in ENVIRONMENT if environment.get(key)}
    for key, value in found.items():
        _refuse_password(key, value)
    name, default = _STOP_SECONDS
    return {**found, name: environment.get(name) or default}


def _refuse_password(name: str, text: str) -> None:
    if _PASSWORD.search(text):
        raise ConfigError(
            f"{name}: the URL holds a password, and everyone who reaches Ray's dashboard can read "
            "a job; put it into the environment of the nodes"
        )


def _has_token() -> bool:
    """Return whether this process has a token for Ray, in a variable or in a file."""
    return (
        any(key in os.environ for key in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
        or (Path.home() / ".ray" / "auth_token").is_file()
    )


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, address: str) -> None:
        """Connect to the dashboard of a cluster, by its URL or the address of the head node.

        Raises:
            MachineError: the cluster does not answer.
        """
        require_listener(address, "--address")
        if _has_token():
            # Only the `ray` program and `ray.init` find a token by themselves; read by its import.
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        # Ray's client reads this variable first, then RAY_ADDRESS, then its argument.
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address = address
        with self._answer():
            from ray.job_submission import JobSubmissionClient

            for handler in logging.getLogger("ray").handlers:
                handler.setLevel(logging.ERROR)
            self._client = JobSubmissionClient(address)

    def submit(self, job: Job) -> tuple[str, bool]:
        """Submit a job, or find the same one that is pending, runs or, with a slot, succeeded.

        Returns:
            Its id, and True if it is new.
        """
        with tempfile.TemporaryDirectory(prefix="vinedresser-") as folder:
            package = Path(folder) / "code.zip"
            content = [list(job.words), dict(job.environment), job.slot, pack(job.code, package)]
            digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
            base = f"{_ID}{job.words[0]}-{digest[:12]}"
            earlier = [row for row in self.rows() if row.id.rpartition("-")[0] == base]
            for row in earlier:
                if row.exit_code is None or (job.slot and row.exit_code == 0):
                    return row.id, False
            # Ray never accepts an id again: an ended command that is repeated gets the next number.
            new = f"{base}-{len(earlier) + 1}"
            try:
                with self._answer():
                    self._client.submit_job(
                        entrypoint=shlex.join(["vinedresser", *job.words]),
                        submission_id=new,
                        runtime_env={
                            "working_dir": str(package),
                            "env_vars": dict(job.environment),
                        },
                        metadata={"slot": job.slot},
                    )
            except MachineError:
                if new in {row.id for row in self.rows()}:  # submitted by another process meanwhile
                    return new, False
                raise
        return new, True

    def rows(self) -> list[JobRow]:
        """Return the submitted jobs, the latest first."""
        with self._answer():
            found = self._client.list_jobs()
        ours = [each for each in found if (each.submission_id or "").startswith(_ID)]
        return sorted(map(_row, ours), key=lambda row: -(row.started or 0))

    def logs(self, job_id: str) -> str:
        """Return what a job has printed so far."""
        self._details(job_id)
        with self._answer():
            return str(self._client.get_job_logs(job_id))

    def follow(self, job_id: str, out: IO[str]) -> int:
        """Copy what a job prints until it ends; return its exit code.

        Raises:
            InterruptedRunError: the job was stopped.
            MachineError: the job ended without an exit code, or the cluster does not answer.
        """
        written = 0

        async def copy() -> None:
            """Copy what is not written yet; the stream begins with the whole log each time."""
            nonlocal written
            position = 0
            async for text in self._client.tail_job_logs(job_id):
                position += len(text)
                if position > written:
                    out.write(text[written - position :])
                    out.flush()
                    written = position

        while True:
            details = self._details(job_id)
            is_ended = details.status.is_terminal()
            if is_ended or details.status == "RUNNING":
                # A lost connection is made again, unless the cluster does not answer any more.
                with contextlib.suppress(RuntimeError, OSError):
                    asyncio.run(copy())
            if is_ended:
                return _exit_code(job_id, details)
            time.sleep(_POLL_SECONDS)

    def stop(self, job_id: str) -> JobRow:
        """Request that a job stops with a checkpoint; return its state at the end."""
        self.request_stop(job_id)
        while not (details := self._details(job_id)).status.is_terminal():
            time.sleep(_POLL_SECONDS)
        return _row(details)

    def request_stop(self, job_id: str) -> None:
        """Request that a job stops with a checkpoint."""
        with self._answer(job_id):
            self._client.stop_job(job_id)

    def _details(self, job_id: str) -> "JobDetails":
        with self._answer(job_id):
            return self._client.get_job_info(job_id)

    @contextlib.contextmanager
    def _answer(self, job_id: str = "") -> Iterator[None]:
        """Report errors of Ray's client in one line.

        Raises:
            ConfigError: there is no job with this id.
            MachineError: the cluster does not answer or refuses.
        """
        from ray.exceptions import AuthenticationError

        try:
            yield
        except (RuntimeError, OSError, ValueError, AuthenticationError) as error:
            if job_id and "status code 404" in str(error):
                raise ConfigError(
                    f"{job_id}: no such job at {self.address}; see `vinedresser jobs ls`"
                ) from error
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise MachineError(
                f"--address={self.address}: {reason}; name the dashboard of a running cluster"
            ) from error


def _row(details: "JobDetails") -> JobRow:
    started, ended = details.start_time, details.end_time
    code: int | None = None
    if details.status.is_terminal():
        code = details.driver_exit_code
        if code is None:  # stopped, or never started
            code = InterruptedRunError.exit_code if details.status == "STOPPED" else 3
    return JobRow(
        id=str(details.submission_id),
        status=str(details.status.value).lower(),
        command=details.entrypoint,
        exit_code=code,
        started=started / 1000 if started else None,
        seconds=((ended or time.time() * 1000) - started) / 1000 if started else None,
    )


def _exit_code(job_id: str, details: Any) -> int:
    """Return the exit code of an ended job's command; 128 + n if signal n ended it."""
    code = details.driver_exit_code
    if code is not None:
        return int(code) if code >= 0 else 128 - int(code)
    if details.status == "STOPPED":
        raise InterruptedRunError(f"{job_id} was stopped; submit it again to resume")
    reason = " ".join((details.message or "no reason given").split())[:300]
    raise MachineError(f"{job_id}: {reason}; submit it again to resume")
