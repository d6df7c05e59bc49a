"""Runs inside JoeyNMT's own environment: its training loop, timed. The last line is JSON.

`python joeynmt_steps.py CONFIG SECONDS`. The loop is JoeyNMT's own; its training step is wrapped
to note the processor time of the process and the real target tokens so far.
"""

import json
import os
import sys
import time

import joeynmt.__main__
import joeynmt.training
import torch

WARM_UP = 3


def main() -> None:
    """Trains until the seconds are over, then prints tokens a processor second and leaves."""
    config, seconds = sys.argv[1], float(sys.argv[2])
    torch.set_num_threads(1)
    manager = joeynmt.training.TrainManager
    original = manager._train_step
    marks, tokens = [], 0

    def timed(self, batch):
        nonlocal tokens
        marks.append((time.process_time(), tokens))
        if len(marks) > WARM_UP + 1 and marks[-1][0] - marks[WARM_UP][0] > seconds:
            (begun, before), (ended, after) = marks[WARM_UP], marks[-1]
            rate = (after - before) / (ended - begun)
            steps = len(marks) - 1 - WARM_UP
            print(json.dumps({"tokens_per_cpu_second": rate, "steps": steps}), flush=True)
            os._exit(0)
        result = original(self, batch)
        tokens += int(batch.ntokens)
        return result

    manager._train_step = timed
    sys.argv = ["joeynmt", "train", config, "--skip-test"]
    joeynmt.__main__.main()


if __name__ == "__main__":
    main()
