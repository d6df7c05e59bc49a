"""Output layers: from decoder states to losses and probabilities of the next token.

An output layer is the only place that normalises scores. N positions, D features, V vocabulary.
"""

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vinedresser.nn.attention import linear
from vinedresser.nn.steps import step_dtype

# Numbers in a block of logits: two blocks in fp32 fill 2 MB, the second-level cache of one core.
_BLOCK = 2**18
# Below, a probability in fp32 loses digits and its logarithm is no longer that of the share.
_SMALL = 1e-30
# Rows that are searched at once on a CPU: 8 MB of logits over 8,000 entries. Of 3,800 rows in
# bf16, argmax took 46 ms and draws 72; all at once 58 and 108, by 64 rows 56 and 82.
_ROWS = 256


class Output(nn.Module):
    """Distribution of the next token given a decoder state.

    A new output layer implements `log_probs`; it overrides the others where it is faster, or where
    its training loss is an estimate of the exact one.
    """

    @abstractmethod
    def log_probs(self, states: Tensor) -> Tensor:
        """Normalised log-probabilities (..., V) in nats of states (..., D), fp32 or wider."""

    def nll(self, states_ND: Tensor, targets_N: Tensor, *, smoothing: float = 0.0) -> Tensor:
        """Negative log-likelihood in nats, summed over positions; a differentiable scalar.

        `smoothing` is the share of the target mass spread evenly over the vocabulary, in [0, 1].
        """
        # Log-probabilities are their own log-softmax.
        return F.cross_entropy(
            self.log_probs(states_ND), targets_N, reduction="sum", label_smoothing=smoothing
        )

    def best(self, states_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities and ids, each (N, min(k, V)), of the most probable tokens in order."""
        log_p_NV = self.log_probs(states_ND)
        found = log_p_NV.topk(min(k, log_p_NV.shape[-1]))
        return found.values, found.indices

    def sample(self, states_ND: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw one token id for each state: (N,). None takes torch's global generator."""
        return _draw(self.log_probs(states_ND).exp(), generator)


class FullOutput(Output):
    """Softmax over a linear layer: one score for each token of the vocabulary.

    `weight` (V, D) may be shared with the target embedding; `bias` is (V,).
    """

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        layer = linear(width, vocabulary)
        self.weight, self.bias = layer.weight, layer.bias

    def _logits(self, states: Tensor) -> Tensor:
        logits = F.linear(states, self.weight, self.bias)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def log_probs(self, states: Tensor) -> Tensor:
        """See Output."""
        return self._logits(states).log_softmax(-1)

    def nll(self, states_ND: Tensor, targets_N: Tensor, *, smoothing: float = 0.0) -> Tensor:
        """See Output. On processors the logits are not kept for the backward pass."""
        if states_ND.device.type == "cpu" and torch.is_grad_enabled():
            # torch gives `apply` no type.
            total: Tensor = _SmoothedNll.apply(  # type: ignore[no-untyped-call]
                states_ND, self.weight, self.bias, targets_N, smoothing
            )
            return total
        return F.cross_entropy(
            self._logits(states_ND), targets_N, reduction="sum", label_smoothing=smoothing
        )

    def best(self, states_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See Output. Subtracts the log-sum-exp from the k largest logits only."""
        values, ids = [], []
        for part in self._blocks(states_ND):
            logits = self._logits(part)
            # `max` is 2 (fp32) to 4 times (bf16) as fast as `argmax` or `topk` on a CPU.
            top = logits.max(-1, keepdim=True) if k == 1 else logits.topk(min(k, logits.shape[-1]))
            values.append(top.values - logits.logsumexp(-1, keepdim=True))
            ids.append(top.indices)
        return torch.cat(values), torch.cat(ids)

    def sample(self, states_ND: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """See Output."""
        parts = self._blocks(states_ND)
        return torch.cat([_draw(self._logits(part).softmax(-1), generator) for part in parts])

    @staticmethod
    def _blocks(states_ND: Tensor) -> tuple[Tensor, ...]:
        size = _ROWS if states_ND.device.type == "cpu" else max(1, len(states_ND))
        return torch.split(states_ND, size)


def _draw(p_NV: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw from each row by the inverse of the distribution function: one number per row.

    torch.multinomial draws one per vocabulary entry, 163 ms per thousand rows of 8,000 where this
    takes 11.
    """
    summed_NV = p_NV.cumsum(-1)
    drawn_N1 = torch.rand(
        len(summed_NV), 1, generator=generator, dtype=summed_NV.dtype, device=summed_NV.device
    )
    found_N1 = torch.searchsorted(summed_NV, drawn_N1 * summed_NV[:, -1:], right=True)
    # A draw may round up to the sum itself, one past the last entry.
    return found_N1[:, 0].clamp(max=summed_NV.shape[-1] - 1)


class _SmoothedNll(torch.autograd.Function):
    """Linear layer and smoothed cross-entropy in one, for processors.

    nll = sum_n [ln sum_v exp z_nv - (1 - s) z_n,gold - s mean_v z_nv], whose gradient in z is
    softmax(z) - s / V - (1 - s) onehot(gold). Blocks of rows that fit into the cache go through all
    of it in fp32 and leave the gradient where the logits were. So of N x V numbers only one
    matrix exists, in the precision of the products. Over 4,095 tokens and 8,000 words in bf16 that
    takes 41 ms where a log-softmax with its backward pass took 138 ms.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor,
        gold_N: Tensor,
        smoothing: float,
    ) -> Tensor:
        ctx.dtypes = states_ND.dtype, weight_VD.dtype
        dtype = step_dtype(states_ND)
        with torch.autocast("cpu", enabled=False):
            states_ND, weight_VD = states_ND.to(dtype), weight_VD.to(dtype)
            scores_NV = states_ND @ weight_VD.t()
            total, bias_grad_V = _to_gradient(scores_NV, bias_V, gold_N, smoothing)
        ctx.save_for_backward(states_ND, weight_VD, scores_NV, bias_grad_V)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states_ND, weight_VD, grad_NV, bias_grad_V = ctx.saved_tensors
        of_states, of_weight = ctx.dtypes
        states_grad = weight_grad = bias_grad = None
        # Scaled at last: D columns instead of V.
        if ctx.needs_input_grad[0]:
            states_grad = (grad_NV @ weight_VD).to(of_states).mul_(grad)
        if ctx.needs_input_grad[1]:
            weight_grad = (grad_NV.t() @ states_ND).to(of_weight).mul_(grad)
        if ctx.needs_input_grad[2]:
            bias_grad = (bias_grad_V * grad).to(of_weight)
        return states_grad, weight_grad, bias_grad, None, None


def _to_gradient(
    scores_NV: Tensor, bias_V: Tensor, gold_N: Tensor, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Turn scores (without the bias) into the gradient of the nll in place.

    Returns:
        The nll, and the gradient's sum over rows (V,).
    """
    (N, V), wide = scores_NV.shape, torch.promote_types(scores_NV.dtype, torch.float32)
    rows = max(1, min(N, _BLOCK // V))
    logits, shares = scores_NV.new_empty((2, rows, V), dtype=wide).unbind(0)
    bias_grad_V = scores_NV.new_zeros(V, dtype=wide)
    nll = [scores_NV.new_zeros((1, 1), dtype=wide)]
    for start in range(0, N, rows):
        scores, gold = scores_NV[start : start + rows], gold_N[start : start + rows, None]
        z, p = logits[: len(scores)].copy_(scores), shares[: len(scores)]
        z.add_(bias_V)
        torch.softmax(z, 1, out=p)
        gold_z, gold_p = z.gather(1, gold), p.gather(1, gold)
        # The softmax has summed the exponentials already.
        log_sum = gold_z - gold_p.log()
        if not float(gold_p.min()) > _SMALL:
            log_sum = z.logsumexp(1, keepdim=True)
        row_nll = log_sum - (1 - smoothing) * gold_z
        if smoothing:
            row_nll -= smoothing * z.mean(1, keepdim=True)
            p.sub_(smoothing / V)
        nll.append(row_nll)
        p.scatter_(1, gold, gold_p - smoothing / V - (1 - smoothing))
        bias_grad_V.add_(p.sum(0))
        scores.copy_(p)
    return torch.cat(nll).sum(), bias_grad_V
