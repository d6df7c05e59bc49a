"""Key=value words that belong to a verb itself, beside those of a configuration."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from vinedresser.config import Section, parse_overrides

S = TypeVar("S", bound=Section)


class Scoring(Section):
    """Decoding by `evaluate` and `translate`."""

    split: Literal["train", "dev", "test"] = "test"
    # Memory grows with beam x vocabulary; scores stop gaining before 100.
    beam: Annotated[PositiveInt, Field(le=1000)] = 1
    length_alpha: NonNegativeFloat = 0.6


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


def split_words(own: S, words: Sequence[str]) -> tuple[S, dict[str, Any]]:
    """Apply a verb's own words to its options; return these and the other words' values."""
    values = parse_overrides(words)
    fields = type(own).model_fields
    rest = {key: value for key, value in values.items() if key not in fields}
    return own.override({k: v for k, v in values.items() if k in fields}), rest
