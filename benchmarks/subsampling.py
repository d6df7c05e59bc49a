"""Step time of subsampling by 4 against none: `make bench NAME=subsampling`, about four minutes.

One training step (forward, backward, update) on one thread, on synthetic frames of a speech
corpus's size: 8 sentences of 320 to 400 frames of 80 features, 40 target tokens of a vocabulary of
60. Steps with and without alternate; a ratio is the median over pairs of the ratio in one pair,
and its range holds the middle half of the pairs. In the attention RNN (`listener`) the reductions
stand between layers (Chan et al. 2016): of four layers the first reads every frame, the second
half of them, so that its encoder's work falls by 2 and not by 4, and by less where concatenation
widens what a layer reads. The Transformer reduces before its first layer, and its attention falls
by 16. methods.md 27.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable

import torch

from vinedresser.batch import Batch
from vinedresser.config.kinds import named_model
from vinedresser.model import Seq2Seq, Vocabulary
from vinedresser.objective import target_nll

FEATURES, IDS, SENTENCES, FRAMES, TOKENS = 80, 60, 8, 400, 40
KINDS = ("concat", "pool", "conv")


def a_batch(seed: int = 0) -> Batch:
    """Noise: what a step costs does not depend on what it reads."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(FRAMES * 4 // 5, FRAMES + 1, (SENTENCES,), generator=draw)
    lengths[0] = FRAMES
    return Batch(
        torch.randn(SENTENCES, FRAMES, FEATURES, generator=draw),
        lengths,
        torch.randint(4, IDS, (SENTENCES, TOKENS), generator=draw),
        torch.full((SENTENCES,), TOKENS),
        torch.arange(SENTENCES),
    )


def model_of(name: str, kind: str) -> Seq2Seq:
    """A preset on frames; two reductions by 2 of this kind, or none."""
    torch.manual_seed(0)
    config = named_model(name, {"subsampling": {"kind": kind, "factor": 2, "layers": 2}})
    return config.build(Vocabulary(0, IDS, features=FEATURES)).train()


def stepper(model: Seq2Seq, batch: Batch, precision: str) -> Callable[[], float]:
    """What makes one update and answers its processor seconds."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    cast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else None

    def step() -> float:
        begun = time.process_time()
        with cast or contextlib.nullcontext():
            loss = target_nll(model, model(batch), batch)
        loss.mean.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - begun

    return step


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def compare(name: str, precision: str, pairs: int) -> dict[str, float]:
    """Kind -> full step over subsampled step; prints a line each."""
    batch, figures = a_batch(), {}
    full = stepper(model_of(name, "none"), batch, precision)
    short = {kind: stepper(model_of(name, kind), batch, precision) for kind in KINDS}
    for step in (full, *short.values()):
        step()  # the first one makes the optimizer's state
    whole: dict[str, list[float]] = {kind: [] for kind in KINDS}
    reduced: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for pair in range(pairs):
        for kind, step in short.items():
            if pair % 2:
                reduced[kind].append(step())
                whole[kind].append(full())
            else:
                whole[kind].append(full())
                reduced[kind].append(step())
    for kind in KINDS:
        ratios = [a / b for a, b in zip(whole[kind], reduced[kind], strict=True)]
        low, middle, high = quartiles(ratios)
        times = f"{1e3 * statistics.median(whole[kind]):7.0f} ms"
        times += f"{1e3 * statistics.median(reduced[kind]):7.0f} ms"
        print(f"{name:18} {precision} {kind:7}{times}   {middle:.2f} ({low:.2f} to {high:.2f})")
        figures[kind] = round(middle, 2)
    return figures


def main() -> None:
    """Prints the table, then the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["listener", "transformer-small"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--pairs", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'model':24}{'kind':9}{'none':>8}{'by 4':>10}   none over by 4 (middle half)")
    figures = {
        f"{name}_{precision}": compare(name, precision, arguments.pairs)
        for name in arguments.models
        for precision in arguments.precisions
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
