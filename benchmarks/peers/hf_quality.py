"""Runs inside transformers' own environment: trains, decodes the test split. Last a line of JSON.

`python hf_quality.py JOB.json`. Seq2SeqTrainer with bf16 and batches grouped by length; the model
is M2M100's, which has layer norm first and sinusoidal positions as ours, in the same size. The
learning rate of each update is given.
"""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)

UNK, PAD, BOS, EOS = 0, 1, 2, 3


def main() -> None:
    """Trains for the updates of the job and writes the pieces of each hypothesis, a line each."""
    job = json.loads(Path(sys.argv[1]).read_text())
    folder, rates = Path(job["folder"]), job["rates"]
    torch.set_num_threads(1)
    torch.manual_seed(job["seed"])
    names = (folder / "voc.txt").read_text().split("\n")[:-1]
    ids = {name: i for i, name in enumerate(names)}

    def read(name):
        lines = (folder / name).read_text().split("\n")[:-1]
        return [[*(ids.get(piece, UNK) for piece in line.split()), EOS] for line in lines]

    rows = [
        {"input_ids": source, "labels": target}
        for source, target in zip(read("train.de"), read("train.en"), strict=True)
    ]
    sizes = {
        f"{side}_{name}": size
        for side in ("encoder", "decoder")
        for name, size in (("layers", 3), ("attention_heads", 4), ("ffn_dim", 1024))
    }
    config = M2M100Config(
        vocab_size=len(names), d_model=256, **sizes, dropout=0.1, attention_dropout=0.1,
        activation_dropout=0.1, encoder_layerdrop=0.0, decoder_layerdrop=0.0, init_std=256**-0.5,
        scale_embedding=True, max_position_embeddings=512, pad_token_id=PAD, bos_token_id=BOS,
        eos_token_id=EOS, decoder_start_token_id=BOS,
    )  # fmt: skip
    model = M2M100ForConditionalGeneration(config)

    def padded(lists, value):
        width = max(map(len, lists))
        return torch.tensor([row + [value] * (width - len(row)) for row in lists])

    def collate(batch):
        source = padded([row["input_ids"] for row in batch], PAD)
        labels = padded([row["labels"] for row in batch], -100)
        shifted = labels.masked_fill(labels == -100, PAD).roll(1, 1)
        shifted[:, 0] = BOS
        return {
            "input_ids": source,
            "attention_mask": (source != PAD).long(),
            "labels": labels,
            "decoder_input_ids": shifted,
        }

    class Clock(TrainerCallback):
        """Processor seconds of the updates."""

        begun = ended = 0.0

        def on_train_begin(self, *_args, **_names):
            """Before the first."""
            self.begun = time.process_time()

        def on_train_end(self, *_args, **_names):
            """After the last."""
            self.ended = time.process_time()

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1.0, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: rates[min(done, len(rates) - 1)]
    )
    clock = Clock()
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=job["out"] + ".trainer", max_steps=len(rates), seed=job["seed"],
            per_device_train_batch_size=job["sentences"], train_sampling_strategy="group_by_length",
            label_smoothing_factor=0.1, max_grad_norm=1.0, bf16=job["bf16"], use_cpu=True,
            save_strategy="no", report_to=[], logging_strategy="no", disable_tqdm=True,
        ),
        train_dataset=rows, data_collator=collate, callbacks=[clock],
        optimizers=(optimizer, schedule),
    )  # fmt: skip
    trainer.train()
    parameters = sum(p.numel() for p in model.parameters())
    figures = {"cpu_seconds": clock.ended - clock.begun, "parameters": parameters}
    if not job["out"]:
        print(json.dumps(figures))
        return
    test, hypotheses = read("test.de"), {}
    model.eval()
    order = sorted(range(len(test)), key=lambda row: len(test[row]))
    for first in range(0, len(order), 64):
        chosen = order[first : first + 64]
        source = padded([test[row] for row in chosen], PAD)
        found = model.generate(
            input_ids=source, attention_mask=(source != PAD).long(), num_beams=1, do_sample=False,
            max_new_tokens=job["cap"],
        )  # fmt: skip
        for row, said in zip(chosen, found.tolist(), strict=True):
            pieces = said[1:]
            end = pieces.index(EOS) if EOS in pieces else len(pieces)
            hypotheses[row] = " ".join(names[i] for i in pieces[:end] if i > EOS)
    lines = [hypotheses[row] for row in range(len(test))]
    Path(job["out"]).write_text("\n".join(lines) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
