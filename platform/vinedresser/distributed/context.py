"""Run context: the opened values that the runs of one command share."""

from dataclasses import dataclass

from vinedresser.data.shards import ShardSet
from vinedresser.tracking import Store
from vinedresser.workspace.layout import Workspace


@dataclass(frozen=True)
class RunContext:
    """Data, folders and tracking store of the runs of a command; sent to every worker.

    Attributes:
        shards: the task's shard set, opened and verified by the command.
        workspace: folder of runs, sweeps and the tracking database; every node sees it.
        store: tracking store.
        parent: key of the tracking run that new runs are part of, of a sweep or pipeline; None for
            none.
        kind: kind of the runs in the tracking store: train, trial or prune.
        is_remote: true where the user named a cluster: then work of one process goes there too.
    """

    shards: ShardSet
    workspace: Workspace
    store: Store
    parent: str | None = None
    kind: str = "train"
    is_remote: bool = False
