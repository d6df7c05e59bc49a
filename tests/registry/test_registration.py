"""The registry on a real SQLite store: bundles are small committed folders with real files."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import types
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.short_run import a_run, experiment
from tests.tracked import open_run
from vinedresser import tracking
from vinedresser.cli.arguments import open_model
from vinedresser.data.shards import ShardSet, prepare
from vinedresser.errors import BusyError, ConfigError, DamagedError, DataError, MachineError
from vinedresser.registry import promotion
from vinedresser.registry import registration as registry
from vinedresser.registry.gate import Gate, decide
from vinedresser.registry.registration import fetch, register
from vinedresser.registry.versions import read_scores
from vinedresser.significance import PairedBootstrap
from vinedresser.tracking import Store
from vinedresser.tracking.store import open_client
from vinedresser.workspace.commit import Manifest, commit, verify

# MLflow's own imports warn (sqlalchemy's noload, pydantic, ...); none of it is ours to change.
pytestmark = pytest.mark.filterwarnings("ignore")

GATE = Gate()


@pytest.fixture(autouse=True)
def _leaves_no_database_where_it_runs(tmp_path, monkeypatch) -> Iterator[None]:
    """MLflow makes one in the working directory whenever its process-wide store is asked."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield
    assert not list(folder.iterdir())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, with_database: Any) -> Store:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return tracking.store_for(with_database(tmp_path_factory.mktemp("with space")), "export")


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A registered model for the test."""
    return request.node.name


def scores(per: float, **more: Any) -> dict[str, Any]:
    base = {"metric": "per", "reference_digest": "r1"}
    return {**base, "dev": {"per": per}, "test": {"per": per}, **more}


def bundle(folder: Path, per: float, content: str = "", **more: Any) -> Manifest:
    target = folder / f"bundle-{per}-{content}-{len(more)}"
    with commit(target) as staging:
        (staging.path / "weights.safetensors").write_bytes(f"{per}{content}".encode() * 500)
        (staging.path / "experiment.json").write_text("{}")
        (staging.path / "scores.json").write_text(json.dumps(scores(per, **more)))
    return verify(target)


@pytest.mark.parametrize(
    ("challenger", "champion", "promoted", "word"),
    [
        (scores(0.3), None, True, "first"),
        (scores(0.2), scores(0.3), True, "0.2 against the champion's 0.3"),
        (scores(0.3), scores(0.3), True, "against"),
        (scores(0.4), scores(0.3), False, "0.4 against the champion's 0.3, worse"),
        (scores(float("nan")), None, False, "no finite"),
        (scores(0.1, test={}), scores(0.3), False, "no finite"),
        (scores(0.1), scores(float("nan")), False, "champion has no finite"),
        (scores(0.1, reference_digest="r2"), scores(0.3), False, "reference_digest"),
        (scores(0.1, reference_digest=""), None, False, "reference_digest"),
        (scores(0.1, parity_max_abs=2e-4), None, False, "parity"),
        (scores(0.1, parity_max_abs=float("nan")), None, False, "parity"),
        (scores(0.1, parity_max_abs=1e-5), None, True, "first"),
    ],
)
def test_the_gate(challenger, champion, promoted, word) -> None:
    decision = decide(challenger, champion, GATE)
    assert decision.promoted is promoted
    assert word in decision.reason


def test_the_gate_knows_direction_split_and_tolerance() -> None:
    bleu = {"metric": "bleu", "reference_digest": "r"}
    old, new = {**bleu, "dev": {"bleu": 30.0}}, {**bleu, "dev": {"bleu": 29.5}}
    assert not decide(new, old, Gate(split="dev")).promoted
    assert decide(new, old, Gate(split="dev", max_regression=0.5)).promoted
    assert decide(old, new, Gate(split="dev")).promoted
    assert not decide(old, new, Gate(split="test")).promoted


def test_only_the_gate_makes_a_champion(store: Store, name: str, tmp_path: Path) -> None:
    run = open_run(store, key=name, name="trained it")
    run.close("FINISHED")

    def put(made: Manifest) -> registry.Registered:
        return register(made, name=name, store=store, gate=GATE, run_id=run.run_id)

    first, better = bundle(tmp_path, 0.3), bundle(tmp_path, 0.2)
    one = put(first)
    assert (one.version, one.verdict, one.is_champion, one.already) == (1, "promoted", True, False)
    same = put(first)
    assert (same.version, same.verdict, same.is_champion, same.already) == (
        1, "unchanged", True, True,
    )  # fmt: skip
    two = put(better)
    assert (two.version, two.is_champion) == (2, True)
    assert two.scores == {"metric": "per", "split": "test", "challenger": 0.2, "champion": 0.3}
    worse = put(bundle(tmp_path, 0.25))
    assert (worse.version, worse.is_champion, worse.champion_version) == (3, False, 2)
    assert worse.verdict == "kept"
    assert put(bundle(tmp_path, 0.25)) == replace(worse, verdict="unchanged", already=True)
    assert "0.25 against the champion's 0.2" in worse.reason
    # An equal one replaces the champion: it is the newer.
    equal = put(bundle(tmp_path, 0.2, "equal"))
    assert (equal.version, equal.is_champion) == (4, True)
    # But exporting an old champion again brings nothing back.
    assert "was champion once" in put(better).reason
    nan = put(bundle(tmp_path, float("nan")))
    assert (nan.version, nan.is_champion, nan.champion_version) == (5, False, 4)
    client = open_client(store)
    aliases = client.get_registered_model(name).aliases
    assert {key: int(value) for key, value in aliases.items()} == {"champion": 4, "challenger": 5}
    version = client.get_model_version(name, "2")
    assert version.tags["vinedresser.bundle"] == better.digest
    assert version.run_id == run.run_id
    assert client.get_run(run.run_id).outputs.model_outputs

    got = fetch(f"models:/{name}@champion", store=store, cache=tmp_path / "cache")
    assert got == verify(got.folder)
    assert got.digest == bundle(tmp_path, 0.2, "equal").digest == got.folder.name
    assert fetch(f"models:/{name}/2", store=store, cache=tmp_path / "cache") != got
    assert not list((tmp_path / "cache").glob(".fetch-*"))


@pytest.mark.parametrize("sentences", [0, 10])
def test_a_trained_bundle_becomes_champion_by_its_scores_on_dev(
    store, name, reversal, tmp_path, sentences
) -> None:
    """Unless a slice of dev was scored: no other bundle is comparable then."""
    config = experiment(reversal, **{"evaluation.sentences": sentences})
    outcome = a_run(config, reversal, tmp_path).execute()
    made = verify(Path(outcome.bundle))
    found = register(made, name=f"m{sentences}", store=store, gate=Gate(split="dev"))
    assert found.is_champion is (sentences == 0)
    assert found.reason.startswith(
        "no reference_digest" if sentences else "first champion, dev per"
    )


@pytest.fixture(scope="module")
def grown(
    reversal: ShardSet, tmp_path_factory: pytest.TempPathFactory, one_thread: None
) -> dict[str, tuple[Manifest, ShardSet]]:
    """A bad model scored on 40 dev rows, and a good one scored on these and another one."""
    folder, corpus = tmp_path_factory.mktemp("grown"), reversal.task.corpus.to_json()
    for side, line in (("source", "a b c d\n"), ("target", "d c b a\n")):
        text = Path(corpus["dev"][side]).read_text()
        corpus["dev"][side] = str(folder / f"dev.{side}")
        Path(corpus["dev"][side]).write_text(text + line)
    task = reversal.task.override({"corpus": corpus})
    more = prepare(task, folder / "shards", executor="in_process")
    assert more.counts["dev"] == reversal.counts["dev"] + 1
    found = {}
    for name, shards, steps in (("bad", reversal, 24), ("good", more, 120)):
        changes = {"evaluation.sentences": 0, "steps": steps, "optim.lr": 5e-3}
        outcome = a_run(experiment(shards, **changes), shards, folder / name).execute()
        found[name] = verify(Path(outcome.bundle)), shards
    return found


def test_a_champion_on_another_test_set_is_scored_again(
    store: Store, name: str, grown: dict[str, tuple[Manifest, ShardSet]], monkeypatch: Any
) -> None:
    gate = Gate(split="dev")

    def put(which: str, model: str, gate: Gate = gate, *, with_data: bool = True) -> Any:
        made, shards = grown[which]
        data = (lambda: shards) if with_data else None
        return register(made, name=model, store=store, gate=gate, data=data)

    better, worse = f"{name}-better", f"{name}-worse"
    assert put("bad", better).verdict == "promoted"
    blind = put("good", better, with_data=False)
    assert (blind.verdict, blind.champion_version) == ("kept", 1)
    assert "score both on the same set" in blind.reason

    found = put("good", better)
    assert (found.verdict, found.champion_version) == ("promoted", 2)
    assert found.scores["challenger"] < found.scores["champion"]
    assert re.fullmatch(
        r"dev per [\d.]+ against the champion's [\d.]+ \(better by [\d.]+ to [\d.]+ at 95%, "
        r"paired bootstrap\)",
        found.reason,
    )
    stored = read_scores(grown["good"][0].folder)
    assert found.scores["challenger"] == pytest.approx(stored["dev"]["per"])
    digest = stored["reference_digest"]
    tags = open_client(store).get_model_version(better, "1").tags
    kept = json.loads(tags[f"vinedresser.scores/{digest[:12]}"])
    assert kept == {
        "metric": "per", "reference_digest": digest, "dev": {"per": found.scores["champion"]}
    }  # fmt: skip

    assert put("good", worse).verdict == "promoted"
    refused = put("bad", worse)
    assert (refused.verdict, refused.champion_version) == ("kept", 1)
    assert "worse by more than 0" in refused.reason
    # The champion's score on these references is in its tag: nothing is decoded again.
    monkeypatch.setattr(promotion, "compare_models", None)
    again = put("bad", worse)
    assert (again.verdict, again.scores) == ("unchanged", refused.scores)


def test_a_gate_of_confidence_decodes_with_both(
    store: Store, name: str, grown: dict[str, tuple[Manifest, ShardSet]]
) -> None:
    for which, verdict in (("bad", "promoted"), ("good", "promoted")):
        made, shards = grown[which]
        gate = Gate(split="dev", confidence=0.95)
        found = register(made, name=name, store=store, gate=gate, data=lambda: shards)  # noqa: B023 (called at once)
        assert found.verdict == verdict


def test_the_gate_resamples_where_confidence_is_asked_for() -> None:
    def resampled(share: float) -> PairedBootstrap:
        gains = np.where(np.arange(1000) < 1000 * share, 0.1, -0.1)
        return PairedBootstrap("per", (0.2, 0.3), gains)

    gate = Gate(confidence=0.95)
    assert decide(scores(0.2), scores(0.3), gate, resampled(0.96)).promoted
    refused = decide(scores(0.2), scores(0.3), gate, resampled(0.9))
    assert not refused.promoted
    assert "within 0 in 90% of the samples, expected 95%" in refused.reason
    assert not decide(scores(0.2), scores(0.3), gate).promoted
    assert decide(scores(0.2), scores(0.3), Gate(), resampled(0.5)).promoted


def test_what_does_not_exist_is_answered_with_what_does(store, name, tmp_path) -> None:
    register(bundle(tmp_path, 0.3), name=name, store=store, gate=GATE)
    for uri, word in [
        ("models:/nothing/1", f"there are .*{name}"),
        (f"models:/{name}/99", "versions 1; aliases challenger, champion"),
        (f"models:/{name}@best", "aliases challenger, champion"),
        (f"models:/{name}", "expected models:"),
        ("runs:/x/y", "expected models:"),
    ]:
        with pytest.raises(ConfigError, match=word):
            fetch(uri, store=store, cache=tmp_path / "cache")
    with pytest.raises(ConfigError, match="model name"):
        register(bundle(tmp_path, 0.3), name="../x", store=store, gate=GATE)
    with pytest.raises(ConfigError, match="no run"):
        register(bundle(tmp_path, 0.1), name=name, store=store, gate=GATE, run_id="0" * 32)


def stored(store: Store, name: str, version: str) -> Path:
    """Where the registry keeps the weights of a version."""
    source = open_client(store).get_model_version_download_uri(name, version)
    path = urllib.request.url2pathname(source.removeprefix("file://"))
    (found,) = (Path(path) / "artifacts").glob("*/weights.safetensors")
    return found


def test_a_tampered_or_lost_version_is_refused_and_can_be_replaced(store, name, tmp_path) -> None:
    good = bundle(tmp_path, 0.3)
    register(good, name=name, store=store, gate=GATE)
    kept = fetch(f"models:/{name}/1", store=store, cache=tmp_path / "warm")
    weights = stored(store, name, "1")
    weights.write_bytes(b"x" + weights.read_bytes()[1:])
    with pytest.raises(DamagedError, match=f"models:/{name}/1"):
        fetch(f"models:/{name}@champion", store=store, cache=tmp_path / "cold")
    assert not [path for path in (tmp_path / "cold").iterdir() if not path.name.startswith(".")]
    assert fetch(f"models:/{name}/1", store=store, cache=tmp_path / "warm") == kept
    with pytest.raises(DamagedError):  # the champion's scores cannot be trusted either
        register(bundle(tmp_path, 0.1), name=name, store=store, gate=GATE)
    (weights.parent / "manifest.json").unlink()
    with pytest.raises(DamagedError):
        fetch(f"models:/{name}/1", store=store, cache=tmp_path / "cold")
    open_client(store).delete_registered_model_alias(name, "champion")
    again = register(good, name=name, store=store, gate=GATE)
    assert (again.version, again.is_champion, again.already) == (3, True, False)


@pytest.mark.slow
def test_a_moved_workspace_finds_its_models_and_writes_no_more_where_it_was(
    name, tmp_path, monkeypatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    old, new, made = tmp_path / "it's old", tmp_path / "new ü", bundle(tmp_path, 0.3)
    shutil.copytree(made.folder, old / "runs" / "it" / "bundle")
    before = tracking.store_for(old, "export")
    tags = {"vinedresser.folder": str(old / "runs" / "it")}
    run = open_run(before, key=name, name="trained it", tags=tags)
    run.close("FINISHED")
    one = register(made, name=name, store=before, gate=GATE, run_id=run.run_id)
    old.rename(new)
    store = tracking.store_for(new, "export")
    got = fetch(f"models:/{name}@champion", store=store, cache=tmp_path / "cache")
    assert verify(got.folder).digest == made.digest
    again = register(made, name=name, store=store, gate=GATE, run_id=run.run_id)
    assert (again.version, again.already) == (one.version, True)
    assert tracking.tagged_folder(store, run.run_id) == old / "runs" / "it"
    found = re.escape(str(new / "runs" / "it" / "bundle"))
    with pytest.raises(DataError, match=f"{found}: not a model bundle"):
        open_model(run.run_id, new)
    assert register(bundle(tmp_path, 0.2), name=name, store=store, gate=GATE).is_champion
    same = open_run(store, key=name, name="trained it")
    same.text("x", "note.txt")
    same.close("FINISHED")
    assert same.run_id == run.run_id
    assert list(new.rglob("note.txt"))
    assert not old.exists()
    # Another way to the same place changes nothing.
    (tmp_path / "link").symlink_to(new)
    open_client(tracking.store_for(tmp_path / "link", "export"))
    found = open_client(store).get_experiment_by_name("export")
    assert found.artifact_location == store.artifacts


def test_a_damaged_cache_is_fetched_anew(store, name, tmp_path) -> None:
    register(bundle(tmp_path, 0.3), name=name, store=store, gate=GATE)
    got = fetch(f"models:/{name}/1", store=store, cache=tmp_path / "cache")
    (got.folder / "weights.safetensors").write_bytes(b"short")
    assert fetch(f"models:/{name}/1", store=store, cache=tmp_path / "cache") == got
    verify(got.folder)


def test_a_bad_bundle_registers_nothing(store, name, tmp_path) -> None:
    damaged = bundle(tmp_path, 0.3)
    (damaged.folder / "weights.safetensors").write_bytes(b"short")
    with pytest.raises(DamagedError):
        register(verify(damaged.folder), name=name, store=store, gate=GATE)
    with commit(tmp_path / "unscored") as staging:
        (staging.path / "weights.safetensors").write_bytes(b"1")
    with pytest.raises(DataError, match=r"scores\.json"):
        register(verify(tmp_path / "unscored"), name=name, store=store, gate=GATE)
    with pytest.raises(ConfigError, match="no model"):
        fetch(f"models:/{name}/1", store=store, cache=tmp_path / "cache")


@pytest.mark.parametrize("stop", ["_add", "downloaded", "promote"])
def test_what_fails_half_way_moves_no_champion_and_can_be_repeated(
    store, tmp_path, monkeypatch, stop
) -> None:
    name = f"half-way-{stop}"
    register(bundle(tmp_path, 0.3), name=name, store=store, gate=GATE)
    better = bundle(tmp_path, 0.2)

    def fail(*_arguments: object, **_more: object) -> None:
        raise OSError("connection reset")

    with monkeypatch.context() as patch:
        patch.setattr(registry, stop, fail)
        with pytest.raises(MachineError, match="connection reset"):
            register(better, name=name, store=store, gate=GATE)
    champion = open_client(store).get_model_version_by_alias(name, "champion")
    assert int(champion.version) == 1
    done = register(better, name=name, store=store, gate=GATE)
    assert (done.version, done.is_champion) == (2, True)


def test_a_champion_that_changed_meanwhile_is_not_overwritten(
    store, name, tmp_path, monkeypatch
) -> None:
    register(bundle(tmp_path, 0.3), name=name, store=store, gate=GATE)
    register(bundle(tmp_path, 0.4), name=name, store=store, gate=GATE)

    def slow_decide(*arguments: Any) -> Any:
        open_client(store).set_registered_model_alias(name, "champion", "2")
        return decide(*arguments)

    monkeypatch.setattr(promotion, "decide", slow_decide)
    with pytest.raises(BusyError, match="changed during the export"):
        register(bundle(tmp_path, 0.2), name=name, store=store, gate=GATE)
    assert int(open_client(store).get_model_version_by_alias(name, "champion").version) == 2


def test_mlflow_serves_the_bundle_without_pickle(store, name, tmp_path, monkeypatch) -> None:
    register(bundle(tmp_path, 0.3), name=name, store=store, gate=GATE)

    class Backwards:
        def __init__(self, folder: Path) -> None:
            verify(folder)

        def translate(self, texts: list[str]) -> list[str]:
            return [text[::-1] for text in texts]

    fake = types.ModuleType("vinedresser.bundle")
    fake.load_bundle = Backwards  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vinedresser.bundle", fake)
    import mlflow.pyfunc

    source = open_client(store).get_model_version_download_uri(name, "1")
    assert os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    served = mlflow.pyfunc.load_model(source)
    assert served.predict(["abc", "de"]) == ["cba", "ed"]
    assert not list(stored(store, name, "1").parents[2].rglob("*.pkl"))


def test_an_absent_registry_is_said_soon(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    absent = Store(f"http://127.0.0.1:{port}", "e", None, tmp_path)
    start = time.monotonic()
    with pytest.raises(MachineError, match="does not answer"):
        register(bundle(tmp_path, 0.3), name="m", store=absent, gate=GATE)
    with pytest.raises(MachineError, match="does not answer"):
        fetch("models:/m/1", store=absent, cache=tmp_path)
    assert time.monotonic() - start < 30


@pytest.mark.slow
def test_a_bundle_travels_through_a_server(mlflow_server: str, tmp_path: Path) -> None:
    server = Store(mlflow_server, "export", None, tmp_path / "locks")
    good = bundle(tmp_path, 0.3)
    assert register(good, name="m", store=server, gate=GATE).is_champion
    assert register(good, name="m", store=server, gate=GATE).already
    assert not register(bundle(tmp_path, 0.4), name="m", store=server, gate=GATE).is_champion
    got = fetch("models:/m@champion", store=server, cache=tmp_path / "cache")
    assert verify(got.folder).digest == good.digest


def test_who_may_only_read_a_workspace_can_fetch_its_models(
    tmp_path: Path, with_database: Any
) -> None:
    """As root, without the rights to pass over modes."""
    shared = with_database(tmp_path / "shared")
    there = tracking.store_for(shared, "export")
    good = bundle(tmp_path, 0.3)
    register(good, name="m", store=there, gate=GATE)
    for path in (shared, *shared.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    code = (
        "import sys; from pathlib import Path; from vinedresser import tracking;"
        "from vinedresser.registry.registration import fetch;"
        "store = tracking.store_for(Path(sys.argv[1]), 'Default');"
        "print(fetch('models:/m@champion', store=store, cache=Path(sys.argv[2])).digest)"
    )
    words = [sys.executable, "-c", code, str(shared), str(tmp_path / "cache")]
    if os.getuid() == 0:
        rights = "-dac_override,-dac_read_search,-fowner"
        words = ["setpriv", "--bounding-set", rights, *words]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    finally:
        for path in (shared, *shared.rglob("*")):
            path.chmod(path.stat().st_mode | 0o200)
    assert done.stdout.split() == [good.digest], done.stderr
