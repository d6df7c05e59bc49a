"""Faults of a training run: kills, bad numbers, no memory (tests/test_faults.py)."""

import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import vinedresser.distributed.train
from tests.short_run import KilledError, Reports, a_run, experiment, folder_of, killed_run, script
from vinedresser.config import Experiment, Tokenizer
from vinedresser.data.batching.reader import Batches, load_split
from vinedresser.data.shards import ShardSet, prepare, tokenizers
from vinedresser.decode import length_limits
from vinedresser.distributed.context import RunContext
from vinedresser.distributed.train import run_worker, train
from vinedresser.errors import BusyError, DivergedError, InterruptedRunError, MachineError
from vinedresser.evaluate import Scoring, evaluate
from vinedresser.special_ids import BOS, EOS, PAD, UNK
from vinedresser.tracking import NullTracker, store_for
from vinedresser.tracking.store import initialise
from vinedresser.training.checkpoint import newest_checkpoint
from vinedresser.training.outcome import Outcome, finished, record_experiment
from vinedresser.training.run import Run
from vinedresser.training.watchdog import Watchdog
from vinedresser.workspace.history import RunHistory
from vinedresser.workspace.layout import Workspace
from vinedresser.workspace.lease import Lease
from vinedresser.workspace.storage import read_json

pytestmark = pytest.mark.usefixtures("one_thread")


def untracked(*_: Any, **__: Any) -> NullTracker:
    return NullTracker()


def command(
    config: Experiment, shards: ShardSet, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> Outcome:
    """What `vinedresser train` does, without a tracking store."""
    monkeypatch.setattr(vinedresser.distributed.train, "open_run", untracked)
    site = RunContext(shards, Workspace(workspace), store_for(workspace, "faults"), kind="prune")
    return train(config, site)


def weights(run: Run) -> dict[str, bytes]:
    return {name: t.numpy().tobytes() for name, t in run.model.state_dict().items()}


@pytest.fixture(scope="module")
def whole(reversal: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Outcome]:
    """The run that nothing happens to."""
    torch.set_num_threads(1)
    run = a_run(experiment(reversal), reversal, tmp_path_factory.mktemp("whole"))
    outcome = run.execute()
    assert outcome is not None
    return run, outcome


def poison(run: Run, at: int) -> None:
    """Makes one gradient of an update not a number."""

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.nan if run.step + 1 == at else gradient

    next(iter(run.model.parameters())).register_hook(spoil)


@pytest.mark.fault("T01")
def test_t01_a_gradient_that_is_not_a_number_stops_the_run(reversal, whole, tmp_path):
    config = experiment(reversal)
    run = a_run(config, reversal, tmp_path)
    poison(run, 7)
    with pytest.raises(
        DivergedError, match=r"step 7: loss [\d.]+ nats per token, gradient norm nan"
    ):
        run.execute()
    # The rows of that update are left to be looked at.
    rows = json.loads((run.folder.path / "not-finite-00000007-0.json").read_text())
    batches = Batches(reversal, config.batch, seed=config.seed)
    assert sorted(row["row"] for row in rows) == sorted(batches.rows(6).tolist())
    assert all(set(row["target"]) <= set("abcdef ") and row["source"] for row in rows)
    # Nothing that is not finite was stored, and nothing of it was judged.
    checkpoint = newest_checkpoint(run.folder)
    assert checkpoint is not None
    assert checkpoint.step == 5
    states = [checkpoint.states[name] for name in ("model", "ema", "optimizer")]
    assert all(t.isfinite().all() for tensors in states for t in tensors.values())
    assert run.evaluator.history == []
    again = a_run(config, reversal, tmp_path)
    again.execute()
    assert weights(again) == weights(whole[0])


@pytest.mark.fault("T01")
def test_t01_a_gradient_that_is_not_a_number_is_left_out(reversal, whole, tmp_path):
    run = a_run(experiment(reversal, **{"optim.max_skipped": 1}), reversal, tmp_path)
    poison(run, 7)
    outcome = run.execute()
    assert outcome is not None
    assert all(t.isfinite().all() for t in run.model.state_dict().values())
    assert all(math.isfinite(entry["value"]) for entry in outcome.history)
    assert weights(run) != weights(whole[0])
    skipped = [v for key, v, step in run.tracker.metrics if key == "train/skipped_updates"]
    assert (skipped[0], skipped[-1]) == (0, 1)
    twice = a_run(experiment(reversal, **{"optim.max_skipped": 1, "seed": 2}), reversal, tmp_path)
    poison(twice, 7)
    poison(twice, 12)
    with pytest.raises(DivergedError, match="step 12"):
        twice.execute()


@pytest.mark.fault("T02")
def test_t02_a_rate_of_a_thousand_goes_back_so_often_and_no_more(
    reversal, tmp_path, monkeypatch, caplog
):
    config = experiment(
        reversal, **{"optim.lr": 1e3, "optim.warmup_steps": 0, "optim.rollbacks": 2}
    )
    with pytest.raises(DivergedError, match=r"step \d+: loss .* nats per token") as caught:
        command(config, reversal, tmp_path, monkeypatch)
    assert caught.value.exit_code == 4
    assert caplog.text.count("rollback 1 of 2") == 1
    assert caplog.text.count("rollback 2 of 2") == 1
    folder = folder_of(config, reversal, tmp_path)
    assert RunHistory(folder.history).rollbacks == 2
    assert finished(folder) is None


@pytest.mark.fault("T02")
def test_t02_a_rollback_goes_on_at_half_the_rate(reversal, tmp_path, monkeypatch):
    """It explodes at step 12 of the first attempt, and at no other."""
    config = experiment(reversal, **{"optim.rollbacks": 1})
    runs: list[Run] = []
    execute = Run.execute

    def watched(run: Run, monitor: Any = None) -> Outcome | None:
        runs.append(run)
        if len(runs) == 1:
            poison(run, 12)
        return execute(run, monitor)

    monkeypatch.setattr(Run, "execute", watched)
    rates: dict[int, list[float]] = {}
    steps = sys.modules["vinedresser.training.run"].training_steps

    def told(*words: Any, **more: Any) -> Iterator[Any]:
        for step in steps(*words, **more):
            rates.setdefault(step.index, []).append(step.learning_rate)
            yield step

    monkeypatch.setattr("vinedresser.training.run.training_steps", told)
    outcome = command(config, reversal, tmp_path, monkeypatch)
    assert len(runs) == 2
    assert [len(rates[step]) for step in (10, 11, 12, 13)] == [1, 2, 2, 2] or len(rates[12]) == 2
    assert rates[11][1] == rates[11][0] / 2
    assert outcome.best_step > 0


@pytest.mark.fault("T03")
def test_t03_memory_that_runs_out_once(reversal, whole, tmp_path, caplog):
    """methods.md 34: sums over an update do not depend on how it is cut."""
    config = experiment(reversal, **{"model.dropout": 0, "model.attention_dropout": 0})
    plain = a_run(config, reversal, tmp_path / "plain")
    assert plain.execute() is not None
    run, calls = a_run(config, reversal, tmp_path), [0]
    encode = run.model.encode

    def scarce(source_BS: torch.Tensor, lengths_B: torch.Tensor) -> Any:
        calls[0] += 1
        if calls[0] == 4:  # the first is the monitor's, of the first loss
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(source_BS, lengths_B)

    run.model.encode = scarce
    assert run.execute() is not None
    assert re.search(
        r"step 3: out of memory at (\d+) x \d+ source and \1 x \d+ target", caplog.text
    )
    assert calls[0] > 24 + 10  # most updates go in parts from then on
    # Bounds of 1e-6 at the gradient grow in Adam, which divides by small ones.
    for name, tensor in run.model.state_dict().items():
        if not name.endswith("key_value.bias"):  # its gradient is rounding
            torch.testing.assert_close(tensor, plain.model.state_dict()[name], atol=1e-4, rtol=0)


def test_t03_memory_that_is_not_there(reversal, tmp_path):
    run = a_run(experiment(reversal), reversal, tmp_path)

    def scarce(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    run.model.encode = scarce
    with pytest.raises(MachineError, match=r"step 1: out of memory at 1 x \d+ source .*peak") as e:
        run.execute()
    assert e.value.exit_code == 3


# The limit is what is in use before the first update, and so many MiB more.
LIMITED = """
import resource
import vinedresser.training.run
# A thread that reads ahead would take of the room when the load of the machine lets it.
vinedresser.training.run.prefetched = lambda batches: batches
run = a_run(folder_of(config, shards, Path(sys.argv[3])))
encode = run.model.encode
def limited(*words):
    run.model.encode = encode
    used = int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1])
    limit = used * 1024 + (int(sys.argv[4]) << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    return encode(*words)
run.model.encode = limited
# Nothing of the limit is left for the stack of the thread that beats while a bundle is written.
finish = run._finish
def finished():
    resource.setrlimit(resource.RLIMIT_AS, 2 * (resource.RLIM_INFINITY,))
    return finish()
run._finish = finished
try:
    print("value", run.execute().value)
except VinedresserError as error:
    resource.setrlimit(resource.RLIMIT_AS, 2 * (resource.RLIM_INFINITY,))
    print(type(error).__name__, error.exit_code, error)
"""


@pytest.mark.fault("T04")
@pytest.mark.parametrize(("room", "ends"), [(150, "value"), (8, "MachineError 3")])
def test_t04_a_limit_on_memory(reversal, tmp_path, room, ends):
    """An update takes over 500 MB and one row 20 MB; with less room it goes in parts."""
    config = experiment(
        reversal, steps=1, **{"model.d_ff": 20_000, "batch.max_padded_tokens": 4096,
            "evaluation.num_evaluations": 1,
                              "decoding.max_padded_tokens": 16, "optim.warmup_steps": 0}
    )  # fmt: skip
    code, words = script(LIMITED, config, reversal, tmp_path, room)
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True, text=True, check=False, env=environment, timeout=200,
    )  # fmt: skip
    assert done.stdout.startswith(ends), done.stdout + done.stderr[-2000:]
    assert "out of memory at 400 x 7 source" in done.stderr
    if ends != "value":
        assert re.search(r"peak \d\.\d GiB of memory", done.stdout)


@pytest.mark.fault("T06")
def test_t06_a_kill_while_the_tracking_database_is_made(tmp_path, monkeypatch):
    """A half-made one would keep every later command of the workspace from its tracking."""
    store, real = store_for(tmp_path, "faults"), Path.replace

    def killed(path: Path, target: Path) -> Path:
        if ".new-" in path.name:
            raise KilledError
        return real(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KilledError):
        initialise(store)
    monkeypatch.undo()
    (left,) = tmp_path.glob(".*.new-*")
    left.write_bytes(left.read_bytes()[:5000])
    assert not Path(store.uri.removeprefix("sqlite:///")).exists()
    initialise(store)
    assert not list(tmp_path.glob(".*.new-*"))


@pytest.mark.fault("T06")
def test_t06_a_finished_run_is_not_begun_again(reversal, tmp_path, monkeypatch):
    """Its last worker died after the outcome was written, and its group is started again."""
    config = experiment(reversal)
    outcome, told = command(config, reversal, tmp_path, monkeypatch), list[Mapping[str, Any]]()
    site = RunContext(reversal, Workspace(tmp_path), store_for(tmp_path, "faults"))
    folder = folder_of(config, reversal, tmp_path)
    before = sorted(folder.path.rglob("*"))
    for rank in (0, 1):
        listener = Reports(told.append)
        again = run_worker(config, site, folder, rank=rank, listener=listener)
        assert again == (outcome if rank == 0 else None)
    assert told == [outcome.final_report, {}]
    assert sorted(folder.path.rglob("*")) == before


@pytest.mark.fault("T08")
def test_t08_an_overtaken_attempt_writes_no_more(reversal, tmp_path):
    """It was declared dead, wakes up after another has begun, and comes to its next checkpoint."""
    config = experiment(reversal)

    def overtaken(values: Mapping[str, Any]) -> None:
        if values["step"] == 8:
            Lease(run.folder.writer_lease).take(force=True)

    run = a_run(config, reversal, tmp_path, overtaken)
    with pytest.raises(BusyError, match="a later start has taken over; this one writes no more"):
        run.execute()
    assert [p.name for p in (run.folder.path / "checkpoints").iterdir()] == ["step-00000005"]
    assert not (run.folder.path / "bundle").exists()
    # Nor does it count as a failure of the run.
    assert not (read_json(run.folder.history) or {}).get("failures")


STOPPED = """
folder = folder_of(config, shards, Path(sys.argv[3]))
with leased(folder.command_lease, "run"):
    os.kill(os.getpid(), signal.SIGSTOP)
    print(a_run(folder).execute().best_step)
"""


@pytest.mark.fault("T08")
def test_t08_a_stopped_command_keeps_its_folder(reversal, whole, tmp_path, monkeypatch, forked):
    config = experiment(reversal)
    code, words = script(STOPPED, config, reversal, tmp_path)
    stopped, end = forked(*words, code=code), time.monotonic() + 200
    process = psutil.Process(stopped.pid)
    while process.status() != psutil.STATUS_STOPPED and time.monotonic() < end:
        time.sleep(0.01)
    monkeypatch.setattr("vinedresser.distributed.train.open_run", lambda *_, **__: NullTracker())
    site = RunContext(reversal, Workspace(tmp_path), store_for(tmp_path, "faults"))
    with pytest.raises(BusyError, match=f"in use by process {stopped.pid} on ") as caught:
        train(config, site)
    assert caught.value.exit_code == 75
    stopped.send_signal(signal.SIGCONT)
    assert stopped.communicate(timeout=120)[0] == f"{whole[1].best_step}\n"
    # The lock of a dead process is free.
    assert train(config, site).best_step == whole[1].best_step


# Two ranks of gloo, or one, train until they have made an update and die, or until rank 0 evaluates
# and they are told to stop. Next attempt.
RANKS = """
import torch.distributed as dist
from vinedresser.workspace.stopping import request_stop
from vinedresser.errors import InterruptedRunError
from vinedresser.training import evaluator, run as runner
real = runner.training_steps

def train(rank, workers, until, workspace, store):
    if workers > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=workers
        )
    def steps(*words, **more):
        trace = (workspace / f"trace-{rank}").open("a")
        for step in real(*words, **more):
            print(step.index, float(step.nll).hex(), int(step.tokens), file=trace, flush=True)
            yield step
            if step.index == until:
                dist.barrier() if workers > 1 else None
                os.kill(os.getpid(), signal.SIGKILL)
    runner.training_steps = steps
    folder = folder_of(config, shards, workspace)
    evaluate = evaluator.evaluate
    def told_to_stop(*words, **more):
        request_stop(folder)
        time.sleep(0.3)  # a run looks for that five times a second
        return evaluate(*words, **more)
    emit = runner.Run._emit
    def emitted(run, metrics, step):
        if "train/loss" in metrics:
            with (workspace / f"losses-{rank}").open("a") as losses:
                print(step, metrics["train/loss"], file=losses)
        emit(run, metrics, step)
    runner.Run._emit = emitted
    if until == "judged":
        evaluator.evaluate = told_to_stop
    try:
        a_run(folder, Device(torch.device("cpu"), None, rank, workers)).execute()
    except InterruptedRunError as error:
        with (workspace / f"stopped-{rank}").open("a") as stopped:
            print(error.args[0], file=stopped)
        (folder.path / "stop").unlink(missing_ok=True)
        os._exit(75)

whole = config
for name, parts in json.loads(sys.argv[4]).items():
    for number, (workers, until) in enumerate(parts):
        workspace = Path(sys.argv[3]) / name
        workspace.mkdir(exist_ok=True)
        config = whole.override({"compute.workers": workers})
        children = []
        for rank in range(workers):
            children.append(os.fork())
            if not children[-1]:
                train(rank, workers, until, workspace, workspace / f"store-{number}")
                os._exit(0)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert codes == workers * [{0: 0, "judged": 75}.get(until, -9)], codes
"""


def nats_of(workspace: Path) -> dict[int, tuple[float, int]]:
    """Update -> nats and tokens of all ranks; an update that was made twice counts once."""
    found: dict[int, dict[tuple[str, str], tuple[float, int]]] = {}
    for path in sorted(workspace.glob("trace-*")):
        for line in path.read_text().splitlines():
            index, nats, tokens = line.split()
            found.setdefault(int(index), {})[path.name] = (float.fromhex(nats), int(tokens))
    return {
        index: (sum(n for n, _ in ranks.values()), sum(t for _, t in ranks.values()))
        for index, ranks in found.items()
    }


@pytest.mark.fault("T14")
@pytest.mark.slow
def test_t14_two_workers_one_and_two_again(reversal, tmp_path, forked):
    """Two batches an update, whoever reads them; dropout draws by batch, not by rank."""
    config = experiment(reversal, **{"batch.per_update": 2, "batch.max_padded_tokens": 80})
    parts = {
        "one": [(1, 0)],
        "two": [(2, 0)],
        "both": [(2, 10), (1, 20), (2, 0)],
        "told": [(2, "judged"), (2, "judged"), (2, 0)],
    }
    code, words = script(RANKS, config, reversal, tmp_path, json.dumps(parts))
    process = forked(*words, code=code)
    assert process.wait(timeout=580) == 0, process.err.read_text()[-2000:]
    one, two, both, told = (nats_of(tmp_path / name) for name in parts)
    assert sorted(one) == sorted(two) == sorted(both) == list(range(1, 25))
    for index in one:
        assert one[index][1] == two[index][1] == both[index][1]
        assert two[index][0] == pytest.approx(one[index][0], rel=1e-6)
        assert both[index][0] == pytest.approx(one[index][0], rel=1e-6)
    # What is logged is of all ranks.
    logged = [tmp_path / name for name in ("one/losses-0", "two/losses-0", "two/losses-1")]
    by_one, by_first, by_second = (
        dict(map(str.split, path.read_text().splitlines())) for path in logged
    )
    assert by_first == by_second
    assert {step: float(loss) for step, loss in by_first.items()} == pytest.approx(
        {step: float(loss) for step, loss in by_one.items()}, rel=1e-6
    )
    # Told to stop while rank 0 evaluates, all ranks do at once; nothing is taken twice or left out.
    assert told == two
    for rank in (0, 1):
        stops = (tmp_path / f"told/stopped-{rank}").read_text().splitlines()
        assert ["stopped on request at step 8;" in stop for stop in stops] == [True, True]
    ends = [json.loads(path.read_text()) for path in tmp_path.glob("t*/runs/*/outcome.json")]
    assert len(ends) == 2
    assert ends[0]["history"] == ends[1]["history"]


@pytest.mark.slow
def test_t14_three_workers_go_on_with_the_same_bits(reversal, tmp_path, forked):
    """Sums of three addends depend on their order, which DDP must not change on its way."""
    config = experiment(reversal, **{"batch.per_update": 3, "batch.max_padded_tokens": 80})
    parts = {"whole": [(3, 0)], "killed": [(3, 12), (3, 0)]}
    code, words = script(RANKS, config, reversal, tmp_path, json.dumps(parts))
    process = forked(*words, code=code)
    assert process.wait(timeout=580) == 0, process.err.read_text()[-2000:]
    whole, killed = (nats_of(tmp_path / name) for name in parts)
    assert sorted(whole) == list(range(1, 25))
    assert killed == whole
    ends = [json.loads(path.read_text()) for path in tmp_path.glob("*/runs/*/outcome.json")]
    assert ends[0]["history"] == ends[1]["history"]


def test_t10_an_evaluation_that_is_made_up_for_has_its_time(reversal, tmp_path, monkeypatch):
    config = experiment(reversal)
    told = a_run(config, reversal, tmp_path)
    told.evaluator.evaluate = lambda *_: (_ for _ in ()).throw(InterruptedRunError("told to stop"))
    with pytest.raises(InterruptedRunError):
        told.execute()
    beats = []
    monkeypatch.setattr(Watchdog, "reset", lambda _, step, pause=1.0: beats.append((step, pause)))
    a_run(config, reversal, tmp_path).execute()
    assert beats[:3] == [(8, Watchdog.EVALUATION), (8, Watchdog.CHECKPOINT), (9, 1.0)]
    evaluated = [step for step, pause in beats if pause == Watchdog.EVALUATION]
    assert sorted(set(evaluated)) == [8, 16, 24]
    stored = [step for step, pause in beats if pause == Watchdog.CHECKPOINT]
    assert stored == [8, 10, 15, 20]


@pytest.mark.fault("T15")
def test_t15_other_threads_are_told(reversal, whole, tmp_path, caplog):
    config = experiment(reversal)
    killed_run(config, reversal, tmp_path, 16)
    assert a_run(config, reversal, tmp_path)._resume() == 15
    assert "bit-exact" not in caplog.text
    torch.set_num_threads(2)
    try:
        assert a_run(config, reversal, tmp_path)._resume() == 15
    finally:
        torch.set_num_threads(1)
    assert "not bit-exact from here on: threads 1 -> 2" in caplog.text


@pytest.mark.fault("T16")
@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("optim.lr", 0.01, "optim.lr 0.002 -> 0.01"),
        ("model.dropout", 0.3, "model.dropout 0.1 -> 0.3"),
        ("batch.max_padded_tokens", 80, "batch.max_padded_tokens 160 -> 80"),
        ("seed", 7, "seed 1 -> 7"),
        (
            "objective.likelihood.label_smoothing",
            0.1,
            "objective.likelihood.label_smoothing 0.0 -> 0.1",
        ),
    ],
)
def test_t16_a_changed_key_is_another_run(reversal, tmp_path, caplog, key, value, said):
    config = experiment(reversal)
    before = folder_of(config, reversal, tmp_path)
    record_experiment(config, before)
    assert caplog.text == ""
    changed = config.override({key: value})
    folder = folder_of(changed, reversal, tmp_path)
    assert folder != before
    with caplog.at_level(logging.INFO, "vinedresser"):
        record_experiment(changed, folder)
    assert f"the unfinished {before.name} differs: {said}" in caplog.text


@pytest.mark.fault("T16")
def test_t16_other_data_are_another_run(reversal, tmp_path):
    config = experiment(reversal)
    other = reversal.task.model_copy(update={"tokenizer": Tokenizer(kind="characters")})
    shards = prepare(other, tmp_path / "shards", executor="in_process")
    moved = config.model_copy(update={"task": other})
    assert folder_of(moved, shards, tmp_path) != folder_of(config, reversal, tmp_path)
    # What changes nothing of what is learned is no other run: it goes on.
    for key, value in (("compute.threads", 2), ("checkpoint_every", 9), ("keep_checkpoints", 4)):
        same = config.override({key: value})
        assert folder_of(same, reversal, tmp_path) == folder_of(config, reversal, tmp_path)


# T18 itself cannot happen: the training thread writes the checkpoints, none in the background.
@pytest.mark.fault("T18")
@pytest.mark.parametrize("call", [1, 4, 7])
def test_t18_a_failing_disk_is_told_at_once(reversal, whole, tmp_path, monkeypatch, call):
    """The second checkpoint's n-th sync fails; the step that wants it stored is the one to fail."""
    config, calls, real = experiment(reversal), [0], os.fsync
    run = a_run(config, reversal, tmp_path)

    def failing(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if "step-00000010" in str(path):
            assert threading.current_thread() is threading.main_thread()
            calls[0] += 1
            if calls[0] == call:
                raise OSError(5, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(MachineError, match="input/output error; name another disk"):
        run.execute()
    monkeypatch.undo()
    assert run.step == 10
    assert [p.name for p in (run.folder.path / "checkpoints").iterdir()] == ["step-00000005"]
    again = a_run(config, reversal, tmp_path)
    assert again.execute() is not None
    assert weights(again) == weights(whole[0])


@pytest.mark.fault("T19")
def test_t19_the_reader_fails(reversal, whole, tmp_path, monkeypatch):
    """Its thread reads ahead: updates whose batches were read are made, then its error comes."""
    config, real = experiment(reversal), Batches.__getitem__
    run = a_run(config, reversal, tmp_path)

    def failing(batches: Batches, index: int) -> Any:
        if index == 12:
            raise OSError(116, "Stale file handle")
        return real(batches, index)

    monkeypatch.setattr(Batches, "__getitem__", failing)
    with pytest.raises(OSError, match="Stale file handle"):
        run.execute()
    assert run.step == 12
    assert "vinedresser-prefetch" not in [thread.name for thread in threading.enumerate()]
    monkeypatch.undo()
    again = a_run(config, reversal, tmp_path)
    assert again.execute() is not None
    assert weights(again) == weights(whole[0])


@pytest.mark.fault("T20")
@pytest.mark.parametrize("beam", [1, 3])
def test_t20_a_model_that_never_ends(reversal, beam):
    config = experiment(reversal, **{"decoding.beam": beam, "evaluation.sentences": 0})
    run = a_run(config, reversal, Path("nowhere"))
    model, split = run.evaluator.model, load_split(reversal, "dev")
    cap = config.task.max_target_length
    target = tokenizers(reversal)[1]
    found = evaluate(model, split, target, Scoring("per", config.decoding, cap))
    assert min(len(text.split()) for text in found.hypotheses) < cap  # the model does end
    model.output.bias.data[[PAD, BOS, EOS, UNK]] = -1e9
    found = evaluate(model, split, target, Scoring("per", config.decoding, cap))
    limits = length_limits(torch.from_numpy(split.source_lengths.copy()), cap).tolist()
    assert [len(text.split()) for text in found.hypotheses] == limits
    assert max(limits) <= cap


@pytest.mark.fault("T21")
def test_t21_the_clock_jumps(reversal, whole, tmp_path, monkeypatch):
    real, jumps = time.time, [0]

    def jumping() -> float:
        jumps[0] += 1
        return real() + (7200 if jumps[0] % 2 else -7200)

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(time, "time_ns", lambda: int(jumping() * 1e9))
    run = a_run(experiment(reversal), reversal, tmp_path)
    outcome = run.execute()
    monkeypatch.undo()
    assert outcome is not None
    assert weights(run) == weights(whole[0])
    assert 0 < outcome.seconds < 120
    speeds = [v for key, v, _ in run.tracker.metrics if key == "train/seconds_per_step"]
    assert speeds
    assert all(0 < value < 60 for value in speeds)
