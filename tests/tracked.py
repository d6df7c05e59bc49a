"""Runs opened in a tracking store, with their spools where those of a workspace are."""

from collections.abc import Mapping
from typing import Any

from vinedresser.tracking import Store, Tracker
from vinedresser.tracking import open_run as open_tracked
from vinedresser.workspace.layout import SpoolFolder


def spool_of(store: Store, key: str) -> SpoolFolder:
    """The spool of a key's run in the workspace of a store."""
    return SpoolFolder(store.leases.parent / "runs" / f"tracked-{key}" / ".tracking")


def open_run(
    store: Store, *, key: str, name: str, tags: Mapping[str, str] = {}, **options: Any
) -> Tracker:
    """A tracker of the key's run."""
    tags = {**tags, "mlflow.runName": name}
    return open_tracked(store, spool_of(store, key), key=key, tags=tags, **options)
