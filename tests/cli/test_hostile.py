"""Hostile words and files: each ends in one line and a documented exit code, and leaves nothing."""

import io
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from vinedresser.data.shards import ShardSet

pytestmark = pytest.mark.filterwarnings("ignore")

# Wall seconds after which a command counts as hanging; the slowest takes one on a quiet machine.
PATIENCE = 60
EXIT_CODES = {0, 2, 3, 4, 75}

NAMES = (
    "", " ", ".", "..", "/", "~", "-", "=", "a=b", "\0", "a\0b.yaml", "a\nb.yaml", "a\tb.yaml",
    "a\x1b[31m.yaml", "\udcff.yaml", "no/\udcff", "💥", "[bold]x[/bold]", "[/]", "[/].yaml",
    "[red]/no.yaml", "x" * 300, "x" * 300 + ".yaml", "x" * 5000, "no/" * 3000 + "x.yaml",
    "pipe", "pipe.yaml", "./pipe", "/dev/zero", "/dev/full", "folder", "folder.yaml", "loop",
    "loop.yaml", "bytes.yaml", "nul.yaml", "bigint.yaml", "deep.json", "list.yaml", "number.json",
    "keys.yaml", "task.json/x.yaml", "folder/../pipe.yaml", "models:/", "models:/x", "models:/x@",
    "models:/@champion", "models:/../x/1", "models:/x/99999999999999999999", "models://x/1",
    "0" * 32, "os", "os.path", "trainables", "trainables.", "trainables..x", ".trainables",
    "trainables.rnn.x", "vinedresser.cli", "vinedresser.__main__", "search_spaces",
    "hostile", "hostile.raising", "hostile.raising.study", "hostile.exiting", "hostile.exiting.x",
    "hostile.aborting.x", "hostile.broken", "hostile.needy", "hostile.odd.value", "hostile.odd",
)  # fmt: skip

OVERRIDES = (
    "", "=", "==", "a", ".=1", "..=1", "a..b=1", "steps", "steps=", "steps=0", "steps=-1",
    "steps=NaN", "steps=Infinity", "steps=1e400", f"steps={2**63}", f"steps={10**30}",
    "steps=" + "1" * 5000, "steps=true", "steps=[]", "steps={}", "steps=" + "[" * 5000,
    'steps={"a": {"b": [1]}}', "seed=-1", f"seed={2**64}", "name=", "name=[/]", "name=../x",
    "name=" + "x" * 300, "name=a\0b", 'name="a\\u0000b"', "name=\udcff", "name=[1, 2]", "name.x=1",
    "\0=1", "a\nb=1", "[bold]=1", "x" * 5000 + "=1", "optim=null", "optim=3", "optim=[]",
    "optim..lr=1", "optim.lr.x=1", "optim.lr=1e400", 'optim.lr="1"', "optim.lr=null",
    'optim={"lr": {"lr": 1}}', "optim.betas=[1]", "optim.betas=[[1], 2]", "optim.betas=12",
    "optim.freeze=[[1]]", 'optim.freeze={"a": 1}', "model=", "model=null", "model=3", "model=[]",
    "model={}", "model=../x", "model=[/]", "model=os.path", "model=hostile.raising",
    "model=hostile.exiting", "model.kind=3", "model.kind=[1]", 'model={"kind": ["transformer"]}',
    'model={"kind": {"a": 1}}', 'model={"kind": null}', "model.d_model=0",
    f"model.d_model={10**18}x", "model.d_model=-3", f"model.encoder_layers={10**9}",
    "model.concrete_heads=[[1]]", 'model.concrete_heads={"a": 1}', "task=", "task=pipe.yaml",
    "task=[/].yaml", "task=task.json/x.yaml", "task=loop.yaml", "task=folder.yaml", "task=3",
    "task=[]", "task={}", "task=hostile.raising.task", "task=hostile.exiting.task",
    "task.corpus=3", "task.corpus=[]", "task.corpus.kind=[1]", 'task.corpus={"kind": ["text"]}',
    'task.corpus={"kind": {"a": 1}}', "task.corpus.train=null", "task.corpus.train.source=[]",
    "task.corpus.train.source=[[1]]", 'task.tokenizer={"kind": ["bpe"]}', "task.tokenizer=[1]",
    "task.metric=[1]", "task.metric={}", "task.max_source_length=0", "decoding.beam=0",
    "compute.workers=0", "compute.devices={}", "compute.devices=[1]", "compute.device=[1]",
    "init=[]", "init=3", 'init="\\n"', "batch=[1]", "batch.order=[1]", "batch.subset=2",
    "objective=3", "objective=[]", 'objective={"x": [1]}',
)  # fmt: skip

SPACES = (
    "{}", "3", "[]", "null", '{"": 1}', '{"optim.lr": 3}', '{"optim.lr": {}}', '{"optim.lr": []}',
    '{"optim.lr": {"type": ["float"]}}', '{"optim.lr": {"type": {"a": 1}}}',
    '{"optim.lr": {"type": "float"}}', '{"optim.lr": {"type": "float", "low": 2, "high": 1}}',
    '{"optim.lr": {"type": "float", "low": "a", "high": 1}}',
    '{"optim.lr": {"type": "float", "low": [1], "high": 1}}',
    '{"optim.lr": {"type": "float", "low": null, "high": 1}}',
    '{"optim.lr": {"type": "float", "low": NaN, "high": 1}}',
    '{"optim.lr": {"type": "float", "low": 1e-3, "high": Infinity}}',
    '{"optim.lr": {"type": "float", "low": 0, "high": 1, "log": true}}',
    '{"optim.lr": {"type": "float", "low": 0.1, "high": 1, "step": 0}}',
    '{"optim.lr": {"type": "float", "low": 0.1, "high": 1, "step": -1}}',
    '{"optim.lr": {"type": "float", "low": 0.1, "high": 1, "nonsense": 1}}',
    '{"steps": {"type": "int", "low": 60, "high": 70, "step": 0}}',
    '{"steps": {"type": "int", "low": 1.5, "high": 70}}',
    '{"steps": {"type": "int", "low": 60, "high": 9223372036854775808}}',
    '{"optim.lr": {"type": "categorical"}}', '{"optim.lr": {"type": "categorical", "choices": []}}',
    '{"optim.lr": {"type": "categorical", "choices": 3}}',
    '{"optim.lr": {"type": "categorical", "choices": [[1]]}}',
    '{"model": {"type": "categorical", "choices": [{"kind": "transformer"}]}}',
    '{"optim.betas": {"type": "categorical", "choices": [[0.9, 0.98], [0.9, 0.99]]}}',
    '{"optim": {"type": "categorical", "choices": [{"lr": 1}]}}',
    '{"model": {"type": "categorical", "choices": ["hostile.exiting"]}}',
    '{"optim..lr": {"type": "float", "low": 1e-3, "high": 1}}',
    '{"name": {"type": "categorical", "choices": ["../x"]}}',
)  # fmt: skip

SIZES = (
    "source=-1", "source=1e3", f"source={10**12}", f"target={10**18}", f"features={10**12}",
    f"d_model={10**9}", "d_model=1048576", f"d_ff={10**15}", f"encoder_layers={10**9}",
    f"num_heads={10**9}", "num_heads=0", "joint=3", "joint=[]", "dropout=2", "dropout=NaN",
    f"max_length={10**12}",
)  # fmt: skip

Run = Callable[..., tuple[int, str]]


class HangError(Exception):
    """A command took longer than a hostile word is worth."""


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """Run a command in a folder of hostile files, and check how it ends; (exit code, stderr)."""
    # Before the clock runs: an import of torch that is interrupted cannot be repeated.
    import vinedresser.pipeline  # noqa: F401
    from vinedresser.cli import main

    monkeypatch.chdir(tmp_path)
    for key in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "VINEDRESSER_DEBUG"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("VINEDRESSER_WORKSPACE", "space")
    monkeypatch.setattr(logging.root, "handlers", [])

    def hang(*_: object) -> None:
        raise HangError

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)}
    signal.signal(signal.SIGALRM, hang)

    def call(*words: object, stdin: bytes = b"") -> tuple[int, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfd.readouterr()
        present = sorted(tmp_path.rglob("*"))
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        code = main([str(word) for word in words])
        signal.setitimer(signal.ITIMER_REAL, 0)
        _, err = capfd.readouterr()
        shown = f"{[ascii(str(word))[:100] for word in words]} -> {code}: {err[:1000]}"
        assert code in EXIT_CODES, shown
        assert "E-BUG" not in err, shown
        assert "Traceback" not in err, shown
        if code:
            assert is_one_problem(err), shown
            assert sorted(tmp_path.rglob("*")) == present, shown
        return code, err

    yield call
    for number, handler in before.items():
        signal.signal(number, handler)


def is_one_problem(err: str) -> bool:
    """One line; one per problem where a file or a value has several."""
    lines = err.splitlines()
    return bool(lines) and all(line.startswith("error[E-") for line in lines)


@pytest.fixture
def files(tmp_path: Path, tiny_study: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Valid files of every kind, hostile ones beside them, and a package of hostile modules."""
    parts = {"study": tiny_study, "experiment": tiny_study["base"],
             "task": tiny_study["base"]["task"]}  # fmt: skip
    for name, value in parts.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    for name in ("pipe", "pipe.yaml"):
        os.mkfifo(tmp_path / name)
    for name in ("folder", "folder.yaml"):
        (tmp_path / name).mkdir()
    for name in ("loop", "loop.yaml"):
        (tmp_path / name).symlink_to(name)
    (tmp_path / "bytes.yaml").write_bytes(bytes(range(256)))
    (tmp_path / "nul.yaml").write_text('name: "a\\0b"\n')
    (tmp_path / "bigint.yaml").write_text(f"steps: {2**70}\n")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "number.json").write_text("3")
    (tmp_path / "keys.yaml").write_text("1: 2\nnull: 3\n? ''\n: {kind: [1]}\n")
    package = tmp_path / "hostile"
    package.mkdir()
    for name, text in {
        "__init__": "", "raising": "raise ValueError('a\\nb')", "exiting": "import sys; sys.exit()",
        "aborting": "raise BaseException('no')", "broken": "x = (", "needy": "import not_there",
        "odd": "class Odd:\n def __getattr__(self, name): raise OSError\nvalue = Odd()",
    }.items():  # fmt: skip
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("VINEDRESSER_PACKAGES", "hostile")
    for name in [name for name in sys.modules if name.split(".")[0] == "hostile"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture(scope="module")
def bundle(reversal: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of text."""
    from vinedresser.bundle import save_bundle, vocabulary_of
    from vinedresser.config import Experiment
    from vinedresser.data.shards import tokenizers

    model = {"kind": "transformer-tiny"}
    experiment = Experiment.from_json({"task": reversal.task.to_json(), "model": model})
    both = tokenizers(reversal)
    built = experiment.model.instantiate(vocabulary_of(*both, joint=reversal.is_joint))
    return save_bundle(
        tmp_path_factory.mktemp("model") / "bundle",
        experiment=experiment, weights=built.state_dict(), tokenizers=both, scores={},
    )  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ("prepare", "?", "--dry-run"), ("train", "?", "--dry-run"), ("check", "?"),
        ("sweep", "?", "--dry-run"), ("retrain", "?", "--dry-run"), ("describe", "?"),
        ("prune", "no/such", "?", "--dry-run"), ("prune", "?"), ("export", "?", "name"),
        ("evaluate", "?", "task.json"), ("evaluate", "no/such", "?"), ("translate", "?"),
        ("attend", "?", "a b"), ("runs", "?"), ("?",), ("train", "experiment.json", "?"),
        ("runs", "-w", "?"), ("translate", "no/such", "-w", "?"),
        ("prepare", "task.json", "--executor", "?"), ("ui", "?"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_hostile_names(run: Run, files: None, words: Sequence[str]) -> None:
    for name in NAMES:
        run(*(name if word == "?" else word for word in words))


@pytest.mark.parametrize(
    "words",
    [
        ("train", "experiment.json", "--dry-run"), ("train", "study.json", "--dry-run"),
        ("describe", "experiment.json"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_hostile_overrides_of_an_experiment(run: Run, files: None, words: Sequence[str]) -> None:
    for override in OVERRIDES:
        run(*words, override)


def test_hostile_overrides_of_a_task(run: Run, files: None) -> None:
    for override in OVERRIDES:
        run("prepare", "task.json", override.removeprefix("task."), "--dry-run")


def test_hostile_spaces(run: Run, files: None) -> None:
    for space in SPACES:
        run("sweep", "study.json", f"space={space}", "--dry-run")
        run("sweep", "study.json", "stopping=null", f"objective={space}", "--dry-run")


def test_hostile_sizes(run: Run) -> None:
    for size in SIZES:
        run("describe", "transformer-tiny", size, "source=100")
        run("describe", "transformer-tiny", size)


@pytest.mark.parametrize("verb", ["evaluate", "translate"])
def test_hostile_options_of_decoding(run: Run, files: None, bundle: Path, verb: str) -> None:
    task = ["task.json"] if verb == "evaluate" else []
    for word in (
        "beam=0", "beam=-1", "beam=1.5", f"beam={10**9}", f"beam={2**80}", "beam=[1]", "beam=NaN",
        "length_alpha=-1", "length_alpha=NaN", "length_alpha=1e999", "split=3", "split=[/]",
        "split=[1]", "[/]=1", "beam", "=", "a\0=1", "beam.x=1",
    ):  # fmt: skip
        code, _ = run(verb, bundle, *task, word)
        assert code == 2


@pytest.mark.parametrize(
    ("stdin", "place"),
    [
        (b"\xff\n", "standard input:1:1: byte 0xff"),
        (b"a b\nc \xe9 d\n", "standard input:2:3: byte 0xe9"),
        ("ä ".encode() + b"\xc3", "standard input:1:4: byte 0xc3"),
        (b"a\n\nb\0c\n", "standard input:3:2: NUL"),
        (b"a " * 100_000, "standard input:1: 100001 tokens"),
    ],
)
def test_hostile_lines_to_translate(run: Run, bundle: Path, stdin: bytes, place: str) -> None:
    code, err = run("translate", bundle, stdin=stdin)
    assert code == 2
    assert place in err


def test_hostile_words_to_attend_and_export(run: Run, bundle: Path) -> None:
    for source in ("", "\0", "a\nb", "\udcff", "a " * 10_000, "\t"):
        assert run("attend", bundle, source)[0] == 2
    assert run("attend", bundle, "a [/]", "a " * 10_000)[0] == 2
    assert run("attend", bundle, "a [/]", "b", "--out", "\0")[0] == 2
    for name in ("", " ", "../x", "\0", "x" * 300, "[/]", "a/b", "💥"):
        assert run("export", bundle, name)[0] == 2


def test_hostile_ports(run: Run) -> None:
    for port in ("0", "-1", "65536", str(10**12), str(2**70), "1e3", "0x50", "[/]", "80.5", "\0"):
        assert run("ui", port)[0] == 2


@pytest.mark.parametrize("side", ["source", "target"])
def test_hostile_corpora(
    run: Run, files: None, tmp_path: Path, tiny_study: dict[str, Any], side: str
) -> None:
    task = tiny_study["base"]["task"]
    for name in ("pipe", "folder", "loop", "/dev/zero", "x" * 300, "no/" * 3000, "[/]", "*", ""):
        corpus = {**task["corpus"], "train": {**task["corpus"]["train"], side: name}}
        (tmp_path / "hostile.json").write_text(json.dumps({**task, "corpus": corpus}))
        assert run("prepare", "hostile.json")[0] in (2, 3)


def test_text_models_are_not_scored_on_recordings(
    run: Run, bundle: Path, tmp_path: Path, tiny_study: dict[str, Any]
) -> None:
    task = {**tiny_study["base"]["task"], "tokenizer": None}
    task |= {
        "corpus": {"kind": "speech", "train": "none.jsonl", "dev": "none.jsonl"},
        "source_tokenizer": {"kind": "frames"}, "target_tokenizer": {"kind": "symbols"},
    }  # fmt: skip
    (tmp_path / "speech.json").write_text(json.dumps(task))
    code, err = run("evaluate", bundle, "speech.json", "split=dev")
    assert code == 2
    assert "the source is recordings, the input of model" in err


@pytest.mark.parametrize("name", ["[bold]model", ":boom:"])
def test_markup_in_a_path_is_printed_as_it_is(
    tmp_path: Path, bundle: Path, name: str, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    from vinedresser.cli import main

    monkeypatch.chdir(tmp_path)
    Path("up").mkdir()
    Path("up", name).symlink_to(bundle, target_is_directory=True)
    assert main(["describe", f"up/{name}"]) == 0
    assert f"up/{name}" in capfd.readouterr().out
