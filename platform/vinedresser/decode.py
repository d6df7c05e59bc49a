"""Greedy and beam search over Seq2Seq.start, step and select only.

The output of a sentence depends on its source alone: its length limit is a function of the length
of its source, and beams of different sentences never compete.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vinedresser.config import Decoding
from vinedresser.model import Seq2Seq
from vinedresser.special_ids import BOS, EOS

# Finished rows are dropped once they are this share of the batch: copying caches takes time too.
_DROP_SHARE = 0.25


@dataclass(frozen=True)
class Decoded:
    """Decoded ids of each sentence, EOS left out, and their negative log-likelihood.

    `nll` is -log p of the whole output in nats, EOS included, without length penalty.
    """

    ids: list[list[int]]
    nll: list[float]


def decode(
    model: Seq2Seq, source_BS: Tensor, lengths_B: Tensor, decoding: Decoding, *, cap: int
) -> Decoded:
    """Decode a batch as configured: greedy search for a beam of 1."""
    if decoding.beam == 1:
        return greedy(model, source_BS, lengths_B, cap=cap)
    beam, alpha = decoding.beam, decoding.length_alpha
    return beam_search(model, source_BS, lengths_B, beam=beam, alpha=alpha, cap=cap)


def length_limits(source_lengths_B: Tensor, cap: int) -> Tensor:
    """Return the steps allowed per sentence: min(cap, 2 * source + 10)."""
    return (2 * source_lengths_B + 10).clamp(max=cap)


def greedy(model: Seq2Seq, source_BS: Tensor, lengths_B: Tensor, *, cap: int) -> Decoded:
    """Decode the most probable next token, until EOS or the sentence's limit."""

    def best(states_BD: Tensor) -> tuple[Tensor, Tensor]:
        log_p, tokens = model.output.best(states_BD, 1)
        return log_p[:, 0], tokens[:, 0]

    return _stepwise(model, source_BS, lengths_B, cap, best)


def sample(
    model: Seq2Seq,
    source_BS: Tensor,
    lengths_B: Tensor,
    *,
    cap: int,
    generator: torch.Generator | None = None,
) -> Decoded:
    """Draw each next token from the model's distribution, until EOS or the sentence's limit.

    Args:
        model: in eval mode.
        source_BS: padded source ids.
        lengths_B: their lengths.
        cap: no output is longer.
        generator: on the model's device; None takes torch's global one.
    """

    def drawn(states_BD: Tensor) -> tuple[Tensor, Tensor]:
        tokens = model.output.sample(states_BD, generator)
        log_p = model.output.log_probs(states_BD).gather(1, tokens[:, None])
        return log_p[:, 0], tokens

    return _stepwise(model, source_BS, lengths_B, cap, drawn)


@torch.no_grad()
def _stepwise(
    model: Seq2Seq,
    source_BS: Tensor,
    lengths_B: Tensor,
    cap: int,
    choose: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Decoded:
    """Decode with one hypothesis per sentence; `choose` maps states to log p and token ids."""
    limits_B = length_limits(lengths_B, cap)
    B, longest = len(limits_B), int(limits_B.max())
    device = source_BS.device
    out_BT = torch.full((B, longest), EOS, dtype=torch.int64, device=device)
    nll_B = torch.zeros(B, device=device)
    rows = torch.arange(B, device=device)
    state = model.start(model.encode(source_BS, lengths_B), longest)
    tokens = torch.full((B,), BOS, dtype=torch.int64, device=device)
    is_open = torch.ones(B, dtype=torch.bool, device=device)
    for t in range(longest):
        states, state = model.step(state, tokens)
        log_p, tokens = choose(states)
        out_BT[rows, t] = torch.where(is_open, tokens, EOS)
        nll_B[rows] -= torch.where(is_open, log_p, 0.0)
        is_open = is_open & (tokens != EOS) & (t + 1 < limits_B[rows])
        num_open = int(is_open.sum())
        if num_open == 0:
            break
        if num_open < (1 - _DROP_SHARE) * len(rows):
            kept = is_open.nonzero()[:, 0]
            state, tokens = model.select(state, kept), tokens[kept]
            rows, is_open = rows[kept], is_open[kept]
    ids = [row[: row.index(EOS)] if EOS in row else row for row in out_BT.tolist()]
    return Decoded(ids, nll_B.tolist())


def length_penalty(length: int, alpha: float) -> float:
    """Return ((5 + n) / 6) ** alpha (Wu et al. 2016, methods.md 92); n counts EOS."""
    return float(((5 + length) / 6) ** alpha)


@dataclass
class _Hypotheses:
    """The finished beams of one sentence, best kept."""

    score: float = -math.inf
    ids: tuple[int, ...] = ()
    nll: float = math.inf
    finished: int = 0

    def offer(self, log_p: float, ids: list[int], length: int, alpha: float) -> None:
        self.finished += 1
        score = log_p / length_penalty(length, alpha)
        if score > self.score:
            self.score, self.ids, self.nll = score, tuple(ids), -log_p


@torch.no_grad()
def beam_search(
    model: Seq2Seq, source_BS: Tensor, lengths_B: Tensor, *, beam: int, alpha: float, cap: int
) -> Decoded:
    """Return the best finished hypothesis under log p / ((5 + n) / 6)**alpha.

    A sentence is done when `beam` of its hypotheses have finished and the best of them scores above
    every open one at its present length, or when no open one can score above it any more: log p
    only falls, so the bound is the log p of the open beam over the penalty of the longest output.

    Args:
        model: in eval mode.
        source_BS: padded source ids.
        lengths_B: their lengths.
        beam: hypotheses kept per sentence, >= 1; 1 equals `greedy`.
        alpha: exponent of the length penalty, >= 0; 0 compares plain log-probabilities.
        cap: no output is longer.
    """
    limits_B = length_limits(lengths_B, cap)
    B, longest, device = len(limits_B), int(limits_B.max()), source_BS.device
    limits = limits_B.tolist()
    best = [_Hypotheses() for _ in range(B)]
    memory = model.encode(source_BS, lengths_B)
    state = model.select(
        model.start(memory, longest), torch.arange(B, device=device).repeat_interleave(beam)
    )
    rows = list(range(B))  # the sentence of each group of `beam` rows
    # Only the first beam of a sentence is alive at the start: all are the same.
    scores = torch.full((B, beam), -math.inf, device=device)
    scores[:, 0] = 0.0
    tokens = torch.full((B * beam,), BOS, dtype=torch.int64, device=device)
    history = torch.empty((B * beam, 0), dtype=torch.int64, device=device)
    for t in range(longest):
        states, state = model.step(state, tokens)
        # 2 * beam candidates hold at least `beam` that do not end, for one ends a beam.
        log_p, ids = (x.view(len(rows), beam, -1) for x in model.output.best(states, 2 * beam))
        candidates = (scores[:, :, None] + log_p).view(len(rows), -1)
        top, index = candidates.topk(min(2 * beam, candidates.shape[1]), dim=1)
        origin, token = index // log_p.shape[-1], ids.view(len(rows), -1).gather(1, index)
        past = history.view(len(rows), beam, t)
        step = _Step(top.tolist(), origin.tolist(), token.tolist(), past.tolist(), t + 1)
        chosen = [
            _advance(step, group, best[row], beam=beam, alpha=alpha, limit=limits[row])
            for group, row in enumerate(rows)
        ]
        alive = [g for g, picks in enumerate(chosen) if picks]
        if not alive:
            break
        pick = torch.tensor([chosen[g] for g in alive], device=device)
        groups = torch.tensor(alive, device=device)
        is_empty, pick = pick < 0, pick.clamp(min=0)
        scores = top[groups].gather(1, pick).masked_fill(is_empty, -math.inf)
        flat = (groups[:, None] * beam + origin[groups].gather(1, pick)).view(-1)
        tokens = token[groups].gather(1, pick).view(-1)
        history = torch.cat([history.index_select(0, flat), tokens[:, None]], 1)
        state, rows = model.select(state, flat), [rows[g] for g in alive]
    return Decoded([list(h.ids) for h in best], [h.nll for h in best])


@dataclass(frozen=True)
class _Step:
    """One step's candidates as plain lists: group -> candidate -> value."""

    log_p: list[list[float]]
    origin: list[list[int]]
    token: list[list[int]]
    past: list[list[list[int]]]
    length: int


def _advance(
    step: _Step, group: int, best: _Hypotheses, *, beam: int, alpha: float, limit: int
) -> list[int]:
    """Return the candidates that stay open, none of a finished sentence; offer ended ones."""
    picks: list[int] = []
    is_last = step.length >= limit
    for c, log_p in enumerate(step.log_p[group]):
        ids = step.past[group][step.origin[group][c]]
        token = step.token[group][c]
        if log_p == -math.inf:
            continue
        if token == EOS:
            if c < beam:
                best.offer(log_p, ids, step.length, alpha)
        elif is_last and c < beam:
            best.offer(log_p, [*ids, token], step.length, alpha)
        elif len(picks) < beam:
            picks.append(c)
    if is_last or not picks:
        return []
    # Counting alone would stop at `beam` short, improbable outputs while the right one is open.
    counted = step.length if best.finished >= beam else limit
    if best.score >= step.log_p[group][picks[0]] / length_penalty(counted, alpha):
        return []
    # A vocabulary smaller than the beam leaves slots empty: -1.
    return picks + [-1] * (beam - len(picks))
