"""Golden curves: 50 CPU updates of every trainable, every loss equal to the bit.

Each form of a trainable below trains once on a tiny corpus that is made here, on one thread in
fp32. Its losses and evaluations are compared with `tests/golden/curves/TRAINABLE-FORM.json`. Floats
are stored as `float.hex()`, with the torch version and processor that they hold for; elsewhere the
comparison is skipped.

A change that is meant to alter training records the curves anew and says why in its commit:

    python -m pytest tests/test_golden.py --record-golden        # -k conv-other for one of them

A new trainable needs an entry in FORMS: its default form and its most different form.
"""

import json
import platform
import random
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

CURVES = Path(__file__).parent / "golden" / "curves"

Curve = dict[str, Any]


def trained(task: Mapping[str, Any], settings: Mapping[str, Any], folder: Path) -> Curve:
    """Return what 50 updates give; the only function here that knows the package.

    Args:
        task: configuration of a task as plain JSON.
        settings: dotted key of an experiment -> value; `model` is a mapping with `kind`.
        folder: of shards and run.
    """
    from tests.memory_tracker import MemoryTracker
    from tests.short_run import MonitoredRun, folder_of
    from vinedresser.config import Experiment, Task
    from vinedresser.data.shards import prepare
    from vinedresser.training.device import Device

    shards = prepare(Task.from_json(task), folder / "shards", executor="in_process")
    common = {
        "steps": 50,
        "checkpoint_every": 20,
        "batch.max_padded_tokens": 128,
        "optim.warmup_steps": 10,
        "evaluation.num_evaluations": 2,
        "evaluation.attention_every": 0,
        "compute.device": "cpu",
        "compute.precision": "fp32",
    }
    changes = {key: value for key, value in settings.items() if key != "model"}
    base = Experiment.from_json({"task": dict(task), "model": settings["model"]})
    experiment = base.override({**common, **changes})
    tracker = MemoryTracker()
    run = MonitoredRun(
        experiment,
        shards,
        folder_of(experiment, shards, folder),
        device=Device(torch.device("cpu"), None),
        tracker=tracker,
    )
    run.execute()
    # Every update is logged, for there are 50 log lines in a run.
    logged: dict[str, list[float]] = {}
    for key, value, _ in tracker.metrics:
        logged.setdefault(key, []).append(value)
    return {
        "training loss": logged["train/loss"],
        "gradient norm": logged["train/gradient_norm_max"],
        "evaluated metric": logged[f"dev/{experiment.task.metric}"],
        "evaluated loss": logged["dev/teacher_forced_loss"],
        "evaluated error": logged["dev/teacher_forced_error"],
    }


TRANSFORMER = {"kind": "transformer", "d_model": 16, "d_ff": 32, "num_heads": 2}
# Trainable -> form -> (corpus, settings). Sizes are tiny; `default` changes nothing else.
FORMS: Mapping[str, Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    "transformer": {
        "default": ("symbols", {"model": TRANSFORMER}),
        # L0 gates, smoothing, own predictions by argmax, one table for everything.
        "gated": (
            "symbols",
            {
                "model": {
                    **TRANSFORMER, "encoder_layers": 1, "decoder_layers": 2, "norm": "post",
                    "activation": "swiglu", "positions": "learned",
                    "max_positions": 16, "tie": "all", "rescale_emb": False, "inp_emb_bias": True,
                    "values": "low_rank", "value_rank": 3,
                    "concrete_heads": ["enc_self", "dec_self", "dec_enc"],
                },
                "objective.head_penalty.weight": 0.3,
                "objective.likelihood.label_smoothing": 0.1,
                "objective.likelihood.sampling": {"probability": 0.4, "decay_steps": 20},
                "batch.per_update": 2,
                "batch.order": "bucket_by_source",
                "optim.decay": "inverse_sqrt",
                "optim.weight_decay": 0.01,
                "optim.lr": 5e-3,
                "decoding.beam": 3,
            },
        ),
        # Pruned heads, own predictions by draws, characters of a sub-sampled source.
        "pruned": (
            "characters",
            {
                "model": {
                    **TRANSFORMER, "encoder_layers": 2, "decoder_layers": 1, "norm_kind": "batch",
                    "activation": "gelu", "positions": "one_hot", "tie": "none", "values": "none",
                    "alive_heads": {"enc_self": [[0, 1], [1, 0]], "dec_enc": [[0, 1]]},
                    "subsampling": {"kind": "pool", "pool": "max", "layers": 1},
                    "embedding": {
                        "kind": "characters", "character_features": 8, "widths": [1, 2, 3],
                        "filters": 8,
                    },
                },
                "objective.likelihood.sampling": {
                    "probability": 0.5, "feedback": "sample", "decay": "inverse_sigmoid",
                    "decay_steps": 8,
                },
                "optim.ema_decay": 0.0,
                "optim.freeze": ["source_embedding*"],
                "seed": 7,
            },
        ),
    },
    "rnn": {
        "default": ("symbols", {"model": {"kind": "rnn", "width": 16, "encoder_units": 16}}),
        "other": (
            "symbols",
            {
                "model": {
                    "kind": "rnn", "width": 16, "encoder_units": 12, "cell": "gru",
                    "bidirectional": True, "encoder_layers": 2, "decoder_layers": 2,
                    "layer_norm": True, "reverse_source": True, "tie": "none",
                },
                "objective.likelihood.label_smoothing": 0.2,
                "objective.likelihood.sampling": {
                    "probability": 0.5, "feedback": "sample", "decay": "constant",
                },
                "batch.subset": 0.5,
                "decoding.beam": 2,
            },
        ),
    },
    "attention_rnn": {
        "default": (
            "symbols", {"model": {"kind": "attention_rnn", "width": 16, "encoder_units": 12}},
        ),
        # Listen, Attend and Spell: a pyramid over frames.
        "listener": (
            "tones",
            {
                "model": {
                    "kind": "listener", "width": 16, "encoder_units": 12,
                    "subsampling": {"layers": 2}, "encoder_layers": 3,
                },
                "objective.likelihood.sampling": {"probability": 0.5, "decay": "exponential"},
                "batch.max_padded_tokens": 512,
            },
        ),
        "feeding": (
            "symbols",
            {
                "model": {
                    "kind": "attention_rnn", "width": 16, "encoder_units": 16, "cell": "gru",
                    "bidirectional": False, "score": "cosine", "input_feeding": True,
                    "decoder_layers": 2, "layer_norm": True, "tie": "none",
                },
                "objective.likelihood.sampling": {
                    "probability": 0.3, "feedback": "sample", "decay": "constant",
                },
            },
        ),
    },
    "conv": {
        "default": ("symbols", {"model": {"kind": "conv", "d_model": 16, "encoder_layers": 2,
                                          "decoder_layers": 2}}),
        # Another segmentation into pieces at each reading.
        "other": (
            "pieces",
            {
                "model": {
                    "kind": "conv", "d_model": 16, "kernel": 4, "encoder_layers": 1,
                    "decoder_layers": 3, "weight_norm": False, "positions": "none", "tie": "none",
                    "subsampling": {"kind": "conv", "layers": 1},
                },
                "objective.likelihood.label_smoothing": 0.1,
                "objective.likelihood.sampling": {"probability": 0.3, "decay": "constant"},
                "batch.order": "random",
                "batch.subword_alpha": 0.2,
                "decoding.beam": 2,
            },
        ),
    },
}  # fmt: skip


def task_of(name: str, folder: Path) -> dict[str, Any]:
    """Write a corpus of 300 and 24 rows that reverse their source; return its task."""
    if name == "tones":
        pytest.importorskip("soundfile", reason="the extra `speech` is not installed")
        pytest.importorskip("kaldi_native_fbank", reason="the extra `speech` is not installed")
    draw, noise = random.Random(0), np.random.default_rng(0)
    between = " " if name in ("symbols", "tones") else ""
    for split, count in (("train", 300), ("dev", 24)):
        rows = [draw.choices("abcdef", k=draw.randint(2, 6)) for _ in range(count)]
        for side, step in (("source", 1), ("target", -1)):
            lines = (between.join(row[::step]) + "\n" for row in rows)
            (folder / f"{split}.{side}").write_text("".join(lines))
        if name != "tones":
            continue
        for letter in "abcdef":
            times = np.arange(600 + 50 * "abcdef".index(letter)) / 8000
            tone = 6000 * np.sin(2 * np.pi * 250 * 1.5 ** "abcdef".index(letter) * times)
            with wave.open(str(folder / f"{split}-{letter}.wav"), "wb") as file:
                file.setparams((1, 2, 8000, 0, "NONE", ""))
                file.writeframes((tone + noise.normal(0, 300, len(tone))).astype("<i2").tobytes())
        entries = [
            {"audio": [f"{split}-{letter}.wav" for letter in row], "text": " ".join(row[::-1])}
            for row in rows
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    symbols = {"kind": "symbols"}
    common = {"name": name, "metric": "per", "max_source_length": 80, "max_target_length": 12}
    if name == "tones":
        manifests = {split: str(folder / f"{split}.jsonl") for split in ("train", "dev")}
        frames = {"kind": "frames", "sample_rate": 8000, "num_mels": 8}
        sides = {"source_tokenizer": frames, "target_tokenizer": symbols}
        return {**common, **sides, "corpus": {"kind": "speech", **manifests}}
    corpus = {
        split: {side: str(folder / f"{split}.{side}") for side in ("source", "target")}
        for split in ("train", "dev")
    }
    characters = {"kind": "characters"}
    sides = {
        "symbols": {"tokenizer": symbols},
        "characters": {"source_tokenizer": characters, "target_tokenizer": characters},
        "pieces": {"tokenizer": {"kind": "bpe", "vocab_size": 24}},
    }[name]
    metric = "per" if name == "symbols" else "cer"
    return {**common, **sides, "metric": metric, "corpus": corpus}


def environment() -> dict[str, str]:
    """Return what decides the bits: sums are in another order in other libraries and processors."""
    vendor = "unknown"
    if (cpuinfo := Path("/proc/cpuinfo")).is_file():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("vendor_id")]
        vendor = lines[0].split(":")[1].strip() if lines else vendor
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "processor": vendor,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "mkl": str(torch.backends.mkl.is_available()),
    }


def plain(curve: Curve) -> dict[str, list[str]]:
    return {name: [float(value).hex() for value in values] for name, values in curve.items()}


def differences(found: Curve, wanted: Mapping[str, list[str]]) -> list[str]:
    """One line per series that differs, with its first different entry."""
    lines = []
    for name, values in plain(found).items():
        stored = wanted.get(name, [])
        if len(values) != len(stored):
            lines.append(f"{name}: {len(values)} values, stored are {len(stored)}")
            continue
        places = [i for i, (a, b) in enumerate(zip(values, stored, strict=True)) if a != b]
        if places:
            i = places[0]
            lines.append(
                f"{name}: {len(places)} of {len(values)} differ, first at {i + 1}: found "
                f"{found[name][i]!r}, stored {float.fromhex(stored[i])!r}"
            )
    return lines


def all_forms() -> list[object]:
    return [
        pytest.param(module, form, id=f"{module}-{form}")
        for module, forms in FORMS.items()
        for form in forms
    ]


def test_every_trainable_has_curves() -> None:
    from vinedresser.config.kinds import ZOO, kinds

    missing = sorted(set(kinds(ZOO)) - set(FORMS))
    assert not missing, f"no golden curve of {missing}: add two forms to FORMS and record them"
    assert sorted(FORMS) == sorted(kinds(ZOO))
    assert all("default" in forms and len(forms) > 1 for forms in FORMS.values())
    files = {path.stem for path in CURVES.glob("*.json")}
    assert files == {f"{module}-{form}" for module, forms in FORMS.items() for form in forms}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("module", "form"), all_forms())
def test_a_curve_is_the_stored_one(
    module: str, form: str, tmp_path: Path, is_recording: bool, one_thread: None
) -> None:
    corpus, settings = FORMS[module][form]
    path, here = CURVES / f"{module}-{form}.json", environment()
    stored = json.loads(path.read_text()) if path.is_file() else {}
    if not is_recording:
        assert stored, f"{path} is missing: record it with --record-golden"
        if stored["environment"] != here:
            pytest.skip(f"curves hold for {stored['environment']}, here is {here}")
    torch.set_num_threads(1)
    curve = trained(task_of(corpus, tmp_path), settings, tmp_path)
    assert len(curve["training loss"]) == 50
    assert len(curve["evaluated metric"]) == 2
    if is_recording:
        content = {"environment": here, "curve": plain(curve)}
        path.write_text(json.dumps(content, indent=1) + "\n")
        pytest.skip(f"{path.name} recorded")
    assert not (lines := differences(curve, stored["curve"])), "\n".join(lines)


def test_a_last_bit_is_a_difference(one_thread: None) -> None:
    curve = {"training loss": [1.5, 0.25]}
    stored = plain(curve)
    assert differences(curve, stored) == []
    (line,) = differences({"training loss": [1.5, float(np.nextafter(0.25, 1))]}, stored)
    assert "1 of 2 differ, first at 2" in line
