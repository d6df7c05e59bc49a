"""What one would write by hand for torchrun: DDP, AdamW, the same model and the same batches.

`torchrun --nproc-per-node 1 torchrun_steps.py SHARDS EXPERIMENT FILE`. No tracking, no evaluation,
no checkpoints. After its first update it writes the machine's monotonic clock into FILE.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy, linear
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    """Trains; whoever started it ends it."""
    shards, plain, file = sys.argv[1:]
    from vinedresser.config import Batching, Experiment
    from vinedresser.data.batching.reader import Batches
    from vinedresser.data.shards import open_shards
    from vinedresser.model import Vocabulary
    from vinedresser.special_ids import PAD

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    experiment = Experiment.from_json(json.loads(Path(plain).read_text()))
    opened = open_shards(Path(shards))
    torch.manual_seed(1)
    size = opened.source_size
    model = experiment.model.build(Vocabulary(size, size, joint=True)).train()

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, batch):
            states_BTD = model.decode(
                model.encode(batch.source_BS, batch.source_lengths_B), batch.inputs_BT
            )
            logits_BTV = linear(states_BTD, model.output.weight, model.output.bias)
            return cross_entropy(
                logits_BTV.flatten(0, 1), batch.target_BT.flatten(), ignore_index=PAD,
                label_smoothing=0.1,
            )  # fmt: skip

    trainee = DistributedDataParallel(Loss())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = Batches(
        opened, Batching(max_padded_tokens=experiment.batch.max_padded_tokens), seed=1
    )
    for batch in batches.steps(rank=dist.get_rank(), of=dist.get_world_size()):
        with torch.autocast("cpu", torch.bfloat16):
            loss = trainee(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        partial = Path(f"{file}.partial")
        partial.write_text(repr(time.monotonic()))
        partial.rename(file)
        time.sleep(600)


if __name__ == "__main__":
    main()
