"""Models by name: modules and presets, in files, overrides, spaces and on the command line."""

import itertools
import json
import subprocess
import sys
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from vinedresser.config import Experiment, parse_overrides
from vinedresser.config.kinds import ZOO, kinds, named_model, presets
from vinedresser.config.study import Study
from vinedresser.errors import ConfigError

IN_THE_FIELDS_WORDS = {
    "transformer-tiny", "transformer-small", "transformer-base", "transformer-big",
    "rnn-small", "listener", "conv-small",
}  # fmt: skip


@pytest.fixture
def value(experiment) -> Experiment:
    """An experiment whose model is the zoo's own Transformer."""
    return Experiment.from_json({**experiment, "model": "transformer", "init": None})


def test_the_presets_are_there_under_the_fields_names():
    assert set(presets()) >= IN_THE_FIELDS_WORDS


def test_no_name_means_two_things():
    names = [*kinds(ZOO), *presets()]
    assert len(names) == len(set(names))
    owners: list[str] = []
    for module in kinds(ZOO):
        held = getattr(sys.modules[f"trainables.{module}"], "PRESETS", {})
        owners += held
        assert all(presets()[name] == (module, held[name]) for name in held)
    assert len(owners) == len(set(owners))


@pytest.mark.parametrize("name", sorted(IN_THE_FIELDS_WORDS))
def test_a_preset_is_written_out_in_full(value, name):
    module, changes = presets()[name]
    chosen = value.override({"model": name})
    plain = chosen.to_json()["model"]
    assert plain["kind"] == f"trainables.{module}"
    assert chosen.model == named_model(module, changes)
    assert set(plain) == {"kind", *type(chosen.model).model_fields}
    assert Experiment.from_json(json.loads(json.dumps(chosen.to_json()))) == chosen


def test_settings_beside_the_name_win(value):
    plain = {**value.to_json(), "model": {"kind": "transformer-small", "dropout": 0.25}}
    chosen = Experiment.from_json(plain).model
    assert chosen == named_model("transformer-small").override({"dropout": 0.25})
    assert chosen != named_model("transformer-small")


def test_a_section_inside_a_preset_keeps_what_is_not_named(value):
    whole = named_model("listener").to_json()
    section = next(k for k, v in whole.items() if isinstance(v, dict) and "factor" in v)
    chosen = named_model("listener", {section: {"factor": 3}}).to_json()
    assert chosen[section] == {**whole[section], "factor": 3}
    assert chosen[section] != whole[section]


def test_a_model_and_its_parts_in_any_order(value):
    changes = {"model": "rnn-small", "model.dropout": 0.25, "optim.lr": 0.01}
    wanted = named_model("rnn-small", {"dropout": 0.25})
    for order in itertools.permutations(changes):
        chosen = value.override({key: changes[key] for key in order})
        assert chosen.model == wanted
        assert chosen.optim.lr == 0.01


def test_a_section_and_its_parts_in_any_order(value):
    for order in itertools.permutations(({"optim": {"lr": 0.5}}, {"optim.eps": 0.1})):
        optim = value.override({**order[0], **order[1]}).optim
        assert (optim.lr, optim.eps) == (0.5, 0.1)
        assert optim.clip_norm == value.optim.clip_norm


def test_words_of_the_command_line(value):
    words = ["model.dropout=0.25", "model=listener"]
    assert value.override(parse_overrides(words)).model.to_json()["dropout"] == 0.25


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "transformer-smal"}, "there is no model transformer-smal; did you mean tr"),
        ({"model": "lisener"}, "did you mean listener?"),
        ({"model": "atention_rnn"}, "did you mean attention_rnn?"),
        ({"model": "zzzzz"}, "known here: "),
        ({"model": {"kind": "rnn-small", "dropuot": 0.1}}, "did you mean dropout?"),
        ({"model": "rnn-small", "model.dropuot": 0.1}, "model.dropuot: unknown key; did you mean"),
        ({"model": "rnn-smal", "model.dropout": 0.1}, "did you mean rnn-small?"),
        ({"model.kind": "rnn-small"}, "Fix: model=rnn-small"),
        ({"model.kind": "transformer-small", "model.dropout": 0}, "Fix: model=transformer-small"),
    ],
    ids=str,
)
def test_wrong_names(value, changes, words):
    with pytest.raises(ConfigError) as caught:
        value.override(changes)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_typo_beside_a_preset_is_compared_with_that_models_keys(value):
    text = {**value.to_json(), "model": {"kind": "transformer-tiny", "nrom": "pre"}}
    with pytest.raises(ConfigError, match=r"model\.nrom: unknown key; did you mean norm\?"):
        Experiment.from_json(text)


def test_a_module_by_name_imports_no_other_trainable():
    code = (
        "import sys; from vinedresser.config.kinds import named_model\n"
        "named_model('transformer')\n"
        "print([m for m in sys.modules if m.startswith('trainables.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['trainables.transformer']"


# Spaces across architectures.


def across(value: Experiment, **more: Any) -> Study:
    space = {
        "model": CategoricalDistribution(["rnn-small", "transformer-tiny", "conv-small"]),
        "optim.lr": FloatDistribution(1e-3, 1e-2, log=True),
        **more,
    }
    return Study(name="across", base=value, space=space)


def test_a_space_across_architectures(value):
    study = across(value, **{"model.dropout": FloatDistribution(0.0, 0.3)})
    for name in ("rnn-small", "transformer-tiny", "conv-small"):
        trial = {"model.dropout": 0.2, "optim.lr": 1e-3, "model": name}
        assert study.base.override(trial).model == named_model(name, {"dropout": 0.2})
    assert Study.from_json(json.loads(json.dumps(study.to_json()))) == study


def test_a_part_is_checked_under_every_model_of_the_space(value):
    with pytest.raises(ValueError, match=r"space\.model at rnn-small: model\.d_model: unknown"):
        across(value, **{"model.d_model": CategoricalDistribution([32, 64])})
    with pytest.raises(ValueError, match=r"space\.model at nothing: .*there is no model nothing"):
        across(value, model=CategoricalDistribution(["rnn-small", "nothing"]))
