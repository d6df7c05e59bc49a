"""Health rules: from the logged series of a run to findings with advice (methods.md 107).

Each rule is a pure function of the log and gives its name to the finding. It reports a fault that
lasted for several log lines, and nothing where the series that it reads are not logged. The public
thresholds at the top are those of the preflight checks too.
"""

import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from vinedresser.health.series import Log, least, median

# Tolerance of the first loss around ln |V| (methods.md 105). Logits of standard deviation s that
# carry no information cost ln |V| + s^2 / 2 nats: 1 nat is s = 1.4. The zoo starts at s = 1 or
# below, tied embeddings without their scale of d^-0.5 at s = sqrt(d).
MIN_FIRST_EXCESS, MAX_FIRST_EXCESS = -0.5, 1.0
# Conditioning gap of a model that uses its source (methods.md 2); 0.1 in the least trained healthy
# run. Sentence lengths alone account for 0.01 (CMUdict, 10 updates).
MIN_CONDITIONING_GAP = 0.03
# Growth of memory that counts as a leak, in bytes per update: a kept scalar is less, a kept state
# of one sentence more; 1.6 GB in 10^5 updates (methods.md 37).
MAX_LEAK = 16 * 1024
# |update| / |weights| of a layer; most extreme in healthy runs: 6e-4 and 1.4e-2.
USUAL_UPDATE_RATIO = (1e-5, 1e-1)

# Thresholds of the rules alone; after "healthy", the most extreme of 13 runs: Transformer, LSTM,
# GRU, convolution and listener on reversals, pronunciations, Multi30k and spoken digits, 100 to 400
# updates each.
_EXPLODED = 30.0  # norm over its median so far; healthy: 5.5
_VANISHED = 1e-3  # gradients of the first block over those of the last; healthy: 0.08
_NO_SOURCE = 1e-6  # share of the encoder in the gradient norm; healthy: 0.04
_DEAD_SHARE = 0.8  # of the ReLU units of a layer; healthy: 0.34, early in the run
_SATURATED_SHARE = 0.9  # of the outputs of a function; healthy: 0.55, attentional states of an LSTM
_OVER_CLIP = 10.0  # norm over optim.clip_norm; healthy: 2.2
_CHANCE = 0.95  # loss over ln |V|; healthy: 0.88 after a fifth of the run
_GROWN_GAP = 5.0  # points of error; healthy: 3
_LEAK_MB, _CACHED = 16.0, 50  # MB over the second half of the run so far; updates not counted


@dataclass(frozen=True)
class Finding:
    """One fault of a run.

    `text` is the observation, with numbers; `step` is that of the latest number.
    """

    rule: str
    text: str
    advice: str
    step: int

    def __str__(self) -> str:
        return f"{self.rule} at step {self.step}: {self.text}. {self.advice}"


# Observation with numbers, advice, and the step of the latest number.
Fault = tuple[str, str, int]
Rule = Callable[[Log], Fault | None]


def is_uniform_guess(losses: Iterable[float], uniform: float) -> bool:
    """Return true if one of several measures of a first loss is that of a uniform guess.

    With tied embeddings a fresh model repeats the token that it was fed, whose logit is up to
    sqrt(d): 6.9 nats instead of 3.8 for 43 ids and d = 128. That is harmless and soon unlearned, so
    the loss over all other tokens is a second measure. Losses are nats per token, `uniform` is ln
    |V|.
    """
    return any(MIN_FIRST_EXCESS <= loss - uniform <= MAX_FIRST_EXCESS for loss in losses)


def non_finite(log: Log) -> Fault | None:
    """Report updates that were skipped because a loss or gradient was nan or infinite."""
    points = log.of("train/skipped_updates")
    if not points or points[-1][1] == 0:
        return None
    step, count = points[-1]
    return (
        f"{count:.0f} updates were not finite and were skipped",
        "Inspect the rows in not-finite-*.json; lower optim.lr, or set compute.precision=fp32.",
        step,
    )


def first_loss(log: Log) -> Fault | None:
    """Report an untrained model that is not a uniform guess (methods.md 105)."""
    points = log.of("train/first_loss")
    if not points:
        return None
    (step, loss), uniform = points[0], log.facts.uniform
    others = [value for _, value in log.of("train/first_loss_without_repeats")[:1]]
    if is_uniform_guess([loss, *others], uniform):
        return None
    advice = (
        "The decoder sees the token that it predicts: inspect masks and the shift of its inputs."
        if loss < uniform
        else "Scale down the initial weights and bias of the output layer, or look for wrong ids."
    )
    seen = f"first loss {loss:.2f} nats per token, ln |V| = {uniform:.4f}"
    return seen, advice, step


def exploding_gradients(log: Log) -> Fault | None:
    """Report gradients far above their median while the loss is above its median."""
    norms = log.of("train/gradient_norm_max", after=log.facts.warmup)
    losses = [v for _, v in log.of("train/loss", after=log.facts.warmup)]
    if len(norms) < 6 or len(losses) != len(norms):
        return None
    (step, norm), before = norms[-1], median(norms[:-1])
    if norm < _EXPLODED * before or losses[-1] < statistics.median(losses[:-1]):
        return None
    return (
        f"gradient norm {norm:.3g}, median before {before:.3g}; loss {losses[-1]:.3g} nats per "
        f"token, median before {statistics.median(losses[:-1]):.3g}",
        "Lower optim.lr or optim.clip_norm, or lengthen optim.warmup_steps.",
        step,
    )


def vanishing_gradients(log: Log) -> Fault | None:
    """Report gradients of the first block that are negligible against those of the last."""
    points = log.last("monitor/gradient_decay", 5)
    share = median(points)
    if not points or share > _VANISHED or source_share(log) < _NO_SOURCE:
        return None
    return (
        f"gradients of the first block are {share:.1e} of those of the last (root mean squares)",
        "Set norm=pre or layer_norm=true, use fewer layers, or a smaller initialisation.",
        points[-1][0],
    )


def dead_units(log: Log) -> Fault | None:
    """Report a ReLU layer most of whose units are 0 at every position of several batches."""
    return _at_an_end(
        log, "dead_share of ", _DEAD_SHARE, "units of {} are 0 at every position",
        "Lower optim.lr or lengthen optim.warmup_steps; gelu and swiglu have no dead units.",
    )  # fmt: skip


def saturated_units(log: Log) -> Fault | None:
    """Report an activation function most of whose outputs are at the ends of its range."""
    return _at_an_end(
        log, "saturated of ", _SATURATED_SHARE,
        "outputs of {} are within 0.01 of its range's ends",
        "Lower optim.lr, add optim.weight_decay, or set layer_norm=true.",
    )  # fmt: skip


def _at_an_end(log: Log, prefix: str, limit: float, text: str, advice: str) -> Fault | None:
    """Report the function whose last 3 shares have the largest minimum, from a limit on."""
    found = {key.removeprefix(prefix): log.last(key, 3) for key in log.keys(prefix)}
    function, points = max(found.items(), key=lambda item: least(item[1]), default=("", ()))
    if least(points) < limit:
        return None
    share = 100 * points[-1][1]
    return f"{share:.0f}% of the {text.format(function)}", advice, points[-1][0]


def always_clipped(log: Log) -> Fault | None:
    """Report half a run in which every update was clipped to a small share of its norm."""
    after = max(log.facts.warmup, log.facts.steps / 2)
    points = log.of("train/clipped_share", after=after)
    norms = log.of("train/gradient_norm_mean", after=after)
    if len(points) < 10 or len(norms) < 10 or least(points) < 1:
        return None
    norm = median(norms)
    if norm < _OVER_CLIP * log.facts.clip_norm:
        return None
    return (
        f"all updates since step {points[0][0]} were clipped; the norm is {norm:.3g}, "
        f"optim.clip_norm {log.facts.clip_norm:g}",
        f"The effective learning rate is lower than optim.lr: set optim.clip_norm near {norm:.1g}, "
        "or lower optim.lr.",
        points[-1][0],
    )


def loss_stuck(log: Log) -> Fault | None:
    """Report a loss that stays at that of a uniform guess."""
    start = max(log.facts.warmup, log.facts.steps / 5)
    points = log.last("train/loss", 5, after=start)
    if not points or least(points) < _CHANCE * log.facts.uniform:
        return None
    return (
        f"loss {points[-1][1]:.3f} nats per token, a uniform guess has {log.facts.uniform:.4f}",
        "Raise optim.lr, check optim.freeze, and inspect some rows: is the target text readable?",
        points[-1][0],
    )


def source_ignored(log: Log) -> Fault | None:
    """Report a model that has learned the target language and does not use its source."""
    share, points = source_share(log), log.last("monitor/gradient_norm_source", 3)
    if points and share < _NO_SOURCE:
        return (
            f"the encoder's share of the gradient norm is {share:.1e}",
            "The encoder gets no gradient: look for a detach, a mask over all positions, or closed "
            "gates.",
            points[-1][0],
        )
    gaps = log.of("dev/conditioning_gap", after=log.facts.steps / 2)
    errors = log.of("dev/conditioning_error", after=log.facts.steps / 2)
    losses = log.of("train/loss")
    # A loss that was never finite is not logged.
    if not gaps or not errors or not losses or losses[-1][1] > _CHANCE * log.facts.uniform:
        return None
    if gaps[-1][1] > min(MIN_CONDITIONING_GAP + 2 * errors[-1][1], 10 * MIN_CONDITIONING_GAP):
        return None
    return (
        f"shuffled sources cost {gaps[-1][1]:.3f} nats per token on dev, at a loss of "
        f"{losses[-1][1]:.2f}",
        "Inspect some pairs: does source i belong to target i? Then masks and the encoder; a model "
        "may also start to use its source later: train longer.",
        gaps[-1][0],
    )


def exposure_gap(log: Log) -> Fault | None:
    """Report decoding that gets worse while the teacher-forced error falls further behind it.

    Early in healthy runs the gap grows too (from 7 to 10 points was seen; on English to German from
    -2 to 5, at BLEU of 1 to 3), because the teacher-forced error falls first; but then the decoded
    error falls as well. So the rule applies to the second half, and to runs without a new best.
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
    return (
        f"decoded minus teacher-forced error went from {before:.1f} to {now:.1f} points since step "
        f"{first}",
        "Train on the model's own outputs: objective.likelihood.sampling.probability 0.1 to 0.4.",
        last,
    )


def update_ratio(log: Log) -> Fault | None:
    """Report a layer whose updates are out of proportion to its weights, at the full rate."""
    anneals_at = log.facts.steps * (1 - log.facts.anneal)
    prefix = "update_ratio of "
    ratios = {}
    for key in log.keys(prefix):
        points = log.last(key, 5, after=log.facts.warmup)
        # A layer that does not move at all has no gradient, which other rules report.
        if points and points[-1][0] <= anneals_at and median(points) > 0:
            ratios[median(points)] = (key.removeprefix(prefix), points[-1][0])
    if not ratios:
        return None
    smallest, largest = min(ratios), max(ratios)
    ratio, advice = smallest, "Raise optim.lr; check optim.clip_norm and optim.freeze."
    if largest > USUAL_UPDATE_RATIO[1]:
        ratio, advice = largest, "Lower optim.lr, or lengthen optim.warmup_steps."
    elif smallest >= USUAL_UPDATE_RATIO[0]:
        return None
    layer, step = ratios[ratio]
    seen = f"an update moves {layer} by {ratio:.1e} of its weights, 1e-4 to 1e-2 are usual"
    return seen, advice, step


def memory_growth(log: Log) -> Fault | None:
    """Report memory in use that grows from log line to log line (methods.md 37).

    Healthy runs grow too, in steps: 25 MB at their first evaluation; and oneDNN keeps up to 1,024
    compiled operations, 500 MB within 40 to 500 updates on batches of many shapes, more at some
    lines and less at others. A leak grows at every line.
    """
    key = "monitor/allocated_mb" if log.of("monitor/allocated_mb") else "monitor/memory_mb"
    points = log.of(key, after=_CACHED)
    points = points[len(points) // 2 :]
    if len(points) < 8:
        return None
    (first, before), (last, now) = points[0], points[-1]
    rises = sorted(b - a for (_, a), (_, b) in itertools.pairwise(points))
    # The least rise of seven lines in eight: of a cache that fills, whose lines rose by 0 to 47 MB,
    # at most 0.46 of the whole was seen, with a leak of 0.5 MB per update 0.78.
    grown = rises[len(rises) // 8] * (len(points) - 1)
    per_step = grown / (last - first)
    if grown < max(_LEAK_MB, 0.02 * before, 0.6 * (now - before)) or per_step < MAX_LEAK / 2**20:
        return None
    return (
        f"memory in use went from {before:.0f} to {now:.0f} MB since step {first}, {per_step:.2g} "
        f"MB per step or {per_step * log.facts.steps / 1024:.1f} GB in the whole run",
        "Look for references that keep tensors: a list of losses without float(), a cache, hooks.",
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


def apply_rules(log: Log) -> list[Finding]:
    """Apply every rule; at most one finding per rule."""
    return [Finding(rule.__name__, *fault) for rule in RULES if (fault := rule(log)) is not None]


def source_share(log: Log) -> float:
    """Return the encoder's share of the gradient norm, median of 3 readings; 1 where unknown."""
    own, whole = (
        log.last(f"monitor/{key}", 3) for key in ("gradient_norm_source", "gradient_norm")
    )
    return median(own) / max(median(whole), 1e-30) if own else 1.0
