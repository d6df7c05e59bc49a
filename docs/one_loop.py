"""The whole idea in one flat file: corpus -> shards -> batches -> model -> loss -> decoded quality.

    python docs/one_loop.py

A Transformer learns to read numbers aloud: "407" -> "four hundred seven". Every part is the
package's own; only the loop is written out. `vinedresser train` runs the same parts through
`training/run.py`, which adds checkpoints, several workers, monitoring and tracking.

B sentences, S source positions, T target positions, D features, N real target tokens.
"""

import sys
import tempfile
from pathlib import Path

import torch

from trainables.transformer import TransformerConfig
from vinedresser.bundle import vocabulary_of
from vinedresser.config import Batching, Decoding, Optim, Task, Terms
from vinedresser.data.batching.reader import Batches, in_order, load_split
from vinedresser.data.shards import prepare, tokenizers
from vinedresser.decode import decode
from vinedresser.metrics import measure
from vinedresser.objective import Objective
from vinedresser.training.ema import AveragedWeights
from vinedresser.training.optimizer import build_optimizer, learning_rate, set_learning_rate

STEPS, EVALUATE_EVERY, SEED = 500, 100, 1
ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
]  # fmt: skip
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def spoken(number: int) -> str:
    """Return a number below 10,000 in words, separated by spaces."""
    words = []
    if number >= 1000:
        words += [ONES[number // 1000], "thousand"]
    if number % 1000 >= 100:
        words += [ONES[number % 1000 // 100], "hundred"]
    if (rest := number % 100) >= 20:
        words += [TENS[rest // 10 - 2], *([ONES[rest % 10]] if rest % 10 else [])]
    elif rest or not words:
        words.append(ONES[rest])
    return " ".join(words)


def write_corpus(folder: Path) -> Task:
    """Write 4,000 numbers to learn from and 200 held out; return the task that describes them."""
    numbers = torch.randperm(10_000, generator=torch.Generator().manual_seed(SEED))[:4200].tolist()
    for split, part in (("train", numbers[200:]), ("dev", numbers[:200])):
        (folder / f"{split}.digits").write_text("".join(f"{n}\n" for n in part))
        (folder / f"{split}.words").write_text("".join(f"{spoken(n)}\n" for n in part))
    corpus = {
        split: {"source": str(folder / f"{split}.digits"), "target": str(folder / f"{split}.words")}
        for split in ("train", "dev")
    }
    return Task.from_json(
        {
            "name": "numbers",
            "corpus": corpus,
            "source_tokenizer": {"kind": "characters"},
            "target_tokenizer": {"kind": "symbols"},
            # Word error rate of the decoded output, in percent: what selects the model.
            "metric": "wer",
        }
    )


def main() -> float:
    """Train, print the loss beside the decoded error rate; return the last decoded error rate."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory() as folder:
        # 1. Corpus -> shards: cleaned, tokenized, sorted by length, written once.
        task = write_corpus(Path(folder))
        shards = prepare(task, Path(folder) / "shards")
        source_tokenizer, target_tokenizer = tokenizers(shards)
        dev = load_split(shards, "dev")

        # 2. Shards -> batches of similar lengths: sentences x longest side <= max_padded_tokens.
        batching = Batching(max_padded_tokens=512)
        batches = Batches(shards, batching, seed=SEED).steps(rank=0, of=1, at=0)

        # 3. A model is one value that builds itself for a vocabulary.
        config = TransformerConfig(
            d_model=64, d_ff=128, num_heads=4, encoder_layers=2, decoder_layers=2, dropout=0.0
        )
        vocabulary = vocabulary_of(source_tokenizer, target_tokenizer, joint=False)
        model = config.build(vocabulary)
        evaluated = config.build(vocabulary).eval()
        optim = Optim(lr=3e-3, warmup_steps=100)
        optimizer = build_optimizer(Objective(Terms(), model), optim)
        ema = AveragedWeights(model, optim.ema_decay)

        model.train()
        for step in range(1, STEPS + 1):
            batch = next(batches)

            # 4. Teacher forcing: the decoder reads the gold prefix and predicts the next token.
            memory = model.encode(batch.source_BS, batch.source_lengths_B)
            states_BTD = model.decode(memory, batch.inputs_BT, batch.is_real_BT)

            # 5. The output layer turns states into a loss: sums over real tokens, then one mean.
            is_real_BT = batch.is_real_BT
            nll = model.output.nll(states_BTD[is_real_BT], batch.target_BT[is_real_BT])
            loss = nll / batch.tokens

            # 6. One update: the learning rate is a function of the step, the gradient is clipped.
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
            set_learning_rate(optimizer, learning_rate(optim, step=step, steps=STEPS))
            optimizer.step()
            ema.update(step)

            # 7. Quality is measured on decoded output, of the averaged weights: the teacher-forced
            #    loss cannot see what happens after the model's own first mistake.
            if step % EVALUATE_EVERY == 0:
                evaluated.load_state_dict(ema.tensors)
                outputs: dict[int, str] = {}
                for part in in_order(dev, tokens=4096):
                    found = decode(
                        evaluated, part.source_BS, part.source_lengths_B, Decoding(beam=1), cap=20
                    )
                    texts = [target_tokenizer.decode(ids) for ids in found.ids]
                    outputs |= dict(zip(part.rows_B.tolist(), texts, strict=True))
                hypotheses = [outputs[row] for row in range(len(dev.references))]
                error = measure("wer", hypotheses, dev.references).value
                sys.stdout.write(
                    f"step {step:4}  loss {float(loss.detach()):.3f} nats per token  "
                    f"decoded wer {error:6.2f} %   {dev.sources[0]} -> {hypotheses[0]}\n"
                )
    return error


if __name__ == "__main__":
    main()
