"""The command line as a user meets it: a process, its exit code, its two streams, its files."""

import contextlib
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.processes import MAIN, Forked
from vinedresser import decode, tracking
from vinedresser.bundle import load_bundle, save_bundle
from vinedresser.data.shards import ShardSet
from vinedresser.workspace.commit import read_manifest

pytestmark = pytest.mark.filterwarnings("ignore")

VERBS = (
    "prepare", "train", "sweep", "prune", "export", "retrain", "evaluate", "compare", "translate",
    "runs",
    "ui", "doctor", "describe", "attend", "check",
)  # fmt: skip

Done = subprocess.CompletedProcess[str]
Cli = Callable[..., Done]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    unwanted = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "VINEDRESSER_DEBUG")
    kept = {key: value for key, value in os.environ.items() if key not in unwanted}
    return {**kept, "VINEDRESSER_WORKSPACE": str(tmp_path / "space"), "COLUMNS": "120"}


@pytest.fixture
def cli(forked: Callable[..., Forked], environment: Mapping[str, str]) -> Cli:
    """Runs one command in an empty folder."""

    def run(*words: object, stdin: str = "", env: Mapping[str, str] = {}) -> Done:
        process = forked(*words, stdin=stdin, env={**environment, **env})
        out, err = process.communicate(timeout=300)
        return Done(words, process.returncode or 0, out, err)

    return run


@pytest.fixture
def in_process(
    tmp_path: Path, environment: Mapping[str, str], monkeypatch: Any, capfd: Any
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """The same without a process of its own: 4 s of imports less."""
    from vinedresser.cli import main

    monkeypatch.chdir(tmp_path)
    for key in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "VINEDRESSER_DEBUG"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("VINEDRESSER_WORKSPACE", environment["VINEDRESSER_WORKSPACE"])
    before = signal.getsignal(signal.SIGTERM)

    def run(*words: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return code, *capfd.readouterr()

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def files(tmp_path: Path, tiny_study: dict[str, Any]) -> Callable[..., Path]:
    """Writes a configuration file: the tiny study or a part of it, changed."""

    def write(name: str, value: Any = None) -> Path:
        path = tmp_path / name
        parts = {"study.json": tiny_study, "experiment.json": tiny_study["base"],
                 "task.json": tiny_study["base"]["task"]}  # fmt: skip
        path.write_text(json.dumps(parts[name] if value is None else value, indent=1))
        return path

    return write


def is_clear(error: str, *, lines: int = 1) -> bool:
    """One line a problem, each with its topic; no stack."""
    found = error.strip().splitlines()
    return len(found) == lines and all(line.startswith("error[E-") for line in found)


def test_train_refuses_a_model_larger_than_the_memory(in_process: Any, files: Any) -> None:
    code, out, err = in_process("train", files("experiment.json"), "model.d_ff=1000000000000")
    assert (code, out) == (2, "")
    assert is_clear(err.splitlines()[-1])
    assert "model: the weights take " in err


# --- help and plans ------------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom vinedresser.cli import main\n"
        "code = main(['--help'])\n"
        "heavy = {'torch', 'ray', 'mlflow', 'optuna', 'numpy', 'pandas'} & set(sys.modules)\n"
        "sys.stderr.write(f'{code} {sorted(heavy)}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "0 []"
    assert all(f" {verb} " in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(in_process: Any, verb: str) -> None:
    code, out, err = in_process(verb, "--help")
    assert (code, err) == (0, "")
    assert f" {verb} " in out


@pytest.mark.parametrize(
    ("verb", "file", "keys"),
    [
        ("train", "experiment.json", {"configuration", "resources"}),
        ("sweep", "study.json", {"configuration", "resources", "space"}),
        ("train", "pipelines.demo", {"configuration", "resources"}),
        ("sweep", "search_spaces.demo", {"configuration", "resources", "space"}),
        ("retrain", "pipelines.demo", {"configuration", "resources", "space"}),
    ],
)
def test_a_dry_run_prints_the_plan_and_writes_nothing(
    in_process: Any, files: Any, tmp_path: Path, verb: str, file: str, keys: set[str]
) -> None:
    if file == "pipelines.demo" and verb == "train":
        file = "search_spaces.demo.EXPERIMENT"
    name = files(file) if file.endswith(".json") else file
    before = sorted(tmp_path.rglob("*"))
    code, out, err = in_process(verb, name, "--dry-run", "--json")
    assert (code, err) == (0, "")
    plan = json.loads(out)
    assert set(plan) == keys
    assert plan["configuration"]["name"]
    code, out, _ = in_process(verb, name, "--dry-run")
    assert code == 0
    assert all(f"{key}:" in out for key in keys)
    assert sorted(tmp_path.rglob("*")) == before


def test_overrides_show_in_the_plan(in_process: Any, files: Any) -> None:
    words = ("base.steps=77", "num_trials=3", "--dry-run", "--json")
    _, out, _ = in_process("sweep", files("study.json"), *words)
    plan = json.loads(out)
    assert plan["resources"]["steps_per_trial"] == 77
    assert plan["configuration"]["num_trials"] == 3


# --- wrong input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("train", "none.yaml"), ("none.yaml", "no such file")),
        (("train", "search_spaces.dmeo"), ("search_spaces.dmeo", "has no Experiment or Study")),
        (("train", "os.path"), ("not in the packages",)),
        (("train", "experiment.json", "optim.clip_nrom=1"), ("did you mean clip_norm",)),
        (("train", "experiment.json", "optim.lr=fast"), ("optim.lr", "fast")),
        (("train", "experiment.json", "steps"), ("key=value",)),
        (
            ("sweep", "experiment.json"),
            ("is an Experiment, expected a Study",),
        ),
        (("translate", "models:/nobody@champion"), ("no models yet", "--workspace")),
        (("translate", "0123456789abcdef0123456789abcdef"), ("no runs", "--workspace")),
        (("translate", "no/such/folder"), ("no/such/folder", "bundle folder")),
        (("evaluate", "no/such/folder", "task.json"), ("no/such/folder",)),
        (("prune", "no/such/folder"), ("no/such/folder",)),
        (("export", "no/such/folder", "name"), ("no/such/folder",)),
        (("export", "no/such/folder", "name", "max_regresion=1"), ("did you mean",)),
        (("runs",), ("no runs",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_wrong_words_are_one_line_and_leave_nothing(
    in_process: Any, files: Any, tmp_path: Path, words: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    files("experiment.json")
    files("task.json")
    code, out, err = in_process(*words)
    assert (code, out) == (2, ""), err
    assert all(part in err for part in parts), err
    if words[0] == "sweep":
        assert "Traceback" not in err
    else:
        assert is_clear(err), err
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"experiment.json", "task.json"}


def test_a_misspelt_key_is_found_in_its_file_and_line(
    in_process: Any, files: Any, tmp_path: Path, tiny_study: dict[str, Any]
) -> None:
    base = {**tiny_study["base"], "optim": {"lr": 1e-3, "warmup_step": 5}}
    code, _, err = in_process("train", files("experiment.json", base))
    line = (tmp_path / "experiment.json").read_text().split("warmup_step")[0].count("\n") + 1
    assert code == 2
    assert f"experiment.json:{line}: optim.warmup_step: unknown key" in err
    assert "did you mean warmup_steps?" in err
    assert is_clear(err)
    assert not (tmp_path / "space").exists()


def corpus(folder: Path, task: dict[str, Any], **contents: bytes) -> dict[str, Any]:
    """The tiny task with some of its files replaced."""
    splits = {split: dict(pair) for split, pair in task["corpus"].items() if isinstance(pair, dict)}
    for name, content in contents.items():
        split, side = name.split("_")
        path = folder / f"{split}.{side}"
        path.write_bytes(content)
        splits[split][side] = str(path)
    return {**task, "corpus": splits}


@pytest.mark.parametrize("verb", ["train", "prepare"])
@pytest.mark.parametrize(
    ("contents", "parts"),
    [
        ({"train_source": b"a b\nc d\n", "train_target": b"b a\n"}, ("2 lines", "1")),
        ({"dev_source": b"a b\n", "dev_target": b"b \xff\n"}, ("dev.target:1:3", "0xff")),
        ({"train_source": b"a\n", "train_target": b""}, ("train.target: empty file",)),
    ],
    ids=["line counts", "not UTF-8", "empty"],
)
def test_bad_corpora_are_told_with_their_place(
    in_process: Any, files: Any, tmp_path: Path, tiny_study: dict[str, Any], verb: str,
    contents: dict[str, bytes], parts: tuple[str, ...],
) -> None:  # fmt: skip
    task = corpus(tmp_path, tiny_study["base"]["task"], **contents)
    value = task if verb == "prepare" else {**tiny_study["base"], "task": task}
    code, out, err = in_process(verb, files("given.json", value))
    assert (code, out) == (2, ""), err
    assert is_clear(err), err
    assert all(part in err for part in parts), err
    shards = tmp_path / "space" / "shards"
    assert not shards.exists() or not list(shards.iterdir())


@pytest.mark.ray
def test_prepare_by_either_executor_gives_the_same_shards(
    in_process: Any, files: Any, tmp_path: Path, tiny_study: dict[str, Any], local_ray: None
) -> None:
    task = files("task.json", tiny_study["base"]["task"])
    digests = []
    for executor in ("in_process", "ray"):
        words = ("prepare", task, "--executor", executor, "-w", tmp_path / executor, "--json")
        code, out, err = in_process(*words)
        assert code == 0, err
        digests.append(read_manifest(Path(json.loads(out)["folder"])).files)
    assert digests[0] == digests[1]


def test_a_missing_corpus_file_is_told(
    in_process: Any, files: Any, tmp_path: Path, tiny_study: dict[str, Any]
) -> None:
    task = tiny_study["base"]["task"]
    splits = {**task["corpus"], "train": {"source": "gone.txt", "target": "gone.too"}}
    experiment = {**tiny_study["base"], "task": {**task, "corpus": splits}}
    code, _, err = in_process("train", files("experiment.json", experiment))
    assert code == 2
    assert f"{tmp_path}/gone.txt" in err
    assert is_clear(err, lines=len(err.strip().splitlines()))


# --- a machine that does not play along ----------------------------------------------------------


def test_a_cluster_that_does_not_answer_is_an_environment_error(cli: Cli, files: Any) -> None:
    done = cli("sweep", files("study.json"), env={"RAY_ADDRESS": "127.0.0.1:1"})
    assert done.returncode == 3, done.stderr
    assert "RAY_ADDRESS=127.0.0.1:1" in done.stderr
    assert is_clear(done.stderr)


def test_a_file_where_the_workspace_should_be(in_process: Any, files: Any, tmp_path: Path) -> None:
    (tmp_path / "space").write_text("in the way")
    code, _, err = in_process("train", files("experiment.json"))
    assert code == 3, err
    assert "space" in err
    assert is_clear(err), err


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_workspace_that_cannot_be_written(in_process: Any, files: Any, tmp_path: Path) -> None:
    (tmp_path / "space").mkdir(mode=0o555)
    code, _, err = in_process("train", files("experiment.json"))
    assert code == 3, err
    assert is_clear(err), err


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become somebody else")
def test_a_workspace_of_somebody_else(
    environment: Mapping[str, str], tiny_study: dict[str, Any]
) -> None:
    somebody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable]
    if subprocess.run([*somebody, "-c", "1"], check=False).returncode:
        pytest.skip("others cannot run this Python")
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        folder = Path(place)
        folder.chmod(0o755)
        (folder / "space").mkdir()
        shutil.copytree(Path(tiny_study["base"]["task"]["corpus"]["dev"]["source"]).parent,
                        folder / "corpus")  # fmt: skip
        for path in (folder / "corpus").rglob("*"):
            path.chmod(0o755)
        (folder / "corpus").chmod(0o755)
        splits = {
            split: {side: str(folder / "corpus" / f"{split}.{side}") for side in pair}
            for split, pair in tiny_study["base"]["task"]["corpus"].items()
            if isinstance(pair, dict)
        }
        task = {**tiny_study["base"]["task"], "corpus": splits}
        (folder / "experiment.json").write_text(json.dumps({**tiny_study["base"], "task": task}))
        done = subprocess.run(
            [*somebody, "-c", MAIN, "train", folder / "experiment.json", "-w", folder / "space"],
            capture_output=True, text=True, cwd=folder, timeout=300, check=False,
            env={**environment, "HOME": place},
        )  # fmt: skip
        left = list((folder / "space").iterdir())
    assert done.returncode == 3, done.stderr
    assert is_clear(done.stderr), done.stderr
    assert str(folder / "space") in done.stderr
    assert not left


# --- results -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(
    reversal: ShardSet, tmp_path_factory: pytest.TempPathFactory, one_thread: None,
    with_database: Any,
) -> Path:  # fmt: skip
    """A model of the tiny task."""
    from trainables.transformer import TransformerConfig
    from vinedresser.config import Experiment, Optim
    from vinedresser.distributed.context import RunContext
    from vinedresser.distributed.train import train
    from vinedresser.tracking import store_for
    from vinedresser.workspace.layout import Workspace

    folder = with_database(tmp_path_factory.mktemp("bundle"))
    experiment = Experiment(
        task=reversal.task,
        model=TransformerConfig(d_model=32, d_ff=64, encoder_layers=1, decoder_layers=1, dropout=0),
        optim=Optim(lr=5e-3, warmup_steps=10),
        steps=40,
    )
    site = RunContext(reversal, Workspace(folder), store_for(folder, "reversal"))
    return Path(train(experiment, site).bundle)


@pytest.mark.parametrize(
    ("stdin", "lines"),
    [("a b c\n\nd e\n", 3), ("a b\nc d", 2), ("", 0), ("\n\n", 2), ("a b\r\n   \nc\n", 3)],
)
def test_translate_gives_a_line_for_a_line(
    in_process: Any, bundle: Path, stdin: str, lines: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
    code, out, err = in_process("translate", bundle)
    assert (code, err) == (0, "")
    found = out.split("\n")
    assert found.pop() == ""
    assert len(found) == lines
    given = stdin.split("\n")[:lines]
    assert [not line for line in found] == [not line.strip() for line in given]


def test_translate_keeps_line_separators_of_unicode_inside_a_line(cli: Cli, bundle: Path) -> None:
    done = cli("translate", bundle, "--json", "beam=2", stdin="a b\u2028c d\x0b\x85e\nf\n")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.split("\n")[:-1]]
    assert [row["source"] for row in rows] == ["a b\u2028c d\x0b\x85e", "f"]


SEARCHES = {
    "the bundle's own": ([], []),
    "the bundle's alpha": (["beam=3"], [(3, 1.5)]),
    "another alpha": (["beam=3", "length_alpha=0.25"], [(3, 0.25)]),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_evaluate_and_translate_search_alike(
    name: str, in_process: Any, bundle: Path, files: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """`evaluate` took an alpha of 0.6, `translate` the bundle's, and ignored `length_alpha`."""
    options, wanted = SEARCHES[name]
    loaded = load_bundle(bundle)
    changed = save_bundle(
        tmp_path / "changed",
        experiment=loaded.experiment.override({"decoding.length_alpha": 1.5}),
        weights=loaded.model.state_dict(),
        tokenizers=(loaded.source_tokenizer, loaded.target_tokenizer),
        scores=loaded.scores,
    )
    found, search = [], decode.beam_search

    def recorded(model: Any, *source: Any, **more: Any) -> Any:
        decoding = source[2]
        found.append((decoding.beam, decoding.length_alpha))
        return search(model, *source, **more)

    monkeypatch.setattr(decode, "beam_search", recorded)
    for words in (["evaluate", changed, files("task.json"), "split=dev"], ["translate", changed]):
        found.clear()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a b\n")))
        code, _, err = in_process(*words, *options)
        assert (code, err) == (0, "")
        assert sorted(set(found)) == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["split=dev"], "split: unknown key"),
        (["length_alpha=0.5"], "length_alpha: no effect on greedy search; set beam=2 or more"),
        (["beam_spread=3"], "beam_spread: no effect without beams; Fix: beam=2 or more"),
        (["top_k=5"], "top_k: no effect on a search; Fix: sample=true"),
        (["sample=true", "beam=2"], "sample: no search, but beam is 2; Fix: beam=1"),
        (["nbest=3", "beam=2"], "nbest: 3 hypotheses of a beam of 2; Fix: beam=3, or sample=true"),
    ],
)
def test_translate_refuses_options_without_effect(
    options: list[str], message: str, in_process: Any, bundle: Path
) -> None:
    code, out, err = in_process("translate", bundle, *options)
    assert (code, out) == (2, "")
    assert message in err


def test_translate_shows_hypotheses_and_scores(
    in_process: Any, bundle: Path, monkeypatch: Any
) -> None:
    def lines(*options: str) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a b c\n\nd e\n")))
        code, out, err = in_process("translate", bundle, *options)
        assert (code, err) == (0, "")
        return out.split("\n")[:-1]

    plain = lines("beam=4")
    rows = [line.split("\t") for line in lines("beam=4", "nbest=3", "scores=true")]
    assert [number for number, *_ in rows] == ["1"] * 3 + ["2"] + ["3"] * 3
    assert [rows[i][2] for i in (0, 3, 4)] == plain
    assert rows[3][1] == ""
    scores = [float(row[1]) for row in rows if row[1]]
    assert scores == [*sorted(scores[:3], reverse=True), *sorted(scores[3:], reverse=True)]
    as_json = [json.loads(line) for line in lines("beam=4", "nbest=3", "scores=true", "--json")]
    assert [row["output"] for row in as_json] == plain
    assert [each["output"] for each in as_json[2]["nbest"]] == [row[2] for row in rows[4:]]
    assert as_json[0]["score"] == pytest.approx(scores[0], abs=1e-4)
    drawn = lines("sample=true", "temperature=3", "nbest=2")
    assert drawn == lines("sample=true", "temperature=3", "nbest=2")
    assert drawn != lines("sample=true", "temperature=3", "nbest=2", "seed=1")


def test_a_bad_line_is_one_error_and_the_others_come_out(
    in_process: Any, bundle: Path, monkeypatch: Any
) -> None:
    bad = {2: b"a \xff", 4: b"b\0c", 6: b"a " * 100, 1003: b"\xc3"}
    # Two windows of 65,536 bytes.
    rows = [
        bad.get(number, b"a b " + b"c " * 10 * (number % 2) + b" " * 60)
        for number in range(1, 1101)
    ]
    shown = {}
    for options in ((), ("--strict",), ("--json",)):
        stdin = io.BytesIO(b"".join(row + b"\n" for row in rows))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stdin))
        shown[options] = in_process("translate", bundle, *options)
    code, out, err = shown[()]
    assert code == 2
    assert [i for i, line in enumerate(out.split("\n")[:-1], 1) if not line] == list(bad)
    assert len(out.split("\n")[:-1]) == 1100
    errors = err.splitlines()
    assert [line.split(":")[1] for line in errors] == [str(number) for number in bad]
    assert errors[0].startswith("error[E-DATA] standard input:2:3: byte 0xff is not UTF-8")
    assert "4:2: NUL character" in errors[1]
    assert "6: 101 tokens; wanted 1 to 19 tokens" in errors[2]
    code, out, err = shown[("--strict",)]
    assert (code, len(out.splitlines()), err.splitlines()) == (2, 1, errors[:1])
    code, out, err = shown[("--json",)]
    assert ["error" in json.loads(line) for line in out.splitlines()[:6]] == [0, 1, 0, 1, 0, 1]


def test_translate_streams(bundle: Path, root: Path) -> None:
    """A line comes out before the next goes in; a reader that leaves ends it quietly."""
    code = "import sys; from vinedresser.cli import main; sys.exit(main())"
    with subprocess.Popen(
        [sys.executable, "-c", code, "translate", str(bundle)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in range(2):
            process.stdin.write(b"a b c\n")
            process.stdin.flush()
            assert process.stdout.readline().strip()
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            for _ in range(200):
                process.stdin.write(b"a b c\n" * 100)
                process.stdin.flush()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait(60) in (0, 141)


def test_evaluate_scores_a_split(in_process: Any, bundle: Path, files: Any) -> None:
    code, out, _ = in_process("evaluate", bundle, files("task.json"), "split=dev", "--json")
    scores = json.loads(out)
    assert code == 0
    assert (scores["split"], scores["sentences"]) == ("dev", 40)
    assert scores["signature"].endswith("|search:greedy|cap:20")
    assert sum(scores["by_length"]["sentences"]) == 40
    assert scores["by_position"]["position"][0] == "1-5"
    code, out, _ = in_process(
        "evaluate", bundle, files("task.json"), "split=dev", "--json", "beam=3", "beam_spread=9"
    )
    assert "|beam:3|alpha:0.6|spread:9|" in json.loads(out)["signature"]
    assert code == 0
    trained = json.loads((bundle.parent / "outcome.json").read_text())["scores"]
    assert scores["per"] == pytest.approx(trained["per"])
    code, out, err = in_process("evaluate", bundle, files("task.json"), "--json")
    assert (code, out) == (2, "")
    assert "test" in err


@pytest.mark.parametrize("beam", [1, 3])
def test_evaluate_equals_translate_and_the_command_lines_of_the_libraries(
    beam: int, in_process: Any, bundle: Path, files: Any, tmp_path: Path, tiny_study: Any,
    monkeypatch: Any,
) -> None:  # fmt: skip
    dev = tiny_study["base"]["task"]["corpus"]["dev"]
    stdin = io.TextIOWrapper(io.BytesIO(Path(dev["source"]).read_bytes()))
    monkeypatch.setattr(sys, "stdin", stdin)
    code, said, err = in_process("translate", bundle, f"beam={beam}")
    assert (code, err) == (0, "")
    (tmp_path / "said").write_text(said)
    scored = {}
    for metric in ("bleu", "per"):
        words = (f"metric={metric}", "split=dev", f"beam={beam}", "--json")
        code, out, err = in_process("evaluate", bundle, files("task.json"), *words)
        assert (code, err) == (0, "")
        scored[metric] = json.loads(out)[metric]
    files_of = (dev["target"], str(tmp_path / "said"))
    for metric, words in {
        "bleu": ("sacrebleu", files_of[0], "-i", files_of[1], "-b", "-w", "6"),
        "per": ("jiwer", "-r", files_of[0], "-h", files_of[1]),
    }.items():
        tool = str(Path(sys.executable).with_name(words[0]))
        done = subprocess.run([tool, *words[1:]], capture_output=True, text=True, check=True)
        value = float(done.stdout) * (100 if metric == "per" else 1)
        assert scored[metric] == pytest.approx(value, abs=1e-5)
        assert scored[metric] > 0


def test_compare_gives_a_verdict(in_process: Any, bundle: Path, files: Any, tmp_path: Path) -> None:
    loaded = load_bundle(bundle)
    spoilt = save_bundle(
        tmp_path / "spoilt",
        experiment=loaded.experiment,
        weights={name: tensor * 0.5 for name, tensor in loaded.model.state_dict().items()},
        tokenizers=(loaded.source_tokenizer, loaded.target_tokenizer),
        scores=loaded.scores,
    )
    words = [bundle, bundle, spoilt, f"{bundle},{spoilt}", files("task.json"), "split=dev"]
    code, out, err = in_process("compare", *words, "--json")
    assert (code, err) == (0, "")
    same, worse, mixed = json.loads(out)
    assert same["verdict"] == "not distinguishable at 1,000 resamples"
    assert (same["p"], same["better_by"]) == (1, [0, 0])
    assert worse["verdict"] == "worse, p < 0.05"
    assert worse["better_by"][1] < 0
    assert worse["value"] > worse["value_against"] == same["value"]
    assert mixed["value"] == pytest.approx((worse["value"] + same["value"]) / 2)
    code, out, err = in_process("compare", *words, "metric=chrf", "beam=2", "resamples=100")
    assert (code, err) == (0, "")
    assert "dev chrf" in out
    assert len(out.splitlines()) == 3
    code, out, err = in_process("compare", bundle, files("task.json"))
    assert (code, out) == (2, "")
    assert "expected two models or more, then a task" in err


@pytest.mark.parametrize("name", ["transformer-tiny", "rnn-small", "listener", "conv-small", "rnn"])
def test_describe_a_model(in_process: Any, name: str) -> None:
    words = (name, "source=31", "target=43", "dropout=0.2")
    code, out, err = in_process("describe", *words, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["parameters"] == sum(part["parameters"] for part in found["parts"]) > 10_000
    assert found["model"]["dropout"] == 0.2
    assert found["vocabulary"] == {"source": 31, "target": 43, "joint": False, "features": 0}
    code, out, err = in_process("describe", *words)
    assert (code, err) == (0, "")
    assert f"{found['parameters']:,} parameters, all trainable" in out
    assert "source 31, target 43 (sizes as given)" in out


def test_describe_an_experiment_by_its_shards(
    in_process: Any, files: Any, reversal: ShardSet, tmp_path: Path
) -> None:
    code, out, _ = in_process("describe", files("experiment.json"), "model.dropout=0.1")
    assert code == 0
    assert "assumed" in out
    shutil.copytree(reversal.folder, tmp_path / "space" / "shards" / reversal.folder.name)
    code, out, _ = in_process("describe", files("experiment.json"), "--json")
    assert json.loads(out)["vocabulary"]["source"] == reversal.source_size
    code, out, _ = in_process("describe", files("experiment.json"), "model=rnn-small", "--json")
    assert json.loads(out)["model"]["kind"] == "trainables.attention_rnn"


def test_describe_shards_and_bundles(
    in_process: Any, reversal: ShardSet, bundle: Path, tmp_path: Path
) -> None:
    code, out, err = in_process("describe", reversal.folder, "tokens=64")
    assert (code, err) == (0, "")
    for word in ("train", "400", "real tokens of 64", "known", "repeat an earlier pair"):
        assert word in out
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [path.read_bytes()[:4] for path in pictures] == [b"\x89PNG"] * 3
    code, out, _ = in_process("describe", reversal.folder, "pictures=", "--json")
    assert json.loads(out)["account"]["train"]["rows_out"] == 400
    assert json.loads(out)["pictures"] == []
    code, out, _ = in_process("describe", bundle, "--json")
    assert json.loads(out)["vocabulary"]["target"] == reversal.target_size


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("transformer-smal",), ("there is no model", "did you mean transformer-small?")),
        (("rnn-small", "dropuot=1"), ("did you mean dropout?",)),
        (("rnn-small", "sorce=3"), ("sorce: unknown key",)),
        (("transformer-tiny", "tie=all", "source=8", "target=9"), ("tie: all", "joint=true")),
        ((".",), ("neither a shard set nor a model",)),
        (("none.yaml",), ("none.yaml", "no such file")),
    ],
    ids=lambda value: value[0],
)
def test_describe_says_what_is_wrong(in_process: Any, words: Any, parts: Any) -> None:
    code, out, err = in_process("describe", *words)
    assert (code, out) == (2, ""), err
    assert is_clear(err), err
    assert all(part in err for part in parts), err


def test_attend_draws_and_measures_every_head(
    in_process: Any, bundle: Path, tmp_path: Path
) -> None:
    code, out, err = in_process("attend", bundle, "a b c", "c b a", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["is_forced"] is True
    assert list(found["modules"]) == [
        "encoder.0.enc_self",
        "decoder.0.dec_self",
        "decoder.0.dec_enc",
    ]
    assert found["modules"]["decoder.0.dec_enc"]["rows"] == ["c", "b", "a", "</s>"]
    assert found["best"]["module"] == "decoder.0.dec_enc"
    assert [(tmp_path / name).read_bytes()[:4] for name in found["pictures"]] == [b"\x89PNG"] * 3
    with np.load(tmp_path / found["maps"], allow_pickle=False) as maps:
        np.testing.assert_allclose(maps["decoder.0.dec_enc"].sum(-1), 1, atol=1e-5)
        assert list(maps["decoder.0.dec_enc.columns"]) == ["a", "b", "c", "</s>"]
    code, out, err = in_process("attend", bundle, "a b c", "--out", tmp_path / "seen")
    assert (code, err) == (0, "")
    assert re.search(r"decoder\.0\.dec_enc +output to source", out)
    assert len(list((tmp_path / "seen").glob("*.png"))) == 3


@pytest.mark.parametrize(
    "words", [("no/such/folder", "a"), ("BUNDLE", ""), ("BUNDLE", "a", "b " * 40)]
)
def test_attend_refuses_in_one_line_and_leaves_nothing(
    in_process: Any, bundle: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    before = sorted(tmp_path.iterdir())
    code, out, err = in_process("attend", *(bundle if w == "BUNDLE" else w for w in words))
    assert (code, out) == (2, ""), err
    assert is_clear(err), err
    assert sorted(tmp_path.iterdir()) == before


def test_doctor_creates_nothing(
    in_process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vinedresser.cli.verbs import doctor

    monkeypatch.setattr(doctor, "_ray", lambda: "not started")
    code, out, _ = in_process("doctor", "--json")
    parts = {row["part"]: row for row in json.loads(out)}
    assert code == 0, out
    assert f"{tmp_path}/space can be created" in parts["workspace"]["detail"]
    assert "no runs at" in parts["mlflow"]["detail"]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "space").mkdir()
    _, out, _ = in_process("doctor", "--json")
    assert f"{tmp_path}/space can be written" in out
    assert list((tmp_path / "space").iterdir()) == []


@pytest.mark.slow
def test_doctor_tries_every_part(cli: Cli, tmp_path: Path) -> None:
    done = cli("doctor", "--json")
    assert list(tmp_path.iterdir()) == []
    parts = {row["part"]: row["works"] for row in json.loads(done.stdout)}
    assert {"python", "torch", "ray", "mlflow", "workspace", "shared memory"} <= set(parts)
    assert done.returncode == (0 if all(parts.values()) else 3)
    assert parts["ray"]
    assert parts["mlflow"]


@pytest.mark.slow
def test_train_tells_how_far_it_is_and_keeps_stdout_for_the_result(
    in_process: Any, files: Any
) -> None:
    code, out, err = in_process("train", files("experiment.json"), "--json")
    assert code == 0, err
    assert set(json.loads(out)) == {"bundle", "scores"}
    assert re.search(r"s  step \d+/60  epoch \d\.\d+  loss \d\.\d\d  [\d.k]+ tok/s", err), err
    assert "step 60/60  per" in err
    assert "\x1b" not in err


@pytest.mark.slow
def test_train_on_a_terminal_has_a_bar_and_gives_the_cursor_back(
    files: Any, environment: Mapping[str, str], tmp_path: Path, with_database: Any, forked: Any
) -> None:
    with_database(tmp_path / "space")
    main, side = pty.openpty()
    process = forked(
        "train", files("experiment.json"),
        env={**environment, "TERM": "xterm", "COLUMNS": "80"}, stderr=Path(os.ttyname(side)),
    )  # fmt: skip
    # Once it is closed here and there, the other end ends; the process opens it first.
    threading.Thread(target=lambda: (process.wait(timeout=200), os.close(side))).start()
    seen = bytearray()
    with contextlib.suppress(OSError):  # EIO: the other side is closed
        while part := os.read(main, 1 << 16):
            seen += part
    os.close(main)
    out = process.communicate(timeout=200)[0]
    assert process.returncode == 0, seen.decode()
    assert Path(out.strip()).is_dir()
    text = seen.decode()
    assert "━" in text
    assert "/60" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1
    # Evaluations stand in whole lines of their own.
    lines = [line for line in text.split("\r\n") if "teacher-forced" in line]
    assert [line for line in lines if re.search(r"step (20|40|60)/60  per", line)] == lines
    assert len(lines) == 3


# --- signals -------------------------------------------------------------------------------------


@pytest.mark.fault("T09")
@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stopped_training_goes_on_with_the_same_command(
    in_process: Any, files: Any, environment: Mapping[str, str], tmp_path: Path, forked: Any,
    tiny_study: dict[str, Any], with_database: Any, number: signal.Signals, code: int,
) -> None:  # fmt: skip
    with_database(tmp_path / "space")
    # Without a periodic checkpoint, only that of the stop can be there.
    slow = {"steps": 250, "checkpoint_every": 250, "evaluation": {"num_evaluations": 1}}
    words = ("train", files("experiment.json", {**tiny_study["base"], **slow}))
    process = forked(*words, env=environment)
    end = time.monotonic() + 200
    while not list(tmp_path.glob("space/runs/*/.writer.json")) and time.monotonic() < end:
        time.sleep(0.005)
    time.sleep(0.1)
    process.send_signal(number)
    since = time.monotonic()
    out, err = process.communicate(timeout=200)
    assert time.monotonic() - since < 30  # what a cluster grants by default
    assert process.returncode == code, err
    (stored,) = tmp_path.glob("space/runs/*/checkpoints/step-*")
    assert 0 < int(stored.name.removeprefix("step-")) < 250
    assert "stopped on request at step" in err
    assert ("Ctrl-C again" in err) == (number == signal.SIGINT)
    assert out == ""
    assert "run the same command to resume" in err.splitlines()[-1]
    assert "Traceback" not in err
    store = tracking.store_for(tmp_path / "space", "reversal")
    assert [run.state for run in tracking.leaderboard(store)] == ["KILLED"]
    if number == signal.SIGINT:
        return  # going on is the same after both

    done, out, err = in_process(*words, "--json")
    assert done == 0, err
    assert "resumed" in err
    assert Path(json.loads(out)["bundle"]).is_dir()
    assert [run.state for run in tracking.leaderboard(store)] == ["FINISHED"]
