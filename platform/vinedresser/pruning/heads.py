"""From closed gates to a physically smaller, standard model.

A head whose deterministic gate is 0 is cut out of the projections; the gate of every other head
is folded into its columns of the output projection (methods.md 85).
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vinedresser.batch import Batch
from vinedresser.bundle import Bundle
from vinedresser.config import Experiment, ModelConfig
from vinedresser.decode import greedy
from vinedresser.errors import ConfigError
from vinedresser.model import Seq2Seq, Vocabulary
from vinedresser.nn.attention import MultiHeadAttention


@dataclass(frozen=True)
class Heads:
    """Kept and built heads of one attention kind, and gates between 0 and 1 (methods.md 85)."""

    kept: int
    total: int
    undecided: int


def attention_layers(model: nn.Module) -> dict[str, list[tuple[str, MultiHeadAttention]]]:
    """Return attention kind -> its layers in order, each with its name.

    In a trainable the attribute of a layer is named after its kind, as `encoder.0.enc_self`.
    """
    layers: dict[str, list[tuple[str, MultiHeadAttention]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, MultiHeadAttention):
            layers.setdefault(name.rsplit(".", 1)[-1], []).append((name, module))
    return layers


def count_heads(model: nn.Module) -> dict[str, Heads]:
    """Return kept, built and undecided heads of each attention kind."""
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
    """Return the same function with closed heads removed and gates folded in.

    The model has gates and is not changed.

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
    smaller_config = config.override({"concrete_heads": [], "alive_heads": alive})
    smaller = smaller_config.build(vocabulary)
    smaller.load_state_dict(weights)
    return smaller_config, smaller.eval()


def num_parameters(model: nn.Module) -> int:
    """Return the number of trainable numbers, tied ones once."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def decode_speeds(
    models: Sequence[Seq2Seq], batches: Callable[[], Iterator[Batch]], *, cap: int, rounds: int = 5
) -> list[float]:
    """Return sentences per second of greedy decoding: medians of alternating rounds."""
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
    """Return the finalist's experiment with open gates, from its weights (methods.md 83).

    Scheduled sampling's ramp starts over with the run, so its final share is held constant.
    """
    base = {
        "init": str(finalist.folder),
        "model.concrete_heads": list(kinds),
        "objective.likelihood.sampling.decay": "constant",
    }
    return finalist.experiment.override({**base, **overrides})
