"""One experiment on N workers -> Outcome. N = 1 runs in this process, without a worker group."""

from pathlib import Path

from vinedresser.config import Experiment
from vinedresser.data.shards import open_shards
from vinedresser.distributed.site import Site
from vinedresser.distributed.worker import execute
from vinedresser.errors import InterruptedRunError, TrainingError
from vinedresser.training.outcome import Outcome, clear, finished, run_folder, tell_changes
from vinedresser.training.progress import Tell, untold
from vinedresser.training.run import Report
from vinedresser.workspace.layout import RunFolder
from vinedresser.workspace.lease import leased, stopping_politely, was_asked


def train(
    experiment: Experiment,
    site: Site,
    *,
    report: Report,
    tell: Tell = untold,
    from_scratch: bool = False,
) -> Outcome:
    """Trains to the end, or recognises that it was done.

    The same loop runs in two hosts: in place for one worker, which starts in a fraction of the
    time, else in a Ray Train worker group. `report` is called in this process either way, except
    inside a Tune trial of several workers, where Ray Train forwards to Tune.

    Args:
        experiment: what to train.
        site: where.
        report: takes what a scheduler is told.
        tell: takes where the run stands: update by update in place; from a worker group twice a
            second, in another thread.
        from_scratch: forget what the run's folder holds.

    Raises:
        TrainingError: the run diverged, or workers failed more often than allowed.
        MachineError: a device, memory or the disk is in the way.
        BusyError: another command trains this very run; a trial waits for it instead.
        InterruptedRunError: SIGTERM; there is a checkpoint of the last update.
    """
    shards = open_shards(Path(site.shards), task=experiment.task)
    folder = run_folder(experiment, shards, Path(site.workspace))
    outcome = finished(folder)
    if outcome is not None and not from_scratch:
        report(outcome.final_report)
        return outcome
    lease, wait = RunFolder(folder).command_lease, 0.0 if site.kind == "train" else None
    with leased(lease, str(folder), wait=wait), stopping_politely(folder):
        if from_scratch:
            clear(folder)
        if site.kind == "train":
            tell_changes(experiment, folder)
        outcome = finished(folder)  # by whom this one has waited for
        if outcome is not None:
            report(outcome.final_report)
        elif experiment.compute.workers == 1:
            outcome = execute(experiment, site, folder=folder, rank=0, report=report, tell=tell)
        else:
            from vinedresser.distributed.group import train_in_group

            train_in_group(experiment, site, folder, tell=tell)
            outcome = finished(folder)
            if outcome is None and was_asked(folder):
                raise InterruptedRunError("told to stop; the same command goes on from there")
    if outcome is None:
        raise TrainingError(f"{folder.name} ended without an outcome; see its run for the reason")
    return outcome
