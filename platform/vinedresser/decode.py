"""Greedy search, beam search, sampling and forced decoding, by the contract of Seq2Seq only.

The output of a sentence depends on its source alone: its length limit is a function of the length
of its source, beams of different sentences never compete, and draws are seeded by the sentence.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vinedresser.batch import Batch
from vinedresser.config import Decoding
from vinedresser.model import Seq2Seq
from vinedresser.special_ids import BOS, EOS

# Finished rows are dropped once they are this share of the batch: copying caches takes time too.
_DROP_SHARE = 0.25


@dataclass(frozen=True)
class Hypothesis:
    """One output of a sentence.

    Attributes:
        score: -nll over the length penalty of beam search, which ranks hypotheses; -nll elsewhere.
        ids: decoded ids, EOS left out.
        nll: -log p of the whole output in nats, EOS included, without length penalty.
    """

    score: float
    ids: list[int]
    nll: float


@dataclass(frozen=True)
class Decoded:
    """Hypotheses of each sentence, best first; draws in the order in which they were made."""

    hypotheses: list[list[Hypothesis]]

    @property
    def ids(self) -> list[list[int]]:
        """Ids of the first hypothesis of each sentence."""
        return [found[0].ids for found in self.hypotheses]

    @property
    def nll(self) -> list[float]:
        """Negative log-likelihood of the first hypothesis of each sentence."""
        return [found[0].nll for found in self.hypotheses]


def decode(
    model: Seq2Seq,
    source_BS: Tensor,
    lengths_B: Tensor,
    decoding: Decoding,
    *,
    cap: int,
    nbest: int = 1,
) -> Decoded:
    """Decode a batch as configured: greedy search for a beam of 1.

    Args:
        model: in eval mode.
        source_BS: padded source ids, or frames (B, S, F).
        lengths_B: their lengths.
        decoding: kind of search and its settings.
        cap: no output is longer.
        nbest: hypotheses per sentence, at most the beam; with sampling, the number of draws.
    """
    if decoding.sample:
        return _sample_by_sentence(model, source_BS, lengths_B, decoding, cap=cap, draws=nbest)
    if decoding.beam > 1:
        return beam_search(model, source_BS, lengths_B, decoding, cap=cap, nbest=nbest)
    return greedy(
        model,
        source_BS,
        lengths_B,
        cap=cap,
        min_length=decoding.min_length,
        max_length=decoding.max_length,
    )


def length_limits(source_lengths_B: Tensor, cap: int, max_length: int | None = None) -> Tensor:
    """Return the steps allowed per sentence: min(cap, 2 * source + 10), or min(cap, max_length)."""
    limits_B = 2 * source_lengths_B + 10
    return (limits_B if max_length is None else limits_B.fill_(max_length)).clamp(max=cap)


def greedy(
    model: Seq2Seq,
    source_BS: Tensor,
    lengths_B: Tensor,
    *,
    cap: int,
    min_length: int = 0,
    max_length: int | None = None,
) -> Decoded:
    """Decode the most probable next token, until EOS or the sentence's limit."""

    def best(states_BD: Tensor, _rows: Tensor, t: int) -> tuple[Tensor, Tensor]:
        if t >= min_length:
            log_p, tokens = model.output.best(states_BD, 1)
            return log_p[:, 0], tokens[:, 0]
        log_p, tokens = model.output.best(states_BD, 2)
        place = (tokens[:, :1] == EOS).long()
        return log_p.gather(1, place)[:, 0], tokens.gather(1, place)[:, 0]

    limits_B = length_limits(lengths_B, cap, max_length)
    return _stepwise(model, source_BS, lengths_B, limits_B, best)


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

    def drawn(states_BD: Tensor, _rows: Tensor, _t: int) -> tuple[Tensor, Tensor]:
        tokens = model.output.sample(states_BD, generator)
        log_p = model.output.log_probs(states_BD).gather(1, tokens[:, None])
        return log_p[:, 0], tokens

    return _stepwise(model, source_BS, lengths_B, length_limits(lengths_B, cap), drawn)


def _sample_by_sentence(
    model: Seq2Seq,
    source_BS: Tensor,
    lengths_B: Tensor,
    decoding: Decoding,
    *,
    cap: int,
    draws: int,
) -> Decoded:
    """Draw by temperature, top-k and top-p with random numbers of the seed and the sentence.

    `nll` is that of the model's own distribution.
    """
    limits_B = length_limits(lengths_B, cap, decoding.max_length)
    numbers = np.zeros((len(limits_B), draws, int(limits_B.max())), np.float32)
    for row, length, limit, of_row in zip(
        source_BS.cpu().numpy(), lengths_B.tolist(), limits_B.tolist(), numbers, strict=True
    ):
        digest = hashlib.blake2b(np.ascontiguousarray(row[:length]).tobytes(), digest_size=8)
        generator = np.random.default_rng([decoding.seed, int.from_bytes(digest.digest(), "big")])
        for of_draw in of_row:
            of_draw[:limit] = generator.random(limit, np.float32)
    numbers_BT = torch.from_numpy(numbers).flatten(0, 1).to(source_BS.device)

    def drawn(states_BD: Tensor, rows: Tensor, t: int) -> tuple[Tensor, Tensor]:
        log_p_BV = model.output.log_probs(states_BD)
        scores_BV = log_p_BV / decoding.temperature
        if t < decoding.min_length:
            scores_BV[:, EOS] = -math.inf
        p_BV, ids_BV = scores_BV.softmax(-1).sort(stable=True, descending=True)
        is_out = p_BV.cumsum(-1) - p_BV >= decoding.top_p
        if decoding.top_k:
            is_out[:, decoding.top_k :] = True
        is_out[:, 0] = False
        sums_BV = p_BV.masked_fill(is_out, 0.0).cumsum(-1)
        # Below the sum, so that a number is never past the last token with a probability.
        whole_B = sums_BV[:, -1]
        at = torch.minimum(numbers_BT[rows, t] * whole_B, whole_B.nextafter(-whole_B))
        tokens = ids_BV.gather(1, torch.searchsorted(sums_BV, at[:, None], right=True))
        return log_p_BV.gather(1, tokens)[:, 0], tokens[:, 0]

    repeated = torch.arange(len(limits_B), device=source_BS.device).repeat_interleave(draws)
    found = _stepwise(
        model, source_BS[repeated], lengths_B[repeated], limits_B[repeated], drawn
    ).hypotheses
    return Decoded([[each for [each] in found[i : i + draws]] for i in range(0, len(found), draws)])


@torch.no_grad()
def _stepwise(
    model: Seq2Seq,
    source_BS: Tensor,
    lengths_B: Tensor,
    limits_B: Tensor,
    choose: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
) -> Decoded:
    """Decode with one hypothesis per sentence.

    `choose` maps decoder states, their rows in the batch and the position to log p and token ids.
    """
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
        log_p, tokens = choose(states, rows, t)
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
    return Decoded(
        [[Hypothesis(-nll, row, nll)] for row, nll in zip(ids, nll_B.tolist(), strict=True)]
    )


def forced(model: Seq2Seq, batch: Batch) -> Tensor:
    """Return the NLL of each given target, EOS included, in nats: (B,)."""
    is_real_BT = batch.is_real_BT
    log_p_NV = model.output.log_probs(model(batch)[is_real_BT])
    nll_N = F.nll_loss(log_p_NV, batch.target_BT[is_real_BT], reduction="none")
    sentence_N = is_real_BT.nonzero()[:, 0]
    return nll_N.new_zeros(len(batch.rows_B)).index_add(0, sentence_N, nll_N)


def length_penalty(length: int, alpha: float) -> float:
    """Return ((5 + n) / 6) ** alpha (Wu et al. 2016, methods.md 92); n counts EOS."""
    return float(((5 + length) / 6) ** alpha)


@dataclass
class _Finished:
    """The finished hypotheses of one sentence, the best `nbest` kept, best first."""

    nbest: int
    best: list[Hypothesis] = field(default_factory=list)
    count: int = 0

    @property
    def bound(self) -> float:
        """Score above which a hypothesis is still wanted."""
        return self.best[-1].score if len(self.best) == self.nbest else -math.inf

    def offer(self, log_p: float, ids: list[int], penalty: float) -> None:
        """Count a hypothesis; keep it if it is among the best. Of equal ones the first stays."""
        self.count += 1
        if log_p / penalty > self.bound:
            self.best.append(Hypothesis(log_p / penalty, ids, -log_p))
            self.best.sort(key=lambda each: -each.score)
            del self.best[self.nbest :]


@torch.no_grad()
def beam_search(
    model: Seq2Seq,
    source_BS: Tensor,
    lengths_B: Tensor,
    decoding: Decoding,
    *,
    cap: int,
    nbest: int = 1,
) -> Decoded:
    """Return the best finished hypotheses under log p / ((5 + n) / 6)**alpha.

    A sentence is done when `beam` of its hypotheses have finished and the best `nbest` score above
    every open one at its present length, or when no open one can score above them any more: log p
    only falls, so the bound is the log p of the open beam over the penalty of the longest output.
    A beam of 1 equals `greedy`. The arguments are those of `decode`.
    """
    beam, limits_B = decoding.beam, length_limits(lengths_B, cap, decoding.max_length)
    B, longest, device = len(limits_B), int(limits_B.max()), source_BS.device
    limits = limits_B.tolist()
    finished = [_Finished(nbest) for _ in range(B)]
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
        if t < decoding.min_length:
            log_p = log_p.masked_fill(ids == EOS, -math.inf)
        candidates = (scores[:, :, None] + log_p).view(len(rows), -1)
        top, index = candidates.topk(min(2 * beam, candidates.shape[1]), dim=1)
        if decoding.beam_spread is not None:
            top = top.masked_fill(top < top[:, :1] - decoding.beam_spread, -math.inf)
        origin, token = index // log_p.shape[-1], ids.view(len(rows), -1).gather(1, index)
        past = history.view(len(rows), beam, t)
        step = _Step(top.tolist(), origin.tolist(), token.tolist(), past.tolist(), t + 1)
        chosen = [
            _advance(step, group, finished[row], decoding, limit=limits[row])
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
    # Weights that are not finite finish nothing.
    return Decoded([each.best or [Hypothesis(-math.inf, [], math.inf)] for each in finished])


@dataclass(frozen=True)
class _Step:
    """One step's candidates as plain lists: group -> candidate -> value."""

    log_p: list[list[float]]
    origin: list[list[int]]
    token: list[list[int]]
    past: list[list[list[int]]]
    length: int


def _advance(
    step: _Step, group: int, finished: _Finished, decoding: Decoding, *, limit: int
) -> list[int]:
    """Return the candidates that stay open, none of a finished sentence; offer ended ones."""
    picks: list[int] = []
    is_last, beam, alpha = step.length >= limit, decoding.beam, decoding.length_alpha
    penalty = length_penalty(step.length, alpha)
    for c, log_p in enumerate(step.log_p[group]):
        ids = step.past[group][step.origin[group][c]]
        token = step.token[group][c]
        if log_p == -math.inf:
            continue
        if token == EOS:
            if c < beam:
                finished.offer(log_p, ids, penalty)
        elif is_last and c < beam:
            finished.offer(log_p, [*ids, token], penalty)
        elif len(picks) < beam:
            picks.append(c)
    if is_last or not picks:
        return []
    # Counting alone would stop at `beam` short, improbable outputs while the right one is open.
    if finished.count < beam:
        penalty = length_penalty(limit, alpha)
    if finished.bound >= step.log_p[group][picks[0]] / penalty:
        return []
    # A vocabulary smaller than the beam leaves slots empty: -1.
    return picks + [-1] * (beam - len(picks))
