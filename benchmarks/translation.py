"""Multi30k German-English: BLEU on test_2016_flickr after the preset's updates, and the time.

`make bench NAME=translation`, ten minutes on two cores. The corpus is looked for in
`../shared/data/multi30k`; the variable MULTI30K names another place.
"""

import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.corpora.multi30k import multi30k
from search_spaces.translation import EXPERIMENT
from vinedresser.bundle import load_bundle
from vinedresser.config import Decoding
from vinedresser.data.batching.reader import load_split
from vinedresser.data.shards import prepare
from vinedresser.distributed.context import RunContext
from vinedresser.distributed.train import train
from vinedresser.evaluate import Scoring, evaluate
from vinedresser.tracking import store_for
from vinedresser.training.listener import Listener
from vinedresser.workspace.layout import Workspace


class Printed(Listener):
    """Prints each evaluation."""

    def evaluated(self, report: Mapping[str, Any]) -> None:
        """See Listener."""
        print(dict(report))

    finished = evaluated


def main() -> None:
    """Trains once, scores greedy and with beam 4, prints both and the figures as JSON."""
    task = multi30k(test="test_2016_flickr")
    experiment = EXPERIMENT.model_copy(update={"task": task})
    with tempfile.TemporaryDirectory() as workspace:
        shards = prepare(task, Path(workspace) / "shards", executor="in_process")
        place = Workspace(Path(workspace))
        context = RunContext(shards, place, store_for(place.path, task.name))
        load, started = os.getloadavg()[0], time.perf_counter()
        outcome = train(experiment, context, listener=Printed())
        seconds = time.perf_counter() - started
        bundle = load_bundle(Path(outcome.bundle))
        scores = {
            beam: evaluate(
                bundle.model,
                load_split(shards, "test"),
                bundle.target_tokenizer,
                Scoring("bleu", Decoding(beam=beam), task.max_target_length),
            ).scores
            for beam in (1, 4)
        }
    print(f"{experiment.steps} updates in {seconds:.0f} s, evaluation included (load {load:.1f})")
    for beam, score in scores.items():
        print(f"beam {beam}: BLEU {score.value:.2f}  {score.signature}")
    figures = {"bleu_greedy": scores[1].value, "bleu_beam4": scores[4].value, "seconds": seconds}
    print(json.dumps({key: round(value, 2) for key, value in figures.items()}))


if __name__ == "__main__":
    main()
