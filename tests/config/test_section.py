"""Values: round trips, refusals, overrides."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vinedresser.config import Compute, Experiment, Optim, Section, Task
from vinedresser.data.corpora.kinds.lexicon import LexiconCorpus
from vinedresser.errors import ConfigError


def refusal(value: object, kind: type[Section] = Experiment) -> str:
    with pytest.raises(ConfigError) as caught:
        kind.from_json(value)
    return str(caught.value)


def test_round_trip(experiment, lexicon):
    for tree in (experiment, {**experiment, "task": lexicon}):
        value = Experiment.from_json(tree)
        again = Experiment.from_json(json.loads(json.dumps(value.to_json())))
        assert again == value
        assert type(again.model).__name__ == "Tiny"
        assert value.to_json()["model"]["kind"] == "tiny_zoo.tiny"


def test_a_value_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Optim().lr = 1.0


def test_every_problem_is_told_at_once(experiment):
    text = refusal({**experiment, "steps": 0, "seed": -1, "optim": {"lr": "fast", "epss": 1}})
    assert len(text.split("\n")) == 4
    assert "error[E-CONFIG] steps: expected greater than 0; found 0" in text
    assert "optim.epss: unknown key; did you mean eps?" in text


def test_twenty_problems_and_how_many_more(experiment):
    lines = refusal({**experiment, **{f"key{i}": 1 for i in range(50)}}).split("\n")
    assert len(lines) == 21
    assert "30 more problems" in lines[-1]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.lr", float("nan")),
        ("optim.lr", float("inf")),
        ("optim.lr", -1),
        ("optim.lr", True),
        ("objective.head_penalty.weight", True),
        ("steps", True),
        ("steps", 1.5),
        ("steps", None),
        ("task.name", "../escape"),
        ("task.name", 12),
        ("task.name", "a\nb"),
        ("task.metric", "blue"),
        ("optim.betas", [0.9]),
        ("task.corpus.train.source", ""),
        ("task.tokenizer.vocab_size", 10**9),
    ],
)
def test_wrong_type_or_out_of_range(experiment, key, value):
    with pytest.raises(ConfigError, match=rf"^error\[E-CONFIG\] {key}"):
        Experiment.from_json(experiment).override({key: value})


def test_messages_are_short_whatever_was_found(experiment):
    assert len(refusal({**experiment, "steps": "9" * 10_000, "k" * 10_000: 1})) < 1000


# Conflicting options, C05.


@pytest.mark.parametrize("given", [("tokenizer", "source_tokenizer"), ("target_tokenizer",), ()])
def test_joint_or_separate_tokenizers(task, given):
    del task["tokenizer"]
    tree = {**task, **{key: {"kind": "characters"} for key in given}}
    assert "give either `tokenizer`" in refusal(tree, Task)


def test_warm_up_longer_than_the_run(experiment):
    text = refusal({**experiment, "steps": 10, "evaluation": {"num_evaluations": 1}})
    assert "optim.warmup_steps 100 is more than steps 10" in text


def test_more_evaluations_than_steps(experiment):
    tree = {**experiment, "steps": 3, "optim": {"warmup_steps": 0}}
    assert "evaluation.num_evaluations is more than steps 3" in refusal(tree)


def test_pruning_without_gates(experiment):
    tree = {**experiment, "objective": {"head_penalty": {"weight": 0.1}}}
    assert "set model.concrete_heads" in refusal(tree)
    gated = {"kind": "tiny_zoo.tiny", "concrete_heads": ["encoder"]}
    assert Experiment.from_json({**tree, "model": gated}).objective.head_penalty.weight == 0.1


# The sections that are chosen by what stands in them.


@pytest.mark.parametrize("corpus", [[1], 3, None, "text", {"kind": ["text"]}])
def test_no_such_corpus(task, corpus):
    expected = "corpus: expected a mapping with `kind` one of `digits`, `lexicon`, `speech`,"
    assert expected in refusal({**task, "corpus": corpus}, Task)


def test_a_misspelt_kind_of_corpus(task):
    text = refusal({**task, "corpus": {"kind": "texx"}}, Task)
    assert "there is no kind of corpus texx; did you mean text?" in text


def test_a_typo_is_compared_with_the_keys_of_the_chosen_kind(task, lexicon):
    task["corpus"]["dev_word"] = 3
    assert "known here: dev, kind, test, train" in refusal(task, Task)
    lexicon["corpus"]["dev_word"] = 3
    assert "corpus.dev_word: unknown key; did you mean dev_words?" in refusal(lexicon, Task)


def test_a_typo_in_the_model(experiment):
    text = refusal({**experiment, "model": {"kind": "tiny_zoo.tiny", "layer": 1}})
    assert text == "error[E-CONFIG] model.layer: unknown key; did you mean layers?"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"layers": 2}, "`kind` is missing"),
        ({"kind": "tiny_zoo.nothing"}, "there is no module tiny_zoo.nothing"),
        ({"kind": "tiny_zoo.empty"}, "defines 0 subclasses of ModelConfig"),
        ({"kind": "tiny_zoo.needy"}, "needs a_package_that_is_not_there, which is not installed"),
        ({"kind": "os.path"}, "not in the allowed packages"),
        ({"kind": None}, "there is no model None"),
        (3, "model"),
    ],
)
def test_no_such_model(experiment, model, words):
    assert words in refusal({**experiment, "model": model})


# Overrides.


def test_override(experiment):
    value = Experiment.from_json(experiment)
    changed = value.override(
        {"optim.clip_norm": 5, "model.width": 16, "task.corpus.train.source": "other"}
    )
    assert changed.optim.clip_norm == 5.0
    assert changed.to_json()["model"] == {**value.to_json()["model"], "width": 16}
    assert changed.task.corpus.train.source == "other"
    assert value.optim.clip_norm == 1.0
    assert value.override({}) is value


def test_override_a_whole_section(experiment):
    changed = Experiment.from_json(experiment).override({"optim": {"lr": 1}})
    assert changed.optim == Optim(lr=1.0)


def test_override_sections_that_are_not_there_yet(task):
    value = Task.from_json(task)
    changed = value.override(
        {
            "tokenizer": None,
            "source_tokenizer.kind": "bpe",
            "source_tokenizer.vocab_size": 99,
            "target_tokenizer.kind": "symbols",
        }
    )
    assert changed.source_tokenizer.vocab_size == 99
    assert changed.target_tokenizer.kind == "symbols"


class Space(Section):
    space: Mapping[str, Any] = {"optim.lr": {"low": 1}}
    other: Mapping[str, Any] | None = None


def test_override_inside_a_mapping_whose_keys_hold_dots():
    changed = Space().override({"space.optim.lr": {"low": 2}, "space.optim.eps": 1})
    assert changed.space == {"optim.lr": {"low": 2}, "optim.eps": 1}


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("optim.clipnorm", "did you mean clip_norm?"),
        ("model.widht", "did you mean width?"),
        ("model.kind.x", "kind is a single value"),
        ("optim.lr.x", "lr is a single value"),
        ("optim.betas.0", "betas is a single value"),
        ("zzz", "known here: batch, checkpoint_every,"),
        ("optim.", "unknown key"),
        (".", "unknown key"),
        ("task.source_tokenizer.kimd", "did you mean kind?"),
        ("init.part", "init"),
        ("init.__class__.x", "init"),
    ],
)
def test_override_of_unknown_keys(experiment, key, words):
    with pytest.raises(ConfigError) as caught:
        Experiment.from_json(experiment).override({key: 1})
    assert words in str(caught.value)


# Arbitrary JSON: a value or a ConfigError, never anything else.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
NAMES = st.sampled_from(
    sorted({name for cls in (Experiment, Task, LexiconCorpus, Optim, Compute)
            for name in cls.model_fields} | {"kind"})
)  # fmt: skip
SECTIONS = st.recursive(
    JSON, lambda inner: st.dictionaries(NAMES, inner, max_size=6), max_leaves=12
)
calm = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def is_read_or_refused(kind: type[Section], value: object) -> None:
    refused = ""
    try:
        kind.from_json(value, where="x.yaml")
    except ConfigError as error:
        refused = str(error)
    assert not refused or refused.startswith("error[E-CONFIG] x.yaml: ")


@calm
@given(value=JSON | SECTIONS)
def test_arbitrary_values(value):
    is_read_or_refused(Experiment, value)
    is_read_or_refused(Task, value)


def places(tree: Any) -> list[tuple[Any, ...]]:
    """The paths of all values inside a plain tree."""
    if not isinstance(tree, dict | list):
        return []
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return [path for k, v in inner for path in [(k,), *((k, *rest) for rest in places(v))]]


@calm
@given(data=st.data(), new=JSON | SECTIONS)
def test_arbitrary_values_in_a_valid_tree(experiment, lexicon, data, new):
    value = Experiment.from_json(experiment)
    if data.draw(st.booleans()):
        value = value.override({"task": lexicon})
    tree = value.to_json()
    *parents, last = data.draw(st.sampled_from(places(tree)))
    place = tree
    for part in parents:
        place = place[part]
    place[last] = new
    is_read_or_refused(Experiment, tree)
    is_read_or_refused(Task, tree["task"])
