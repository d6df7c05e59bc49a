"""Bundle: a model as a folder. Weights, the experiment that made it, tokenizers, scores, hashes.

The one form in which a trained model leaves a run: `translate`, `evaluate`, `prune`, `export` and
the registry all take it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vinedresser.commit import commit, verify
from vinedresser.config import Experiment
from vinedresser.data.batches.side import Side, join
from vinedresser.data.tokenizers.tokenizer import (
    SourceEncoder,
    TextTokenizer,
    load_source,
    load_tokenizer,
)
from vinedresser.decode import beam_search, greedy
from vinedresser.errors import DataError
from vinedresser.model import Seq2Seq, Vocabulary

FORMAT = 1


@dataclass(frozen=True)
class Bundle:
    """A loaded model with everything it needs to be used.

    Attributes:
        folder: where it was read from.
        digest: SHA-256 over all its files.
        experiment: what trained it; its `model` section builds the weights' shapes.
        model: on the CPU, in eval mode, fp32.
        scores: plain JSON, see evaluate.py.
    """

    folder: Path
    digest: str
    experiment: Experiment
    model: Seq2Seq
    source_tokenizer: SourceEncoder
    target_tokenizer: TextTokenizer
    scores: Mapping[str, Any]

    def translate(self, sentences: Sequence[str], *, beam: int = 1) -> list[str]:
        """Decodes sentences, in their order; longer ones than trained on are refused.

        Args:
            sentences: plain text; for a model of recordings the path of one, or of several that
                follow each other, with tabs between them.
            beam: hypotheses kept; 1 is greedy.

        Raises:
            DataError: a sentence is empty or over the task's max_source_length, or a recording is
                not what the model was trained on.
        """
        source = self.read(sentences)
        order = np.argsort(source.lengths, kind="stable")
        result = [""] * len(order)
        for first in range(0, len(order), 64):
            group = order[first : first + 64]
            texts = self._decode(*source.padded(group), beam)
            for i, text in zip(group.tolist(), texts, strict=True):
                result[i] = text
        return result

    def read(self, sentences: Sequence[str]) -> Side:
        """Sentences as `translate` takes them, tokenized.

        Raises:
            DataError: see `translate`.
        """
        source, limit = self._read(sentences), self.experiment.task.max_source_length
        is_frames = bool(self.source_tokenizer.features)
        for number, length in enumerate(source.lengths.tolist(), 1):
            if length > limit or (length == 1 and not is_frames):
                wanted = f"1 to {limit} frames" if is_frames else f"1 to {limit - 1} tokens"
                found = f"{length} {'frames' if is_frames else 'tokens'}"
                found = "nothing to read" if length == 1 else found
                raise DataError(f"line {number}: {found}; wanted {wanted}")
        return source

    def _read(self, sentences: Sequence[str]) -> Side:
        if not self.source_tokenizer.features:
            return Side.of(list(sentences), self.source_tokenizer)
        frames = []
        for number, paths in enumerate(sentences, 1):
            try:
                frames.append(Side.of([paths.split("\t")], self.source_tokenizer))
            except DataError as error:
                raise DataError(f"line {number}: {error.args[0]}") from None
        return join(frames) if frames else Side.of([], self.source_tokenizer)

    def _decode(self, source_BS: Tensor, lengths_B: Tensor, beam: int) -> list[str]:
        cap = self.experiment.task.max_target_length
        if beam == 1:
            decoded = greedy(self.model, source_BS, lengths_B, cap=cap)
        else:
            alpha = self.experiment.evaluation.length_alpha
            decoded = beam_search(self.model, source_BS, lengths_B, beam=beam, alpha=alpha, cap=cap)
        return [self.target_tokenizer.decode(row) for row in decoded.ids]


def vocabulary_of(source: SourceEncoder, target: TextTokenizer, *, joint: bool) -> Vocabulary:
    """The sizes a model is built for."""
    return Vocabulary(source.size, target.size, joint, source.features)


def save_bundle(
    target: Path,
    *,
    experiment: Experiment,
    weights: Mapping[str, Tensor],
    tokenizers: tuple[SourceEncoder, TextTokenizer],
    scores: Mapping[str, Any],
) -> Path:
    """Commits a bundle; a folder that is already there is left as it is."""
    with commit(target) as staging:
        plain = {
            name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()
        }
        save_file(plain, staging.path / "weights.safetensors")
        for tokenizer, side in zip(tokenizers, ("source", "target"), strict=True):
            tokenizer.save(staging.path, side)
        for name, value in (("experiment", experiment.to_json()), ("scores", dict(scores))):
            (staging.path / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n")
        staging.meta |= {"kind": "bundle", "format": FORMAT}
    return target


def load_bundle(folder: Path) -> Bundle:
    """Verifies hashes first, then parses.

    Raises:
        DamagedError: the folder is incomplete or was changed.
        DataError: it is no bundle, of another format, or its weights do not fit its model.
    """
    manifest = verify(folder)
    if manifest.meta.get("kind") != "bundle":
        raise DataError(f"{folder}: not a model bundle; name the folder of one")
    if manifest.meta.get("format") != FORMAT:
        raise DataError(
            f"{folder}: bundle format {manifest.meta.get('format')}, this version reads {FORMAT}; "
            "export it anew"
        )
    experiment = Experiment.from_json(
        json.loads((folder / "experiment.json").read_text()), where=str(folder / "experiment.json")
    )
    source, target = load_source(folder, "source"), load_tokenizer(folder, "target")
    joint = experiment.task.has_joint_vocabulary
    model = experiment.model.build(vocabulary_of(source, target, joint=joint)).eval()
    try:
        model.load_state_dict(load_file(folder / "weights.safetensors"))
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise DataError(f"{folder}: the weights do not fit the model: {first}") from None
    scores = json.loads((folder / "scores.json").read_text())
    return Bundle(folder, manifest.digest, experiment, model, source, target, scores)


def refuse_other_pieces(bundle: Bundle, source: SourceEncoder, target: SourceEncoder) -> None:
    """Refuses a bundle whose ids mean other pieces: weights of equal shapes would fit them.

    Raises:
        DataError: which side has another tokenizer.
    """
    for side, mine, theirs in (
        ("source", source, bundle.source_tokenizer), ("target", target, bundle.target_tokenizer),
    ):  # fmt: skip
        if mine.digest != theirs.digest:
            raise DataError(
                f"{bundle.folder}: its {side} tokenizer is {theirs.digest[:12]}, the data's is "
                f"{mine.digest[:12]}; the same ids mean other pieces. Fix: train on the data that "
                "the bundle was trained on, or without init"
            )


def warm_start(model: Seq2Seq, bundle: Bundle, *, partial: bool = False) -> str:
    """Copies a bundle's weights into a model (methods.md 76, 83).

    Head gates that the bundle does not have stay open, as built.

    Args:
        model: with fresh weights.
        bundle: where from.
        partial: take what fits; the rest stays fresh.

    Returns:
        The account: a line of counts, and one for each kind of tensor that was not taken.

    Raises:
        DataError: a tensor is missing, unknown or of another shape, and `partial` is not set; or
            none fits.
    """
    own, given = model.state_dict(), bundle.model.state_dict()
    fresh = [name for name in own if name not in given and name.endswith("gates.log_alpha")]
    missing = [name for name in own if name not in given and name not in fresh]
    unknown = [name for name in given if name not in own]
    reshaped = [n for n in own if n in given and own[n].shape != given[n].shape]
    matched = {name: given[name] for name in own if name in given and name not in reshaped}
    if not matched or ((missing or unknown or reshaped) and not partial):
        raise DataError(
            f"{bundle.folder} does not fit the model: {len(missing)} tensors missing, "
            f"{len(unknown)} unknown, {len(reshaped)} of another shape "
            f"({', '.join((missing + unknown + reshaped)[:3])}); use the same model section, or "
            "init_partial=true to take the rest"
        )
    with torch.no_grad():
        model.load_state_dict({**own, **matched})
    shapes = [f"{n} {_shape(given[n])} for {_shape(own[n])}" for n in reshaped]
    kinds = {
        "gates, fresh and open": fresh,
        "missing there, fresh": missing,
        "of another shape, fresh": shapes,
        "unknown here, left out": unknown,
    }
    lines = [f"warm start: {len(matched)} tensors of {bundle.folder}"]
    lines += [f"  {len(names)} {kind}: {_few(names)}" for kind, names in kinds.items() if names]
    return "\n".join(lines)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def _few(names: Sequence[str], count: int = 8) -> str:
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + rest
