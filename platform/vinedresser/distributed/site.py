"""Site: where the runs of a command read, write and report."""

from dataclasses import dataclass

from vinedresser.tracking import Store


@dataclass(frozen=True)
class Site:
    """Where runs of a command read, write and report; travels to every worker.

    Attributes:
        shards: folder of the task's shard set.
        workspace: folder of runs, sweeps and the tracking database.
        store: tracking store.
        parent: tracking run that new runs hang under, None for none.
        kind: what a run is called in the tracking store: trial, train or prune.
    """

    shards: str
    workspace: str
    store: Store
    parent: str | None = None
    kind: str = "train"
