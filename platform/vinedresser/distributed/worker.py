"""One worker of a run, with its tracking run opened and closed around it."""

import logging
from pathlib import Path

from vinedresser.config import Experiment
from vinedresser.data.shards import open_shards
from vinedresser.distributed.site import Site
from vinedresser.errors import DivergedError
from vinedresser.figures.corpus import log_corpus
from vinedresser.tracking import NullTracker, Tracker, ending, open_run
from vinedresser.training.device import resolve_device
from vinedresser.training.outcome import Outcome, finished
from vinedresser.training.progress import Tell, untold
from vinedresser.training.run import Report, RolledBackError, Run
from vinedresser.workspace.layout import RunFolder

_log = logging.getLogger("vinedresser")


def execute(
    experiment: Experiment,
    site: Site,
    *,
    folder: Path,
    rank: int,
    report: Report,
    tell: Tell = untold,
) -> Outcome | None:
    """Trains as one of the experiment's workers; rank 0 alone tracks, and has an outcome."""
    if (done := finished(folder)) is not None:  # a group that is started again after its end
        report(done.final_report if rank == 0 else {})
        return done if rank == 0 else None
    shards = open_shards(Path(site.shards), task=experiment.task)
    where = resolve_device(experiment.compute, rank=rank)
    tracker = _open(experiment, site, folder) if rank == 0 else NullTracker()
    with ending(tracker):
        while True:
            run = Run(
                experiment, shards, folder, device=where, tracker=tracker, report=report, tell=tell
            )
            try:
                outcome = run.execute()
                break
            except RolledBackError as error:
                if where.world_size > 1:  # the group starts anew, all ranks together
                    raise
                _log.warning("%s", error.args[0])
            except DivergedError:
                run.monitor.picture()
                raise
        if site.kind == "train" and rank == 0:  # trials of a search share one corpus
            log_corpus(tracker, shards)
            run.monitor.picture()
    # Every rank reports equally often; a scheduler may end the process at this last report.
    report(outcome.final_report if outcome is not None else {})
    return outcome


def _open(experiment: Experiment, site: Site, folder: Path) -> Tracker:
    """Return the tracker of the run; it imports MLflow while the first updates are made."""
    return open_run(
        site.store,
        key=RunFolder(folder).key,
        name=folder.name,
        parent=site.parent,
        params=experiment.to_json(),
        tags={
            "vinedresser.kind": site.kind,
            "vinedresser.metric": experiment.task.metric,
            "vinedresser.folder": str(folder),
            "vinedresser.task": experiment.task.name,
            "vinedresser.model": type(experiment.model).__module__,
        },
    )
