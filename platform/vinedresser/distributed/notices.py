"""Notices to the processes of runs through Ray: a requested stop, and the announced loss of a node.

Stop requests are files as well, for runs without Ray; NFS shows a new file to another host after
up to 30 s, Ray within half a second.
"""

import contextlib
import threading
from collections.abc import Collection, Iterator

import ray

from vinedresser.distributed.ray_state import delete_key, draining_nodes, keys_of, put_key
from vinedresser.workspace.layout import RunFolder
from vinedresser.workspace.stopping import (
    announce_loss,
    notices_withdrawn,
    stop_here,
    stop_requested,
)

# Seconds between two looks: two requests to the head node each, which serves thousands per second.
_EVERY = 0.5


class RayStop:
    """Stop request of one command to its runs on all nodes, and their confirmations."""

    def __init__(self) -> None:
        job = ray.get_runtime_context().get_job_id()
        # Of the driver: its workers have the same, and the next command another one.
        self._request, self._stopped = f"stop-{job}", f"stopped-{job}/"

    def request(self) -> None:
        """Request a stop of all runs of this command."""
        put_key(self._request)

    def is_requested(self) -> bool:
        """Return whether a stop is requested."""
        return bool(keys_of(self._request))

    def confirm(self, name: str) -> None:
        """Note that the run whose folder has that name has stopped."""
        put_key(self._stopped + name)

    def confirmed(self) -> Collection[str]:
        """Return the names of the folders of the runs that have stopped."""
        return {key.removeprefix(self._stopped) for key in keys_of(self._stopped)}

    def clear(self) -> None:
        """Remove the request and its confirmations."""
        delete_key(self._request)
        delete_key(self._stopped)


@contextlib.contextmanager
def receiving_notices(nodes: Collection[str]) -> Iterator[None]:
    """Stop the run of this process at a stop request, or when one of the nodes is to be lost.

    Args:
        nodes: Ray's ids of the nodes that the run's workers are on.
    """
    stop, ended = RayStop(), threading.Event()

    def look() -> None:
        while not ended.wait(_EVERY):
            # Without an answer of the head node nothing is known: the next look may have one.
            with contextlib.suppress(Exception):
                if draining_nodes() & set(nodes):
                    announce_loss()
                if stop.is_requested():
                    stop_here()

    thread = threading.Thread(target=look, name="notices", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        notices_withdrawn()


@contextlib.contextmanager
def forwarding_stop(folder: RunFolder) -> Iterator[None]:
    """Pass a stop request for a run on to its workers, which may see the file much later."""
    stop, ended = RayStop(), threading.Event()
    stop.clear()  # of an earlier run of this process

    def look() -> None:
        while not ended.wait(_EVERY):
            if stop_requested(folder):
                stop.request()
                return

    thread = threading.Thread(target=look, name="stop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
