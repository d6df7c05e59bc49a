"""Notices of events to webhooks and commands: kept in files until they are sent, each once.

A receiver that does not answer delays no slot: notices are sent after the ends are stored, each
receiver in its own thread, for some seconds; later ticks try again. A URL is a secret: it is read
from the environment at the moment of sending and appears in no message, log or file.
"""

import contextlib
import json
import logging
import os
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any

from vinedresser.errors import BusyError, MachineError
from vinedresser.schedule.definition import Event, Notice, Schedule
from vinedresser.schedule.when import written
from vinedresser.workspace.commit import digest_of
from vinedresser.workspace.layout import ScheduleFolder
from vinedresser.workspace.lease import leased
from vinedresser.workspace.storage import POSIX, disk_errors, parsed_object, write_file

_log = logging.getLogger(__name__)

# Seconds for all notices of a tick, and for one.
PATIENCE = 5.0
# Part of the time left that one notice may take: its failure is noted in the rest.
_SHARE = 0.8
# Before the second try of a notice; doubles up to an hour, for a day.
_BACKOFF, _LONGEST, _GIVE_UP = timedelta(seconds=30), timedelta(hours=1), timedelta(days=1)


def receiver_key(notice: Notice) -> str:
    """Return the name of a receiver, by which its notices are kept."""
    return digest_of([notice.url_env, notice.command])[:8]


def enqueue(
    schedule: Schedule, folder: ScheduleFolder, event: Event, name: str, content: Mapping[str, Any]
) -> None:
    """Note an event for each receiver that is to get it; once, however often it is noted."""
    for notice in schedule.notify:
        key = receiver_key(notice)
        path = folder.notice(f"{event}-{name}", key)
        if event not in notice.on or (folder.sent / path.name).exists():
            continue
        reason = str(content.get("reason", ""))
        payload = {
            "id": digest_of([schedule.name, event, name, key])[:16],
            "schedule": schedule.name,
            "event": event,
            "name": name,
            "text": f"{schedule.name}: {event}{f': {reason}' if reason else ''}",
            **{k: content[k] for k in ("slot", "state", "reason", "result") if k in content},
        }
        text = json.dumps({"receiver": key, "tries": 0, "event": payload}, indent=1) + "\n"
        POSIX.replace(path, text.encode(), expected=None)


def deliver_notices(
    schedule: Schedule, folder: ScheduleFolder, now: datetime, *, patience: float = PATIENCE
) -> None:
    """Send the notices that are not sent yet; by one process at a time."""
    receivers = {receiver_key(notice): notice for notice in schedule.notify}
    until = time.monotonic() + patience
    try:
        with leased(folder.notice_lease, "notices", wait=patience):
            threads = []
            for key, notice in receivers.items():
                paths = sorted(folder.notices.glob(f"*.{key}.json"))
                if due := [path for path in paths if _is_due(path, now)]:
                    words = (notice, due, folder, now, until)
                    threads.append(threading.Thread(target=_send_all, args=words, daemon=True))
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(max(until - time.monotonic(), 0))
    except BusyError:
        pass  # its holder sends them, or a later tick


def waiting_notices(folder: ScheduleFolder, now: datetime) -> int:
    """Return the number of notices that are due to be sent."""
    return sum(_is_due(path, now) for path in folder.notices.glob("*.json"))


def _is_due(path: Path, now: datetime) -> bool:
    found = parsed_object(POSIX.read(path)).get("not_before", "")
    return bool(not found or found <= written(now))


def _send_all(
    notice: Notice, paths: Sequence[Path], folder: ScheduleFolder, now: datetime, until: float
) -> None:
    """Send notices to one receiver, in order, up to the first that fails."""
    for path in paths:
        left = until - time.monotonic()
        content = parsed_object(POSIX.read(path))
        if left <= 0 or not content:
            return
        problem = send(notice, content["event"], timeout=_SHARE * left)
        with contextlib.suppress(MachineError):  # sent again later
            if not problem:
                with disk_errors(path):
                    folder.sent.mkdir(exist_ok=True)
                    path.replace(folder.sent / path.name)
                continue
            tries = int(content["tries"]) + 1
            first = content.get("first_try", written(now))
            pause = min(_BACKOFF * 2 ** min(tries - 1, 20), _LONGEST)
            if written(now - _GIVE_UP) > first:
                pause = timedelta(days=36500)
            changed = {"tries": tries, "first_try": first, "not_before": written(now + pause)}
            write_file(path, json.dumps({**content, **changed, "problem": problem}, indent=1))
        _log.warning("notice %s: %s", path.name, problem)
        return


def send(notice: Notice, event: Mapping[str, Any], *, timeout: float) -> str:
    """Send one event; return the problem, in words that hold no secret, or ""."""
    content = json.dumps(event).encode()
    if notice.command is not None:
        return _run(notice.command, content, timeout)
    name = notice.url_env or ""
    url = os.environ.get(name, "")
    if not url.startswith(("http://", "https://")):
        return f"the environment variable {name} holds no http(s) URL; set it for the scheduler"
    headers = {"Content-Type": "application/json", "Idempotency-Key": str(event["id"])}
    try:
        request = urllib.request.Request(url, content, headers)  # noqa: S310 - http(s) alone
        opener = urllib.request.build_opener(_NoRedirect)
        with opener.open(request, timeout=max(timeout, 0.1)) as answer:
            answer.read(1)
    except urllib.error.HTTPError as error:
        return f"the receiver of {name} answers {error.code}"
    except (OSError, HTTPException, ValueError) as error:
        cause = getattr(error, "reason", error)
        return f"the receiver of {name} does not answer: {type(cause).__name__}"
    return ""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """No redirects: an event goes to the host that its URL names, or nowhere."""

    def redirect_request(
        self,
        req: urllib.request.Request,  # noqa: ARG002
        fp: IO[bytes],  # noqa: ARG002
        code: int,  # noqa: ARG002
        msg: str,  # noqa: ARG002
        headers: Message,  # noqa: ARG002
        newurl: str,  # noqa: ARG002
    ) -> None:
        """Follow none."""
        return


def _run(command: Sequence[str], content: bytes, timeout: float) -> str:
    try:
        done = subprocess.run(  # noqa: S603 - the user's own command, as a list of words
            command, input=content, timeout=timeout, capture_output=True, check=False
        )
    except subprocess.TimeoutExpired:
        return f"{command[0]} did not end in {timeout:.0f} s"
    except OSError as error:
        return f"{command[0]}: {(error.strerror or 'cannot be run').lower()}"
    return f"{command[0]} ended with {done.returncode}" if done.returncode else ""
