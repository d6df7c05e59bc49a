"""Summary of a model: parameters by part, memory, arithmetic per token."""

import re
import warnings
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from vinedresser.batch import Batch
from vinedresser.model import Seq2Seq, Vocabulary
from vinedresser.nn.attention import MultiHeadAttention
from vinedresser.special_ids import EOS

# Shapes of a part that are written out; the rest are counted.
_SHAPES = 2


@dataclass(frozen=True)
class ModelPart:
    """Modules of one kind in one position, equal layers together.

    Attributes:
        name: path inside the model without the numbers of layers: `encoder.enc_self`.
        kind: class of the module.
        copies: layers that have it.
        shapes: of the parameters of all copies, the largest first, with how many of each.
        parameters: numbers in them; shared ones count at their first name.
        tied: names of shared parameters that are counted elsewhere.
    """

    name: str
    kind: str
    copies: int
    shapes: tuple[tuple[tuple[int, ...], int], ...]
    parameters: int
    tied: tuple[str, ...]

    @property
    def written(self) -> str:
        """Return the two largest shapes, `512x768, 512 (2)`; of one layer where all are alike."""
        counts = [count for _, count in self.shapes]
        of = self.copies if all(count % self.copies == 0 for count in counts) else 1
        shown = [
            "x".join(map(str, shape)) + (f" ({count // of})" if count > of else "")
            for shape, count in self.shapes[:_SHAPES]
        ]
        more = sum(count // of for count in counts[_SHAPES:])
        return ", ".join([*shown, *([f"{more} more"] if more else [])])


@dataclass(frozen=True)
class ModelSummary:
    """Parts and sizes of a model.

    Shared parameters count once. `flops` are multiply-adds x 2 of a forward pass per target token,
    of a pair with `source` source positions and `target` target tokens; 0 where not computed.
    """

    parts: tuple[ModelPart, ...]
    parameters: int
    trainable: int
    flops: float
    source: int
    target: int

    def bytes_of(self, size: int) -> int:
        """Return the memory of the weights at `size` bytes per number."""
        return size * self.parameters


def summarise(
    model: Seq2Seq,
    vocabulary: Vocabulary,
    *,
    source: int = 20,
    target: int = 20,
    flops: bool = True,
) -> ModelSummary:
    """Count parameters by part and, on one pair of sentences, the arithmetic of a forward pass.

    The model is on the CPU. `source` and `target` are the sizes of the pair, >= 1: tokens or
    frames, and target tokens.
    """
    unique = list(model.parameters())
    return ModelSummary(
        parts=tuple(_parts(model)),
        parameters=sum(p.numel() for p in unique),
        trainable=sum(p.numel() for p in unique if p.requires_grad),
        flops=_flops(model, vocabulary, source, target) / target if flops else 0.0,
        source=source,
        target=target,
    )


def _parts(model: nn.Module) -> list[ModelPart]:
    modules = dict(model.named_modules())
    seen: dict[int, str] = {}
    order: dict[str, list[tuple[str, str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = _owner(name.rpartition(".")[0])
        order.setdefault(re.sub(r"\.\d+", "", owner), []).append((owner, name, parameter))
    parts = []
    for place, entries in order.items():
        own = [p for _, name, p in entries if seen.setdefault(id(p), name) == name]
        tied = [f"{n} = {seen[id(p)]}" for _, n, p in entries if seen[id(p)] != n]
        shapes = Counter(tuple(p.shape) for p in own)
        largest = sorted(shapes.items(), key=lambda item: (-torch.Size(item[0]).numel(), item[0]))
        first = entries[0][0]
        parts.append(
            ModelPart(
                name=place or "(model)",
                kind=type(modules[first]).__name__,
                copies=len({owner for owner, _, _ in entries}),
                shapes=tuple(largest),
                parameters=sum(p.numel() for p in own),
                tied=tuple(tied),
            )
        )
    return parts


def _owner(path: str) -> str:
    """Return the module of a row of the table: a child of the model, or of its layer."""
    words = path.split(".")
    numbered = next((i for i, word in enumerate(words) if word.isdigit()), None)
    return ".".join(words[:1] if numbered is None else words[: numbered + 2])


@torch.no_grad()
def _flops(model: Seq2Seq, vocabulary: Vocabulary, source: int, target: int) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    ids_1S = torch.full((1, source), EOS)
    frames_1SF = torch.zeros(1, source, vocabulary.features)
    batch = Batch(
        frames_1SF if vocabulary.features else ids_1S,
        torch.tensor([source]),
        torch.full((1, target), EOS),
        torch.tensor([target]),
        torch.zeros(1, dtype=torch.int64),
    )
    was_training = model.training
    padding = [module for module in model.modules() if isinstance(module, MultiHeadAttention)]
    for module in padding:
        module.pads_keys = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a setting for other vendors' GPUs
        # oneDNN's recurrent kernels are one operation, unknown to the counter.
        with torch.backends.mkldnn.flags(enabled=False):
            counter = FlopCounterMode(display=False)
            with counter:
                model.eval().output.log_probs(model(batch))
    for module in padding:
        module.pads_keys = True
    model.train(was_training)
    return int(counter.get_total_flops())
