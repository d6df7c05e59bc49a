"""`submit`: any other verb as a job on a cluster."""

import logging
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from vinedresser.errors import ConfigError

_log = logging.getLogger(__name__)

Address = Annotated[
    str,
    typer.Option(
        envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"],
        help="dashboard of the cluster, as in http://head:8265",
        show_default=False,
    ),
]


def verb(
    context: typer.Context,
    words: Annotated[list[str], typer.Argument(help="the command", metavar="[--] VERB [ARGS]...")],
    address: Address = "",
    follow: Annotated[
        bool,
        typer.Option("--follow/--no-wait", help="print the job's log until it ends, or its id"),
    ] = True,
    code: Annotated[
        Path, typer.Option(help="folder whose code the job gets, without what .gitignore names")
    ] = Path(),
    slot: Annotated[
        str,
        typer.Option(help="scheduled time of the command; a slot that succeeded is not run again"),
    ] = "",
) -> None:
    """Run a verb on a cluster as a job; exit with its exit code.

    The same command attaches to the job while it runs. Ctrl-C detaches and leaves the job running;
    SIGTERM stops the job after a checkpoint.
    """
    require_address(address)
    from vinedresser.cluster.jobs import Job, Jobs, job_environment

    environment = job_environment(os.environ)
    _require_valid(context, words)
    jobs = Jobs(address)
    job_id, is_new = jobs.submit(Job(words, code.absolute(), environment, slot))
    _log.info("%s %s at %s", "submitted" if is_new else "attached to", job_id, address)
    if not follow:
        return print(job_id)
    try:
        result = jobs.follow(job_id, sys.stdout)
    except KeyboardInterrupt as interrupt:
        if signal.SIGTERM in interrupt.args:
            jobs.request_stop(job_id)
            _log.info("%s is requested to stop", job_id)
            raise
        at = f"--address {shlex.quote(address)}"
        _log.info(
            "detached; the job goes on: `vinedresser jobs logs --follow %s %s` attaches again, "
            "`vinedresser jobs stop %s %s` stops it", job_id, at, job_id, at,
        )  # fmt: skip
        raise
    raise typer.Exit(result)


def require_address(address: str) -> None:
    """Refuse to look for a cluster that is not named.

    Raises:
        ConfigError: the address is empty.
    """
    if not address:
        raise ConfigError("no cluster; pass --address http://head:8265 or set RAY_ADDRESS")


def _require_valid(context: typer.Context, words: list[str]) -> None:
    """Parse a command as its verb does, and refuse a workspace that the job would lose.

    Raises:
        ConfigError: an unknown verb, or a relative workspace.
    """
    verbs = getattr(context.find_root().command, "commands", {})
    verb, *arguments = words
    if verb not in verbs or verb in (context.info_name, "jobs", "ui"):
        raise ConfigError(f"{verb}: no verb to submit; see `vinedresser --help`")
    parsed = verbs[verb].make_context(verb, arguments).params
    workspace = parsed.get("workspace")
    if workspace is not None and not Path(workspace).is_absolute():
        raise ConfigError(
            f"--workspace {workspace}: inside the job's unpacked code, which Ray deletes; pass an "
            "absolute path on storage that all nodes see, or set VINEDRESSER_WORKSPACE"
        )
