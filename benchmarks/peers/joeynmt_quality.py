"""Runs inside JoeyNMT's own environment: trains, decodes the test split. The last line is JSON.

`python joeynmt_quality.py JOB.json`. The loop, the batches and the greedy search are JoeyNMT's own;
the learning rate of each update is given, because it has no schedule that falls to nought.
"""

import json
import sys
import time
from pathlib import Path

import joeynmt.__main__
import joeynmt.training
import torch


def main() -> None:
    """Trains for the updates of the job and writes the pieces of each hypothesis, a line each."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    rates, marks = job["rates"], []
    manager = joeynmt.training.TrainManager
    train, step = manager.train_and_validate, manager._train_step

    class Given:
        """Stands where JoeyNMT's schedule stood."""

        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self, done):
            """After an update: the rate of the next."""
            for group in self.optimizer.param_groups:
                group["lr"] = rates[min(done + 1, len(rates) - 1)]

        def state_dict(self):
            """Nothing of it is kept."""
            return {}

    def timed(self, batch):
        marks.append(time.process_time())
        return step(self, batch)

    def finished(self, *_):
        """In place of its checkpoint: decodes the test split, writes and tells."""
        seconds = time.process_time() - marks[0]
        parameters = sum(p.numel() for p in self.model.parameters())
        figures = {"cpu_seconds": seconds, "parameters": parameters}
        if not job["out"]:
            print(json.dumps(figures), flush=True)
            return
        prediction = joeynmt.training.predict(
            model=self.model, data=job["test"], device=self.device, n_gpu=0, args=self.dev_cfg,
            autocast=self.autocast,
        )  # fmt: skip
        Path(job["out"]).write_text("\n".join(prediction[2]) + "\n")
        print(json.dumps(figures), flush=True)

    def start(self, train_data, valid_data):
        job["test"] = valid_data
        self.scheduler, self.scheduler_step_at = Given(self.optimizer), "step"
        self.scheduler.step(-1)
        train(self, train_data, valid_data)

    manager.train_and_validate, manager._train_step = start, timed
    manager._save_checkpoint = finished
    sys.argv = ["joeynmt", "train", job["config"], "--skip-test"]
    joeynmt.__main__.main()


if __name__ == "__main__":
    main()
