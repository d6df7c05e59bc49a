"""Layout of a workspace: the names of all folders and files of runs, sweeps, models and stores.

Values only: nothing here touches the disk. A run, a sweep, a model and a shard set are named by
what they are called and by the digest of their content.
"""

from dataclasses import dataclass
from pathlib import Path


class _Entry:
    """A path inside a folder, by its name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, folder: "_Folder", owner: type) -> Path:
        return folder.path / self._name


@dataclass(frozen=True)
class _Folder:
    """A folder with named entries."""

    path: Path

    @property
    def name(self) -> str:
        """Name of the folder; of a run or sweep, its own name and the beginning of its key."""
        return self.path.name


class BundleFolder(_Folder):
    """Folder of one bundle; its tokenizers name their own files."""

    weights = _Entry("weights.safetensors")
    experiment = _Entry("experiment.json")
    scores = _Entry("scores.json")


class CacheFolder(_Folder):
    """Folder outside of the workspace for what can be made again."""

    shards = _Entry("shards")
    bundles = _Entry("bundles")
    inspections = _Entry("inspections")


class SpoolFolder(_Folder):
    """Folder of what a run has still to deliver to its tracking store: one file per start."""

    # Exclusive right to deliver.
    lease = _Entry(".lease.json")
    # Why the last delivery failed; absent while deliveries succeed.
    problem = _Entry("problem.txt")

    @staticmethod
    def position(start: Path) -> Path:
        """Return the file with the position up to which a start is delivered, and with its run."""
        return start.with_suffix(".json")

    @staticmethod
    def artifacts(start: Path) -> Path:
        """Return the folder of the artifacts that a start's file names."""
        return start.with_suffix(".files")


class RunFolder(_Folder):
    """Folder of one run. Names that begin with a dot outlive `--from-scratch`."""

    experiment = _Entry("experiment.json")
    outcome = _Entry("outcome.json")
    bundle = _Entry("bundle")
    checkpoints = _Entry("checkpoints")
    # Failures, rollbacks and deaths of workers so far; see history.py.
    history = _Entry("history.json")
    # Stacks of ranks that hung, one file per hang and rank.
    hangs = _Entry("hangs")
    # Exclusive work on the folder by one command, and the right of one (re)start to write.
    command_lease = _Entry(".command.json")
    writer_lease = _Entry(".writer.json")
    # Shard set and model that the run needs to resume.
    inputs = _Entry("inputs.json")
    # Present while a stop is requested.
    stop = _Entry("stop")
    # Metrics, tags and artifacts on their way to the tracking store.
    tracking = _Entry(".tracking")
    # Of a worker group: rank 0's progress, the log of all ranks, Ray Train's own files.
    progress = _Entry(".progress.json")
    worker_log = _Entry("workers.log")
    ray_scratch = _Entry("group")

    @property
    def key(self) -> str:
        """Beginning of the run's key."""
        return self.path.name.rpartition("-")[2]

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the checkpoint after a step."""
        return self.checkpoints / f"step-{step:08d}"

    def not_finite(self, step: int, rank: int) -> Path:
        """Return the file with the rows of an update that was left out."""
        return self.path / f"not-finite-{step:08d}-{rank}.json"


class SweepFolder(_Folder):
    """Folder of one sweep."""

    outcome = _Entry("outcome.json")
    # Shard set and model that the sweep needs to resume.
    inputs = _Entry("inputs.json")
    # Optuna's record of trials.
    journal = _Entry("journal.log")
    lease = _Entry(".command.json")
    tracking = _Entry(".tracking")
    # Ray Tune's own files.
    ray_scratch = _Entry("tune")


class ScheduleFolder(_Folder):
    """Folder of one schedule."""

    # The slots that have not ended, and the time up to which all slots are accounted for.
    state = _Entry("state.json")
    # Held by the one process that runs slots.
    lease = _Entry(".command.json")
    # Held by the one process that sends notices.
    notice_lease = _Entry(".notices.json")
    # The corpus files of the pipeline, as long as its code is unchanged.
    plan = _Entry("plan.json")
    # One file per ended slot, written once.
    slots = _Entry("slots")
    # One file per event and receiver, until it is sent; then in the folder below.
    notices = _Entry("notices")
    sent = _Entry("notices/sent")
    logs = _Entry("logs")

    def slot(self, name: str) -> Path:
        """Return the record of an ended slot."""
        return self.slots / f"{name}.json"

    def log(self, name: str) -> Path:
        """Return the log of the processes of a slot."""
        return self.logs / f"{name}.log"

    def result(self, name: str) -> Path:
        """Return the standard output of the last process of a slot."""
        return self.logs / f"{name}.out"

    def tracked(self, name: str) -> Path:
        """Return the file that exists once a slot is a run of the tracking store."""
        return self.logs / f"{name}.tracked"

    def notice(self, name: str, receiver: str) -> Path:
        """Return the file of an event that one receiver has not got yet."""
        return self.notices / f"{name}.{receiver}.json"


class Workspace(_Folder):
    """Folder of shard sets, runs, sweeps, models, schedules and the tracking database."""

    shards = _Entry("shards")
    runs = _Entry("runs")
    sweeps = _Entry("sweeps")
    # Models that are made of others, as by pruning; committed bundles.
    models = _Entry("models")
    # Champions that pipelines train on from, by digest.
    champions = _Entry("champions")
    schedules = _Entry("schedules")
    leases = _Entry(".leases")
    # Of runs without a folder, as those of pipelines: one spool per key.
    tracking = _Entry(".tracking")
    # Folders on their way out; see gc.py.
    trash = _Entry(".trash")
    database = _Entry("mlflow.db")
    artifacts = _Entry("mlartifacts")

    def run(self, name: str, key: str) -> RunFolder:
        """Return the folder of a run, by its experiment's name and its key."""
        return RunFolder(content_folder(self.runs, name, key))

    def sweep_folder(self, name: str, key: str) -> SweepFolder:
        """Return the folder of a sweep, by its study's name and its key."""
        return SweepFolder(content_folder(self.sweeps, name, key))

    def model(self, name: str, digest: str) -> Path:
        """Return the folder of a model that is made of the bundle with the digest."""
        return content_folder(self.models, name, digest)

    def schedule(self, name: str) -> ScheduleFolder:
        """Return the folder of a schedule."""
        return ScheduleFolder(self.schedules / name)

    def pipeline_table(self, name: str) -> Path:
        """Return the file with the closing table of a pipeline."""
        return self.path / f"{name}.json"


def content_folder(parent: Path, name: str, digest: str) -> Path:
    """Return the folder that is called by a name and by the digest of what it is made from."""
    return parent / f"{name}-{digest[:12]}"


def checkpoint_step(path: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def runs_of(workspace: Workspace, name: str) -> list[RunFolder]:
    """Return the folders of all runs of an experiment's name, sorted."""
    if not workspace.runs.is_dir():
        return []
    folders = (p for p in workspace.runs.iterdir() if p.name.rpartition("-")[0] == name)
    return [RunFolder(path) for path in sorted(folders)]
