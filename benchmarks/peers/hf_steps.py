"""Runs inside transformers' own environment: Seq2SeqTrainer, timed. The last line is JSON.

`python hf_steps.py FOLDER SECONDS PRECISION SEED`, with PRECISION fp32 or bf16. A Marian model from
scratch in the size of ours, batches of 128 sentences by `group_by_length`, label smoothing .1. The
training step is the Trainer's own; it is wrapped to note the processor time of the process and the
real target tokens so far. The sampler begins with the longest sentences of 6,400, so that these
steps are well filled: the figure flatters it.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from transformers import MarianConfig, MarianMTModel, Seq2SeqTrainer, Seq2SeqTrainingArguments

WARM_UP, SENTENCES = 3, 128
UNK, PAD, BOS, EOS = 0, 1, 2, 3
SIDES = {"layers": 3, "attention_heads": 4, "ffn_dim": 1024}


def read(folder: Path) -> tuple[int, list[dict[str, list[int]]]]:
    """Size of the vocabulary and the pairs, as ids."""
    names = (folder / "voc.txt").read_text().split("\n")[:-1]
    ids = {name: i for i, name in enumerate(names)}
    source, target = (
        [
            [*(ids.get(piece, UNK) for piece in line.split()), EOS]
            for line in (folder / f"train.{language}").read_text().split("\n")[:-1]
        ]
        for language in ("de", "en")
    )
    pairs = zip(source, target, strict=True)
    return len(names), [{"input_ids": a, "labels": b} for a, b in pairs]


def padded(rows: list[list[int]], value: int) -> torch.Tensor:
    """Rows, filled up on the right."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A padded batch; the decoder is fed the target one later."""
    source = padded([row["input_ids"] for row in batch], PAD)
    labels = padded([row["labels"] for row in batch], -100)
    inputs = labels.masked_fill(labels == -100, PAD).roll(1, 1)
    inputs[:, 0] = BOS
    return {
        "input_ids": source,
        "attention_mask": (source != PAD).long(),
        "labels": labels,
        "decoder_input_ids": inputs,
    }


class Timed(Seq2SeqTrainer):
    """Leaves the process when the seconds are over."""

    seconds = 0.0

    def training_step(self, model, inputs, *rest, **names):
        """The Trainer's own, after a look at the clock."""
        marks = self.__dict__.setdefault("marks", [])
        tokens = self.__dict__.get("tokens", 0)
        marks.append((time.process_time(), tokens))
        if len(marks) > WARM_UP + 1 and marks[-1][0] - marks[WARM_UP][0] > self.seconds:
            (begun, before), (ended, after) = marks[WARM_UP], marks[-1]
            figures = {
                "tokens_per_cpu_second": (after - before) / (ended - begun),
                "steps": len(marks) - 1 - WARM_UP,
                "parameters": sum(p.numel() for p in model.parameters()),
            }
            print(json.dumps(figures), flush=True)
            os._exit(0)
        self.tokens = tokens + int((inputs["labels"] != -100).sum())
        return super().training_step(model, inputs, *rest, **names)


def main() -> None:
    """Trains until the seconds are over."""
    folder, seconds, precision, seed = Path(sys.argv[1]), *sys.argv[2:]
    torch.set_num_threads(1)
    torch.manual_seed(int(seed))
    size, rows = read(folder)
    sides = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in SIDES.items()}
    model = MarianMTModel(
        MarianConfig(
            vocab_size=size, d_model=256, **sides, dropout=0.1, attention_dropout=0.1,
            activation_function="relu", max_position_embeddings=256, scale_embedding=True,
            pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, decoder_start_token_id=BOS,
            forced_eos_token_id=None,
        )
    )  # fmt: skip
    trainer = Timed(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=str(folder / "hf"), max_steps=10**6, seed=int(seed),
            per_device_train_batch_size=SENTENCES, train_sampling_strategy="group_by_length",
            learning_rate=1e-3, label_smoothing_factor=0.1, max_grad_norm=1.0,
            bf16=precision == "bf16", use_cpu=True, save_strategy="no", report_to=[],
            logging_strategy="no", disable_tqdm=True,
        ),
        train_dataset=rows, data_collator=collate,
    )  # fmt: skip
    trainer.seconds = float(seconds)
    trainer.train()


if __name__ == "__main__":
    main()
