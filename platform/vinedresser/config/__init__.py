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
    Optim,
)
from vinedresser.config.files import parse_overrides, read_file, resolve
from vinedresser.config.kinds import ModelConfig
from vinedresser.config.section import Section
from vinedresser.config.task import Frames, MetricName, SafeName, Task, Tokenizer
from vinedresser.config.terms import TermConfig, Terms

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
    "Frames",
    "MetricName",
    "ModelConfig",
    "Optim",
    "SafeName",
    "Section",
    "Task",
    "TermConfig",
    "Terms",
    "Tokenizer",
    "parse_overrides",
    "read_file",
    "resolve",
]
