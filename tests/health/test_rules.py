"""Each rule on both sides of its threshold, on series written by hand."""

import math

import pytest

from vinedresser.figures.monitoring import Reading
from vinedresser.health.rules import RULES, apply_rules
from vinedresser.health.series import Log, RunFacts, reading_details

FACTS = RunFacts(uniform=math.log(8000), steps=1000, warmup=100, anneal=0.25, clip_norm=1.0)
EVERY = 20
STEPS = range(EVERY, 1001, EVERY)


def healthy() -> dict[str, list[tuple[int, float]]]:
    """What a run logs that learns to translate; numbers as in the demo and on Multi30k."""
    wave = [1 + 0.3 * math.sin(i) for i in range(len(STEPS))]
    series: dict[str, list[tuple[int, float]]] = {
        "train/loss": [(s, 2 + 7 * math.exp(-s / 150)) for s in STEPS],
        "train/gradient_norm_max": [(s, 3 * w) for s, w in zip(STEPS, wave, strict=True)],
        "train/gradient_norm_mean": [(s, 1.5 * w) for s, w in zip(STEPS, wave, strict=True)],
        "train/clipped_share": [(s, 0.5) for s in STEPS],
        "train/skipped_updates": [(s, 0.0) for s in STEPS],
        "train/first_loss": [(EVERY, 9.6)],
        "monitor/gradient_norm": [(s, w) for s, w in zip(STEPS, wave, strict=True)],
        "monitor/gradient_norm_source": [(s, 0.1 * w) for s, w in zip(STEPS, wave, strict=True)],
        "monitor/gradient_decay": [(s, 0.2) for s in STEPS],
        "monitor/allocated_mb": [(s, 800 + 5 * w) for s, w in zip(STEPS, wave, strict=True)],
        "update_ratio of encoder.0": [(s, 5e-3 * min(1, s / 100)) for s in STEPS],
        "dead_share of encoder.0.feed_forward relu": [(s, 0.1) for s in STEPS],
        "saturated of model tanh": [(s, 0.2) for s in STEPS],
    }
    evaluations = range(250, 1001, 250)
    series["dev/conditioning_gap"] = [(s, s / 500) for s in evaluations]
    series["dev/conditioning_error"] = [(s, 0.05) for s in evaluations]
    series["dev/exposure_gap"] = [(s, 20 - s / 100) for s in evaluations]
    series["dev/teacher_forced_error"] = [(s, 40 - s / 50) for s in evaluations]
    series["best/per"] = [(s, 60 - 3 * s / 100) for s in evaluations]
    return series


def rules(series: dict[str, list[tuple[int, float]]], facts: RunFacts = FACTS) -> list[str]:
    """The rules that spoke at any time."""
    told: dict[str, None] = {}
    log = Log(facts)
    for step in sorted({step for points in series.values() for step, _ in points}):
        log.add({key: v for key, points in series.items() for s, v in points if s == step}, step)
        for found in apply_rules(log):
            assert found.step <= step
            assert found.text
            assert found.advice.endswith((".", "?"))
            assert "\n" not in str(found)
            told[found.rule] = None
    return list(told)


def test_a_healthy_run_raises_nothing():
    assert rules(healthy()) == []
    assert apply_rules(Log(FACTS)) == []
    for key in healthy():
        assert rules({key: healthy()[key]}) == []


def late(values: list[float], begin: int = 500) -> list[tuple[int, float]]:
    """Points from a step on, one a log line."""
    return [(begin + EVERY * i, value) for i, value in enumerate(values)]


PLANTED = {
    "non_finite": {"train/skipped_updates": late([0, 0, 1])},
    "first_loss": {"train/first_loss": [(EVERY, 12.0)]},
    "exploding_gradients": {
        "train/gradient_norm_max": late([3, 2, 3, 3, 2, 3, 200]),
        "train/loss": late([3, 3, 3, 3, 3, 3, 6]),
    },
    "vanishing_gradients": {"monitor/gradient_decay": late([1e-4] * 5)},
    "dead_units": {"dead_share of encoder.0.feed_forward relu": late([0.9] * 3)},
    "saturated_units": {"saturated of model tanh": late([0.95] * 3)},
    "always_clipped": {
        "train/clipped_share": late([1.0] * 15, 520),
        "train/gradient_norm_mean": late([50.0] * 15, 520),
    },
    "loss_stuck": {"train/loss": late([8.9] * 10, 220)},
    "source_ignored": {"dev/conditioning_gap": [(750, 0.01)]},
    "exposure_gap": {
        "dev/exposure_gap": [(250, 5.0), (500, 9.0), (750, 13.0)],
        "dev/teacher_forced_error": [(250, 20.0), (500, 18.0), (750, 17.0)],
        "best/per": [(250, 25.0), (500, 25.0), (750, 25.0)],
    },
    "update_ratio": {"update_ratio of encoder.0": late([0.3] * 5, 200)},
    "memory_growth": {"monitor/allocated_mb": [(s, 800 + 0.2 * s) for s in STEPS]},
}


def test_every_rule_is_planted():
    assert set(PLANTED) == {rule.__name__ for rule in RULES}


@pytest.mark.parametrize("rule", PLANTED)
def test_what_is_planted_is_found_by_its_rule_alone(rule):
    assert rules({**healthy(), **PLANTED[rule]}) == [rule]


NEARLY = {
    "a learnable loss that starts slowly": {
        "train/loss": [(s, 8.9 if s < 280 else 5.0) for s in STEPS]
    },
    "a large gradient once, at a falling loss": {
        "train/gradient_norm_max": late([3, 2, 3, 3, 2, 3, 200]),
        "train/loss": late([3, 3, 3, 3, 3, 3, 2.9]),
    },
    "clipping to a tenth": {
        "train/clipped_share": late([1.0] * 15, 520),
        "train/gradient_norm_mean": late([8.0] * 15, 520),
    },
    "a rate that is annealed to nothing": {
        "update_ratio of encoder.0": [(s, 5e-3 if s < 750 else 1e-9) for s in STEPS]
    },
    "a rate that is warmed up": {
        "update_ratio of encoder.0": [(s, 1e-7 if s <= 100 else 5e-3) for s in STEPS]
    },
    "a layer that does not move": {"update_ratio of encoder.0": [(s, 0.0) for s in STEPS]},
    "a gap that grows while decoding gets better": {
        "dev/exposure_gap": [(250, 5.0), (500, 9.0), (750, 13.0)],
        "dev/teacher_forced_error": [(250, 40.0), (500, 25.0), (750, 15.0)],
    },
    "a gap that grows while the metric gets better": {
        "dev/exposure_gap": [(250, -2.0), (500, 0.0), (750, 5.0)],
        "dev/teacher_forced_error": [(250, 83.0), (500, 80.0), (750, 78.0)],
    },
    "a gap that grows in the first half": {
        "dev/exposure_gap": [(100, 5.0), (200, 9.0), (300, 13.0)],
        "dev/teacher_forced_error": [(100, 80.0), (200, 78.0), (300, 77.0)],
        "best/per": [(100, 85.0), (200, 85.0), (300, 85.0)],
    },
    "no gap at the first evaluation": {"dev/conditioning_gap": [(250, 0.0), (750, 1.0)]},
    "caches that fill": {
        "monitor/allocated_mb": [(s, 300 + 500 * (1 - math.exp(-s / 20))) for s in STEPS]
    },
    "memory in three steps": {"monitor/allocated_mb": [(s, 800 + 25 * (s // 250)) for s in STEPS]},
    "a ReLU layer that recovers": {
        "dead_share of encoder.0.feed_forward relu": late([0.1, 0.95, 0.95, 0.3, 0.2])
    },
}


@pytest.mark.parametrize("name", NEARLY)
def test_what_is_nearly_a_fault_is_none(name):
    assert rules({**healthy(), **NEARLY[name]}) == []


# Measured: the pronunciation preset, two runs, every 16 updates.
FILLING = [
    [323, 403, 487, 492, 513, 530, 539, 564, 588, 601, 605, 652, 670, 685, 686, 688, 689, 701, 714,
     717, 734, 736, 736, 744, 760, 779, 780, 781, 781, 783, 798, 803, 804, 804, 804, 805, 805, 809],
    [352, 451, 498, 525, 530, 545, 581, 585, 588, 591, 607, 640, 655, 667, 683, 685, 689, 697, 703,
     709, 712, 714, 719, 719, 732, 747, 781, 782, 784, 804, 804, 806, 806, 818, 819, 821, 821, 821],
]  # fmt: skip


@pytest.mark.parametrize("megabytes", FILLING)
@pytest.mark.parametrize("leak", [0.0, 0.5])
def test_a_cache_that_fills_is_no_leak_and_hides_none(megabytes, leak):
    """At each line of the run; half a megabyte an update is found beside it."""
    told = [
        rules({"monitor/allocated_mb": [(16 * i, mb + leak * 16 * i) for i, mb in known]})
        for known in (list(enumerate(megabytes, 1))[:n] for n in range(1, len(megabytes) + 1))
    ]
    assert told[-1] == (["memory_growth"] if leak else [])
    assert leak or not any(told)


def test_the_first_loss_is_held_against_ln_of_the_vocabulary():
    """methods.md 105: 37,000 -> 10.5187."""
    facts = RunFacts(uniform=math.log(37000), steps=10, warmup=0, anneal=0, clip_norm=1)
    for loss, is_told in ((10.5187, False), (11.3, False), (12.0, True), (9.9, True)):
        log = Log(facts, {"train/first_loss": [(1, loss)]})
        found = apply_rules(log)
        assert bool(found) == is_told
        assert all("ln |V| = 10.5187" in one.text for one in found)


@pytest.mark.parametrize(
    ("loss", "without_repeats", "is_found"),
    [(2.6, 2.5, False), (6.9, 2.9, False), (4.0, 3.8, True), (8.9, 8.8, True), (1.5, 1.4, True)],
)
def test_the_first_loss_of_a_small_vocabulary(loss, without_repeats, is_found):
    """12 ids: a uniform guess has 2.48 nats; only repeats of the fed token may cost more."""
    log = Log(RunFacts(uniform=math.log(12), steps=10, warmup=0, anneal=0, clip_norm=1))
    series = {
        "train/first_loss": loss, "train/first_loss_without_repeats": without_repeats
    }  # fmt: skip
    log.add(series, 1)
    assert [found.rule for found in apply_rules(log)] == ["first_loss"] * is_found


def test_a_loss_below_chance_is_told_as_a_leak_of_the_answer():
    (found,) = apply_rules(Log(FACTS, {"train/first_loss": [(1, 3.0)]}))
    assert "masks" in found.advice


def test_an_encoder_without_gradient():
    series = {**healthy(), "monitor/gradient_norm_source": [(s, 0.0) for s in STEPS]}
    series["monitor/gradient_decay"] = [(s, 0.0) for s in STEPS]
    assert rules(series) == ["source_ignored"]
    del series["monitor/gradient_norm_source"]  # frozen: nobody knows
    assert rules(series) == ["vanishing_gradients"]


def test_a_loss_that_stands_at_chance_is_not_blamed_on_the_source():
    series = {**healthy(), "dev/conditioning_gap": [(750, 0.0)]}
    series["train/loss"] = [(s, 8.98) for s in STEPS]
    assert rules(series) == ["loss_stuck"]


def test_losses_that_were_never_finite_are_told_and_break_nothing():
    series = {**healthy(), "train/skipped_updates": [(s, float(s)) for s in STEPS]}
    for key in ("train/loss", "train/gradient_norm_max", "train/gradient_norm_mean"):
        series[key] = [(s, math.nan) for s in STEPS]
    assert rules(series) == ["non_finite"]


def test_the_smallest_update_is_told():
    (found,) = apply_rules(Log(FACTS, {"update_ratio of decoder.1": late([1e-7] * 5, 200)}))
    assert found.rule == "update_ratio"
    assert "moves decoder.1 by 1.0e-07" in found.text
    assert "Raise optim.lr" in found.advice


def test_what_is_not_finite_is_left_out_of_the_log():
    log = Log(FACTS)
    log.add({"train/loss": math.nan, "monitor/gradient_norm": math.inf}, 5)
    assert log.points == {}


def test_reading_details():
    layers = {"encoder.0": {"update_ratio": 0.1, "gradient_norm": 1.0}, "norm": {}}
    places = {"a relu": {"dead": 3.0, "units": 4.0}, "b tanh": {"saturated": 0.5}}
    assert reading_details(Reading(7, {}, layers, places)) == {
        "update_ratio of encoder.0": 0.1,
        "dead_share of a relu": 0.75,
        "saturated of b tanh": 0.5,
    }
