import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from vinedresser.config import Experiment, resolve
from vinedresser.config.study import Stopping, Study, ends
from vinedresser.errors import ConfigError

CORPUS = {"train": {"source": "a", "target": "b"}, "dev": {"source": "c", "target": "d"}}
TASK = {"name": "t", "corpus": CORPUS, "tokenizer": {"kind": "symbols"}, "metric": "per"}
BASE = {"task": TASK, "model": {"kind": "transformer"}, "steps": 1000}
CLIP = {"type": "float", "low": 0.01, "high": 10.0, "log": True}


def study(space: object, **more: object) -> Study:
    return Study.from_json({"name": "s", "base": BASE, "space": space, **more})


def test_a_space_becomes_optunas_own_distributions():
    found = study(
        {
            "optim.clip_norm": CLIP,
            "optim.warmup_steps": {"type": "int", "low": 20, "high": 400, "log": True},
            "model.d_ff": {"type": "int", "low": 64, "high": 256, "step": 64},
            "optim.decay": {"type": "categorical", "choices": ["constant", "inverse_sqrt"]},
        }
    ).space
    assert found == {
        "optim.clip_norm": FloatDistribution(0.01, 10.0, log=True),
        "optim.warmup_steps": IntDistribution(20, 400, log=True),
        "model.d_ff": IntDistribution(64, 256, step=64),
        "optim.decay": CategoricalDistribution(["constant", "inverse_sqrt"]),
    }


@pytest.mark.parametrize(
    ("key", "distribution", "at"),
    [
        ("optim.clip_norm", FloatDistribution(0.0, 1.0), 0.0),  # the low end
        ("model.dropout", FloatDistribution(0.0, 1.0), 1.0),  # the high end
        ("optim.warmup_steps", IntDistribution(10, 1001), 1001),  # against another key
        ("optim.decay", CategoricalDistribution(["constant", "cosine"]), "cosine"),
        ("steps", IntDistribution(50, 2000), 50),  # fewer than the base's warm-up
    ],
    ids=str,
)
def test_both_ends_are_checked(key, distribution, at):
    with pytest.raises(ConfigError, match=rf"space\.{key} at {at}: "):
        study({key: distribution})


def test_ends():
    assert ends(FloatDistribution(0.1, 2.0)) == [0.1, 2.0]
    assert ends(IntDistribution(1, 9, step=2)) == [1, 9]
    assert ends(CategoricalDistribution([1, 5, 3])) == [1, 5, 3]


def test_a_misspelt_key_is_told_its_neighbour():
    with pytest.raises(
        ConfigError, match=r"optim\.clip_nrom: unknown key; did you mean clip_norm\?"
    ):
        study({"optim.clip_nrom": CLIP})


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "space is empty"),
        ({"optim.lr": {"type": "normal", "low": 0.1}}, "expected one of float, int, categorical"),
        ({"optim.lr": {"low": 0.1, "high": 1}}, "type is None"),
        ({"optim.lr": {"type": "float", "low": 0.1}}, "not a float distribution"),
        ({"optim.lr": {"type": "float", "low": 0.1, "high": 1, "base": 2}}, "not a float"),
        ({"optim.lr": {"type": "float", "low": 1.0, "high": 0.1}}, "low"),
        ({"optim.lr": {"type": "float", "low": 0.0, "high": 0.1, "log": True}}, "low"),
        ({"optim.lr": 0.1}, "space"),
    ],
    ids=str,
)
def test_what_is_no_range_is_refused(space, message):
    with pytest.raises(ConfigError, match=message):
        study(space)


def test_a_front_is_not_stopped_early():
    gated = {**BASE, "model": {"kind": "transformer", "concrete_heads": ["enc_self"]}}
    space = {"objective.head_penalty.weight": {"type": "float", "low": 0.1, "high": 1.0}}
    more = {"base": gated, "space": space, "name": "s", "objectives": ["inferred", "dev/heads"]}
    with pytest.raises(ConfigError, match="stopping: null"):
        Study.from_json(more)
    with pytest.raises(ConfigError, match="stopping: null"):
        Study.from_json({**more, "stopping": {"grace": 2}})
    assert Study.from_json({**more, "stopping": None}).stopping is None


numbers = st.floats(0.01, 0.4)
distributions = st.one_of(
    st.builds(
        lambda low, more, log: FloatDistribution(low, low + more, log=log),
        numbers,
        numbers,
        st.booleans(),
    ),
    # Optuna moves an upper end that is no whole number of steps away.
    st.integers(0, 10).map(lambda i: FloatDistribution(i / 20, (i + 3) / 20, step=0.05)),
    st.lists(numbers, min_size=1, unique=True).map(CategoricalDistribution),
)


@given(distribution=distributions, trials=st.integers(1, 100))
def test_a_study_round_trips_through_json(distribution: BaseDistribution, trials: int):
    whole = Study(
        name="s",
        base=Experiment.from_json(BASE),
        space={"model.dropout": distribution},
        num_trials=trials,
        stopping=Stopping(grace=2, factor=4),
    )
    again = Study.from_json(whole.to_json())
    assert again == whole
    assert again.space["model.dropout"] == distribution


def test_a_study_is_read_from_yaml_and_overridden(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(
        """
name: s
base:
  task:
    name: t
    corpus: {train: {source: a, target: b}, dev: {source: c, target: d}}
    tokenizer: {kind: symbols}
    metric: per
  model: {kind: transformer}
space:
  optim.clip_norm: {type: float, low: 0.01, high: 10, log: true}
  model.num_heads: {type: categorical, choices: [2, 4]}
stopping: null
"""
    )
    found = resolve(str(path), [Study]).override({"num_trials": 3, "base.optim.lr": 0.01})
    assert found.space["optim.clip_norm"] == FloatDistribution(0.01, 10.0, log=True)
    assert found.space["model.num_heads"] == CategoricalDistribution([2, 4])
    assert (found.num_trials, found.base.optim.lr, found.stopping) == (3, 0.01, None)
    added = found.override({"space.optim.lr": {"type": "float", "low": 0.001, "high": 0.01}})
    assert set(added.space) == {"optim.clip_norm", "model.num_heads", "optim.lr"}


@pytest.mark.parametrize(
    "more", [{"num_trials": 0}, {"stopping": {"factor": 1}}, {"seed": -1}, {"nam": "x"}], ids=str
)
def test_settings_out_of_range_are_refused(more):
    with pytest.raises(ConfigError):
        study({"optim.clip_norm": CLIP}, **more)
