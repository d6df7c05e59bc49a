"""Snapshots: what every verb prints, word for word, with its exit code.

`tests/golden/cli/GROUP.txt` holds commands and their answers: lines of standard output are
indented, lines of standard error begin with `!`. Paths, seconds, ids and what a trained model
answers are replaced by words in `<>`, and spaces at the ends of lines are dropped.

A change that is meant to alter a text records the group anew, and its difference is reviewed:

    python -m pytest tests/cli/test_snapshots.py --record-golden        # -k errors for one group

Not here, because they need minutes: sweep, prune, retrain and check for real, doctor, ui.
"""

import difflib
import io
import json
import logging
import random
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")

SNAPSHOTS = Path(__file__).parents[1] / "golden" / "cli"
VERBS = (
    "prepare", "train", "check", "sweep", "prune", "export", "retrain", "evaluate", "compare",
    "translate", "describe", "attend", "runs", "sync", "gc", "ui", "doctor", "submit",
)  # fmt: skip
# Volatile in every command: pattern -> what is printed instead.
EVERYWHERE = (
    (r"(?m)^ *\d+\.\ds  ", "<seconds>  "),
    (r"(?<!\.)\b[0-9a-f]{12,64}\b", "<digest>"),
)
# Volatile where a model was trained: decimals, rates and times, short ids; widths of columns.
OF_MODELS = (
    # Written every some seconds.
    (r"(?m)^.*(?: ETA | tok/s).*\n", ""),
    (r'"started": ".*?"', '"started": "<time>"'),
    (r"jiwer:[\d.]+", "jiwer:<version>"),
    (r"-?\d+(\.\d+)?e[+-]\d+|-?\d+\.\d+", "<decimal>"),
    (r"(<decimal>|\d+)[kM]? tok/s", "<rate> tok/s"),
    (r"(?m)at step \d+$", "at step <step>"),
    (r'(head"?:?) \d\b', r"\1 <head>"),
    (r"\b\d:\d\d:\d\d\b", "<time>"),
    (r"\b(?=[0-9a-f]*\d)[0-9a-f]{8}\b", "<id>"),
    (r"(?m)(?<=\S) {2,}", "  "),
)

Shown = Callable[..., str]


@pytest.fixture
def shown(tmp_path: Path, root: Path, monkeypatch: Any, capfd: Any) -> Iterator[Shown]:
    """Run one command in an empty folder; return it with all that it printed, as text."""
    from vinedresser.cli import main

    monkeypatch.chdir(tmp_path)
    for key in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "VINEDRESSER_DEBUG", "FORCE_COLOR"):
        monkeypatch.delenv(key, raising=False)
    # From both, Click takes the program's name.
    monkeypatch.setattr(sys, "argv", ["vinedresser"])
    monkeypatch.setattr(sys.modules["__main__"], "__package__", None, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("VINEDRESSER_WORKSPACE", str(tmp_path / "space"))
    # pytest's handlers would keep the program from installing its own.
    monkeypatch.setattr(logging.root, "handlers", [])
    before = signal.getsignal(signal.SIGTERM)
    places = {tmp_path: "<here>", root: "<root>", root.parent / "shared": "<shared>"}

    def run(*words: object, stdin: str = "", masks: Sequence[tuple[str, str]] = ()) -> str:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capfd.readouterr()
        code = main([str(word) for word in words])
        typed, text = f"vinedresser {' '.join(str(word) for word in words)}", ""
        for sign, stream in zip(("$ ", "    ", "!   "), (typed, *capfd.readouterr()), strict=True):
            for path, name in places.items():
                stream = stream.replace(str(path), name)
            for pattern, name in (*EVERYWHERE, *masks):
                stream = re.sub(pattern, name, stream)
            text += "".join(f"{sign}{line}".rstrip() + "\n" for line in stream.splitlines())
        return f"{text}exit {code}\n\n"

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def compared(is_recording: bool) -> Callable[[str, str], None]:
    """Compare a group with its file, or write the file."""

    def compare(group: str, found: str) -> None:
        path = SNAPSHOTS / f"{group}.txt"
        if is_recording:
            path.write_text(found)
            pytest.skip(f"{path.name} recorded")
        stored = path.read_text() if path.is_file() else ""
        lines = difflib.unified_diff(
            stored.splitlines(), found.splitlines(), f"stored {path.name}", "printed now",
            lineterm="",
        )  # fmt: skip
        assert not (text := "\n".join(lines)), text

    return compare


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """Write a corpus that reverses its source, and task, experiment and study as files."""
    draw = random.Random(0)
    for split, count in (("train", 200), ("dev", 20)):
        rows = [draw.choices("abcdef", k=draw.randint(2, 6)) for _ in range(count)]
        for side, step in (("source", 1), ("target", -1)):
            lines = (" ".join(row[::step]) + "\n" for row in rows)
            (tmp_path / f"{split}.{side}").write_text("".join(lines))
    corpus = {s: {"source": f"{s}.source", "target": f"{s}.target"} for s in ("train", "dev")}
    task = {
        "name": "reversal", "corpus": corpus, "tokenizer": {"kind": "symbols"}, "metric": "per",
        "max_source_length": 20, "max_target_length": 12,
    }  # fmt: skip
    model = {
        "kind": "transformer", "d_model": 16, "d_ff": 32, "num_heads": 2, "encoder_layers": 1,
        "decoder_layers": 1,
    }  # fmt: skip
    experiment = {
        "name": "tiny", "task": "task.json", "model": model, "batch": {"max_padded_tokens": 160},
        "optim": {"lr": 5e-3, "warmup_steps": 5},
        "evaluation": {"num_evaluations": 2, "attention_every": 0},
        "compute": {"device": "cpu", "precision": "fp32"}, "steps": 40, "checkpoint_every": 20,
    }  # fmt: skip
    space = {"optim.lr": {"type": "float", "low": 1e-3, "high": 1e-2, "log": True}}
    study = {"name": "tiny-lr", "base": {**experiment, "task": task}, "space": space}
    written = {"task": task, "experiment": experiment, "study": {**study, "num_trials": 4}}
    for name, value in written.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value, indent=1))
    return written


def test_help(shown: Shown, compared: Any) -> None:
    from vinedresser.cli.app import app

    def names(group: Any) -> list[str]:
        return [c.name or c.callback.__name__ for c in group.registered_commands]

    assert sorted(VERBS) == sorted(names(app))
    texts = [shown("--help"), *(shown(verb, "--help") for verb in VERBS)]
    for group in app.registered_groups:
        texts.append(shown(group.name, "--help"))
        texts += [shown(group.name, name, "--help") for name in names(group.typer_instance)]
    compared("help", "".join(texts))


PLANS = {
    "prepare": ("search_spaces.demo", "search_spaces.digits", "search_spaces.translation"),
    "train": (
        "search_spaces.demo.EXPERIMENT", "search_spaces.digits.EXPERIMENT",
        "search_spaces.translation.EXPERIMENT", "search_spaces.architectures",
    ),
    "sweep": (
        "search_spaces.demo", "search_spaces.digits", "search_spaces.translation",
        "search_spaces.architectures", "pipelines.demo",
    ),
    "retrain": ("pipelines.demo", "pipelines.translation"),
    "prune": ("some-model",),
}  # fmt: skip


@pytest.mark.parametrize("verb", PLANS)
def test_plans_of_what_is_shipped(shown: Shown, compared: Any, verb: str) -> None:
    names = PLANS[verb]
    texts = [shown(verb, name, "--dry-run") for name in names]
    texts.append(shown(verb, names[0], "--dry-run", "--json"))
    compared(f"plan-{verb}", "".join(texts))


def test_plans_of_files(shown: Shown, compared: Any, files: Any) -> None:
    words = [
        ("prepare", "task.json", "metric=wer", "tokenizer.kind=characters"),
        ("train", "experiment.json", "model=rnn-small", "model.dropout=0.2", "steps=77"),
        ("train", "study.json", "--json"),
        ("sweep", "study.json", "base.steps=77", "num_trials=3"),
        ("sweep", "study.json", "model.dropout=0.3", "--json"),
    ]
    compared("plan-files", "".join(shown(*line, "--dry-run") for line in words))


def test_errors(shown: Shown, compared: Any, files: Any, tmp_path: Path) -> None:
    write = tmp_path.joinpath
    task, experiment = files["task"], {**files["experiment"], "task": files["task"]}

    def corpus(name: str, **changed: bytes) -> None:
        """Write a task whose corpus has these files in the place of the valid ones."""
        pairs = {split: dict(pair) for split, pair in task["corpus"].items()}
        for key, content in changed.items():
            split, side = key.split("_")
            pairs[split][side] = f"{name}.{split}.{side}"
            write(pairs[split][side]).write_bytes(content)
        write(f"{name}.json").write_text(json.dumps({**task, "corpus": pairs}))

    corpus("not-utf8", dev_source=b"a b\n", dev_target=b"b \xff\n")
    corpus("unequal", train_source=b"a b\nc d\n", train_target=b"b a\n")
    corpus("empty", train_source=b"a\n", train_target=b"")
    gone = {**task["corpus"], "dev": {"source": "gone.source", "target": "gone.target"}}
    write("gone.json").write_text(json.dumps({**task, "corpus": gone}))
    tokenizers = {k: v for k, v in task.items() if k != "tokenizer"}
    write("no-tokenizer.json").write_text(json.dumps(tokenizers))
    misspelt = {**experiment, "optim": {"lr": 1e-3, "warmup_step": 5}, "setps": 10}
    write("misspelt.json").write_text(json.dumps(misspelt, indent=1))
    write("latin.yaml").write_bytes(b"name: caf\xe9\n")
    write("broken.yaml").write_text("name: [a\nsteps: 3\n")
    write("twice.yaml").write_text("steps: 3\nname: a\nsteps: 4\n")
    write("alias.yaml").write_text("optim: &a {lr: 1}\nbatch: *a\n")
    write("blank.yaml").write_text("")
    write("file").write_text("in the way")
    wrong_space = {**files["study"], "space": {"optim.lrr": {"type": "float", "low": 1, "high": 2}}}
    write("wrong-space.json").write_text(json.dumps(wrong_space))
    one = "experiment.json"
    words: list[tuple[str, ...]] = [
        # the words of the command line
        ("trian", one),
        ("train",),
        ("train", one, "--dry"),
        ("train", one, "steps"),
        ("prepare", "task.json", "--executor", "spark"),
        ("ui", "port"),
        # configuration files and names
        ("train", "none.yaml"),
        ("train", "latin.yaml"),
        ("train", "broken.yaml"),
        ("train", "twice.yaml"),
        ("train", "alias.yaml"),
        ("train", "blank.yaml"),
        ("train", "misspelt.json"),
        ("train", "search_spaces.dmeo"),
        ("train", "search_spaces.heads"),
        ("train", "os.path"),
        ("sweep", one),
        ("sweep", "wrong-space.json"),
        ("retrain", "pipelines.nothing"),
        ("prune", "no/such/folder", "search_spaces.demo"),
        # values
        ("train", one, "optim.clip_nrom=1"),
        ("train", one, "optim.lr=fast"),
        ("train", one, "optim.lr=-1"),
        ("train", one, "steps=2.5"),
        ("train", one, "model.dropout=1.5", "model.num_heads=3"),
        ("train", one, "model=transformer-smal"),
        ("train", one, "model.kind=os.path"),
        ("train", one, "optim.warmup_steps=50"),
        ("train", one, "objective.head_penalty.weight=0.1"),
        ("train", one, "compute.workers=2", "batch.per_update=3"),
        ("train", one, "compute.device=cuda", "compute.devices.encoder=cpu"),
        ("train", one, "batch.order=sorted"),
        ("train", one, "name=../up"),
        ("check", one, "optim.lrr=1"),
        ("prepare", "task.json", "metric=blue"),
        ("prepare", "no-tokenizer.json"),
        # corpora
        ("prepare", "not-utf8.json"),
        ("prepare", "unequal.json"),
        ("prepare", "empty.json"),
        ("prepare", "gone.json"),
        ("train", one, "task=gone.json"),
        # models, runs and splits
        ("evaluate", "no/such/folder", "task.json"),
        ("evaluate", "no/such/folder", "task.json", "split=tset"),
        ("translate", "no/such/folder"),
        ("translate", "no/such/folder", "beam=0"),
        ("translate", "0123456789abcdef0123456789abcdef"),
        ("translate", "models:/nobody@champion"),
        ("attend", "no/such/folder", "a b"),
        ("export", "no/such/folder", "name"),
        ("export", "no/such/folder", "name", "max_regresion=1"),
        ("describe", "transformer-smal"),
        ("describe", "rnn-small", "dropuot=1"),
        ("describe", "rnn-small", "sorce=3"),
        ("describe", "transformer-tiny", "tie=all", "source=8", "target=9"),
        ("describe", "."),
        ("runs",),
        ("train", one, "-w", "file"),
    ]
    compared("errors", "".join(shown(*line) for line in words))


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_describe(shown: Shown, compared: Any, files: Any, as_json: bool) -> None:
    words: list[tuple[str, ...]] = [
        ("describe", "transformer-tiny"),
        ("describe", "transformer", "source=31", "target=43", 'concrete_heads=["enc_self"]'),
        ("describe", "rnn"),
        ("describe", "rnn-small"),
        ("describe", "listener", "features=40", "target=43"),
        ("describe", "conv-small", "joint=true"),
        ("describe", "experiment.json", "model.dropout=0.2"),
    ]
    end = ("--json",) if as_json else ()
    chosen = words[:3] if as_json else words
    compared(f"describe-{'json' if as_json else 'text'}", "".join(shown(*w, *end) for w in chosen))


def test_prepared_shards(shown: Shown, compared: Any, files: Any, tmp_path: Path) -> None:
    texts = [shown(*line) for line in (("prepare", "task.json"),) * 2]
    texts.append(shown("prepare", "task.json", "--json"))
    (shards,) = tmp_path.glob("space/shards/reversal-*")
    texts.append(shown("describe", shards, "tokens=64", "pictures="))
    texts.append(shown("describe", shards, "pictures=", "--json"))
    compared("results-data", "".join(texts))


@pytest.mark.slow
def test_trained_models(
    shown: Shown, compared: Any, files: Any, tmp_path: Path, one_thread: None
) -> None:
    trainings = [("train", "experiment.json"), ("train", "experiment.json", "--json")]
    texts = [shown(*line, masks=OF_MODELS) for line in trainings]
    (run,) = tmp_path.glob("space/runs/tiny-*")
    words: list[tuple[object, ...]] = [
        ("runs",),
        ("runs", "reversal", "--json"),
        ("runs", "nothing"),
        ("describe", run / "bundle"),
        ("evaluate", run, "task.json", "split=dev"),
        ("evaluate", run, "task.json", "split=dev", "beam=2", "--json"),
        ("evaluate", run, "task.json"),
        ("attend", run, "a b c", "c b a"),
        ("attend", run, "a b c", "c b a", "--json"),
        ("export", run, "reverser"),
        ("export", run, "reverser", "split=dev"),
        ("export", run, "reverser", "split=dev", "--json"),
        ("evaluate", "models:/reverser@champion", "task.json", "split=dev"),
        ("translate", "models:/nobody@champion"),
        ("translate", run, "beam=0"),
    ]
    texts += [shown(*line, masks=OF_MODELS) for line in words]
    outputs = ((r"(?m)^[a-f ]+$", "<output>"), (r'"output": ".*"', '"output": "<output>"'))
    texts += [
        shown("translate", run, *more, stdin="a b c\n\nd e\n", masks=outputs)
        for more in ((), ("--json",))
    ]
    compared("results-models", "".join(texts))
