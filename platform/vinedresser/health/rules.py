"""From what a run logs to what is wrong with it, and what to do (methods.md 107).

Each rule is a pure function of the logged series. A rule speaks when its fault has
lasted for some log lines, and is silent where what it reads is not logged.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vinedresser.health.log import Log, Points, least, median
from vinedresser.health.monitors import Reading


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        rule: its name, `dead_units`.
        text: what was seen, with numbers.
        advice: what to do, in one line.
        step: of the latest number.
    """

    rule: str
    text: str
    advice: str
    step: int

    def __str__(self) -> str:
        return f"{self.rule} at step {self.step}: {self.text}. {self.advice}"


Rule = Callable[[Log], Finding | None]

FIRST_LOSS = "train/first_nats_per_token"

# The thresholds; after "healthy", the most extreme of 13 runs: Transformer, LSTM, GRU, convolution
# and listener on reversals, pronunciations, Multi30k and spoken digits, 100 to 400 updates each.
_EXPLODED = 30.0  # norm over what it was; healthy: 5.5
_VANISHED = 1e-3  # first block's gradients over the last's; healthy: 0.08
_NO_SOURCE = 1e-6  # the encoder's share of the gradient norm; healthy: 0.04
_DEAD_SHARE = 0.8  # of a layer's ReLUs; healthy: 0.34, early on
_SATURATED_SHARE = 0.9  # of a place's outputs; healthy: 0.55, an LSTM's attentional states
_OVER_CLIP = 10.0  # norm over optim.clip_norm; healthy: 2.2
_CHANCE = 0.95  # loss over ln |V|; healthy: 0.88, a fifth into the run
_NO_GAP = 0.03  # nats a token, beside two standard errors; healthy: 0.1 in the least trained
_GROWN_GAP = 5.0  # points of error; healthy: 3
_SMALL_UPDATE, _LARGE_UPDATE = 1e-5, 1e-1  # over the weights; healthy: 6e-4 and 1.4e-2
_LEAK_MB, _CACHED = 16.0, 50  # MB over half of the run so far; updates that do not count

# How a detail of a reading is called among the log.
_DEAD, _SATURATED, _RATIO = "dead_share of ", "saturated of ", "update_ratio of "


def details(reading: Reading) -> dict[str, float]:
    """What a reading knows by layer and place, as metrics for the rules."""
    found = {}
    for layer, values in reading.layers.items():
        if "update_ratio" in values:
            found[_RATIO + layer] = values["update_ratio"]
    for place, values in reading.places.items():
        if "units" in values:
            found[_DEAD + place] = values["dead"] / values["units"]
        if "saturated" in values:
            found[_SATURATED + place] = values["saturated"]
    return found


def non_finite(log: Log) -> Finding | None:
    """Updates that were left out because a loss or gradient was nan or infinite."""
    points = log.of("train/skipped_updates")
    if not points or points[-1][1] == 0:
        return None
    step, count = points[-1]
    return Finding(
        "non_finite",
        f"{count:.0f} updates were not finite and were left out",
        "Look at the rows in not-finite-*.json; lower optim.lr, or set compute.precision=fp32.",
        step,
    )


def first_loss(log: Log) -> Finding | None:
    """An untrained model that does not guess evenly (methods.md 105).

    Over the zoo the first loss minus ln |V| was -0.02 to 0.8 at 8,000 ids. With few ids tied
    Transformers repeat their input: 2.9 at 200 and 4.4 at 12, a logit of 7 among the others; two
    more are allowed for, and 1 nat for the variance of the logits.
    """
    points = log.of(FIRST_LOSS)
    if not points:
        return None
    step, loss = points[0]
    lowest, highest = (
        log.facts.uniform - 0.5,
        math.log(math.exp(log.facts.uniform + 1) + math.exp(9)),
    )
    if lowest <= loss <= highest:
        return None
    advice = (
        "The model sees what it is to say: look at masks and at the shift of its inputs."
        if loss < lowest
        else "Scale the initial weights of the output down, or look for ids out of place."
    )
    seen = f"first loss {loss:.2f} nats a token, ln |V| = {log.facts.uniform:.4f}"
    return Finding("first_loss", seen, advice, step)


def exploding_gradients(log: Log) -> Finding | None:
    """Gradients far above what they were, while the loss is above what it was."""
    norms = log.of("train/gradient_norm_max", after=log.facts.warmup)
    losses = [v for _, v in log.of("train/nats_per_token", after=log.facts.warmup)]
    if len(norms) < 6 or len(losses) != len(norms):
        return None
    (step, norm), before = norms[-1], statistics.median(v for _, v in norms[:-1])
    if norm < _EXPLODED * before or losses[-1] < statistics.median(losses[:-1]):
        return None
    return Finding(
        "exploding_gradients",
        f"gradient norm {norm:.3g}, it was {before:.3g}; loss {losses[-1]:.3g} nats a token, it "
        f"was {statistics.median(losses[:-1]):.3g}",
        "Lower optim.lr or optim.clip_norm, or lengthen optim.warmup_steps.",
        step,
    )


def vanishing_gradients(log: Log) -> Finding | None:
    """Gradients of the first block nothing beside those of the last."""
    points = log.last("monitor/gradient_decay", 5)
    share = median(points)
    if not points or share > _VANISHED or _source_share(log) < _NO_SOURCE:
        return None
    return Finding(
        "vanishing_gradients",
        f"gradients of the first block are {share:.1e} of the last block's (root mean squares)",
        "Take norm=pre or layer_norm=true, fewer layers, or a smaller initialisation.",
        points[-1][0],
    )


def dead_units(log: Log) -> Finding | None:
    """A ReLU layer most of whose units are 0 at every position of several batches."""
    place, points = _worst(log, _DEAD, 3)
    if least(points) < _DEAD_SHARE:
        return None
    return Finding(
        "dead_units",
        f"{100 * points[-1][1]:.0f}% of the units of {place} are 0 at every position",
        "Lower optim.lr or lengthen optim.warmup_steps; gelu and swiglu have no dead units.",
        points[-1][0],
    )


def saturated_units(log: Log) -> Finding | None:
    """An activation function most of whose outputs are at its ends."""
    place, points = _worst(log, _SATURATED, 3)
    if least(points) < _SATURATED_SHARE:
        return None
    return Finding(
        "saturated_units",
        f"{100 * points[-1][1]:.0f}% of the outputs of {place} are within 0.01 of its ends",
        "Lower optim.lr, add optim.weight_decay, or take layer_norm=true.",
        points[-1][0],
    )


def always_clipped(log: Log) -> Finding | None:
    """Every update of half a run was clipped to a small share of its norm."""
    points = log.of("train/clipped_share", after=max(log.facts.warmup, log.facts.steps / 2))
    norms = log.of("train/gradient_norm_mean", after=max(log.facts.warmup, log.facts.steps / 2))
    if len(points) < 10 or len(norms) < 10 or min(v for _, v in points) < 1:
        return None
    norm = median(norms)
    if norm < _OVER_CLIP * log.facts.clip_norm:
        return None
    return Finding(
        "always_clipped",
        f"all updates since step {points[0][0]} were clipped; the norm is {norm:.3g}, "
        f"optim.clip_norm {log.facts.clip_norm:g}",
        f"The rate is not what it seems: set optim.clip_norm near {norm:.1g}, or lower optim.lr.",
        points[-1][0],
    )


def loss_stuck(log: Log) -> Finding | None:
    """A loss that stays at that of uniform guessing."""
    start = max(log.facts.warmup, log.facts.steps / 5)
    points = log.last("train/nats_per_token", 5, after=start)
    if not points or min(v for _, v in points) < _CHANCE * log.facts.uniform:
        return None
    return Finding(
        "loss_stuck",
        f"loss {points[-1][1]:.3f} nats a token, uniform guessing has {log.facts.uniform:.4f}",
        "Raise optim.lr, look at optim.freeze, and at some rows: is the target text readable?",
        points[-1][0],
    )


def source_ignored(log: Log) -> Finding | None:
    """A model that has learned the target language and does not look at its source."""
    share, points = _source_share(log), log.last("monitor/gradient_norm_source", 3)
    advice = (
        "Look at some pairs: does source i belong to target i? Then at masks and the encoder; "
        "what listens late wants more steps."
    )
    if points and share < _NO_SOURCE:
        seen = f"the encoder's share of the gradient norm is {share:.1e}"
        return Finding(
            "source_ignored",
            seen,
            "Something cuts the encoder off: a detach, a mask "
            "over all positions, or gates that are closed.",
            points[-1][0],
        )
    gaps = log.of("dev/conditioning_gap", after=log.facts.steps / 2)
    errors = log.of("dev/conditioning_error", after=log.facts.steps / 2)
    losses = log.of("train/nats_per_token")
    # A loss that was never finite is not logged.
    if not gaps or not errors or not losses or losses[-1][1] > _CHANCE * log.facts.uniform:
        return None
    if gaps[-1][1] > min(_NO_GAP + 2 * errors[-1][1], 10 * _NO_GAP):
        return None
    seen = (
        f"sources of other sentences cost {gaps[-1][1]:.3f} nats a token on dev, at a loss of "
        f"{losses[-1][1]:.2f}"
    )
    return Finding("source_ignored", seen, advice, gaps[-1][0])


def exposure_gap(log: Log) -> Finding | None:
    """Decoding that gets worse while the teacher-forced error falls further behind it.

    Early in healthy runs the gap grows too (from 7 to 10 points was seen; on English to German from
    -2 to 5, at BLEU of 1 to 3), for the teacher-forced error falls first; but then what is decoded
    gets better as well. So it is asked in the second half, and of runs without a new best.
    """
    metric = next(iter(log.keys("best/")), "")
    points, forced, best = (
        log.last(key, 3) for key in ("dev/exposure_gap", "dev/teacher_forced_error", metric)
    )
    if not points or not forced or not best or points[-1][0] <= log.facts.steps / 2:
        return None
    (first, before), (_, between), (last, now) = points
    if not before < between < now or now - before < _GROWN_GAP:
        return None
    if now + forced[-1][1] < before + forced[0][1] or best[-1][1] != best[0][1]:
        return None
    return Finding(
        "exposure_gap",
        f"decoded minus teacher-forced error went from {before:.1f} to {now:.1f} points since step "
        f"{first}",
        "Feed the model its own words: objective.sampling.probability 0.1 to 0.4.",
        last,
    )


def update_ratio(log: Log) -> Finding | None:
    """A layer whose updates are out of proportion to its weights, at the full learning rate."""
    anneals_at = log.facts.steps * (1 - log.facts.anneal)
    ratios = {}
    for key in log.keys(_RATIO):
        points = log.last(key, 5, after=log.facts.warmup)
        # What does not move at all has no gradient, which other rules tell.
        if points and points[-1][0] <= anneals_at and median(points) > 0:
            ratios[median(points)] = (key.removeprefix(_RATIO), points[-1][0])
    if not ratios:
        return None
    smallest, largest = min(ratios), max(ratios)
    ratio, advice = smallest, "Raise optim.lr; look at optim.clip_norm and optim.freeze."
    if largest > _LARGE_UPDATE:
        ratio, advice = largest, "Lower optim.lr, or lengthen optim.warmup_steps."
    elif smallest >= _SMALL_UPDATE:
        return None
    layer, step = ratios[ratio]
    seen = f"an update moves {layer} by {ratio:.1e} of its weights, 1e-4 to 1e-2 are usual"
    return Finding("update_ratio", seen, advice, step)


def memory_growth(log: Log) -> Finding | None:
    """Memory in use that grows from line to line (methods.md 37).

    Healthy runs grow too, by steps: 25 MB at their first evaluation; and oneDNN keeps up to 1,024
    compiled operations, 500 MB within 40 to 500 updates on batches of many shapes, more at some
    lines and less at others. A leak is there at every line.
    """
    key = "monitor/allocated_mb" if log.of("monitor/allocated_mb") else "monitor/memory_mb"
    points = log.of(key, after=_CACHED)
    points = points[len(points) // 2 :]
    if len(points) < 8:
        return None
    (first, before), (last, now) = points[0], points[-1]
    rises = sorted(b - a for (_, a), (_, b) in itertools.pairwise(points))
    # What seven of eight lines have risen by at least: of a cache that fills, whose lines rose by 0
    # to 47 MB, at most 0.46 of the whole was seen, beside a leak of 0.5 MB an update 0.78.
    grown = rises[len(rises) // 8] * (len(points) - 1)
    if grown <= 0 or grown < max(_LEAK_MB, 0.02 * before) or grown < 0.6 * (now - before):
        return None
    a_step = grown / (last - first)
    return Finding(
        "memory_growth",
        f"memory in use went from {before:.0f} to {now:.0f} MB since step {first}, {a_step:.2g} MB "
        f"a step or {a_step * log.facts.steps / 1024:.1f} GB in the whole run",
        "Something keeps tensors: a list of losses without float(), a cache, or hooks.",
        last,
    )


RULES: Sequence[Rule] = (
    non_finite,
    first_loss,
    exploding_gradients,
    vanishing_gradients,
    dead_units,
    saturated_units,
    always_clipped,
    loss_stuck,
    source_ignored,
    exposure_gap,
    update_ratio,
    memory_growth,
)


def findings(log: Log) -> list[Finding]:
    """What every rule has to say, one finding a rule at most."""
    return [found for rule in RULES if (found := rule(log)) is not None]


def _source_share(log: Log) -> float:
    """Of the encoder in the gradient norm, median of three readings; 1 where it is not known."""
    own, whole = (
        log.last(f"monitor/{key}", 3) for key in ("gradient_norm_source", "gradient_norm")
    )
    return median(own) / max(median(whole), 1e-30) if own else 1.0


def _worst(log: Log, prefix: str, count: int) -> tuple[str, Points]:
    """The place whose last `count` readings were the largest throughout."""
    found = {key.removeprefix(prefix): log.last(key, count) for key in log.keys(prefix)}
    return max(found.items(), key=lambda item: least(item[1]), default=("", ()))
