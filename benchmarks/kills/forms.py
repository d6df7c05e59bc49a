"""The tiny forms of the zoo that are killed, and the corpus they learn."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vinedresser.config import Experiment, Task, Tokenizer
from vinedresser.data.corpora.kinds.text import Pair, TextCorpus
from vinedresser.data.shards import ShardSet, prepare

_TRANSFORMER = {
    "kind": "transformer", "d_model": 16, "d_ff": 32, "num_heads": 2, "encoder_layers": 1,
    "decoder_layers": 1,
}  # fmt: skip
_ATTENTION = {"kind": "attention_rnn", "width": 16, "encoder_units": 16}
_CONV = {"kind": "conv", "d_model": 16, "encoder_layers": 2, "decoder_layers": 2}
_GATED = {**_TRANSFORMER, "concrete_heads": ["enc_self", "dec_self", "dec_enc"]}
_SAMPLED = {"probability": 0.5, "decay_steps": 20}

# Crosses two ends of an epoch, four evaluations and eight checkpoints.
SETTLED = {
    "steps": 60,
    "checkpoint_every": 7,
    "batch.max_padded_tokens": 160,
    "optim.warmup_steps": 10,
    "evaluation.num_evaluations": 4,
    "evaluation.sentences": 10,
    "decoding.max_padded_tokens": 96,
    "evaluation.attention_every": 0,
    "compute.threads": 1,
    "compute.device": "cpu",
    "compute.precision": "fp32",
}

# Name -> (tokenizer of the corpus, model, what else differs).
FORMS: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
    "rnn": ("symbols", {"kind": "rnn", "width": 16, "encoder_units": 16}, {}),
    "rnn, sampled, bf16": (
        "symbols",
        {"kind": "rnn", "width": 16, "encoder_units": 8, "cell": "gru", "bidirectional": True},
        {"objective.likelihood.sampling": _SAMPLED, "compute.precision": "bf16"},
    ),
    "attention_rnn, bf16": ("symbols", _ATTENTION, {"compute.precision": "bf16"}),
    "attention_rnn, input feeding, sampled": (
        "symbols",
        {**_ATTENTION, "input_feeding": True},
        {"objective.likelihood.sampling": {**_SAMPLED, "decay": "inverse_sigmoid"}},
    ),
    "conv, bf16": (
        "symbols",
        _CONV,
        {"compute.precision": "bf16", "objective.likelihood.label_smoothing": 0.1},
    ),
    "conv, sampled": ("symbols", _CONV, {"objective.likelihood.sampling": _SAMPLED}),
    "transformer, unaveraged": (
        "symbols", _TRANSFORMER, {"optim.ema_decay": 0, "optim.decay": "inverse_sqrt"},
    ),
    "transformer, gated, sampled": (
        "symbols",
        _GATED,
        {"objective.head_penalty.weight": 0.5, "objective.likelihood.sampling": _SAMPLED},
    ),
    "transformer, gated, bf16": (
        "symbols",
        {**_GATED, "tie": "all"},
        {"objective.head_penalty.weight": 0.5, "compute.precision": "bf16"},
    ),
    "transformer, accumulated, part frozen": (
        "symbols",
        _TRANSFORMER,
        {"batch.per_update": 3, "batch.max_padded_tokens": 64, "optim.freeze": ["encoder.*"]},
    ),
    "transformer, BPE dropout": (
        "bpe", _TRANSFORMER, {"batch.subword_alpha": 0.1, "batch.subset": 0.7},
    ),
}  # fmt: skip


def corpus(folder: Path, tokenizer: str) -> ShardSet:
    """Sentences of 2 to 6 words of few letters, to be reversed: 400 train rows, 40 of dev."""
    draw, pairs = random.Random(0), {}  # noqa: S311
    words = ["a", "b", "ab", "ba", "abc", "cab"]
    for split, count in (("train", 400), ("dev", 40)):
        rows = [draw.choices(words, k=draw.randint(2, 6)) for _ in range(count)]
        for side, step in (("source", 1), ("target", -1)):
            lines = (" ".join(row[::step]) + "\n" for row in rows)
            path = folder / f"{split}.{side}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(lines))
        source, target = (str(folder / f"{split}.{side}") for side in ("source", "target"))
        pairs[split] = Pair(source=source, target=target)
    size = {"vocab_size": 18} if tokenizer == "bpe" else {}
    task = Task(
        name=f"reversal-{tokenizer}",
        corpus=TextCorpus(**pairs),
        tokenizer=Tokenizer.model_validate({"kind": tokenizer, **size}),
        metric="per",
        max_source_length=40,
        max_target_length=40,
    )
    return prepare(task, folder / "shards", executor="in_process")


def experiment(form: str, task: Task, **more: Any) -> dict[str, Any]:
    """One of FORMS as plain JSON."""
    _, model, changes = FORMS[form]
    base = Experiment.from_json({"task": task.to_json(), "model": dict(model)})
    return base.override({**SETTLED, **changes, **more}).to_json()
