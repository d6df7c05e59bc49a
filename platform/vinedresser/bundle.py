"""Bundle: a model as a folder with weights, experiment, tokenizers, scores and hashes.

The one form of a trained model outside of its run: `translate`, `evaluate`, `prune`, `export` and
the registry all take it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vinedresser.config import Decoding, Experiment, ModelConfig
from vinedresser.data.batching.side import Side, join
from vinedresser.data.tokenizers.tokenizer import (
    SourceEncoder,
    TextTokenizer,
    load_source,
    load_tokenizer,
)
from vinedresser.decode import Hypothesis, decode
from vinedresser.errors import ConfigError, DataError
from vinedresser.model import Seq2Seq, Vocabulary
from vinedresser.workspace.commit import Manifest, commit, verify
from vinedresser.workspace.holds import hold
from vinedresser.workspace.layout import BundleFolder

FORMAT = 1
# Names per line in the account of a warm start.
_NAMED = 8


@dataclass(frozen=True)
class Bundle:
    """A loaded model with everything it needs to be used.

    The manifest is verified; the experiment's `model` section builds the shapes of the weights; the
    model is on the CPU, in eval mode and fp32; scores are plain JSON, see evaluate.py.
    """

    manifest: Manifest
    experiment: Experiment
    model: Seq2Seq
    source_tokenizer: SourceEncoder
    target_tokenizer: TextTokenizer
    scores: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Folder that it was read from."""
        return self.manifest.folder

    @property
    def digest(self) -> str:
        """SHA-256 over all its files."""
        return self.manifest.digest

    def translate(self, sentences: Sequence[str], decoding: Decoding | None = None) -> list[str]:
        """Decode sentences, in their order; longer ones than trained on are refused.

        Args:
            sentences: plain text; for a model of recordings the path of one, or of several that
                follow each other, separated by tabs.
            decoding: search and batch size; the experiment's own by default.

        Raises:
            DataError: a sentence is empty or over the task's max_source_length, or a recording is
                not what the model was trained on.
        """
        result = [""] * len(sentences)
        search = decoding or self.experiment.decoding
        for rows, found in self.decode(self.read(sentences), search):
            for row, [best] in zip(rows, found, strict=True):
                result[row] = self.target_tokenizer.decode(best.ids)
        return result

    def decode(
        self, source: Side, decoding: Decoding, *, nbest: int = 1
    ) -> Iterator[tuple[list[int], list[list[Hypothesis]]]]:
        """Yield the rows of each batch and their hypotheses, short sources first.

        Args:
            source: rows as `read` returns them.
            decoding: search and batch size.
            nbest: hypotheses per sentence, see `vinedresser.decode.decode`.
        """
        order, first = np.argsort(source.lengths, kind="stable"), 0
        cap = self.experiment.task.max_target_length
        while first < len(order):
            # Sorted by length: the last sentence of a batch is its longest.
            last = first + 1
            while (
                last < len(order)
                and (last + 1 - first) * source.lengths[order[last]] <= decoding.max_padded_tokens
            ):
                last += 1
            rows = order[first:last]
            found = decode(self.model, *source.padded(rows), decoding, cap=cap, nbest=nbest)
            yield rows.tolist(), found.hypotheses
            first = last

    def read(self, sentences: Sequence[str]) -> Side:
        """Tokenize sentences as `translate` takes them.

        Raises:
            DataError: see `translate`.
        """
        source, problems = self.read_lines(sentences)
        for number, problem in problems.items():
            raise DataError(f"line {number + 1}: {problem}")
        return source

    def read_lines(self, sentences: Sequence[str]) -> tuple[Side, dict[int, str]]:
        """Tokenize sentences; return them with a problem for each that cannot be decoded."""
        tokenizer, limit = self.source_tokenizer, self.experiment.task.max_source_length
        problems: dict[int, str] = {}
        if not tokenizer.features:
            source = Side.of(list(sentences), tokenizer)
        else:
            frames = [nothing := Side.of([], tokenizer)]
            for row, paths in enumerate(sentences):
                try:
                    frames.append(Side.of([paths.split("\t")], tokenizer))
                except DataError as error:
                    problems[row] = str(error.args[0])
                    frames.append(Side(nothing.values, np.zeros(2, np.int64), nothing.features))
            source = join(frames)
        for row, length in enumerate(source.lengths.tolist()):
            least = 1 if tokenizer.features else 2
            if least <= length <= limit or row in problems:
                continue
            unit, wanted = ("frames", limit) if tokenizer.features else ("tokens", limit - 1)
            found = f"{length} {unit}" if length > least else "nothing to read"
            problems[row] = f"{found}; wanted 1 to {wanted} {unit}"
        return source, problems


def vocabulary_of(source: SourceEncoder, target: TextTokenizer, *, joint: bool) -> Vocabulary:
    """Return the sizes that a model is built for."""
    return Vocabulary(source.size, target.size, joint, source.features)


def save_bundle(
    target: Path,
    *,
    experiment: Experiment,
    weights: Mapping[str, Tensor],
    tokenizers: tuple[SourceEncoder, TextTokenizer],
    scores: Mapping[str, Any],
) -> Path:
    """Commit a bundle; a folder that exists already is left as it is."""
    with commit(target) as staging:
        plain = {
            name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()
        }
        files = BundleFolder(staging.path)
        save_file(plain, files.weights)
        for tokenizer, side in zip(tokenizers, ("source", "target"), strict=True):
            tokenizer.save(staging.path, side)
        files.experiment.write_text(json.dumps(experiment.to_json(), indent=1) + "\n")
        files.scores.write_text(json.dumps(dict(scores), indent=1) + "\n")
        staging.meta |= {"kind": "bundle", "format": FORMAT}
    return target


def load_bundle(origin: Path | Manifest) -> Bundle:
    """Verify hashes first, then parse; the folder is held until this process ends.

    Args:
        origin: a folder, or the manifest of a folder that was verified already.

    Raises:
        DamagedError: the folder is incomplete or was changed.
        DataError: not a bundle, of another format, or its weights do not fit its model.
    """
    hold(origin if isinstance(origin, Path) else origin.folder)
    manifest = verify(origin) if isinstance(origin, Path) else origin
    folder = manifest.folder
    files = BundleFolder(folder)
    if manifest.meta.get("kind") != "bundle":
        raise DataError(f"{folder}: not a model bundle; name the folder of one")
    if manifest.meta.get("format") != FORMAT:
        raise DataError(
            f"{folder}: bundle format {manifest.meta.get('format')}, this version reads {FORMAT}; "
            "export it again"
        )
    experiment = Experiment.from_json(
        json.loads(files.experiment.read_text()), where=str(files.experiment)
    )
    source, target = load_source(folder, "source"), load_tokenizer(folder, "target")
    joint = experiment.task.has_joint_vocabulary
    model = experiment.model.build(vocabulary_of(source, target, joint=joint)).eval()
    try:
        model.load_state_dict(load_file(files.weights))
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise DataError(f"{folder}: the weights do not fit the model: {first}") from None
    scores = json.loads(files.scores.read_text())
    return Bundle(manifest, experiment, model, source, target, scores)


def refuse_other_pieces(bundle: Bundle, source: SourceEncoder, target: SourceEncoder) -> None:
    """Refuse a bundle whose ids mean other pieces: weights of equal shapes would fit them.

    Raises:
        DataError: a side has another tokenizer.
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


def warm_start(
    model: Seq2Seq, bundle: Bundle, config: ModelConfig, *, partial: bool = False
) -> str:
    """Copy a bundle's weights into a model (methods.md 76, 83).

    Head gates that the bundle does not have stay open, as built. A model whose bundle is refused is
    left as it is. With `partial` the tensors that do not fit stay fresh.

    Returns:
        An account: a line of counts, a line per kind of tensor that was not taken, and a line of
        settings that differ from the bundle's, dropout aside: with equal shapes the weights are
        taken, but may compute another function.

    Raises:
        DataError: a tensor is missing, unknown or of another shape, and `partial` is not set; or
            none fits.
        ConfigError: another number of heads, and `partial` is not set; or a tensor that is shared
            in the model has different values in the bundle.
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
    there, here = bundle.experiment.model.to_json(), config.to_json()
    changed = {
        key: (there.get(key), here.get(key))
        for key in {**here, **there}
        if "dropout" not in key and there.get(key) != here.get(key)
    }
    _refuse_other_function(model, bundle, matched, changed, partial=partial)
    with torch.no_grad():
        model.load_state_dict({**own, **matched})
    kinds = {
        "gates, fresh and open": fresh,
        "missing there, fresh": missing,
        "of another shape, fresh": [
            f"{n} {' for '.join('x'.join(map(str, side[n].shape)) for side in (given, own))}"
            for n in reshaped
        ],
        "unknown here, left out": unknown,
        "of the model's settings changed": [f"{k} {a} -> {b}" for k, (a, b) in changed.items()],
    }
    lines = [f"warm start: {len(matched)} tensors of {bundle.folder}"]
    for kind, names in kinds.items():
        rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        if names:
            lines.append(f"  {len(names)} {kind}: {', '.join(names[:_NAMED])}{rest}")
    return "\n".join(lines)


def _refuse_other_function(
    model: nn.Module,
    bundle: Bundle,
    given: Mapping[str, Tensor],
    changed: Mapping[str, tuple[Any, Any]],
    *,
    partial: bool,
) -> None:
    """Refuse weights that fit in shape but compute another function: see `warm_start`."""
    if "num_heads" in changed and not partial:
        there, here = changed["num_heads"]
        raise ConfigError(
            f"model.num_heads: found {here}, {bundle.folder} has {there}, and its weights cut into "
            f"other heads are another function; Fix: model.num_heads={there}, or init_partial=true "
            "to take them as they are"
        )
    shared: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in given:
            shared.setdefault(parameter, []).append(name)
    for names in shared.values():
        if not all(torch.equal(given[name], given[names[0]]) for name in names):
            tied = f"model.tie={changed['tie'][0]}" if "tie" in changed else ""
            raise ConfigError(
                f"init: {' and '.join(names)} are one tensor here, and differ in {bundle.folder}; "
                f"Fix: {tied or 'the model section of the bundle'}"
            )
