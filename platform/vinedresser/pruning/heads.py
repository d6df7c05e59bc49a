"""From closed gates to a physically smaller, standard model that is proved equal.

A head whose deterministic gate is 0 is cut out of the projections; the gate of every other head
is folded into its columns of the output projection (methods.md 85).
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vinedresser.batch import Batch
from vinedresser.bundle import Bundle
from vinedresser.config import Experiment, ModelConfig
from vinedresser.decode import greedy
from vinedresser.errors import ConfigError, TrainingError
from vinedresser.model import Seq2Seq, Vocabulary
from vinedresser.nn.attention import MultiHeadAttention

# Largest absolute difference of fp32 logits that rounding may cause.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Heads:
    """Kept and built heads of one attention kind, and gates that are neither 0 nor 1."""

    kept: int
    total: int
    undecided: int


@dataclass(frozen=True)
class Parity:
    """The certificate that two models are one function.

    Attributes:
        max_abs: largest absolute difference of teacher-forced fp32 logits on real positions.
        is_same_output: whether greedy outputs are identical.
        sentences: how many were compared.
        tokens: real target tokens among them.
    """

    max_abs: float
    is_same_output: bool
    sentences: int
    tokens: int

    @property
    def holds(self) -> bool:
        """Whether the smaller model may stand for the larger."""
        return self.max_abs < TOLERANCE and self.is_same_output

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def attention_layers(model: nn.Module) -> dict[str, list[tuple[str, MultiHeadAttention]]]:
    """Attention kind -> its layers in order, each with its name.

    A trainable names the attribute that holds a layer after its kind, as `encoder.0.enc_self`.
    """
    layers: dict[str, list[tuple[str, MultiHeadAttention]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, MultiHeadAttention):
            layers.setdefault(name.rsplit(".", 1)[-1], []).append((name, module))
    return layers


def count_heads(model: nn.Module) -> dict[str, Heads]:
    """Kept, built and undecided heads of each attention kind."""
    result = {}
    for kind, layers in attention_layers(model).items():
        gates = [_gate(layer) for _, layer in layers]
        result[kind] = Heads(
            kept=sum(int((gate > 0).sum()) for gate in gates),
            total=sum(len(gate) for gate in gates),
            undecided=sum(int(((gate > 0) & (gate < 1)).sum()) for gate in gates),
        )
    return result


def _gate(layer: MultiHeadAttention) -> Tensor:
    if layer.gates is None:
        return torch.ones(layer.num_heads)
    return layer.gates.deterministic().detach().cpu()


def compact(
    model: Seq2Seq, config: ModelConfig, vocabulary: Vocabulary
) -> tuple[ModelConfig, Seq2Seq]:
    """The same function with closed heads removed and gates folded in.

    Args:
        model: with gates; left as it is.
        config: what built it; has `concrete_heads`, `alive_heads` and `num_heads`.
        vocabulary: what it was built for.

    Returns:
        The smaller model's configuration (`alive_heads` instead of `concrete_heads`) and the
        model, in eval mode.

    Raises:
        ConfigError: the model has no gates.
    """
    if not getattr(config, "concrete_heads", ()):
        raise ConfigError("the model has no gates to close; set model.concrete_heads and train it")
    tree = config.to_json()
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    alive = dict(tree["alive_heads"])
    for kind, layers in attention_layers(model).items():
        if all(layer.gates is None for _, layer in layers):
            continue
        alive[kind] = []
        for name, layer in layers:
            gate = _gate(layer)
            kept = [head for head, value in enumerate(gate.tolist()) if value > 0]
            alive[kind].append([int(head in kept) for head in range(layer.num_heads)])
            weights = {key: t for key, t in weights.items() if not key.startswith(f"{name}.")}
            weights |= {f"{name}.{key}": t for key, t in layer.kept(kept, gate).items()}
    changes = {"concrete_heads": [], "alive_heads": alive}
    smaller_config = config.override(changes)
    smaller = smaller_config.build(vocabulary)
    smaller.load_state_dict(weights)
    return smaller_config, smaller.eval()


@torch.no_grad()
def certify(model: Seq2Seq, smaller: Seq2Seq, batches: Iterator[Batch], *, cap: int) -> Parity:
    """Compares two models in fp32 on real sentences.

    Raises:
        TrainingError: they are not the same function.
    """
    largest, same, sentences, tokens = torch.zeros(()), True, 0, 0
    for batch in batches:
        real = batch.is_real_BT
        ours, theirs = (m.logits(m(batch)[real]) for m in (model.eval(), smaller.eval()))
        # torch.maximum keeps a NaN, Python's max may drop it.
        largest = torch.maximum(largest, (ours - theirs).abs().max().cpu())
        outputs = [
            greedy(m, batch.source_BS, batch.source_lengths_B, cap=cap).ids
            for m in (model, smaller)
        ]
        same = same and outputs[0] == outputs[1]
        sentences, tokens = sentences + len(batch.rows_B), tokens + int(batch.tokens)
    if not sentences:
        raise TrainingError(
            "no sentences to compare the compacted model on; name a split with some"
        )
    parity = Parity(float(largest), same, sentences, tokens)
    if not parity.holds:
        raise TrainingError(
            f"the compacted model is not the trained one: logits differ by {float(largest):.2e} "
            f"(at most {TOLERANCE} wanted), greedy outputs {'agree' if same else 'differ'}"
        )
    return parity


def num_parameters(model: nn.Module) -> int:
    """Trainable numbers, tied ones once."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def decode_speeds(
    models: Sequence[Seq2Seq], batches: Callable[[], Iterator[Batch]], *, cap: int, rounds: int = 5
) -> list[float]:
    """Sentences per second of greedy decoding, medians of alternating rounds on this machine."""
    speeds: list[list[float]] = [[] for _ in models]
    for _ in range(rounds):
        for model, measured in zip(models, speeds, strict=True):
            count, started = 0, time.perf_counter()
            for batch in batches():
                greedy(model.eval(), batch.source_BS, batch.source_lengths_B, cap=cap)
                count += len(batch.rows_B)
            measured.append(count / (time.perf_counter() - started))
    return [statistics.median(measured) for measured in speeds]


def pruning_experiment(
    finalist: Bundle, overrides: Mapping[str, Any], *, kinds: Sequence[str]
) -> Experiment:
    """The finalist's experiment with open gates, started from its weights (methods.md 83).

    Scheduled sampling's ramp starts over with the run, so its final share is held constant.
    """
    base = {
        "init": str(finalist.folder),
        "model.concrete_heads": list(kinds),
        "objective.sampling.decay": "constant",
    }
    return finalist.experiment.override({**base, **overrides})
