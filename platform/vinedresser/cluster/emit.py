"""Schedules for other schedulers: each calls the same `vinedresser schedule tick`.

A tick decides about slots, overlap, catch-up and retries by itself, and takes a second where
nothing is due. Cron and systemd call it every two minutes. Kubernetes and Airflow, for which a call
is a pod or a task, use the times of the schedule.
"""

import os
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import PurePath
from types import MappingProxyType

from vinedresser.cluster import manifests
from vinedresser.cluster.jobs import job_environment
from vinedresser.cluster.manifests import Pods, Tick
from vinedresser.errors import ConfigError
from vinedresser.schedule.definition import Schedule

_EVERY_MINUTES = 2
_ENVIRONMENT = ("VINEDRESSER_PACKAGES", "MLFLOW_TRACKING_URI")


def tick_of(schedule: Schedule, source: str, workspace: PurePath) -> Tick:
    """Return the call of a schedule; variables of this process travel as with a job."""
    travels = job_environment(os.environ)
    return Tick(
        name=schedule.name,
        source=source,
        workspace=str(workspace),
        every=schedule.every or schedule.interval or timedelta(),
        zone=schedule.zone if schedule.every else "UTC",
        deadline=int(schedule.deadline.total_seconds()),
        late=int(schedule.catch_up.within.total_seconds()),
        environment={key: travels[key] for key in _ENVIRONMENT if key in travels},
    )


@dataclass(frozen=True)
class Host:
    """The machine whose cron, systemd or Airflow calls the tick.

    Attributes:
        program: path of `vinedresser`.
        folder: working directory.
    """

    program: PurePath
    folder: PurePath


def cron(tick: Tick, host: Host) -> dict[str, str]:
    """Return a line for `crontab -e`."""
    variables = [f"{key}={shlex.quote(value)}" for key, value in tick.environment.items()]
    words = [*variables, shlex.join([str(host.program), *tick.words])]
    log = shlex.quote(f"{tick.name}.log")
    line = f"cd {shlex.quote(str(host.folder))} && {' '.join(words)} >> {log} 2>&1"
    # In a crontab, a percent sign ends the command.
    return {f"{tick.name}.cron": f"*/{_EVERY_MINUTES} * * * * {line.replace('%', chr(92) + '%')}\n"}


def systemd(tick: Tick, host: Host) -> dict[str, str]:
    """Return a service and its timer, for /etc/systemd/system or ~/.config/systemd/user."""
    variables = "".join(
        f"Environment={_unit_word(f'{key}={value}')}\n" for key, value in tick.environment.items()
    )
    # Only the command expands variables.
    words = (word.replace("$", "$$") for word in (str(host.program), *tick.words))
    command = " ".join(map(_unit_word, words))
    service = f"""\
[Unit]
Description=vinedresser schedule {tick.name}
Wants=network-online.target
After=network-online.target

[Service]
Type=oneshot
WorkingDirectory={str(host.folder).replace("%", "%%")}
{variables}ExecStart={command}
# 75: a slot waits, and a later tick goes on with it.
SuccessExitStatus=75
# The deadline is the schedule's; a stop leaves time for a checkpoint.
TimeoutStartSec=infinity
TimeoutStopSec={manifests.GRACE_SECONDS}
KillMode=mixed
"""
    timer = f"""\
[Unit]
Description=vinedresser schedule {tick.name}

[Timer]
OnCalendar=*:0/{_EVERY_MINUTES}
AccuracySec=10s
Persistent=true

[Install]
WantedBy=timers.target
"""
    unit = f"vinedresser-{tick.resource}"
    return {f"{unit}.service": service, f"{unit}.timer": timer}


def _unit_word(word: str) -> str:
    """Return a word of a unit file, with `%` escaped, in quotes where necessary."""
    text = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text}"' if re.search(r"[\s\"';]", word) or not word else text


def airflow(tick: Tick, host: Host) -> dict[str, str]:
    """Return a DAG file for Airflow 3."""
    words = [str(host.program), *tick.words]
    text = f'''\
"""Schedule {tick.name}: emitted by `vinedresser schedule emit`, replaced by emitting it again."""

import os
import subprocess
from datetime import datetime, timedelta, timezone

from airflow.sdk import DAG, task
from airflow.sdk.exceptions import AirflowFailException
from airflow.timetables.trigger import CronTriggerTimetable

with DAG(
    dag_id={f"vinedresser-{tick.resource}"!r},
    schedule=CronTriggerTimetable({tick.cron!r}, timezone={tick.zone!r}),
    start_date=datetime(2025, 1, 1, tzinfo=timezone.utc),
    # A tick catches up by itself, and does not run beside another.
    catchup=False,
    max_active_runs=1,
    dagrun_timeout=timedelta(seconds={tick.deadline * 2}),
):

    @task(retries=6, retry_delay=timedelta(minutes=5), retry_exponential_backoff=True)
    def tick() -> None:
        """Run what is due; wrong input (2) and a failed training (4) are not repeated."""
        environment = {{**os.environ, **{dict(tick.environment)!r}}}
        code = subprocess.call({words!r}, cwd={str(host.folder)!r}, env=environment)
        if code in {manifests.FINAL_CODES!r}:
            raise AirflowFailException(f"exit code {{code}}")
        if code:
            raise RuntimeError(f"exit code {{code}}")

    tick()
'''
    return {f"{tick.name}.py": text}


def on_host(make: Callable[[Tick, Host], dict[str, str]]) -> "Emitter":
    """Return an emitter that needs no image."""
    return lambda tick, host, _: make(tick, host)


def on_kubernetes(make: Callable[[Tick, Pods], list[manifests.Manifest]]) -> "Emitter":
    """Return an emitter of one YAML file for `kubectl apply -f`."""

    def emit(tick: Tick, _: Host, pods: Pods | None) -> dict[str, str]:
        if pods is None:
            raise ConfigError("image: missing; pass image=registry/vinedresser:tag, see deploy/")
        return {f"{tick.name}.yaml": manifests.to_yaml(make(tick, pods))}

    return emit


Emitter = Callable[[Tick, Host, Pods | None], dict[str, str]]

# Target of `schedule emit` -> files by name.
TARGETS: Mapping[str, Emitter] = MappingProxyType({
    "cron": on_host(cron),
    "systemd": on_host(systemd),
    "airflow": on_host(airflow),
    "k8s": on_kubernetes(manifests.cron_job),
    "rayjob": on_kubernetes(manifests.ray_job),
    "raycronjob": on_kubernetes(manifests.ray_cron_job),
})  # fmt: skip
