"""Readings of a model while it trains: gradients, weights, updates (methods.md 101-106).

Computed on the device at every n-th step, copied to the host at the log lines. P trained
parameters, L layers.
"""

import ctypes
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from vinedresser.batch import Batch
from vinedresser.figures.monitoring import Reading
from vinedresser.health.activations import Activations, observed
from vinedresser.model import Seq2Seq
from vinedresser.nn.norms import PowerNorm

# Sentences and target positions of a batch that the first loss is measured on: 38 MB of logits for
# 37,000 ids.
_FIRST_ROWS, _FIRST_POSITIONS = 16, 256
# Passes until the running statistics of power norm are those of its inputs.
_SETTLING = 30


@dataclass
class _Due:
    """Statistics of a step that is being read; everything is on the device."""

    activations: Activations = field(default_factory=Activations)
    # name -> (L,), a number per layer.
    of_layers: dict[str, Tensor] = field(default_factory=dict)
    source: Tensor | None = None

    def tensors(self) -> Iterator[Tensor]:
        """Yield everything, in the order in which `Readings.take` reads it."""
        yield from self.of_layers.values()
        if self.source is not None:
            yield self.source
        yield from self.activations.extremes.values()
        yield from self.activations.alive.values()
        for found, of in self.activations.saturated.values():
            yield from (found, of)


class Readings:
    """Statistics of a model at step 1 and every `every`-th step; reading changes no number of it.

    At other steps each call is a comparison of integers; only `take` waits for the device. A layer
    is a numbered block (`encoder.0`), or a child of the model that has no blocks.

    Attributes:
        every: steps between readings.
        layers: names, the encoder's first, each side in the order of the model.
        history: the readings so far.
    """

    def __init__(self, model: Seq2Seq, *, every: int, is_fresh: bool = True) -> None:
        """Take the model, steps between readings, false for a warm start (no first loss)."""
        if every < 1:
            raise ValueError(f"every is {every}; expected at least 1 step")
        self.every, self._model = every, model
        self.history: list[Reading] = []
        # Weights of a layer without heads are empty.
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad and p.numel()]
        self._parameters = [p for _, p in trained]
        owners = [layer_of(name) for name, _ in trained]
        # The models' own order puts both embeddings first.
        self.layers = sorted(
            dict.fromkeys(owners), key=lambda layer: not model.is_of_encoder(layer)
        )
        self._device = self._parameters[-1].device if trained else torch.device("cpu")
        positions = {layer: i for i, layer in enumerate(self.layers)}
        self._layer_of_P = torch.tensor([positions[o] for o in owners], device=self._device)
        self._is_matrix_P = torch.tensor([p.dim() > 1 for p in self._parameters]).to(self._device)
        # Weights that reach the loss through the encoder only; shared ones do not.
        sides: dict[bool, set[int]] = {True: set(), False: set()}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.requires_grad:
                sides[model.is_of_encoder(name)].add(id(parameter))
        of_source = sides[True] - sides[False]
        self._is_source_P = torch.tensor([id(p) in of_source for p in self._parameters])
        self._is_source_P = self._is_source_P.to(self._device)
        self._has_source = bool(of_source)
        self._sizes = [0] * len(self.layers)
        deep = set()
        for owner, parameter in zip(owners, self._parameters, strict=True):
            self._sizes[positions[owner]] += parameter.numel()
            if parameter.dim() > 1:
                deep.add(owner)
        # Blocks: the gains of a numbered norm have other gradients than matrices.
        self._blocks = [
            i for i, layer in enumerate(self.layers)
            if layer in deep and layer.rpartition(".")[2].isdigit()
        ]  # fmt: skip
        self._first: tuple[float, float] | None = None
        self._is_fresh = is_fresh
        self._before: list[Tensor] = []
        self._open: dict[int, _Due] = {}

    def is_due(self, step: int) -> bool:
        """Return true if a 1-based step is read."""
        return step % self.every == 0 or step == 1

    def watching(self, step: int, batch: Batch) -> AbstractContextManager[None]:
        """Observe the forward pass of a step over a batch while the block runs.

        Before step 1 of a fresh model its first loss is measured in a separate pass.
        """
        if not self.is_due(step):
            return nullcontext()
        if step == 1 and self._is_fresh:
            self._first = first_losses(self._model, batch)
        return observed(self._model, frozenset(self.layers), self._due(step).activations)

    @torch.no_grad()
    def gradients(self, step: int) -> None:
        """Read gradients before clipping. A weight without a gradient counts as 0."""
        if not self.is_due(step) or not self._parameters:
            return
        due, zero = self._due(step), torch.zeros((), device=self._device)
        grads = [zero if p.grad is None else p.grad for p in self._parameters]
        norms_P = self._norms(grads)
        due.of_layers["gradient_norm"] = self._summed(norms_P)
        # A fifth of the time of the infinity norm: 6 ms for 7.6 million numbers.
        extremes = [torch.stack(grad.aminmax()).to(self._device) for grad in grads]
        largest_P = torch.stack(extremes).abs().amax(1).float()
        largest_L = torch.zeros(len(self.layers), device=self._device)
        largest_L.scatter_reduce_(0, self._layer_of_P, largest_P, "amax")
        due.of_layers["gradient_max_abs"] = largest_L
        if self._has_source:
            due.source = (norms_P * self._is_source_P).norm()
        self._before = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def updated(self, step: int) -> None:
        """Read the weights after the optimizer's update."""
        if not self.is_due(step) or not self._before:
            return
        moves, self._before = self._before, []
        norms_P = self._norms(moves)
        torch._foreach_sub_(moves, [p.detach() for p in self._parameters])
        moved_P = self._norms(moves)
        due = self._due(step)
        due.of_layers["parameter_norm"] = self._summed(norms_P)
        # 0 / 0 = nan where a layer has no matrix.
        due.of_layers["update_ratio"] = self._summed(moved_P * self._is_matrix_P) / self._summed(
            norms_P * self._is_matrix_P
        )

    def take(self) -> dict[str, float]:
        """Append the steps read since the last call to `history`; return metrics of the latest.

        Under `monitor/`: `gradient_norm` and `gradient_max_abs` before clipping;
        `gradient_norm_source`, of the weights that only the encoder has; `gradient_decay`, the
        root mean square of the first block's gradients over that of the last block's;
        `parameter_norm`; `update_ratio_min` and `_max` over layers; `activation_min` and `_max`
        over layers; `dead_share`, of all ReLU units; `saturated_share`, the largest of all
        functions; `memory_mb`, resident, and `allocated_mb`, in use (on the GPU if there is one).
        After step 1 `train/first_loss` and `train/first_loss_without_repeats` too.
        """
        if not self._open:
            return {}
        opened, self._open = self._open, {}
        tensors = [t for due in opened.values() for t in due.tensors()]
        flat = [t.to(self._device, torch.float64).flatten() for t in tensors]
        # One copy, so that the host waits once.
        sizes = [len(t) for t in flat]
        numbers = iter([part.tolist() for part in torch.split(torch.cat(flat).cpu(), sizes)])
        for step, due in opened.items():
            self.history.append(self._reading(step, due, numbers))
        found = {f"monitor/{key}": value for key, value in self.history[-1].overall.items()}
        if self._first is not None:
            found["train/first_loss"], found["train/first_loss_without_repeats"] = self._first
            self._first = None
        return found

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the history as plain JSON."""
        return [asdict(reading) for reading in self.history]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Resume from a stored history."""
        self.history = [Reading(**reading) for reading in state]

    def _due(self, step: int) -> _Due:
        return self._open.setdefault(step, _Due())

    def _norms(self, tensors: list[Tensor]) -> Tensor:
        """Return the norm of each tensor, (P,)."""
        norms = torch._foreach_norm(tensors)
        return torch.stack([norm.to(self._device) for norm in norms]).float()

    def _summed(self, norms_P: Tensor) -> Tensor:
        """Return (L,) norms of layers from (P,) norms of parameters."""
        squares_L = torch.zeros(len(self.layers), device=self._device)
        return squares_L.index_add_(0, self._layer_of_P, norms_P.square()).sqrt()

    def _reading(self, step: int, due: _Due, numbers: Iterator[list[float]]) -> Reading:
        layers: dict[str, dict[str, float]] = {layer: {} for layer in self.layers}
        for name in due.of_layers:
            for layer, value in zip(self.layers, next(numbers), strict=True):
                if name != "update_ratio" or not math.isnan(value):
                    layers[layer][name] = value
        overall = {} if due.source is None else {"gradient_norm_source": next(numbers)[0]}
        for layer in due.activations.extremes:
            low, high = next(numbers)
            layers[layer] |= {"activation_min": low, "activation_max": high}
        functions: dict[str, dict[str, float]] = {}
        for function in due.activations.alive:
            alive = next(numbers)
            functions[function] = {"dead": len(alive) - sum(alive), "units": len(alive)}
        for function in due.activations.saturated:
            (found,), (of,) = next(numbers), next(numbers)
            functions[function] = {"saturated": found / max(of, 1)}
        overall |= _overall(layers, functions) | memory_in_use(self._device)
        if len(self._blocks) > 1 and "gradient_norm" in layers[self.layers[0]]:
            first, last = (
                layers[self.layers[i]]["gradient_norm"] / math.sqrt(self._sizes[i])
                for i in (self._blocks[0], self._blocks[-1])
            )
            if last > 0:
                overall["gradient_decay"] = first / last
        return Reading(
            step, overall, layers, functions, sum(map(self._model.is_of_encoder, layers))
        )


def layer_of(name: str) -> str:
    """Return the layer that a parameter belongs to: its path up to the first number.

    `encoder.0.enc_self.output.weight` -> `encoder.0`; `target_embedding.weight` ->
    `target_embedding`; a weight of the model itself is its own layer.
    """
    words = name.split(".")
    numbered = next((i for i, word in enumerate(words) if word.isdigit()), 0)
    return ".".join(words[: numbered + 1])


@torch.no_grad()
def first_losses(model: Seq2Seq, batch: Batch) -> tuple[float, float]:
    """Measure the loss of a fresh model; leave its buffers and the random state as they are.

    Power norm, which scales by statistics of earlier passes only, gets some passes first. The model
    is in training mode. Of the batch, of real sentences, the first 16 are used.

    Returns:
        Nats per token; and the same over the other tokens than the one just fed, which a fresh
        model with tied embeddings repeats (see `rules.is_uniform_guess`).
    """
    batch = batch.rows(0, _FIRST_ROWS).to(model.device)
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        if any(isinstance(module, PowerNorm) for module in model.modules()):
            for _ in range(_SETTLING):
                model(batch)
        states_BTD = model(batch)
    for name, tensor in model.named_buffers():
        tensor.copy_(buffers[name])
    is_real_BT = batch.is_real_BT
    states_ND, gold_N, fed_N = (
        x[is_real_BT] for x in (states_BTD, batch.target_BT, batch.inputs_BT)
    )
    some = slice(None, None, -(-len(gold_N) // _FIRST_POSITIONS))
    log_p_NV, gold_N, fed_N = model.output.log_probs(states_ND[some]), gold_N[some], fed_N[some]
    loss = F.nll_loss(log_p_NV, gold_N)
    is_other_N = gold_N != fed_N
    log_p_NV = log_p_NV.scatter(1, fed_N[:, None], -math.inf)[is_other_N]
    others_N1 = log_p_NV.logsumexp(-1, keepdim=True)
    return float(loss), float(F.nll_loss(log_p_NV - others_N1, gold_N[is_other_N]))


def _overall(
    layers: Mapping[str, Mapping[str, float]], functions: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """Return the metrics of the whole model from those of its parts."""
    found: dict[str, float] = {}
    for key, name, pick in (
        ("gradient_norm", "gradient_norm", lambda values: math.hypot(*values)),
        ("parameter_norm", "parameter_norm", lambda values: math.hypot(*values)),
        ("gradient_max_abs", "gradient_max_abs", max),
        ("update_ratio_min", "update_ratio", min),
        ("update_ratio_max", "update_ratio", max),
        ("activation_min", "activation_min", min),
        ("activation_max", "activation_max", max),
    ):
        if values := [layer[name] for layer in layers.values() if name in layer]:
            found[key] = pick(values)
    units = sum(values.get("units", 0) for values in functions.values())
    if units:
        found["dead_share"] = sum(values.get("dead", 0) for values in functions.values()) / units
    saturated = [values["saturated"] for values in functions.values() if "saturated" in values]
    if saturated:
        found["saturated_share"] = max(saturated)
    return found


class _Mallinfo2(ctypes.Structure):
    """Result of glibc's mallinfo2, in bytes and counts."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    )  # fmt: skip
    hblkhd: int
    uordblks: int


def memory_in_use(device: torch.device) -> dict[str, float]:
    """Return resident memory, and the part in use: the allocator keeps what was freed.

    A small Transformer on batches of many shapes went from 0.8 to 2.1 GB resident in 250 updates
    with the same 150 MB in use.
    """
    found = {"memory_mb": psutil.Process().memory_info().rss / 2**20}
    if device.type == "cuda":
        found["allocated_mb"] = torch.cuda.memory_allocated(device) / 2**20
        return found
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)  # glibc from 2.33 on
    if mallinfo2 is not None:
        mallinfo2.restype = _Mallinfo2
        info = mallinfo2()
        found["allocated_mb"] = (info.uordblks + info.hblkhd) / 2**20
    return found
