"""The whole chain from text files to a champion, through the command line."""

import io
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from vinedresser import tracking
from vinedresser.cli import main
from vinedresser.errors import ConfigError
from vinedresser.pipeline import Pipeline
from vinedresser.sweep import TrialRow

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

# What the closing JSON promises; everything else in it may change.
PROMISED = (
    "finalist_per", "pruned_per", "teacher_forced_loss", "heads_kept", "heads_total",
    "parity_max_abs", "champion_version", "seconds",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chain")


@pytest.fixture
def cli(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    local_ray: None,
) -> Cli:
    """Run a command in this process: imports and a start of Ray cost it 10 s each time."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "120")
    for key in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "VINEDRESSER_DEBUG", "VINEDRESSER_WORKSPACE"):
        monkeypatch.delenv(key, raising=False)

    def run(
        *words: object, stdin: str = "", **variables: str
    ) -> "subprocess.CompletedProcess[str]":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capfd.readouterr()
        with monkeypatch.context() as environment:
            for key, value in variables.items():
                environment.setenv(key, value)
            code = main([str(word) for word in words])
        return subprocess.CompletedProcess(words, code, *capfd.readouterr())

    return run


def pipeline_of(study: Mapping[str, Any], corpus: Mapping[str, Any]) -> dict[str, Any]:
    """Two trials, a finalist and two prunings of some seconds in all, as plain JSON."""
    base = {**study["base"], "task": {**study["base"]["task"], "corpus": corpus}}
    return {
        "name": "mirror",
        "study": {**study, "base": base, "num_trials": 2, "stopping": None},
        "finalist": {"steps": 400, "optim.lr": 5e-3},
        "pruning": {
            "overrides": {"steps": 80, "evaluation.num_evaluations": 2, "optim.lr": 2e-3},
            "space": {
                "objective.head_penalty.weight": {
                    "type": "float",
                    "low": 0.3,
                    "high": 1.5,
                    "log": True,
                }
            },
            "num_trials": 2,
            "max_regression": 30.0,
        },
        "model_name": "mirror",
    }


def write_corpus(folder: Path) -> dict[str, dict[str, str]]:
    draw, corpus = random.Random(5), dict[str, dict[str, str]]()
    seen = set[str]()  # test rows that stand in train are refused
    for split, many in (("dev", 40), ("test", 40), ("train", 400)):
        rows = [draw.choices("abcdef", k=draw.randint(2, 6)) for _ in range(many)]
        rows = [row for row in rows if split != "train" or "".join(row) not in seen]
        seen |= {"".join(row) for row in rows}
        corpus[split] = {}
        for side, step in (("source", 1), ("target", -1)):
            path = folder / f"{split}.{side}"
            path.write_text("".join(" ".join(row[::step]) + "\n" for row in rows))
            corpus[split][side] = path.name
    return corpus


def test_a_pipeline_survives_json_and_seeds_all_its_parts(tiny_study: dict[str, Any]) -> None:
    plain = pipeline_of(tiny_study, tiny_study["base"]["task"]["corpus"])
    pipeline = Pipeline.from_json(plain)
    assert Pipeline.from_json(json.loads(json.dumps(pipeline.to_json()))) == pipeline
    assert pipeline.seeded() == pipeline
    seeded = pipeline.override({"seed": 7}).seeded()
    assert (seeded.study.seed, seeded.study.base.seed, seeded.seed) == (7, 7, None)


def test_the_finalist_goes_on_from_the_best_trial(tiny_study: dict[str, Any]) -> None:
    plain = pipeline_of(tiny_study, tiny_study["base"]["task"]["corpus"])
    best = TrialRow(1, "complete", {"optim.lr": 3e-3}, {"per": 10.0}, "/trials/1/bundle")
    own = Pipeline.from_json({**plain, "finalist": {"steps": 500}}).finalist_experiment(best)
    assert (own.init, own.steps, own.optim.lr) == ("/trials/1/bundle", 500, 3e-3)
    assert own.name == "mirror-finalist"
    with pytest.raises(ConfigError, match="did you mean steps"):
        Pipeline.from_json({**plain, "finalist": {"stepps": 5}}).finalist_experiment(best)


def check_grown_corpus(cli: Cli, place: Path) -> None:
    """With a champion in the workspace: its corpus grows, is explained, scored and trained on."""
    plain = json.loads((place / "mirror.json").read_text())

    def written(name: str, *steps: str) -> Path:
        changes = {"name": name, "steps": steps, "finalist": {"steps": 60, "optim.lr": 2e-3}}
        (place / f"{name}.json").write_text(json.dumps({**plain, **changes}))
        return place / f"{name}.json"

    def table(*words: object, code: int = 0) -> dict[str, Any]:
        done = cli("retrain", *words, "--json")
        assert done.returncode == code, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    refresh = written("refresh", "prepare", "finetune", "prune", "register")
    evaluate = written("fresh", "prepare", "evaluate")
    same = table(refresh)
    assert (same["verdict"], same["reason"]) == ("unchanged", "is the champion already")

    for side, line in (("source", "a b c d"), ("target", "d c b a")):
        for split in ("train", "test"):
            with (place / f"{split}.{side}").open("a") as stream:
                stream.write(f"{line} {'e' if split == 'test' else ''}\n".replace(" \n", "\n"))
    rows = json.loads(cli("retrain", place / "mirror.json", "--explain", "--json").stdout)
    assert "no shard set reversal-" in rows[0]["reason"]
    assert {row["reason"] for row in rows[1:]} == {"prepare runs before it"}
    refused = cli("retrain", place / "mirror.json", "--from", "prune")
    assert refused.returncode == 2
    assert "--from prune: prepare has to run before it: no shard set" in refused.stderr
    ended = table(place / "mirror.json", "--until", "prepare")
    assert (ended["verdict"], ended["reason"]) == (None, "ended after prepare")

    drift = table(evaluate)
    assert (drift["verdict"], drift["champion_version"]) == ("kept", 1)
    own = json.loads((place / "workspace" / "mirror.json").read_text())["pruned_per"]
    assert drift["drift"] == pytest.approx(drift["scores"]["champion"] - own, abs=1e-3)
    again = table(evaluate)
    assert (again["verdict"], again["drift"]) == ("unchanged", drift["drift"])

    tuned = table(refresh)
    assert tuned["verdict"] in ("promoted", "kept")
    assert tuned["version"] == 2
    assert f"against the champion's {drift['scores']['champion']:g}" in tuned["reason"]
    code = {"promoted": 11, "kept": 11}[tuned["verdict"]]
    assert table(refresh, "--exit-code", "--from", "register", code=code)["verdict"] == "unchanged"


@pytest.mark.slow
def test_the_chain_makes_a_champion_and_recognises_it(
    cli: Cli, place: Path, tiny_study: dict[str, Any]
) -> None:
    file = place / "mirror.json"
    file.write_text(json.dumps(pipeline_of(tiny_study, write_corpus(place))))

    first = cli("retrain", file, "--json")
    assert first.returncode == 0, first.stderr
    table = json.loads(first.stdout)
    assert all(isinstance(table[key], int | float) for key in PROMISED), table
    assert table["finalist_per"] < 40
    assert table["heads_total"] == 12
    assert 0 <= table["heads_kept"] <= 12
    assert table["parity_max_abs"] < 1e-5
    assert table["parity_same_output"] is True
    assert (table["verdict"], table["scores"]["champion"]) == ("promoted", None)
    assert table["scores"]["challenger"] == pytest.approx(table["pruned_per"], abs=1e-3)
    assert table["reason"].startswith("first champion, test per")
    assert (table["version"], table["champion_version"], table["split"]) == (1, 1, "test")
    assert json.loads((place / "workspace" / "mirror.json").read_text()) == table

    store = tracking.store_for(place / "workspace", "reversal")
    rows = tracking.leaderboard(store, limit=100)
    assert {row.state for row in rows} == {"FINISHED"}
    kinds = Counter(row.kind for row in rows)
    assert kinds == {"pipeline": 1, "sweep": 2, "trial": 2, "train": 1, "prune": 2}
    (top,) = [row for row in rows if row.kind == "pipeline"]
    assert all(row.parent for row in rows if row.kind != "pipeline")
    assert {row.parent for row in rows if row.kind in ("sweep", "train")} == {top.run_id}

    second = cli("retrain", file, "--exit-code")
    assert second.returncode == 11, second.stderr
    for step in ("prepare", "tiny-lr", "finalist", "mirror-heads", "compact", "register"):
        assert any(step in line and "unchanged" in line for line in second.stderr.split("\n")), step
    assert "version 1" in second.stdout
    again = json.loads((place / "workspace" / "mirror.json").read_text())
    varying = ("seconds", "verdict", "reason", "scores")
    assert (again["verdict"], again["reason"]) == ("unchanged", "is the champion already")
    assert set(again["scores"].values()) == {"per", "test", table["scores"]["challenger"]}
    assert {k: v for k, v in again.items() if k not in varying} == {
        k: v for k, v in table.items() if k not in varying
    }
    assert again["seconds"] < table["seconds"] / 2
    assert len(tracking.leaderboard(store, limit=100)) == len(rows)

    # A finished chain whose server is away says what is left, and that it is worth another try.
    away = cli("retrain", file, MLFLOW_TRACKING_URI="http://127.0.0.1:1")
    assert away.returncode == 75, away.stderr
    assert "left to register as mirror: " + table["bundle"] in away.stderr
    waiting = cli("sync", MLFLOW_TRACKING_URI="http://127.0.0.1:1")
    assert waiting.returncode == 75, waiting.stderr
    assert "does not answer" in waiting.stderr
    explained = cli("retrain", file, "--explain", "--json")
    assert {row["reason"] for row in json.loads(explained.stdout)} == {""}, explained.stdout

    words = cli("translate", "models:/mirror@champion", stdin="a b c\n\nf e\n")
    assert words.returncode == 0, words.stderr
    assert len(words.stdout.split("\n")) == 4
    assert words.stdout.split("\n")[1] == ""

    task = {
        **tiny_study["base"]["task"],
        "corpus": json.loads(file.read_text())["study"]["base"]["task"]["corpus"],
    }
    (place / "task.json").write_text(json.dumps(task))
    scored = cli("evaluate", "models:/mirror@champion", "task.json", "--json")
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["per"] == pytest.approx(table["pruned_per"], abs=1e-3)

    board = cli("runs", "--json")
    assert board.returncode == 0, board.stderr
    assert {row["run_id"] for row in json.loads(board.stdout)["reversal"]} == {
        row.run_id for row in rows
    }

    exported = cli("export", table["bundle"], "mirror", "--json")
    assert exported.returncode == 0, exported.stderr
    registered = json.loads(exported.stdout)
    assert (registered["version"], registered["already"]) == (1, True)
    assert registered["champion_version"] == 1
    check_grown_corpus(cli, place)


def test_a_pipeline_names_the_steps_that_a_step_needs(tiny_study: dict[str, Any]) -> None:
    plain = pipeline_of(tiny_study, tiny_study["base"]["task"]["corpus"])
    for steps, problem in (
        (["sweep"], "begin with prepare"),
        (["prepare", "prepare"], "each step once"),
        (["prepare", "finalist"], "finalist needs sweep before it"),
        (["prepare", "finetune", "register"], "register needs prune before it"),
        (["prepare", "prune"], "prune needs finalist or finetune before it"),
    ):
        with pytest.raises(ConfigError, match=problem):
            Pipeline.from_json({**plain, "steps": steps})
