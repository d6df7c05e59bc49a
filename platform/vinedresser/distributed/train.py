"""Train one experiment on N workers. One worker runs in this process, or on a named cluster.

Importing imports no ray.
"""

import logging

from vinedresser.config import Experiment
from vinedresser.distributed.context import RunContext
from vinedresser.errors import DivergedError, TrainingError
from vinedresser.figures.corpus import log_corpus
from vinedresser.health.monitor import RunMonitor
from vinedresser.health.series import RunFacts
from vinedresser.tracking import NullTracker, Tracker, ending, open_run
from vinedresser.training.device import resolve_device
from vinedresser.training.listener import Listener
from vinedresser.training.outcome import Outcome, clear, finished, record_experiment, run_folder
from vinedresser.training.run import RolledBackError, Run
from vinedresser.workspace.inputs import write_inputs
from vinedresser.workspace.layout import RunFolder, SpoolFolder
from vinedresser.workspace.lease import leased
from vinedresser.workspace.stopping import graceful_stop

_log = logging.getLogger(__name__)


def train(
    experiment: Experiment,
    context: RunContext,
    *,
    listener: Listener | None = None,
    from_scratch: bool = False,
) -> Outcome:
    """Train to the end, or return the outcome of a run that has ended before.

    Args:
        experiment: the run.
        context: data, folders, tracking store.
        listener: receives progress after every update in place, twice per second from a worker
            group; evaluations; and the final report. Inside a Tune trial of several workers, Ray
            Train forwards the reports to Tune.
        from_scratch: delete what the run's folder holds.

    Raises:
        TrainingError: the run diverged, or workers failed more often than allowed.
        MachineError: a device, memory or the disk is in the way.
        BusyError: another command trains this very run; a trial waits for it instead.
        InterruptedRunError: a stop was requested; there is a checkpoint of the last update.
    """
    listener = listener or Listener()
    folder = run_folder(experiment, context.shards, context.workspace)
    outcome = None if from_scratch else finished(folder)
    if outcome is not None:
        listener.finished(outcome.final_report)
        return outcome
    wait = 0.0 if context.kind == "train" else None
    with leased(folder.command_lease, str(folder.path), wait=wait), graceful_stop(folder):
        if from_scratch:
            clear(folder)
        write_inputs(folder.inputs, context.shards.folder, experiment.init)
        if context.kind == "train":
            record_experiment(experiment, folder)
        if (outcome := finished(folder)) is not None:  # of the command that held the lease
            listener.finished(outcome.final_report)
        elif experiment.compute.workers == 1 and not context.is_remote:
            outcome = run_worker(experiment, context, folder, rank=0, listener=listener)
        else:
            from vinedresser.distributed.group import train_in_group

            train_in_group(experiment, context, folder, listener=listener)
            outcome = finished(folder)
    if outcome is None:
        raise TrainingError(f"{folder.name} ended without an outcome; see its run for the reason")
    return outcome


def run_worker(
    experiment: Experiment, context: RunContext, folder: RunFolder, *, rank: int, listener: Listener
) -> Outcome | None:
    """Train as one worker of the experiment; rank 0 tracks and returns the outcome."""
    outcome = finished(folder)  # a group that is restarted after its end
    device = resolve_device(experiment.compute, rank=rank)
    tracker: Tracker = NullTracker()
    if rank == 0 and outcome is None:
        # It imports MLflow in a thread, while the first updates are made.
        tracker = open_run(
            context.store,
            SpoolFolder(folder.tracking),
            key=folder.key,
            parent=context.parent,
            params=experiment.to_json(),
            tags={
                "mlflow.runName": folder.name,
                "vinedresser.kind": context.kind,
                "vinedresser.metric": experiment.task.metric,
                "vinedresser.folder": str(folder.path),
                "vinedresser.task": experiment.task.name,
                "vinedresser.model": type(experiment.model).__module__,
            },
        )
    with ending(tracker):
        while outcome is None:
            run = Run(
                experiment,
                context.shards,
                folder,
                device=device,
                tracker=tracker,
                listener=listener,
            )
            monitor = None
            if rank == 0:
                facts = RunFacts.of(experiment, vocabulary=run.tokenizers[1].size)
                monitor = RunMonitor(run.model, facts, tracker, every=run.schedule.log_every)
            try:
                outcome = run.execute(monitor)
            except RolledBackError as error:
                if device.world_size > 1:  # the group restarts, all ranks together
                    raise
                _log.warning("%s", error.args[0])
                continue
            except DivergedError:
                if monitor is not None:
                    monitor.picture()
                raise
            if outcome is not None:
                tracker.tag({"vinedresser.bundle": outcome.bundle})
            if monitor is not None and context.kind == "train":  # trials share one corpus
                log_corpus(tracker, context.shards)
                monitor.picture()
            break
    # Every rank reports equally often; a scheduler may end the process at this last report.
    listener.finished(outcome.final_report if outcome is not None and rank == 0 else {})
    return outcome if rank == 0 else None
