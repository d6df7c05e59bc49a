"""Configuration: a run is one frozen value, and a typo is an error before the first step."""

from vinedresser.config.experiment import (
    Batching,
    BatchOrder,
    Compute,
    Evaluation,
    Experiment,
    ModelConfig,
    Objective,
    Optim,
    ScheduledSampling,
)
from vinedresser.config.section import Section
from vinedresser.config.source import parse_overrides, read_file, resolve
from vinedresser.config.task import (
    DataPath,
    LexiconCorpus,
    MetricName,
    Pair,
    SafeName,
    Task,
    TextCorpus,
    Tokenizer,
)

__all__ = [
    "BatchOrder",
    "Batching",
    "Compute",
    "DataPath",
    "Evaluation",
    "Experiment",
    "LexiconCorpus",
    "MetricName",
    "ModelConfig",
    "Objective",
    "Optim",
    "Pair",
    "SafeName",
    "ScheduledSampling",
    "Section",
    "Task",
    "TextCorpus",
    "Tokenizer",
    "parse_overrides",
    "read_file",
    "resolve",
]
