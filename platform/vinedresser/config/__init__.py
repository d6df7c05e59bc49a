"""Configuration: a run is one frozen value, and a typo is an error before the first step."""

from vinedresser.config.cleaning import Cleaning
from vinedresser.config.corpus import DataPath, LexiconCorpus, Pair, TableCorpus, TextCorpus
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
from vinedresser.config.speech import DigitsCorpus, Frames, SpeechCorpus
from vinedresser.config.task import MetricName, SafeName, Task, Tokenizer

__all__ = [
    "BatchOrder",
    "Batching",
    "Cleaning",
    "Compute",
    "DataPath",
    "DigitsCorpus",
    "Evaluation",
    "Experiment",
    "Feedback",
    "Frames",
    "LexiconCorpus",
    "MetricName",
    "ModelConfig",
    "Objective",
    "Optim",
    "Pair",
    "SafeName",
    "ScheduledSampling",
    "Section",
    "SpeechCorpus",
    "TableCorpus",
    "Task",
    "TextCorpus",
    "Tokenizer",
    "parse_overrides",
    "read_file",
    "resolve",
]
