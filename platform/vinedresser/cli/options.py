"""Key=value words of the verbs themselves, in addition to those of a configuration."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from pydantic import NonNegativeInt, PositiveInt

from vinedresser.config import Decoding, Section, parse_overrides
from vinedresser.errors import ConfigError

S = TypeVar("S", bound=Section)


class SplitOption(Section):
    """The split that `evaluate` scores; its other keys are those of Decoding."""

    split: Literal["train", "dev", "test"] = "test"


class Sizes(Section):
    """Sizes that `describe` builds a model for, where no task gives them."""

    # Ids of either side; 0 takes the task's, or 8,000.
    source: NonNegativeInt = 0
    target: NonNegativeInt = 0
    # One vocabulary for both sides; needed by `tie: all`.
    joint: bool | None = None
    # Above 0 the source is frames of so many numbers.
    features: NonNegativeInt = 0


class ShardView(Section):
    """What `describe` shows of a shard set."""

    # Budget of padded tokens that padding is stated for.
    tokens: PositiveInt = 4096
    # Folder of the pictures; `pictures=` for none.
    pictures: str | None = "pictures"


def decoding_of(default: Decoding, values: Mapping[str, Any]) -> Decoding:
    """Return a bundle's decoding with the options of a command.

    Raises:
        ConfigError: an unknown or bad option, or one without effect.
    """
    decoding = default.override(values)
    if "length_alpha" in values and decoding.beam == 1:
        raise ConfigError("length_alpha: no effect on greedy search; set beam=2 or more")
    return decoding


def split_words(own: S, words: Sequence[str]) -> tuple[S, dict[str, Any]]:
    """Apply a verb's own words to its options; return these and the other words' values."""
    values = parse_overrides(words)
    fields = type(own).model_fields
    rest = {key: value for key, value in values.items() if key not in fields}
    return own.override({k: v for k, v in values.items() if k in fields}), rest
