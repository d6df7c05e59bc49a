"""Configuration: a run is one frozen value, and a typo is an error before the first step."""

from vinedresser.config.cleaning import Cleaning
from vinedresser.config.corpus import AnyCorpus, CorpusConfig, DataPath
from vinedresser.config.decoding import Decoding
from vinedresser.config.experiment import (
    Batching,
    BatchOrder,
    Compute,
    Evaluation,
    Experiment,
    Feedback,
    Objective,
    Optim,
    ScheduledSampling,
)
from vinedresser.config.files import parse_overrides, read_file, resolve
from vinedresser.config.kinds import ModelConfig
from vinedresser.config.section import Section
from vinedresser.config.task import Frames, MetricName, SafeName, Task, Tokenizer

__all__ = [
    "AnyCorpus",
    "BatchOrder",
    "Batching",
    "Cleaning",
    "Compute",
    "CorpusConfig",
    "DataPath",
    "Decoding",
    "Evaluation",
    "Experiment",
    "Feedback",
    "Frames",
    "MetricName",
    "ModelConfig",
    "Objective",
    "Optim",
    "SafeName",
    "ScheduledSampling",
    "Section",
    "Task",
    "Tokenizer",
    "parse_overrides",
    "read_file",
    "resolve",
]
